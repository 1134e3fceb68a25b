"""The loop: transformers' Trainer over packed micro-steps.

From transformers: optimiser, schedule, checkpoints, trackers, random states, several GPUs. Ours: what a step is. One
batch of the data loader is a whole optimiser step, cut into micro-steps by `packing`; the loss is a mean over the
targets of the whole step on all GPUs; running out of memory takes the run down a ladder of settings that give the same
result, and the step is made again.

    >>> trainer = LoraTrainer(model=model, rows=rows, eval_rows=eval_rows, config=config, settings=Settings(8192), ...)
    >>> trainer.train()
"""

import contextlib
import gc
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import rotate_checkpoints
from transformers.training_args import OptimizerNames

from loraport.clients.errors import Refused
from loraport.clients.terminal import say
from loraport.train.config import ResolvedConfig
from loraport.train.loop.checkpointing import decoder_layers, set_checkpointing
from loraport.train.loop.checkpoints import SEAL, remove_others, seal, unwritten
from loraport.train.loop.fused import forget
from loraport.train.loop.gpu_memory import peak_memory
from loraport.train.loop.lora import count_trainable
from loraport.train.loop.packing import MicroStep, PackedRows, Rows, Step, StepSampler, largest, micro_step, pack
from loraport.train.loop.settings import Settings, step_down
from loraport.train.loop.shards import Shards
from loraport.train.loop.ways import Ways

WRITE_ERRORS = ("SafetensorError", "PytorchStreamWriter", "inline_container")


class LoraTrainer(Trainer):
    """Trainer of a PeftModel in the ways of `ways.trained`. `tokens_seen` counts tokens of rows on all GPUs."""

    control: Any

    def __init__(
        self,
        *,
        rows: Rows,
        eval_rows: Rows,
        config: ResolvedConfig,
        settings: Settings,
        ways: Ways,
        identity: dict[str, Any],
        **options: Any,
    ) -> None:
        super().__init__(data_collator=Step, train_dataset=rows, eval_dataset=eval_rows, **options)
        self.config, self.ways, self.identity = config, ways, identity
        self.tokens_seen = 0
        self.evaluated = 0, 1  # micro-steps of an evaluation that are done, of so many
        self.shards: Shards | None = None
        self.stop_asked = self.stopping = False  # by this process's signals; by those of any GPU
        self.clock, self.clock_tokens = time.monotonic(), 0
        self.step_loss = torch.zeros(())  # of the step under way
        self.step_seen = torch.zeros(1, dtype=torch.float64)  # this GPU's sums of `loss_of`
        self.step_size = self.step_targets = 0  # on all GPUs
        self.layers = len(decoder_layers(self.model))
        self.longest = max(int(rows.lengths.max()), int(eval_rows.lengths.max()))
        self.use(settings)

    def use(self, settings: Settings) -> None:
        """Go on with these settings. Where nothing may be packed, a micro-step is a row."""
        self.settings = settings
        self.budget = settings.micro_batch_tokens if self.ways.packed else 1
        set_checkpointing(self.model, settings)

    def get_train_dataloader(self) -> DataLoader:
        """One item an optimiser step."""
        self.sampler = StepSampler(
            self.train_dataset.lengths,
            self.config.batch_size,
            self.budget,
            self.config.seed,
            lambda: self.state.global_step // len(self.sampler),
            self.args.process_index,
            self.args.world_size,
        )
        return DataLoader(PackedRows(self.train_dataset), batch_sampler=self.sampler, collate_fn=self.data_collator)

    def training_step(self, model: Any, inputs: Step, num_items_in_batch: Any = None) -> torch.Tensor:
        """Forward and backward of one optimiser step; its loss in nats a target."""
        model.train()
        while True:
            try:
                return self.accumulate(model, inputs)
            except torch.OutOfMemoryError:
                lower = step_down(self.settings, self.layers, self.longest)
                if lower is None or self.args.world_size > 1:  # the others wait for a step that we cannot repeat
                    raise
            # Outside of the except clause, whose exception holds on to the tensors.
            self.step_down_to(model, lower)
            inputs = Step([micro_step(self.train_dataset, members) for members in self.sampler.packs(inputs.rows)])

    def step_down_to(self, model: Any, lower: Settings) -> None:
        """Free what the failed step holds, and use less."""
        self.release()
        model.zero_grad()
        gc.collect()
        torch.cuda.empty_cache()
        self.use(lower)
        self.sampler.budget = self.budget
        say(f"note: out of GPU memory; going on with {lower.words(self.layers)} (the result is the same)", "yellow")

    def rehearse(self) -> None:
        """Forward and backward of the largest micro-step that can come, before the first step: what fits now fits to
        the end. It leaves nothing behind, neither gradients nor other random numbers.
        """
        states = torch.random.get_rng_state(), torch.cuda.get_rng_state()
        model = self.model_wrapped.train()
        while True:
            failed = torch.zeros((), device=self.args.device)
            try:
                # By itself: were one GPU out of memory within a sum over all of them, the others would wait for ever.
                with self.accelerator.no_sync(model):
                    self.try_largest(model)
            except torch.OutOfMemoryError:
                failed += 1
            if self.args.world_size > 1:
                torch.distributed.all_reduce(failed)
            lower = step_down(self.settings, self.layers, self.longest) if failed else None
            if not failed or lower is None:
                break
            self.step_down_to(model, lower)
        model.zero_grad()
        torch.random.set_rng_state(states[0])
        torch.cuda.set_rng_state(states[1])
        if failed:
            raise torch.OutOfMemoryError("the largest micro-step does not fit")

    def try_largest(self, model: Any) -> None:
        """With room kept for the optimiser's states, which come with the first step of it."""
        states = torch.empty(self.state_bytes(model), dtype=torch.uint8, device=self.args.device)
        micro = largest(self.train_dataset, self.config.batch_size, self.budget)
        loss, _ = self.loss_of(model, self.given(micro, self.train_dataset), 0.0)
        self.accelerator.backward(loss)
        self.release()
        del states

    def state_bytes(self, model: Any) -> int:
        """Of the optimiser: two numbers for each parameter, of 8 or of 32 bits."""
        return (2 if "8bit" in OptimizerNames(self.args.optim).value else 8) * count_trainable(model)

    def prepare(self) -> bool:
        """What a method needs before the first step; False where that was cut off by a signal."""
        return True

    def given(self, micro: MicroStep, rows: Rows) -> dict[str, Any]:
        """What `loss_of` takes of a micro-step of `rows`, on the device."""
        return micro.to(self.args.device)

    def loss_of(self, model: Any, inputs: dict[str, Any], scale: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
        """The loss of a micro-step, summed over what it is a mean of, times `scale`; and sums for `figures_of`."""
        loss, right = model(**inputs, scale=scale)
        return loss, right.double()[None]

    def size_of(self, micro: MicroStep) -> int:
        """How many the loss is a mean of in a micro-step: its targets."""
        return len(micro.targets_K)

    def figures_of(self, seen: list[float], size: int) -> dict[str, float]:
        """Means of the sums of `loss_of` over a step or an evaluation of that size."""
        return {"token_accuracy": seen[0] / max(size, 1)}

    def accumulate(self, model: Any, step: Step) -> torch.Tensor:
        """Gradients of all micro-steps; returns the sum of their parts of the loss."""
        forget(self.model)
        # All at once: a copy from the host waits for what the GPU is doing.
        given = [self.given(micro, self.train_dataset) for micro in step.micro_steps]
        own = sum(self.size_of(micro) for micro in step.micro_steps)
        targets = sum(len(micro.targets_K) for micro in step.micro_steps)
        size, targets, tokens, stop = self.sum_up([own, targets, step.tokens, int(self.stop_asked)])
        self.stopping = stop > 0
        total, total_seen = torch.zeros((), device=self.args.device), None
        for number, inputs in enumerate(given, 1):
            last = number == len(given)
            with contextlib.nullcontext() if last else self.accelerator.no_sync(model):
                # DistributedDataParallel averages over the GPUs what is here a sum.
                loss, seen = self.loss_of(model, inputs, self.args.world_size / max(size, 1))
                self.accelerator.backward(loss)
            self.release()
            total += loss.detach()
            total_seen = seen if total_seen is None else total_seen + seen
        self.tokens_seen += tokens
        self.step_loss, self.step_seen, self.step_size, self.step_targets = total, total_seen, size, targets
        return total

    def sum_up(self, own: list[int]) -> list[int]:
        """Counts of this GPU over all GPUs."""
        if self.args.world_size > 1:
            counts = torch.tensor(own, device=self.args.device)
            torch.distributed.all_reduce(counts)
            own = counts.tolist()
        return own

    def release(self) -> None:
        """Let go of the layers that the others' shares made whole."""
        if self.shards:
            self.shards.release()

    def _clip_grad_norm(self, model: Any) -> Any:
        """Clip, and end the run before a loss or gradient that is not finite reaches the weights."""
        norm = super()._clip_grad_norm(model)
        if not math.isfinite(float(self.step_loss)):
            raise diverged("the loss", float(self.step_loss), self.state.global_step + 1, self.state.max_steps)
        if self.accelerator.scaler is None and not math.isfinite(float(norm)):  # a scaler skips such steps itself
            raise diverged("the gradient", float(norm), self.state.global_step + 1, self.state.max_steps)
        return norm

    def passes(self, rows: Rows) -> Iterator[tuple[MicroStep, int]]:
        """Micro-steps of all `rows` for this GPU, and how many there are.

        Equally many on each GPU, because a base in shares is gathered by all of them together: one without targets
        keeps the others company.
        """
        packs = pack([int(length) for length in rows.lengths], self.budget)
        world = self.args.world_size
        turns = -(-len(packs) // world)
        for turn in range(turns):
            number = turn * world + self.args.process_index
            counted = number < len(packs)
            yield micro_step(rows, tuple(packs[number] if counted else packs[-1]), counted), turns

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """The loss and the figures of the method over all evaluation rows."""
        self.model_wrapped.eval()
        forget(self.model)
        found = []
        for number, (micro, turns) in enumerate(self.passes(self.eval_dataset), 1):
            with torch.no_grad():
                loss, seen = self.loss_of(self.model, self.given(micro, self.eval_dataset))
            size = torch.tensor([self.size_of(micro)]).to(seen)
            found.append(torch.cat([loss.double()[None], size, seen]))
            self.evaluated = number, turns
            self.control = self.callback_handler.on_prediction_step(self.args, self.state, self.control)
        sums = torch.stack(found).sum(0)
        if self.args.world_size > 1:
            torch.distributed.all_reduce(sums)
        loss, count, *seen = sums.tolist()
        if not math.isfinite(loss):
            raise diverged("the evaluation loss", loss, self.state.global_step, self.state.max_steps)
        figures = self.evaluation_of(loss / count, seen, int(count))
        metrics = {f"eval_{name}": value for name, value in figures.items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        self.clock, self.clock_tokens = time.monotonic(), self.tokens_seen
        return metrics

    def evaluation_of(self, loss: float, seen: list[float], size: int) -> dict[str, float]:
        """Figures of an evaluation by name: mean loss in nats, perplexity and token accuracy over all targets."""
        return {"loss": loss, "perplexity": math.exp(min(loss, 700.0))} | self.figures_of(seen, size)

    def log(self, logs: dict[str, float], *args: Any, **options: Any) -> None:
        """With tokens/s since the last log, the peak of memory in GiB, how many targets, and the method's figures."""
        if "loss" in logs:
            counts = (
                entry["trained_tokens"] for entry in reversed(self.state.log_history) if "trained_tokens" in entry
            )
            logs["trained_tokens"] = next(counts, 0) + self.step_targets
            if self.args.world_size > 1:
                torch.distributed.all_reduce(self.step_seen)
            logs |= self.figures_of(self.step_seen.tolist(), self.step_size)
            now = time.monotonic()
            logs["tokens_per_second"] = (self.tokens_seen - self.clock_tokens) / max(now - self.clock, 1e-9)
            logs["memory_gib"] = peak_memory() / 2**30
            self.clock, self.clock_tokens = now, self.tokens_seen
        super().log(logs, *args, **options)

    def _save_checkpoint(self, *args: Any, **options: Any) -> None:
        """transformers' checkpoint, sealed; ResourceError when the disk does not take it, the last one stays whole."""
        folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        try:
            if self.args.should_save:
                (folder / SEAL).unlink(missing_ok=True)
            super()._save_checkpoint(*args, **options)
            self.accelerator.wait_for_everyone()  # each GPU writes its random state
            if self.args.should_save:
                seal(folder, self.identity)
                remove_others(folder, {entry["step"] for entry in self.state.log_history if "eval_loss" in entry})
                # Not by transformers, which removes older ones before this one is whole, and the last at the end.
                keep, best = self.config.kept_checkpoints, self.state.best_model_checkpoint
                rotate_checkpoints(self.args.output_dir, keep, best)
        except Exception as error:
            if not is_write_error(error):
                raise
            raise unwritten(folder, error) from error

    def _run_epoch(self, *args: Any, **options: Any) -> None:
        """An epoch; not where a run is continued that --max-steps had ended within it: it would make one more step."""
        if self.state.global_step < self.state.max_steps:
            super()._run_epoch(*args, **options)

    def floating_point_ops(self, inputs: Any) -> int:
        """Not counted: transformers' figure knows neither LoRA nor packing."""
        return 0

    def _get_num_items_in_batch(self, *_: Any, **__: Any) -> None:
        """Counted in `accumulate`."""


def is_write_error(error: Exception) -> bool:
    """Whether it says that a file could not be written; torch and safetensors have their own ways to say so."""
    said = f"{type(error).__name__} {error}"
    return isinstance(error, OSError) or any(part in said for part in WRITE_ERRORS)


def diverged(what: str, value: float, step: int, steps: int) -> Refused:
    """The end of a run whose figures are no longer numbers."""
    return Refused(
        f"the run diverged: {what} is {value} at step {step} of {steps}.",
        "lower --learning-rate, or look at the rows with `loraport data check`; no version was stored",
    )


class RhythmCallback(TrainerCallback):
    """The largest micro-step first; an evaluation after the last step too, so that the last weights have a figure."""

    trainer: LoraTrainer | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """A CPU has no memory of its own to run out of."""
        if self.trainer and args.device.type == "cuda":
            self.trainer.rehearse()

    def on_evaluate(
        self, args: Any, state: Any, control: Any, metrics: dict[str, float] | None = None, **_: Any
    ) -> None:
        """Save what is the best so far, also between two checkpoints: else those weights would be gone."""
        if metrics and metrics["eval_loss"] < (math.inf if state.best_metric is None else state.best_metric):
            control.should_save = True

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """At the end of the run: evaluate and save."""
        if state.global_step >= state.max_steps:
            control.should_evaluate = control.should_save = True
