"""The variables that point OpenAI clients at an endpoint.

    $ eval "$(loraport env)"

Standard output holds nothing but `export` lines: a comment there would be a command in an interactive zsh.
"""

from dataclasses import dataclass
from shlex import quote

from loraport.clients.endpoint import (
    EndpointRecord,
    api_key,
    find_base_url,
    find_record,
    is_alive,
    key_variable,
    read_records,
)
from loraport.clients.errors import EndpointError
from loraport.clients.home import Home
from loraport.clients.models import choose_model, connect, context_length, list_models

# Every name under which Claude Code asks for a model: one that the endpoint does not have ends in an error.
ANTHROPIC_MODELS = (
    "ANTHROPIC_MODEL",
    "ANTHROPIC_DEFAULT_OPUS_MODEL",
    "ANTHROPIC_DEFAULT_SONNET_MODEL",
    "ANTHROPIC_DEFAULT_HAIKU_MODEL",
    "ANTHROPIC_SMALL_FAST_MODEL",
)
RESERVED_SHARE = 4  # one in so many tokens of the context is kept for the reply ...
MOST_RESERVED = 8_192  # ... up to this many


@dataclass(frozen=True)
class Endpoint:
    """An endpoint and what is known of its models; none are known when it does not answer (`problem`)."""

    base_url: str
    models: list[str]
    default_model: str | None = None
    context: int | None = None  # tokens
    problem: EndpointError | None = None


def reply_tokens(context: int) -> int:
    """The part of a context of so many tokens that is kept for the reply."""
    return min(context // RESERVED_SHARE, MOST_RESERVED)


def own_base_url(given: str | None, home: Home) -> str:
    """The URL as given, of the endpoint that serves on this machine, or from the environment.

    The environment comes last, unlike elsewhere: what is printed here is there to replace it.
    """
    alive = [record.base_url for record in read_records(home) if is_alive(record.process)]
    return find_base_url(given or (alive[0] if alive else None), home)


def look_up(base_url: str, home: Home, model: str | None = None) -> Endpoint:
    """What the endpoint's own list of models says. An unknown `model` raises UsageError; no answer is a `problem`."""
    record: EndpointRecord | None = find_record(base_url, home)
    try:
        with connect(base_url, timeout_s=10) as client:
            cards = list_models(client)
    except EndpointError as problem:
        return Endpoint(base_url, [], problem=problem)
    chosen = choose_model(cards, model, record)
    context = context_length(cards, chosen) or (record.max_model_len if record else None)
    return Endpoint(base_url, [card.id for card in cards], chosen, context)


def variables(endpoint: Endpoint, show_key: bool, is_anthropic: bool = False) -> dict[str, str]:
    """Names and values to export; with `is_anthropic` those of Anthropic's clients, Claude Code among them.

    The key is a placeholder where none is set. One that is set is a secret: only with `show_key` it is among them (see
    `references`).
    """
    base, key = endpoint.base_url, None if key_variable() and not show_key else api_key()
    found = {"OPENAI_API_BASE": base, "OPENAI_BASE_URL": base, "OPENAI_API_KEY": key}
    if is_anthropic:
        found = {"ANTHROPIC_BASE_URL": base.removesuffix("/v1"), "ANTHROPIC_AUTH_TOKEN": key}
        found |= dict.fromkeys(ANTHROPIC_MODELS, endpoint.default_model) | claude_code_limits(endpoint.context)
    return {name: value for name, value in found.items() if value is not None}


def claude_code_limits(context: int | None) -> dict[str, str | None]:
    """What Claude Code must know of a context of so many tokens: it takes a model it does not know for one of 1M."""
    if not context:
        return {}
    reply = str(reply_tokens(context))
    return {"CLAUDE_CODE_MAX_CONTEXT_TOKENS": str(context), "CLAUDE_CODE_MAX_OUTPUT_TOKENS": reply}


def references(is_anthropic: bool = False) -> dict[str, str]:
    """Variables that are to hold the key, by the one that holds it now; none where all is set as it should be."""
    wanted, now = "ANTHROPIC_AUTH_TOKEN" if is_anthropic else "OPENAI_API_KEY", key_variable()
    return {wanted: now} if now and now != wanted else {}


def export_lines(values: dict[str, str], keys: dict[str, str] | None = None) -> str:
    """`values` for a shell's `eval`; then `keys`, from variable to variable, so that no secret is printed."""
    lines = [f"export {name}={quote(value)}\n" for name, value in values.items()]
    return "".join([*lines, *(f'export {name}="${now}"\n' for name, now in (keys or {}).items())])
