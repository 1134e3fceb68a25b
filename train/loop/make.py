"""The trainer of a run: which class trains the method, and the run configuration in transformers' words.

>>> trainer = make_trainer(model, rows, eval_rows, config, Settings(8192), ways, folder, identity, callbacks)
"""

from pathlib import Path
from typing import Any

from transformers import PrinterCallback, TrainingArguments

from loraport.train.config import ResolvedConfig
from loraport.train.loop.dpo import DpoTrainer
from loraport.train.loop.lora import Device, count_trainable
from loraport.train.loop.packing import Rows
from loraport.train.loop.settings import Settings
from loraport.train.loop.trainer import LoraTrainer, RhythmCallback
from loraport.train.loop.ways import Ways
from loraport.train.memory.machine import Types, choose_optimizer, choose_types

TRAINERS = {"sft": LoraTrainer, "dpo": DpoTrainer}


def make_trainer(
    model: Any,
    rows: Rows,
    eval_rows: Rows,
    config: ResolvedConfig,
    settings: Settings,
    ways: Ways,
    folder: Path,
    identity: dict[str, Any],
    callbacks: list[Any],
    report_to: list[str] | str = "none",
) -> LoraTrainer:
    """A trainer whose checkpoints go to `folder`."""
    rhythm = RhythmCallback()
    trainer = TRAINERS[config.method](
        model=model,
        args=training_arguments(config, count_trainable(model), folder, report_to),
        rows=rows,
        eval_rows=eval_rows,
        config=config,
        settings=settings,
        ways=ways,
        identity=identity,
        callbacks=[rhythm, *callbacks],
    )
    rhythm.trainer = trainer
    trainer.remove_callback(PrinterCallback)
    return trainer


def training_arguments(
    config: ResolvedConfig, parameters: int, folder: Path, report_to: list[str] | str
) -> TrainingArguments:
    """The run configuration in transformers' words."""
    device = Device.here()
    types = choose_types(config, device)
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=config.batch_size,
        num_train_epochs=config.epochs,
        max_steps=config.max_steps or -1,
        optim=optimizer_name(config, device, types, parameters),
        learning_rate=config.learning_rate,
        lr_scheduler_type=config.scheduler,
        warmup_steps=config.warmup_steps,
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        # Without autocast: everything is in its type already, and float32 adapters are cast where they are used.
        bf16=False,
        fp16=types.computed == "float16",
        use_cpu=device.kind == "cpu",
        eval_strategy="steps",
        eval_steps=config.eval_steps,
        save_strategy="steps",
        save_steps=config.save_steps,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=False,
        logging_steps=1,
        logging_nan_inf_filter=False,  # it would hide from us what it finds
        report_to=report_to,
        disable_tqdm=True,
        remove_unused_columns=False,
        ddp_find_unused_parameters=False,
        seed=config.seed,
    )
    if arguments.n_gpu > 1:
        arguments._n_gpu = 1  # else Trainer wraps the model into DataParallel, which would cut our steps apart
    return arguments


def optimizer_name(config: ResolvedConfig, device: Device, types: Types, parameters: int) -> str:
    """The configuration's optimiser in transformers' words."""
    if choose_optimizer(config, types, parameters) == "paged_adamw_8bit":
        return "paged_adamw_8bit"
    return "adamw_torch_fused" if device.kind == "cuda" else "adamw_torch"
