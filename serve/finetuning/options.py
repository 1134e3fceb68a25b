"""What `loraport serve` is told of fine-tuning jobs, checked before anything is started. Light: no database here.

>>> Options.of(policy="wait", window="22:00-06:00")
Options(policy='wait', window='22:00-06:00', gpu_price=None, private_webhooks=False, ray=None, per_key=None, …)
"""

import os
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from loraport.clients.errors import UsageError

if TYPE_CHECKING:
    from loraport.serve.jobs.settings import QueueSettings

DATABASE_VARIABLE = "LORAPORT_JOBS_DATABASE"
POLICIES = ("auto", "coexist", "yield", "wait")
TIME = r"(?:[01]?\d|2[0-3]):[0-5]\d|24:00"
WINDOW = re.compile(rf"({TIME})-({TIME})")
UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
LIMIT = re.compile(r"(\d{1,6}(?:\.\d{1,6})?)([smhd])")
DAY_S = UNITS["d"]


@dataclass(frozen=True)
class Options:
    """How jobs are kept and placed. `gpu_price`: of a GPU-hour, in any currency. `database` may hold a password.

    `per_key`: most jobs of a key that train at once. `time_limit_s`: of the training of a job, all its starts together.
    """

    database: str | None = field(default=None, repr=False)
    policy: str = "auto"
    window: str | None = None
    gpu_price: float | None = None
    private_webhooks: bool = False
    ray: str | None = None  # the dashboard of a cluster that trains
    per_key: int | None = None
    time_limit_s: float = DAY_S

    @classmethod
    def of(
        cls,
        database: str | None = None,
        policy: str = "auto",
        window: str | None = None,
        gpu_price: float | None = None,
        private_webhooks: bool = False,
        ray: str | None = None,
        per_key: int | None = None,
        time_limit: str | None = None,
    ) -> "Options":
        """The flags of `loraport serve`; UsageError for values that cannot be."""
        if policy not in POLICIES:
            raise UsageError(f"--jobs-policy {policy} is not known.", f"use one of {', '.join(POLICIES)}")
        if window is not None and not WINDOW.fullmatch(window.strip()):
            raise UsageError(f"--jobs-window {window} is no time of the day.", "for example --jobs-window 22:00-06:00")
        if policy == "wait" and window is None:
            raise UsageError("--jobs-policy wait needs to know when.", "add for example --jobs-window 22:00-06:00")
        if window is not None and policy != "wait":
            raise UsageError(
                f"--jobs-window {window} is for --jobs-policy wait, and it is {policy}.", "add --jobs-policy wait"
            )
        if ray is not None and not ray.startswith(("http://", "https://")):
            raise UsageError(f"--jobs-ray {ray} is no URL.", "for example --jobs-ray http://head:8265, the dashboard's")
        limit_s = DAY_S if time_limit is None else seconds_of(time_limit)
        return cls(find_database(database), policy, window, gpu_price, private_webhooks, ray, per_key, limit_s)

    def queue_settings(self) -> "QueueSettings":
        """What the queue goes by."""
        from loraport.serve.jobs.settings import QueueSettings

        return QueueSettings(self.per_key, time_limit_s=self.time_limit_s, price_per_gpu_hour=self.gpu_price)


def seconds_of(time_limit: str) -> float:
    """Seconds of `90m`, `12h`, `7d`; UsageError for what is none."""
    found = LIMIT.fullmatch(time_limit.strip())
    seconds = float(found[1]) * UNITS[found[2]] if found else 0.0
    if seconds <= 0:
        raise UsageError(f"--jobs-time-limit {time_limit} is no length of time.", "for example --jobs-time-limit 12h")
    return seconds


def find_database(given: str | None) -> str | None:
    """The URL as given, else of the environment; UsageError for one with a password that everybody could see."""
    if given is None:
        return os.environ.get(DATABASE_VARIABLE, "").strip() or None
    try:
        has_password = bool(urlsplit(given).password) or "password=" in given
    except ValueError:
        has_password = False
    if has_password:
        raise UsageError(
            "--jobs-database holds a password, which every user of this machine can see in the list of processes.",
            f"set {DATABASE_VARIABLE} to the same URL, and leave the flag away",
        )
    return given
