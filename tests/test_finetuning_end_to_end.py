"""Fine-tuning from the first byte to the last: the unmodified client, the real trainer, the real vLLM on a CPU."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import openai
import pytest

from loraport.clients.endpoint import find_record
from tests.conftest import ROOT, Served
from tests.serving import wait_until
from tests.test_finetuning_webhooks import Receiver

pytestmark = pytest.mark.engine
ROWS = 24
QUICK: Any = {"loraport": {"rank": 4, "save_steps": 1, "eval_steps": 1, "eval_rows": 4, "eval_prompts": 1}}


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """Some rows of the demo."""
    path = tmp_path / "rows.jsonl"
    lines = (ROOT / "examples/demo/train.jsonl").read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:ROWS]))
    return path


@pytest.fixture
def client(served: Served) -> openai.OpenAI:
    """The client as a user would make it."""
    return openai.OpenAI(base_url=served.base_url, api_key="any", webhook_secret="-")


def test_a_script_written_for_openai_runs_as_it_is(served: Served, rows: Path) -> None:
    environment = os.environ | {"OPENAI_BASE_URL": served.base_url, "OPENAI_API_KEY": "any"}
    script = [sys.executable, str(ROOT / "examples/finetuning.py"), "reader-9m", str(rows)]
    done = subprocess.run(script, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    said = [line.split(" ", 2) for line in done.stdout.splitlines()]
    [[_, job_id, status]] = [words for words in said if words[0] == "job"]
    [[_, model]] = [words for words in said if words[0] == "model"]
    assert status == "validating_files" and model == f"ft:reader-9m:loraport:example:{job_id[6:18]}"
    assert ["event", "message", f"New fine-tuned model created: {model}"] in said
    assert next(words[1] for words in said if words[0] == "reply") == model
    assert ["deleted", "True"] in said and any(words[:2] == ["event", "metrics"] for words in said)
    assert not (served.home.adapters / job_id).exists()


def test_checkpoints_webhooks_and_the_command_line_see_the_same_job(
    served: Served, client: openai.OpenAI, rows: Path
) -> None:
    receiver = Receiver()
    webhook = client.webhooks.create(name="e2e", url=receiver.url, event_types=["fine_tuning.job.succeeded"])
    environment = os.environ | {"LORAPORT_HOME": str(served.home.root)}
    loraport = [sys.executable, "-m", "loraport_cli", "jobs"]
    settings = [f"--set={name}={value}" for name, value in QUICK["loraport"].items()]
    submit = [*loraport, "submit", str(rows), "--epochs", "1", "--batch-size", "8", *settings, "--watch", "--json"]
    done = subprocess.run(submit, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    job = json.loads(done.stdout)
    assert job["status"] == "succeeded" and job["model"] == "reader-9m"
    model = job["fine_tuned_model"]
    checkpoints = list(client.fine_tuning.jobs.checkpoints.list(job["id"]))
    assert len(checkpoints) >= 2 and all(each.metrics.train_loss for each in checkpoints)
    messages: Any = json.loads(rows.read_text().splitlines()[0])["messages"][:-1]
    for name in (model, checkpoints[-1].fine_tuned_model_checkpoint):
        reply = client.chat.completions.create(model=name, messages=messages, max_tokens=8, temperature=0)
        assert reply.model == name and reply.choices[0].message.content is not None
    steps = client.files.content(job["result_files"][0]).text.splitlines()
    assert steps[0].startswith("step,train_loss") and len(steps) == 1 + 3
    wait_until(lambda: bool(receiver.got), "the webhook")
    headers, body = receiver.got[0]
    event = client.webhooks.unwrap(body, headers, secret=webhook.signing_secret)
    assert event.type == "fine_tuning.job.succeeded" and event.data.id == job["id"]
    logs = subprocess.run([*loraport, "logs", job["id"]], env=environment, capture_output=True, text=True, check=True)
    assert "step 3/3" in logs.stdout
    shown = subprocess.run([*loraport, "show", job["id"]], env=environment, capture_output=True, text=True, check=True)
    assert model in shown.stderr and "ckpt-step-" in shown.stderr
    record = find_record(served.base_url, served.home)
    assert record and not [name for name in record.adapters if name.startswith("ftjob-")]
    client.models.delete(model)
    client.webhooks.delete(webhook.id)
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model=model, messages=messages, max_tokens=8)


def test_rows_that_cannot_be_trained_fail_the_job_and_name_the_row(client: openai.OpenAI, tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl"
    good = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    bad = {"messages": [{"role": "user", "content": "nobody answers"}]}
    path.write_text("\n".join(json.dumps(row) for row in [good] * 11 + [bad]) + "\n")
    file = client.files.create(file=path.open("rb"), purpose="fine-tune")
    job = client.fine_tuning.jobs.create(model="reader-9m", training_file=file.id)
    end = time.monotonic() + 180
    while job.status not in ("failed", "succeeded") and time.monotonic() < end:
        time.sleep(0.5)
        job = client.fine_tuning.jobs.retrieve(job.id)
    assert job.status == "failed" and job.error and job.error.param == "training_file"
    assert "12" in job.error.message, job.error.message


def test_a_rank_that_could_not_be_served_is_refused_at_once(client: openai.OpenAI, rows: Path) -> None:
    file = client.files.create(file=rows.open("rb"), purpose="fine-tune")
    with pytest.raises(openai.BadRequestError, match="--max-lora-rank 64"):
        client.fine_tuning.jobs.create(model="reader-9m", training_file=file.id, extra_body={"loraport": {"rank": 64}})
    with pytest.raises(openai.NotFoundError):
        client.fine_tuning.jobs.create(model="gpt-4o-mini", training_file=file.id)
