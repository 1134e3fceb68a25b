"""All of fine-tuning that lives in a server: store, routes, queue, hand-over, webhooks; started and stopped here.

What takes its time (imports, the database) happens in a thread beside the checks and the start of the engine, so that
an endpoint is ready as fast as without jobs. Its routes answer from the first second: 503 until the queue is there,
and where another server has the queue of this home, its URL. Then this one waits for its turn.

    begin    a lock, the database, the routes                 beside the checks
    attach   the queue, models, webhooks                      beside the engine's start; before it where it matters
    stop     trainers keep a checkpoint and end               their jobs go on at the next start

    >>> host = Host(options, home, port=8000, url="http://127.0.0.1:8000/v1")
    >>> app = create_app(state, settings, more=[host.mount])
    >>> host.begin(app); host.attach(fleet, live, launch); …; host.stop()
"""

import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, FastAPI
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from loraport.clients.errors import ConfigError, LoraportError, ResourceError
from loraport.clients.home import Home
from loraport.clients.terminal import say
from loraport.serve.finetuning.options import Options
from loraport.serve.gateway.calls import MARK
from loraport.serve.gateway.forward import Gateway
from loraport.serve.gateway.refusals import Refusal
from loraport.serve.plan.hardware import count_replicas, split_gpus
from loraport.serve.plan.settings import Wanted
from loraport.serve.signals import ignored_signals
from loraport.serve.store.home_lock import HomeLock

if TYPE_CHECKING:
    from loraport.serve.adapters.live import Live
    from loraport.serve.engine.process import Launch
    from loraport.serve.finetuning.sender import Webhooks
    from loraport.serve.finetuning.service import Service
    from loraport.serve.finetuning.site import Site
    from loraport.serve.fleet import Fleet
    from loraport.serve.jobs.service import Queue
    from loraport.serve.pool.placing import Placer
    from loraport.serve.store.ownership import Ownership
    from loraport.serve.store.store import Store

PREFIXES = ("/v1/files", "/v1/uploads", "/v1/fine_tuning", "/v1/webhook_endpoints", "/v1/webhook_event_types")
AGAIN_S = 5.0
JOIN_S = 60.0  # for a thread that may wait for a database
LEAVE_S = 60.0  # that a trainer may take to keep its checkpoint
STARTING = "Fine-tuning is starting."
ELSEWHERE = "Another server has the jobs of this database."


class Host:
    """One server's part in fine-tuning. Threads of the gateway and of the caller see `service` or `why_not`."""

    def __init__(self, options: Options, home: Home, port: int, url: str) -> None:
        self.options, self.home, self.port, self.url = options, home, port, url
        self.service: Service | None = None
        self.why_not = Refusal(503, "jobs_starting", STARTING, headers={"Retry-After": "2"})
        self.error: LoraportError | None = None
        self.thread = threading.Thread(target=self.run, name="fine-tuning", daemon=True)
        self.looked, self.attached, self.settled = threading.Event(), threading.Event(), threading.Event()
        self.tried, self.has_queue = threading.Event(), False
        self.has_routes = self.has_begun = False
        self.over = threading.Event()
        self.gateway: Gateway | None = None
        self.app: FastAPI | None = None
        self.engines: tuple[Fleet, Live, Launch] | None = None
        self.home_lock = HomeLock(home)
        self.store: Store | None = None
        self.ownership: Ownership | None = None
        self.queue: Queue | None = None
        self.webhooks: Webhooks | None = None
        self.lost: Placer | None = None  # of a queue that is another's now: its engine may still be away

    # For `loraport serve`.

    def mount(self, gateway: Gateway) -> APIRouter:
        """Routes that answer until those of the API are there."""
        self.gateway = gateway
        router = APIRouter()
        for prefix in PREFIXES:
            methods = ["GET", "POST", "DELETE"]
            router.routes.append(Route(f"{prefix}{{rest:path}}", self.answer_why_not, methods=methods))
        return router

    def begin(self, app: FastAPI) -> None:
        """Take the queue of this home, beside what the caller does now."""
        self.app = app
        self.thread.start()

    def clear(self, wanted: Wanted) -> None:
        """Have the trainers of a server that was killed leave the GPUs that an engine is planned for now.

        They keep a checkpoint, and their jobs go on later. Call it before the plan, which counts what is free.
        """
        self.tried.wait()
        if not self.has_queue or not any((self.home.root / "jobs").glob("*/process.json")):
            return
        from loraport.serve.runners.local import LocalRunner

        gpus = [name for names in split_gpus(count_replicas(wanted), wanted.tensor_parallel) for name in names]
        if stopped := LocalRunner(self.home).leave(gpus, LEAVE_S):
            say(f"{len(stopped)} trainings of before keep a checkpoint and wait, until the engine is there.", "yellow")

    def attach(self, fleet: "Fleet", live: "Live", launch: "Launch") -> None:
        """Go on with the engines, which are not started yet; waits where a training may have their GPUs.

        ConfigError for a database that cannot be one.
        """
        self.engines = fleet, live, launch
        self.attached.set()
        self.looked.wait()
        if launch.device.kind == "cuda" or self.options.policy in ("yield", "wait"):
            self.settled.wait()
        if self.error:
            raise self.error

    def rest(self) -> None:
        """Begin no job any more, and have trainers keep their checkpoints, while requests come to their ends."""
        if self.queue and not self.queue.is_ending:
            self.say_what_stops(self.queue)
            self.queue.rest()

    def stop(self) -> None:
        """Have trainers keep a checkpoint and end, and give the queue back. Twice is fine."""
        self.over.set()
        self.attached.set()
        self.rest()
        if self.thread.ident is not None:
            self.thread.join(JOIN_S)  # it may just have made the service
        self.why_not = Refusal(503, "jobs_stopping", "The endpoint is being stopped.", headers={"Retry-After": "30"})
        self.service = None
        if self.queue:
            self.queue.close()
        if self.webhooks:
            self.webhooks.stop()
        if self.ownership:
            self.ownership.drop()
        if self.store:
            self.store.close()
        self.home_lock.drop()
        self.queue, self.webhooks, self.store, self.ownership = None, None, None, None

    def describe(self) -> str:
        """What a person is told when the endpoint is ready."""
        words = f"policy {self.options.policy}"
        words += f" in {self.options.window}" if self.options.window else ""
        if self.service is None and self.thread.is_alive() and self.why_not.code != "jobs_starting":
            return self.why_not.message
        return f"POST {self.url}/fine_tuning/jobs  ({words})"

    # What these are made of.

    async def answer_why_not(self, request: Request) -> Response:
        """No service yet, in words; to who may ask."""
        from loraport.serve.finetuning.guard import enter

        assert self.gateway is not None
        call = request.scope[MARK]
        call.route = "/v1/fine_tuning"
        caller = enter(request, self.gateway)
        call.key = caller.key.name
        if caller.next_try:
            caller.answers.refuse(caller.next_try)
        raise self.why_not.again()

    def find(self) -> "Service":
        """The service, for the routes of the API; Refusal 503 where there is none now."""
        if self.service is None:
            raise self.why_not.again()
        return self.service

    def run(self) -> None:
        """The thread: it has the queue, or waits for it, until the server ends."""
        try:
            self.has_queue = self.take_lock()
            self.tried.set()
            while self.has_queue and self.take_turn():
                pass
        except ConfigError as error:
            self.error = error
        except LoraportError as error:
            self.give_up(error.message)
        except Exception as bug:
            say(f"error: fine-tuning has a bug: {''.join(traceback.format_exception(bug))}", "red")
            self.give_up(f"{type(bug).__name__}: {bug}")
        finally:
            self.tried.set()
            self.looked.set()
            self.settled.set()

    def take_turn(self) -> bool:
        """Store, routes, and as soon as there are engines the rest; then see that the queue is still ours.

        True where it is to be begun again: another server has the queue now, or something is lacking. False at the end.
        """
        try:
            if not self.open():
                return False
            assert self.ownership
            self.show_routes()
            self.looked.set()
            self.attached.wait()
            if self.over.wait(self.ownership.wait_s):
                return False
            if not self.ownership.holds():
                return True
            self.ownership.sign()
            self.start()
            self.settled.set()
            return self.watch()
        except ResourceError as error:
            self.queue, self.webhooks = None, None  # neither was started yet
            return self.later(error)

    def give_up(self, reason: str) -> None:
        """Serve without jobs."""
        say(f"warning: this endpoint takes no fine-tuning jobs: {reason}", "yellow")
        words = "Fine-tuning could not be started at this endpoint; its log says why."
        self.why_not = Refusal(503, "jobs_down", words, headers={"x-should-retry": "false"})

    def later(self, lacking: ResourceError) -> bool:
        """Wait a moment for what is lacking, which is said once; False when the server ends meanwhile."""
        if self.why_not.code != "jobs_store":
            say(f"warning: fine-tuning waits: {lacking.message} {lacking.hint}", "yellow")
        words = "The database of jobs cannot be used now."
        return self.again(Refusal(503, "jobs_store", words, headers={"Retry-After": "10"}))

    def again(self, why: Refusal) -> bool:
        """Wait a moment with that answer; False when the server ends meanwhile."""
        if self.lost and self.lost.is_away:
            self.lost.let_back()
        self.why_not = why
        self.tried.set()
        self.looked.set()
        self.settled.set()
        return not self.over.wait(AGAIN_S)

    def take_lock(self) -> bool:
        """Have the queue of this home, when nobody else has it; False when the server ends before."""
        while not self.home_lock.take(self.url):
            where = self.home_lock.owner()
            words = f"The jobs of this home are taken at {where}." if where else "Another server has the jobs."
            if not self.again(Refusal(503, "jobs_elsewhere", words, headers={"x-should-retry": "false"})):
                return False
        return True

    def open(self) -> bool:
        """Open the store, and have its queue, when nobody else has; False when the server ends before.

        ConfigError where the database cannot be one, ResourceError where it cannot be reached.
        """
        from loraport.serve.store.ownership import Ownership
        from loraport.serve.store.store import open_store

        if self.store is None:
            self.store = open_store(self.home, self.options.database)
        self.ownership = self.ownership or Ownership(self.store)
        while not self.ownership.take():
            if not self.again(Refusal(503, "jobs_elsewhere", ELSEWHERE, headers={"x-should-retry": "false"})):
                return False
        return True

    def watch(self) -> bool:
        """See that the queue is ours: True when another server has it, False when this one ends."""
        from loraport.serve.store.ownership import LOOK_S

        assert self.ownership
        while not self.over.wait(LOOK_S):
            if self.ownership.holds() or (is_ours := self.ownership.take_again()) is None:
                continue  # nothing is begun meanwhile: `is_sure`
            if not is_ours:
                say("warning: another server has the queue of this database now; trainings here end.", "yellow")
                self.why_not = Refusal(503, "jobs_elsewhere", ELSEWHERE, headers={"x-should-retry": "false"})
                self.service = None
                assert self.queue and self.webhooks
                self.queue.abandon()
                self.lost = self.queue.parts.placer
                self.webhooks.stop()
                self.queue, self.webhooks = None, None
                return True
        return False

    def show_routes(self) -> None:
        """The API's routes in front of all others; they too answer why not until there is a service. Twice is fine."""
        from loraport.serve.finetuning.api import routes

        assert self.app is not None and self.gateway is not None
        if self.has_routes:
            return
        before = list(self.app.router.routes)
        self.app.include_router(routes(self.gateway, self.find))
        added = self.app.router.routes[len(before) :]
        self.app.router.routes = [*added, *before]  # in one step: requests are being answered
        self.has_routes = True

    def start(self) -> None:
        """Everything that needs the engines' names and slots."""
        from loraport.serve.finetuning.sender import Webhooks
        from loraport.serve.finetuning.service import Service
        from loraport.serve.finetuning.sweep import begin, sweep
        from loraport.serve.jobs.handover import Models
        from loraport.serve.jobs.service import Queue, smallest_gpu
        from loraport.serve.jobs.validate import Validator
        from loraport.serve.jobs.watching import page
        from loraport.serve.pool.policy import Policy, Window

        assert self.engines and self.store and self.ownership and self.gateway
        (fleet, live, launch), store, gateway, ownership = self.engines, self.store, self.gateway, self.ownership
        site = self.find_site(fleet, live)
        if site is None:
            return
        models = Models(store, self.home, live)
        chores: list[Any] = [models.bury_left, *site.chores]
        settings = self.options.queue_settings()
        pool, base = site.pool, launch.base.folder
        self.queue = Queue(
            store,
            self.home,
            runner=site.runner,
            pool=pool,
            serving=site.serving,
            hand_over=models,
            base=base,
            validator=Validator(
                store, self.home, base, settings, smallest_gpu(pool), servable=models.holds, most_rank=models.most_rank
            ),
            settings=settings,
            policy=Policy(self.options.policy),
            window=Window.parse(self.options.window) if self.options.window else None,
            port=self.port,
            chores=chores,
            is_owner=lambda: ownership.is_sure,
        )
        self.webhooks = Webhooks(store, self.options.private_webhooks)
        first, *others = launch.base_names
        service = Service(
            self.home,
            store,
            self.queue,
            bases=lambda: [*others, first],
            gpus=site.most_gpus,
            test_webhook=self.webhooks.test,
            servable=models.servable,
            private_webhooks=self.options.private_webhooks,
            gpu_price=self.options.gpu_price,
        )
        chores.append(lambda: sweep(service))
        (sweep if self.has_begun else begin)(service)  # the second time requests may be under way
        self.has_begun = True
        gateway.tuned = models
        gateway.figures = page(store, self.options.gpu_price)
        if self.lost and self.lost.is_away:
            self.queue.parts.placer.is_away = True  # brought back like any other
        self.queue.start()
        self.webhooks.start()
        self.service = service

    def find_site(self, fleet: "Fleet", live: "Live") -> "Site | None":
        """Where jobs train; waits for a cluster that cannot be asked. None when the server ends before."""
        from loraport.serve.finetuning.site import here, on_cluster

        gateway = self.gateway
        assert gateway is not None
        while self.options.ray:
            try:
                return on_cluster(self.options.ray, self.home)
            except ResourceError as error:
                if self.why_not.code != "jobs_cluster":
                    say(f"warning: fine-tuning waits: {error.message} {error.hint}", "yellow")
                words = "The cluster that trains cannot be reached now."
                if not self.again(Refusal(503, "jobs_cluster", words, headers={"Retry-After": "10"})):
                    return None
        return here(self.home, fleet, live.engine, lambda: len(gateway.running))

    def say_what_stops(self, queue: "Queue") -> None:
        """Where trainers run, that they are waited for."""
        count = len(queue.attempts.training)
        if count:
            jobs = "a fine-tuning job keeps a checkpoint" if count == 1 else f"{count} jobs keep their checkpoints"
            say(f"{jobs}; at the next start training goes on from there.")


@contextmanager
def hosting(options: Options | None, home: Home, port: int, url: str) -> Iterator[Host | None]:
    """What fine-tunes at this endpoint, stopped at the end at the latest; None without options."""
    host = Host(options, home, port, url) if options else None
    try:
        yield host
    finally:
        if host:
            with ignored_signals():
                host.stop()
