"""Trainers on a real Ray cluster of two nodes on this machine, with GPUs that Ray only believes in."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest

from loraport.clients.errors import ResourceError, UsageError
from loraport.clients.home import Home
from loraport.serve.finetuning.options import Options
from loraport.serve.finetuning.site import on_cluster
from loraport.serve.pool.pool import Share
from loraport.serve.runners.local import MARK
from loraport.serve.runners.on_ray import RayRunner, machine_of, renew
from loraport.serve.runners.seams import Exit, Task
from tests.conftest import ROOT, free_port
from tests.serving import wait_until
from tests.test_runners_local import TRAINER

START_S = 90.0
HEAD, OTHER = "127.0.0.3", "127.0.0.2"  # Ray gives 127.0.0.1 another address
# Where it trains and with what; then as any trainer.
TELLING = f"import os, json; json.dump(dict(os.environ), open('told', 'w'))\n{TRAINER}"


class Cluster:
    """`ray start` for each node, in the foreground; ended with all its processes."""

    def __init__(self, ray: str, folder: Path) -> None:
        self.ray, self.folder, self.nodes = ray, folder, list[subprocess.Popen[bytes]]()
        self.port, self.dashboard = free_port(), free_port()
        self.url = f"http://127.0.0.1:{self.dashboard}"
        head = ["--head", "--port", str(self.port), "--dashboard-port", str(self.dashboard), "--num-gpus", "2"]
        self.start(HEAD, *head, "--temp-dir", str(folder / "r"))

    def start(self, ip: str, *flags: str) -> None:
        """Add a node."""
        names = ("dashboard-agent-listen-port", "dashboard-agent-grpc-port", "runtime-env-agent-port")
        ports = [word for name in (*names, "metrics-export-port") for word in (f"--{name}", str(free_port()))]
        limits = ["--num-cpus", "4", "--object-store-memory", str(80 << 20), "--disable-usage-stats"]
        line = [self.ray, "start", "--block", "--node-ip-address", ip, *flags, *ports, *limits]
        environment = dict(os.environ)
        environment.pop("CUDA_VISIBLE_DEVICES", None)  # Ray starts no node with more GPUs than that says
        with (self.folder / f"{ip}.log").open("wb") as log:
            process = subprocess.Popen(line, stdout=log, stderr=log, env=environment, start_new_session=True)
        self.nodes.append(process)

    def wait(self, count: int) -> None:
        """Until so many nodes take jobs."""
        runner = RayRunner(self.url, Home(self.folder))

        def are_there() -> bool:
            assert all(node.poll() is None for node in self.nodes), self.said()
            try:
                agents = httpx.get(f"{self.url}/api/jobs/").status_code == 200
                return agents and len(runner.machines()) == count
            except (ResourceError, httpx.HTTPError):
                return False

        wait_until(are_there, "the Ray cluster", START_S)

    def said(self) -> str:
        """Logs of `ray start`."""
        return "\n".join(path.read_text(errors="replace")[-2000:] for path in self.folder.glob("*.log"))

    def stop(self) -> None:
        """End all nodes, and every process of theirs."""
        living = [psutil.Process(node.pid) for node in self.nodes if node.poll() is None]
        mine = [child for node in living for child in node.children(recursive=True)]
        for node in self.nodes:
            node.send_signal(signal.SIGTERM)
        for node in self.nodes:
            try:
                node.wait(20)
            except subprocess.TimeoutExpired:
                node.kill()
        for process in mine:
            if process.is_running():
                process.kill()
        psutil.wait_procs(mine, timeout=20)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """A head with two GPUs and a node with one. Its folder has a short name: Ray's sockets are in it."""
    ray = shutil.which("ray") or shutil.which("ray", path=str(ROOT / ".venv-ray" / "bin"))
    if ray is None:
        pytest.skip("Ray is not installed: python -m venv .venv-ray && .venv-ray/bin/pip install 'ray[default]'")
    folder = Path(tempfile.mkdtemp(prefix="r", dir="/tmp"))
    made = Cluster(ray, folder)
    try:
        made.wait(1)
        made.start(OTHER, "--address", f"{HEAD}:{made.port}", "--num-gpus", "1")
        made.wait(2)
        yield made
    finally:
        made.stop()
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def runner(cluster: Cluster, home: Home) -> RayRunner:
    """A runner that has its own home."""
    return RayRunner(cluster.url, home, grace_s=20)


def named(home: Home, what: str = "first") -> str:
    """The id of a job: a cluster has them for ever, so that each test has its own."""
    return f"ftjob-{home.root.parent.name}-{what}"


def task(home: Home, share: Share, seconds: float = 0, code: int = 0, attempt: int = 1, job: str = "") -> Task:
    """A trainer that works for so long."""
    command = [sys.executable, "-I", "-S", "-c", TELLING, str(seconds), str(code)]
    job = job or named(home)
    return Task(job, attempt, home.root / "jobs" / job, command, {"KNOB": "1"}, share)


def ended(runner: RayRunner, job: str = "") -> Exit:
    """How a trainer ended, once it has."""
    job, found = job or named(runner.home), list[Exit]()
    wait_until(lambda: bool((outcome := runner.outcome(job)) and not found.append(outcome)), "its end", 60)  # type: ignore[func-returns-value]
    return found[0]


def told(home: Home, job: str = "") -> dict[str, str]:
    """The environment of a trainer."""
    path = home.root / "jobs" / (job or named(home)) / "told"
    wait_until(lambda: path.exists() and path.stat().st_size > 2, "its start", 60)
    time.sleep(0.1)
    return dict(json.loads(path.read_text()))


def test_the_nodes_are_the_pool(runner: RayRunner) -> None:
    machines = runner.machines()
    assert [(machine.node, len(machine.gpus), machine.is_cpu) for machine in machines] == [
        (OTHER, 1, False),
        (HEAD, 2, False),
    ]


def test_trainers_run_where_their_gpus_are_and_their_ends_are_known(runner: RayRunner, home: Home) -> None:
    job, other = named(home), named(home, "other")
    for name, share, code in ((job, Share((0, 1), None, HEAD), 0), (other, Share((0,), None, OTHER), 3)):
        runner.start(task(home, share, 0.5, code, job=name))
        runner.start(task(home, share, 0.5, code, job=name))
    assert runner.is_running(job) and runner.outcome(job) is None
    assert (ended(runner, job), ended(runner, other)) == (Exit(0), Exit(3))
    first, second = told(home, job), told(home, other)
    assert len(first["CUDA_VISIBLE_DEVICES"].split(",")) == 2 and second["CUDA_VISIBLE_DEVICES"] == "0"
    assert first[MARK] == job and first["KNOB"] == "1" and first["LORAPORT_HOME"] == str(home.root)
    folder = home.root / "jobs" / job
    assert (folder / "starts").read_text() == "x" and (folder / "result.json").read_text() == "{}\n"
    assert RayRunner(str(runner.client.base_url), home).outcome(other) == Exit(3), "another server sees the same"


def test_a_stop_lets_it_keep_a_checkpoint_and_the_next_attempt_runs(runner: RayRunner, home: Home) -> None:
    runner.start(task(home, Share((0,), None, HEAD), 600))
    told(home)
    runner.stop(named(home), 20)
    assert ended(runner) == Exit(143) and (home.root / "jobs" / named(home) / "checkpoint").exists()
    runner.start(task(home, Share((0,), None, HEAD), 0, 4, attempt=2))
    assert ended(runner) == Exit(4)
    runner.start(task(home, Share((0,), None, HEAD), 0, 0, attempt=1))
    assert ended(runner) == Exit(4)


def test_one_that_waits_for_its_gpus_can_be_stopped_too(runner: RayRunner, home: Home) -> None:
    job, waiting = named(home), named(home, "waiting")
    runner.start(task(home, Share((0,), None, OTHER), 600, job=job))
    told(home, job)
    runner.start(task(home, Share((0,), None, OTHER), 0, job=waiting))
    assert runner.is_running(waiting)
    runner.stop(waiting, 1)
    assert not runner.is_running(waiting) and not (home.root / "jobs" / waiting / "told").exists()
    runner.stop(job, 20)
    assert runner.outcome(job) == Exit(143) and runner.outcome(waiting) == Exit(137)


def test_a_cluster_that_does_not_answer_has_lost_nothing(home: Home) -> None:
    runner = RayRunner(f"http://127.0.0.1:{free_port()}", home)
    with pytest.raises(ResourceError, match="does not answer"):
        runner.start(task(home, Share((0,))))
    assert runner.is_running("ftjob-1") and runner.outcome("ftjob-1") is None


@pytest.mark.parametrize(
    ("resources", "gpus"),
    [
        ({"GPU": 2.0, "accelerator_type:H100": 1.0}, [(0, 79), (1, 79)]),
        ({"GPU": 1.0, "accelerator_type:A100-40G": 1.0}, [(0, 39)]),
        ({"GPU": 1.0}, [(0, 1 << 20)]),
        ({"CPU": 4.0}, []),
    ],
)
def test_a_node_is_a_machine(resources: dict[str, float], gpus: list[tuple[int, int]]) -> None:
    machine = machine_of({"node_ip": "10.0.0.1", "resources_total": resources})
    assert machine.node == "10.0.0.1" and machine.is_cpu == (not gpus)
    assert [(gpu.number, gpu.total >> 30) for gpu in machine.gpus if not machine.is_cpu] == gpus


def test_a_cluster_is_a_site_that_leaves_the_engines_alone(cluster: Cluster, home: Home) -> None:
    site = on_cluster(cluster.url, home)
    assert site.most_gpus == 2 and site.serving.gpus == {} and len(site.pool.machines) == 2
    site.pool.machines = []
    for chore in site.chores:
        chore()
    assert [machine.node for machine in site.pool.machines] == [OTHER, HEAD]
    renew(site.pool, RayRunner(f"http://127.0.0.1:{free_port()}", home))
    assert len(site.pool.machines) == 2, "a cluster that does not answer is as it was"
    site.serving.suspend("a job trains", None)
    site.serving.resume()
    assert Options.of(ray=cluster.url).ray == cluster.url
    with pytest.raises(UsageError, match="is no URL"):
        Options.of(ray="head:8265")
