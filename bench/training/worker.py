"""Programs that measure, each in a process of its own: started, told to go, waited for, never left behind.

A worker can be started while another one measures: it imports what it needs, which is half a minute saved, and waits.

    >>> worker = Worker("loraport.train.loop.measure", spec, waits=True)
    >>> worker.result(longest=900)["tokens_per_second"]
    11873.2
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

LOG_LINES = 12
GRACE_S = 20.0  # torchrun ends its processes when it is asked to, and leaves them when it is killed


class Worker:
    """`python -m module`, told where its spec lies; without a spec, where its result shall lie.

    `waits`: it measures only when its result is asked for. With several `gpus` as many processes, as torchrun has it.
    """

    def __init__(
        self,
        module: str,
        spec: dict[str, Any],
        gpus: int = 1,
        waits: bool = False,
        variables: dict[str, str] | None = None,
    ) -> None:
        self.folder = tempfile.TemporaryDirectory(prefix="loraport-bench-")
        self.waits, path = waits, Path(self.folder.name)
        self.out, self.log = path / "out.json", path / "log"
        (path / "spec.json").write_text(json.dumps(spec | {"out": str(self.out), "waits": waits}))
        launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(gpus)] if gpus > 1 else []
        self.started = time.monotonic()
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, *launch, "-m", module, str(path / "spec.json" if spec else self.out)],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment(gpus) | (variables or {}),
                start_new_session=True,
            )

    def result(self, longest: float) -> dict[str, Any]:
        """What it wrote; `error` and the end of its log where something went wrong. Ends it after `longest` seconds."""
        try:
            if self.waits:
                self.started = time.monotonic()
                with contextlib.suppress(BrokenPipeError):
                    self.process.communicate(b"go\n", longest)
            code: int | None = self.process.wait(longest)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            self.end()
        try:
            written = json.loads(self.out.read_text())
        except (OSError, ValueError):
            written = {"error": explain_exit(code, longest)}
        tail = {"log": self.log.read_text(errors="replace").splitlines()[-LOG_LINES:]} if "error" in written else {}
        self.folder.cleanup()
        return dict(written) | tail | {"seconds": round(time.monotonic() - self.started, 1)}

    def end(self) -> None:
        """End it and all that it started; nothing to do when it has ended. Its files go with it or with its result."""
        for number, grace in ((signal.SIGTERM, GRACE_S), (signal.SIGKILL, None)):
            with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
                os.killpg(self.process.pid, number)
                self.process.wait(grace)
        self.process.wait()
        if self.process.stdin:
            with contextlib.suppress(BrokenPipeError):
                self.process.stdin.close()


def environment(gpus: int) -> dict[str, str]:
    """Variables of a worker: only the GPUs it is meant to use, because Trainer would spread a batch over more."""
    seen = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(gpus)))).split(",")[:gpus]
    own = {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ",".join(seen)}
    return dict(os.environ) | own


def explain_exit(code: int | None, longest: float) -> str:
    """Why a process wrote no result, from its exit code."""
    if code is None:
        return f"took longer than {longest:.0f} s"
    return f"ended by signal {-code}" if code < 0 else f"ended with exit code {code}"
