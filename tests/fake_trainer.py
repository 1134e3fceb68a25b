"""A trainer without training: it says what a trainer says, keeps checkpoints, obeys SIGTERM, and fails when told to.

    python tests/fake_trainer.py FOLDER '{"steps": 5, "step_s": 0.01, "fail": {"step": 3, "code": 1, "times": 1}}'

`steps`, `step_s`    how many steps there are, how long each takes
`fail`               behind `step` it ends with `code` (negative: by that signal), `error` being its last words; the
                     first `times` attempts only, -1: always. A step behind the last one: when the adapter is there
`deaf`               whether it ignores SIGTERM
`checkpoints`        the steps that become adapters
`clock_s`            how much its clock is ahead of ours

journal.txt in its folder tells what really happened: the lines `start PID`, `step N` and `end`.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

folder, knobs = Path(sys.argv[1]), json.loads(sys.argv[2])
steps, step_s, fail = knobs.get("steps", 3), knobs.get("step_s", 0.0), knobs.get("fail") or {}
checkpoint = folder / "checkpoint"


def journal(words: str) -> None:
    """Write down what happens."""
    with (folder / "journal.txt").open("a") as file:
        file.write(words + "\n")


def say(kind: str, /, **fields: object) -> None:
    """A line of progress."""
    with (folder / "progress.jsonl").open("a") as file:
        file.write(json.dumps({"at": time.time() + knobs.get("clock_s", 0.0), "type": kind} | fields) + "\n")


def stop(number: int, _: object) -> None:
    """Keep a checkpoint and end."""
    say("stopped", signal=signal.Signals(number).name, step=done or None)
    journal("end")
    os._exit(128 + number)


def fail_at(step: int) -> None:
    """Fail behind that step, if told to."""
    is_told = fail and (fail.get("times", 1) < 0 or starts < fail.get("times", 1))
    if not is_told or step < fail["step"]:
        return
    if "error" in fail:
        say("error", **{"exit_code": fail["code"]} | fail["error"])
    journal("end")
    if fail["code"] < 0:
        os.kill(os.getpid(), -fail["code"])
    os._exit(fail["code"])


done = int(checkpoint.read_text()) if checkpoint.exists() else 0
starts = (folder / "journal.txt").read_text().count("start") if (folder / "journal.txt").exists() else 0
signal.signal(signal.SIGTERM, signal.SIG_IGN if knobs.get("deaf") else stop)
journal(f"start {os.getpid()}")
say("phase", name="training")
say("start", steps=steps, first_step=done, rows=10)
sys.stderr.write("a line of the log\n")
sys.stderr.flush()
fail_at(done)
for step in range(done + 1, steps + 1):
    time.sleep(step_s)
    loss = round(1.0 / step, 4)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})  # a step is whole, with its checkpoint
    say(
        "metrics", step=step, steps=steps, train_loss=loss, train_mean_token_accuracy=0.5, tokens=100 * step, left_s=1.0
    )
    journal(f"step {step}")
    done = step
    partial = checkpoint.with_suffix(".new")
    partial.write_text(str(step))
    partial.replace(checkpoint)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
    fail_at(step)
say("evaluation", step=steps, valid_loss=0.25, valid_mean_token_accuracy=0.75)
made = [
    {"name": f"{folder.name}.step-{step}", "version": "v1", "step": step, "metrics": {}}
    for step in knobs.get("checkpoints", [])
]
tokens = 100 * steps
say("adapter", name=folder.name, version="v1", folder=str(folder), metrics={}, trained_tokens=tokens, checkpoints=made)
fail_at(steps + 1)
journal("end")
