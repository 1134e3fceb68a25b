"""The API as schemathesis asks it, from its own description: no 5xx, no hang, no other shape, nothing of another's.

For some seconds on either database; `LORAPORT_FUZZ_S=300 pytest tests/test_finetuning_fuzz.py` for longer.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from loraport.clients.home import Home
from loraport.serve.finetuning.service import Quotas
from loraport.serve.store.changes import move
from loraport.serve.store.tables import Status
from tests.conftest import ROOT
from tests.finetuning import send, serving

SECONDS = int(os.environ.get("LORAPORT_FUZZ_S", "6"))
CHECKS = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance,no_leak"
MODEL = "ft:base:bob:tea:9f86d081884c"


async def answered(*_: object) -> int:
    """A sample that every webhook takes."""
    return 204


@pytest.mark.parametrize("database", ["sqlite", "postgresql"])
def test_whatever_is_asked_is_answered_in_order(
    home: Home, tmp_path: Path, database: str, request: pytest.FixtureRequest
) -> None:
    pytest.importorskip("schemathesis")
    quotas = Quotas(jobs=10**6, files=10**6, uploads=10**6, webhooks=10**6)
    url = request.getfixturevalue("postgres").fresh() if database == "postgresql" else None
    with serving(home, has_keys=True, quotas=quotas, url=url) as api:
        key = api.key("bob")
        ann, bob = api.client(api.key("ann")), api.client(key)
        theirs = send(ann, name="secret-of-ann.jsonl")
        secrets = [theirs.id, "secret-of-ann", ann.fine_tuning.jobs.create(model="base", training_file=theirs.id).id]
        file = send(bob).id
        job = bob.fine_tuning.jobs.create(model="base", training_file=file).id
        done = bob.fine_tuning.jobs.create(model="base", training_file=file).id
        with api.service.store.begin() as session:
            move(session, done, {Status.VALIDATING}, Status.RUNNING)
            move(session, done, {Status.RUNNING}, Status.SUCCEEDED, fine_tuned_model=MODEL)
        upload = bob.uploads.create(bytes=9, filename="a", mime_type="text/jsonl", purpose="fine-tune").id
        webhook = bob.webhooks.create(name="n", url="https://bob.example/", event_types=["fine_tuning.job.failed"]).id
        known = {
            "rows": send(bob).id,
            "file_id": file,
            "job_id": job,
            "upload_id": upload,
            "webhook_id": webhook,
            "model": MODEL,
        }
        object.__setattr__(api.service, "test_webhook", answered)
        command = [sys.executable, "-m", "schemathesis.cli", "run", f"{api.url}/v1/openapi.json", "--url", api.url]
        command += ["--max-time", str(SECONDS), "--request-timeout", "20", "--seed", "1", "--checks", CHECKS]
        command += ["--header", f"Authorization: Bearer {key}", "--continue-on-failure", "--warnings", "off"]
        environment = os.environ | {
            "SCHEMATHESIS_HOOKS": "tests.fuzz_hooks",
            "LORAPORT_FUZZ": json.dumps(known | {"secrets": secrets}),
            "PYTHONPATH": str(ROOT),
        }
        ran = subprocess.run(
            command, env=environment, capture_output=True, text=True, cwd=tmp_path, timeout=SECONDS + 120
        )
        if SECONDS >= 60:  # enough to come as far as to make jobs
            assert len(bob.fine_tuning.jobs.list(limit=1000).data) > 10
    assert ran.returncode == 0, ran.stdout[-6000:] + ran.stderr[-2000:]
