"""The models as clients see them: listed with context, version and verification, and found by name or alias.

A key sees and uses its own models only; another's is answered as one that does not exist. What was fine-tuned here is
known by its public name alone (tuned.py): as an adapter of the engine it is nobody's.
"""

import re
import time
from collections.abc import Sequence
from typing import Any

from loraport.serve.gateway.keys import Key
from loraport.serve.gateway.refusals import Refusal
from loraport.serve.gateway.state import Model, Snapshot, closest

VERSION = re.compile(r"[@:][^@:]*$")
INTERNAL = "ftjob-"  # adapters of fine-tuning jobs are called by the job


def is_allowed(key: Key, model: Model) -> bool:
    """Whether a key may use a model: by its id, an alias, or the name of which it is a version (`demo` of `demo@3`)."""
    if model.id.startswith(INTERNAL):
        return False
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
    return {"object": "list", "data": [card(model) for model in mine_of(engine, key)]}


def resolve(engine: Snapshot, key: Key, name: str) -> Model:
    """The model of that name; Refusal 404 with the names there are, the closest first."""
    model = engine.find(name)
    if model is not None and is_allowed(key, model):
        return model
    raise unknown(name, names(engine, key), [alias for known in mine_of(engine, key) for alias in known.aliases])


def mine_of(engine: Snapshot, key: Key) -> list[Model]:
    """The models that a key may use."""
    return [known for known in engine.models if is_allowed(key, known)]


def names(engine: Snapshot, key: Key) -> list[str]:
    """Their names, without aliases."""
    return [known.id for known in mine_of(engine, key)]


def unknown(name: str, names: list[str], aliases: Sequence[str] = ()) -> Refusal:
    """404 with the names that the key may use, the one that is like it first."""
    near = closest(name, [*names, *aliases])
    meant = f" Did you mean {near}?" if near else ""
    there = f" There {'is' if len(names) == 1 else 'are'}: {', '.join(names)}." if names else " This key has no model."
    shown = name if len(name) <= 100 else name[:100] + "…"
    return Refusal(404, "model_not_found", f"There is no model {shown!r}.{meant}{there}", param="model", models=names)
