"""Trainers on a Ray cluster that is there: each a Ray job, whose submission id is the job's id and its attempt.

Ray's REST API is asked, so that the server needs no Ray of its own. The cluster's nodes have Loraport at the same place
(the worker image), and see the home at the same path: a shared file system. There the job shell (shell.py) runs the
trainer as on one machine, with the same files in the job's folder. Ray chooses the GPUs of a node by itself: a lease of
the pool says how many, and on which node, not which. Several GPUs of a job are on one node.

A cluster that does not answer for a while has lost nothing: its jobs count as running until it says something else.
Ray forgets its jobs when its head starts again without a store of its own; then exit.json says how they ended, if it is
there, and else nobody knows.

The engines of the endpoint are no tenants of the cluster (`Elsewhere`): start them on GPUs that Ray does not have.

    >>> runner = RayRunner("http://head:8265", Home.default(), grace_s=120)
    >>> queue = Queue(store, home, runner, Pool(runner.machines()), Elsewhere(), hand_over, base)
"""

import json
import math
import re
import shlex
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx

from loraport.clients.errors import ResourceError
from loraport.clients.home import Home, write_json
from loraport.serve.plan.gpus import find_gpu
from loraport.serve.pool.pool import Gpu, Machine, Pool
from loraport.serve.runners.local import MARK, NICE, POLL_S, SHELL, read_exit, read_json
from loraport.serve.runners.seams import Exit, Task

ASK_S = 30.0
MARGIN_S = 15.0  # for Ray to end what did not end by itself, and to say so
PENDING = "PENDING"
FORCED, STOPPED = 128 + 9, 128 + 15
UNKNOWN_BYTES = 1 << 50  # of a GPU whose name says nothing of its memory: then it limits nothing
A_LITTLE = 0.001  # of the resource that each node has: what asks for it runs there
NODE_LIMIT = 10_000
KIND = "accelerator_type:"


class RayRunner:
    """A `Runner` on the cluster whose dashboard is at `address`. For any thread.

    `grace_s`: how long a trainer may take to keep its checkpoint, which Ray has to know when a job is submitted; the
    one of `stop` only says how long is waited at most. `python`: the interpreter on the nodes. `token`: where the
    cluster asks for one.
    """

    def __init__(
        self, address: str, home: Home, grace_s: float = 120.0, python: str = sys.executable, token: str | None = None
    ) -> None:
        self.home, self.grace_s, self.python = home, grace_s, python
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        self.client = httpx.Client(base_url=address.rstrip("/"), headers=headers, timeout=ASK_S)

    def folder(self, job_id: str) -> Path:
        """Where everything of a job lies, here and on the nodes."""
        return self.home.root / "jobs" / job_id

    def start(self, task: Task) -> None:
        """Submit the job; nothing where that attempt or a later one was submitted. ResourceError where Ray refuses."""
        known = read_json(task.folder / "ray.json")
        if int(known.get("attempt", 0)) > task.attempt or self.details(submission(task.job_id, task.attempt)):
            return
        self.home.ensure(task.folder.parent)
        write_json(self.home.ensure(task.folder) / "ray.json", {"attempt": task.attempt})
        answer = self.ask("POST", "/api/jobs/", self.request(task))
        if answer.status_code >= 400 and not self.details(submission(task.job_id, task.attempt)):
            last = (answer.text.strip().splitlines() or [answer.reason_phrase])[-1]
            raise ResourceError(f"the Ray cluster does not take the job: {last.rstrip('.')}.", "look at its dashboard")

    def is_running(self, job_id: str) -> bool:
        """Whether the last attempt waits or runs; also where Ray cannot be asked."""
        try:
            details = self.details(self.last(job_id))
        except ResourceError:
            return True
        return details is not None and self.goes_on(job_id, details)

    def outcome(self, job_id: str) -> Exit | None:
        """How the last attempt ended, as Ray says, or exit.json where Ray has forgotten it."""
        try:
            details = self.details(self.last(job_id))
        except ResourceError:
            return None
        if details is None:
            return Exit(read_exit(self.folder(job_id), self.attempt(job_id)))
        if self.goes_on(job_id, details):
            return None
        found = read_exit(self.folder(job_id), self.attempt(job_id))
        code = found if found is not None else details.get("driver_exit_code")
        if found is None and details.get("status") in ("STOPPED", PENDING):
            return Exit(FORCED)
        return Exit(code if code is not None and code >= 0 else None)

    def stop(self, job_id: str, grace_s: float) -> None:
        """Have Ray stop it: SIGTERM, and SIGKILL after the grace that was said when it was submitted.

        One that waits for its GPUs Ray cannot stop: it is told not to begin.
        """
        with suppress(OSError):
            stop_file(self.folder(job_id), self.attempt(job_id)).touch()
        end = time.monotonic() + max(grace_s, self.grace_s) + MARGIN_S
        with suppress(ResourceError):
            self.ask("POST", f"/api/jobs/{self.last(job_id)}/stop")
        while self.is_running(job_id) and time.monotonic() < end:
            time.sleep(4 * POLL_S)

    def machines(self) -> list[Machine]:
        """The nodes that live, by their addresses, for the pool; ResourceError where Ray cannot be asked.

        A cluster without any GPU is a slot for each node.
        """
        answer = self.ask("GET", f"/api/v0/nodes?detail=true&limit={NODE_LIMIT}")
        try:
            nodes = answer.json()["data"]["result"]["result"]
            found = [machine_of(node) for node in nodes if node.get("state") == "ALIVE"]
        except (ValueError, KeyError, TypeError) as error:
            raise ResourceError(
                "the Ray cluster does not say which nodes it has.", "it needs Ray 2.2 or newer"
            ) from error
        with_gpus = [machine for machine in found if not machine.is_cpu]
        return sorted(with_gpus or found, key=lambda machine: machine.node)

    # What these are made of.

    def attempt(self, job_id: str) -> int:
        """The last attempt that was submitted; 0 before the first."""
        return int(read_json(self.folder(job_id) / "ray.json").get("attempt", 0))

    def goes_on(self, job_id: str, details: Mapping[str, Any]) -> bool:
        """Whether a job waits or runs, and may."""
        if details.get("status") == PENDING:
            return not stop_file(self.folder(job_id), self.attempt(job_id)).exists()
        return details.get("status") == "RUNNING"

    def last(self, job_id: str) -> str:
        """Ray's name of the last attempt."""
        return submission(job_id, self.attempt(job_id))

    def request(self, task: Task) -> dict[str, Any]:
        """What is submitted: the job shell around the trainer, its share, its environment."""
        words = [self.python if word == sys.executable else word for word in task.command]
        numbers = map(str, (task.attempt, NICE, -1, -1))
        command = [self.python, "-I", "-S", str(SHELL), str(task.folder), *numbers, *words]
        folder, stop = (shlex.quote(str(path)) for path in (task.folder, stop_file(task.folder, task.attempt)))
        gpus = len(task.share.gpus)
        ours = {"LORAPORT_HOME": str(self.home.root), MARK: task.job_id}
        ours["RAY_JOB_STOP_WAIT_TIME_S"] = str(math.ceil(self.grace_s))
        if not gpus:
            ours["CUDA_VISIBLE_DEVICES"] = ""
        wanted: dict[str, Any] = {"entrypoint_num_gpus": self.part(task)} if gpus else {"entrypoint_num_cpus": 1}
        if task.share.node:
            wanted["entrypoint_resources"] = {f"node:{task.share.node}": A_LITTLE}
        return {
            "entrypoint": f"if [ -e {stop} ]; then exit {STOPPED}; fi; cd {folder} && exec {shlex.join(command)}",
            "submission_id": submission(task.job_id, task.attempt),
            "runtime_env": {"env_vars": dict(task.environment) | ours},
            "metadata": {"loraport_job": task.job_id},
            **wanted,
        }

    def part(self, task: Task) -> float:
        """GPUs as Ray counts them: whole ones, or the part of one that is shared."""
        share = task.share
        if share.gpu_bytes is None or len(share.gpus) > 1:
            return float(len(share.gpus))
        totals = [gpu.total for machine in self.machines() if machine.node == share.node for gpu in machine.gpus]
        return min(1.0, math.ceil(1000 * share.gpu_bytes / max(totals, default=UNKNOWN_BYTES)) / 1000)

    def details(self, name: str) -> Mapping[str, Any] | None:
        """What Ray knows of a job; None where it knows none."""
        answer = self.ask("GET", f"/api/jobs/{name}")
        if answer.status_code == 404:
            return None
        try:
            found = answer.json()
        except json.JSONDecodeError:
            found = None
        if answer.status_code != 200 or not isinstance(found, dict):
            raise ResourceError(f"the Ray cluster answers with {answer.status_code}.", "look at its dashboard")
        return found

    def ask(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> httpx.Response:
        """A request to the cluster; ResourceError where it does not answer."""
        try:
            return self.client.request(method, path, json=body)
        except httpx.HTTPError as error:
            raise ResourceError(
                f"the Ray cluster at {self.client.base_url} does not answer ({type(error).__name__}).",
                "check its address, and that its dashboard runs (ray[default])",
            ) from error


class Elsewhere:
    """`Serving` of engines whose GPUs are not those of the cluster: no job needs them to leave."""

    def __init__(self) -> None:
        self.gpus: dict[int, int] = {}

    def suspend(self, reason: str, expected_s: float | None) -> None:
        """Nothing."""

    def resume(self) -> None:
        """Nothing."""


def renew(pool: Pool, runner: RayRunner) -> None:
    """See which nodes the cluster has now; those of before where it does not say. For now and then."""
    with suppress(ResourceError):
        pool.machines = runner.machines()


def submission(job_id: str, attempt: int) -> str:
    """Ray's name of an attempt."""
    return f"{job_id}-{attempt}"


def stop_file(folder: Path, attempt: int) -> Path:
    """What keeps an attempt from beginning, once it is there."""
    return folder / f"ray-stop-{attempt}"


def machine_of(node: Mapping[str, Any]) -> Machine:
    """A node as Ray's state API tells of it."""
    resources: Mapping[str, float] = node["resources_total"]
    kinds = [name.removeprefix(KIND) for name in resources if name.startswith(KIND)]  # A100-40G
    known = next((gpu for kind in kinds if (gpu := find_gpu(re.sub(r"-(\d+)G$", r" \1GB", kind)))), None)
    total = int(known.memory * 2**30) if known else UNKNOWN_BYTES
    gpus = tuple(Gpu(number, total, str(number)) for number in range(int(resources.get("GPU", 0))))
    return Machine(str(node["node_ip"]), gpus or (Gpu(0, UNKNOWN_BYTES),), is_cpu=not gpus)
