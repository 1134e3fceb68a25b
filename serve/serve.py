"""`loraport serve`, from top to bottom: check, plan, start, verify, tell, watch, stop.

check    port, adapters, base, names, disk                       1-2 s, nothing started     checks.py
plan     context, memory, requests, slots; each with its reason                             plan/
start    the engine under its guard; phases shown                20-60 s on two cores       engine/
verify   golden replies replayed through the endpoint, prompts   a second or two            proof/
         compared, base and adapters asked at the same moment
tell     base URL, models, lines to copy; the record for the other commands                 report.py
watch    until Ctrl-C, SIGTERM, or the engine's death; then everything is ended
"""

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType

from loraport.clients.endpoint import EndpointRecord, process_identity
from loraport.clients.errors import EngineError, UsageError
from loraport.clients.hardware import Device
from loraport.clients.home import Home, require_disk, write_json
from loraport.clients.terminal import console, print_json, say
from loraport.serve import checks, report
from loraport.serve.engine import versions
from loraport.serve.engine.leftovers import end_leftovers
from loraport.serve.engine.process import DEFAULT_COMMAND, Engine, Launch
from loraport.serve.engine.startup import explain_death, served_context, wait_ready
from loraport.serve.plan.choose import plan, require_shape
from loraport.serve.plan.hardware import read_device
from loraport.serve.plan.on_cpu import BLOCK
from loraport.serve.plan.settings import Plan, Wanted
from loraport.serve.proof import prompts
from loraport.serve.proof.together import check_together
from loraport.serve.proof.verify import Verified, verify
from loraport.train.adapters import Adapter
from loraport.train.base_model import Base, chat_template

WATCH_S = 1.0
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


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


class Stop(BaseException):
    """Ctrl-C or SIGTERM. Not an Exception, so that nothing on the way takes it for a failure."""


def serve(request: Request, home: Home) -> None:
    """Serve until a signal comes; any of LoraportError when it cannot, or can no longer."""
    began = time.monotonic()
    try:
        with stop_signals():
            launch = prepare(request, home)
            say_plan(launch)
            run(launch, request, home, began)
    except Stop:
        say("stopped.")


def prepare(request: Request, home: Home) -> Launch:
    """Everything that can be known before the engine is started."""
    ended = end_leftovers(home)
    if ended:
        say(f"ended {ended} process{'es' if ended > 1 else ''} that an earlier `loraport serve` left behind.", "yellow")
    command = checks.split_command(request.engine_command) or DEFAULT_COMMAND
    warnings = checks.open_to_others(request.host)
    checks.check_port(request.host, request.port, home)
    version = versions.engine_version(list(command), is_ours=request.engine_command is None)
    adapters = checks.open_adapters(home, request.adapters, version)
    checks.check_template_kwargs(adapters)
    base = checks.find_base(request.model, adapters)
    device = read_device(request.wanted.tensor_parallel)
    require_disk(home.cache, checks.GPU_CACHE_BYTES if device.kind == "cuda" else checks.CACHE_BYTES, "the engine")
    chosen = make_plan(request.wanted, base, adapters, device, versions.spare_slots(version, device.kind))
    chosen = replace(chosen, warnings=(*chosen.warnings, *warnings))
    checks.check_golden_fit(adapters, chosen.context)
    names = checks.name_base(base, adapters)
    launch = Launch(command, version, base, names, tuple(adapters), chosen, device, request.host, request.port)
    return replace(launch, generation_config=write_generation_config(launch, home), more=tuple(request.more))


def make_plan(wanted: Wanted, base: Base, adapters: list[Adapter], device: Device, spare_slots: int) -> Plan:
    """The plan; BaseModelError where config.json does not say what one needs."""
    shape = require_shape(base.config, base.weight_bytes, base.folder / "config.json")
    return plan(wanted, shape, [adapter.manifest for adapter in adapters], device, spare_slots)


def write_generation_config(launch: Launch, home: Home) -> Path | None:
    """A folder with the base's generation_config.json plus the adapters' stop tokens, where the base lacks them."""
    config = checks.stop_token_config(launch.base, list(launch.adapters))
    if config is None:
        return None
    folder = home.ensure(home.cache / "generation" / str(launch.port))
    write_json(folder / "generation_config.json", config)
    return folder


def say_plan(launch: Launch) -> None:
    """What was chosen, and why."""
    say(f"base {launch.base.short_name} on {launch.device.name}", "bold")
    width = max(len(choice.name) for choice in launch.plan.choices)
    for choice in launch.plan.choices:
        say(f"  {choice.name:{width}}  {choice.value}  ({choice.reason})")
    if launch.generation_config:
        say("  the adapters' stop tokens were added to those of the base")
    for warning in launch.plan.warnings:
        say(warning, "yellow")


def run(launch: Launch, request: Request, home: Home, began: float) -> None:
    """Start, verify, tell and watch; whatever happens, nothing is left running."""
    engine = Engine(launch, home)
    record = None
    try:
        say(f"  log         {engine.log_path}")
        url = report.base_url(launch)
        names = [adapter.manifest.name for adapter in launch.adapters]
        try:
            timeline = wait_ready(engine, url, [*launch.base_names, *names])
        except EngineError:
            shorter = with_context_that_fits(launch, list(engine.last))
            if shorter is None:
                raise
            stop(engine)
            launch, engine = shorter, Engine(shorter, home)
            timeline = wait_ready(engine, url, [*launch.base_names, *names])
        launch = with_context_found(launch, url)
        verified = verify_all(launch, url)
        timeline.see_end("verification", time.monotonic() - engine.started)
        record = EndpointRecord(
            base_url=url,
            port=launch.port,
            models=[*launch.base_names, *names],
            adapters=names,
            max_model_len=launch.plan.context,
            process=process_identity(os.getpid()),
            engine=engine.identity,
        )
        record.write(home)
        ready = report.Ready(launch, url, verified, timeline.seconds, time.monotonic() - began)
        if request.json:
            print_json(report.as_json(ready))
        report.say_ready(ready)
        watch(engine)
    finally:
        with ignored_signals():
            if record:
                record.path(home).unlink(missing_ok=True)
            stop(engine)


def with_context_that_fits(launch: Launch, lines: list[str]) -> Launch | None:
    """The launch with the context that vLLM said would fit, in whole blocks, where it refused to start with ours.

    None where it said nothing of it, or nothing shorter, or too little to replay the adapters' recorded replies.
    """
    named = versions.named_context(lines)
    context = (named or 0) // BLOCK * BLOCK
    if not 0 < context < launch.plan.context:
        return None
    with suppress(UsageError):
        checks.check_golden_fit(list(launch.adapters), context)
        say(
            f"warning: vLLM has no room for a context of {launch.plan.context:,} tokens; it is started again with "
            f"{context:,}, which it says will fit.",
            "yellow",
        )
        return replace(launch, plan=replace(launch.plan, context=context, is_auto=False))
    return None


def with_context_found(launch: Launch, url: str) -> Launch:
    """The launch with the context that vLLM has found by itself, where that was left to it."""
    found = served_context(url) if launch.plan.is_auto else None
    return replace(launch, plan=replace(launch.plan, context=found)) if found else launch


def verify_all(launch: Launch, url: str) -> list[Verified]:
    """Prompts, replies one by one, replies all at once: the first adapter that fails ends the start."""
    manifests = [adapter.manifest for adapter in launch.adapters]
    is_dated = prompts.is_dated(chat_template(launch.base))
    with console.status("replaying recorded replies"):
        for warning in [prompts.check(url, manifest, is_dated) for manifest in manifests]:
            if warning:
                say(warning, "yellow")
        verified = [verify(url, manifest, launch.plan.dtype) for manifest in manifests]
        check_together(url, launch.base_names[0], manifests, launch.plan.dtype)
    return verified


def watch(engine: Engine) -> None:
    """Wait for a signal, which ends this as Stop, or for the engine's death, which is an EngineError."""
    while engine.wait(WATCH_S) is None:
        while not engine.lines.empty():  # the log file has them; this queue must not grow
            engine.lines.get()
    engine.drain.join(2)
    raise explain_death(engine, "while serving")


def stop(engine: Engine) -> None:
    """End the engine and say so where it takes a while."""
    if engine.status is None:
        with console.status("stopping the engine"):
            engine.stop()
    else:
        engine.stop()


@contextmanager
def stop_signals() -> Iterator[None]:
    """Turn Ctrl-C, SIGTERM and the end of the terminal into Stop."""

    def raise_stop(number: int, frame: FrameType | None) -> None:
        raise Stop

    before = {number: signal.signal(number, raise_stop) for number in STOP_SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def ignored_signals() -> Iterator[None]:
    """Let nothing interrupt the clean-up, which ends by itself within seconds."""
    before = {number: signal.signal(number, signal.SIG_IGN) for number in STOP_SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
