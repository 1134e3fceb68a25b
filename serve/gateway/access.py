"""Who may ask: the key of a request, or nobody's where none is needed.

Without any key the gateway answers only on loopback, and there only requests that name this machine as their host: a
web page elsewhere must not reach it through a browser's back door (DNS rebinding).
"""

from starlette.datastructures import Headers
from starlette.types import Scope

from loraport.serve.gateway.keys import OWNER, PREFIX, Key, Ring
from loraport.serve.gateway.refusals import Refusal
from loraport.serve.gateway.settings import GatewaySettings, is_loopback

ANYONE = Key("-", "", 0.0)
FORWARDED = ("forwarded", "x-forwarded-for", "x-real-ip")


def tenant_of(key: Key) -> str:
    """Whose files, jobs and models a key acts on: those of its name; the owner's at this machine are nobody's."""
    return ANYONE.name if key.name == OWNER else key.name


def given_key(headers: Headers) -> str | None:
    """The key in `Authorization: Bearer` or `x-api-key`."""
    scheme, _, text = headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer" and text.strip():
        return text.strip()
    return headers.get("x-api-key", "").strip() or None


def authenticate(scope: Scope, ring: Ring, settings: GatewaySettings) -> Key:
    """The key of a request; Refusal 401 or 403 without a good one."""
    headers = Headers(scope=scope)
    text = given_key(headers)
    ring.refresh()
    key = ring.find(text) if text else None
    if key is None and not ring.asks:
        return anyone(headers, settings)
    if key is None:
        if text and not text.startswith(PREFIX):
            raise unauthorized("invalid_api_key", "The API key is none of this endpoint's, which begin with lp-.")
        if text:
            raise unauthorized("invalid_api_key", "The API key is not known, has expired or was revoked.")
        raise unauthorized("missing_api_key", "The API key is missing: send it as `Authorization: Bearer lp-…`.")
    return key


def anyone(headers: Headers, settings: GatewaySettings) -> Key:
    """Nobody's key, which may do everything but administer; only on loopback."""
    if not settings.is_loopback:
        message = "This endpoint is open to the network and has no API keys yet: `loraport keys create NAME` makes one."
        raise unauthorized("no_keys", message)
    if any(name in headers for name in FORWARDED):
        message = "Without API keys only programs of this machine are answered, and this request came through a proxy."
        raise Refusal(403, "proxied", message)
    host = headers.get("host", "")
    name = host if host.endswith("]") or (host.count(":") > 1 and "]" not in host) else host.rpartition(":")[0] or host
    if not is_loopback(name):
        message = "Without API keys only requests to localhost are answered; make a key to be reached by other names."
        raise Refusal(403, "wrong_host", message)
    return ANYONE


def unauthorized(code: str, message: str) -> Refusal:
    """401."""
    return Refusal(401, code, message, headers={"WWW-Authenticate": "Bearer"})


def require_admin(scope: Scope, ring: Ring, settings: GatewaySettings) -> Key:
    """The admin key of a request; Refusal 401 or 403 without one, on loopback too."""
    key = authenticate(scope, ring, settings)
    if not key.is_admin:
        raise Refusal(403, "admin_only", "This needs an admin key.")
    return key


def may_see_metrics(scope: Scope, ring: Ring, settings: GatewaySettings) -> bool:
    """Pass for a program of this machine and for an admin key; Refusal otherwise. A proxy's client is not local.

    True where the figures of each key may be seen too: with an admin key, or where there are no keys.
    """
    headers = Headers(scope=scope)
    client = scope.get("client")
    if client and is_loopback(client[0]) and not any(name in headers for name in FORWARDED):
        host = headers.get("host", "")
        if is_loopback(host.rpartition(":")[0] or host):
            ring.refresh()
            key = ring.find(text) if (text := given_key(headers)) else None
            return not ring.asks or (key is not None and key.is_admin)
    require_admin(scope, ring, settings)
    return True
