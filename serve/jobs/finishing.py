"""What comes after an attempt: the result is handed over, or the job ends, waits again, or is paused.

A job's GPUs are given back in the transaction that gives it another status, and what it has used is added to `gpu_s`
there. A result is first kept (`Job.adapter`), then its GPUs are given back, so that the engine can return, then it is
handed over; only then the job has succeeded. A hand-over that the engine cannot do now is done again later.

    >>> Finishing(parts).end(job, Status.FAILED, failure("time_limit_exceeded", "it trained for over 24 hours."))
"""

import time
from pathlib import Path
from typing import Any

from sqlalchemy import select, update
from sqlalchemy.orm import Session

from loraport.clients.errors import AdapterError, LoraportError, VerificationError
from loraport.serve.jobs.durable import Leaving
from loraport.serve.jobs.follow import PROGRESS, is_number
from loraport.serve.jobs.leftovers import tidy
from loraport.serve.jobs.names import checkpoint_name
from loraport.serve.jobs.outcome import Fault
from loraport.serve.jobs.parts import Parts
from loraport.serve.jobs.recipe import job_folder
from loraport.serve.jobs.results import keep_metrics, keep_report, metrics_by_step
from loraport.serve.jobs.seams import Trained, TrainedCheckpoint
from loraport.serve.jobs.words import clean, failure
from loraport.serve.store.changes import move, tell
from loraport.serve.store.store import Store
from loraport.serve.store.tables import Checkpoint, Event, Job, Lease, Status

REPORT = "report.html"
WANTED = {"cancel": Status.CANCELLED, "pause": Status.PAUSED}
HAND_OVER_S = 2.0  # before a hand-over is tried again, at first
LONGEST_S = 15.0


class Finishing:
    """Changes of a job that has run. Each is one transaction; twice is fine."""

    def __init__(self, parts: Parts) -> None:
        self.parts = parts

    def end(
        self, job: Job, after: Status, error: dict[str, Any] | None = None, report: Path | None = None, **fields: Any
    ) -> None:
        """End a job, with the metrics that there are and the report of what fell short."""

        def change() -> None:
            with self.parts.store.begin() as session:
                self.give_back(session, job)
                kept = self.kept_files(session, job, report)
                move(session, job.id, {Status.RUNNING}, after, error=error, **kept, **fields)

        self.parts.patient(change)
        tidy(self.parts, job.id)

    def kept_files(self, session: Session, job: Job, report: Path | None) -> dict[str, Any]:
        """The columns of what a job leaves for its owner."""
        path = job_folder(self.parts.home, job.id) / PROGRESS
        found = {"result_file": keep_metrics(session, self.parts.home, job, path)}
        if report:
            found["report_file"] = keep_report(session, self.parts.home, job, report / REPORT)
        return found

    def put_back(self, job: Job, after: Status, words: str = "", **fields: Any) -> None:
        """Pause a job, or have it wait again: it goes on from its checkpoint. What was asked for meanwhile, is done."""

        def change() -> Status:
            with self.parts.store.begin() as session:
                asked = select(Job.wanted).where(Job.id == job.id).with_for_update()
                found = WANTED.get(session.scalars(asked).one() or "", after)
                self.give_back(session, job)
                if words and found is after:
                    tell(session, job.id, words, level="warn")
                move(session, job.id, {Status.RUNNING}, found, wanted=None, estimated_finish=None, **fields)
            return found

        if self.parts.patient(change) is Status.CANCELLED:
            tidy(self.parts, job.id)

    def try_again(self, job: Job, fault: Fault) -> None:
        """Have a job wait for another attempt, or fail it where it had enough of them."""
        settings = self.parts.settings
        faults, lost = job.faults + fault.counts, job.lost + (not fault.counts)
        if faults >= settings.attempts or lost >= settings.lost_attempts:
            error = dict(fault.error)
            error["message"] = clean(f"{error['message']} It was tried {job.attempt} times.")
            self.end(job, Status.FAILED, error, faults=faults, lost=lost)
            return
        wait_s = settings.backoff(faults)
        words = f"Attempt {job.attempt} failed: {fault.error['message']} The next one begins in {wait_s:.0f} s."
        self.put_back(job, Status.QUEUED, clean(words), faults=faults, lost=lost, not_before=time.time() + wait_s)

    def give_back(self, session: Session, job: Job) -> None:
        """End a job's leases, and add what they were used for."""
        leases = session.scalars(select(Lease).where(Lease.holder == job.id)).all()
        used = sum(max(0.0, time.time() - lease.created_at) for lease in leases)
        session.execute(update(Job).where(Job.id == job.id).values(gpu_s=Job.gpu_s + used))
        for lease in leases:
            session.delete(lease)

    def hand_over(self, job: Job, trained: Trained) -> None:
        """Have a result served; the job has succeeded then, or failed where it is refused."""
        self.parts.placer.add_results(1)
        try:
            self.parts.patient(lambda: self.keep_adapter(job, trained))
            self.parts.wake()
            self.accept(job, trained)
        finally:
            self.parts.placer.add_results(-1)

    def keep_adapter(self, job: Job, trained: Trained) -> None:
        """Note what was trained, and give the GPUs back."""
        with self.parts.store.begin() as session:
            self.give_back(session, job)
            reference = f"{trained.name}@{trained.version}"
            session.execute(update(Job).where(Job.id == job.id).values(adapter=reference, estimated_finish=None))

    def accept(self, job: Job, trained: Trained) -> None:
        """Hand over until it is done, refused, or nobody wants it any more. Not before the engine is back."""
        wait_s, began = 0.0, time.monotonic()
        while True:
            if self.is_cancelled(job.id, wait_s):
                self.end(job, Status.CANCELLED)
                return
            wait_s = min(LONGEST_S, 2 * wait_s or HAND_OVER_S)
            try:
                name = self.take(job, trained)
            except (AdapterError, VerificationError) as error:
                self.refuse(job, trained, "verification_failed", error)
                return
            except LoraportError as error:
                if time.monotonic() - began > self.parts.settings.hand_over_s:
                    self.refuse(job, trained, "engine_unavailable", error)
                    return
                self.say_later(job, error)
            else:
                self.succeed(job, trained, name)
                return

    def take(self, job: Job, trained: Trained) -> str:
        """One try to have a result served. That takes a while: Leaving where the job is another server's by then."""
        try:
            return self.parts.hand_over.accept(job, trained)
        finally:
            if self.parts.leaving.is_set():
                raise Leaving

    def is_cancelled(self, job_id: str, wait_s: float) -> bool:
        """Wait for so long, and for the engine; whether somebody wants the job to end meanwhile."""
        end = time.monotonic() + wait_s
        while time.monotonic() < end or self.parts.placer.is_away:
            job = self.parts.patient(lambda: load_job(self.parts.store, job_id))
            if job is None or job.wanted == "cancel":
                return True
            if self.parts.stopping.is_set():
                raise Leaving
            self.parts.pause()
        return False

    def say_later(self, job: Job, error: LoraportError) -> None:
        """Tell once that the engine cannot take a result yet."""

        def change() -> None:
            with self.parts.store.begin() as session:
                source = f"hand-over {job.attempt}"
                told = select(Event.seq).where(Event.job_id == job.id, Event.source == source)
                if session.scalars(told).first() is None:
                    words = clean(f"The model is trained; the engine cannot take it yet: {error.message}")
                    tell(session, job.id, words, level="warn", source=source)

        self.parts.patient(change)

    def refuse(self, job: Job, trained: Trained, code: str, error: LoraportError) -> None:
        """Fail a job whose result is not served, with the report of its training."""
        folder = self.parts.home.adapters / trained.name / trained.version
        words = f"{error.message} {' '.join(error.details[-2:])}".strip()
        words = clean(words, {str(self.parts.home.root): "the home"})
        self.end(job, Status.FAILED, failure(code, words, hint=error.hint), report=folder)

    def succeed(self, job: Job, trained: Trained, name: str) -> None:
        """The result is served under `name`: with it, its checkpoints and its metrics, the job has succeeded."""
        steps = metrics_by_step(job_folder(self.parts.home, job.id) / PROGRESS)

        def change() -> None:
            with self.parts.store.begin() as session:
                kept = self.kept_files(session, job, None)
                if trained.trained_tokens is not None:
                    kept["trained_tokens"] = trained.trained_tokens
                tell(session, job.id, f"New fine-tuned model created: {name}")
                keep_checkpoints(session, job, trained, steps)
                move(session, job.id, {Status.RUNNING}, Status.SUCCEEDED, fine_tuned_model=name, **kept)

        self.parts.patient(change)
        tidy(self.parts, job.id)


def keep_checkpoints(session: Session, job: Job, trained: Trained, steps: dict[int, dict[str, Any]]) -> None:
    """The rows of a result's checkpoints."""
    for each in trained.checkpoints:
        session.add(
            Checkpoint(
                job_id=job.id,
                step=each.step,
                model=checkpoint_name(job, each.step),
                adapter=f"{each.name}@{each.version}",
                metrics=checkpoint_metrics(each, steps.get(each.step, {})),
            )
        )


METRICS = ("train_loss", "train_mean_token_accuracy", "valid_loss", "valid_mean_token_accuracy")
FULL = ("full_valid_loss", "full_valid_mean_token_accuracy")


def checkpoint_metrics(checkpoint: TrainedCheckpoint, said: dict[str, Any]) -> dict[str, Any]:
    """OpenAI's metrics of a checkpoint, those that are known."""
    known = dict(checkpoint.metrics) | said
    return {"step": checkpoint.step} | {name: known[name] for name in (*METRICS, *FULL) if is_number(known.get(name))}


def load_job(store: Store, job_id: str) -> Job | None:
    """A job as it is now."""
    with store.read() as session:
        return session.scalars(select(Job).where(Job.id == job_id)).first()
