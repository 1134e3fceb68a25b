"""The variables that point OpenAI clients at an endpoint.

    $ eval "$(loraport env)"

Standard output holds nothing but `export` lines: a comment there would be a command in an interactive zsh.
"""

import os
from dataclasses import dataclass
from shlex import quote

from loraport.clients.endpoint import (
    PLACEHOLDER_KEY,
    EndpointRecord,
    find_base_url,
    find_record,
    is_alive,
    read_records,
)
from loraport.clients.errors import EndpointError
from loraport.clients.home import Home
from loraport.clients.models import choose_model, connect, context_length, list_models


@dataclass(frozen=True)
class Endpoint:
    """An endpoint and what is known of its models; none are known when it does not answer (`problem`)."""

    base_url: str
    models: list[str]
    default_model: str | None = None
    context: int | None = None  # tokens
    problem: EndpointError | None = None


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


def variables(base_url: str, show_key: bool) -> dict[str, str]:
    """Names and values to export.

    OPENAI_API_KEY is a placeholder where none is set. One that is set is a secret and stays as it is: it is among
    them only with `show_key`.
    """
    found = {"OPENAI_API_BASE": base_url, "OPENAI_BASE_URL": base_url}
    key = os.environ.get("OPENAI_API_KEY")
    if not key or show_key:
        found["OPENAI_API_KEY"] = key or PLACEHOLDER_KEY
    return found


def export_lines(values: dict[str, str]) -> str:
    """`values` for a shell's `eval`."""
    return "".join(f"export {name}={quote(value)}\n" for name, value in values.items())
