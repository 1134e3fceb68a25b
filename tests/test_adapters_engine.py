"""Adapters loaded and replaced while the real vLLM serves on this machine's CPU, behind the real gateway."""

import contextlib
import json
import shutil
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest

from loraport.clients.engine_phases import Timeline
from loraport.clients.errors import AdapterError
from loraport.clients.home import Home
from loraport.serve.adapters.catalog import open_reference
from loraport.serve.adapters.live import Live
from loraport.serve.engine import versions
from loraport.serve.engine.connect import connect, socket_path
from loraport.serve.engine.process import DEFAULT_COMMAND, Engine, Launch
from loraport.serve.engine.startup import wait_ready
from loraport.serve.gateway.app import create_app
from loraport.serve.gateway.server import run_in_thread
from loraport.serve.gateway.settings import GatewaySettings
from loraport.serve.gateway.state import EngineState, Model
from loraport.serve.plan.choose import plan, require_shape
from loraport.serve.plan.hardware import read_device
from loraport.serve.plan.settings import Wanted
from loraport.train.base_model import Base, resolve
from tests.adapters import make_tiny_adapter
from tests.conftest import free_port
from tests.gateway import CHAT, asking
from tests.serving import wait_until

pytestmark = pytest.mark.engine


def make_version(home: Home, base: Path, number: int) -> None:
    """adapters/demo/v<number>, with weights of its own."""
    folder = make_tiny_adapter(home.root, base, f"seed{number}", seed=number)
    manifest = json.loads((folder / "loraport.json").read_text()) | {"name": "demo", "version": f"v{number}"}
    (folder / "loraport.json").write_text(json.dumps(manifest))
    target = home.adapters / "demo" / f"v{number}"
    target.parent.mkdir(exist_ok=True)
    folder.rename(target)


@contextlib.contextmanager
def running(
    home: Home, base: Base, rank: int = 8, others: Sequence[str] = ()
) -> Iterator[tuple[Live, httpx.Client, httpx.Client]]:
    """(the adapters, a client of the gateway, one of the engine) with demo@v1 loaded and verified, up to `rank`.

    `others`: adapters that slots are made for too.
    """
    version, device, port = versions.engine_version([], is_ours=True), read_device(), free_port()
    first = open_reference(home, "demo@v1", version)
    shape = require_shape(base.config, base.weight_bytes, base.folder / "config.json")
    named = [first.manifest, *(open_reference(home, name, version).manifest for name in others)]
    made = plan(Wanted(max_lora_rank=rank), shape, named, device, versions.spare_slots(version, device.kind))
    launch = Launch(DEFAULT_COMMAND, version, base, ("base",), (first,), made, device, port, socket_path(home, port))
    engine, state = Engine(launch, home), EngineState()
    app = create_app(state, GatewaySettings("127.0.0.1", 0))
    try:
        with (
            run_in_thread(app, "127.0.0.1", 0) as gateway,
            connect(launch.socket) as direct,
            httpx.Client(base_url=gateway.url, timeout=120, trust_env=False) as client,
        ):
            wait_ready(engine, direct, ["base"], Timeline(), lambda *_: None)
            live = Live(state, home, base, "base", made, version, in_flight=gateway.in_flight, port=port)
            live.connect(direct)
            [result] = live.restore([first])
            assert result.loaded and result.loaded.verified.state == "verified"
            state.ready([Model("base", max_model_len=made.context), *live.models], uds=str(launch.socket))
            yield live, client, direct
    finally:
        engine.stop()


def words_of_stream(client: httpx.Client, into: list[str]) -> None:
    """Read a long reply of `demo`, event by event."""
    body = asking("Tell me all.", model="demo", max_tokens=600, stream=True, temperature=0, ignore_eos=True)
    with client.stream("POST", CHAT, json=body) as answer:
        into.extend(line for line in answer.iter_lines() if line)


def test_versions_come_and_go_while_requests_run(home: Home, tiny_base: Path, tmp_path: Path) -> None:
    """More versions than there are slots, each proven alone and beside base and others, and no request interrupted."""
    for number in (1, 2, 3, 4, 5):
        make_version(home, tiny_base, number)
    elsewhere = make_tiny_adapter(tmp_path / "elsewhere", tiny_base, "theirs", seed=9)
    (elsewhere / "loraport.json").unlink()
    untrained = shutil.copytree(elsewhere, tmp_path / "untrained")
    zero_b(untrained)
    with running(home, resolve(str(tiny_base))) as (live, client, direct):
        events: list[str] = []
        reader = threading.Thread(target=words_of_stream, args=(client, events))
        reader.start()
        wait_until(lambda: live.in_flight("demo@v1") == 1, "the stream")
        assert live.load("demo@v2").verified.telling == 3
        assert client.post(CHAT, json=asking(model="demo")).json()["model"] == "demo@v2"
        for number in (3, 4, 5):
            assert live.load(f"demo@v{number}").verified.state == "verified"
        reader.join(120)
        assert events[-1] == "data: [DONE]" and not any('"error"' in event for event in events)
        assert json.loads(events[-2].removeprefix("data: "))["choices"][0]["finish_reason"] == "length"
        assert live.rollback("demo").engine_name == "demo@v4"
        live.unload("demo:prev")
        assert live.load(str(elsewhere), "theirs").verified.state == "unproven"
        with pytest.raises(AdapterError, match="every B of it is zero"):
            live.load(str(untrained))
        (elsewhere / "adapter_config.json").write_text(
            (elsewhere / "adapter_config.json").read_text().replace('"r": 8', '"r": 16')
        )
        with pytest.raises(AdapterError, match="has rank 8 and 8 in A and B"):
            live.load(str(elsewhere), "other")
        live.unload("theirs")
        live.unload("demo")
        cards = direct.get("/v1/models").json()["data"]
        assert {card["id"] for card in cards} == {"base", "loraport-zeros"}


# What accept.py lets pass beyond plain LoRA, and what it refuses, as PEFT writes it.
FINE: dict[str, dict[str, Any]] = {
    "rslora": {"use_rslora": True},
    "patterns": {"rank_pattern": {"q_proj": 4}, "alpha_pattern": {"layers.1.mlp.up_proj": 3, "v_proj": 40}},
    "some-layers": {"layers_to_transform": [1], "layers_pattern": "layers"},
    "excluded": {"target_modules": "all-linear", "exclude_modules": ["k_proj"]},
    "by-expression": {"target_modules": r".*\.(q|down)_proj"},
    "orthogonal": {"init_lora_weights": "orthogonal"},
    "embedding": {"target_modules": ["embed_tokens", "o_proj"]},
}
REFUSED: dict[str, dict[str, Any]] = {
    "dora": {"use_dora": True},
    "pissa": {"init_lora_weights": "pissa"},
    "bias": {"bias": "lora_only"},
    "lora-bias": {"lora_bias": True},
    "saved-modules": {"modules_to_save": ["lm_head"]},
    "tokens": {"trainable_token_indices": [3, 4]},
}


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_what_is_let_in_is_computed_as_peft_does_and_the_rest_is_refused(home: Home, tiny_base: Path) -> None:
    make_version(home, tiny_base, 1)
    for name, lora in (FINE | REFUSED).items():
        make_tiny_adapter(home.root, tiny_base, name, **lora)
    with running(home, resolve(str(tiny_base)), 16, ["embedding"]) as (live, _, direct):
        for name in FINE:
            loaded = live.load(name)
            assert (name, loaded.verified.state, loaded.verified.telling) == (name, "verified", 3)
            live.unload(name)
        for name in REFUSED:
            with pytest.raises(AdapterError, match=r"which vLLM does not serve\."):
                live.load(name)
        assert {card["id"] for card in direct.get("/v1/models").json()["data"]} <= {"base", "demo@v1", "loraport-zeros"}


def zero_b(folder: Path) -> None:
    """Make every B zero, as before training."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "adapter_model.safetensors")
    tensors = {name: tensor * 0 if "lora_B" in name else tensor for name, tensor in tensors.items()}
    save_file(tensors, folder / "adapter_model.safetensors")
