"""Fine-tuning with the official `openai` client, as for OpenAI's own API: OPENAI_BASE_URL alone says where.

$ loraport serve --model examples/reader-9m
$ export OPENAI_BASE_URL=http://127.0.0.1:8000/v1 OPENAI_API_KEY=loraport
$ python examples/finetuning.py reader-9m examples/demo/train.jsonl
"""

import json
import sys
import time
from pathlib import Path

from openai import OpenAI

model, path = sys.argv[1], Path(sys.argv[2])
client = OpenAI()

with path.open("rb") as rows:
    file = client.files.create(file=rows, purpose="fine-tune")
client.files.wait_for_processing(file.id)
job = client.fine_tuning.jobs.create(
    model=model,
    training_file=file.id,
    suffix="example",
    seed=1,
    method={"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 1}}},
)
print("job", job.id, job.status)

told = set()
while job.status not in ("succeeded", "failed", "cancelled"):
    time.sleep(1)
    job = client.fine_tuning.jobs.retrieve(job.id)
    for event in reversed(list(client.fine_tuning.jobs.list_events(job.id, limit=50))):
        if event.id not in told:
            told.add(event.id)
            print("event", event.type, event.message)
if job.status != "succeeded":
    sys.exit(f"{job.status}: {job.error}")
print("model", job.fine_tuned_model)

with path.open() as rows:
    messages = json.loads(rows.readline())["messages"][:-1]
checkpoints = list(client.fine_tuning.jobs.checkpoints.list(job.id))
for name in [job.fine_tuned_model, *(each.fine_tuned_model_checkpoint for each in checkpoints)]:
    reply = client.chat.completions.create(model=name, messages=messages, max_tokens=32, temperature=0)
    print("reply", reply.model, repr(reply.choices[0].message.content))

for result in job.result_files:
    print("result", client.files.content(result).read().decode().splitlines()[0])
print("deleted", client.models.delete(job.fine_tuned_model).deleted)
