"""The `loraport` command: one Typer app whose rooms are imported only when one of their commands is called.

`loraport --help` answers without importing torch, vLLM or any room: the names and first lines below are all it shows,
and tests/test_cli.py compares them with the commands' own help.
"""

import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module, metadata
from types import FrameType
from typing import Annotated, Any

import typer

# command -> (module, first line of its help). A module's function has the command's name with _ for -.
COMMANDS = {
    "data": ("loraport.train.data.cli", "Build, check and show the rows to train on."),
    "train": ("loraport.train.cli", "Train a LoRA adapter on rows and prove it."),
    "serve": ("loraport.serve.cli", "Serve a base and its adapters on one OpenAI-compatible URL."),
    "eval": ("loraport.bench.cli", "Measure success and stop rate of models on held-out rows."),
    "adapters": ("loraport.serve.adapters.cli", "List, load, replace, roll back and remove adapters."),
    "chat": ("loraport.clients.cli", "Chat with a model of an endpoint in the terminal."),
    "env": ("loraport.clients.cli", "Print variables that point OpenAI clients at the endpoint."),
    "aider": ("loraport.clients.cli", "Start Aider against the endpoint, told its context size."),
}

# group -> (line of help, {command -> (module, function, first line of its help)}): the commands of a group may live in
# different rooms, so each is imported alone.
JOBS = "loraport.serve.terminal.cli"
GROUPS = {
    "bench": (
        "Measure training and serving against peers and limits.",
        {
            "train": (
                "loraport.bench.training.cli",
                "bench_train",
                "Measure training speed and memory, ours against its peers.",
            ),
            "throughput": (
                "loraport.bench.serving.cli",
                "bench_throughput",
                "Measure tokens per second and latencies of a server under load.",
            ),
            "lora-tax": (
                "loraport.bench.serving.cli",
                "bench_lora_tax",
                "Measure what adapters cost against their base, interleaved in one run.",
            ),
            "adapters": (
                "loraport.bench.serving.adapters_cli",
                "bench_adapters",
                "Measure many adapters at once: by popularity, cold, warm and hot, and where it tips.",
            ),
            "gateway": (
                "loraport.bench.serving.cli",
                "bench_gateway",
                "Measure what a gateway adds: the same load through it and past it.",
            ),
            "kv": (
                "loraport.bench.serving.kv_cli",
                "bench_kv",
                "Measure how much context a server takes, and how many requests its KV cache holds.",
            ),
            "startup": (
                "loraport.bench.serving.tools_cli",
                "bench_startup",
                "Measure how long a serve command takes to start, cold and warm.",
            ),
            "all": (
                "loraport.bench.serving.report_cli",
                "bench_all",
                "Run a selection of the benches within a time budget, and make a report of them.",
            ),
            "report": (
                "loraport.bench.serving.report_cli",
                "bench_report",
                "Make one self-contained HTML page of the documents of benches, with JSON and CSV.",
            ),
            "compare": (
                "loraport.bench.serving.report_cli",
                "bench_compare",
                "Show how two runs of the same bench differ; fail where the second is worse.",
            ),
            "plan": (
                "loraport.bench.serving.plan_cli",
                "bench_plan",
                "Hold the plan of serving against the memory that vLLM reports.",
            ),
            "make-adapters": (
                "loraport.bench.serving.tools_cli",
                "bench_make_adapters",
                "Make random adapters for a base, to load-test a server before anyone has trained.",
            ),
            "make-base": (
                "loraport.bench.serving.tools_cli",
                "bench_make_base",
                "Make the folder of a base of a real shape, without weights.",
            ),
        },
    ),
    "jobs": (
        "Create, follow and cancel fine-tuning jobs of the endpoint.",
        {
            "submit": (JOBS, "jobs_submit", "Upload rows and create a job."),
            "list": (JOBS, "jobs_list", "List the jobs, the newest first."),
            "show": (
                JOBS,
                "jobs_show",
                "Show a job: its settings, what came of it, its checkpoints.",
            ),
            "logs": (JOBS, "jobs_logs", "Print all that a job's trainer has said."),
            "cancel": (JOBS, "jobs_cancel", "Cancel a job."),
            "pause": (
                JOBS,
                "jobs_pause",
                "Pause a job: its checkpoint is kept, its GPU is free.",
            ),
            "resume": (JOBS, "jobs_resume", "Let a paused job go on, from its checkpoint."),
            "watch": (
                JOBS,
                "jobs_watch",
                "Follow a job to its end, or see all jobs as they go.",
            ),
        },
    ),
    "keys": (
        "Make, list and revoke the API keys of the endpoint.",
        {
            "create": ("loraport.serve.gateway.cli", "keys_create", "Make an API key and print it, this once."),
            "list": (
                "loraport.serve.gateway.cli",
                "keys_list",
                "List the API keys, what they may do and what they have used.",
            ),
            "revoke": (
                "loraport.serve.gateway.cli",
                "keys_revoke",
                "Revoke an API key: the next request with it is refused.",
            ),
        },
    ),
    "plan": (
        "Say what a run will need, before it starts.",
        {
            "train": (
                "loraport.train.memory.cli",
                "plan_train",
                "Say what training will need: memory, time, cost, settings.",
            ),
            "serve": (
                "loraport.serve.plan.cli",
                "plan_serve",
                "Say what serving will need: weights, context, memory, flags.",
            ),
        },
    ),
}

# Commands that hand on the flags they do not know, to the program that they start.
HANDS_ON = {"aider": {"allow_extra_args": True, "ignore_unknown_options": True}}

# Commands whose one document is a verdict: with --json an error is one too. Elsewhere it says that something is done.
VERDICTS = ("data", "plan serve", "plan train")

CLICK_USAGE_ERROR = typer.BadParameter.__mro__[1]  # Click's, which Typer may bring along under a name of its own
SAME_SIGNAL_S = 5.0  # signals closer together than this are one


def command_of(arguments: list[str]) -> str | None:
    """The command that `arguments` call: the first word that is not a flag; of a group the first two."""
    words = [word for word in arguments if not word.startswith("-")]
    return " ".join(words[: 2 if words and words[0] in GROUPS else 1]) or None


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
            own = {"help": None if name == called else line, "context_settings": HANDS_ON.get(name)}
            app.command(name, cls=getattr(target, "command_class", None), **own)(target)
    for group, (line, members) in GROUPS.items():
        app.add_typer(build_group(group, members, called), name=group, help=line)
    return app


def build_group(group: str, members: dict[str, tuple[str, str, str]], called: str | None) -> typer.Typer:
    """A group of commands of which only the `called` one ("plan train") is real."""
    made = typer.Typer(no_args_is_help=True, rich_markup_mode=None)
    for name, (module, function, line) in members.items():
        is_called = called == f"{group} {name}"
        target = getattr(import_module(module), function) if is_called else lambda: None
        made.command(name, help=None if is_called else line)(target)
    return made


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


def reserve_closed_streams() -> None:
    """Put /dev/null where standard input, output or error is closed (`>&-`).

    Python leaves None in sys then, and the next file that is opened would get the number of the closed one: a log, say,
    into which then goes what was meant for nobody.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            number = os.open(os.devnull, os.O_RDWR)
            os.set_inheritable(number, True)
            setattr(sys, name, open(number, mode))  # noqa: SIM115, PTH123  (for the rest of the process)


@contextmanager
def signals_as_exits() -> Iterator[None]:
    """Turn SIGTERM and SIGHUP into SystemExit, so that what is in `finally:` is done; those ignored stay ignored.

    `timeout` signals a process and then its group: a second signal soon after the first is the same one, and must not
    interrupt the clean-up. `loraport serve` has its own way with signals while it runs.
    """
    ended_at = float("-inf")

    def end(number: int, frame: FrameType | None) -> None:
        nonlocal ended_at
        is_first, ended_at = time.monotonic() - ended_at > SAME_SIGNAL_S, time.monotonic()
        if is_first:
            raise SystemExit(128 + number)

    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    replaced = [number for number, handler in before.items() if handler is not signal.SIG_IGN]
    for number in replaced:
        signal.signal(number, end)
    try:
        yield
    finally:
        for number in replaced:
            signal.signal(number, before[number])


def is_unread(error: BaseException) -> bool:
    """Whether `error` comes of writing to a pipe that nobody reads any more (`| head`). Typer and Rich hide it."""
    return isinstance(error, BrokenPipeError) or isinstance(error.__context__, BrokenPipeError)


def end_unread() -> None:
    """End as a program does that SIGPIPE ended, without the words that Python has for it at its end."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for number in (1, 2):
        os.dup2(nowhere, number)
    sys.exit(128 + signal.SIGPIPE)


def explain_usage(error: Any, command: str | None) -> Exception:
    """Click's error about the words of the command line as one of ours; where it is help that was missed, give it."""
    from loraport.clients.errors import UsageError
    from loraport.clients.terminal import program

    if error.ctx and error.format_message() == error.ctx.get_help():  # a group called without a command
        error.show()
        sys.exit(error.exit_code)
    said = error.message if getattr(error, "possibilities", None) else error.format_message()
    said, _, near = said.replace("Value error, ", "").rstrip(".?").partition(". Did you mean ")
    near = near.strip("'") or ", ".join(getattr(error, "possibilities", None) or ())
    called = error.ctx.command_path.partition(" ")[2] if error.ctx else command
    hint = f"`{' '.join(filter(None, (program(), called, '--help')))}` shows what there is"
    return UsageError(f"{said[:1].lower()}{said[1:]}.", f"did you mean {near}? {hint}" if near else hint)


def run_command(arguments: list[str]) -> None:
    """Run the command; every error leaves in one form, with the exit code of its kind."""
    debug = "--debug" in arguments
    try:
        code = build_app(command_of(arguments))(standalone_mode=False, prog_name="loraport")
        sys.exit(code if isinstance(code, int) else 0)
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        from loraport.clients.errors import LoraportError
        from loraport.clients.terminal import exit_with

        if isinstance(error, CLICK_USAGE_ERROR):
            error = explain_usage(error, command_of(arguments))
        if not isinstance(error, LoraportError):
            hint = "" if debug else "run the same command again as `loraport --debug ...` and report what it prints"
            error = LoraportError(f"this is a bug of ours: {type(error).__name__}: {error}", hint).with_traceback(
                error.__traceback__
            )
        exit_with(error, debug, is_json="--json" in arguments and command_of(arguments) in VERDICTS)
    finally:
        sys.stdout.flush()


def main() -> None:
    """Run the command line as a good citizen of a shell: see the functions above for closed streams and signals."""
    reserve_closed_streams()
    try:
        with signals_as_exits():
            run_command(sys.argv[1:])
    except (BrokenPipeError, SystemExit) as error:
        if is_unread(error):
            end_unread()
        raise


if __name__ == "__main__":
    main()
