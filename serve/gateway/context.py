"""Requests that do not fit the model's context: the same 400 whichever version of vLLM answers, with the numbers.

0.25 refuses prompt + max_tokens above the context; 0.32 silently shortens the reply and refuses only prompts that do
not fit by themselves. Both say it in words of their own. Here:

    fits_surely     a bound from the size of the body; most requests end here, and the engine is not asked
    token_questions otherwise, what to ask the engine's tokenizer
    overflow        the refusal
    read_overflow   the engine's own refusal, in any of its wordings, as numbers

    >>> read_overflow("This model's maximum context length is 64 tokens. However, your prompt contains 90 input tokens")
    Said(limit=64, prompt=90, is_exact=True)
"""

import re
from dataclasses import dataclass
from typing import Any

from loraport.serve.gateway.body import Body
from loraport.serve.gateway.refusals import Refusal, bad_request

# Tokens that a chat template adds beside the text: its preamble, and the marks around each message.
TEMPLATE_TOKENS, MESSAGE_TOKENS = 512, 24
PROMPT_FIELDS = {"/v1/completions": "prompt", "/v1/responses": "input", "/v1/embeddings": "input"}
# Where the engine counts a chat, and what of the request makes its prompt.
CHAT_FIELDS = ("messages", "tools", "chat_template_kwargs", "add_generation_prompt", "continue_final_message")
MESSAGES_FIELDS = ("messages", "system", "tools", "tool_choice", "thinking", "output_config", "chat_template_kwargs")
COUNTED_FIELDS = {
    "/v1/chat/completions": ("/tokenize", CHAT_FIELDS),
    "/v1/messages": ("/v1/messages/count_tokens", MESSAGES_FIELDS),
}
MOST_QUESTIONS = 16  # prompts of one request that the engine is asked about
LONGEST_QUESTION = 2 << 20  # bytes; counting longer prompts costs the engine more than the exact number is worth

WORDINGS = tuple(
    re.compile(pattern, re.IGNORECASE)
    for pattern in (
        r"maximum context length is (?P<limit>\d+) tokens.*?prompt contains (?P<least>at least )?(?P<prompt>\d+) input",
        r"maximum context length is (?P<limit>\d+) tokens.*?\((?P<prompt>\d+) in the (?:messages|prompt)",
        r"maximum context length is (?P<limit>\d+) tokens and your request has (?P<prompt>\d+) input",
        r"maximum context length is (?P<limit>\d+) tokens.*?(?P<least>prompt contains \d+ characters)",
        r"input length \((?P<prompt>\d+)\) exceeds model's maximum context length \((?P<limit>\d+)\)",
        r"prompt length (?P<prompt>\d+) exceeds the max_model_len (?P<limit>\d+)",
        r"prompt \(length (?P<prompt>\d+)\) is longer than the maximum model length of (?P<limit>\d+)",
        r"max_(?:completion_|output_)?tokens=\d+ cannot be greater than max_model_len=(?P<limit>\d+)",
    )
)


@dataclass(frozen=True)
class Said:
    """What an engine's refusal says: its context, the prompt's tokens if it counted them, and whether to the last."""

    limit: int
    prompt: int | None
    is_exact: bool


def read_overflow(message: str) -> Said | None:
    """The numbers of an engine's refusal; None when it is about something else."""
    for wording in WORDINGS:
        found = wording.search(message)
        if found:
            groups = found.groupdict()
            prompt = int(groups["prompt"]) if groups.get("prompt") else None
            return Said(int(groups["limit"]), prompt, prompt is not None and not groups.get("least"))
    return None


def overflow(path: str, limit: int, prompt: int | None, wanted: int | None, is_exact: bool = True) -> Refusal:
    """400 `context_length_exceeded` with the prompt's tokens, what was asked for, and the model's context."""
    return bad_request(
        "context_length_exceeded",
        (anthropic_words if path.startswith("/v1/messages") else openai_words)(limit, prompt, wanted, is_exact),
        PROMPT_FIELDS.get(path, "messages"),
        prompt_tokens=prompt,
        max_tokens=wanted,
        max_model_len=limit,
    )


def openai_words(limit: int, prompt: int | None, wanted: int | None, is_exact: bool) -> str:
    """An overflow in words that begin as OpenAI's do; clients look for `maximum context length`."""
    parts = []
    if prompt is not None:
        parts.append(f"the prompt has {'' if is_exact else 'at least '}{prompt} tokens")
    if wanted:
        parts.append(f"max_tokens asks for {wanted}")
    what = " and ".join(parts) or "the prompt is longer"
    lower = ", or lower max_tokens." if wanted and (prompt or 0) < limit else "."
    return f"This model's maximum context length is {limit} tokens; {what}. Shorten the prompt{lower}"


def anthropic_words(limit: int, prompt: int | None, wanted: int | None, is_exact: bool) -> str:
    """The same in the words of Anthropic's API: Claude Code reads them, asks for less or compacts, and goes on."""
    if prompt is None:
        return openai_words(limit, prompt, wanted, is_exact)
    if prompt < limit and wanted:
        return (
            f"input length and `max_tokens` exceed context limit: {prompt} + {wanted} > {limit}, "
            "decrease input length or `max_tokens` and try again"
        )
    return f"prompt is too long: {prompt} tokens > {limit} maximum"


def fits_surely(path: str, body: Body, limit: int, wanted: int) -> bool:
    """Whether prompt and reply fit without counting: a token of text is at least one byte of the body.

    False where pictures or sounds are in it, whose tokens the size says nothing about.
    """
    if b'_url"' in body.raw or b'"image' in body.raw or b"_audio" in body.raw:
        return False
    messages = body.fields.get("messages") or body.fields.get("input")
    marks = MESSAGE_TOKENS * (len(messages) if isinstance(messages, list) else 1)
    extra = 0 if path == "/v1/completions" else TEMPLATE_TOKENS + marks
    return len(body.raw) + extra + wanted <= limit


def token_questions(path: str, body: Body) -> list[tuple[str, dict[str, Any]]]:
    """(route, body) for the engine to count the prompts of a request; none where that cannot be told."""
    if len(body.raw) > LONGEST_QUESTION:
        return []
    fields, model = body.fields, body.fields["model"]
    if path == "/v1/completions":
        prompt = fields.get("prompt")
        prompts = prompt if isinstance(prompt, list) else [prompt]
        texts = [text for text in prompts if isinstance(text, str)]
        few = texts if len(texts) <= MOST_QUESTIONS else []
        return [("/tokenize", {"model": model, "prompt": text}) for text in few]
    if path in COUNTED_FIELDS:
        route, taken = COUNTED_FIELDS[path]
        return [(route, {"model": model, **{name: fields[name] for name in taken if fields.get(name) is not None}})]
    messages = as_messages(fields)
    return [("/tokenize", {"model": model, "messages": messages})] if messages else []


def counted(body: Body) -> int:
    """Tokens of the longest prompt that came as token ids; 0 without one."""
    prompt = body.fields.get("prompt")
    if not isinstance(prompt, list) or not prompt:
        return 0
    prompts = prompt if isinstance(prompt[0], list) else [prompt]
    return max((len(part) for part in prompts if is_ids(part)), default=0)


def is_ids(part: Any) -> bool:
    """Whether this is a prompt of token ids."""
    return isinstance(part, list) and bool(part) and isinstance(part[0], int)


def as_messages(fields: dict[str, Any]) -> list[dict[str, str]]:
    """The text of a /v1/responses request as chat messages; tools and pictures are left out."""
    system, turns = fields.get("instructions"), fields.get("input")
    found = [{"role": "system", "content": text_of(system)}] if system else []
    if isinstance(turns, str):
        turns = [{"role": "user", "content": turns}]
    for turn in turns if isinstance(turns, list) else ():
        if isinstance(turn, dict) and turn.get("role") in ("user", "assistant", "system"):
            found.append({"role": turn["role"], "content": text_of(turn.get("content"))})
    return found


def text_of(content: Any) -> str:
    """The text of a message's content: a string, or a list of parts."""
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, list) else []
    return "\n".join(part["text"] for part in parts if isinstance(part, dict) and isinstance(part.get("text"), str))
