"""How a run uses the memory it has: settings that change its speed and never its result, and the ladder down.

>>> step_down(Settings(16384, 0, False), layers=32, longest=2048)
Settings(micro_batch_tokens=16384, checkpointed_layers=16, offload=False, sharded=False)
"""

from dataclasses import dataclass, replace

from loraport.train.memory.plan import Settings as Planned


@dataclass(frozen=True)
class Settings:
    """Tokens a micro-step; how many layers, from the first, are computed again in the backward pass; whether the inputs
    of those are kept in host memory; and whether each GPU keeps a share of the base (shards.py) instead of all of it.
    """

    micro_batch_tokens: int
    checkpointed_layers: int = 0
    offload: bool = False
    sharded: bool = False

    @classmethod
    def of_plan(cls, chosen: Planned) -> "Settings":
        """What a plan chose, as far as the loop has to know it."""
        return cls(chosen.micro_batch_tokens, chosen.checkpointed_layers, chosen.offload, chosen.sharding == "fsdp")

    def words(self, layers: int) -> str:
        """For people."""
        where = ", their inputs in host memory" if self.offload else ""
        layers_said = f"{self.checkpointed_layers} of {layers} layers checkpointed"
        shared = ", the base in shares" if self.sharded else ""
        return f"{self.micro_batch_tokens:,} tokens at once, {layers_said}{where}{shared}"


def step_down(settings: Settings, layers: int, longest: int) -> Settings | None:
    """The next settings that need less memory and give the same result; None when there are none.

    First half of the layers are checkpointed, then all, then a micro-step gets fewer tokens (a row cannot be cut), and
    at last the checkpoints go to the host.
    """
    if settings.checkpointed_layers < layers:
        half = layers // 2
        return replace(settings, checkpointed_layers=half if settings.checkpointed_layers < half else layers)
    if settings.micro_batch_tokens > longest:
        return replace(settings, micro_batch_tokens=max(longest, settings.micro_batch_tokens // 2))
    return None if settings.offload else replace(settings, offload=True)
