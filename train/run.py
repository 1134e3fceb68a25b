"""A training run from top to bottom: base, rows, tokens, LoRA, loop, proof, and a new version in the home.

Nothing is left behind by a run that fails: the version appears by one rename, when everything in it is written.

    >>> train(load_config(Path("examples/demo/train.yaml"), {}), Home.default()).manifest.version
    'v1'
"""

import hashlib
import os
import shutil
import tempfile
import time
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from loraport.clients.errors import BaseModelError, ConfigError, LoraportError, ResourceError, os_errors
from loraport.clients.home import Home, require_disk
from loraport.clients.rows import Row, read_rows
from loraport.clients.terminal import say
from loraport.train.adapters import WEIGHTS, Adapter, check_name, check_whole, open_adapter, versions
from loraport.train.base_model import Base, identify, resolve
from loraport.train.config import RunConfig
from loraport.train.manifest import BaseIdentity, DataCounts, Golden, Manifest
from loraport.train.tokens import Encoder, Example, encode_rows

SAMPLES_SHOWN = 3
LARGE_MODEL = 1_000_000_000  # parameters from which activations, not weights, decide about memory


def train(config: RunConfig, home: Home, force: bool = False) -> Adapter:
    """Train as `config` says and return the stored version; the newest one when it is of the same inputs.

    Raises UsageError or ConfigError for wrong settings, DataError, BaseModelError or ResourceError for what cannot
    be trained here; none of them leaves a file.
    """
    check_name(config.name)
    rows, eval_rows = read_data(config)
    base = resolve(config.model, config.revision)
    identity = identify(base)
    fingerprint = config.fingerprint(hash_data(config), identity.hashes)
    existing = None if force else find_same(home, config.name, fingerprint)
    if existing:
        say(f"{config.name} {existing.manifest.version} is up to date: same rows, settings and base.")
        return existing

    started = time.monotonic()
    say(f"base {base.model} ({base.weight_bytes / 2**20:,.0f} MiB), {len(rows)} rows, {len(eval_rows)} held out")
    encoder = Encoder.load(base.folder)
    examples = encode_rows(encoder, rows, config.sequence_length, config.data)
    eval_examples = encode_rows(encoder, eval_rows, config.sequence_length, config.eval_data or config.data)
    with PartialVersion(home, config.name) as folder:
        require_disk(folder, 2 * 4 * config.rank * 10_000 * len(config.target_modules) + 2**24, "the adapter")
        model = load_lora(base, config)
        metrics = run_trainer(model, encoder, examples, eval_examples, config, folder)
        golden, proof = prove(model, encoder, eval_rows)
        metrics |= proof | {"seconds": round(time.monotonic() - started, 1)}
        save_weights(model, folder)
        counts = count(config, examples, eval_examples)
        manifest = describe(config, identity, fingerprint, model, encoder, folder, counts, metrics, golden)
        return publish(home, folder, manifest)


def read_data(config: RunConfig) -> tuple[list[Row], list[Row]]:
    """Training and evaluation rows; without a file of the latter, every n-th training row is held out."""
    rows = read_rows(config.data)
    if config.eval_data:
        return rows, spread(read_rows(config.eval_data), config.eval_rows)
    held_out = {
        row.line for row in spread(rows, min(config.eval_rows, max(1, round(len(rows) * config.eval_fraction))))
    }
    training = [row for row in rows if row.line not in held_out]
    if not training:
        raise ConfigError(f"{config.data} has only {len(rows)} row.", "add rows, or give --eval-data")
    return training, [row for row in rows if row.line in held_out]


def spread(items: list[Any], most: int) -> list[Any]:
    """At most `most` items, evenly spaced."""
    return [items[index * len(items) // most] for index in range(most)] if len(items) > most else items


def hash_data(config: RunConfig) -> str:
    """SHA-256 over the bytes of the data files."""
    digest = hashlib.sha256()
    for path in (config.data, config.eval_data):
        with os_errors("reading", path or config.data):
            digest.update(hashlib.sha256(path.read_bytes() if path else b"").digest())
    return digest.hexdigest()


def find_same(home: Home, name: str, fingerprint: str) -> Adapter | None:
    """The newest version of `name`, if it is whole and was made from the same inputs."""
    found = versions(home, name)
    try:
        newest = open_adapter(home, str(found[-1])) if found else None
    except LoraportError:
        return None  # damaged: train again
    return newest if newest and newest.manifest.fingerprint == fingerprint else None


class PartialVersion:
    """A hidden folder beside the versions of `name`, removed at the end unless it was renamed away."""

    def __init__(self, home: Home, name: str) -> None:
        self.parent = home.ensure(home.adapters / name)

    def __enter__(self) -> Path:
        for stale in self.parent.glob(".partial-*"):  # of a run that was killed
            if not Path(f"/proc/{stale.name.split('-')[1]}").exists():
                shutil.rmtree(stale, ignore_errors=True)
        with os_errors("making a folder in", self.parent):
            self.folder = Path(tempfile.mkdtemp(prefix=f".partial-{os.getpid()}-", dir=self.parent))
        return self.folder

    def __exit__(self, *_: Any) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        if not any(self.parent.iterdir()):
            self.parent.rmdir()


def load_lora(base: Base, config: RunConfig) -> Any:
    """The frozen base with fresh LoRA layers on its target modules, as a PeftModel."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig, set_seed

    quiet_transformers()
    set_seed(config.seed)
    cuda = torch.cuda.is_available()
    dtype = resolved_dtype(config, cuda)
    options: dict[str, Any] = {"device_map": {"": 0}} if cuda else {}
    if dtype == "nf4":
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
    weights = torch.float32 if dtype == "float32" else torch.bfloat16
    try:
        model = AutoModelForCausalLM.from_pretrained(base.folder, dtype=weights, attn_implementation="sdpa", **options)
    except (ValueError, KeyError) as error:
        raise BaseModelError(
            f"{base.model} cannot be loaded as a causal language model: {str(error).splitlines()[0]}",
            f"its config.json says model_type {base.config.get('model_type')!r}; is it supported by this transformers?",
        ) from error
    missing = [name for name in config.target_modules if not has_linear(model, name)]
    if missing:
        linears = sorted({name.rsplit(".", 1)[-1] for name, module in model.named_modules() if is_linear(module)})
        raise ConfigError(
            f"{base.model} has no linear layers called {', '.join(missing)}.",
            f"choose --target-modules among: {', '.join(name for name in linears if name != 'lm_head')}",
        )
    model.config.use_cache = False
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    if use_checkpointing(config, model):
        model.enable_input_require_grads()
    return get_peft_model(
        model,
        LoraConfig(
            task_type="CAUSAL_LM",
            r=config.rank,
            lora_alpha=config.alpha,
            lora_dropout=config.dropout,
            target_modules=list(config.target_modules),
        ),
    )


def resolved_dtype(config: RunConfig, cuda: bool) -> str:
    """What `dtype: auto` means here; ConfigError for nf4 without a GPU."""
    if config.dtype == "nf4" and not cuda:
        raise ConfigError("dtype nf4 needs an NVIDIA GPU, and there is none here.", "use --dtype auto")
    return ("bfloat16" if cuda else "float32") if config.dtype == "auto" else config.dtype


def quiet_transformers() -> None:
    """Progress bars and advice of libraries would drown ours; their errors still arrive as exceptions."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def is_linear(module: Any) -> bool:
    """Whether LoRA can go onto `module`: torch's Linear, or bitsandbytes' subclasses of it."""
    import torch

    return isinstance(module, torch.nn.Linear)


def has_linear(model: Any, name: str) -> bool:
    """Whether some linear layer's last name is `name`."""
    return any(path.rsplit(".", 1)[-1] == name and is_linear(module) for path, module in model.named_modules())


def use_checkpointing(config: RunConfig, model: Any) -> bool:
    """As configured, else for models whose activations would not fit."""
    wanted = config.gradient_checkpointing
    return model.num_parameters() >= LARGE_MODEL if wanted is None else wanted


def run_trainer(
    model: Any, encoder: Encoder, examples: list[Example], eval_examples: list[Example], config: RunConfig, folder: Path
) -> dict[str, float]:
    """Run the loop; return losses, steps and tokens/s."""
    import torch
    from transformers import PrinterCallback, TrainingArguments

    from loraport.train.progress import ProgressCallback
    from loraport.train.trainer import LoraTrainer

    micro = micro_batch_rows(config, max(len(example.input_ids) for example in [*examples, *eval_examples]))
    steps = -(-len(examples) // config.batch_size) * config.epochs
    checkpointing = use_checkpointing(config, model)
    arguments = TrainingArguments(
        output_dir=str(folder / "trainer"),
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=config.batch_size // micro,
        num_train_epochs=config.epochs,
        learning_rate=config.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=round(steps * config.warmup_ratio),
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        bf16=torch.cuda.is_available(),
        use_cpu=not torch.cuda.is_available(),
        gradient_checkpointing=checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False} if checkpointing else None,
        train_sampling_strategy="group_by_length",
        eval_strategy="epoch",
        save_strategy="no",
        logging_steps=1,
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=torch.cuda.is_available(),
        seed=config.seed,
    )
    progress = ProgressCallback()
    pad = encoder.tokenizer.pad_token_id
    trainer = LoraTrainer(
        model=model,
        args=arguments,
        train_dataset=[example.features for example in examples],
        eval_dataset=[example.features for example in eval_examples],
        callbacks=[progress],
        pad_token=next(iter(encoder.stop_tokens)) if pad is None else pad,
    )
    trainer.remove_callback(PrinterCallback)
    progress.trainer = trainer
    try:
        result = trainer.train()
    except torch.OutOfMemoryError as error:
        raise ResourceError(
            f"the GPU ran out of memory with {micro} rows at once.",
            f"halve --micro-batch-tokens (it is {config.micro_batch_tokens}), or use --dtype nf4",
        ) from error
    finally:
        progress.close()
    shutil.rmtree(folder / "trainer", ignore_errors=True)
    evaluations = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    return {
        "train_loss": result.training_loss,
        "eval_loss": evaluations[-1],
        "steps": trainer.state.global_step,
        "tokens_per_second": round(trainer.tokens_seen / result.metrics["train_runtime"], 1),
    }


def micro_batch_rows(config: RunConfig, longest: int) -> int:
    """Rows on the device at once: the largest divisor of the batch whose longest rows stay within the budget."""
    fitting = max(1, config.micro_batch_tokens // longest)
    return max(size for size in range(1, config.batch_size + 1) if config.batch_size % size == 0 and size <= fitting)


def prove(model: Any, encoder: Encoder, eval_rows: list[Row]) -> tuple[list[Golden], dict[str, float]]:
    """Golden replies, and how many of a sample of held-out rows the adapter answers and ends by itself."""
    from loraport.train.golden import LONGEST_PROMPT, golden_replies, greedy_reply

    sample = spread(eval_rows, 16)
    prompts = [(encoder.prompt(row), row.reference) for row in sample]
    short = [prompt for prompt, _ in prompts if len(prompt) <= LONGEST_PROMPT] or [min(prompts)[0]]
    golden = golden_replies(model, encoder, short)
    replies = [
        greedy_reply(model, encoder, prompt, 32 + 2 * len(encoder.tokenizer(reference)["input_ids"]))
        for prompt, reference in prompts
    ]
    for reply, (_, reference) in list(zip(replies, prompts, strict=True))[:SAMPLES_SHOWN]:
        say(f"  reply {reply.text!r}{'' if reply.stopped else ' (never stops)'}  wanted {reference!r}", "dim")
    same = sum(reply.text.strip() == reference.strip() for reply, (_, reference) in zip(replies, prompts, strict=True))
    stopped = sum(reply.stopped for reply in replies)
    say(f"{same} of {len(replies)} sampled held-out replies are as wanted, {stopped} stop by themselves")
    return golden, {"sample_success": same / len(replies), "sample_stop_rate": stopped / len(replies)}


def save_weights(model: Any, folder: Path) -> None:
    """Write PEFT's two files, and nothing of the base."""
    with os_errors("writing", folder):
        model.save_pretrained(folder, save_embedding_layers=False)
        (folder / "README.md").unlink(missing_ok=True)  # PEFT's empty model card


def count(config: RunConfig, examples: list[Example], eval_examples: list[Example]) -> DataCounts:
    """What was trained on, for the manifest."""
    return DataCounts(
        files=[str(path) for path in (config.data, config.eval_data) if path],
        sha256=hash_data(config),
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
    import torch

    return Manifest(
        name=config.name,
        version="",
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        fingerprint=fingerprint,
        base=identity,
        base_dtype=resolved_dtype(config, torch.cuda.is_available()),
        rank=config.rank,
        alpha=config.alpha,
        target_modules=sorted(config.target_modules),
        trainable_parameters=sum(p.numel() for p in model.parameters() if p.requires_grad),
        adapter_bytes=(folder / WEIGHTS).stat().st_size,
        max_lora_rank=config.max_lora_rank,
        stop_tokens=sorted(encoder.stop_tokens),
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


def publish(home: Home, folder: Path, manifest: Manifest) -> Adapter:
    """Give the finished folder the next version number, by a rename that either happens or does not."""
    while True:
        found = versions(home, manifest.name)
        number = int(found[-1].name[1:]) + 1 if found else 1
        target = folder.parent / f"v{number}"
        manifest = manifest.model_copy(update={"version": target.name})
        manifest.write(folder)
        check_whole(folder, manifest)
        try:
            folder.chmod(0o755)
            folder.rename(target)
        except OSError:
            if not target.exists():  # another run took the number; anything else is an error
                raise
            continue
        return Adapter(target, manifest)
