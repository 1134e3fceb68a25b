"""All that can be checked before the engine is started, in a second or two: port, adapters, base, names, disk.

Each check raises the error that says what is wrong; none changes anything.
"""

import contextlib
import ipaddress
import json
import os
import shlex
import socket
from pathlib import Path
from typing import Any

import psutil

from loraport.clients.endpoint import is_alive, read_records
from loraport.clients.errors import AdapterError, BaseModelError, ResourceError, UsageError
from loraport.clients.home import Home
from loraport.serve.engine import versions
from loraport.train.adapters import CONFIG, Adapter, find_adapter, open_adapter
from loraport.train.base_model import Base, identify, read_json, resolve
from loraport.train.config import VLLM_RANKS
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
# Initialisations of A and B that leave the base's own weights alone. PiSSA, OLoRA, LoftQ and CorDA change them when
# PEFT loads the adapter, which vLLM does not do (vllm/lora/peft_helper.py, `_init_is_supported`; 0.25 does not check).
PLAIN_INITS = ("gaussian", "eva", "orthogonal", "mica", "lora_ga")
# Keys of adapter_config.json that change what the adapter computes and that no supported vLLM implements.
REFUSED_FEATURES = {
    "use_dora": "DoRA",
    "lora_bias": "a LoRA bias",
    "alora_invocation_tokens": "activated LoRA",
    "layer_replication": "layer replication",
    "use_bdlora": "block-diagonal LoRA",
    "use_qalora": "QALoRA",
    "modules_to_save": "whole modules beside LoRA (modules_to_save)",
    "trainable_token_indices": "trained token embeddings (trainable_token_indices)",
    "target_parameters": "LoRA on bare parameters (target_parameters)",
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


def open_to_others(host: str) -> tuple[str, ...]:
    """Warnings about who can use the endpoint. UsageError where an API key is set and would protect nothing."""
    has_key = bool(os.environ.get("VLLM_API_KEY"))
    if is_loopback(host):
        return ("warning: VLLM_API_KEY is ignored: on this machine the endpoint asks for no key.",) if has_key else ()
    if has_key:
        raise UsageError(
            f"VLLM_API_KEY is set, but `loraport serve` asks for no key, so --host {host} would be open to anybody.",
            "serve on 127.0.0.1 behind a proxy that asks for the key, or unset VLLM_API_KEY to serve without one",
        )
    return (f"warning: --host {host}: there is no key, so anybody who reaches the port can use the models.",)


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address; a name that cannot be resolved could be anything."""
    with contextlib.suppress(OSError, ValueError):
        found = {entry[4][0] for entry in socket.getaddrinfo(host, None)} if host else set()
        return bool(found) and all(ipaddress.ip_address(address).is_loopback for address in found)
    return False


def check_port(host: str, port: int, home: Home) -> None:
    """ResourceError that names the process which holds the port, unless it is free."""
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


def open_adapters(home: Home, references: list[str], version: versions.Version) -> list[Adapter]:
    """The adapters, known to be whole and servable, each name once."""
    adapters: dict[str, Adapter] = {}
    for reference in references:
        check_servable(find_adapter(home, reference), version)
        adapter = open_adapter(home, reference)
        name = adapter.manifest.name
        if name in adapters:
            raise UsageError(f"two of the adapters are called {name}.", "serve one version of an adapter at a time")
        adapters[name] = adapter
    return list(adapters.values())


def read_peft_config(folder: Path) -> dict[str, Any]:
    """adapter_config.json as an object; AdapterError otherwise."""
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise AdapterError(f"{folder} has no {CONFIG}.", "the folder is incomplete: train again") from error
    except (OSError, ValueError) as error:
        raise AdapterError(f"{folder / CONFIG} cannot be read: {error}.", "restore it, or train again") from error
    if not isinstance(config, dict):
        raise AdapterError(f"{folder / CONFIG} is not a JSON object.", "restore it, or train again")
    return config


def check_servable(folder: Path, version: versions.Version) -> None:
    """AdapterError for everything in a PEFT configuration that vLLM refuses, or ignores without a word."""
    config = read_peft_config(folder)
    problems = [words for key, words in REFUSED_FEATURES.items() if config.get(key)]
    if config.get("peft_type", "LORA") != "LORA":
        problems = [f"the PEFT type {config['peft_type']}"]
    if config.get("bias", "none") != "none":
        problems.append(f"bias={config['bias']!r}")
    init = config.get("init_lora_weights", True)
    if isinstance(init, str) and init.lower() not in PLAIN_INITS:
        problems.append(f"the initialisation {init}, which changes the base's weights")
    if (config.get("rank_pattern") or config.get("alpha_pattern")) and not versions.honours_patterns(version):
        problems.append(f"a rank or alpha of its own for some modules, which vLLM {version[0]}.{version[1]} ignores")
    if problems:
        raise AdapterError(
            f"the adapter in {folder} uses {' and '.join(problems)}, which vLLM does not serve.",
            "train it as plain LoRA, or merge it into its base with PEFT and serve that",
        )
    check_rank(config, folder)


def check_rank(config: dict[str, Any], folder: Path) -> None:
    """AdapterError unless every rank is one that vLLM can hold."""
    ranks = [config.get("r"), *(config.get("rank_pattern") or {}).values()]
    if not all(isinstance(rank, int) and 0 < rank <= VLLM_RANKS[-1] for rank in ranks):
        raise AdapterError(
            f"the adapter in {folder} has rank {max((r for r in ranks if isinstance(r, int)), default=None)}; "
            f"vLLM takes 1 to {VLLM_RANKS[-1]}.",
            "train it with a lower --rank",
        )


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


def stop_token_config(base: Base, adapters: list[Adapter]) -> dict[str, Any] | None:
    """The base's generation_config.json with the adapters' stop tokens added; None where it has them all.

    vLLM stops on the tokenizer's end token and on those in generation_config.json. A base that was never made for chat
    lacks the end of turn there, and its adapter would never stop.
    """
    path = base.folder / "generation_config.json"
    config = read_json(path) if path.is_file() else {}
    known = config.get("eos_token_id")
    ends = {known} if isinstance(known, int) else set(known or ())
    wanted = {token for adapter in adapters for token in adapter.manifest.stop_tokens}
    return None if wanted <= ends else config | {"eos_token_id": sorted(ends | wanted)}


def check_template_kwargs(adapters: list[Adapter]) -> None:
    """UsageError unless training told the chat template the same for all: the engine has one default for everybody."""
    for adapter in adapters[1:]:
        first, other = adapters[0].manifest, adapter.manifest
        if other.chat_template_kwargs != first.chat_template_kwargs:
            raise UsageError(
                f"{first.name} and {other.name} were trained with different settings of the chat template: "
                f"{json.dumps(first.chat_template_kwargs)} and {json.dumps(other.chat_template_kwargs)}.",
                "serve them in two processes on two ports, or train one of them again",
            )


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
