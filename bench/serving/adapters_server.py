"""What a server says of its adapters, and changes to them where it permits: slots, folders, load and unload.

Slots are read from vLLM's metrics (`max_lora` of vllm:lora_requests_info) and, on this machine, from the command lines
of the process that listens and of those it started. Adapters are changed by vLLM's routes, which an endpoint of
Loraport has too; there they need its admin key: LORAPORT_ADMIN_KEY, or that of the record of `loraport serve`.

    >>> with Server(url) as server:
    ...     AdapterServer(server).slots(Slots())
    Slots(max_loras=4, max_cpu_loras=8, sources={'max_loras': 'metrics', 'max_cpu_loras': 'command line'})
"""

import os
import re
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Any

import httpx
import psutil

from loraport.bench.environment import server_process
from loraport.bench.load.server import Server
from loraport.bench.load.wire import words_of
from loraport.clients.endpoint import endpoint_errors, find_record
from loraport.clients.errors import AdapterError, EndpointError, LoraportError
from loraport.clients.home import Home

ADMIN_KEY = "LORAPORT_ADMIN_KEY"
CHANGE_S = 600.0  # a large adapter from a slow disk; an endpoint of Loraport proves it too
NOT_FOUND = ("", "Not Found")
ENGINE = re.compile(r"^vllm:num_requests_running\{(.*)\}", re.MULTILINE)
MAX_LORA = re.compile(r'^vllm:lora_requests_info\{[^}]*max_lora="(\d+)"', re.MULTILINE)


@dataclass(frozen=True)
class Slots:
    """Adapters in a batch, and in host memory; None where nobody says. `sources`: who says it."""

    max_loras: int | None = None
    max_cpu_loras: int | None = None
    sources: dict[str, str] = field(default_factory=dict)


class AdapterServer:
    """A server, asked by an administrator."""

    def __init__(self, server: Server) -> None:
        self.server = server
        record = find_record(server.base_url, Home.default())
        key = (record.admin_key if record else None) or os.environ.get(ADMIN_KEY, "").strip()
        self.headers = {"Authorization": f"Bearer {key}"} if key else {}
        self.is_ours = False  # an endpoint of Loraport, as `folders` sees

    def slots(self, told: Slots) -> Slots:
        """What is known of slots: as `told` by the user, else by metrics, else by a command line of this machine."""
        found: dict[str, tuple[int, str]] = {}
        for name, value in (("max_loras", told.max_loras), ("max_cpu_loras", told.max_cpu_loras)):
            if value is not None:
                found[name] = value, "you"
        most = self.metric()
        if most is not None:
            found.setdefault("max_loras", (most, "metrics"))
        lines = self.command_lines()
        for name in ("max_loras", "max_cpu_loras"):
            value = next((value for line in lines if (value := flag_of(line, name)) is not None), None)
            if value is not None:
                found.setdefault(name, (value, "command line"))
        if lines and "max_loras" in found and any(is_vllm(line) for line in lines):
            found.setdefault("max_cpu_loras", (found["max_loras"][0], "vLLM's default: as many as max_loras"))
        values = {name: value for name, (value, _) in found.items()}
        return Slots(**values, sources={name: source for name, (_, source) in found.items()})

    def metric(self) -> int | None:
        """`max_lora` of vLLM's metrics; None where it is not there (vLLM says it after the first request)."""
        with suppress(httpx.HTTPError):
            text = self.server.http.get(self.server.beside("/metrics"), headers=self.headers).text
            values = [int(value) for value in MAX_LORA.findall(text)]
            return min(values, default=None)
        return None

    def engines(self) -> int:
        """How many of vLLM's answer there, by the labels of its metrics; 1 where it does not say."""
        with suppress(httpx.HTTPError):
            text = self.server.http.get(self.server.beside("/metrics"), headers=self.headers).text
            return max(1, len(set(ENGINE.findall(text))))
        return 1

    def command_lines(self) -> list[list[str]]:
        """Of the process of this machine that listens there, and of those that it started."""
        address = self.server.address
        process = None if address.socket else server_process(address.host, address.port)
        found = []
        with suppress(psutil.Error):
            for one in [process, *process.children(recursive=True)] if process else ():
                with suppress(psutil.Error):
                    found.append(one.cmdline())
        return found

    def folders(self) -> dict[str, str]:
        """Where the weights of adapters lie on the server's machine, as it says itself.

        vLLM names them as `root` of a model, an endpoint of Loraport in /admin/adapters.
        """
        found = {card.id: card.root for card in self.server.cards() if card.parent and "/" in (card.root or "")}
        with suppress(httpx.HTTPError, ValueError, KeyError, TypeError):
            answer = self.server.http.get(self.server.beside("/admin/adapters"), headers=self.headers)
            listed = {entry["name"]: entry["folder"] for entry in answer.json()["adapters"]}
            self.is_ours = True
            found |= listed
        return {name: folder for name, folder in found.items() if folder}

    def base_folder(self, root: str | None) -> Path | None:
        """The folder of the base on this machine: `root` of its model, else --model of a command line."""
        named = [root or "", *(value_of(line, "model") for line in self.command_lines())]
        return next((Path(name) for name in named if name and (Path(name) / "config.json").is_file()), None)

    def load(self, name: str, folder: str) -> float:
        """Load an adapter under a name; the seconds that the request took.

        AdapterError in the server's words where it refuses, EndpointError where it does not do that at all.
        """
        begin = time.perf_counter()
        self.change("load", {"lora_name": name, "lora_path": folder})
        return time.perf_counter() - begin

    def unload(self, name: str) -> None:
        """Let the server forget a name."""
        self.change("unload", {"lora_name": name})

    def change(self, verb: str, body: dict[str, Any]) -> None:
        """One of vLLM's routes."""
        url, server = self.server.base_url, self.server
        with endpoint_errors(url):
            answer = server.http.post(
                f"{server.root}/{verb}_lora_adapter", json=body, headers=self.headers, timeout=CHANGE_S
            )
        if answer.status_code == 200:
            return
        said = words_of(answer.content).rstrip(".")
        if answer.status_code in (401, 403):
            hint = (
                f"set {ADMIN_KEY} to an admin key: `loraport keys create NAME --admin`, where it is served, makes one"
            )
            raise EndpointError(f"{url} does not let this key change adapters: {said}.", hint)
        if answer.status_code in (404, 405) and said in (*NOT_FOUND, "Method Not Allowed"):
            hint = "vLLM does with VLLM_ALLOW_RUNTIME_LORA_UPDATING=1, an endpoint of Loraport always"
            raise EndpointError(f"{url} does not change adapters while it runs.", hint)
        raise AdapterError(f"{url} refuses to {verb} {body['lora_name']}: {said}.", hint_of(answer))


@contextmanager
def registered(
    server: AdapterServer, folders: Sequence[Path], on_loaded: Callable[[int], None] = lambda count: None
) -> Iterator[list[str]]:
    """Load adapters under names of ours, and unload them at the end, come what may. Raises what `load` raises.

    `on_loaded` is told after each how many there are.
    """
    loaded: list[str] = []
    prefix = name_prefix()
    try:
        for folder in folders:
            name = prefix + folder.name
            loaded.append(name)  # before: a Ctrl-C may come when the server has it already
            server.load(name, str(folder))
            on_loaded(len(loaded))
        yield loaded
    finally:
        for name in loaded:
            with suppress(LoraportError):
                server.unload(name)


def hint_of(answer: httpx.Response) -> str:
    """The hint in a refusal of an endpoint of Loraport; a general one where there is none."""
    with suppress(ValueError, KeyError, TypeError):
        return str(answer.json()["error"]["hint"] or "its log says more")
    return "its log says more"


def name_prefix() -> str:
    """Of names that nobody else has: another run of ours may go on, or have been killed."""
    return f"bench-{secrets.token_hex(2)}-"


def flag_of(line: Sequence[str], name: str) -> int | None:
    """The number behind --max-loras or --max-cpu-loras in a command line."""
    value = value_of(line, name)
    return int(value) if value.isdecimal() else None


def value_of(line: Sequence[str], name: str) -> str:
    """What stands behind a flag in a command line; empty where it is not there."""
    found = ""
    for flag in (f"--{name.replace('_', '-')}", f"--{name}"):
        for word, following in zip_longest(line, line[1:], fillvalue=""):
            if word == flag or word.startswith(f"{flag}="):
                found = following if word == flag else word.partition("=")[2]
    return found


def is_vllm(line: Sequence[str]) -> bool:
    """Whether a command line is of vLLM's server."""
    return any("vllm" in Path(word).name or word.startswith("vllm.") for word in line[:4])
