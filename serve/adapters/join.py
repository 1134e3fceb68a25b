"""What an engine has to do that joins others which are ready: hold and prove all that they serve.

It loads from the folders, which the others have not read since. A version that nobody can load any more must not keep
each engine out that starts again: a version before is given up by all, and where it is the latest, the adapter is
served no longer, with the reason. A latest version that loads and answers otherwise is the engine's own fault: it does
not join. What is served where no engine is ready is decided in live.py.

    >>> live.connect(client, replica=1)
    >>> with live.lock, live.holders.only(1):
    ...     join(live)
"""

from typing import TYPE_CHECKING

from loraport.clients.errors import AdapterError, ResourceError, VerificationError
from loraport.serve.adapters.catalog import require_unchanged
from loraport.serve.adapters.prove import Loaded, Restored, Served

if TYPE_CHECKING:
    from loraport.serve.adapters.live import Live


def join(live: "Live") -> list[Restored]:
    """Have the one engine that is asked now hold what is served; the adapters with their errors.

    VerificationError, ResourceError, EndpointError: it cannot join, and the others go on as before.
    """
    failed = [result for served in list(live.served.values()) if (result := hold_latest(live, served))]
    for served in list(live.served.values()):
        if served.prev:
            hold_prev(live, served, served.prev)
    live.prove_together([served.latest.manifest for served in live.served.values()])
    live.engine.put(*live.models)  # its context may be the shortest
    return [*(Restored(served.latest.adapter, served.latest) for served in live.served.values()), *failed]


def hold(live: "Live", loaded: Loaded) -> None:
    """Load and prove a version, if it is still the one that the others hold."""
    require_unchanged(loaded.adapter, live.home)
    live.holders.load(loaded.engine_name, loaded.adapter.folder)
    live.prove_alone(loaded.adapter)


def hold_latest(live: "Live", served: Served) -> Restored | None:
    """The version that is asked for; where it cannot be loaded any more nobody may ask for it, which is the result."""
    try:
        hold(live, served.latest)
    except AdapterError as error:
        adapter = served.latest.adapter
        live.drop(served.latest.name)
        live.failed[served.latest.name] = (adapter, error.message)
        return Restored(adapter, error=error)
    return None


def hold_prev(live: "Live", served: Served, prev: Loaded) -> None:
    """The version before; it is given up everywhere where this engine cannot have it, for it may be asked for."""
    try:
        hold(live, prev)
    except (AdapterError, VerificationError, ResourceError):
        live.put(Served(served.latest))
        live.holders.retire(prev.engine_name)
