"""A conversation with a model of an endpoint, in a terminal or from lines on standard input.

Replies stream to standard output, everything else goes to standard error. Ctrl-C stops the reply: the stream is
closed, and with it the server's work on it.

    >>> chat = Conversation(client, "demo", Settings(), context=8192)
    >>> chat.ask("2 + 2?", print)
    Ending(finish_reason='stop', completion_tokens=1)
"""

import contextlib
import io
import sys
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from loraport.clients.endpoint import endpoint_errors
from loraport.clients.errors import EndpointError, LoraportError, UsageError
from loraport.clients.models import check_model, context_length, list_models, thinking_option
from loraport.clients.rows import Message
from loraport.clients.terminal import printable, say

if TYPE_CHECKING:
    from openai import OpenAI, Stream
    from openai.types.chat import ChatCompletionChunk

HELP = """/model [NAME]   answer with another model; without NAME: list them
/system [TEXT]  set the system message; without TEXT: remove it
/reset          forget the conversation
/exit           end, as Ctrl-D does; Ctrl-C stops a reply
//TEXT          send TEXT that begins with a slash"""


@dataclass(frozen=True)
class Settings:
    """What every request has beside model and messages; None leaves it to the server."""

    max_tokens: int | None = None
    temperature: float | None = None
    thinking: bool | None = None

    def parameters(self) -> dict[str, Any]:
        """Keyword arguments for the `openai` client."""
        given = {"max_tokens": self.max_tokens, "temperature": self.temperature}
        return {key: value for key, value in given.items() if value is not None} | thinking_option(self.thinking)


@dataclass(frozen=True)
class Ending:
    """How a reply ended: `stop`, `length`, `stopped by you`; and its tokens if the server says."""

    finish_reason: str
    completion_tokens: int | None = None


@dataclass
class Conversation:
    """The messages so far and how to continue them. Only turns that got a reply stay in `messages`."""

    client: "OpenAI"
    model: str
    settings: Settings
    context: int | None = None  # tokens
    system: str = ""
    messages: list[Message] = field(default_factory=list)

    @property
    def base_url(self) -> str:
        """The endpoint's, for messages."""
        return str(self.client.base_url).rstrip("/")

    def ask(self, text: str, write: Callable[[str], object]) -> Ending:
        """Send `text`, `write` the reply as it comes, and keep both; what came before a Ctrl-C is kept as well.

        Raises EndpointError; the conversation is then as it was.
        """
        reply: list[str] = []
        ending = Ending("")
        try:
            with contextlib.closing(self.stream(text)) as pieces:
                for piece, known in pieces:
                    ending = known
                    reply.append(piece)
                    write(piece)
        except KeyboardInterrupt:
            ending = Ending("stopped by you")
        if said := "".join(reply):
            self.messages += [{"role": "user", "content": text}, {"role": "assistant", "content": said}]
        return ending

    def stream(self, text: str) -> Generator[tuple[str, Ending], None, None]:
        """Pieces of the reply to `text`, each with what is known of the ending by then. Closed, it ends the request."""
        system = [{"role": "system", "content": self.system}] if self.system else []
        messages: Any = [*system, *self.messages, {"role": "user", "content": text}]
        options: Any = {"stream": True, "stream_options": {"include_usage": True}, **self.settings.parameters()}
        with endpoint_errors(self.base_url), explain_overflow(self.context):
            chunks: Stream[ChatCompletionChunk]
            with self.client.chat.completions.create(model=self.model, messages=messages, **options) as chunks:
                yield from read_chunks(chunks)


def read_chunks(chunks: "Stream[ChatCompletionChunk]") -> Iterator[tuple[str, Ending]]:
    """The text in a stream's chunks, with the ending as known so far."""
    reason, tokens = "", None
    for chunk in chunks:
        tokens = chunk.usage.completion_tokens if chunk.usage else tokens
        choice = chunk.choices[0] if chunk.choices else None
        reason = (choice.finish_reason if choice else None) or reason
        yield (choice.delta.content if choice else None) or "", Ending(reason, tokens)


@contextlib.contextmanager
def explain_overflow(context: int | None) -> Iterator[None]:
    """Say in words that the conversation has outgrown the context."""
    import openai

    try:
        yield
    except openai.BadRequestError as error:
        if error.code != "context_length_exceeded" and "context length" not in str(error):
            raise
        size = f" of {context:,} tokens" if context else ""
        raise EndpointError(
            f"the conversation with this message is longer than the model's context{size}.",
            "/reset forgets the conversation, or send a shorter message; this one was not kept",
        ) from error


@dataclass
class Terminal:
    """The loop around a conversation. `interactive`: a person types; otherwise lines are read and errors end it."""

    chat: Conversation
    interactive: bool

    def run(self) -> None:
        """Read and answer until the input ends or /exit."""
        where = f"{self.chat.model} at {self.chat.base_url}"
        say(f"{where}: /help lists commands, Ctrl-D ends" if self.interactive else where, "dim")
        if isinstance(sys.stdin, io.TextIOWrapper):
            sys.stdin.reconfigure(encoding="utf-8", errors="replace")  # what is not UTF-8 cannot be sent as JSON
        for line in self.lines():
            if line == "/exit":
                break
            if line:
                self.handle(line)

    def lines(self) -> Iterator[str]:
        """Lines without the blanks around them. A Ctrl-C at the prompt empties it."""
        if not self.interactive:
            yield from (line.strip() for line in sys.stdin)
            return
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  (gives input() its line editing)
        while True:
            try:
                yield input("> ").strip()
            except EOFError:
                print_text("\n")
                return
            except KeyboardInterrupt:
                print_text("\n")

    def handle(self, line: str) -> None:
        """Do one command or get one reply; a person sees an error and goes on."""
        try:
            if line.startswith("/") and not line.startswith("//"):
                self.command(*line[1:].partition(" ")[::2])
            else:
                self.answer(line.removeprefix("/") if line.startswith("//") else line)
        except LoraportError as error:
            if not self.interactive:
                raise
            say(f"error: {error.message}", "bold red")
            say(f"hint: {error.hint}")

    def answer(self, text: str) -> None:
        """Ask and print the reply; say so when it did not end by itself."""
        write = (lambda piece: print_text(printable(piece))) if self.interactive else print_text
        try:
            ending = self.chat.ask(text, write)
        finally:
            print_text("\n")
        if ending.finish_reason == "stopped by you" and not self.interactive:
            raise KeyboardInterrupt
        if ending.finish_reason != "stop":
            say(f"[{self.explain_ending(ending)}]", "yellow")

    def explain_ending(self, ending: Ending) -> str:
        """Why a reply did not end by itself."""
        limit = self.chat.settings.max_tokens
        if ending.finish_reason != "length":
            return ending.finish_reason or "the server ended the reply without a reason"
        if limit and (ending.completion_tokens is None or ending.completion_tokens >= limit):
            return f"cut at --max-tokens {limit}"
        size = f" of {self.chat.context:,} tokens" if self.chat.context else ""
        return f"cut: the model's context{size} is full; /reset forgets the conversation"

    def command(self, name: str, argument: str) -> None:
        """Do a /command. Raises UsageError for an unknown one."""
        argument = argument.strip()
        if name == "model":
            self.change_model(argument)
        elif name == "system":
            self.chat.system = argument
            say("system message set" if argument else "system message removed", "dim")
        elif name == "reset":
            self.chat.messages.clear()
            say("conversation forgotten", "dim")
        elif name == "help":
            say(HELP)
        else:
            raise UsageError(f"there is no command /{name}.", "/help lists them; //TEXT sends what begins with a slash")

    def change_model(self, name: str) -> None:
        """Answer with model `name` from now on, or list the models."""
        cards = list_models(self.chat.client)
        if name:
            self.chat.model = check_model(cards, name)
            self.chat.context = context_length(cards, name)
            say(f"{name} answers from now on", "dim")
        for card in [] if name else cards:
            say(f"{'*' if card.id == self.chat.model else ' '} {card.id}")


def print_text(text: str) -> None:
    """Write to standard output at once."""
    sys.stdout.write(text)
    sys.stdout.flush()
