"""The engine's side of adapters: vLLM's routes to load and unload one, and which of its slots hold what.

    POST /v1/load_lora_adapter {"lora_name": "demo@v3", "lora_path": "/…/v3"}       200, or an error in OpenAI's shape
    POST /v1/unload_lora_adapter {"lora_name": "demo@v3"}

vLLM's unload drops only the name: the weights stay in their slot until another adapter needs it, and then the one that
was asked least recently goes (LRUCacheLoRAModelManager, 0.25 to 0.32). On a GPU that is all one needs to know. On a
CPU the last slot must hold zeros, because its kernels give it to requests for the base (versions.spare_slots), and
after as many loads as there are slots it would not. So before a load would fill it, an adapter of zeros is put there,
the guard; and from then on guard and adapters in use are asked for a token before each load, so that the slot that is
taken is one of an adapter that is used no more.

    >>> slots = Slots(client, most=3, keeps_last_empty=True, home=home)
    >>> slots.load("demo@v3", Path("/…/v3"))
"""

import json
import struct
from contextlib import suppress
from math import prod
from pathlib import Path
from typing import Any

import httpx

from loraport.clients.errors import AdapterError, EndpointError, ResourceError, os_errors
from loraport.clients.home import Home, write_json
from loraport.serve.adapters import weights
from loraport.serve.engine.connect import no_answer
from loraport.train.adapters import CONFIG, WEIGHTS

LOAD_S = 600.0  # weights of a large adapter from a slow disk
TOUCH_S = 300.0  # behind the requests of users that wait for their turn
GUARD = "loraport-zeros"


class Slots:
    """What one engine process holds. Made anew for each; not thread-safe: `Live` has the lock.

    `most`: --max-loras. `held`: names of the engine that may be asked now or are still answering.
    """

    def __init__(self, client: httpx.Client, most: int, keeps_last_empty: bool, home: Home) -> None:
        self.client, self.most, self.keeps_last_empty, self.home = client, most, keeps_last_empty, home
        self.held: list[str] = []
        self.filled = 0  # slots that an adapter was ever put in

    @property
    def room(self) -> int | None:
        """How many more may be held at once; None where adapters take turns in the slots."""
        return self.most - 1 - len(self.held) if self.keeps_last_empty else None

    def load(self, name: str, folder: Path) -> None:
        """Load an adapter under a name; AdapterError in the engine's words where it refuses."""
        if self.room is not None and self.room <= 0:
            raise ResourceError(
                f"all {self.most - 1} LoRA slots are in use; also another version of an adapter needs one for itself.",
                f"unload an adapter, or serve with --max-loras {self.most - 1}",
            )
        if self.keeps_last_empty:
            self.keep_last_empty(folder)
        self.post_load(name, folder)
        self.held.append(name)

    def post_load(self, name: str, folder: Path) -> None:
        """The request, and what comes of it."""
        answer = self.post("/v1/load_lora_adapter", {"lora_name": name, "lora_path": str(folder)}, LOAD_S)
        said = words_of(answer)
        if answer.status_code == 404 and said in ("", "Not Found"):
            raise EndpointError(
                "the engine does not take adapters while it runs.",
                "leave --no-enable-lora away, and use an engine command that keeps the environment",
            )
        if answer.status_code != 200 and "already been loaded" not in said:
            raise AdapterError(f"the engine refuses the adapter {name}: {said}.", "its log says more")
        self.filled = min(self.filled + 1, self.most)

    def unload(self, name: str) -> None:
        """Let the engine forget a name. One that it does not know, or an engine that is gone, is as good."""
        if name in self.held:
            self.held.remove(name)
        with suppress(EndpointError):
            self.post("/v1/unload_lora_adapter", {"lora_name": name}, 60)

    def keep_last_empty(self, like: Path) -> None:
        """Before a load: see to it that the last slot holds zeros, and goes on to."""
        if self.filled == self.most - 1:
            self.post_load(GUARD, make_zeros(self.home, like))
        if self.filled == self.most:
            for name in (*self.held, GUARD):
                self.touch(name)

    def touch(self, name: str) -> None:
        """Ask a model for a token, so that it is not the one that was asked least recently."""
        body = {"model": name, "prompt": [1], "max_tokens": 1, "temperature": 0}
        answer = self.post("/v1/completions", body, TOUCH_S)
        if answer.status_code != 200:
            raise EndpointError(f"the engine answered {answer.status_code} for {name}: {words_of(answer)}.", "")

    def post(self, path: str, body: dict[str, Any], wait_s: float) -> httpx.Response:
        """POST to the engine; EndpointError where it does not answer."""
        try:
            return self.client.post(path, json=body, timeout=wait_s)
        except (httpx.HTTPError, RuntimeError) as error:  # RuntimeError: the client was closed, the engine is gone
            raise no_answer(path, error, wait_s) from error


def words_of(answer: httpx.Response) -> str:
    """The message of an engine's error without its full stop, in any of vLLM's shapes."""
    try:
        fields = answer.json()
    except ValueError:
        return " ".join(answer.text.split())[:300].rstrip(".")
    if not isinstance(fields, dict):
        return ""
    error = fields.get("error")
    said = error.get("message") if isinstance(error, dict) else fields.get("message") or fields.get("detail")
    return " ".join(str(said or "").split())[:600].rstrip(".")


def make_zeros(home: Home, like: Path) -> Path:
    """The folder of an adapter that adds nothing: zeros of the shapes of one module of the adapter in `like`."""
    pair = next(pair for pair in weights.read_pairs(like) if not pair.is_embedding)
    assert pair.a and pair.b
    folder = home.ensure(home.cache / GUARD)
    config = {"peft_type": "LORA", "r": pair.rank, "lora_alpha": pair.rank, "target_modules": [pair.suffix]}
    write_json(folder / CONFIG, config)
    shapes = {
        f"base_model.model.{pair.module}.lora_{part}.weight": shape for part, shape in (("A", pair.a), ("B", pair.b))
    }
    header: dict[str, Any] = {}
    end = 0
    for name, shape in shapes.items():
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [end, end + 4 * prod(shape)]}
        end += 4 * prod(shape)
    text = json.dumps(header).encode()
    with os_errors("writing", folder / WEIGHTS):
        (folder / WEIGHTS).write_bytes(struct.pack("<Q", len(text)) + text + bytes(end))
    return folder
