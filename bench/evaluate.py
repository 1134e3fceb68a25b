"""Ask an endpoint's models the prompts of chat rows, several at a time, and keep what they reply.

Greedy, so that a reply is the model's and not the dice's. The models take turns row by row: a server that slows down
or dies midway treats all of them alike.

    >>> run = Evaluation("http://127.0.0.1:8000/v1", rows, ["base", "demo"], Request(max_tokens=64), concurrency=8)
    >>> run.ask_all()
    >>> summarize("demo", run.answers).success.rate
    0.95
"""

import asyncio
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from loraport.bench.metrics import Answer
from loraport.clients.endpoint import explain
from loraport.clients.errors import EndpointError
from loraport.clients.models import connect_async, thinking_option
from loraport.clients.rows import Row, as_request

if TYPE_CHECKING:
    from openai import AsyncOpenAI


@dataclass(frozen=True)
class Request:
    """What every request has beside model and messages. `thinking`: None leaves it to the server."""

    max_tokens: int
    timeout_s: float = 120
    thinking: bool | None = None

    def parameters(self) -> dict[str, Any]:
        """Keyword arguments for the `openai` client."""
        return {"temperature": 0, "max_tokens": self.max_tokens, **thinking_option(self.thinking)}


@dataclass
class Evaluation:
    """One run over all rows and models. `answers` grows while it runs, and stays when it is interrupted."""

    base_url: str
    rows: Sequence[Row]
    models: Sequence[str]
    request: Request
    concurrency: int = 8
    on_answer: Callable[[Answer], None] = lambda answer: None
    answers: list[Answer] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def is_complete(self) -> bool:
        """Whether every row was put to every model."""
        return len(self.answers) == len(self.rows) * len(self.models)

    def ask_all(self) -> None:
        """Put every row to every model. Raises EndpointError when going on is pointless; Ctrl-C goes through."""
        started = time.monotonic()
        try:
            asyncio.run(self.run_workers())
        except ExceptionGroup as group:
            raise next(error for error in group.exceptions if isinstance(error, Exception)) from None
        finally:
            self.seconds = time.monotonic() - started

    async def run_workers(self) -> None:
        """Workers that share one list of work; the first fatal error ends all of them."""
        work = iter(list(itertools.product(self.rows, self.models)))
        client = connect_async(self.base_url, self.request.timeout_s, retries=1)
        async with client, asyncio.TaskGroup() as group:
            for _ in range(min(self.concurrency, len(self.rows) * len(self.models))):
                group.create_task(self.work_off(work, client))

    async def work_off(self, work: Iterator[tuple[Row, str]], client: "AsyncOpenAI") -> None:
        """Ask one after the other until nothing is left."""
        for row, model in work:
            answer = await self.ask(row, model, client)
            self.answers.append(answer)
            self.on_answer(answer)

    async def ask(self, row: Row, model: str, client: "AsyncOpenAI") -> Answer:
        """One request. An error of this request alone becomes part of the answer; any other is raised."""
        import openai

        known: dict[str, Any] = {"model": model, "line": row.line, "reference": row.reference}
        known["prompt"] = row.prompt[-1]["content"]
        started = time.monotonic()
        try:
            asked: Any = {"messages": as_request(row.prompt)} | ({"tools": row.tools} if row.tools else {})
            done = await client.chat.completions.create(model=model, **asked, **self.request.parameters())
            choice = done.choices[0]
        except openai.OpenAIError as error:
            if self.is_fatal(error):
                raise explain(error, self.base_url) from error
            return Answer(**known, error=error_kind(error), seconds=time.monotonic() - started)
        except (AttributeError, IndexError, TypeError) as error:  # an answer, but not that of a chat completion
            raise EndpointError(f"{self.base_url} is no OpenAI-compatible endpoint.", "the URL ends in /v1") from error
        return Answer(
            **known,
            reply=choice.message.content or "",
            finish_reason=choice.finish_reason or "",
            completion_tokens=done.usage.completion_tokens if done.usage else None,
            seconds=time.monotonic() - started,
        )

    def is_fatal(self, error: Exception) -> bool:
        """Whether the next request would fail in the same way: no server, no key, no model, or never an answer."""
        import openai

        if isinstance(error, openai.APITimeoutError):
            return not any(not answer.error for answer in self.answers)
        return isinstance(
            error,
            (
                openai.APIConnectionError,
                openai.AuthenticationError,
                openai.PermissionDeniedError,
                openai.NotFoundError,
            ),
        )


def error_kind(error: Exception) -> str:
    """A short name for what went wrong with one request: `timeout`, `too long`, `HTTP 500`."""
    import openai

    if isinstance(error, openai.APITimeoutError):
        return "timeout"
    if isinstance(error, openai.BadRequestError) and "context length" in str(error):
        return "longer than the context"
    if isinstance(error, openai.APIStatusError):
        return f"HTTP {error.status_code}"
    return type(error).__name__
