"""A training run from top to bottom: base, rows, plan, LoRA, loop, proof, and a new version in the home.

The version appears by one rename, when everything in it is written. A run that ends early leaves its checkpoints,
from which `resume` continues, and no version.

    >>> train(load_config(Path("examples/demo/train.yaml"), {}), Home.default()).manifest.version
    'v1'
"""

import math
import os
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from loraport.clients.errors import BaseModelError, ConfigError, Refused, ResourceError, UsageError, os_errors
from loraport.clients.home import Home, require_disk
from loraport.clients.rows import Message, Row
from loraport.clients.terminal import say
from loraport.train import defaults
from loraport.train.adapters import WEIGHTS, Adapter, PartialVersion, check_name, find_same, publish
from loraport.train.base_model import Base, identify, reply_settings_sha256, resolve
from loraport.train.config import MEMORY_ONLY, PLACES, REPORTED, ResolvedConfig, RunConfig
from loraport.train.data.dataset import Data, find_data, tokenise
from loraport.train.data.split import spread
from loraport.train.data.tokens import Encoder
from loraport.train.loop.checkpoints import clear, held, newest, run_folder, step_of, whole
from loraport.train.loop.settings import Settings
from loraport.train.manifest import BaseIdentity, Golden, Manifest
from loraport.train.proof.check import Check, check_sha256, load_check, try_check
from loraport.train.proof.gate import Requirement, check_requirements, find_unmet, parse_requirements
from loraport.train.weights import read_safetensors_shapes

# Part of the fingerprint: raised when the same inputs would now give another adapter.
RECIPE = 3
GOLDEN_PROMPTS = 16
HELD_OUT = 200  # rows whose text is kept in memory for what comes after the training
FALLBACK_PROMPT = [{"role": "user", "content": "Hello."}]  # where the rows are documents, which ask nothing
SPARE_DISK = 16 * 2**20


def train(config: RunConfig, home: Home, force: bool = False, resume: bool = False) -> Adapter:
    """Train as `config` says and return the stored version; the newest one when it is of the same inputs.

    `force` trains in any case and from the beginning, `resume` continues a run that was ended. Raises UsageError or
    ConfigError for wrong settings, DataError, BaseModelError or ResourceError for what cannot be trained here, Refused
    for a run that diverged: none of them leaves a version. Shortfall when the stored version misses a requirement.
    """
    check_name(config.name)
    requirements = parse_requirements(config.require)
    check = load_check(config.check) if config.check else None
    found = find_data(config)
    base = resolve(config.model, config.revision)
    identity = identify(base)
    inputs = identity.hashes | {"replies": reply_settings_sha256(base), "recipe": str(RECIPE)}
    judged = {"check": check_sha256(config.check)} if config.check else {}
    fingerprint = config.fingerprint(found.both_sha256, inputs | judged)
    existing = None if force else find_same(home, config.name, fingerprint)
    if existing:
        say(f"{config.name} {existing.manifest.version} is up to date: same rows, settings and base.")
        judge(existing, requirements)
        return existing

    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")  # read when torch first allocates
    from loraport.train.loop.progress import Phases
    from loraport.train.loop.tracking import check_trackers

    check_trackers(config.track)
    phases = Phases()
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
    runs = run_folder(home, config.name)
    sealed = seal_of(resolved, found.both_sha256, inputs)
    job = Job(resolved, base, identity, fingerprint, data, held_out, settings, gpus, choices, check, requirements)
    with held(runs):
        checkpoint = choose_checkpoint(runs, sealed, force, resume)
        adapter = run_job(job, home, phases, runs, sealed, checkpoint)
    judge(adapter, requirements)
    return adapter


@dataclass(frozen=True)
class Job:
    """A training run when everything about it is known and nothing heavy has happened."""

    config: ResolvedConfig
    base: Base
    identity: BaseIdentity
    fingerprint: str
    data: Data
    held_out: list[Row]
    settings: Settings
    gpus: int
    choices: list[defaults.Choice]
    check: Check | None
    requirements: list[Requirement]

    @property
    def disk(self) -> int:
        """Bytes that the adapter will need, generously: in float32, and something for the report."""
        facts = defaults.Facts.of_base(self.base.config)
        return 4 * self.config.rank * (facts.width or 0) + SPARE_DISK


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
            adapter = store(job, model, outcome, home, folder, phases, started)
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

    rest = (job.data.rows, job.data.eval_rows, job.config, job.settings, runs, sealed, checkpoint)
    if job.gpus > 1:
        with phases(f"training in {job.gpus} processes", bar=False):
            model, outcome = fit_on(job.gpus, job.base, *rest, tracking.report_elsewhere)
        tracking.replay(outcome.history)
        return model, outcome
    limit_memory(job.config.gpu_memory)
    with phases("loading the base"):
        model = load_lora(job.base, job.config)
    progress = ProgressCallback()
    with phases("training", bar=False), closing(progress):
        return model, fit(model, *rest, (progress,), tracking.report_to)


def store(job: Job, model: Any, outcome: Any, home: Home, folder: Path, phases: Any, started: float) -> Adapter:
    """Prove what was trained, write it into `folder` with its report, and publish it."""
    from loraport.train.proof.golden import golden_replies
    from loraport.train.proof.report import describe_run, write_report
    from loraport.train.proof.summary import say_comparison, say_verdicts
    from loraport.train.proof.verdict import judge_curves, judge_replies

    with phases("golden replies"):
        golden = golden_replies(model, job.data.encoder, short_prompts(job.data.encoder, job.held_out))
    compared = compare_with_base(job, model, phases)
    save_weights(model, folder)
    verdicts = judge_curves(outcome.history)
    metrics = outcome.metrics | {"seconds": round(time.monotonic() - started, 1)}
    if compared:
        metrics |= compared.metrics()
        say_comparison(job.config.name, compared)
        verdicts += judge_replies(compared.adapter, compared.base, [sample.adapter for sample in compared.samples])
    say_verdicts(verdicts)
    if job.requirements:
        metrics["requirements_failed"] = len(find_unmet(job.requirements, metrics))
    manifest = describe(job, model, folder, metrics, golden)
    write_report(
        folder,
        describe_run(manifest, outcome.history, compared, verdicts, job.requirements, job.choices, phases.seconds),
    )
    return publish(home, folder, manifest)


def judge(adapter: Adapter, requirements: list[Requirement]) -> None:
    """Shortfall when a stored version misses a requirement."""
    manifest = adapter.manifest
    check_requirements(requirements, manifest.metrics, f"{manifest.name} {manifest.version}", str(adapter.folder))


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


def choose_checkpoint(runs: Path, sealed: dict[str, Any], force: bool, resume: bool) -> Path | None:
    """The checkpoint to continue from, if any.

    UsageError when there is one and nobody said what to do with it: hours of work should not go without a word.
    """
    if resume:
        checkpoint = newest(runs, sealed)
        if checkpoint is None:
            raise UsageError(f"there is no checkpoint in {runs} to continue from.", "start without --resume")
        say(f"continuing after step {step_of(checkpoint)}")
        return checkpoint
    unfinished = whole(runs)
    if unfinished and not force:
        raise UsageError(
            f"a run of this name was ended after step {step_of(unfinished[-1])}, and its checkpoint is in {runs}.",
            "continue it with --resume, or begin anew with --force",
        )
    clear(runs)
    return None


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


def save_weights(model: Any, folder: Path) -> None:
    """Write PEFT's two files, and nothing of the base.

    Refused when a weight is not finite, or when the file holds more or less than the adapter.
    """
    from safetensors import SafetensorError

    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not all(bool(parameter.isfinite().all()) for parameter in trained):
        raise Refused("the adapter's weights are not finite.", "lower --learning-rate; nothing was stored")
    with os_errors("writing", folder):
        try:
            model.save_pretrained(folder, save_embedding_layers=False)
        except SafetensorError as error:
            raise ResourceError(f"the adapter could not be written: {error}.", "is the disk full?") from error
        (folder / "README.md").unlink(missing_ok=True)  # PEFT's empty model card
    shapes = read_safetensors_shapes(folder / WEIGHTS, Refused)
    held, wanted = sum(math.prod(shape) for shape in shapes.values()), sum(each.numel() for each in trained)
    if held != wanted:
        raise Refused(
            f"the adapter's file holds {held:,} parameters instead of {wanted:,}.",
            "this is a bug of Loraport or of PEFT: nothing was stored",
        )


def describe(job: Job, model: Any, folder: Path, metrics: dict[str, float], golden: list[Golden]) -> Manifest:
    """The manifest of the adapter in `folder`; its version is given when it is published."""
    from loraport.train.loop.lora import Device, count_trainable
    from loraport.train.memory.machine import choose_types

    config = job.config
    return Manifest(
        name=config.name,
        version="",
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        fingerprint=job.fingerprint,
        base=job.identity,
        base_dtype=choose_types(config, Device.here()).held,
        rank=config.rank,
        alpha=config.alpha,
        target_modules=sorted(model.peft_config["default"].target_modules),
        trainable_parameters=count_trainable(model),
        adapter_bytes=(folder / WEIGHTS).stat().st_size,
        max_lora_rank=config.max_lora_rank,
        stop_tokens=sorted(job.data.encoder.stop_tokens),
        chat_template_kwargs=job.data.encoder.template_kwargs,
        data=job.data.counts(),
        run=config.model_dump(mode="json"),
        metrics=metrics,
        versions={name: installed(name) for name in ("loraport", "torch", "transformers", "peft")},
        golden=golden,
    )


def installed(package: str) -> str:
    """Version of an installed package; "source" where it runs from a checkout."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "source"
