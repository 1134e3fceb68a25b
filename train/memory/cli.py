"""`loraport plan train`. Its flags are those fields of the run configuration that decide about memory and time."""

import inspect
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from loraport.clients.errors import DataError, UsageError, os_errors
from loraport.clients.terminal import print_json
from loraport.train.base_model import fetch_config
from loraport.train.cli import flag
from loraport.train.config import ResolvedConfig, RunConfig, load_config, read_yaml
from loraport.train.defaults import Facts, resolve
from loraport.train.memory.machine import find_machine, gpus_with_rows
from loraport.train.memory.plan import plan, require_fit, row_tokens
from loraport.train.memory.report import Report, Work, as_json, say_report
from loraport.train.memory.shapes import read_shape
from loraport.train.memory.speed import estimate

FIELDS = (
    *("model", "revision", "preset", "rank", "target_modules", "dropout", "load", "compute_dtype", "double_quant"),
    *("optimizer", "sequence_length", "batch_size", "method", "epochs", "max_steps", "data"),
    *("checkpointing", "micro_batch_tokens", "gpu_memory"),
)
REFERENCE_PASS = 0.5  # of an epoch's time: a forward pass alone, of the two in which a step takes about the same
NO_DATA = Path("none")  # in place of the rows that are not there yet
# Bytes of JSONL for each token of common tokenizers on text, and the fewest seen in a long row: code, other languages.
BYTES_A_TOKEN, BYTES_A_TOKEN_LEAST = 4.0, 2.5


def plan_train(
    config: Path | None,
    gpu_name: str | None,
    gpus: int | None,
    rows: int | None,
    tokens: int | None,
    price_per_hour: float | None,
    json: bool,
    **flags: Any,
) -> None:
    """Say what training will need: memory, time, cost, settings."""
    given = read_settings(config, flags)
    base = fetch_config(given.model, given.revision)
    facts = replace(Facts.of_base(base), rows=rows, tokens=tokens)
    has_data = given.data != NO_DATA
    if has_data and rows is None and tokens is None:
        facts = replace(facts, **measure(given.data, given.sequences))
    resolved, derived = resolve(given, facts)
    shape = read_shape(base, given.model)
    machine = find_machine(resolved.gpu_memory, gpu_name, gpus or resolved.gpus)
    machine = replace(machine, gpus=gpus_with_rows(machine.gpus, resolved.batch_size))
    made = plan(resolved, shape, machine)
    work = work_of(resolved, facts, has_data and rows is None and tokens is None)
    length = mean_length(resolved, facts)
    report = Report(
        model=given.model,
        config=resolved,
        shape=shape,
        plan=made,
        derived=tuple(derived),
        speed=estimate(shape, made.load, made.layout, machine, length),
        work=work,
        price=price_per_hour,
    )
    if json:
        print_json(as_json(report))
    else:
        say_report(report)
    require_fit(made)


def read_settings(config: Path | None, flags: dict[str, Any]) -> RunConfig:
    """The run configuration; rows may be missing, since they need not exist yet."""
    if flags.get("data") is None and not (config and "data" in read_yaml(config)):
        flags = flags | {"data": NO_DATA}
    return load_config(config, flags)


def measure(path: Path, sequences: int = 1) -> dict[str, int]:
    """Rows, about how many tokens they have, and the longest sequence, from the size of the lines of a JSONL file.

    No tokenizer is fetched for it. The longest is counted generously: memory depends on it. `sequences`: of a row; a
    pair's are counted as if all of it stood in both, for what takes most of it is the prompt.
    """
    if path.is_dir() or path.suffix not in (".jsonl", ".json", ".ndjson", ".txt"):
        raise UsageError(f"the tokens of {path} cannot be estimated from its size.", "give --rows and --tokens instead")
    rows = size = longest = 0
    with os_errors("reading", path):
        if not path.is_file():
            raise DataError(f"there is no data file {path}.", "check the path, or give --rows or --tokens")
        with path.open("rb") as lines:
            for line in lines:
                rows, size, longest = rows + bool(line.strip()), size + len(line), max(longest, len(line))
    if not rows:
        raise DataError(f"{path} is empty.", "give a file with rows, or --rows or --tokens")
    return {
        "rows": rows,
        "tokens": max(1, round(sequences * size / BYTES_A_TOKEN)),
        "longest": max(16, round(longest / BYTES_A_TOKEN_LEAST)),
    }


def work_of(config: ResolvedConfig, facts: Facts, is_measured: bool) -> Work:
    """How many tokens a pass over the rows has, and how many passes there are."""
    tokens, is_most, source = facts.tokens, False, "as given"
    if is_measured:
        source = "from the size of the file"
    elif tokens is None and facts.rows is not None:
        most = facts.rows * row_tokens(config)
        tokens, is_most, source = most, True, f"{facts.rows:,} rows of full length"
    passes = config.epochs
    if config.max_steps and facts.rows:
        passes = min(passes, config.max_steps * config.batch_size / facts.rows)
    if config.method == "dpo":
        passes += REFERENCE_PASS
    return Work(tokens, passes, is_most, source)


def mean_length(config: ResolvedConfig, facts: Facts) -> int:
    """Tokens of a sequence on average; its most where that is not known."""
    known = facts.tokens // (facts.rows * config.sequences) if facts.tokens and facts.rows else config.sequence_length
    return max(1, min(known, config.sequence_length))


def signature() -> inspect.Signature:
    """The options of `plan train`, and a flag for each of FIELDS."""
    own = {
        "config": (Path | None, None, typer.Option("--config", help="YAML file of a run; flags win.")),
        "gpu_name": (
            str | None,
            None,
            typer.Option("--gpu-name", help="GPU to plan for, such as H200, A100, 4090 or T4. Default: the one here."),
        ),
        "gpus": (
            int | None,
            None,
            typer.Option("--gpus", min=1, help="Number of such GPUs. Default: all that are here, 1 of others."),
        ),
        "rows": (int | None, None, typer.Option("--rows", min=1, help="Rows to train on, for hours and cost.")),
        "tokens": (int | None, None, typer.Option("--tokens", min=1, help="Tokens of all rows together.")),
        "price_per_hour": (
            float | None,
            None,
            typer.Option("--price-per-hour", min=0, help="Price of one GPU for an hour, in any currency."),
        ),
        "json": (bool, False, typer.Option("--json", help="Print the plan as one JSON document.")),
    }
    parameters = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, option])
        for name, (kind, default, option) in own.items()
    ]
    fields = [flag(name) for name in FIELDS]
    return inspect.Signature([*fields, *parameters])


plan_train.__signature__ = signature()  # type: ignore[attr-defined]
plan_train.__annotations__ = {name: each.annotation for name, each in signature().parameters.items()}
