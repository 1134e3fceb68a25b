"""Requests that are sent again, because their answer was lost: they get what the first one made.

OpenAI's clients repeat a request after a lost connection, 408, 409, 429 and 5xx, without an idempotency key, but with
`x-stainless-retry-count` above 0: then the same body of the same tenant within a quarter of an hour is the same
request, unless it was refused before, or its client has heard of what the earlier one made (guard.Answers). Others send
`Idempotency-Key`, which says so by itself, for a day.

    >>> made = sent_before(session, Job, caller, fingerprint(caller, body))
"""

import hashlib
import time
from typing import TypeVar

from sqlalchemy import select
from sqlalchemy.orm import Session

from loraport.serve.finetuning.guard import AGAIN_S, Caller
from loraport.serve.gateway.refusals import bad_request
from loraport.serve.store.tables import File, Job, Upload

Made = TypeVar("Made", File, Upload, Job)
KEYED_S = 24 * 60 * 60.0
MOST_ALIKE = 100  # equal requests of one tenant that are looked at, the newest
HALF = 32  # hexadecimal digits of the key's hash, and of the body's


def fingerprint(caller: Caller, body: bytes) -> str:
    """What tells a request: the hash of its body, after that of its key where it has one."""
    whole = hashlib.sha256(body).hexdigest()
    if caller.idempotency_key is None:
        return whole
    return hashlib.sha256(caller.idempotency_key.encode()).hexdigest()[:HALF] + whole[:HALF]


def sent_before(session: Session, kind: type[Made], caller: Caller, found: str) -> Made | None:
    """What the same request has made before; None where it is a new one. Refusal 400 for a key of another request."""
    asked = select(kind).where(kind.tenant == caller.tenant).order_by(kind.seq.desc())
    if caller.idempotency_key is not None:
        key = found[:HALF]
        asked = asked.where(kind.request_sha256 >= key, kind.request_sha256 < f"{key}g")  # g is after the last digit
        made = session.scalars(asked.where(kind.created_at > time.time() - KEYED_S)).first()
        if made is not None and made.request_sha256 != found:
            raise bad_request(
                "idempotency_key_reused", "That Idempotency-Key belongs to another request.", "Idempotency-Key"
            )
        return made
    if not caller.is_again:
        return None
    asked = asked.where(kind.request_sha256 == found, kind.created_at > time.time() - AGAIN_S).limit(MOST_ALIKE)
    return next((made for made in session.scalars(asked) if made.id not in caller.answers.heard), None)
