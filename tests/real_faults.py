"""The whole endpoint, killed at random moments: real gateway, queue, trainers and vLLM; for a person, it takes an hour.

    python -m tests.real_faults ROUNDS [SEED]

Each round something gets kill -9 (or the server SIGTERM) at a random moment: the server, a trainer, the engine, or all
at once. At the end every job has ended as it must, its model was made once and answers, its weights are byte for byte
those of a job that nobody disturbed, and no process is left.
"""

import contextlib
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import httpx
import openai
import psutil
from openai.types.fine_tuning import FineTuningJob

from loraport.clients.home import Home
from loraport.clients.terminal import say
from loraport.serve.engine.leftovers import read_traces, session_of
from tests.conftest import ROOT, free_port

T = TypeVar("T")
ROWS = 96
KNOBS = {"rank": 4, "save_steps": 2, "eval_rows": 4, "eval_prompts": 1, "batch_size": 8, "learning_rate": 1e-4}
BASE = "reader-9m"
ENDED = ("succeeded", "failed", "cancelled")


class Endpoint:
    """`loraport serve` in a process of its own, started again whenever it was killed."""

    def __init__(self, home: Home) -> None:
        self.home, self.port = home, free_port()
        self.log = (home.root / "server.log").open("a")
        self.client = openai.OpenAI(base_url=f"http://127.0.0.1:{self.port}/v1", api_key="any", max_retries=0)
        self.start()

    def start(self) -> None:
        words = [sys.executable, "-m", "loraport_cli", "serve", "--model", str(ROOT / "examples" / BASE)]
        environment = os.environ | {"LORAPORT_HOME": str(self.home.root), "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [*words, "--port", str(self.port)], stdout=self.log, stderr=self.log, env=environment, cwd=ROOT
        )

    def processes(self, kind: str) -> list[psutil.Process]:
        """Those of a kind that live: trainers, or all of the engines."""
        if kind == "engine":
            return [process for trace in read_traces(self.home) for process in session_of(trace)]
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                words = process.cmdline()
                if "train" in words and any(str(self.home.root / "jobs") in word for word in words):
                    found.append(process)
        return found

    def kill(self, victims: list[psutil.Process]) -> None:
        for process in victims:
            with contextlib.suppress(psutil.Error):
                process.kill()

    def disturb(self, dice: random.Random) -> str:
        """One fault; its name."""
        kind = dice.choice(["server", "trainer", "trainer", "engine", "group", "stop"])
        trainers, engines = self.processes("trainer"), self.processes("engine")
        if kind in ("trainer", "group"):
            self.kill(trainers)
        if kind in ("engine", "group"):
            self.kill(engines)
        if kind in ("server", "group"):
            self.process.kill()
        if kind == "stop":
            self.process.terminate()
        if kind in ("server", "group", "stop"):
            self.process.wait(120)
            self.start()
        return kind


def wait_for(found: Callable[[], T | None], seconds: float, what: str) -> T:
    """Wait until something is there, whatever the endpoint answers meanwhile."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        with contextlib.suppress(openai.APIError, httpx.HTTPError):
            if result := found():
                return result
        time.sleep(0.5)
    raise AssertionError(f"{what} never came")


def submit(endpoint: Endpoint, file: str, number: int) -> str:
    """A job with a suffix of its own, made once: who gets no answer looks whether it is there."""
    suffix = f"n{number}"

    def made() -> str | None:
        jobs = list(endpoint.client.fine_tuning.jobs.list(limit=100))
        known = [job.id for job in jobs if (job.metadata or {}).get("suffix") == suffix]
        if known:
            return known[0]
        job = endpoint.client.fine_tuning.jobs.create(
            model=BASE,
            training_file=file,
            suffix=suffix,
            seed=7,
            metadata={"suffix": suffix},
            extra_body={"loraport": KNOBS | {"epochs": 3}},
        )
        return job.id

    return wait_for(made, 300, "an answer to a new job")


def weights(home: Home, job_id: str) -> str:
    """Hash of the adapter that a job made."""
    [path] = (home.adapters / job_id).glob("*/adapter_model.safetensors")
    return hashlib.sha256(path.read_bytes()).hexdigest()


def run(rounds: int, seed: int, home: Home) -> dict[str, Any]:
    """Disturb, then look."""
    dice, faults = random.Random(seed), Counter[str]()
    rows = (ROOT / "examples/demo/train.jsonl").read_text().splitlines(keepends=True)[:ROWS]
    endpoint = Endpoint(home)
    client = endpoint.client
    file = wait_for(
        lambda: client.files.create(file=("rows.jsonl", "".join(rows).encode()), purpose="fine-tune"), 300, "a file"
    )
    jobs = [submit(endpoint, file.id, 0)]

    def end_of(job_id: str) -> FineTuningJob | None:
        job = client.fine_tuning.jobs.retrieve(job_id)
        return job if job.status in ENDED else None

    first = wait_for(lambda: end_of(jobs[0]), 900, "the end of the undisturbed job")
    assert first.status == "succeeded", first.error
    wanted = weights(home, jobs[0])
    for number in range(1, rounds + 1):
        known = wait_for(lambda: list(client.fine_tuning.jobs.list(limit=100)), 300, "the list")
        if sum(job.status not in ENDED for job in known) < 2:
            jobs.append(submit(endpoint, file.id, number))
        time.sleep(dice.uniform(0.0, 30.0))
        kind = endpoint.disturb(dice)
        faults[kind] += 1
        say(f"{time.strftime('%H:%M:%S')} round {number}: {kind}, {len(jobs)} jobs")
    ended = {job_id: wait_for(partial(end_of, job_id), 1800, f"the end of {job_id}") for job_id in jobs}
    found: dict[str, Any] = {
        "rounds": rounds,
        "seed": seed,
        "faults": dict(faults),
        "jobs": len(jobs),
        "equal": 0,
        "unlucky": 0,
    }
    for job_id, job in ended.items():
        events = [event.message for event in client.fine_tuning.jobs.list_events(job_id, limit=100)]
        made = [line for line in events if line.startswith("New fine-tuned model created")]
        if job.status == "failed":  # a trainer was killed three times: that is a fault of the machine for good
            assert job.error and job.error.code == "training_failed" and not made, (job, events)
            found["unlucky"] += 1
            continue
        assert job.status == "succeeded" and len(made) == 1 and job.fine_tuned_model, (job, events)
        assert weights(home, job_id) == wanted, job_id
        found["equal"] += 1
    last = [job for job in ended.values() if job.fine_tuned_model][-1]
    model = last.fine_tuned_model or ""
    wait_for(lambda: client.completions.create(model=model, prompt="Install", max_tokens=4), 300, "an answer")
    endpoint.process.terminate()
    assert endpoint.process.wait(120) == 0
    left = [*endpoint.processes("engine"), *endpoint.processes("trainer")]
    assert not left, left
    found["left"] = len(left)
    return found


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        home = Home(Path(folder) / "home")
        home.root.mkdir(mode=0o700)
        try:
            say(json.dumps(run(int(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0, home)))
        except BaseException:
            say((home.root / "server.log").read_text()[-4000:])
            raise
        finally:
            for trace in read_traces(home):
                for process in session_of(trace):
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(process.pid, signal.SIGKILL)
