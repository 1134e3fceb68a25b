"""Pairs written by a model behind any OpenAI-compatible endpoint: asked piece by piece, a few at a time, resumable.

Each answer goes into the journal when it arrives; a run that was killed goes on where it was, and asks again only what
had not been answered. The `openai` client repeats what fails for a moment (429, 5xx, connections). What it cannot mend
ends the run with the journal kept; a reply that is no JSON is asked for once more and then counted. Whether a pair is
any good is for `checks.py`.

    >>> asyncio.run(write(readings, Ask("http://127.0.0.1:8000/v1", "base"), journal, progress))
"""

import asyncio
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from loraport.clients.endpoint import endpoint_errors
from loraport.clients.errors import EndpointError
from loraport.train.build.journal import Journal, key_of

if TYPE_CHECKING:
    from openai import AsyncOpenAI

PROMPT_VERSION = "1"  # change it with the prompts: answers to old ones are not taken for answers to new ones
SYSTEM = "You write training data for an assistant that answers questions about {subject}. You reply with JSON alone."
PROMPT = """Write {pairs} question and answer pairs from the text below.

- A question is what a user would ask who has not seen the text: name what it is about ({subject}), never "the text".
- The answer follows from the text alone, is complete, and keeps its numbers, names and code exactly.
- Ask about different things, in different words: how, what, why, when, which.
- Leave out licences, navigation, authors and links. If the text holds fewer things worth asking, write fewer pairs.

Reply with JSON alone: {{"pairs": [{{"question": "...", "answer": "..."}}]}}

<text source="{heading}">
{text}
</text>"""
JUDGE = """Decide for each numbered pair whether the text fully supports its answer and the question can be understood
without seeing the text.

<text>
{text}
</text>

{pairs}

Reply with JSON alone, a true or false for each pair in order: {{"supported": [true, false]}}"""
ATTEMPTS = 2  # replies that are asked for before a piece is given up
RETRIES = 5  # of the client, for what fails for a moment: 0.5 s, 1 s, 2 s, 4 s, 8 s, or as the server says
LONGEST_REPLY = 4096  # tokens


@dataclass(frozen=True)
class Ask:
    """Who is asked, and how. `key` goes into the request's header and nowhere else."""

    base_url: str
    model: str
    key: str = "loraport"
    pairs: int = 5
    concurrency: int = 8
    timeout_s: float = 300
    judge: bool = False

    def __repr__(self) -> str:
        return f"Ask({self.base_url!r}, {self.model!r})"


@dataclass(frozen=True)
class Reading:
    """A text that the model is given: neighbouring pieces of one document, with their headings."""

    text: str
    heading: str
    subject: str


@dataclass(frozen=True)
class Written:
    """What came back for a reading: (question, answer) pairs, or `error`, why there are none.

    `judged`: for each pair whether the model itself supports it; None where it was not asked or did not say.
    """

    pairs: list[tuple[str, str]]
    error: str = ""
    judged: list[bool] | None = None


async def write(
    readings: Sequence[Reading], ask: Ask, journal: Journal, progress: Callable[[], None] = lambda: None
) -> list[Written]:
    """The pairs for each reading, in order. Raises EndpointError when the endpoint can no longer be used."""
    from openai import AsyncOpenAI

    with endpoint_errors(ask.base_url):
        client = AsyncOpenAI(base_url=ask.base_url, api_key=ask.key, timeout=ask.timeout_s, max_retries=RETRIES)
    limit = asyncio.Semaphore(ask.concurrency)
    options: dict[str, Any] = {"max_tokens": LONGEST_REPLY}

    async def one(reading: Reading) -> Written:
        async with limit:
            written = await ask_one(client, ask, options, reading, journal)
            progress()
            return written

    tasks = [asyncio.create_task(one(reading)) for reading in readings]
    try:
        async with client:
            return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def ask_one(
    client: "AsyncOpenAI", ask: Ask, options: dict[str, Any], reading: Reading, journal: Journal
) -> Written:
    """The pairs for one reading, from the journal or the endpoint. `options` of the request are shared by all."""
    prompt = PROMPT.format(pairs=ask.pairs, subject=reading.subject, heading=reading.heading, text=reading.text)
    messages = [
        {"role": "system", "content": SYSTEM.format(subject=reading.subject)},
        {"role": "user", "content": prompt},
    ]
    key = key_of("write", PROMPT_VERSION, ask.model, json.dumps(messages, ensure_ascii=False))
    entry = journal.get(key)
    if not entry:
        entry = await reply_as(client, ask, options, messages, pairs_in, "pairs")
        _ = entry.get("refused") or journal.put(key, entry)
    written = Written([(q, a) for q, a in entry.get("pairs") or []], entry.get("error", ""))
    if not ask.judge or not written.pairs:
        return written
    listed = "\n\n".join(f"{at}. Question: {q}\n   Answer: {a}" for at, (q, a) in enumerate(written.pairs, 1))
    messages = [{"role": "user", "content": JUDGE.format(text=reading.text, pairs=listed)}]
    key = key_of("judge", PROMPT_VERSION, ask.model, json.dumps(messages, ensure_ascii=False))
    verdict = journal.get(key)
    if not verdict:
        verdict = await reply_as(client, ask, options, messages, verdicts_in, "supported")
        _ = verdict.get("refused") or journal.put(key, verdict)
    judged = verdict.get("supported")
    return Written(written.pairs, "", judged if judged and len(judged) == len(written.pairs) else None)


async def reply_as(
    client: "AsyncOpenAI",
    ask: Ask,
    options: dict[str, Any],
    messages: list[dict[str, str]],
    read: Callable[[str], Any],
    name: str,
) -> dict[str, Any]:
    """What `read` finds in a reply, under `name`; asked again when it finds nothing; else the reason as `error`.

    `refused`: the request itself was, so that a later run may ask again.
    """
    said = ""
    for _ in range(ATTEMPTS):
        try:
            said = await reply(client, ask, options, messages)
        except EndpointError as error:
            if is_about_this_one(error):
                return {"error": error.message, "refused": True}
            raise
        found = read(said)
        if found is not None:
            return {name: found}
    return {"error": "an empty reply" if not said.strip() else "a reply that is not the JSON asked for"}


async def reply(client: "AsyncOpenAI", ask: Ask, options: dict[str, Any], messages: list[dict[str, str]]) -> str:
    """The text of one reply; empty where the endpoint sends none."""
    from openai import BadRequestError

    with endpoint_errors(ask.base_url):
        try:
            try:
                answer = await client.chat.completions.create(model=ask.model, messages=messages, **options)  # type: ignore[arg-type]
            except BadRequestError as error:
                if "max_completion_tokens" not in str(error):  # the name that reasoning models insist on
                    raise
                options["max_completion_tokens"] = options.pop("max_tokens", LONGEST_REPLY)
                answer = await client.chat.completions.create(model=ask.model, messages=messages, **options)  # type: ignore[arg-type]
            return answer.choices[0].message.content or ""
        except (AttributeError, IndexError, TypeError, KeyError, ValueError):  # not what the protocol says
            return ""


def is_about_this_one(error: EndpointError) -> bool:
    """Whether an error is about one request (too long, filtered), so that others may still succeed."""
    return getattr(error.__cause__, "status_code", None) in (400, 413, 422)


def pairs_in(said: str) -> list[tuple[str, str]] | None:
    """Pairs in a reply, also when its list was cut off or stands between words; None when there is no list at all."""
    document = document_in(said)
    listed = document.get("pairs", document.get("data")) if isinstance(document, dict) else document
    if not isinstance(listed, list):
        listed = salvaged(said)
    pairs = [pair for item in listed if (pair := pair_of(item))]
    return pairs if pairs or (isinstance(document, dict | list) and not listed) else None


def pair_of(item: Any) -> tuple[str, str] | None:
    """(question, answer) of an object, if it holds both as texts."""
    if not isinstance(item, dict):
        return None
    question, answer = item.get("question"), item.get("answer")
    if not isinstance(question, str) or not isinstance(answer, str) or not question.strip() or not answer.strip():
        return None
    return " ".join(question.split()), answer.strip()


def verdicts_in(said: str) -> list[bool] | None:
    """The judge's verdicts; None when the reply has none."""
    document = document_in(said)
    listed = document.get("supported") if isinstance(document, dict) else document
    return [item is True for item in listed] if isinstance(listed, list) else None


def without_thoughts(said: str) -> str:
    """A reply without the thinking that some models put before it."""
    return re.sub(r"\A.*</think>", "", said, flags=re.S) if "</think>" in said else said


def document_in(said: str) -> Any:
    """The first JSON object or list in a reply; None when there is none that is whole."""
    text = without_thoughts(said)
    decoder = json.JSONDecoder(strict=False)  # models put bare line breaks into strings
    for match in re.finditer(r"[\[{]", text):
        try:
            return decoder.raw_decode(text, match.start())[0]
        except (ValueError, RecursionError):
            if match.group(0) == "{" or match.start() > 200:
                return None
    return None


def salvaged(said: str) -> list[Any]:
    """The whole objects of a list that was cut off."""
    text, found = without_thoughts(said), []
    decoder = json.JSONDecoder(strict=False)
    for match in re.finditer(r"\{(?=\s*\"question\")", text):
        try:
            found.append(decoder.raw_decode(text, match.start())[0])
        except (ValueError, RecursionError):
            continue
    return found
