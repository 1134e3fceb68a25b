"""Adapters by name: rank, scale, dropout and target modules that go together.

The first four are those of a well-known tutorial series on Mistral-7B, by its names. The default is ours, after "LoRA
Without Regret" (Schulman et al., 2025): every linear layer, a rank that the data decides, and no dropout.

    >>> PRESETS["standard_r8_qkvo"].alpha_for(rank=16, rslora=False)
    32
"""

from dataclasses import dataclass

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
SEVEN = (*ATTENTION, "gate_proj", "up_proj", "down_proj")  # what all linear layers are called in a Llama or Mistral
ALL_LINEAR = "all-linear"  # every linear layer of whatever model it is, its head aside; stands alone
RSLORA_ALPHA = 8  # alpha / sqrt(16) = 2, the scale that alpha = 2 * rank gives at every rank


@dataclass(frozen=True)
class Preset:
    """`rank` None: the data decides, see train/defaults.py. `alpha` is for that rank and follows another one."""

    rank: int | None
    alpha: int | None
    dropout: float
    rslora: bool
    target_modules: tuple[str, ...]
    meaning: str

    def alpha_for(self, rank: int, rslora: bool) -> int:
        """Alpha for a rank: the preset's ratio; where it has none, twice the rank, or a constant under rsLoRA."""
        if self.rank is not None and self.alpha is not None:
            return self.alpha * rank // self.rank
        return RSLORA_ALPHA if rslora else 2 * rank


PRESETS = {
    "minimal_r4_qv": Preset(4, 8, 0.05, False, ("q_proj", "v_proj"), "the least memory: two of seven layers"),
    "standard_r8_qkvo": Preset(8, 16, 0.05, False, ATTENTION, "attention only, a common choice"),
    "aggressive_r16_all": Preset(16, 32, 0.05, False, SEVEN, "attention and MLP of Llama-like models"),
    "high_capacity_r32_all": Preset(32, 64, 0.05, False, SEVEN, "the same for much data"),
    "all_linear_auto": Preset(
        None, None, 0.0, True, (ALL_LINEAR,), "all linear layers of any model, rank 8 to 64 by the amount of data"
    ),
}
DEFAULT_PRESET = "all_linear_auto"
