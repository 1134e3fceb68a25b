"""One version of an adapter on its way into service: checked against endpoint and base, then proven on the engine.

Nothing here loads, switches or remembers: live.py does.

    >>> prove(client, adapter, base, "base", "bfloat16").verified.state
    'verified'
"""

from collections.abc import Collection
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import httpx

from loraport.clients.errors import LoraportError, ResourceError, UsageError
from loraport.serve import checks
from loraport.serve.adapters import accept
from loraport.serve.adapters.catalog import engine_name, entry_of
from loraport.serve.adapters.foreign import ForeignAdapter
from loraport.serve.engine import sampling
from loraport.serve.gateway.state import Model
from loraport.serve.plan.settings import Plan
from loraport.serve.proof import prompts
from loraport.serve.proof.applied import witness
from loraport.serve.proof.tolerance import tolerance_for
from loraport.serve.proof.verify import Verified, verify
from loraport.train.adapters import Adapter
from loraport.train.base_model import Base, chat_template
from loraport.train.manifest import Manifest


@dataclass(frozen=True)
class Loaded:
    """A version that the engine holds and that was proven. `manifest` is named as the engine calls it."""

    adapter: Adapter
    manifest: Manifest
    verified: Verified
    warnings: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """What users ask for."""
        return self.adapter.manifest.name

    @property
    def engine_name(self) -> str:
        """What the engine is asked for."""
        return self.manifest.name


@dataclass(frozen=True)
class Served:
    """An adapter that users may ask for: its version, and the one before while that is still there."""

    latest: Loaded
    prev: Loaded | None = None


@dataclass(frozen=True)
class Restored:
    """How it went with one adapter after a start: `loaded`, or the reason why it is not served."""

    adapter: Adapter
    loaded: Loaded | None = None
    error: LoraportError | None = None


def check_endpoint(adapter: Adapter, plan: Plan, taken: Collection[str]) -> None:
    """UsageError where the name is one of `taken`; ResourceError where the engine's slots cannot hold the rank."""
    name = adapter.manifest.name
    if name in taken:
        raise UsageError(f"{name} is a name of the base.", "give the adapter another: --name NAME")
    needed = accept.needed_rank(accept.read_peft_config(adapter.folder))
    if not plan.slots:
        raise ResourceError(
            "this endpoint was started without room for adapters.",
            f"start it again with {name} among its adapters, or with --max-lora-rank {needed}",
        )
    if needed > plan.rank:
        raise ResourceError(
            f"{name} has rank {adapter.manifest.rank}, and the slots of this endpoint hold {plan.rank}.",
            f"start it again with {name} among its adapters, or with --max-lora-rank {needed}",
        )


def check_fit(adapter: Adapter, base: Base, context: int, targets: Collection[str]) -> None:
    """AdapterError where it is of another base or changes nothing; UsageError where the context rules it out."""
    if isinstance(adapter, ForeignAdapter):
        accept.check_changes(adapter.folder, adapter.manifest.name)
    else:
        checks.check_base(base, adapter)
    accept.check_fits(adapter.folder, adapter.manifest.name, base, targets)
    checks.check_golden_fit([adapter], context)


def prove(client: httpx.Client, adapter: Adapter, base: Base, base_name: str, dtype: str) -> Loaded:
    """Prompts compared and golden replies replayed; of an adapter without any: that it is applied at all."""
    manifest = adapter.manifest.model_copy(update={"name": engine_name(adapter)})
    if manifest.golden:
        warning = prompts.check(client, manifest, prompts.is_dated(chat_template(base)))
        verified = verify(client, manifest, dtype)
        return Loaded(adapter, manifest, verified, (warning,) if warning else ())
    seen = witness(client, base_name, manifest.name)
    verified = Verified(manifest.name, 0, 0, 0.0, tolerance_for(manifest, dtype))
    return Loaded(adapter, manifest.model_copy(update={"golden": seen}), verified)


def models_of(served: Served, base_name: str, context: int, ends: Collection[int]) -> list[Model]:
    """The models of one adapter as the gateway knows them: its version, and the one before under its own name.

    `ends`: tokens on which the engine stops for all models.
    """
    name = served.latest.name
    models = [model_of(served.latest, name, (f"{name}:latest", served.latest.engine_name), base_name, context, ends)]
    if served.prev:
        models.append(model_of(served.prev, served.prev.engine_name, (f"{name}:prev",), base_name, context, ends))
    return models


def model_of(
    loaded: Loaded, id: str, aliases: tuple[str, ...], base_name: str, context: int, ends: Collection[int]
) -> Model:
    """One version under one name, with what the gateway adds to requests for it."""
    manifest = loaded.adapter.manifest
    return Model(
        id=id,
        kind="adapter",
        root=loaded.engine_name,
        parent=base_name,
        version=manifest.version,
        max_model_len=context,
        verified=loaded.verified.state == "verified",
        aliases=aliases,
        engine_name=loaded.engine_name,
        created=created_at(manifest),
        defaults=sampling.model_defaults(manifest, ends),
    )


def describe(served: Served, prev: str | None) -> dict[str, Any]:
    """An adapter that is served, as JSON types; `prev`: the version to which a rollback leads."""
    proof = served.latest.verified
    return describe_adapter(served.latest.adapter) | {
        "state": proof.state,
        "reason": None,
        "prompts": proof.prompts,
        "telling": proof.telling,
        "difference": proof.difference,
        "prev": prev,
        "is_prev_loaded": served.prev is not None,
        "warnings": list(served.latest.warnings),
    }


def describe_failed(adapter: Adapter, reason: str) -> dict[str, Any]:
    """An adapter that is registered and not served, with the reason."""
    return describe_adapter(adapter) | {"state": "failed", "reason": reason}


def describe_adapter(adapter: Adapter) -> dict[str, Any]:
    """What is known of an adapter without an engine."""
    entry = entry_of(adapter)
    return {
        "name": entry.name,
        "version": entry.version,
        "folder": entry.folder,
        "rank": adapter.manifest.rank,
        "base": adapter.manifest.base.model,
        "is_foreign": isinstance(adapter, ForeignAdapter),
    }


def created_at(manifest: Manifest) -> int:
    """Seconds since the epoch; 0 where the manifest's time is no time."""
    try:
        return int(datetime.fromisoformat(manifest.created).timestamp())
    except ValueError:
        return 0
