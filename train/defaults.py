"""What a run configuration leaves open, derived from the data and the model, each value with its reason.

Rules are from "LoRA Without Regret" (Schulman et al., 2025) where it has one: as many adapter parameters as tokens to
learn, small batches, and a learning rate about ten times full fine-tuning's that hardly depends on the rank. Those for
preferences (DPO) follow what its users publish: a low rate, few epochs. What decides about memory alone is not here but
in train/memory.

    >>> facts = replace(Facts.of_base(base.config), rows=3477, tokens=2_400_000, trained_tokens=310_000, longest=1012)
    >>> config, choices = resolve(load_config(Path("run.yaml"), {}), facts)
    >>> choices[0]
    Choice(name='sequence length', value='1024', reason='the longest row, 1,012 tokens, rounded up')
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from loraport.clients.terminal import say
from loraport.train.config import ResolvedConfig, RunConfig, explain_invalid
from loraport.train.presets import PRESETS

RANKS = (8, 16, 32, 64)
LENGTH_MULTIPLE, LENGTH_WITHOUT_DATA = 64, 2048
# (rows below which it holds, rows a step): small batches learn more from few rows, and LoRA loses from 32 on.
BATCHES = ((100, 4), (1000, 8), (math.inf, 16))
# (rows below which it holds, epochs)
EPOCHS = ((100, 5.0), (500, 3.0), (2000, 2.0), (math.inf, 1.0))
# Peak rate of LoRA at hidden size H: 5e-5 * 10 * (2000 / H) ** 0.781, the fit of tinker-cookbook's get_lr for Llama.
# Its exponent for Qwen is 0.0775, which gives more; the lower rate is the safer one.
RATE_AT_2000, RATE_EXPONENT, RATE_BOUNDS = 5e-4, 0.781, (1e-4, 1e-3)
# Of DPO. Rafailov et al. (2023) take beta 0.1. Its rate is a tenth of SFT's in Tulu 3, a fortieth in Zephyr (QLoRA:
# 5e-6 of 2e-4), 5e-6 to 1e-5 in the LoRA recipes of LLaMA-Factory and Tinker for models of 8B: a twentieth lies among
# them. A pair says little more than one bit, and what is repeated longer drives both replies out of the model.
BETA, DPO_RATE_SHARE, DPO_RANK = 0.1, 20, 16
DPO_EPOCHS = ((500, 3.0), (2000, 2.0), (math.inf, 1.0))
WARMUP_SHARE, WARMUP_MOST = 0.05, 20
# An evaluation's share of the time, the steps from one to the next, and how many a run has, epochs aside.
EVAL_SHARE, EVAL_LEAST_STEPS, EVAL_MOST = 0.05, 50, 20


@dataclass(frozen=True)
class Facts:
    """What is known of data and model. None: unknown, as before anything was read.

    `longest` and the rest of the data are in tokens, evaluation rows aside; `width` is the sum of inputs and outputs of
    all linear layers, the head's aside: the parameters of an adapter of rank 1 on all of them.
    """

    rows: int | None = None
    tokens: int | None = None
    trained_tokens: int | None = None
    longest: int | None = None
    eval_rows: int | None = None
    hidden_size: int | None = None
    max_positions: int | None = None
    width: int | None = None

    @classmethod
    def of_base(cls, config: dict[str, Any]) -> "Facts":
        """What a config.json tells; `width` as for a Llama of that shape, which is near enough to choose a rank."""
        text = config.get("text_config") or config
        hidden, layers = first(text, "hidden_size", "n_embd", "d_model"), first(text, "num_hidden_layers", "n_layer")
        positions = first(text, "max_position_embeddings", "n_positions", "max_seq_len")
        if not hidden or not layers:
            return cls(hidden_size=hidden, max_positions=positions)
        heads = first(text, "num_attention_heads", "n_head") or 1
        head = text.get("head_dim") or hidden // heads
        queries, keys = heads * head, (text.get("num_key_value_heads") or heads) * head
        inner = first(text, "intermediate_size", "n_inner", "ffn_dim") or 4 * hidden
        width = layers * (2 * (hidden + queries) + 2 * (hidden + keys) + 3 * (hidden + inner))
        return cls(hidden_size=hidden, max_positions=positions, width=width)


@dataclass(frozen=True)
class Choice:
    """A derived setting in words, its value, and why it has that value."""

    name: str
    value: str
    reason: str


def resolve(config: RunConfig, facts: Facts) -> tuple[ResolvedConfig, list[Choice]]:
    """`config` with a value for all that decides the result, and what was derived. What is given stays as it is.

    Pure: the same configuration and facts give the same result. ConfigError when given and derived contradict.
    """
    filled = config.model_dump()
    choices: list[Choice] = []

    def fill(field: str, derived: tuple[Any, str]) -> None:
        if filled[field] is None:
            filled[field] = derived[0]
            choices.append(Choice(field.replace("_", " "), in_words(derived[0]), derived[1]))

    fill("sequence_length", choose_length(facts))
    fill("rank", choose_rank(facts, config.method))
    filled["alpha"] = config.alpha or PRESETS[config.preset].alpha_for(filled["rank"], config.rslora)
    fill("batch_size", choose_batch(facts))
    fill("epochs", choose_epochs(facts, config.method))
    fill("learning_rate", choose_rate(facts, config.learning_rate_multiplier, config.method))
    if config.method == "dpo":
        fill("beta", (BETA, "as in the method's paper; lower strays further from the base"))
    filled["learning_rate_multiplier"] = None  # it is in the rate now
    an_epoch, total = count_steps(config, facts, filled["batch_size"], filled["epochs"])
    fill("warmup_steps", choose_warmup(config, total))
    filled["warmup_ratio"] = None  # it is in the steps now
    evaluated = min(config.eval_rows, facts.eval_rows or config.eval_rows)
    fill("eval_steps", choose_evaluations(an_epoch, total, evaluated / filled["batch_size"], config.save_steps))
    filled["save_steps"] = config.save_steps or filled["eval_steps"]
    try:
        return ResolvedConfig.model_validate(filled), choices
    except ValidationError as error:
        raise explain_invalid(error, "the configuration for this data") from error


def choose_length(facts: Facts) -> tuple[int, str]:
    """Tokens that a row may have: as many as the longest has."""
    limit = facts.max_positions or math.inf
    if facts.longest is None:
        return int(min(LENGTH_WITHOUT_DATA, limit)), "no rows to look at"
    length = math.ceil(max(facts.longest, 16) / LENGTH_MULTIPLE) * LENGTH_MULTIPLE
    if length > limit:
        return int(limit), "the model's own limit"
    return length, f"the longest row, {facts.longest:,} tokens, rounded up"


def choose_rank(facts: Facts, method: str = "sft") -> tuple[int, str]:
    """The smallest of RANKS with as many parameters on all linear layers as there are tokens to learn.

    DPO learns no tokens: what a pair tells, a low rank holds.
    """
    if method == "dpo":
        return DPO_RANK, "preferences hold little to learn, a common choice"
    if not facts.width or facts.trained_tokens is None:
        return 16, "a common choice; no rows to count tokens in"
    enough = [rank for rank in RANKS if rank * facts.width >= facts.trained_tokens]
    rank = enough[0] if enough else RANKS[-1]
    count = f"{millions(rank * facts.width)} parameters for {millions(facts.trained_tokens)} tokens to learn"
    return rank, count if enough else f"the most by default: {count}"


def choose_batch(facts: Facts) -> tuple[int, str]:
    """Rows a step, however many GPUs there are: it decides about the result."""
    if facts.rows is None:
        return 16, "LoRA prefers fewer than 32"
    size = next(size for below, size in BATCHES if facts.rows < below)
    return size, f"{facts.rows:,} rows; LoRA prefers fewer than 32"


def choose_epochs(facts: Facts, method: str = "sft") -> tuple[float, str]:
    """Passes over the rows."""
    if facts.rows is None:
        return 1.0, "as for thousands of rows"
    table = DPO_EPOCHS if method == "dpo" else EPOCHS
    epochs = next(epochs for below, epochs in table if facts.rows < below)
    if epochs == 1:
        return epochs, f"{facts.rows:,} rows are enough for one; a second tends to overfit"
    return epochs, f"{facts.rows:,} rows are few; more epochs than that tend to overfit"


def choose_rate(facts: Facts, multiplier: float | None = None, method: str = "sft") -> tuple[float, str]:
    """Peak learning rate to one digit, by the width of the model; times `multiplier` where there is one."""
    rate, why = 2e-4, "a common choice; the model does not tell its hidden size"
    if facts.hidden_size:
        low, high = RATE_BOUNDS
        rate = RATE_AT_2000 * (2000 / facts.hidden_size) ** RATE_EXPONENT
        rate = float(f"{min(high, max(low, rate)):.0e}")
        why = f"ten times full fine-tuning's at a hidden size of {facts.hidden_size:,}"
    if method == "dpo":
        rate = float(f"{rate / DPO_RATE_SHARE:.0e}")
        why = f"a twentieth of sft's, which is {why}"
    if multiplier is None:
        return rate, why
    return float(f"{rate * multiplier:.4g}"), f"{multiplier:g} times {in_words(rate)}: {why}"


def count_steps(config: RunConfig, facts: Facts, batch_size: int, epochs: float) -> tuple[int | None, int | None]:
    """Steps in an epoch and in the whole run; None where the rows are unknown."""
    if facts.rows is None:
        return None, config.max_steps
    an_epoch = max(1, math.ceil(facts.rows / batch_size))
    return an_epoch, config.max_steps or math.ceil(an_epoch * epochs)


def choose_warmup(config: RunConfig, total: int | None) -> tuple[int, str]:
    """Steps in which the learning rate rises: the share that is given, else 5% and no more than 20."""
    if config.warmup_ratio is not None and total:
        return round(total * config.warmup_ratio), f"{config.warmup_ratio:.0%} of {total:,} steps"
    if total is None or total * WARMUP_SHARE >= WARMUP_MOST:
        return WARMUP_MOST, f"{WARMUP_SHARE:.0%} of the steps and no more than {WARMUP_MOST}"
    return round(total * WARMUP_SHARE), f"{WARMUP_SHARE:.0%} of {total:,} steps"


def choose_evaluations(
    an_epoch: int | None, total: int | None, batches: float, save_steps: int | None
) -> tuple[int, str]:
    """Steps from one evaluation to the next: evenly over the run, at least one an epoch, within 5% of the time.

    An evaluation of `batches` batches is forward only, about a third of as many steps of training.
    """
    if save_steps:
        return save_steps, "at each checkpoint"
    if an_epoch is None or total is None:
        return EVAL_LEAST_STEPS, "no rows to count steps of"
    apart = max(EVAL_LEAST_STEPS, math.ceil(batches / 3 / EVAL_SHARE))
    epochs = math.ceil(total / an_epoch)
    times = max(epochs, min(EVAL_MOST, total // apart))
    if times == epochs:
        return min(an_epoch, total), "after each epoch" if total >= an_epoch else "at the end"
    return math.ceil(total / times), f"{times} times, at most {EVAL_SHARE:.0%} of the time"


def say_choices(choices: Sequence[Choice]) -> None:
    """Print what was derived, one line each, as `loraport serve` prints its plan."""
    width = max((len(choice.name) for choice in choices), default=0)
    for choice in choices:
        say(f"  {choice.name:<{width}}  {choice.value}  ({choice.reason})")


def first(config: dict[str, Any], *names: str) -> int | None:
    """The first of `names` that a config.json has."""
    return next((int(config[name]) for name in names if config.get(name)), None)


def in_words(value: float) -> str:
    """`1024`, `2`, `3e-4`."""
    return f"{value:g}".replace("e-0", "e-") if value >= 0.01 or value == 0 else f"{value:.0e}".replace("e-0", "e-")


def millions(count: int) -> str:
    """`41.9M`, or the plain number below a million."""
    return f"{count / 1e6:.1f}M" if count >= 1e6 else f"{count:,}"
