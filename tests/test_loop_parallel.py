"""Several processes of one run, on the CPU: the same weights as one process gives."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from loraport.clients.errors import AdapterError, Refused
from loraport.clients.home import Home
from loraport.train.adapters import WEIGHTS, Adapter, versions
from loraport.train.base_model import resolve as open_base
from loraport.train.checkpoint_adapters import checkpoint_adapters
from loraport.train.config import RunConfig
from loraport.train.defaults import Facts, resolve
from loraport.train.loop import launch
from loraport.train.loop.checkpoints import step_of, whole
from loraport.train.loop.launch import fit_on, load_trained
from loraport.train.loop.lora import load_lora
from loraport.train.loop.settings import Settings
from loraport.train.loop.shards import ALIGNED, Shards
from loraport.train.progress_file import ProgressFile
from loraport.train.run import train
from tests.conftest import ROOT, free_port
from tests.loop import ToyRows, assert_same, config_for, lora_on, weights_of
from tests.loop_run import learned, run
from tests.test_train_run import write_rows


def test_two_processes_are_one_run(tmp_path: Path) -> None:
    """Steps of 4, 4 and 2 rows, so that the two have unequal parts; dropout is off, since each draws its own."""
    port = f"--master-port={free_port()}"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--master-addr=127.0.0.1", port]
    together = tmp_path / "together"
    together.mkdir()
    done = subprocess.run(
        [*torchrun, "-m", "tests.loop_run", str(together), "--batch-size", "4", "--dropout", "0"],
        cwd=ROOT,
        env=dict(os.environ) | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    model, outcome = run(tmp_path / "alone", batch_size=4, dropout=0.0)
    assert_same(load_file(together / "weights.safetensors"), weights_of(model), rtol=1e-4)
    history = json.loads((together / "history.json").read_text())
    for found, wanted in zip(history, learned(outcome.history), strict=True):
        assert found == pytest.approx(wanted, rel=1e-4)
    assert [step_of(path) for path in whole(together)] == [3, 6, 9]
    # The seal was set when both had written what is theirs.
    sealed = json.loads((together / "checkpoint-9/loraport.json").read_text())["files"]
    assert {"rng_state_0.pth", "rng_state_1.pth"} <= sealed.keys()


def parallel_run(
    home: Home, base: Path, data: Path, name: str, file: ProgressFile | None = None, **settings: Any
) -> Adapter:
    """A whole `train` with two processes on the CPU, unless the settings say otherwise."""
    given = {"model": str(base), "data": data, "name": name, "epochs": 1, "batch_size": 4, "rank": 8, "gpus": 2}
    given |= {"learning_rate": 1e-2, "eval_prompts": 2}
    return train(RunConfig.model_validate(given | settings), home, file=file)


def test_a_run_on_two_processes_stores_what_one_would(tiny_base: Path, tmp_path: Path, home: Home) -> None:
    data, each_step = write_rows(tmp_path / "rows.jsonl"), {"eval_steps": 1, "checkpoint_adapters": 1}
    two = parallel_run(home, tiny_base, data, "two", ProgressFile(tmp_path / "two.jsonl"), **each_step)
    one = parallel_run(home, tiny_base, data, "one", ProgressFile(tmp_path / "one.jsonl"), **each_step, gpus=1)
    weights = [load_file(adapter.folder / WEIGHTS) for adapter in (two, one)]
    assert weights[0].keys() == weights[1].keys()
    for name, tensor in weights[0].items():
        torch.testing.assert_close(tensor, weights[1][name], rtol=1e-3, atol=1e-5)
    assert two.manifest.metrics["eval_loss"] == pytest.approx(one.manifest.metrics["eval_loss"], rel=1e-4)
    assert two.manifest.golden and (two.folder / "report.html").is_file()
    told = [[json.loads(line) for line in (tmp_path / f"{name}.jsonl").open()] for name in ("two", "one")]
    for kind in ("start", "metrics", "evaluation", "checkpoint", "adapter"):
        lines = [[line for line in each if line["type"] == kind] for each in told]
        for key in ("step", "first_step", "tokens", "trained_tokens", "train_mean_token_accuracy"):
            assert [line.get(key) for line in lines[0]] == [line.get(key) for line in lines[1]], (kind, key)
    kept = [[each.manifest.step for each in checkpoint_adapters(home, adapter)] for adapter in (two, one)]
    assert kept == [[2], [2]]


def test_why_one_of_the_processes_ended_is_told(tiny_base: Path, tmp_path: Path, home: Home) -> None:
    data = write_rows(tmp_path / "rows.jsonl")
    with pytest.raises(Refused, match="the run diverged"):
        parallel_run(home, tiny_base, data, "wild", learning_rate=1e30)
    assert versions(home, "wild") == []


def weights_but(change: Any) -> Any:
    """`load_file` of which `change` makes something else."""
    return lambda path: change(dict(load_file(path)))


@pytest.mark.parametrize(
    "change",
    [
        lambda found: found | {"base_model.model.model.layers.9.mlp.up_proj.lora_A.weight": torch.zeros(8, 64)},
        lambda found: dict(list(found.items())[1:]),
    ],
    ids=["a weight too many", "a weight too few"],
)
def test_an_adapter_that_is_only_half_applied_is_refused(
    change: Any, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_for(str(tiny_base))
    load_lora(open_base(str(tiny_base)), config).save_pretrained(tmp_path)
    assert load_trained(open_base(str(tiny_base)), config, tmp_path)
    monkeypatch.setattr("safetensors.torch.load_file", weights_but(change))
    with pytest.raises(AdapterError, match="1 weights of the trained adapter do not belong to this model, or are"):
        load_trained(open_base(str(tiny_base)), config, tmp_path)


def slow(folder: str, pause: float) -> None:
    """A process that is in a long step when it is asked to end, and writes a checkpoint behind it."""
    asked = []
    signal.signal(signal.SIGTERM, lambda *_: asked.append(True))
    Path(folder, f"{os.getpid()}.begun").touch()
    while not asked:
        time.sleep(0.01)
    time.sleep(pause)
    Path(folder, f"{os.getpid()}.saved").touch()


def begin(folder: Path, pauses: list[float]) -> list[Any]:
    """Such processes, in the middle of their step."""
    processes = [get_context("spawn").Process(target=slow, args=(str(folder), pause)) for pause in pauses]
    for process in processes:
        process.start()
    while len(list(folder.glob("*.begun"))) < len(pauses):
        assert all(process.is_alive() for process in processes)
        time.sleep(0.01)
    return processes


def test_a_stop_waits_for_a_long_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "PATIENCE", 0.5)
    processes = begin(tmp_path, [2.0, 2.1])
    launch.stop(processes)
    assert len(list(tmp_path.glob("*.saved"))) == 2
    assert [process.exitcode for process in processes] == [0, 0]


def test_a_process_that_waits_for_one_that_died_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "PATIENCE", 0.5)
    processes = begin(tmp_path, [1000.0, 1000.0])
    processes[1].kill()
    launch.stop(processes)
    assert [process.exitcode for process in processes] == [-signal.SIGKILL] * 2


def test_a_second_signal_ends_all_at_once(tmp_path: Path) -> None:
    processes = begin(tmp_path, [1000.0, 1000.0])
    again = threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGINT))
    again.start()
    with pytest.raises(KeyboardInterrupt):
        launch.stop(processes)
    again.join()
    assert [process.exitcode for process in processes] == [-signal.SIGKILL] * 2


def test_a_base_in_shares_learns_the_same(tmp_path: Path, tiny_base: Path, home: Home) -> None:
    data = write_rows(tmp_path / "rows.jsonl")
    given = {
        "model": str(tiny_base),
        "data": data,
        "name": "x",
        "epochs": 2,
        "batch_size": 4,
        "rank": 8,
        "dropout": 0.0,
    }
    config, _ = resolve(RunConfig.model_validate(given | {"learning_rate": 1e-2}), Facts(rows=12, eval_rows=3))
    found = {}
    for name, settings in {"whole": Settings(60, 1), "shares": Settings(60, 1, sharded=True)}.items():
        model, outcome = fit_on(
            2, open_base(str(tiny_base)), ToyRows(12), ToyRows(3, 1), config, settings, tmp_path / name, {}
        )
        found[name] = {key: value.detach() for key, value in model.named_parameters() if value.requires_grad}
        assert outcome.settings == settings
    for key, value in found["whole"].items():
        torch.testing.assert_close(value, found["shares"][key], rtol=1e-4, atol=1e-6)


def test_a_layer_is_there_only_while_it_is_used(tiny_base: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32)
    weight = model.model.layers[1].mlp.up_proj.weight
    linears = [module for module in model.model.layers.modules() if isinstance(module, torch.nn.Linear)]
    size = sum(linear.weight.numel() * linear.weight.element_size() for linear in linears)
    model = lora_on(model.requires_grad_(False))
    whole, ids = weight.detach().clone(), torch.arange(3, 20)[None]
    wanted = model(input_ids=ids).logits
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        shards = Shards(model, 0, 1, torch.device("cpu"))
        assert weight.numel() == 0
        held = sum(shard.part.numel() for shard in shards.shards)
        assert size <= held < size + len(linears) * ALIGNED, "each linear once, and nothing else"
        torch.testing.assert_close(model(input_ids=ids).logits, wanted)
        assert weight.numel() == 0
        shards.shards[1].take()
        assert torch.equal(weight, whole)
        shards.release()
        assert weight.numel() == 0
    finally:
        torch.distributed.destroy_process_group()
