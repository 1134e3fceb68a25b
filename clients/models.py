"""The models of an endpoint, and the `openai` client that asks them.

>>> with connect("http://127.0.0.1:8000/v1") as client:
...     [card.id for card in list_models(client)]
['base', 'demo']
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from loraport.clients.endpoint import EndpointRecord, api_key, endpoint_errors
from loraport.clients.errors import EndpointError, UsageError

if TYPE_CHECKING:
    from openai import AsyncOpenAI, OpenAI


@dataclass(frozen=True)
class ModelCard:
    """A line of /v1/models: name, and if said the context in tokens, an adapter's base, and where the weights lie.

    Two names with one `root` are one model.
    """

    id: str
    max_model_len: int | None = None
    parent: str | None = None
    root: str | None = None


def connect(base_url: str, timeout_s: float = 600, retries: int = 0) -> "OpenAI":
    """The synchronous client for `base_url`. `timeout_s` is between two pieces of an answer."""
    from openai import OpenAI

    with endpoint_errors(base_url):
        return OpenAI(base_url=base_url, api_key=api_key(), timeout=timeout_s, max_retries=retries)


def connect_async(base_url: str, timeout_s: float = 600, retries: int = 0) -> "AsyncOpenAI":
    """The asynchronous client for `base_url`."""
    from openai import AsyncOpenAI

    with endpoint_errors(base_url):
        return AsyncOpenAI(base_url=base_url, api_key=api_key(), timeout=timeout_s, max_retries=retries)


def list_models(client: "OpenAI") -> list[ModelCard]:
    """The endpoint's models in its order. Raises EndpointError when it has none or does not speak the protocol."""
    base_url = str(client.base_url).rstrip("/")
    with endpoint_errors(base_url):
        try:
            cards = [read_card(model.model_dump()) for model in client.models.list()]
        except (AttributeError, KeyError, TypeError, ValueError) as error:  # a web page, another service
            raise EndpointError(f"{base_url} is no OpenAI-compatible endpoint.", "the URL ends in /v1") from error
    if not cards:
        raise EndpointError(f"{base_url} has no models.", "is the server still starting?")
    return cards


def read_card(card: dict[str, Any]) -> ModelCard:
    """One object of /v1/models."""
    return ModelCard(str(card["id"]), card.get("max_model_len"), card.get("parent"), card.get("root"))


def context_length(cards: Sequence[ModelCard], model: str) -> int | None:
    """Context length of `model` in tokens: its own, its base's, or the only one that is known (adapters say none)."""
    known = {card.id: card.max_model_len for card in cards if card.max_model_len}
    parent = next((card.parent for card in cards if card.id == model), None)
    return known.get(model) or known.get(parent or "") or (min(known.values()) if known else None)


def thinking_option(thinking: bool | None) -> dict[str, Any]:
    """Keyword arguments for the `openai` client that switch thinking on or off; None: as the server does by default.

    `enable_thinking` counts only inside chat_template_kwargs: beside the messages, vLLM ignores it.
    """
    return {} if thinking is None else {"extra_body": {"chat_template_kwargs": {"enable_thinking": thinking}}}


def count_tokens(client: "OpenAI", model: str, text: str) -> int | None:
    """Tokens of `text` as the server's /tokenize (vLLM's, beside /v1) counts them; None where it does not."""
    import openai

    url = f"{str(client.base_url).rstrip('/').removesuffix('/v1')}/tokenize"
    body = {"model": model, "prompt": text, "add_special_tokens": False}
    try:
        counted = client.with_options(max_retries=0, timeout=30).post(url, body=body, cast_to=object)
    except openai.OpenAIError:
        return None
    count = counted.get("count") if isinstance(counted, dict) else None
    return count if isinstance(count, int) else None


def check_model(cards: Sequence[ModelCard], model: str) -> str:
    """Return `model` if the endpoint has it; UsageError that lists what there is otherwise."""
    names = [card.id for card in cards]
    if model not in names:
        listed = ", ".join(names[:20]) + (f" and {len(names) - 20} more" if len(names) > 20 else "")
        raise UsageError(f"the endpoint has no model {model!r}.", f"it has: {listed}")
    return model


def choose_model(cards: Sequence[ModelCard], wanted: str | None, record: EndpointRecord | None) -> str:
    """The model to talk to: as wanted, else the default of an endpoint of ours, else its first adapter, else its first.

    Raises UsageError when the endpoint does not have it.
    """
    if wanted:
        return check_model(cards, wanted)
    names = [card.id for card in cards]
    if record and record.default_model in names:
        return record.default_model
    return next((card.id for card in cards if card.parent), names[0])
