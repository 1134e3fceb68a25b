"""What we tell of a job beyond OpenAI's API, to its owner: all that its trainer said, and what it costs.

GET /v1/fine_tuning/jobs/{id}/log?after=2000    plain text from that byte on; who follows it goes on at `x-log-end`,
                                                for places of this machine are left out of the text
GET /v1/fine_tuning/jobs/{id}/cost              GPU-hours spent and estimated, and their cost where a price is set

$ curl "$URL/fine_tuning/jobs/$JOB/cost"
{"object": "fine_tuning.job.cost", "gpu_hours": 1.5, "estimated_gpu_hours": 2.0, "cost": 3.75, …}
"""

import time
from pathlib import Path
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query
from pydantic import BaseModel
from sqlalchemy import select
from starlette.responses import Response

from loraport.clients.errors import os_errors
from loraport.clients.home import Home
from loraport.serve.finetuning.guard import Asking, Guarded
from loraport.serve.finetuning.lists import one
from loraport.serve.jobs.figures import cost_of
from loraport.serve.jobs.recipe import job_folder
from loraport.serve.runners.seams import LOG
from loraport.serve.store.tables import Job, Lease

MOST_BYTES = 1 << 20  # of one answer; more comes with the next


class Cost(BaseModel):
    """What a job has used and will; costs in the currency of the endpoint's price, null where it has none."""

    object: Literal["fine_tuning.job.cost"] = "fine_tuning.job.cost"
    gpu_hours: float
    estimated_gpu_hours: float | None = None
    cost: float | None = None
    estimated_cost: float | None = None


def routes(find: Any) -> APIRouter:
    """The routes; `find` gives the service."""
    router = APIRouter(prefix="/fine_tuning/jobs", route_class=Guarded)

    @router.get("/{job_id}/log", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
    def show_log(job_id: str, caller: Asking, after: Annotated[int, Query(ge=0, lt=1 << 62)] = 0) -> Response:
        service = find()
        with service.store.read() as session:
            job = one(session, Job, caller, "fine-tuning job", job_id)
        said = read(job_folder(service.home, job.id) / LOG, after)
        headers = {"x-log-end": str(after + len(said))}
        return Response(without_places(said, service.home), media_type="text/plain; charset=utf-8", headers=headers)

    @router.get("/{job_id}/cost", response_model=Cost)
    def show_cost(job_id: str, caller: Asking) -> Cost:
        service = find()
        with service.store.read() as session:
            job = one(session, Job, caller, "fine-tuning job", job_id)
            began = session.scalars(select(Lease.created_at).where(Lease.holder == job.id).limit(1)).first()
        return Cost.model_validate(cost_of(job, service.gpu_price, time.time(), began))

    return router


def without_places(said: bytes, home: Home) -> bytes:
    """The same without the names of folders that are nobody's business: the endpoint's home, and its user's."""
    found = {home.root: "$LORAPORT_HOME", home.root.resolve(): "$LORAPORT_HOME", Path.home(): "~"}
    for place in sorted(found, key=lambda place: len(str(place)), reverse=True):
        if place != Path(place.anchor):
            said = said.replace(bytes(place), found[place].encode())
    return said


def read(path: Path, after: int) -> bytes:
    """The log from a byte on, in whole lines where it has any; nothing of one that is not there yet."""
    with os_errors("reading", path):
        try:
            with path.open("rb") as file:
                file.seek(after)
                said = file.read(MOST_BYTES)
        except FileNotFoundError:
            return b""
    end = said.rfind(b"\n") + 1
    return said[:end] if end else said
