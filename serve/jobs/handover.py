"""What jobs have trained, served: handed over by the queue, found and loaded for the gateway, deleted for its owner.

A result is loaded, verified and listed before its job has succeeded. A checkpoint is loaded when it is asked for: few
ever are, and each takes a slot of the engine. So is a result after a restart of the endpoint, or when it had to make
room: however many models there are, each that is listed answers, the first time after a while by some seconds later.
Room is made by the one that was asked least recently, when its last request has its answer; and whoever loads an
adapter at the endpoint gets room in the same way. Each load replays the recorded replies.

    >>> models = Models(store, home, live)
    >>> models.accept(job, trained)
    'ft:reader-9m:loraport:support:9f86d081884c'
"""

import logging
import threading
import time
from collections.abc import Collection, Sequence
from contextlib import suppress
from pathlib import Path

from sqlalchemy import delete, select, update

from loraport.clients.errors import (
    AdapterError,
    EngineError,
    LoraportError,
    ResourceError,
    UsageError,
    VerificationError,
)
from loraport.clients.home import Home
from loraport.clients.terminal import say
from loraport.serve.adapters.catalog import ALIASES
from loraport.serve.adapters.live import Live
from loraport.serve.adapters.remove import take_away
from loraport.serve.gateway.keys import Key
from loraport.serve.gateway.models import INTERNAL
from loraport.serve.gateway.tuned import Tuned
from loraport.serve.jobs.names import Names, model_name
from loraport.serve.jobs.seams import Trained
from loraport.serve.plan.settings import Plan
from loraport.serve.store.store import Store
from loraport.serve.store.tables import Checkpoint, Job, Permission, Status
from loraport.train.adapters import versions
from loraport.train.config import RunConfig

log = logging.getLogger("loraport.gateway")
ALL_LINEAR = "all-linear"  # as train/presets.py calls it
MOST_HELD = 16  # fine-tuned models at once where adapters take turns in the slots: each load is proven beside all
LAST_REQUESTS_S = 3600.0  # of a model that is deleted
DELETE_WAIT_S = 10.0  # for its files to go; what takes longer goes on by itself


class Models(Names):
    """The fine-tuned models of an endpoint: `HandOver` for the queue, `TunedModels` for the gateway."""

    def __init__(self, store: Store, home: Home, live: Live) -> None:
        super().__init__(store)
        self.home, self.live = home, live
        self.asked: dict[str, float] = {}  # when, on the monotonic clock, by what the engine calls it
        self.loading: str | None = None
        self.removed: set[str] = set()  # what the engine calls models that were deleted
        live.give_way = self.give_way

    def accept(self, job: Job, trained: Trained) -> str:
        """Load, verify and list the adapter of a job; its public name.

        AdapterError, VerificationError: it is not to be served. EngineError: try again. Twice is fine.
        """
        tuned = Tuned(model_name(job), f"{trained.name}@{trained.version}", job.tenant, base=job.model)
        try:
            self.hold(tuned)
        except LoraportError as error:
            raise self.for_owner(tuned, error) from error
        return tuned.name

    def for_owner(self, tuned: Tuned, error: LoraportError) -> LoraportError:
        """An error of a load as the owner of the job is told it: nothing of other models, and no place of this machine.

        What is wrong with another model, or with the engine, is no failure of this job: EngineError, to be tried again.
        """
        log.error("%s could not be handed over: %s: %s", tuned.reference, type(error).__name__, error.message)
        words = error.message
        for place, name in ((self.home.root, "the home"), (self.live.base.folder, self.live.base_name)):
            words = words.replace(str(place), name)
        is_too_large = isinstance(error, ResourceError) and not self.fits(tuned)
        if isinstance(error, (AdapterError, UsageError)) or is_too_large:
            return AdapterError(words)
        if isinstance(error, VerificationError) and tuned.reference in error.message:
            return VerificationError(words, error.hint, error.details)
        if isinstance(error, VerificationError) and f"for {self.live.base_name} " in error.message:
            return VerificationError("beside this model the base does not answer as it does alone.")
        if isinstance(error, EngineError):
            return EngineError(words, error.hint)  # it says which phase the engine is in
        return EngineError("the engine cannot take the model beside its others now.", "it is tried again")

    def fits(self, tuned: Tuned) -> bool:
        """Whether the slots of this endpoint would hold it, if they were free."""
        served = self.home.adapters / tuned.served
        with suppress(LoraportError, OSError):
            from loraport.serve.adapters.accept import needed_rank, read_peft_config

            return needed_rank(read_peft_config(served / tuned.reference.rpartition("@")[2])) <= self.live.plan.rank
        return True

    def used(self, tuned: Tuned) -> None:
        """It was asked for now."""
        self.asked[tuned.served] = time.monotonic()

    def load(self, tuned: Tuned, key: Key) -> None:
        """Have the engines hold it, proven, and tell the gateway; nothing where they do. Any of Live's errors.

        It has waited for its turn: what was deleted meanwhile, or is the key's no longer, is not loaded.
        """
        try:
            found = self.find(tuned.name)
        except ResourceError as error:
            raise EngineError("nobody can say now whether the model is still there.", "try again") from error
        if found is not None and found.is_for(key):
            self.hold(tuned)

    def hold(self, tuned: Tuned) -> None:
        """The same for a model that is there, as far as its caller knows."""
        with self.live.lock:
            if tuned.served in self.removed or self.live.engine.snapshot.find(tuned.reference):
                return
            self.used(tuned)
            self.loading = tuned.served
            try:
                while len(self.held()) >= MOST_HELD and self.give_way():
                    pass
                self.live.load(tuned.reference)
            finally:
                self.loading = None

    def held(self) -> list[str]:
        """Fine-tuned models that the engine holds."""
        return [name for name in self.live.served if name.startswith(INTERNAL)]

    def give_way(self) -> bool:
        """Let the model go that was asked least recently, one that answers now only if all do; False without any."""
        others = [name for name in self.held() if name != self.loading]
        if not others:
            return False
        named = {name: self.live.served[name].latest.engine_name for name in others}
        busy = {name for name in others if self.live.in_flight(named[name])}
        self.let_go(min(others, key=lambda name: (name in busy, self.asked.get(name, 0.0))))
        return True

    def let_go(self, served: str) -> None:
        """Serve it no longer; it is unloaded when its last request has its answer."""
        with self.live.lock:
            if served in self.live.served:
                self.live.catalog.forget(served)
                self.live.drop(served)
            self.live.failed.pop(served, None)

    def delete(self, tuned: Tuned) -> None:
        """Serve a model no longer, and remove it from the home; with a result go its checkpoints.

        Requests under way are answered first: after a while without the caller.
        """
        references = self.forget_rows(tuned)
        self.removed.update(reference.partition("@")[0] for reference in references)
        for reference in references:
            self.let_go(reference.partition("@")[0])
        burial = threading.Thread(target=self.bury, args=(references,), name="models", daemon=True)
        burial.start()
        burial.join(DELETE_WAIT_S)

    def forget_rows(self, tuned: Tuned) -> list[str]:
        """Strike a model from the store; the adapters that go with it."""
        with self.store.begin() as session:
            job = session.scalars(select(Job).where(Job.fine_tuned_model == tuned.name)).first()
            asked = select(Checkpoint).where(Checkpoint.model == tuned.name)
            if job:
                asked = select(Checkpoint).where(Checkpoint.job_id == job.id)
                session.execute(update(Job).where(Job.id == job.id).values(adapter=None))
            gone = list(session.scalars(asked))
            names = [tuned.name, *(each.model for each in gone)]
            session.execute(delete(Checkpoint).where(Checkpoint.id.in_([each.id for each in gone])))
            session.execute(delete(Permission).where(Permission.model.in_(names)))
            references = dict.fromkeys([tuned.reference, *(each.adapter for each in gone)])
            kept = {*session.scalars(select(Job.adapter).where(Job.adapter.in_(references)))}
            kept |= {*session.scalars(select(Checkpoint.adapter).where(Checkpoint.adapter.in_(references)))}
        for name in names:
            self.forget(name)
        return [reference for reference in references if reference not in kept]

    def bury(self, references: list[str]) -> None:
        """Remove adapters from the home, each when its last request has its answer."""
        for reference in references:
            end = time.monotonic() + LAST_REQUESTS_S
            while reference in self.live.holders.retired and time.monotonic() < end:
                time.sleep(0.1)
            name, _, version = reference.partition("@")
            try:
                self.remove(name, version)
            except LoraportError as error:  # the model is gone for everybody; its files are removed at the next start
                say(f"warning: the files of {reference} are still there: {error.message}", "yellow")

    def remove(self, name: str, version: str) -> None:
        """Remove a version from the home, and with the last one all that was known of the name."""
        folder = self.home.adapters / name / version
        if folder.is_dir():
            take_away(self.home, folder)
        if not versions(self.home, name):
            with suppress(OSError):
                (self.home.adapters / name / ALIASES).unlink(missing_ok=True)
                (self.home.adapters / name).rmdir()

    def bury_left(self) -> None:
        """Remove what an earlier endpoint was about to when it ended: adapters of jobs whose result was deleted."""
        folders = sorted(self.home.adapters.glob(f"{INTERNAL}*")) if self.home.adapters.is_dir() else []
        with self.store.read() as session:
            deleted = select(Job.id).where(Job.status == Status.SUCCEEDED, Job.adapter.is_(None))
            gone = set(session.scalars(deleted.where(Job.id.in_({job_of(folder) for folder in folders}))))
        for folder in folders:
            if job_of(folder) in gone:
                self.bury([f"{folder.name}@{path.name}" for path in versions(self.home, folder.name)])

    def servable(self, config: RunConfig) -> str | None:
        """Why this endpoint could not serve what a run would train, in words; None where it could, as far as known."""
        return None if config.rank is None else unservable(config.rank, config.target_modules, self.live.plan)

    def most_rank(self) -> int:
        """The largest rank that this endpoint can serve."""
        return self.live.plan.rank

    def holds(self, rank: int, linears: Sequence[str]) -> str | None:
        """Why this endpoint could not serve an adapter of that rank on these linears; None where it could."""
        return unservable(rank, linears, self.live.plan)


def job_of(folder: Path) -> str:
    """The job of an adapter's folder, which may be of a checkpoint."""
    return folder.name.partition(".")[0]


def unservable(rank: int, linears: Collection[str], plan: Plan) -> str | None:
    """Why an engine of that plan has no slots for an adapter of that rank on these linears; None where it has."""
    if not plan.slots:
        return "this endpoint was started without LoRA slots"
    if rank > plan.rank:
        return (
            f"rank {rank} is more than the LoRA slots of this endpoint hold, which is {plan.rank}; "
            f"whoever runs it can start it with --max-lora-rank {rank}"
        )
    missing = (
        sorted({name.rpartition(".")[2] for name in linears} - {ALL_LINEAR, *plan.targets}) if plan.targets else []
    )
    if missing:
        return f"this endpoint has no slots for {', '.join(missing)}, only for {', '.join(plan.targets)}"
    return None
