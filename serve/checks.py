"""All that can be checked before the engine is started, in a second or two: port, adapters, base, names, disk.

Each check raises the error that says what is wrong; none changes anything.
"""

import contextlib
import os
import shlex
import socket
from pathlib import Path

import psutil

from loraport.clients.endpoint import is_alive, read_records
from loraport.clients.errors import AdapterError, BaseModelError, ResourceError, UsageError
from loraport.clients.home import Home
from loraport.clients.terminal import say
from loraport.serve.adapters.catalog import ALIASES, Aliases, Catalog, locate, open_reference
from loraport.serve.engine import versions
from loraport.serve.engine.leftovers import read_traces
from loraport.serve.gateway.keys import read as read_keys
from loraport.serve.gateway.models import INTERNAL
from loraport.serve.gateway.settings import is_loopback
from loraport.train.adapters import Adapter
from loraport.train.base_model import Base, identify, resolve
from loraport.train.manifest import BaseIdentity

BASE_ALIAS = "base"
CACHE_BYTES = 64 << 20  # logs, and what vLLM remembers of a model; a GPU's compiled graphs are larger
GPU_CACHE_BYTES = 1 << 30
IDENTITY_PARTS = {
    "config_sha256": "its config.json",
    "tokenizer_sha256": "its tokenizer",
    "chat_template_sha256": "its chat template",
    "weights_sha256": "its weights",
}


def split_command(text: str | None) -> tuple[str, ...] | None:
    """The words of --engine-command; None where it is not given; UsageError where a shell could not read it."""
    if text is None:
        return None
    example = "for example --engine-command '/opt/vllm/bin/python -m vllm.entrypoints.openai.api_server'"
    try:
        words = tuple(shlex.split(text))
    except ValueError as error:
        raise UsageError(f"--engine-command {text} cannot be read: {str(error).lower()}.", example) from error
    if not words:
        raise UsageError("--engine-command is blank.", example)
    return words


def open_to_others(host: str, home: Home) -> tuple[str, ...]:
    """Warnings about keys. UsageError where others could reach the endpoint and there is none."""
    ignored = ("warning: VLLM_API_KEY is ignored: keys are made with `loraport keys create NAME`.",)
    warnings = ignored if os.environ.get("VLLM_API_KEY") else ()
    if not is_loopback(host) and not any(key.is_living() for key in read_keys(home.keys)):
        raise UsageError(
            f"--host {host} can be reached by others, and there is no API key yet.",
            "make one, which is shown once: loraport keys create NAME",
        )
    return warnings


def check_port(host: str, port: int, home: Home) -> None:
    """ResourceError that names the process which holds the port, unless it is free."""
    trace = next((each for each in read_traces(home) if each.port == port and is_alive(each.owner)), None)
    if trace:  # of another address too: files of this home go by the port
        raise ResourceError(
            f"port {port} is in use by process {trace.owner[0]} (loraport serve).", "stop it, or choose another: --port"
        )
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the engine does: TIME_WAIT is no holder
            probe.bind((host, port))
            return
    except (OSError, OverflowError) as error:
        holder = name_holder(port, home) if isinstance(error, OSError) else None
        reason = f"is in use by {holder}" if holder else f"cannot be used on {host}: {error}"
        free = find_free_port(host, family)
        raise ResourceError(
            f"port {port} {reason}.", f"stop it, or choose another port: --port {free}" if free else "check --host"
        ) from error


def name_holder(port: int, home: Home) -> str | None:
    """Who listens on a port: `process 4711 (vllm)`; None when nobody does."""
    for record in read_records(home):
        if record.port == port and is_alive(record.process):
            return f"process {record.process[0]} (loraport serve)"
    listening = False
    with contextlib.suppress(psutil.Error, OSError):
        for connection in psutil.net_connections("tcp"):
            if connection.status == psutil.CONN_LISTEN and connection.laddr and connection.laddr.port == port:
                listening = True
                if connection.pid:
                    return f"process {connection.pid} ({psutil.Process(connection.pid).name()})"
    return "a process of another user" if listening else None


def find_free_port(host: str, family: int) -> int | None:
    """A port that is free now."""
    with contextlib.suppress(OSError), socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])
    return None


def open_adapters(
    home: Home, references: list[str], version: versions.Version, model: str | None = None
) -> list[Adapter]:
    """The adapters, known to be whole and servable, each name once.

    One that PEFT saved elsewhere is opened for `model`, by default for the base that it names. A name alone means its
    newest version, unless that was served and given up for another: a restart must not undo a rollback.
    """
    adapters: dict[str, Adapter] = {}
    for reference in references:
        aliases = rolled_back(home, reference)
        adapter = open_reference(home, f"{reference}:latest" if aliases else reference, version, model)
        name = adapter.manifest.name
        if name.startswith(INTERNAL):
            raise UsageError(
                f"{name} is what a fine-tuning job has trained: clients know it by its `ft:` name alone.",
                f"the endpoint that trained it serves it anyway; to serve it elsewhere, name it: NAME={adapter.folder}",
            )
        if aliases and aliases.prev:
            newest = aliases.prev.version
            say(f"{name}: {adapter.manifest.version}, which took over from {newest}; {name}@{newest} serves that one.")
        if name in adapters:
            raise UsageError(f"two of the adapters are called {name}.", "serve one version of an adapter at a time")
        adapters[name] = adapter
    return list(adapters.values())


def rolled_back(home: Home, reference: str) -> Aliases | None:
    """The aliases of a name whose newest version was served, and another took over from it last; None of all else."""
    if not (home.adapters / reference / ALIASES).is_file():
        return None
    aliases = Catalog(home).aliases(reference)
    is_so = aliases.latest and aliases.prev and Path(aliases.prev.folder) == locate(home, reference)[0]
    return aliases if is_so else None


def find_base(model: str | None, adapters: list[Adapter]) -> Base:
    """The base to serve: as given, else that of the first adapter, where it was or from the hub.

    AdapterError when the one that is found is not the one that the adapters were trained on.
    """
    if model is None and not adapters:
        raise UsageError(
            "nothing to serve.", "name an adapter, or a base with --model; `loraport adapters list` shows them"
        )
    base = resolve(model) if model else find_recorded_base(adapters[0])
    for adapter in adapters:
        check_base(base, adapter)
    return base


def find_recorded_base(adapter: Adapter) -> Base:
    """The base that the manifest names: its folder, if it is there and still the same, else its name on the hub."""
    recorded = adapter.manifest.base
    here = Path(recorded.path).is_dir()
    is_hub_id = recorded.revision is not None
    if here:
        base = resolve(recorded.path)
        if not is_hub_id or not differences(identify(base), recorded):
            return Base(recorded.model, base.folder, recorded.revision)
    if is_hub_id:
        return resolve(recorded.model, recorded.revision)
    raise BaseModelError(
        f"the base of adapter {adapter.manifest.name} is gone: there is no folder {recorded.path}.",
        "say where it is now: --model FOLDER",
    )


def differences(found: BaseIdentity, recorded: BaseIdentity) -> list[str]:
    """Parts in which two bases differ, in words."""
    return [words for part, words in IDENTITY_PARTS.items() if getattr(found, part) != getattr(recorded, part)]


def check_base(base: Base, adapter: Adapter) -> None:
    """AdapterError that says what differs, unless `adapter` was trained on `base`."""
    found = differences(identify(base), adapter.manifest.base)
    if found:
        verb = "differs" if len(found) == 1 and not found[0].endswith("weights") else "differ"
        raise AdapterError(
            f"the adapter {adapter.manifest.name} was trained on another base than {base.folder}: "
            f"{' and '.join(found)} {verb}.",
            f"it was trained on {adapter.manifest.base.model}: give that with --model, or train it again on this one",
        )


def name_base(base: Base, adapters: list[Adapter]) -> tuple[str, ...]:
    """Names that the base answers to: `base`, its hub id if it has one, its short name; without those of adapters."""
    hub_id = (base.model,) if base.revision else ()
    names = tuple(dict.fromkeys((BASE_ALIAS, *hub_id, base.short_name)))
    taken = {adapter.manifest.name for adapter in adapters}
    if BASE_ALIAS in taken:
        raise UsageError("an adapter cannot be called `base`: that is the base model's name.", "rename the adapter")
    return tuple(name for name in names if name not in taken)


def check_golden_fit(adapters: list[Adapter], context: int) -> None:
    """UsageError when a golden prompt and its reply do not fit the context, and so could not be replayed."""
    for adapter in adapters:
        sizes = [len(golden.prompt_tokens) + len(golden.adapter.tokens) + 1 for golden in adapter.manifest.golden]
        if sizes and max(sizes) > context:
            raise UsageError(
                f"a context of {context:,} tokens is too short to verify {adapter.manifest.name}, "
                f"whose recorded replies need {max(sizes):,}.",
                f"use --context {max(sizes)} or more",
            )
