"""/v1/fine_tuning/jobs: made, listed, followed, cancelled, paused and resumed.

    POST/GET /v1/fine_tuning/jobs                GET /v1/fine_tuning/jobs/{id}   …/{id}/events   …/{id}/checkpoints
    POST     /v1/fine_tuning/jobs/{id}/cancel    …/pause   …/resume

A job that waits is moved here; of one that runs it is written down what is wanted, and the queue, which is woken, ends
the trainer and moves it. Nothing is trained or scheduled here.
"""

import asyncio
import time
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from sqlalchemy import Select, exists, func, null, or_, select, update
from sqlalchemy.orm import Session

from loraport.serve.finetuning.guard import Asking, Caller, Guarded, already
from loraport.serve.finetuning.lists import After, Limit, listing, mine, one, rows_after
from loraport.serve.finetuning.service import Service
from loraport.serve.finetuning.shapes import CheckpointObject, EventObject, JobObject, Page
from loraport.serve.finetuning.submit import submit
from loraport.serve.finetuning.wishes import NewJob
from loraport.serve.gateway.refusals import bad_request
from loraport.serve.store.changes import move
from loraport.serve.store.tables import ENDED, WAITING, Checkpoint, Event, Job, Status

FILTERS = 16
POLL_S = 0.1
FILTER = {
    "parameters": [
        {
            "name": "metadata",
            "in": "query",
            "style": "deepObject",
            "explode": True,
            "schema": {"type": "object", "additionalProperties": {"type": "string"}, "maxProperties": FILTERS},
            "description": "metadata[key]=value; or metadata=null for jobs without.",
        }
    ]
}


def routes(find: Any) -> APIRouter:
    """The routes; `find` gives the service."""
    router = APIRouter(prefix="/fine_tuning/jobs", route_class=Guarded)

    @router.post("", response_model=JobObject)
    def create_job(request: Request, body: NewJob, caller: Asking) -> JobObject:
        return JobObject.of(submit(find(), caller, body, request.state.raw))

    @router.get("", response_model=Page[JobObject], openapi_extra=FILTER)
    def list_jobs(request: Request, caller: Asking, after: After = None, limit: Limit = 20) -> Any:
        with find().store.read() as session:
            whole = filtered(session, mine(Job, caller), request.query_params.multi_items())
            return listing(session, Job, rows_after(session, Job, whole, after, limit), limit, JobObject)

    @router.get("/{job_id}", response_model=JobObject)
    def show_job(job_id: str, caller: Asking) -> JobObject:
        return JobObject.of(existing(find(), caller, job_id))

    @router.get("/{job_id}/events", response_model=Page[EventObject])
    def list_events(job_id: str, caller: Asking, after: After = None, limit: Limit = 20) -> Any:
        return of_job(find(), caller, job_id, Event, EventObject, after, limit)

    @router.get("/{job_id}/checkpoints", response_model=Page[CheckpointObject])
    def list_checkpoints(
        job_id: str, caller: Asking, after: After = None, limit: Annotated[int, Query(ge=1, le=1000)] = 10
    ) -> Any:
        return of_job(find(), caller, job_id, Checkpoint, CheckpointObject, after, limit)

    @router.post("/{job_id}/cancel", response_model=JobObject)
    async def cancel_job(job_id: str, caller: Asking) -> JobObject:
        return await stop(find(), caller, job_id, "cancel")

    @router.post("/{job_id}/pause", response_model=JobObject)
    async def pause_job(job_id: str, caller: Asking) -> JobObject:
        return await stop(find(), caller, job_id, "pause")

    @router.post("/{job_id}/resume", response_model=JobObject)
    def resume_job(job_id: str, caller: Asking) -> JobObject:
        return JobObject.of(resume(find(), caller, job_id))

    return router


def existing(service: Service, caller: Caller, id: str) -> Job:
    """A job as it is now; Refusal 404."""
    with service.store.read() as session:
        return one(session, Job, caller, "fine-tuning job", id)


def of_job(service: Service, caller: Caller, id: str, kind: Any, shape: Any, after: str | None, limit: int) -> Any:
    """A page of what belongs to a job, the newest first."""
    with service.store.read() as session:
        job = one(session, Job, caller, "fine-tuning job", id)
        asked = rows_after(session, kind, select(kind).where(kind.job_id == job.id), after, limit)
        return listing(session, kind, asked, limit, shape)


def filtered(session: Session, asked: Select[Any], query: list[tuple[str, str]]) -> Select[Any]:
    """Only jobs of the metadata that `metadata[key]=value` names; with `metadata=null`, only those without."""
    pairs = [(key[9:-1], value) for key, value in query if key.startswith("metadata[") and key.endswith("]")]
    if len(pairs) > FILTERS or len({key for key, _ in pairs}) < len(pairs):
        raise bad_request("invalid_value", f"Filter by at most {FILTERS} different keys.", "metadata")
    whole = [value for key, value in query if key == "metadata"]
    if any(value not in ("null", "") for value in whole) or (whole and pairs):
        raise bad_request("invalid_value", "Filter by metadata[key]=value, or by metadata=null.", "metadata")
    if "null" in whole:
        return asked.where(Job.labels.is_(null()))
    for key, value in pairs:
        asked = asked.where(has_label(session, key, value))
    return asked


def has_label(session: Session, key: str, value: str) -> Any:
    """Whether a job's metadata have that pair. On SQLite not by a path, in which not every key can be named."""
    if session.get_bind().dialect.name == "postgresql":
        return Job.labels[key].as_string() == value
    pairs = func.json_each(Job.labels).table_valued("key", "value")
    return exists(select(1).select_from(pairs).where(pairs.c.key == key, pairs.c.value == value))


async def stop(service: Service, caller: Caller, id: str, wanted: str) -> JobObject:
    """Cancel or pause a job; where it runs, wait a while until it does no longer."""
    job = await asyncio.to_thread(ask_to_stop, service, caller, id, wanted)
    service.queue.wake()
    end = time.monotonic() + service.stop_wait_s
    while job.status == Status.RUNNING and job.wanted and time.monotonic() < end:
        await asyncio.sleep(POLL_S)
        job = await asyncio.to_thread(existing, service, caller, id)
    return JobObject.of(job)


def ask_to_stop(service: Service, caller: Caller, id: str, wanted: str) -> Job:
    """Move a job that waits; of one that runs, write down what is wanted. Refusal 400 where it is over."""
    target = Status.CANCELLED if wanted == "cancel" else Status.PAUSED
    before = (*WAITING, Status.PAUSED) if wanted == "cancel" else WAITING
    with service.store.begin() as session:
        job = one(session, Job, caller, "fine-tuning job", id)
        session.refresh(job, with_for_update=True)  # its status stays as it is between the two
        if not move(session, id, before, target) and not want(session, id, wanted):
            refuse_stop(job, caller, wanted, target)
        session.flush()
        session.refresh(job)
    return job


def want(session: Session, id: str, wanted: str) -> bool:
    """Write down what is wanted of a job that runs; False where it does not run. Who cancels, means it."""
    running = update(Job).where(Job.id == id, Job.status == Status.RUNNING)
    if wanted == "pause":
        running = running.where(or_(Job.wanted.is_(None), Job.wanted == "pause"))
    return session.execute(running.values(wanted=wanted).returning(Job.id)).scalar_one_or_none() is not None


def refuse_stop(job: Job, caller: Caller, wanted: str, target: Status) -> None:
    """Refusal 400 in words; nothing where a request that is sent again has done its work already."""
    if job.status == target and caller.is_again:
        return
    if job.status in ENDED:
        raise already(f"The job has already {'been cancelled' if job.status == Status.CANCELLED else job.status}.")
    if job.status == Status.PAUSED:
        raise already("The job is paused already.")
    raise already(f"The job cannot be {'paused' if wanted == 'pause' else 'cancelled'}: it is being cancelled.")


def resume(service: Service, caller: Caller, id: str) -> Job:
    """Let a paused job wait for its turn again; one whose rows were not looked at yet begins with that."""
    with service.store.begin() as session:
        job = one(session, Job, caller, "fine-tuning job", id)
        after = Status.VALIDATING if job.config is None else Status.QUEUED
        if not move(session, id, {Status.PAUSED}, after) and not (caller.is_again and job.status not in ENDED):
            being = "is being paused" if job.wanted == "pause" else f"is not paused, but {job.status}"
            raise already(f"The job {being}.")
        session.flush()
        session.refresh(job)
    service.queue.wake()
    return job
