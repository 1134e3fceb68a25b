"""The endpoint that commands talk to: which one, under which key, and the `openai` client for it.

`loraport serve` leaves a record of the endpoint it holds open; `chat`, `env`, `aider` and `eval` find it there, unless
--base-url or the variables that every OpenAI client reads say otherwise.

    >>> find_base_url(None, Home.default())
    'http://127.0.0.1:8000/v1'
"""

import contextlib
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from json import JSONDecodeError, loads
from pathlib import Path

import psutil

from loraport.clients.errors import EndpointError, http_errors
from loraport.clients.home import Home, write_json

BASE_URL_VARIABLES = ("OPENAI_BASE_URL", "OPENAI_API_BASE")
# The first counts: whoever has a key of OpenAI's in the second need not move it away.
KEY_VARIABLES = ("LORAPORT_API_KEY", "OPENAI_API_KEY")
KEY_HINT = (
    "`loraport keys create NAME`, where it is served, makes one; here LORAPORT_API_KEY holds it, "
    "or OPENAI_API_KEY where that is not set"
)
# A server on loopback asks for no key, but the clients insist on sending one.
PLACEHOLDER_KEY = "loraport"
LONGEST_QUOTE = 400  # characters of a server's words that an error repeats


@dataclass(frozen=True)
class EndpointRecord:
    """What `loraport serve` says of the endpoint it holds open, in run/<port>.json.

    `process` and `engine` are (process id, creation time in seconds since the epoch), which together name a process
    even after its id was used again. `engine` is the guard that ends all of the engine when `process` is gone.
    `admin_key` opens the admin routes as long as the endpoint lives; the folder is its owner's alone.
    """

    base_url: str
    port: int
    models: list[str]
    adapters: list[str]
    max_model_len: int | None
    process: tuple[int, float]
    engine: tuple[int, float] | None
    admin_key: str | None = None

    @property
    def default_model(self) -> str:
        """The first adapter, or the base where there is none."""
        return (self.adapters or self.models)[0]

    def path(self, home: Home) -> Path:
        """Where the record lies."""
        return home.run / f"{self.port}.json"

    def write(self, home: Home) -> None:
        """Leave the record for the other commands."""
        with contextlib.suppress(OSError):  # the key in it is its owner's alone, where the file system can keep it so
            home.ensure(home.run).chmod(0o700)
        write_json(self.path(home), asdict(self), is_private=True)


def process_identity(pid: int) -> tuple[int, float]:
    """(process id, creation time) of a living process."""
    return pid, psutil.Process(pid).create_time()


def is_alive(identity: tuple[int, float] | None) -> bool:
    """Whether that very process still runs; a zombie does not."""
    if identity is None:
        return False
    try:
        process = psutil.Process(identity[0])
        return abs(process.create_time() - identity[1]) < 0.1 and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def read_records(home: Home) -> list[EndpointRecord]:
    """All records, that of the process which was started last first; those of processes that are gone among them."""
    found = []
    for path in home.run.glob("*.json") if home.run.is_dir() else ():
        with contextlib.suppress(OSError, JSONDecodeError, TypeError, KeyError):
            fields = loads(path.read_text(encoding="utf-8"))
            for key in ("process", "engine"):
                fields[key] = tuple(fields[key]) if fields[key] else None
            found.append(EndpointRecord(**fields))
    return sorted(found, key=lambda record: record.process[1] if record.process else 0.0, reverse=True)


def find_record(base_url: str, home: Home) -> EndpointRecord | None:
    """The record of the living endpoint of ours at `base_url`, if it is one."""
    return next((r for r in read_records(home) if r.base_url == base_url and is_alive(r.process)), None)


def find_base_url(given: str | None, home: Home) -> str:
    """The URL to talk to: as given, from the environment, or of the endpoint that serves on this machine.

    Raises EndpointError when there is none.
    """
    from_environment = next((os.environ[name] for name in BASE_URL_VARIABLES if os.environ.get(name)), None)
    if given or from_environment:
        return (given or from_environment or "").rstrip("/")
    record = next((record for record in read_records(home) if is_alive(record.process)), None)
    if record is None:
        raise EndpointError(
            "no endpoint of Loraport runs on this machine.", "start one: loraport serve NAME; or give --base-url"
        )
    return record.base_url


def key_variable() -> str | None:
    """The variable that holds the key: LORAPORT_API_KEY, else OPENAI_API_KEY; None where neither is set."""
    return next((name for name in KEY_VARIABLES if os.environ.get(name, "").strip()), None)


def api_key() -> str:
    """The key that is sent, or a placeholder where none is set."""
    name = key_variable()
    return os.environ[name].strip() if name else PLACEHOLDER_KEY


@contextlib.contextmanager
def endpoint_errors(base_url: str) -> Iterator[None]:
    """Turn every error of the `openai` client and of httpx into an EndpointError in words."""
    import openai

    kinds: tuple[type[Exception], ...] = (openai.OpenAIError, *http_errors("HTTPError"), *http_errors("InvalidURL"))
    try:
        yield
    except kinds as error:
        raise explain(error, base_url) from error


def explain(error: Exception, base_url: str) -> EndpointError:
    """An error of the `openai` client or of httpx as one sentence and a hint."""
    import openai

    if isinstance(error, (openai.APITimeoutError, *http_errors("TimeoutException"))):
        return EndpointError(f"{base_url} did not answer in time.", "is the server overloaded or starting?")
    if isinstance(error, (openai.APIConnectionError, *http_errors("TransportError"))):
        return explain_connection(error, base_url)
    said = server_words(error)
    if isinstance(error, openai.AuthenticationError):
        return EndpointError(f"{base_url} refuses the API key: {said}.", KEY_HINT)
    if isinstance(error, openai.PermissionDeniedError):
        return EndpointError(f"{base_url} does not allow it: {said}.", KEY_HINT)
    if isinstance(error, openai.NotFoundError):
        hint = "`loraport env` lists the models it has; a base URL ends in /v1"
        return EndpointError(f"{base_url} says: {said}.", hint)
    if isinstance(error, openai.RateLimitError):
        return EndpointError(f"{base_url} refuses more requests: {said}.", "wait, or lower --concurrency")
    if isinstance(error, openai.APIStatusError) and error.status_code == 503:
        return EndpointError(f"{base_url} cannot answer now: {said}.", "try again when it is ready; its log says more")
    if isinstance(error, openai.APIStatusError):
        hint = "the server's log says more" if error.status_code >= 500 else "change the request accordingly"
        return EndpointError(f"{base_url} answered {error.status_code}: {said}.", hint)
    return EndpointError(f"{base_url} cannot be used: {said}.", "check the URL; it ends in /v1")


def explain_connection(error: Exception, base_url: str) -> EndpointError:
    """A connection that never came about, or one that broke."""
    causes: list[BaseException | None] = [error, error.__cause__]
    if any(isinstance(cause, http_errors("UnsupportedProtocol")) for cause in causes):
        return EndpointError(f"{base_url!r} is not a URL.", "a base URL looks like http://127.0.0.1:8000/v1")
    if any(isinstance(cause, http_errors("ConnectError")) for cause in causes):
        return EndpointError(f"nothing answers at {base_url}.", "start it: loraport serve NAME; or check the URL")
    return EndpointError(
        f"{base_url} broke the connection off ({server_words(error.__cause__ or error)}).",
        "did the server die? its last lines say why",
    )


def server_words(error: BaseException) -> str:
    """What a server said in its error body, or else the error itself; one line without its full stop."""
    body = getattr(error, "body", None)
    said = body.get("message") or body.get("detail") if isinstance(body, dict) else None
    words = " ".join(str(said or error).split()).rstrip(".")
    return words if len(words) <= LONGEST_QUOTE else words[:LONGEST_QUOTE] + " …"
