"""A training run from top to bottom: base, rows, tokens, LoRA, loop, proof, and a new version in the home.

Nothing is left behind by a run that fails: the version appears by one rename, when everything in it is written.

    >>> train(load_config(Path("examples/demo/train.yaml"), {}), Home.default()).manifest.version
    'v1'
"""

import hashlib
import time
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from loraport.clients.errors import ConfigError, Refused, ResourceError, os_errors
from loraport.clients.home import Home, require_disk
from loraport.clients.rows import Row, read_rows
from loraport.clients.terminal import say
from loraport.train.adapters import WEIGHTS, Adapter, PartialVersion, check_name, find_same, publish
from loraport.train.base_model import identify, reply_settings_sha256, resolve
from loraport.train.config import RunConfig
from loraport.train.data.tokens import Encoder, Example, encode_rows
from loraport.train.loop.lora import Device, choose_types, count_trainable, load_lora
from loraport.train.manifest import BaseIdentity, DataCounts, Golden, Manifest

# Part of the fingerprint: raised when the same inputs would now give another adapter.
RECIPE = 1
PROVED_ROWS, SAMPLES_SHOWN = 16, 3
SPARE_DISK = 16 * 2**20


def train(config: RunConfig, home: Home, force: bool = False) -> Adapter:
    """Train as `config` says and return the stored version; the newest one when it is of the same inputs.

    Raises UsageError or ConfigError for wrong settings, DataError, BaseModelError or ResourceError for what cannot
    be trained here, Refused for a run that diverged; none of them leaves a file.
    """
    check_name(config.name)
    data_sha256 = hash_data(config)
    rows, eval_rows = read_data(config)
    base = resolve(config.model, config.revision)
    identity = identify(base)
    inputs = identity.hashes | {"replies": reply_settings_sha256(base), "recipe": str(RECIPE)}
    fingerprint = config.fingerprint(data_sha256, inputs)
    existing = None if force else find_same(home, config.name, fingerprint)
    if existing:
        say(f"{config.name} {existing.manifest.version} is up to date: same rows, settings and base.")
        return existing

    from loraport.train.loop.trainer import run_trainer

    started = time.monotonic()
    say(f"base {base.model} ({base.weight_bytes / 2**20:,.0f} MiB), {len(rows)} rows, {len(eval_rows)} held out")
    encoder = Encoder.load(base.folder)
    examples = encode_rows(encoder, rows, config.sequence_length, config.data)
    eval_examples = encode_rows(encoder, eval_rows, config.sequence_length, config.eval_data or config.data)
    say_untrained([*examples, *eval_examples])
    with PartialVersion(home, config.name) as folder:
        model = load_lora(base, config)
        require_disk(folder, 4 * count_trainable(model) + SPARE_DISK, f"the adapter {config.name}")
        metrics = run_trainer(model, encoder, examples, eval_examples, config, folder)
        golden, proof = prove(model, encoder, eval_rows)
        save_weights(model, folder)
        metrics |= proof | {"seconds": round(time.monotonic() - started, 1)}
        counts = count(config, data_sha256, examples, eval_examples)
        manifest = describe(config, identity, fingerprint, model, encoder, folder, counts, metrics, golden)
        return publish(home, folder, manifest)


def read_data(config: RunConfig) -> tuple[list[Row], list[Row]]:
    """Training and evaluation rows; without a file of the latter, every n-th training row is held out."""
    rows = read_rows(config.data)
    if config.eval_data:
        return rows, spread(read_rows(config.eval_data), config.eval_rows)
    wanted = min(config.eval_rows, max(1, round(len(rows) * config.eval_fraction)))
    held_out = {row.line for row in spread(rows, wanted)}
    training = [row for row in rows if row.line not in held_out]
    if not training:
        raise ConfigError(f"{config.data} has only {len(rows)} row.", "add rows, or give --eval-data")
    return training, [row for row in rows if row.line in held_out]


def spread(items: list[Any], most: int) -> list[Any]:
    """At most `most` items, evenly spaced."""
    return [items[index * len(items) // most] for index in range(most)] if len(items) > most else items


def hash_data(config: RunConfig) -> str:
    """SHA-256 over the bytes of the data files; a missing one is left to `read_rows`, which says it better."""
    digest = hashlib.sha256()
    for path in (config.data, config.eval_data):
        with os_errors("reading", path or config.data):
            digest.update(hashlib.sha256(path.read_bytes() if path and path.is_file() else b"").digest())
    return digest.hexdigest()


def say_untrained(examples: list[Example]) -> None:
    """Say how many assistant turns carry no loss, if any."""
    turns = sum(example.untrained_turns for example in examples)
    if turns:
        say(
            f"note: {turns} assistant turns before the last of their row carry no loss: the chat template renders "
            f"them differently once others follow. Split those rows to train on each.",
            "yellow",
        )


def prove(model: Any, encoder: Encoder, eval_rows: list[Row]) -> tuple[list[Golden], dict[str, float]]:
    """Golden replies, and how many of a sample of held-out rows the adapter answers and ends by itself."""
    from loraport.train.proof.golden import LONGEST_PROMPT, golden_replies, greedy_reply

    sample = spread(eval_rows, PROVED_ROWS)
    prompts = [encoder.prompt(row.prompt) for row in sample]
    by_length = sorted(zip(prompts, sample, strict=True), key=lambda pair: len(pair[0]))
    short = [row.prompt for prompt, row in by_length if len(prompt) <= LONGEST_PROMPT] or [by_length[0][1].prompt]
    golden = golden_replies(model, encoder, short)
    same = stopped = 0
    for number, (prompt, row) in enumerate(zip(prompts, sample, strict=True)):
        longest = 32 + 2 * len(encoder.tokenizer(row.reference)["input_ids"])
        reply = greedy_reply(model, encoder, prompt, longest)
        same, stopped = same + (reply.text.strip() == row.reference.strip()), stopped + reply.stopped
        if number < SAMPLES_SHOWN:
            ending = "" if reply.stopped else " (never stops)"
            say(f"  reply {reply.text!r}{ending}  wanted {row.reference!r}", "dim")
    say(f"{same} of {len(sample)} sampled held-out replies are as wanted, {stopped} stop by themselves")
    if stopped < len(sample):
        say(
            "warning: not every reply stops by itself: train longer (--epochs, --learning-rate) or on more rows",
            "yellow",
        )
    return golden, {"sample_success": same / len(sample), "sample_stop_rate": stopped / len(sample)}


def save_weights(model: Any, folder: Path) -> None:
    """Write PEFT's two files, and nothing of the base; Refused when a weight is not finite."""
    from safetensors import SafetensorError

    if not all(bool(parameter.isfinite().all()) for parameter in model.parameters() if parameter.requires_grad):
        raise Refused("the adapter's weights are not finite.", "lower --learning-rate; nothing was stored")
    with os_errors("writing", folder):
        try:
            model.save_pretrained(folder, save_embedding_layers=False)
        except SafetensorError as error:
            raise ResourceError(f"the adapter could not be written: {error}.", "is the disk full?") from error
        (folder / "README.md").unlink(missing_ok=True)  # PEFT's empty model card


def count(config: RunConfig, sha256: str, examples: list[Example], eval_examples: list[Example]) -> DataCounts:
    """What was trained on, for the manifest."""
    return DataCounts(
        files=[str(path) for path in (config.data, config.eval_data) if path],
        sha256=sha256,
        rows=len(examples),
        tokens=sum(len(example.input_ids) for example in examples),
        trained_tokens=sum(example.trained_tokens for example in examples),
        eval_rows=len(eval_examples),
    )


def describe(
    config: RunConfig,
    identity: BaseIdentity,
    fingerprint: str,
    model: Any,
    encoder: Encoder,
    folder: Path,
    counts: DataCounts,
    metrics: dict[str, float],
    golden: list[Golden],
) -> Manifest:
    """The manifest of the adapter in `folder`; its version is given when it is published."""
    return Manifest(
        name=config.name,
        version="",
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        fingerprint=fingerprint,
        base=identity,
        base_dtype=choose_types(config, Device.here()).held,
        rank=config.rank,
        alpha=config.alpha,
        target_modules=sorted(config.target_modules),
        trainable_parameters=count_trainable(model),
        adapter_bytes=(folder / WEIGHTS).stat().st_size,
        max_lora_rank=config.max_lora_rank,
        stop_tokens=sorted(encoder.stop_tokens),
        chat_template_kwargs=encoder.template_kwargs,
        data=counts,
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
