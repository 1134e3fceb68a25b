"""Several processes of one run, under torchrun on the CPU: the same weights as one process gives."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from loraport.train.loop.checkpoints import step_of, whole
from tests.conftest import ROOT, free_port
from tests.loop import assert_same, weights_of
from tests.loop_run import learned, run


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
