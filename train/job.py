"""A training run when everything about it is known and nothing heavy has happened. No torch here."""

from dataclasses import dataclass

from loraport.clients.rows import Row
from loraport.train import defaults
from loraport.train.base_model import Base
from loraport.train.config import ResolvedConfig
from loraport.train.data.dataset import Data
from loraport.train.loop.settings import Settings
from loraport.train.manifest import BaseIdentity
from loraport.train.proof.check import Check
from loraport.train.proof.gate import Requirement

SPARE_DISK = 16 * 2**20


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
        """Bytes that the adapters will need, generously: in float32, and something for the report."""
        facts = defaults.Facts.of_base(self.base.config)
        one = 4 * self.config.rank * (facts.width or 0) + SPARE_DISK
        return one * (1 + self.config.checkpoint_adapters)
