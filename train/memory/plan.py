"""What fits, and with which settings: the fastest layout of a step whose memory stays within a limit.

A pure function of configuration, shape and machine; `loraport plan train` prints it, `loraport train` asks it for what
the configuration leaves open. None of these settings changes the result of a run: they trade memory for speed.

    >>> made = plan(config, shape, find_machine(None, "T4"))
    >>> made.fits, made.settings.micro_batch_tokens, made.settings.checkpointed_layers
    (True, 4096, 24)
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, Literal

from loraport.clients.errors import ConfigError, ResourceError
from loraport.train.config import ResolvedConfig
from loraport.train.defaults import Choice
from loraport.train.memory.load import Load
from loraport.train.memory.machine import GIB, GPUS, Machine, Types, choose_optimizer, choose_types
from loraport.train.memory.parts import Counted, Layout, Parts, Sharding
from loraport.train.memory.servable import check_servable
from loraport.train.memory.shapes import Shape, check_targets
from loraport.train.memory.speed import DDP_EFFICIENCY, FSDP_EFFICIENCY, adapter_bytes, relative_time

MOST_TOKENS = 16_384  # beyond it a micro-step gains no more speed on any GPU (speed.HALF_SPEED_TOKENS)
LEAST_LENGTH = 256  # of the rows that are proposed where longer ones do not fit
OPEN: dict[str, Any] = {"checkpointing": "auto", "micro_batch_tokens": None}  # left to the plan
RUNGS = ("off", "half", "full", "offload")


@dataclass(frozen=True)
class Settings:
    """What a run is told. `checkpointing` in the configuration's words; auto where the number is one in between."""

    micro_batch_tokens: int
    checkpointed_layers: int
    offload: bool
    checkpointing: str
    sharding: Sharding
    gpus: int
    held: str
    computed: str
    optimizer: str


@dataclass(frozen=True)
class Rung:
    """A step of the ladder: the largest micro-step that fits with it, or the smallest there is where none fits."""

    checkpointing: str
    sharding: Sharding
    micro_batch_tokens: int
    peak: int
    fits: bool


@dataclass(frozen=True)
class Alternative:
    """A change that would fit where the configuration does not, and the peak it leads to in bytes."""

    change: str
    peak: int


@dataclass(frozen=True)
class Plan:
    """Settings, memory and verdict. Sizes in bytes, on each GPU."""

    settings: Settings
    parts: Parts
    fits: bool
    machine: Machine
    load: Load
    layout: Layout
    trainable_parameters: int
    adapter_bytes: int
    choices: tuple[Choice, ...]
    ladder: tuple[Rung, ...]
    alternatives: tuple[Alternative, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def verdict(self) -> str:
        """One sentence."""
        need, have = gib(self.parts.peak), gib(self.machine.memory)
        where = f"on each of {self.machine.gpus} × {self.machine.name}" if self.machine.gpus > 1 else self.machine.name
        if self.fits:
            return f"It fits: at most {need} of {have}, {where}."
        return f"It does not fit: at least {need} are needed, and {have} are there, {where}."


def plan(config: ResolvedConfig, shape: Shape, machine: Machine, longest: int | None = None) -> Plan:
    """The fastest settings for `config` that fit `machine`, or the smallest there are, with `fits` False.

    `longest`: tokens of the longest row where rows were read, of a pair those of both sequences; the configuration's
    sequence length else. Raises
    ConfigError for targets that the base lacks, BaseModelError for bases on which vLLM takes no adapters.
    """
    check_servable(shape.architectures, config.model)
    check_targets(shape, config.target_modules, config.model)
    load = load_of(config, shape, machine)
    most = row_tokens(config)
    longest = max(16, min(longest or most, most))
    counted = Counted(shape, load)
    layout, fits = choose_layout(config, counted, machine, longest)
    parts = counted.memory(layout)
    return Plan(
        settings=settings_of(shape, load, layout),
        parts=parts,
        fits=fits,
        machine=machine,
        load=load,
        layout=layout,
        trainable_parameters=shape.trainable_parameters(config.rank, config.target_modules),
        adapter_bytes=adapter_bytes(shape, config.rank, config.target_modules),
        choices=explain(config, shape, load, layout, machine, longest, fits),
        ladder=tuple(climb(config, counted, machine, longest)),
        alternatives=() if fits else tuple(find_alternatives(config, shape, machine, longest, parts.peak)),
        notes=tuple(doubts(config, counted, machine, layout, longest)),
    )


def row_tokens(config: ResolvedConfig) -> int:
    """Tokens that a row may have: a pair of DPO is two sequences, which a micro-step keeps together.

    Its loss needs no more than that of as many tokens elsewhere: what is kept of a reply is the gradient of its hidden
    states, as in any row, and it is scaled later instead of at once (train/loop/loss.py). The pass over the rows
    for the base's log-probabilities has no backward, no gradients and no states beside it.
    """
    return config.sequences * config.sequence_length


def require_fit(made: Plan) -> None:
    """ResourceError with what would fit, unless the plan fits."""
    if not made.fits:
        changes = "; or ".join(each.change for each in made.alternatives)
        other = "; `loraport plan train --gpu-name 4090` tells what another machine would do"
        smaller = "use a smaller model" + (other if made.machine.kind == "cpu" else "")
        raise ResourceError(made.verdict, changes or smaller)


def load_of(config: ResolvedConfig, shape: Shape, machine: Machine) -> Load:
    """What the configuration trains of a model, and how it is held on `machine`."""
    parameters = shape.trainable_parameters(config.rank, config.target_modules)
    types = choose_types(config, machine)
    if config.optimizer == "paged_adamw_8bit" and machine.kind != "cuda":
        raise ConfigError("optimizer paged_adamw_8bit needs an NVIDIA GPU, and there is none here.", "leave it away")
    return Load(
        types=types,
        rank=config.rank,
        targets=config.target_modules,
        dropout=config.dropout,
        double_quant=config.double_quant,
        optimizer=choose_optimizer(config, types, parameters),
        device=machine.kind,
        attention=attention_of(machine, types),
    )


def attention_of(machine: Machine, types: Types) -> Literal["flash", "joined"]:
    """How attention will run on `machine`, in the words of Load."""
    return "joined" if machine.kind == "cpu" or not machine.has_bf16 or types.width == 4 else "flash"


def choose_layout(config: ResolvedConfig, counted: Counted, machine: Machine, longest: int) -> tuple[Layout, bool]:
    """The fastest layout that fits, and True; the smallest one and False where none does.

    Inputs go to the host only where nothing else fits: what that costs depends on the host.
    """
    fitting = [
        layout
        for tokens in token_choices(config, longest, machine.gpus)
        for sharding in shardings(machine.gpus)
        for layout in fewest_checkpoints(config.checkpointing, counted, machine, tokens, sharding)
    ]
    if fitting:
        near = [layout for layout in fitting if not layout.offload] or fitting
        return min(near, key=lambda layout: time_of(layout, counted, longest)), True
    tokens, sharding = token_choices(config, longest, machine.gpus)[-1], shardings(machine.gpus)[-1]
    return layouts_of(config.checkpointing, counted.shape, tokens, sharding, machine)[-1], False


def token_choices(config: ResolvedConfig, longest: int, gpus: int) -> list[int]:
    """Sizes of a micro-step to try, largest first: no more than a step has or than brings speed, at least a row."""
    if config.micro_batch_tokens:
        return [max(config.micro_batch_tokens, longest)]
    step = -(-config.batch_size // gpus) * longest
    most = max(longest, min(step, MOST_TOKENS))
    halves = [size for size in (most >> shift for shift in range(16)) if size > longest]
    return [*halves, longest]


def shardings(gpus: int) -> list[Sharding]:
    """Ways to spread a run over GPUs, fastest first: a copy of the base on each, or a share of it."""
    return ["none"] if gpus == 1 else ["ddp", "fsdp"]


def layouts_of(checkpointing: str, shape: Shape, tokens: int, sharding: Sharding, machine: Machine) -> list[Layout]:
    """The layouts that a configured checkpointing allows, least of it first; auto: any number of layers."""
    count = len(shape.blocks)
    numbers = {"off": [0], "half": [count // 2], "full": [count], "offload": [], "auto": range(count + 1)}[
        checkpointing
    ]
    made = [Layout(tokens, number, False, sharding, machine.gpus) for number in numbers]
    if checkpointing not in ("auto", "offload"):
        return made
    return [*made, Layout(tokens, count, machine.kind == "cuda", sharding, machine.gpus)]  # a CPU is its own host


def fewest_checkpoints(
    checkpointing: str, counted: Counted, machine: Machine, tokens: int, sharding: Sharding
) -> list[Layout]:
    """The layout with the fewest checkpointed layers that fits, if any does."""
    layouts = layouts_of(checkpointing, counted.shape, tokens, sharding, machine)
    return list(islice((layout for layout in layouts if counted.memory(layout).peak <= machine.memory), 1))


def time_of(layout: Layout, counted: Counted, length: int) -> float:
    """Relative time for each token."""
    spread = {"none": 1.0, "ddp": DDP_EFFICIENCY, "fsdp": FSDP_EFFICIENCY}[layout.sharding]
    return relative_time(counted.shape, counted.load, layout, length) / spread


def climb(config: ResolvedConfig, counted: Counted, machine: Machine, longest: int) -> Iterator[Rung]:
    """Every rung that the configuration allows, with the largest micro-step that fits."""
    rungs = RUNGS if machine.kind == "cuda" else RUNGS[:-1]
    names = rungs if config.checkpointing == "auto" else (config.checkpointing,)
    for sharding in shardings(machine.gpus):
        for name in names:
            for tokens in token_choices(config, longest, machine.gpus):
                (layout,) = layouts_of(name, counted.shape, tokens, sharding, machine)
                peak = counted.memory(layout).peak
                if peak <= machine.memory:
                    break
            yield Rung(name, sharding, tokens, peak, peak <= machine.memory)


def settings_of(shape: Shape, load: Load, layout: Layout) -> Settings:
    """The layout in the words of the configuration."""
    count = len(shape.blocks)
    named = {0: "off", count // 2: "half", count: "offload" if layout.offload else "full"}
    return Settings(
        micro_batch_tokens=layout.tokens,
        checkpointed_layers=layout.checkpointed,
        offload=layout.offload,
        checkpointing=named.get(layout.checkpointed, "auto"),
        sharding=layout.sharding,
        gpus=layout.gpus,
        held=load.types.held,
        computed=load.types.computed,
        optimizer=load.optimizer,
    )


def explain(
    config: ResolvedConfig, shape: Shape, load: Load, layout: Layout, machine: Machine, longest: int, fits: bool
) -> tuple[Choice, ...]:
    """The settings with the reason for each."""
    own = "as given" if config.load != "auto" else f"what {'a GPU' if machine.kind == 'cuda' else 'a CPU'} computes in"
    size = shape.trainable_parameters(config.rank, config.target_modules)
    states = "as given" if config.optimizer != "auto" else f"for {size:,} parameters on a base in {load.types.held}"
    made = [
        Choice("base held in", load.types.held, own),
        Choice("optimizer", load.optimizer, states),
        Choice("micro batch tokens", f"{layout.tokens:,}", why_tokens(config, layout, longest, fits)),
        Choice("checkpointing", *why_checkpoints(config, shape, layout, fits)),
    ]
    if machine.gpus > 1:
        reason = "a copy on each GPU fits" if layout.sharding == "ddp" else "a copy on each GPU does not fit"
        made.append(Choice("spread", layout.sharding.upper(), reason))
    return tuple(made)


def why_tokens(config: ResolvedConfig, layout: Layout, longest: int, fits: bool) -> str:
    """The reason for the size of a micro-step."""
    if config.micro_batch_tokens:
        given = config.micro_batch_tokens >= longest
        return "as given" if given else f"a row of {longest:,} tokens cannot be cut in two"
    if layout.tokens >= -(-config.batch_size // layout.gpus) * longest:
        return "a whole step at once"
    if layout.tokens == MOST_TOKENS:
        return "more brings no speed"
    if layout.tokens == longest:
        return "the longest row: no less is possible" + ("" if fits else ", and that does not fit")
    return "the fastest of what fits"


def why_checkpoints(config: ResolvedConfig, shape: Shape, layout: Layout, fits: bool) -> tuple[str, str]:
    """(number of layers in words, reason)."""
    count, number = len(shape.blocks), layout.checkpointed
    words = "off" if number == 0 else f"{number} of {count} layers" + (", inputs on the host" if layout.offload else "")
    if config.checkpointing != "auto":
        return words, "as given"
    if number == 0:
        return words, "all activations fit"
    if not fits:
        return words, "the least memory there is"
    return words, "nothing less fits" if layout.offload else "as few as fit"


def find_alternatives(
    config: ResolvedConfig, shape: Shape, machine: Machine, longest: int, peak: int
) -> Iterator[Alternative]:
    """Changes that fit, each alone, those first that cost least; then the GPU that would."""

    def attempt(change: str, where: Machine = machine, **settings: Any) -> list[Alternative]:
        other = config.model_copy(update=settings)
        counted = Counted(shape, load_of(other, shape, where))
        layout, fits = choose_layout(other, counted, where, min(longest, row_tokens(other)))
        return [Alternative(change, counted.memory(layout).peak)] if fits else []

    is_gpu = machine.kind == "cuda"
    if config.checkpointing != "auto" or config.micro_batch_tokens:
        left_open = attempt("without --checkpointing and --micro-batch-tokens", **OPEN)
        if left_open:
            yield from left_open
            return
    smaller: dict[str, Any] = dict(OPEN)
    words = ""
    if is_gpu and config.load != "nf4":
        quantised = attempt("--load nf4", load="nf4")
        yield from quantised
        if not quantised:
            smaller["load"], words = "nf4", "--load nf4 "
    for length in halves(longest // config.sequences):
        found = attempt(f"{words}--sequence-length {length}", sequence_length=length, **smaller)
        yield from found
        if found:
            break
    if config.rank > 8:
        yield from attempt(f"{words}--rank 8", rank=8, **smaller)
    if is_gpu:
        yield from larger_machines(attempt, machine, peak)


def halves(longest: int) -> list[int]:
    """Shorter rows to try."""
    return [length for shift in range(1, 16) if (length := longest >> shift) >= LEAST_LENGTH]


def larger_machines(attempt: Callable[..., list[Alternative]], machine: Machine, peak: int) -> Iterator[Alternative]:
    """The fewest such GPUs that share the run, and one GPU that holds it alone."""
    for gpus in (each for each in (2, 4, 8) if each > machine.gpus):
        found = attempt(f"{gpus} such GPUs (--gpus {gpus})", replace(machine, gpus=gpus))
        yield from found
        if found:
            break
    enough = sorted((gpu for gpu in GPUS if gpu.memory * GIB >= peak), key=lambda gpu: gpu.memory)
    yield Alternative(f"a GPU with {gib(peak)} free" + (f", such as {enough[0].name}" if enough else ""), peak)


def doubts(config: ResolvedConfig, counted: Counted, machine: Machine, layout: Layout, longest: int) -> Iterator[str]:
    """What the figures do not know, and what else is needed."""
    shape = counted.shape
    if config.method == "dpo":
        yield "before the first step the base's log-probabilities are computed, once: at most half an epoch's time."
    if layout.offload:
        host = layout.checkpointed * layout.tokens * shape.hidden * counted.load.types.width * machine.gpus
        yield f"inputs of layers go to the host: {gib(host)} of its memory must be free."
    if not shape.is_fused:
        yield (
            f"the layers of {shape.model_type} run as transformers has them: their activations are counted twice over, "
            f"and may still differ."
        )
    if not shape.has_plain_head:
        yield f"{shape.model_type} caps or scales its logits: the loss takes all trained tokens at once."
    if machine.kind == "cuda" and (not machine.has_bf16 or counted.load.types.width == 4):
        yield "there is no flash attention for this GPU and type: attention may need more memory than is counted here."
    if machine.kind == "cpu":
        yield "memory on a CPU is rougher than on a GPU: other programs and the operating system share it."
    if shape.longest and (length := longest // config.sequences) > shape.longest:
        yield f"rows of {length:,} tokens are longer than the {shape.longest:,} that the model was made for."
    matched = [linear.path for linear in shape.outside if linear in shape.targeted(config.target_modules)]
    if matched:
        yield f"{len(matched)} linear layers outside of the language model get an adapter too, first {matched[0]}."


def gib(size: int) -> str:
    """A size in GiB, or MiB below a tenth of one."""
    return f"{size / GIB:.1f} GiB" if size >= GIB // 10 else f"{size / (1 << 20):.1f} MiB"
