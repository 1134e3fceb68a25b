"""A running endpoint's admin routes, asked from the command line; its refusals become our errors again.

>>> ask(home, None, "POST", "/admin/adapters", {"reference": "demo@v2"})["version"]
'v2'
"""

import os
from contextlib import suppress
from typing import Any

from loraport.clients.endpoint import (
    EndpointRecord,
    endpoint_errors,
    find_base_url,
    find_record,
    is_alive,
    read_records,
)
from loraport.clients.errors import (
    AdapterError,
    EndpointError,
    LoraportError,
    Refused,
    ResourceError,
    UsageError,
    VerificationError,
)
from loraport.clients.home import Home
from loraport.clients.terminal import say

ADMIN_KEY = "LORAPORT_ADMIN_KEY"
CHANGE_S = 1800.0  # a large adapter from a slow disk, then its replies on a slow CPU, behind the requests of users
CONNECT_S = 5.0
GOES_ON = "the endpoint goes on with it; `loraport adapters list` shows what comes of it"
LOOK_S = 5.0
KINDS: dict[str, type[LoraportError]] = {
    "wrong_usage": UsageError,
    "adapter_refused": AdapterError,
    "verification_failed": VerificationError,
    "no_room": ResourceError,
    "engine_unreachable": EndpointError,
}


def ask(home: Home, base_url: str | None, method: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
    """An endpoint's answer to an administrator; the error that it tells of, EndpointError where it says nothing."""
    own = next((record.base_url for record in read_records(home) if is_alive(record.process)), None)
    url = find_base_url(base_url or own, home)
    return send(url, find_record(url, home), method, path, body, CHANGE_S)


def send(
    url: str, record: EndpointRecord | None, method: str, path: str, body: dict[str, Any] | None, wait_s: float
) -> dict[str, Any]:
    """One request; `url` ends in /v1."""
    import httpx

    key = (record.admin_key if record else None) or os.environ.get(ADMIN_KEY, "").strip()
    headers = {"authorization": f"Bearer {key}"} if key else {}
    root, timeout = url.rstrip("/").removesuffix("/v1"), httpx.Timeout(wait_s, connect=CONNECT_S)
    with endpoint_errors(url):
        try:
            answer = httpx.request(method, root + path, json=body, headers=headers, timeout=timeout, trust_env=False)
        except httpx.ReadTimeout as error:
            words = f"{url} is busy: it has not finished within {wait_s:.0f} s."
            raise EndpointError(words, "" if method == "GET" else GOES_ON) from error
        except KeyboardInterrupt:
            if method != "GET":
                say(f"stopped waiting; {GOES_ON}.")
            raise
    try:
        document = answer.json()
    except ValueError:
        document = {}
    if answer.status_code == 200 and isinstance(document, dict):
        return document
    raise refusal(url, answer.status_code, document.get("error") if isinstance(document, dict) else None)


def refusal(url: str, status: int, error: Any) -> LoraportError:
    """The error that an endpoint told of."""
    if not isinstance(error, dict) or not error.get("message"):
        return EndpointError(f"{url} answered {status}.", "is it an endpoint of Loraport? check the URL")
    if status in (401, 403):
        hint = f"set {ADMIN_KEY} to an admin key: `loraport keys create NAME --admin`, where it is served, makes one"
        return EndpointError(f"{url} does not allow it: {error['message']}", hint)
    kind = KINDS.get(str(error.get("code")), Refused)
    return kind(error["message"], error.get("hint") or "", tuple(error.get("details") or ()))


def listings(home: Home) -> list[dict[str, Any]]:
    """The adapters of all endpoints that serve on this machine; of those that do not answer, none."""
    found = []
    for record in read_records(home):
        if is_alive(record.process):
            with suppress(LoraportError):
                document = send(record.base_url, record, "GET", "/admin/adapters", None, LOOK_S)
                found += [entry | {"base_url": record.base_url} for entry in document["adapters"]]
    return found
