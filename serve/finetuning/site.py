"""Where jobs train: on this machine beside the engines, or on a Ray cluster. What the queue is given for either.

>>> site = here(home, fleet, state, in_flight) if url is None else on_cluster(url, home)
>>> Queue(store, home, site.runner, site.pool, site.serving, hand_over, base, chores=[*site.chores, *others])
"""

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

from loraport.clients.home import Home
from loraport.serve.fleet import Fleet
from loraport.serve.gateway.state import EngineState
from loraport.serve.pool.placing import Serving
from loraport.serve.pool.pool import Pool, this_machine
from loraport.serve.runners.local import LocalRunner
from loraport.serve.runners.on_ray import Elsewhere, RayRunner, renew
from loraport.serve.runners.seams import Runner
from loraport.serve.tenant import Tenant

TOKEN_VARIABLE = "RAY_AUTH_TOKEN"  # Ray's own


@dataclass(frozen=True)
class Site:
    """Who runs trainers, on which GPUs, with which engines; and what is to be done for that now and then."""

    runner: Runner
    pool: Pool
    serving: Serving
    chores: list[Callable[[], object]] = field(default_factory=list)

    @property
    def most_gpus(self) -> int:
        """GPUs that one job can have at most; 1 where there are only CPUs."""
        return max((len(machine.gpus) for machine in self.pool.machines), default=1)


def here(home: Home, fleet: Fleet, state: EngineState, in_flight: Callable[[], int]) -> Site:
    """This machine, whose GPUs jobs and engines share."""
    machine = this_machine()
    tenant = Tenant(fleet, state, home, machine.numbers, in_flight)
    return Site(LocalRunner(home, machine.names), Pool([machine]), tenant)


def on_cluster(url: str, home: Home) -> Site:
    """A Ray cluster, which sees the home too; ResourceError where it cannot be asked."""
    runner = RayRunner(url, home, token=os.environ.get(TOKEN_VARIABLE))
    pool = Pool(runner.machines())
    return Site(runner, pool, Elsewhere(), [partial(renew, pool, runner)])
