"""The client commands of `loraport`: `chat`, `env` and `aider`."""

import sys
from typing import Annotated

import typer

from loraport.clients.home import Home
from loraport.clients.terminal import print_json, say

BaseUrl = Annotated[str | None, typer.Option(help="The endpoint. Default: the one that serves here.")]
Model = Annotated[str | None, typer.Option(help="Name of the model. Default: the endpoint's first adapter.")]


def chat(
    model: Model = None,
    base_url: BaseUrl = None,
    system: Annotated[str, typer.Option(help="System message.")] = "",
    max_tokens: Annotated[int | None, typer.Option(min=1, help="Longest reply. Default: what fits.")] = None,
    temperature: Annotated[float | None, typer.Option(min=0, help="0 is greedy. Default: the server's.")] = None,
    thinking: Annotated[
        bool | None, typer.Option("--thinking/--no-thinking", help="For models that can. Default: their template's.")
    ] = None,
) -> None:
    """Chat with a model of an endpoint in the terminal.

    Ctrl-C stops a reply, Ctrl-D or /exit ends, /help lists the commands. Where standard input is no terminal, each of
    its lines is a message and the replies are all that standard output gets.
    """
    from loraport.clients.chat import Conversation, Settings, Terminal
    from loraport.clients.endpoint import find_base_url, find_record
    from loraport.clients.models import choose_model, connect, context_length, list_models

    url = find_base_url(base_url, Home.default())
    with connect(url) as client:
        cards = list_models(client)
        name = choose_model(cards, model, find_record(url, Home.default()))
        settings = Settings(max_tokens, temperature, thinking)
        conversation = Conversation(client, name, settings, context_length(cards, name), system)
        Terminal(conversation, sys.stdin.isatty()).run()


def env(
    base_url: BaseUrl = None,
    show_key: Annotated[bool, typer.Option("--show-key", help="Print the key also where it is set.")] = False,
    anthropic: Annotated[
        bool, typer.Option("--anthropic", help="For Anthropic's clients, such as Claude Code, instead.")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="One JSON document on standard output.")] = False,
) -> None:
    """Print variables that point OpenAI clients at the endpoint.

    In a shell: eval "$(loraport env)". A key that is set stays where it is; it is referred to, not printed.
    """
    from loraport.clients.endpoint import key_variable
    from loraport.clients.environment import export_lines, look_up, own_base_url, references, variables

    home = Home.default()
    endpoint = look_up(own_base_url(base_url, home), home)
    values = variables(endpoint, show_key, anthropic)
    if json:
        known = {"models": endpoint.models, "default_model": endpoint.default_model, "context": endpoint.context}
        print_json({**values, **known})
    else:
        typer.echo(export_lines(values, {} if show_key else references(anthropic)), nl=False)
    if endpoint.problem:
        say(f"# warning: {endpoint.problem.message}", "yellow")
    else:
        say(f"# models: {', '.join(endpoint.models)}", "dim")
    if not show_key and key_variable():
        say(f"# the key is set already, in {key_variable()}, and is not printed (--show-key prints it)", "dim")


def aider(
    context: typer.Context,
    model: Model = None,
    base_url: BaseUrl = None,
    thinking: Annotated[
        bool | None, typer.Option("--thinking/--no-thinking", help="For models that can. Default: their template's.")
    ] = None,
) -> None:
    """Start Aider against the endpoint, told its context size.

    Everything else goes to Aider, and wins: loraport aider --message "add a test" parse.py
    (what stands after -- goes to Aider even if it is --help).
    """
    from loraport.clients.aider import USEFUL_CONTEXT, divide, find_aider, start
    from loraport.clients.endpoint import find_base_url
    from loraport.clients.environment import look_up

    home = Home.default()
    program = find_aider()
    wanted = model.removeprefix("openai/") if model else None
    endpoint = look_up(find_base_url(base_url, home), home, wanted)
    if endpoint.problem:
        raise endpoint.problem
    parts = divide(endpoint)
    size = f"{endpoint.context:,} tokens" if endpoint.context else "unknown"
    say(f"Aider with {endpoint.default_model} at {endpoint.base_url}, context {size}", "dim")
    if parts:
        mapped = f"{parts.repo_map:,} for the repo map" if parts.repo_map else "no repo map"
        say(f"{parts.reply:,} tokens for a reply, {mapped}, {parts.history:,} for what was said before", "dim")
    if endpoint.context and endpoint.context < USEFUL_CONTEXT:
        say(
            f"warning: Aider needs a context of about {USEFUL_CONTEXT:,} tokens; expect it to work on small files only",
            "yellow",
        )
    start(program, endpoint, parts, thinking, home, context.args)
