"""A training run from top to bottom: base, rows, plan, LoRA, loop, proof, and a new version in the home.

The version appears by one rename, when everything in it is written. A run that ends early leaves its checkpoints,
from which `resume` continues, and no version.

    >>> train(load_config(Path("examples/demo/train.yaml"), {}), Home.default()).manifest.version
    'v1'
"""

import os
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from loraport.clients.errors import BaseModelError, ConfigError, UsageError
from loraport.clients.home import Home, require_disk
from loraport.clients.rows import Message, Row
from loraport.clients.terminal import say
from loraport.train import defaults
from loraport.train.adapters import Adapter, PartialVersion, check_name, find_same, publish
from loraport.train.base_model import Base, identify, reply_settings_sha256, resolve
from loraport.train.checkpoint_adapters import check_step_names, checkpoint_adapters, store_checkpoints
from loraport.train.config import MEMORY_ONLY, PLACES, REPORTED, ResolvedConfig, RunConfig
from loraport.train.data.dataset import Data, find_data, tokenise
from loraport.train.data.split import spread
from loraport.train.data.tokens import Encoder
from loraport.train.job import Job
from loraport.train.loop.checkpoints import (
    clear,
    clear_stored,
    held,
    newest,
    note_storing,
    run_folder,
    step_of,
    whole,
)
from loraport.train.loop.settings import Settings
from loraport.train.progress_file import ProgressFile, write_adapter
from loraport.train.proof.check import Check, check_sha256, load_check, try_check
from loraport.train.proof.gate import Requirement, check_requirements, find_unmet, parse_requirements
from loraport.train.storing import describe, save_weights

# Part of the fingerprint: raised when the same inputs would now give another adapter.
RECIPE = 3
GOLDEN_PROMPTS = 16
HELD_OUT = 200  # rows whose text is kept in memory for what comes after the training
FALLBACK_PROMPT = [{"role": "user", "content": "Hello."}]  # where the rows are documents, which ask nothing


def train(
    config: RunConfig,
    home: Home,
    force: bool = False,
    resume: bool = False,
    resume_or_start: bool = False,
    file: ProgressFile | None = None,
) -> Adapter:
    """Train as `config` says and return the stored version; the newest one when it is of the same inputs.

    `force` trains in any case and from the beginning, `resume` continues a run that was ended, `resume_or_start` does
    so where there is one of these settings and begins where there is none. `file` is told how it goes. Raises
    UsageError or ConfigError for wrong settings, DataError, BaseModelError or ResourceError for what cannot be trained
    here, Refused for a run that diverged: none of them leaves a version. Shortfall when the stored version misses a
    requirement.
    """
    check_name(config.name)
    check_step_names(config)
    file = file or ProgressFile()
    requirements = parse_requirements(config.require, config.method)
    check = load_check(config.check) if config.check else None
    found = find_data(config)
    base = resolve(config.model, config.revision)
    identity = identify(base)
    inputs = identity.hashes | {"replies": reply_settings_sha256(base), "recipe": str(RECIPE)}
    judged = {"check": check_sha256(config.check)} if config.check else {}
    fingerprint = config.fingerprint(found.both_sha256, inputs | judged)
    runs = run_folder(home, config.name)
    existing = None if force else find_same(home, config.name, fingerprint)
    if existing:
        clear_stored(runs, fingerprint)
        return answer(existing, home, requirements, file, is_new=False)

    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")  # read when torch first allocates
    from loraport.train.loop.progress import Phases
    from loraport.train.loop.tracking import check_trackers

    check_trackers(config.track)
    phases = Phases(file)
    with phases("reading and tokenising rows"):
        facts = defaults.Facts.of_base(base.config)
        limit = config.sequence_length or facts.max_positions or sys.maxsize
        data = tokenise(found, config, Encoder.load(base.folder), home, limit)
    resolved, choices = defaults.resolve(config, data.add_to(facts))
    say_inputs(base, data, choices)
    held_out = data.eval_rows.rows(spread(len(data.eval_rows), HELD_OUT).tolist())  # now: the file may change meanwhile
    if check:
        try_references(check, held_out)
    gpus = count_gpus(resolved)
    settings = choose_settings(resolved, base, data, gpus)
    sealed = seal_of(resolved, found.both_sha256, inputs)
    job = Job(resolved, base, identity, fingerprint, data, held_out, settings, gpus, choices, check, requirements)
    with held(runs):
        existing = None if force else find_same(home, config.name, fingerprint)  # another process's, meanwhile
        if existing is None:
            checkpoint = choose_checkpoint(runs, sealed, force, resume, resume_or_start)
            adapter = run_job(job, home, phases, runs, sealed, checkpoint)
    return answer(existing or adapter, home, requirements, file, is_new=existing is None)


def answer(adapter: Adapter, home: Home, requirements: list[Requirement], file: ProgressFile, is_new: bool) -> Adapter:
    """Tell of a version that is stored, now or before; Shortfall when it misses a requirement."""
    manifest = adapter.manifest
    if not is_new:
        say(f"{manifest.name} {manifest.version} is up to date: same rows, settings and base.")
    write_adapter(file, adapter, checkpoint_adapters(home, adapter), up_to_date=not is_new)
    check_requirements(requirements, manifest.metrics, f"{manifest.name} {manifest.version}", str(adapter.folder))
    return adapter


def run_job(job: Job, home: Home, phases: Any, runs: Path, sealed: dict[str, Any], checkpoint: Path | None) -> Adapter:
    """Load, train, prove and store."""
    from loraport.train.loop.tracking import Tracking

    config, started = job.config, time.monotonic()
    with ExitStack() as stack:
        stack.enter_context(interrupted(runs, KeyboardInterrupt))
        tracking = stack.enter_context(Tracking(config.track, home, config.name, config.model_dump(mode="json")))
        folder = stack.enter_context(PartialVersion(home, config.name))
        require_disk(folder, job.disk, f"the adapter {config.name}")
        model, outcome = fit_here(job, phases, runs, sealed, checkpoint, tracking)
        with interrupted(runs, SystemExit):  # the loop has its own words for it
            adapter = store(job, model, outcome, home, folder, phases, started, runs)
        clear(runs)
        tracking.finish(adapter.folder, adapter.manifest.metrics)
        return adapter


@contextmanager
def interrupted(runs: Path, signalled: type[BaseException]) -> Iterator[None]:
    """While it lasts, a signal ends the run with a word about what is kept."""
    try:
        yield
    except signalled:
        found = whole(runs)
        kept = (
            f"its checkpoint of step {step_of(found[-1])} is kept: go on with --resume" if found else "nothing is kept"
        )
        say(f"stopped before the adapter was stored; {kept}", "yellow")
        raise


def fit_here(
    job: Job, phases: Any, runs: Path, sealed: dict[str, Any], checkpoint: Path | None, tracking: Any
) -> tuple[Any, Any]:
    """The trained PeftModel and the outcome of the loop, on one GPU or several."""
    from loraport.train.loop.fit import fit
    from loraport.train.loop.gpu_memory import limit_memory
    from loraport.train.loop.launch import fit_on
    from loraport.train.loop.lora import load_lora
    from loraport.train.loop.progress import ProgressCallback
    from loraport.train.loop.reporting import ReportCallback

    report = ReportCallback(phases.file, facts_of(job), full=is_full(job.data))
    rest = (job.data.rows, job.data.eval_rows, job.config, job.settings, runs, sealed, checkpoint)
    if job.gpus > 1:
        with phases(f"training in {job.gpus} processes", bar=False):
            model, outcome = fit_on(job.gpus, job.base, *rest, tracking.report_elsewhere, (report,))
        tracking.replay(outcome.history)
        return model, outcome
    limit_memory(job.config.gpu_memory)
    with phases("loading the base"):
        model = load_lora(job.base, job.config)
    progress = ProgressCallback()
    with phases("training", bar=False), closing(progress):
        return model, fit(model, *rest, (progress, report), tracking.report_to)


def facts_of(job: Job) -> dict[str, Any]:
    """What the progress file says when the training begins."""
    return {
        "rows": len(job.data.rows),
        "tokens_to_learn": int(job.data.rows.trained.sum()),
        "epochs": job.config.epochs,
        "run": job.config.model_dump(mode="json"),
        "derived": [asdict(choice) for choice in job.choices],
    }


def is_full(data: Data) -> bool:
    """Whether an evaluation is over all rows that there are for it."""
    return not data.found.eval_source or len(data.eval_rows) == len(data.eval_rows.store)


def store(
    job: Job, model: Any, outcome: Any, home: Home, folder: Path, phases: Any, started: float, runs: Path
) -> Adapter:
    """Prove what was trained, write it into `folder` with its report, and publish it; before it its checkpoints."""
    from loraport.train.proof.golden import golden_replies
    from loraport.train.proof.report import describe_run, write_report
    from loraport.train.proof.summary import say_comparison, say_verdicts
    from loraport.train.proof.verdict import judge_change, judge_curves, judge_preferences, judge_replies

    prompts = short_prompts(job.data.encoder, job.held_out)
    with phases("golden replies"):
        golden = golden_replies(model, job.data.encoder, prompts)
    compared = compare_with_base(job, model, phases)
    save_weights(model, folder)
    verdicts = judge_curves(outcome.history)
    if job.config.method == "dpo":
        verdicts += judge_preferences(outcome.metrics)
    metrics = outcome.metrics | {"seconds": round(time.monotonic() - started, 1)}
    if compared:
        metrics |= compared.metrics()
        say_comparison(job.config.name, compared)
        replies = [sample.adapter for sample in compared.samples]
        verdicts += judge_replies(compared.adapter, compared.base, replies, job.config.method)
        if job.config.method == "dpo":
            verdicts += judge_change(replies, [sample.base for sample in compared.samples])
    say_verdicts(verdicts)
    if job.requirements:
        metrics["requirements_failed"] = len(find_unmet(job.requirements, metrics))
    manifest = describe(job, model, folder, metrics, golden)
    write_report(
        folder,
        describe_run(manifest, outcome.history, compared, verdicts, job.requirements, job.choices, phases.seconds),
    )
    if job.config.checkpoint_adapters:
        with phases("storing checkpoints as adapters"):
            store_checkpoints(job, model, runs, outcome.history, folder, prompts, golden, home)
    note_storing(runs, job.fingerprint)
    return publish(home, folder, manifest)


def say_inputs(base: Base, data: Data, choices: list[defaults.Choice]) -> None:
    """What is trained on what, with which derived settings, and what is doubtful about the rows."""
    from loraport.train.data.quick import say_warnings, warnings_of

    say(
        f"base {base.model} ({base.weight_bytes / 2**20:,.0f} MiB), {len(data.rows):,} rows, "
        f"{len(data.eval_rows):,} held out, {int(data.rows.trained.sum()):,} tokens to learn"
    )
    for note in data.notes:
        say(f"note: {note}", "yellow")
    say_warnings(warnings_of(data.rows, data.eval_rows, data.encoder))
    defaults.say_choices(choices)


def try_references(check: Check, held_out: list[Row]) -> None:
    """Say when the user's check refuses what the rows teach."""
    rows = [row for row in held_out if row.text is None]
    refused = try_check(check, [(row.reference, {"messages": row.messages}) for row in rows])
    if refused:
        say(
            f"warning: the check refuses {len(refused)} of {len(rows)} replies that the rows teach, such as "
            f"{refused[0][:80]!r}: it cannot be met on them",
            "yellow",
        )


def count_gpus(config: ResolvedConfig) -> int:
    """GPUs that the run uses; ConfigError when there are fewer than were asked for. A CPU may stand for any number."""
    import torch

    from loraport.train.memory.machine import gpus_with_rows

    here = torch.cuda.device_count()
    if config.gpus and here and config.gpus > here:
        raise ConfigError(f"--gpus {config.gpus}: there are {here} here.", "leave it away to use all")
    return gpus_with_rows(config.gpus or max(here, 1), config.batch_size)


def choose_settings(config: ResolvedConfig, base: Base, data: Data, gpus: int) -> Settings:
    """How the run uses the memory here; ResourceError that says what would fit when nothing does."""
    from loraport.train.memory.machine import machine_for_run
    from loraport.train.memory.plan import plan, require_fit
    from loraport.train.memory.shapes import Uncounted, read_shape

    longest = max(int(data.rows.lengths.max()), int(data.eval_rows.lengths.max()))
    try:
        shape = read_shape(base.config, base.model)
    except Uncounted as error:
        return least_settings(config, base, longest, error)
    made = plan(config, shape, machine_for_run(config.gpu_memory, gpus), longest)
    require_fit(made)
    defaults.say_choices(made.choices)
    chosen = made.settings
    if chosen.sharding == "fsdp" and config.load == "int8":  # bitsandbytes keeps its own hold of int8 weights
        raise ConfigError("--load int8 cannot be shared among GPUs, and no GPU here holds the base.", "use --load nf4")
    return Settings.of_plan(chosen)


def least_settings(config: ResolvedConfig, base: Base, longest: int, error: BaseModelError) -> Settings:
    """What needs least memory, for a base that cannot be planned for; what is given stays as it is."""
    from loraport.train.memory.servable import check_servable

    check_servable(base.config.get("architectures") or (), base.model)
    text = base.config.get("text_config") or base.config
    layers = int(defaults.first(text, "num_hidden_layers", "n_layer") or 0)
    say(f"note: {error.message} It is trained a row at a time with full checkpointing, unless told otherwise", "yellow")
    return Settings(
        max(config.micro_batch_tokens or longest, longest),
        {"off": 0, "half": layers // 2}.get(config.checkpointing, layers),
        config.checkpointing == "offload",
    )


def seal_of(config: ResolvedConfig, data_sha256: str, inputs: dict[str, str]) -> dict[str, Any]:
    """What a checkpoint must have in common with the run that continues from it: all but what follows the training."""
    afterwards = REPORTED | {"eval_prompts", "check"}
    settings = config.model_dump(mode="json", exclude=PLACES | {"name"} | MEMORY_ONLY | afterwards)
    return {"settings": settings, "the rows": data_sha256, "the base": inputs}


def choose_checkpoint(
    runs: Path, sealed: dict[str, Any], force: bool, resume: bool, resume_or_start: bool
) -> Path | None:
    """The checkpoint to continue from, if any.

    UsageError when there is one and nobody said what to do with it: hours of work should not go without a word.
    """
    if resume or (resume_or_start and is_same_run(runs, sealed)):
        checkpoint = newest(runs, sealed)
        if checkpoint is None:
            raise UsageError(f"there is no checkpoint in {runs} to continue from.", "start without --resume")
        say(f"continuing after step {step_of(checkpoint)}")
        return checkpoint
    unfinished = whole(runs)
    if unfinished and not (force or resume_or_start):
        raise UsageError(
            f"a run of this name was ended after step {step_of(unfinished[-1])}, and its checkpoint is in {runs}.",
            "continue it with --resume, or begin anew with --force",
        )
    clear(runs)
    return None


def is_same_run(runs: Path, sealed: dict[str, Any]) -> bool:
    """Whether there is a checkpoint to continue from; where it is of another run, that is said."""
    try:
        return newest(runs, sealed) is not None
    except ConfigError as error:
        say(f"note: {error.message} It begins anew.", "yellow")
        return False


def short_prompts(encoder: Encoder, held_out: list[Row]) -> list[list[Message]]:
    """Held-out conversations for the golden replies: text alone, short enough that replaying them costs nothing."""
    from loraport.train.proof.golden import LONGEST_PROMPT

    # As a client asks that says nothing about thinking: rows of the other mode have other prompts.
    rows = [row for row in held_out if row.text is None and not row.tools]
    rows = [row for row in rows if encoder.prompt_of(row) == encoder.prompt(row.prompt)]
    plain = [row.prompt for row in rows if all(set(message) <= {"role", "content"} for message in row.prompt)]
    by_length = sorted(((len(encoder.prompt(prompt)), prompt) for prompt in plain), key=lambda pair: pair[0])
    short = [prompt for length, prompt in by_length if length <= LONGEST_PROMPT] or [
        prompt for _, prompt in by_length[:1]
    ]
    return [short[index] for index in spread(len(short), GOLDEN_PROMPTS)] if short else [FALLBACK_PROMPT]


def compare_with_base(job: Job, model: Any, phases: Any) -> Any:
    """Adapter and base on held-out prompts; None where the rows are documents, which ask nothing."""
    from loraport.train.proof.evaluate import compare, hold_out

    picked = spread(len(job.held_out), job.config.eval_prompts)
    asked = hold_out(job.data.encoder, [job.held_out[index] for index in picked])
    if not asked:
        return None
    with phases("answering held-out prompts", total=2 * len(asked)) as phase:
        return compare(model, job.data.encoder, asked, job.check, phase.advance)
