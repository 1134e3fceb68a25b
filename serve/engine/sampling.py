"""What a client gets that sets nothing: temperature and the like, stop tokens, and the chat template's switches.

vLLM takes temperature, top_p, top_k, min_p, the penalties and max_new_tokens from one generation_config.json, for all
models of the server alike (vllm/config/model.py, `get_diff_sampling_param`), and the tokens to stop on. So the engine
gets the base's own file, with what is missing in it. What a single adapter needs beside that, the gateway adds to
requests for it, where these do not say it themselves (gateway/body.py, `fill_defaults`).

An adapter brings no temperature of its own: no training measures one, and what was learned sharply is sharp at any.

    >>> engine_config(base, manifests)
    {'eos_token_id': [0, 2], 'temperature': 0.7, 'top_p': 0.95, 'do_sample': True}
"""

from collections.abc import Collection, Iterable, Sequence
from typing import Any

from loraport.serve.plan.settings import Choice
from loraport.train.base_model import Base, read_json
from loraport.train.manifest import Manifest

SAMPLING = ("temperature", "top_p", "top_k", "min_p")
PENALTIES = ("repetition_penalty", "presence_penalty", "frequency_penalty")
# Of a base that was published without. vLLM would sample at temperature 1 from the whole vocabulary: a small or freshly
# tuned model picks a token from the tail now and then and does not find its way back; greedy replies run in circles.
# What publishers of chat models recommend, where they do, lies around this: Llama 3 0.6 and 0.9, Qwen 2.5 0.7 and 0.8,
# Qwen3 and R1 0.6 and 0.95. A matter of judgement, not measured here.
USUAL = {"temperature": 0.7, "top_p": 0.95}
# With a file of ours, vLLM cuts every reply there, also where a client asks for more
# (entrypoints/openai/chat_completion/serving.py, `override_max_tokens`).
DROPPED = ("max_new_tokens", "max_length", "transformers_version")


def published_config(base: Base) -> dict[str, Any]:
    """The base's own generation_config.json; empty where it has none."""
    path = base.folder / "generation_config.json"
    return read_json(path) if path.is_file() else {}


def end_tokens(config: dict[str, Any]) -> set[int]:
    """Tokens on which generation stops, of a generation_config.json."""
    known = config.get("eos_token_id")
    return {known} if isinstance(known, int) else set(known or ())


def samples(config: dict[str, Any]) -> dict[str, Any]:
    """What a generation_config.json says of sampling, as vLLM reads it: whatever `do_sample` says."""
    return {name: config[name] for name in (*SAMPLING, *PENALTIES) if config.get(name) is not None}


def engine_config(base: Base, manifests: Iterable[Manifest]) -> dict[str, Any] | None:
    """The generation_config.json for the engine; None where the base's own will do.

    Stop tokens: a base that was never made for chat lacks the end of turn, and its adapter would never stop.
    """
    published = published_config(base)
    ends = end_tokens(published)
    wanted = ends | {token for manifest in manifests for token in manifest.stop_tokens}
    is_told = any(published.get(name) is not None for name in SAMPLING)
    if wanted == ends and is_told and "max_new_tokens" not in published:
        return None
    kept = {name: value for name, value in published.items() if name not in DROPPED}
    more = {} if is_told else USUAL | {"do_sample": True}
    return kept | ({"eos_token_id": sorted(wanted)} if wanted else {}) | more


def engine_ends(base: Base, manifests: Iterable[Manifest]) -> frozenset[int]:
    """Tokens on which an engine stops that was started for these adapters."""
    return frozenset(end_tokens(engine_config(base, manifests) or published_config(base)))


def model_defaults(manifest: Manifest, ends: Collection[int]) -> dict[str, Any]:
    """Fields that requests for an adapter get where they do not name them. `ends`: see `engine_ends`.

    The template's switches as in training, so that the base keeps its own; and stop tokens that the engine does not
    know, of an adapter that was loaded later.
    """
    missing = sorted(set(manifest.stop_tokens) - set(ends))
    switches = {"chat_template_kwargs": dict(manifest.chat_template_kwargs)} if manifest.chat_template_kwargs else {}
    return switches | ({"stop_token_ids": missing} if missing else {})


def choices(base: Base, manifests: Sequence[Manifest]) -> list[Choice]:
    """Sampling and stop tokens in words, for the plan."""
    published = published_config(base)
    said = samples(engine_config(base, manifests) or published)
    is_told = any(published.get(name) is not None for name in SAMPLING)
    reason = "as published with the base" if is_told else "the base says nothing of it; a request may"
    found = [Choice("sampling", ", ".join(f"{name} {value:g}" for name, value in said.items()), reason)]
    added = {token for manifest in manifests for token in manifest.stop_tokens} - end_tokens(published)
    if added:
        names = ", ".join(map(str, sorted(added)))
        found.append(Choice("stop tokens", names, "the adapters', beside those of the base"))
    return found
