"""The processes that send requests, seen from the command: started, given stages, waited for, never left behind.

Records lie in a folder, a file for each process. Ctrl-C ends the stage that runs: its requests are cut off, what they
did so far is on disk, and KeyboardInterrupt goes on to the caller.

    >>> with Fleet(source, folder, processes=2) as fleet:
    ...     efforts = fleet.run(stage)
"""

import contextlib
import json
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from loraport.bench.load.prompts import Source
from loraport.bench.load.stage import Effort, Orders, Stage
from loraport.clients.errors import ResourceError

WORKER, NULL_SERVER = "loraport.bench.load.worker", "loraport.bench.load.null_server"
AHEAD_S = 0.1  # between telling a stage and its start, so that all processes start together
GRACE_S = 10.0
Progress = Callable[[dict[str, int]], None]


class Fleet:
    """`processes` senders. `on_progress` is told sums over all of them: sent, answered, failed, tokens."""

    def __init__(
        self,
        source: Source,
        folder: Path,
        processes: int = 1,
        timeout_s: float = 600,
        on_progress: Progress = lambda sums: None,
    ) -> None:
        self.on_progress = on_progress
        self.told: dict[int, dict[str, int]] = {}
        self.news: queue.Queue[tuple[int, dict[str, Any] | None]] = queue.Queue()
        self.workers = [start_program(WORKER) for _ in range(processes)]
        for which, worker in enumerate(self.workers):
            orders = Orders(source, (which, processes), str(folder / f"records-{which}.jsonl"), timeout_s)
            self.say(worker, asdict(orders))
            threading.Thread(target=self.listen, args=(which, worker), daemon=True).start()

    def say(self, worker: "subprocess.Popen[str]", document: dict[str, Any]) -> None:
        """One line to a process; a dead one is noticed by its output."""
        assert worker.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            worker.stdin.write(json.dumps(document) + "\n")
            worker.stdin.flush()

    def listen(self, which: int, worker: "subprocess.Popen[str]") -> None:
        """Take a process's lines until it ends."""
        assert worker.stdout is not None
        for line in worker.stdout:
            self.news.put((which, json.loads(line)))
        self.news.put((which, None))

    def run(self, stage: Stage) -> list[Effort]:
        """Run a stage to its end. Ctrl-C and SIGTERM end it early and go through."""
        start = time.monotonic() + AHEAD_S
        for worker in self.workers:
            self.say(worker, {"stage": stage.to_json(), "start": start})
        try:
            return self.wait()
        except (KeyboardInterrupt, SystemExit):
            for worker in self.workers:
                self.say(worker, {"stop": True})
            with contextlib.suppress(queue.Empty, ResourceError):
                self.wait(GRACE_S)
            raise

    def wait(self, longest: float | None = None) -> list[Effort]:
        """The efforts of all processes; ResourceError when one died, queue.Empty after `longest` seconds of silence."""
        efforts: list[Effort] = []
        while len(efforts) < len(self.workers):
            which, news = self.news.get(timeout=longest)
            if news is None:
                raise ResourceError(
                    f"a process that sends requests ended with status {self.workers[which].wait()}.",
                    "was memory short? its words stand above",
                )
            if "effort" in news:
                effort = news["effort"]
                lags = {int(bucket): count for bucket, count in effort["lags"].items()}
                efforts.append(Effort(**(effort | {"lags": lags})))
            else:
                self.told[which] = news
                keys = ("sent", "answered", "failed", "tokens")
                self.on_progress({key: sum(each[key] for each in self.told.values()) for key in keys})
        return efforts

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for worker in self.workers:
            end_program(worker)


class NullServer:
    """The null server as a context: `base_url`. `ttft`, `gap`: seconds to the first chunk and between two."""

    def __init__(self, ttft: float = 0.0, gap: float = 0.0) -> None:
        self.arguments = ["--ttft", str(ttft), "--gap", str(gap)]

    def __enter__(self) -> Self:
        self.process = start_program(NULL_SERVER, self.arguments)
        assert self.process.stdout is not None
        self.base_url = self.process.stdout.readline().strip()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        end_program(self.process)


def start_program(module: str, arguments: Sequence[str] = ()) -> "subprocess.Popen[str]":
    """A program of ours in a session of its own, which a Ctrl-C of the terminal does not reach."""
    return subprocess.Popen(
        [sys.executable, "-m", module, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=dict(os.environ) | {"PYTHONUNBUFFERED": "1"},
        start_new_session=True,
    )


def end_program(process: "subprocess.Popen[str]") -> None:
    """End it by the end of its input; kill it where it does not listen."""
    with contextlib.suppress(BrokenPipeError):
        if process.stdin:
            process.stdin.close()
    try:
        process.wait(GRACE_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
