"""A plan of an engine as one JSON document, and as text for people. The figures come from choose.py."""

from dataclasses import dataclass
from shlex import quote
from typing import Any

from loraport.clients.hardware import Device
from loraport.clients.terminal import console, say
from loraport.serve.plan.flags import vllm_args
from loraport.serve.plan.memory import requests_that_fit
from loraport.serve.plan.on_gpu import DoesNotFit, name_weights
from loraport.serve.plan.settings import Plan
from loraport.serve.plan.shape import GIB, Shape
from loraport.serve.plan.variants import Variant

# part of Memory, or of a CPU's, -> what it is, for people
PARTS = {
    "weights": "weights",
    "lora_slots": "LoRA slots",
    "activations": "activations of the largest batch",
    "graphs_and_libraries": "CUDA graphs, kernels, libraries",
    "workspace": "both engine processes",
    "kv_cache": "KV cache",
    "left_free": "left to others (memory share)",
}
USUAL_AT_ONCE = 4  # requests that the table shares a cache among where no --concurrency says how many


@dataclass(frozen=True)
class Report:
    """What was asked, and what came of it: a plan, or the error with what was tried. `at_once`: as wished, or None."""

    model: str
    shape: Shape
    device: Device
    found: Plan | DoesNotFit
    at_once: int | None
    tensor_parallel: int
    replicas: int
    more: tuple[str, ...] = ()  # flags that depend on the version: those of a CPU's KV cache

    @property
    def plan(self) -> Plan | None:
        """The plan; None where nothing fits."""
        return self.found if isinstance(self.found, Plan) else None

    @property
    def args(self) -> list[str] | None:
        """The flags for vLLM; None where nothing fits."""
        return [*vllm_args(self.plan), *self.more] if self.plan else None

    @property
    def limit(self) -> int:
        """The longest context that is worth a figure."""
        return self.shape.longest or max((each.tokens for each in self.found.variants), default=0)


def as_json(report: Report) -> dict[str, Any]:
    """The document of --json. Sizes in bytes on each GPU; a plan's keys are null where nothing fits.

    `requests_of_full_length` are those of all replicas together; cache, context, memory and flags are those of each.
    """
    made, found = report.plan, report.found
    failed = found if isinstance(found, DoesNotFit) else None
    return {
        "model": report.model,
        "parameters": report.shape.parameters,
        "gpu": {
            "name": report.device.name,
            "kind": report.device.kind,
            "tensor_parallel": report.tensor_parallel,
        },
        "replicas": report.replicas,
        "fits": made is not None,
        "verdict": failed.message if failed else verdict(report),
        "quantization": made and made.quantization,
        "kv_cache_dtype": made and made.kv_cache_dtype,
        "dtype": made and made.dtype,
        "max_model_len": made and made.context,
        "kv_cache_tokens": made and made.kv_tokens,
        "requests_of_full_length": made and full_requests(made) * report.replicas,
        "requests_of_full_length_each": made and full_requests(made),
        "gpu_memory_utilization": made and made.share,
        "max_num_seqs": made and made.requests,
        "max_loras": made and made.slots,
        "max_lora_rank": made and made.rank,
        "memory": made and made.memory,
        "vllm_args": report.args,
        "reasons": {choice.name: choice.reason for choice in made.choices} if made else {},
        "variants": [describe_variant(report, each) for each in found.variants],
        "warnings": list(made.warnings) if made else [],
        "alternatives": list(failed.changes) if failed else [],
    }


def describe_variant(report: Report, variant: Variant) -> dict[str, Any]:
    """A variant for the document. `max_model_len`: the context that one request can have."""
    return {
        "quantization": variant.quantization,
        "kv_cache_dtype": variant.kv_cache_dtype,
        "kv_cache_tokens": variant.tokens,
        "max_model_len": variant.longest,
        "requests": variant.full,
        "context_each": shared(report, variant),
        "holds_the_wish": variant.holds,
        "is_chosen": report.plan is not None and variant == report.plan.chosen,
        "why_not": variant.why_not or None,
        "memory": variant.memory.as_bytes(),
    }


def full_requests(made: Plan) -> int:
    """Requests of full length at once on one replica."""
    return requests_that_fit(made.kv_tokens, made.context)


def shared(report: Report, variant: Variant) -> int:
    """Context of each request where several of a replica share the cache."""
    return min(report.limit, variant.tokens // per_replica(report))


def per_replica(report: Report) -> int:
    """Requests at once on one replica."""
    return -(-(report.at_once or USUAL_AT_ONCE) // report.replicas)


def say_report(report: Report) -> None:
    """The same for people; the verdict last, unless it is an error's to say."""
    made = report.plan
    count = report.tensor_parallel * report.replicas
    is_cpu = report.device.kind == "cpu"
    many = f"{report.replicas} replicas on " if is_cpu and count > 1 else f"{count} x " if count > 1 else ""
    where = f"{many}{report.device.name}"
    size = report.shape.parameters
    counted = f"{size / 1e9:.2f}B" if size >= 10**8 else f"{size / 1e6:.1f}M"
    say(f"{report.model}  {counted} parameters, on {where}", "bold")
    say("")
    if made:
        say_parts(report, made)
        say("")
    if report.found.variants:
        say_variants(report)
        say("")
    if made is None:
        return
    width = max(len(choice.name) for choice in made.choices)
    for choice in made.choices:
        say(f"  {choice.name:{width}}  {choice.value}  ({choice.reason})")
    say("")
    for warning in made.warnings:
        say(warning, "yellow")
    say("flags for vLLM:")
    say(f"  {' '.join(map(quote, report.args or []))}")
    say(verdict(report), "bold green")


def say_parts(report: Report, made: Plan) -> None:
    """The table of parts."""
    from rich.table import Table

    each = "GPU" if report.device.kind == "cuda" else "replica"
    title = f"memory of each {each}" if report.tensor_parallel * report.replicas > 1 else "memory"
    table = Table(title, "GiB", box=None, pad_edge=False)
    table.columns[1].justify = "right"
    for name, size in made.memory.items():
        table.add_row(f"  {PARTS[name]}", f"{size / GIB:.2f}")
    table.add_row("there is" if report.device.kind == "cuda" else "in all", f"{sum(made.memory.values()) / GIB:.2f}")
    console.print(table)


def say_variants(report: Report) -> None:
    """The table of variants; the chosen one is marked."""
    from rich.table import Table

    made = report.plan
    asked = next((each.context for each in report.found.variants if each.context), report.limit)
    context = made.context if made else asked
    numbers = ("tokens", "one request", f"each of {per_replica(report)}", f"requests of {context:,}")
    if report.replicas > 1:
        say(f"each of {report.replicas} replicas:")
    table = Table("  weights", "KV", *numbers, "", box=None, pad_edge=False)
    for column in table.columns[2:6]:
        column.justify = "right"
    table.columns[-1].no_wrap = True
    for each in report.found.variants:
        is_chosen = made is not None and each == made.chosen
        figures = [f"{each.tokens:,}", f"{each.longest:,}", f"{shared(report, each):,}"]
        full = str(requests_that_fit(each.tokens, context)) if context else "0"
        table.add_row(
            f"{'>' if is_chosen else ' '} {name_weights(each.quantization)}",
            "FP8" if each.kv_cache_dtype == "fp8" else "16-bit",
            *([*figures, full, ""] if each.tokens and not each.why_not else [*["-"] * 4, why(each)]),
            style="bold" if is_chosen else "",
        )
    console.print(table)


def why(variant: Variant) -> str:
    """Why a variant has no figures, in a few words."""
    return variant.why_not.rpartition(" need")[2].removeprefix("s ").strip() or "no room"


def verdict(report: Report) -> str:
    """The plan in a sentence."""
    made = report.plan
    assert made is not None
    full = full_requests(made) * report.replicas
    spread = f", {full_requests(made)} on each of {report.replicas} replicas" if report.replicas > 1 else ""
    many = f"{full} requests of that length" if full != 1 else "one request of that length"
    weights = "32-bit" if (made.quantization, made.dtype) == ("none", "float32") else name_weights(made.quantization)
    cache = ", an FP8 KV cache" if made.kv_cache_dtype == "fp8" else ""
    return f"It fits: {weights} weights{cache}, {made.context:,} tokens, {many} at once{spread}."
