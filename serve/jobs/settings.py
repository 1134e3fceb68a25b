"""How the queue of fine-tuning jobs behaves: limits, times, prices.

>>> QueueSettings(per_tenant=2, price_per_gpu_hour=2.5)
"""

import os
from dataclasses import dataclass, field

from loraport.serve.jobs.order import Rules

GIB = 1 << 30


def checks_at_once() -> int:
    """How many jobs are checked at the same time: each reads all rows with a tokenizer, on one core."""
    return 2 if (os.cpu_count() or 1) >= 4 else 1


@dataclass(frozen=True)
class QueueSettings:
    """Times are in seconds. `price_per_gpu_hour` is in any currency; None: cost is not told.

    `attempts`: how often a job is started in all while the machine is at fault. `lost_attempts`: the same for attempts
    whose end nobody saw, because the machine itself went down. `time_limit_s`: of training, all attempts together.
    `grace_s`: for a trainer to write its checkpoint. `hand_over_s`: for an engine to take a result. `half_life_s`:
    until what a tenant has used counts half. `check_s`, `check_bytes`: what checking the files of a job may take.
    `keep_failed_s`: how long adapters stay of jobs that failed or were cancelled. `keep_logs_s`: how long a job's
    folder stays with its log, once it is over.
    """

    per_tenant: int | None = None
    patience_s: float = 24 * 3600.0
    half_life_s: float = 6 * 3600.0
    attempts: int = 3
    lost_attempts: int = 10
    backoff_s: float = 30.0
    longest_backoff_s: float = 900.0
    time_limit_s: float = 24 * 3600.0
    grace_s: float = 120.0
    hand_over_s: float = 24 * 3600.0
    poll_s: float = 0.5
    tick_s: float = 1.0
    checks: int = field(default_factory=checks_at_once)
    check_s: float = 3600.0
    check_bytes: int = 16 * GIB
    keep_failed_s: float = 24 * 3600.0
    keep_logs_s: float = 30 * 24 * 3600.0
    price_per_gpu_hour: float | None = None

    @property
    def rules(self) -> Rules:
        """Those of the order."""
        return Rules(self.per_tenant, self.patience_s)

    def backoff(self, faults: int) -> float:
        """How long to wait after so many faults, at least one."""
        return min(self.longest_backoff_s, self.backoff_s * 2.0 ** min(max(0, faults - 1), 30))
