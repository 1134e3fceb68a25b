"""The models as clients see them: listed with context, version and verification, and found by name or alias.

A key sees and uses its own models only; another's is answered as one that does not exist.
"""

import re
import time
from typing import Any

from loraport.serve.gateway.keys import Key
from loraport.serve.gateway.refusals import Refusal
from loraport.serve.gateway.state import Model, Snapshot, closest

VERSION = re.compile(r"[@:][^@:]*$")


def is_allowed(key: Key, model: Model) -> bool:
    """Whether a key may use a model: by its id, an alias, or the name of which it is a version (`demo` of `demo@3`)."""
    names = (model.id, *model.aliases)
    stems = [VERSION.sub("", name) for name in names] if model.kind == "adapter" else []
    return key.may_use(*names, *stems)


def card(model: Model) -> dict[str, Any]:
    """A model as GET /v1/models shows it: OpenAI's fields, vLLM's, and ours."""
    return {
        "id": model.id,
        "object": "model",
        "created": model.created or int(time.time()),
        "owned_by": "loraport",
        "root": model.root or model.id,
        "parent": model.parent,
        "max_model_len": model.max_model_len,
        "kind": model.kind,
        "version": model.version,
        "verified": model.verified,
        "aliases": list(model.aliases),
    }


def listing(engine: Snapshot, key: Key) -> dict[str, Any]:
    """What GET /v1/models answers."""
    return {"object": "list", "data": [card(model) for model in engine.models if is_allowed(key, model)]}


def resolve(engine: Snapshot, key: Key, name: str) -> Model:
    """The model of that name; Refusal 404 with the names there are, the closest first."""
    model = engine.find(name)
    if model is not None and is_allowed(key, model):
        return model
    mine = [known for known in engine.models if is_allowed(key, known)]
    names = [known.id for known in mine]
    near = closest(name, [*names, *(alias for known in mine for alias in known.aliases)])
    meant = f" Did you mean {near}?" if near else ""
    there = f" There {'is' if len(names) == 1 else 'are'}: {', '.join(names)}." if names else " This key has no model."
    shown = name if len(name) <= 100 else name[:100] + "…"
    raise Refusal(404, "model_not_found", f"There is no model {shown!r}.{meant}{there}", param="model", models=names)
