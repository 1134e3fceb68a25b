"""A request becomes a job: checked, its files linked into its folder, written down, the queue woken.

What is wrong with the rows themselves is found by the queue: the job is accepted, and fails in words.

    >>> job = submit(service, caller, NewJob(model="reader-9m", training_file="file-3f…"), raw)
"""

import secrets
import shutil
import time
from importlib.util import find_spec
from typing import Any

from sqlalchemy import func, or_, select
from sqlalchemy.orm import Session

from loraport.serve.finetuning.again import fingerprint, sent_before
from loraport.serve.finetuning.disk import content, link
from loraport.serve.finetuning.guard import Caller
from loraport.serve.finetuning.kept import CHECKED, is_there
from loraport.serve.finetuning.lists import alone, mine
from loraport.serve.finetuning.service import Service, out_of_quota
from loraport.serve.finetuning.wishes import MOST_SEED, NewJob, check_config, method_of, options_of
from loraport.serve.gateway.refusals import Refusal, bad_request
from loraport.serve.gateway.state import closest
from loraport.serve.jobs.recipe import TRAINING, VALIDATION, job_folder, run_config
from loraport.serve.store.changes import tell
from loraport.serve.store.tables import WAITING, Checkpoint, File, Job, Permission, Status, new_id

BUSY = (*WAITING, Status.RUNNING, Status.PAUSED)  # what is not over holds its rows


def submit(service: Service, caller: Caller, body: NewJob, raw: bytes) -> Job:
    """The job of a request; the one it made before, where it is sent again. Refusal with the parameter at fault."""
    found = fingerprint(caller, raw)
    caller.answers.hear(body.training_file, body.validation_file)
    with service.store.read() as session:
        if before := sent_before(session, Job, caller, found):
            return before
        check_model(session, service, caller, body.model)
        files = [file_of(session, caller, name, getattr(body, name)) for name in ("training_file", "validation_file")]
    job = new_job(service, caller, body, found)
    folder = job_folder(service.home, job.id)
    config = check_config(run_config(job, "base", folder / TRAINING, folder / VALIDATION if files[1] else None))
    if service.servable and (reason := service.servable(config)):
        raise bad_request("not_servable", f"What this job would train could not be served here: {reason}.", "loraport")
    try:
        for file, name in zip(files, (TRAINING, VALIDATION), strict=True):
            if file is not None:
                take_file(service, job, file, name)
        kept = write(service, caller, job)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    if kept is not job:
        shutil.rmtree(folder, ignore_errors=True)
    service.queue.wake()
    return kept


def new_job(service: Service, caller: Caller, body: NewJob, found: str) -> Job:
    """The row of a job, not written yet."""
    options = options_of(body, caller.is_admin, service.gpus)
    if body.integrations and find_spec("wandb") is None:
        message = "Weights & Biases is not installed at this endpoint: leave 'integrations' away."
        raise bad_request("unsupported_integration", message, "integrations")
    said: dict[str, Any] = {}  # what is left away is NULL, which `metadata=null` finds; None would be a JSON null
    if body.metadata:
        said["labels"] = body.metadata
    if body.integrations:
        said["integrations"] = [each.model_dump(exclude_none=True) for each in body.integrations]
    return Job(
        id=new_id("ftjob-"),
        tenant=caller.tenant,
        status=Status.VALIDATING,
        model=body.model,
        training_file=body.training_file,
        validation_file=body.validation_file,
        suffix=body.suffix or None,
        seed=secrets.randbelow(MOST_SEED) if body.seed is None else body.seed,
        method=method_of(body),
        options=options,
        request_sha256=found,
        priority=options.get("priority", 0),
        gpus=options["gpus"] if isinstance(options.get("gpus"), int) else 1,
        may_share=options.get("may_share", False),
        **said,
    )


def check_model(session: Session, service: Service, caller: Caller, name: str) -> None:
    """Refusal where a model is not the base that is served here, or none that this key may use."""
    bases = list(service.bases())
    if name in bases and caller.key.may_use(*bases):
        return
    if is_tuned(session, caller, name):
        message = f"'{name}' is fine-tuned itself, and this endpoint trains the base it serves: '{bases[0]}'."
        raise bad_request("unsupported_model", message, "model")
    names = bases if caller.key.may_use(*bases) else []
    near = closest(name, names)
    meant = f" Did you mean {near}?" if near else ""
    there = f" This endpoint trains {' (also: '.join([names[0], ', '.join(names[1:])])}" if len(names) > 1 else ""
    there = f"{there})." if there else f" This endpoint trains {names[0]}." if names else ""
    shown = name if len(name) <= 100 else name[:100] + "…"
    raise Refusal(404, "model_not_found", f"There is no model {shown!r} to fine-tune.{meant}{there}", param="model")


def is_tuned(session: Session, caller: Caller, name: str) -> bool:
    """Whether that is a fine-tuned model that the caller may know."""
    if not name.startswith("ft:"):
        return False
    jobs = mine(Job, caller).outerjoin(Checkpoint, Checkpoint.job_id == Job.id)
    known = session.scalars(jobs.where(or_(Job.fine_tuned_model == name, Checkpoint.model == name))).first()
    shared = select(Permission.id).where(Permission.model == name, Permission.tenant == caller.tenant)
    return known is not None or session.scalar(shared) is not None


def file_of(session: Session, caller: Caller, param: str, id: str | None) -> File | None:
    """A file to train on; Refusal 400 for one that is not there or was not sent for that."""
    if id is None:
        return None
    file = session.scalars(mine(File, caller).where(File.id == id, is_there())).first()
    if file is None:
        raise bad_request("file_not_found", f"Invalid value for '{param}': there is no file '{id}'.", param)
    if file.purpose != CHECKED:
        message = f"Invalid value for '{param}': its purpose is '{file.purpose}', and should be '{CHECKED}'."
        raise bad_request("invalid_file_purpose", message, param)
    return file


def take_file(service: Service, job: Job, file: File, name: str) -> None:
    """A link of the job's own to a file's content, so that the file may be deleted or expire while the job waits."""
    path = content(service.files, file.id)
    param = "training_file" if name == TRAINING else "validation_file"
    if path is None:
        raise bad_request("file_not_found", f"The content of '{file.id}' is gone; send it again.", param)
    link(path, job_folder(service.home, job.id) / name)


def write(service: Service, caller: Caller, job: Job) -> Job:
    """Write a job down, within the quota of its tenant; the job that the same request made meanwhile, if one did."""
    most = service.quotas.jobs
    with service.store.begin() as session:
        alone(session, caller.tenant)
        if before := sent_before(session, Job, caller, job.request_sha256):
            return before
        count = select(func.count()).select_from(Job).where(Job.tenant == caller.tenant, Job.status.in_(BUSY))
        if (session.scalar(count) or 0) >= most:
            raise out_of_quota(f"{most:,} jobs that wait or run")
        job.created_at = now = time.time()
        session.add(job)
        session.flush()
        tell(session, job.id, f"Created fine-tuning job: {job.id}", at=now)
        tell(session, job.id, f"Validating training file: {job.training_file}", at=now)
    return job
