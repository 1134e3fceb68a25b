"""The prompt that chat clients get must be the one that was trained on: same template, same settings, same tokens.

Golden replies are replayed from tokens, and so say nothing about how the engine makes tokens of messages. A template
that is told to think where training told it not to, or a `--chat-template` after `--`, gives the adapter prompts that
it has never seen. So the messages of each golden prompt go through the engine's /tokenize, which renders as
/v1/chat/completions does.
"""

from typing import Any

import httpx

from loraport.clients.errors import VerificationError
from loraport.serve.engine.connect import no_answer
from loraport.train.manifest import Golden, Manifest

TIMEOUT_S = 60.0
SHOWN_TOKENS = 12  # on each side of the first difference


def is_dated(template: str) -> bool:
    """Whether a chat template prints today's date: then prompts differ from day to day, and that is no error."""
    return "strftime_now" in template


def check(client: httpx.Client, manifest: Manifest, dated: bool) -> str | None:
    """Compare all golden prompts of the model that the engine calls `manifest.name`; a warning, or None.

    VerificationError shows where a prompt differs.
    """
    for number, golden in enumerate(manifest.golden, start=1):
        served = tokenize(client, manifest, golden)
        if served is None:
            return f"warning: the engine has no /tokenize: the prompts of {manifest.name} could not be compared."
        if served == golden.prompt_tokens:
            continue
        if dated:
            return f"warning: prompts of {manifest.name} differ from those in training: its template prints dates."
        raise explain(client, manifest, number, served)
    return None


def ask(client: httpx.Client, path: str, body: dict[str, Any]) -> httpx.Response:
    """POST to a route of the engine; EndpointError when it does not answer."""
    try:
        return client.post(path, json=body, timeout=TIMEOUT_S)
    except (httpx.HTTPError, RuntimeError) as error:  # RuntimeError: the client was closed meanwhile
        raise no_answer(path, error, TIMEOUT_S) from error


def tokenize(client: httpx.Client, manifest: Manifest, golden: Golden) -> list[int] | None:
    """The tokens that the engine makes of a golden prompt's messages; None where it has no such route.

    The template is told what training told it, as the gateway does for each request to this adapter.
    """
    model, told = manifest.name, manifest.chat_template_kwargs
    body = {"model": model, "messages": golden.messages, "add_generation_prompt": True, "chat_template_kwargs": told}
    answer = ask(client, "/tokenize", body)
    if answer.status_code in (404, 405):
        return None
    try:
        return [int(token) for token in answer.raise_for_status().json()["tokens"]]
    except (httpx.HTTPError, ValueError, KeyError, TypeError) as error:
        raise VerificationError(
            f"the engine cannot render the messages that {model} was trained on.",
            "check the flags after `--` and the chat template of the base",
            (f"/tokenize: {answer.status_code} {answer.text[:300]}",),
        ) from error


def explain(client: httpx.Client, manifest: Manifest, number: int, served: list[int]) -> VerificationError:
    """The error for golden prompt `number`, with both prompts around the first difference."""
    trained = manifest.golden[number - 1].prompt_tokens
    pairs = zip(trained, served, strict=False)
    at = next((index for index, (a, b) in enumerate(pairs) if a != b), min(len(trained), len(served)))
    return VerificationError(
        f"the engine renders messages for {manifest.name} differently than training did (prompt {number}, "
        f"token {at + 1}).",
        "leave --chat-template and --default-chat-template-kwargs away from the flags after `--`, or train again",
        (
            f"trained: {len(trained)} tokens, ...{show(client, manifest.name, trained, at)}",
            f"served:  {len(served)} tokens, ...{show(client, manifest.name, served, at)}",
        ),
    )


def show(client: httpx.Client, model: str, tokens: list[int], at: int) -> str:
    """A prompt around position `at`, as text if the engine can say it, else as tokens."""
    part = tokens[max(0, at - SHOWN_TOKENS) : at + SHOWN_TOKENS]
    answer = ask(client, "/detokenize", {"model": model, "tokens": part})
    try:
        return repr(str(answer.raise_for_status().json()["prompt"]))
    except (httpx.HTTPError, ValueError, KeyError, TypeError):
        return repr(part)
