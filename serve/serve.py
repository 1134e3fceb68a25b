"""`loraport serve`, from top to bottom: check, open, plan, start, verify, tell, keep, drain, stop.

check    port, keys, adapters, base, names, disk                 1-2 s, nothing started     checks.py
open     the gateway takes the port: 503 with phase and time until the engine is ready     gateway/
plan     context, memory, requests, slots; each with its reason                             plan/
tune     LoRA kernels for this GPU, where that was asked for    some minutes, once          kernels.py, tuning/
start    engines under their guards, on sockets of their own     20-60 s on two cores       fleet.py, engine/
verify   adapters loaded, golden replies replayed, prompts       a second or two            adapters/, proof/
         compared, base and adapters asked at the same moment
tell     base URL, models, lines to copy; the record for the other commands                 report.py
keep     until a signal: what crashes or hangs is started again                             supervise.py
drain    on SIGTERM: requests that run may end, new ones are refused; then everything is ended
"""

import os
import resource
import signal
import time
from contextlib import nullcontext, suppress
from dataclasses import dataclass, replace
from pathlib import Path

from loraport.clients.endpoint import EndpointRecord, process_identity
from loraport.clients.errors import LoraportError, UsageError
from loraport.clients.hardware import Device
from loraport.clients.home import Home, require_disk, write_json
from loraport.clients.terminal import console, print_json, say
from loraport.serve import checks, kernels, report
from loraport.serve.adapters import merge
from loraport.serve.adapters.catalog import Catalog, open_whole
from loraport.serve.adapters.live import Live
from loraport.serve.adapters.prove import Restored, model_of
from loraport.serve.engine import sampling, versions
from loraport.serve.engine.connect import socket_path
from loraport.serve.engine.family import read_family
from loraport.serve.engine.leftovers import end_leftovers
from loraport.serve.engine.process import DEFAULT_COMMAND, Launch
from loraport.serve.engine.quantised import require_packages
from loraport.serve.finetuning.host import Host, hosting
from loraport.serve.finetuning.options import Options
from loraport.serve.fleet import Fleet
from loraport.serve.gateway.app import create_app
from loraport.serve.gateway.calls import log_to
from loraport.serve.gateway.models import INTERNAL
from loraport.serve.gateway.server import Running as Gateway
from loraport.serve.gateway.server import run_in_thread
from loraport.serve.gateway.settings import GatewaySettings
from loraport.serve.gateway.state import EngineState, Model, Phase
from loraport.serve.plan.choose import plan, require_shape
from loraport.serve.plan.hardware import count_replicas, read_device, split_gpus, why_replicas
from loraport.serve.plan.settings import TUNED_SLOTS, Choice, Plan, Wanted, for_one
from loraport.serve.signals import Stop, ignored_signals, stop_signals
from loraport.serve.supervise import Keeper, Running
from loraport.train.adapters import Adapter
from loraport.train.base_model import Base
from loraport.train.manifest import Manifest

HELD_S = 1.0


@dataclass(frozen=True)
class Request:
    """What the user asked `loraport serve` for."""

    adapters: list[str]
    model: str | None
    host: str
    port: int
    wanted: Wanted
    engine_command: str | None
    more: list[str]
    json: bool
    drain_s: float
    merge: str | None = None
    origins: tuple[str, ...] = ()
    tune: bool = False
    jobs: Options | None = None  # of fine-tuning, where that is offered


def serve(request: Request, home: Home) -> None:
    """Serve until a signal comes; any of LoraportError when it cannot, or can no longer."""
    began = time.monotonic()
    try:
        with stop_signals():
            end_earlier(home)
            for warning in checks.open_to_others(request.host, home):
                say(warning, "yellow")
            checks.check_port(request.host, request.port, home)
            state = EngineState(count_replicas(request.wanted))
            state.begin(Phase.STARTING, "checking adapters and base")
            url = report.base_url(request.host, request.port)
            with (
                hosting(request.jobs, home, request.port, url) as jobs,
                open_gateway(request, home, state, jobs) as gateway,
            ):
                if jobs:
                    jobs.clear(request.wanted)
                launch = prepare(request, home)
                say_plan(launch)
                launch = kernels.find(launch, request.tune, home, state)
                Service(spread(launch, home), request, home, state, gateway, began, jobs).run()
    except Stop:
        say("stopped.")


def end_earlier(home: Home) -> None:
    """End what an earlier `loraport serve` left behind when it was killed."""
    ended = end_leftovers(home)
    if ended:
        say(f"ended {ended} process{'es' if ended > 1 else ''} that an earlier `loraport serve` left behind.", "yellow")


def open_gateway(request: Request, home: Home, state: EngineState, jobs: Host | None = None) -> Gateway:
    """Take the port. From now on everybody gets an answer, if only when to come back."""
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    with suppress(ValueError, OSError):  # each stream takes two files, and 1,024 is a common limit
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    log_to(home.ensure(home.logs) / f"gateway-{request.port}.log")
    usage = home.ensure(home.root / "usage") / f"{request.port}.json"
    settings = GatewaySettings(request.host, request.port, home.keys, usage, origins=request.origins)
    app = create_app(state, settings, [jobs.mount] if jobs else [])
    running = run_in_thread(app, request.host, request.port)
    if jobs:
        jobs.begin(app)
    return running


def prepare(request: Request, home: Home) -> Launch:
    """Everything that can be known before the engine is started; and a merged base, which takes as long as its disk."""
    command = checks.split_command(request.engine_command) or DEFAULT_COMMAND
    version = versions.engine_version(list(command), is_ours=request.engine_command is None)
    replicas = count_replicas(request.wanted)
    wanted, device = for_one(request.wanted, replicas), read_device(request.wanted.tensor_parallel, replicas)
    require_disk(home.cache, checks.GPU_CACHE_BYTES if device.kind == "cuda" else checks.CACHE_BYTES, "the engine")
    adapters, base = find_merged(request, home) if request.merge else find_served(request, home, version)
    slotted = [] if request.merge else adapters
    wanted = replace(wanted, tuned=TUNED_SLOTS if request.jobs and not request.merge else 0)
    chosen = make_plan(wanted, base, slotted, device, versions.spare_slots(version, device.kind))
    require_packages(chosen, command, version, is_ours=request.engine_command is None)
    if request.tune:
        kernels.require_search(chosen, base, device, version, is_ours=request.engine_command is None)
    checks.check_golden_fit(adapters, chosen.context)
    names = checks.name_base(base, adapters)
    if request.merge:
        base = merge.merged(base, adapters[0], home)
        names = (adapters[0].manifest.name,)
        chosen = replace(chosen, warnings=(*chosen.warnings, *merge.notes(adapters[0])))
    manifests = [adapter.manifest for adapter in adapters]
    family = read_family(base, manifests, version)
    many = [Choice("replicas", str(replicas), why_replicas(device, wanted.tensor_parallel))] if replicas > 1 else []
    chosen = replace(chosen, choices=(*many, *chosen.choices, *family.choices, *sampling.choices(base, manifests)))
    return Launch(
        command,
        version,
        base,
        names,
        tuple(slotted),
        chosen,
        device,
        request.port,
        socket_path(home, request.port),
        generation_config=write_generation_config(base, manifests, request.port, home),
        family=family,
        merged=adapters[0] if request.merge else None,
        more=tuple(request.more),
        replicas=replicas,
    )


def spread(launch: Launch, home: Home) -> list[Launch]:
    """The launches of all replicas: each with GPUs of its own, where there are any, and a socket."""
    is_cuda = launch.device.kind == "cuda" and launch.replicas > 1
    gpus = split_gpus(launch.replicas, launch.plan.tensor_parallel) if is_cuda else [()] * launch.replicas
    return [
        replace(launch, replica=number, gpus=mine, socket=socket_path(home, launch.port, number))
        for number, mine in enumerate(gpus)
    ]


def find_served(request: Request, home: Home, version: versions.Version) -> tuple[list[Adapter], Base]:
    """The adapters to serve and their base: as asked for, or what the port served last."""
    references, model = request.adapters, request.model
    if not references and not model:
        registered = Catalog(home, request.port).registered()
        own = [reference for reference in registered.references if not reference.startswith(INTERNAL)]
        references, model = own, registered.base  # what was fine-tuned here is loaded when it is asked for
    adapters = checks.open_adapters(home, references, version, model)
    return adapters, checks.find_base(model, adapters)


def find_merged(request: Request, home: Home) -> tuple[list[Adapter], Base]:
    """The adapter to merge, which may be of any rank, and its base."""
    if request.adapters:
        raise UsageError(
            f"--merge {request.merge} serves that adapter alone, not {', '.join(request.adapters)} too.",
            "serve the others on another port, or all of them without --merge",
        )
    adapter = open_whole(home, request.merge or "")
    return [adapter], checks.find_base(request.model, [adapter])


def make_plan(wanted: Wanted, base: Base, adapters: list[Adapter], device: Device, spare_slots: int) -> Plan:
    """The plan; BaseModelError where config.json does not say what one needs."""
    shape = require_shape(base.config, base.weight_bytes, base.folder / "config.json")
    return plan(wanted, shape, [adapter.manifest for adapter in adapters], device, spare_slots)


def write_generation_config(base: Base, manifests: list[Manifest], port: int, home: Home) -> Path | None:
    """A folder with the generation_config.json for the engine, where the base's own will not do."""
    config = sampling.engine_config(base, manifests)
    if config is None:
        return None
    folder = home.ensure(home.cache / "generation" / str(port))
    write_json(folder / "generation_config.json", config)
    return folder


def say_plan(launch: Launch) -> None:
    """What was chosen, and why."""
    many = f", {launch.replicas} replicas" if launch.replicas > 1 else ""
    say(f"base {launch.base.short_name}{many} on {launch.device.name}", "bold")
    width = max(len(choice.name) for choice in launch.plan.choices)
    for choice in launch.plan.choices:
        say(f"  {choice.name:{width}}  {choice.value}  ({choice.reason})")
    for warning in launch.plan.warnings:
        say(warning, "yellow")


class Service:
    """Engines that are kept, behind a gateway that is open."""

    def __init__(
        self,
        launches: list[Launch],
        request: Request,
        home: Home,
        state: EngineState,
        gateway: Gateway,
        began: float,
        jobs: Host | None = None,
    ) -> None:
        self.jobs = jobs
        self.request, self.home, self.state, self.gateway, self.began = request, home, state, gateway, began
        self.fleet = Fleet([Keeper(launch, home, state, self.bring_up) for launch in launches])
        launch = launches[0]
        self.url = report.base_url(request.host, request.port)
        self.live = Live(
            state,
            home,
            launch.base,
            launch.base_names[0],
            launch.plan,
            launch.version,
            in_flight=gateway.in_flight,
            on_spoiled=self.fleet.spoil,
            on_changed=self.refresh_record,
            port=request.port,
        )
        gateway.gateway.adapters = self.live  # for the admin routes
        for keeper in self.fleet.keepers:
            keeper.is_changing = lambda: self.live.is_changing
        self.contexts: dict[int, int] = {}  # of the replicas: the shortest is the endpoint's
        self.was_ready = False
        self.admin_key = gateway.gateway.ring.issue()
        self.restored: list[Restored] = []
        self.record: EndpointRecord | None = None

    def run(self) -> None:
        """Start, tell, keep; whatever happens, nothing is left running."""
        try:
            if self.jobs:
                self.jobs.attach(self.fleet, self.live, self.fleet.keepers[0].launch)
            running = self.fleet.start()
            self.tell(running)
            self.keep()
        finally:
            with ignored_signals():
                if self.jobs:
                    self.jobs.stop()
                record, self.record = self.record, None  # a change that comes too late must not write it again
                if record:
                    record.path(self.home).unlink(missing_ok=True)
                self.gateway.stop()
                self.fleet.close()
                if record:  # an engine that has just come up may have written it again
                    record.path(self.home).unlink(missing_ok=True)

    def keep(self) -> None:
        """Until a signal comes. Engines that all stay down are told of, and that is raised when the signal comes."""
        try:
            self.fleet.watch()
        except LoraportError as error:
            say(f"error: {error.message}", "bold red")
            say(f"requests are answered with 503 and this reason; Ctrl-C ends it. {error.hint}")
            with suppress(Stop):
                while True:
                    time.sleep(HELD_S)
            raise
        except Stop as stop:
            if stop.number == signal.SIGTERM:
                self.drain()
            raise

    def drain(self) -> None:
        """Let the requests that run come to their ends; a second signal cuts that short."""
        self.state.begin(Phase.DRAINING, "it is being stopped")
        self.fleet.let_be()
        if self.jobs:
            self.jobs.rest()
        waiting = len(self.gateway.gateway.running)
        if waiting:
            say(f"waiting up to {self.request.drain_s:.0f} s for {waiting} requests; a second signal ends them.")
        with suppress(Stop):
            self.gateway.stop(self.request.drain_s)

    def bring_up(self, running: Running) -> None:
        """Adapters proven and the gateway told, one replica after the other; the record is brought up to date."""
        launch, words = running.launch, "loading adapters and replaying recorded replies"
        with self.live.lock:
            self.contexts[launch.replica] = launch.plan.context
            with console.status(words) if running.is_shown else nullcontext():
                self.restored = self.prove_merged(running) if launch.merged else self.prove_adapters(running)
            running.timeline.see_end("verification", time.monotonic() - running.engine.started)
            self.state.ready(uds=str(launch.socket), replica=launch.replica)
            self.was_ready = True
            if self.record:
                self.write_record(running)

    def prove_adapters(self, running: Running) -> list[Restored]:
        """Adapters loaded and proven. One that fails ends the first start; after a restart it is left out, and told."""
        launch, is_first = running.launch, not self.was_ready
        self.state.put(base_model(launch, self.context))
        self.live.connect(running.client, launch.plan, launch.replica)
        restored = self.live.restore(launch.adapters if is_first else None, launch.replica)
        for result in restored:
            if result.error and is_first:
                raise result.error
            if result.error:
                say(f"{result.adapter.manifest.name} is not served: {result.error.message}", "yellow")
            for warning in result.loaded.warnings if result.loaded and running.is_shown else ():
                say(warning, "yellow")
        return restored

    def prove_merged(self, running: Running) -> list[Restored]:
        """The adapter that is in the weights, proven under its own name."""
        launch, adapter = running.launch, running.launch.merged
        assert adapter is not None
        loaded = merge.prove_merged(running.client, adapter, launch.base, launch.plan)
        self.live.merged = loaded
        name, version = adapter.manifest.name, adapter.manifest.version
        ends = sampling.engine_ends(launch.base, [adapter.manifest])
        model = model_of(loaded, name, (f"{name}:latest", f"{name}@{version}"), "base", self.context, ends)
        self.state.put(replace(model, engine_name=name, parent=adapter.manifest.base.model))
        return [Restored(adapter, loaded)]

    @property
    def context(self) -> int:
        """Tokens of context that every replica has: vLLM may find another on each GPU."""
        return min(self.contexts.values())

    def refresh_record(self) -> None:
        """Adapters came or went while it serves; a full disk must not undo that."""
        running = next((keeper.running for keeper in self.fleet.keepers if keeper.running), None)
        if self.record and running:
            with suppress(LoraportError):
                self.write_record(running)

    def write_record(self, running: Running) -> None:
        """The record for other commands."""
        launch = running.launch
        served = [name for name in self.live.served if not name.startswith(INTERNAL)]
        names = [self.live.merged.name] if self.live.merged else served
        self.record = EndpointRecord(
            base_url=self.url,
            port=self.request.port,
            models=list(dict.fromkeys([*launch.base_names, *names])),
            adapters=names,
            max_model_len=self.context,
            process=process_identity(os.getpid()),
            engine=running.engine.identity,
            admin_key=self.admin_key,
        )
        self.record.write(self.home)

    def tell(self, running: Running) -> None:
        """What a person wants to know."""
        self.write_record(running)
        launch = running.launch
        took = time.monotonic() - self.began
        loaded = [result.loaded for result in self.restored if result.loaded]
        ready = report.Ready(launch, self.url, loaded, running.timeline.seconds, took, self.gateway.gateway.ring.asks)
        if self.request.json:
            print_json(report.as_json(ready))
        report.say_ready(ready, self.jobs.describe() if self.jobs else "")


def base_model(launch: Launch, context: int) -> Model:
    """The base as the gateway lists it."""
    first, *others = launch.base_names
    return Model(first, root=launch.base.short_name, max_model_len=context, aliases=tuple(others), engine_name=first)
