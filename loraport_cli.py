"""The `loraport` command: one Typer app whose rooms are imported only when one of their commands is called.

`loraport --help` answers without importing torch, vLLM or any room: the names and first lines below are all it shows,
and tests/test_cli.py compares them with the commands' own help.
"""

import sys
from importlib import import_module, metadata
from typing import Annotated

import typer

# command -> (module, first line of its help). A module's function has the command's name with _ for -.
COMMANDS = {
    "train": ("loraport.train.cli", "Train a LoRA adapter on rows and prove it."),
    "serve": ("loraport.serve.cli", "Serve a base and its adapters on one OpenAI-compatible URL."),
    "eval": ("loraport.bench.cli", "Measure success and stop rate of models on held-out rows."),
    "adapters": ("loraport.train.cli", "List the adapters on this machine, or show one."),
    "chat": ("loraport.clients.cli", "Chat with a model of an endpoint in the terminal."),
    "env": ("loraport.clients.cli", "Print variables that point OpenAI clients at the endpoint."),
    "aider": ("loraport.clients.cli", "Start Aider against the endpoint, told its context size."),
}

# Commands that hand on the flags they do not know, to the program that they start.
HANDS_ON = {"aider": {"allow_extra_args": True, "ignore_unknown_options": True}}


def command_of(arguments: list[str]) -> str | None:
    """The command that `arguments` call: the first word that is not a flag."""
    return next((word for word in arguments if not word.startswith("-")), None)


def build_app(called: str | None) -> typer.Typer:
    """The app in which only the `called` command is real; the others are names with a line of help."""
    app = typer.Typer(
        name="loraport",
        help="Rows in, a LoRA adapter that provably works out, answering on one OpenAI-compatible URL.",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
    )
    app.callback()(global_options)
    for name, (module, line) in COMMANDS.items():
        target = getattr(import_module(module), name) if name == called else lambda: None
        if isinstance(target, typer.Typer):
            app.add_typer(target, name=name, help=line)
        else:
            app.command(name, help=None if name == called else line, context_settings=HANDS_ON.get(name))(target)
    return app


def print_version(wanted: bool) -> None:
    """`--version`: print the version and end."""
    if wanted:
        typer.echo(metadata.version("loraport"))
        raise typer.Exit()


def global_options(
    debug: Annotated[bool, typer.Option("--debug", help="Show a traceback when something fails.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=print_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Options that stand before the command."""


def main() -> None:
    """Run the command line; every error leaves in one form, with the exit code of its kind."""
    arguments = sys.argv[1:]
    debug = "--debug" in arguments
    try:
        build_app(command_of(arguments))()
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        from loraport.clients.errors import LoraportError
        from loraport.clients.terminal import exit_with

        if not isinstance(error, LoraportError):
            hint = "" if debug else "run the same command again as `loraport --debug ...` and report what it prints"
            error = LoraportError(f"this is a bug of ours: {type(error).__name__}: {error}", hint).with_traceback(
                error.__traceback__
            )
        exit_with(error, debug)


if __name__ == "__main__":
    main()
