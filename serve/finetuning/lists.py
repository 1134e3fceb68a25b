"""Rows that a caller may see, and pages of them as OpenAI's clients read them.

A row of another tenant is looked for like any other and found as little as one that never was: same query, same words.

    >>> with service.store.read() as session:
    ...     job = one(session, Job, caller, "job", "ftjob-3f…")
"""

from typing import Annotated, Any, TypeVar

from fastapi import Query
from sqlalchemy import Select, select, text
from sqlalchemy.orm import Session

from loraport.serve.finetuning.guard import Caller, nothing
from loraport.serve.finetuning.shapes import Page
from loraport.serve.gateway.refusals import Refusal
from loraport.serve.store.changes import Row, page
from loraport.serve.store.tables import File, Job, Upload, Webhook

Owned = TypeVar("Owned", File, Upload, Job, Webhook)
After = Annotated[str | None, Query(max_length=200, description="Id of the last item of the page before.")]
Limit = Annotated[int, Query(ge=1, le=1000, description="Most items of a page.")]


def mine(kind: type[Owned], caller: Caller) -> Select[Owned]:
    """Rows of a kind that a caller may see."""
    asked = select(kind)
    return asked if caller.is_admin else asked.where(kind.tenant == caller.tenant)


def one(session: Session, kind: type[Owned], caller: Caller, name: str, id: str) -> Owned:
    """The row of an id; Refusal 404, `name` being what it is called."""
    found = session.scalars(mine(kind, caller).where(kind.id == id)).first()
    if found is None:
        raise nothing(name, id)
    return found


def rows_after(
    session: Session, kind: type[Row], whole: Select[Any], after: str | None, limit: int, is_newest_first: bool = True
) -> Select[Any]:
    """`whole`, from the row after the id `after` on. Refusal 404 for an id that is none of `whole`.

    What is filtered out of a list, such as a deleted file, may stand there all the same: a client that deletes while it
    reads goes on where it was.
    """
    if after is None:
        return whole
    column = kind.__table__.c.id
    last = session.execute(whole.with_only_columns(kind.seq).where(column == after)).scalar()
    if last is None:
        raise Refusal(404, "invalid_cursor", "There is no item of that id in this list.", param="after")
    return whole.where(kind.seq < last if is_newest_first else kind.seq > last)


def listing(
    session: Session, kind: type[Row], asked: Select[Any], limit: int, shape: Any, is_newest_first: bool = True
) -> Page[Any]:
    """A page of rows in their shape; `asked` begins after the page before."""
    rows, has_more = page(session, kind, asked, None, limit, is_newest_first)
    data = [shape.of(row) for row in rows]
    first, last = (data[0].id, data[-1].id) if data else (None, None)
    made: Page[Any] = Page[shape](data=data, first_id=first, last_id=last, has_more=has_more)
    return made


def alone(session: Session, name: str) -> None:
    """Let nobody else with that name get beyond this line until the transaction ends, so that counts stay true.

    On SQLite a transaction that writes is alone anyway.
    """
    if session.get_bind().dialect.name == "postgresql":
        session.execute(text("SELECT pg_advisory_xact_lock(hashtext(:name))"), {"name": f"loraport {name}"})
