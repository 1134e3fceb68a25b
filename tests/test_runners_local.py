"""Trainers on this machine: real processes, started once, adopted, stopped, and killed at any moment."""

import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from loraport.clients.errors import ResourceError
from loraport.clients.home import Home
from loraport.serve.pool.pool import Share
from loraport.serve.runners import local
from loraport.serve.runners.local import MARK, LocalRunner, environment, processes, read_record
from loraport.serve.runners.seams import Exit, Task
from tests.conftest import ROOT
from tests.serving import wait_until

JOB = "ftjob-1"
# A trainer: it counts its starts, works for a while, and on SIGTERM keeps a checkpoint and ends as loraport train does.
TRAINER = """
import os, signal, sys, time
def stop(*_):
    open("checkpoint", "w").close()
    os._exit(143)
signal.signal(signal.SIGTERM, stop)
with open("starts", "a") as starts:
    starts.write("x")
print("{}", flush=True)
time.sleep(float(sys.argv[1]))
os._exit(int(sys.argv[2]))
"""
DEAF = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); open('deaf', 'w').close(); time.sleep(600)"
# One that has a child in a session of its own, which closes what it inherits and does not listen.
PARENT = f"""
import subprocess, sys, time
subprocess.Popen([sys.executable, "-I", "-S", "-c", {DEAF!r}], start_new_session=True)
time.sleep(float(sys.argv[1]))
"""


def task(
    home: Home, seconds: float = 60, code: int = 0, attempt: int = 1, script: str = TRAINER, job: str = JOB
) -> Task:
    """A trainer that works for so long."""
    command = [sys.executable, "-I", "-S", "-c", script, str(seconds), str(code)]
    return Task(job, attempt, home.root / "jobs" / job, command, {}, Share())


@pytest.fixture
def runner(home: Home) -> Iterator[LocalRunner]:
    """A runner; afterwards no process of any job is left."""
    made = LocalRunner(home, nice=0)
    yield made
    for folder in (home.root / "jobs").glob("*"):
        made.stop(folder.name, 0)
        assert not marked(folder.name)


def marked(job: str) -> list[psutil.Process]:
    """The processes that carry a job's mark."""
    return processes(job, None)


def ended(runner: LocalRunner, job: str = JOB) -> Exit:
    """How a trainer ended, once it has."""
    found: list[Exit] = []
    wait_until(
        lambda: bool((outcome := runner.outcome(job)) and not found.append(outcome)), "the end of the trainer", 30
    )
    return found[0]


def starts(home: Home, job: str = JOB) -> int:
    """How often a trainer has begun."""
    path = home.root / "jobs" / job / "starts"
    return len(path.read_text()) if path.exists() else 0


@pytest.mark.parametrize("code", [0, 4, 143])
def test_it_runs_once_and_its_end_is_known(runner: LocalRunner, home: Home, code: int) -> None:
    runner.start(task(home, 0.2, code))
    assert runner.is_running(JOB) and runner.outcome(JOB) is None and runner.survivors() == [JOB]
    runner.start(task(home, 0.2, code))
    assert ended(runner) == Exit(code)
    runner.start(task(home, 0.2, code))
    assert not runner.is_running(JOB) and starts(home) == 1 and LocalRunner(home).outcome(JOB) == Exit(code)
    folder = home.root / "jobs" / JOB
    assert (folder / "result.json").read_text() == "{}\n" and (folder / "train.log").read_text() == ""
    runner.start(task(home, 0.1, 0, attempt=2))
    assert ended(runner) == Exit(0) and starts(home) == 2
    runner.start(task(home, 0.1, 0, attempt=1))
    assert starts(home) == 2 and runner.survivors() == []


def test_a_stop_lets_it_keep_a_checkpoint(runner: LocalRunner, home: Home) -> None:
    runner.start(task(home))
    wait_until(lambda: starts(home) == 1, "its start")
    runner.stop(JOB, 30)
    assert runner.outcome(JOB) == Exit(143) and (home.root / "jobs" / JOB / "checkpoint").exists()
    runner.stop(JOB, 30)


def test_a_trainer_that_does_not_listen_is_ended_with_all_its_processes(runner: LocalRunner, home: Home) -> None:
    script = PARENT.replace("import subprocess", "import signal; signal.signal(15, signal.SIG_IGN); import subprocess")
    runner.start(task(home, script=script))
    wait_until(lambda: (home.root / "jobs" / JOB / "deaf").exists(), "the child")
    assert len(marked(JOB)) == 3
    runner.stop(JOB, 0.2)
    assert runner.outcome(JOB) == Exit(137) and not marked(JOB)


def test_what_a_trainer_leaves_behind_is_ended_before_its_end_is_told(
    runner: LocalRunner, home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner.start(task(home, 0.5, script=PARENT))
    assert ended(runner) == Exit(0) and not marked(JOB)


def test_a_shell_that_is_killed_takes_its_trainer_along(runner: LocalRunner, home: Home) -> None:
    runner.start(task(home))
    wait_until(lambda: starts(home) == 1, "its start")
    kill("shell", home)
    assert ended(runner) == Exit(None) and (home.root / "jobs" / JOB / "checkpoint").exists() and not marked(JOB)
    runner.start(task(home))
    assert starts(home) == 1, "that attempt ran"


def test_children_of_a_trainer_whose_shell_is_killed_are_ended_too(runner: LocalRunner, home: Home) -> None:
    runner.start(task(home, script=PARENT))
    wait_until(lambda: (home.root / "jobs" / JOB / "deaf").exists(), "the child")
    kill("shell", home)
    assert ended(runner) == Exit(None) and not marked(JOB)


def test_a_trainer_that_is_killed_has_the_code_of_its_signal(runner: LocalRunner, home: Home) -> None:
    runner.start(task(home))
    kill("trainer", home)
    assert ended(runner) == Exit(137)


def kill(who: str, home: Home, job: str = JOB) -> None:
    """kill -9 to the shell or the trainer of a job."""
    record = read_record(home.root / "jobs" / job)
    assert record
    os.kill((record.shell if who == "shell" else record.trainer)[0], signal.SIGKILL)


def test_a_trainer_survives_its_server_and_is_adopted(runner: LocalRunner, home: Home) -> None:
    with server(home, 1.0) as process:
        wait_until(lambda: starts(home) == 1, "its start")
        process.kill()
        process.wait()
    assert runner.is_running(JOB) and runner.survivors() == [JOB]
    runner.start(task(home))
    assert ended(runner) == Exit(0) and starts(home) == 1


def test_trainers_leave_the_gpus_that_an_engine_is_planned_for(runner: LocalRunner, home: Home) -> None:
    for job, gpus in (("ftjob-a", (0, 1)), ("ftjob-b", (2,)), ("ftjob-c", ())):
        runner.start(replace(task(home, job=job), share=Share(gpus)))
        wait_until(lambda job=job: starts(home, job) == 1, "its start")  # type: ignore[misc]
    assert runner.leave(["1", "3"], 30) == ["ftjob-a"]
    assert runner.outcome("ftjob-a") == Exit(143) and runner.survivors() == ["ftjob-b", "ftjob-c"]
    assert (home.root / "jobs" / "ftjob-a" / "checkpoint").exists() and runner.leave([], 30) == []


def server(home: Home, seconds: float) -> "subprocess.Popen[bytes]":
    """A process that starts a trainer as a server does, and would go on."""
    code = (
        "import sys, time; from tests.test_runners_local import *; home = Home(Path(sys.argv[1]));"
        "LocalRunner(home, nice=0).start(task(home, float(sys.argv[2]))); time.sleep(600)"
    )
    return subprocess.Popen([sys.executable, "-c", code, str(home.root), str(seconds)], cwd=ROOT)


def test_whatever_is_killed_when_there_is_one_end_and_nothing_left(runner: LocalRunner, home: Home) -> None:
    chance = random.Random(6)
    for number in range(4):
        survive(runner, home, chance, f"ftjob-{number}")


def survive(runner: LocalRunner, home: Home, chance: random.Random, job: str) -> None:
    """One round: a trainer is started in a process that is killed, or its shell, or itself, at a random moment."""
    first = task(home, 0.2, job=job)
    child = os.fork()
    if child == 0:
        try:
            LocalRunner(home, nice=0).start(first)
        finally:
            os._exit(0)
    time.sleep(chance.random() * 0.2)
    victim = chance.choice(["server", "shell", "trainer", "nobody"])
    record = read_record(first.folder)
    if victim == "server":
        os.kill(child, signal.SIGKILL)
    elif victim != "nobody" and record and (who := getattr(record, victim))[1]:
        local.signal_to(who, signal.SIGKILL)
    os.waitpid(child, 0)
    runner.start(first)
    outcome = ended(runner, job)
    assert starts(home, job) <= 1 and not marked(job), f"{job}: {victim}"
    expected = {"server": [0], "shell": [0, None], "trainer": [0, 137], "nobody": [0]}[victim]
    assert outcome.code in expected, f"{job}: {victim}, {outcome}"


def test_a_command_that_is_none_is_refused_in_words(runner: LocalRunner, home: Home) -> None:
    wrong = Task(JOB, 1, home.root / "jobs" / JOB, ["no-such-program"], {}, Share())
    with pytest.raises(ResourceError, match="cannot be started: no-such-program: No such file"):
        runner.start(wrong)
    assert ended(runner) == Exit(127)


def test_a_shell_that_does_not_answer_is_ended_with_all_that_it_began(
    runner: LocalRunner, home: Home, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    hanging = tmp_path / "hanging.py"
    hanging.write_text(
        "import os, time, pathlib, sys\nif not os.fork(): os.environ.clear()\n"
        "pathlib.Path(sys.argv[1], f'pid{os.getpid()}').touch()\ntime.sleep(600)"
    )
    folder = home.root / "jobs" / JOB

    def lose_patience(*_: object) -> str:
        wait_until(lambda: len(list(folder.glob("pid*"))) == 2, "the shell and its child")
        return "its shell does not answer"

    monkeypatch.setattr(local, "SHELL", hanging)
    monkeypatch.setattr(local, "read_all", lose_patience)
    with pytest.raises(ResourceError, match="its shell does not answer"):
        runner.start(task(home))
    pids = [int(path.name[3:]) for path in folder.glob("pid*")]
    assert not [pid for pid in pids if local.shell.identity(pid)[1]]
    assert not runner.is_running(JOB)
    monkeypatch.undo()
    runner.start(task(home, 0.1))
    assert ended(runner) == Exit(0)


def test_a_stranger_that_got_the_number_of_a_shell_is_left_alone(runner: LocalRunner, home: Home) -> None:
    """The shell is long gone; somebody else leads a session of that number, and has left a process in it."""
    leader = "import os, sys\nif os.fork(): os._exit(0)\nos.execvp('sleep', ['sleep', '600'])"
    gone = subprocess.Popen([sys.executable, "-I", "-S", "-c", leader], start_new_session=True)
    gone.wait()
    stranger = next(each for each in psutil.process_iter() if session_of(each.pid) == gone.pid)
    try:
        folder = home.ensure(home.root / "jobs" / JOB)
        known = {"attempt": 1, "boot": local.shell.boot_id(), "shell": [gone.pid, 5], "trainer": [gone.pid, 5]}
        (folder / "process.json").write_text(json.dumps(known))
        assert not runner.is_running(JOB) and runner.outcome(JOB) == Exit(None)
        runner.stop(JOB, 0)
        assert stranger.is_running() and stranger.status() != psutil.STATUS_ZOMBIE
    finally:
        stranger.kill()


def session_of(pid: int) -> int | None:
    """The session of a process; None where it is gone."""
    try:
        return os.getsid(pid)
    except ProcessLookupError:
        return None


@pytest.fixture
def small_disk(home: Home) -> Iterator[Path]:
    """The folder of the job, on a disk of its own that is soon full."""
    folder = home.ensure(home.root / "jobs" / JOB)
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "none", folder], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"a disk that is full takes a mount: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_disk_that_is_full_at_the_end_hides_no_outcome(small_disk: Path, runner: LocalRunner, home: Home) -> None:
    script = (
        "import os; fill = open('fill', 'wb', 0)\ntry:\n while True: fill.write(bytes(64))\nexcept OSError: os._exit(3)"
    )
    runner.start(task(home, script=script))
    assert ended(runner) == Exit(3) and os.statvfs(small_disk).f_bavail == 0
    with pytest.raises(ResourceError, match=r"cannot be started: .*No space left"):
        runner.start(task(home, attempt=2))
    (small_disk / "fill").unlink()
    runner.start(task(home, 0.1, attempt=2))
    assert ended(runner) == Exit(0)


def test_where_nothing_can_be_written_nothing_is_started(runner: LocalRunner, home: Home) -> None:
    folder = home.ensure(home.root / "jobs" / JOB)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))  # passed on to the shell
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        with pytest.raises(ResourceError, match="File too large"):
            runner.start(task(home))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)
    assert starts(home) == 0 and not (folder / "process.json").exists()
    runner.start(task(home, 0.1))
    assert ended(runner) == Exit(0)


def test_a_job_that_never_began_has_no_outcome_to_tell(runner: LocalRunner) -> None:
    assert not runner.is_running("ftjob-none") and runner.outcome("ftjob-none") == Exit(None)
    runner.stop("ftjob-none", 1)


def test_a_record_of_another_boot_is_nobody(runner: LocalRunner, home: Home) -> None:
    folder = home.ensure(home.root / "jobs" / JOB)
    own = [os.getpid(), local.shell.identity(os.getpid())[1]]
    (folder / "process.json").write_text(json.dumps({"attempt": 1, "boot": "older", "shell": own, "trainer": own}))
    assert not runner.is_running(JOB) and runner.outcome(JOB) == Exit(None)


@pytest.mark.parametrize(
    ("share", "names", "visible"),
    [
        (Share(), {}, ""),
        (Share((1, 3)), {}, "1,3"),
        (Share((1,)), {0: "GPU-a", 1: "GPU-b"}, "GPU-b"),
    ],
)
def test_it_sees_its_gpus_alone(home: Home, share: Share, names: Mapping[int, str], visible: str) -> None:
    made = Task(JOB, 1, home.root, ["x"], {"CUDA_VISIBLE_DEVICES": "0,1,2,3"}, share)
    assert environment(made, home, names)["CUDA_VISIBLE_DEVICES"] == visible


def test_it_knows_no_secret_of_the_server(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    secrets = {
        **dict.fromkeys(("LORAPORT_API_KEY", "OPENAI_API_KEY", "HF_TOKEN", "DATABASE_URL", "LORAPORT_DATABASE"), "top"),
        "HTTPS_PROXY": "http://ann:top@proxy:3128",
        "HF_ENDPOINT": "https://hub.example",
        "OMP_NUM_THREADS": "1",
    }
    for name, value in secrets.items():
        monkeypatch.setenv(name, value)
    made = environment(Task(JOB, 1, home.root, ["x"], {"WANDB_API_KEY": "the job's own"}, Share()), home, {})
    assert "top" not in " ".join(made.values())
    assert made["HF_ENDPOINT"] == "https://hub.example" and made["OMP_NUM_THREADS"] == "1" and made["PATH"]
    assert made["WANDB_API_KEY"] == "the job's own" and made[MARK] == JOB and made["LORAPORT_HOME"] == str(home.root)


def test_it_is_nicer_than_the_server_and_ended_before_it(home: Home) -> None:
    runner = LocalRunner(home)
    runner.start(task(home))
    record = read_record(home.root / "jobs" / JOB)
    assert record
    trainer, shell = (psutil.Process(who[0]) for who in (record.trainer, record.shell))
    wait_until(lambda: starts(home) == 1, "its start")
    assert trainer.nice() == min(19, os.getpriority(os.PRIO_PROCESS, 0) + local.NICE)
    assert int(Path(f"/proc/{trainer.pid}/oom_score_adj").read_text()) == 500
    assert shell.nice() == os.getpriority(os.PRIO_PROCESS, 0) and shell.memory_info().rss < 24 << 20
    assert os.getsid(trainer.pid) == shell.pid != os.getsid(0)
    runner.stop(JOB, 10)
