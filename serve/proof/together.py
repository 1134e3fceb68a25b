"""The proof that base and adapters keep apart when they are asked at the same moment, and so share batches.

vLLM computes requests for different models in one batch, each token with its own adapter's slot. When that goes wrong,
each model alone still answers as it should: its CPU kernels give base requests the last slot's adapter, but only in a
batch with an adapter's request (versions.spare_slots).

First everything is asked at once and compared with the recorded replies; as a rule that is all. Where something
differs, what the same engine says to the same prompt alone decides: a base that differs from its record even then (one
that was trained on in 4 bits) is no mix-up.
"""

from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass
from itertools import zip_longest
from math import inf
from threading import Barrier, BrokenBarrierError, Event

import httpx

from loraport.clients.errors import VerificationError
from loraport.serve.proof.tolerance import Tolerance, tolerance_for, tolerance_of
from loraport.serve.proof.verify import Outcome, Replayer, Served, replay
from loraport.train.manifest import Manifest, Reply

CONFIRMATIONS = 2  # which requests share a batch is a matter of milliseconds
MOST_AT_ONCE = 64
COMPANY_TOKENS = 64
GATHERING_S = 5.0  # for all threads to be there; milliseconds, unless Ctrl-C came between


@dataclass(frozen=True)
class Question:
    """A prompt for one model, and the reply that it must get within a tolerance."""

    model: str
    prompt: list[int]
    expected: Reply
    tolerance: Tolerance


def check_together(client: httpx.Client, base: str, manifests: list[Manifest], serving_dtype: str) -> None:
    """VerificationError unless base and adapters answer at the same moment as they do one by one."""
    replayer = Replayer(client, *manifests)
    questions = list_questions(base, manifests, serving_dtype)
    outcomes = ask_together(replayer, questions)
    if all(outcome.agrees for outcome in outcomes):
        return
    tolerance = tolerance_of(serving_dtype)
    alone = [ask_alone(replayer, question, tolerance) for question in questions]
    for _ in range(CONFIRMATIONS):
        for question, outcome in zip(alone, ask_together(replayer, alone), strict=True):
            if not outcome.agrees:
                raise explain(question, outcome)


def list_questions(base: str, manifests: list[Manifest], serving_dtype: str) -> list[Question]:
    """Golden prompts, each for its adapter and for the base in turns: the first of every adapter, then the second."""
    questions = []
    for row in zip_longest(*(manifest.golden for manifest in manifests)):
        for manifest, golden in zip(manifests, row, strict=True):
            if golden:
                tolerance = tolerance_for(manifest, serving_dtype)
                questions.append(Question(base, golden.prompt_tokens, golden.base, tolerance))
                questions.append(Question(manifest.name, golden.prompt_tokens, golden.adapter, tolerance))
    return questions[:MOST_AT_ONCE]


def ask_together(replayer: Replayer, questions: list[Question]) -> list[Outcome]:
    """Ask all questions at the same moment. Ctrl-C leaves at once: the threads end when the engine does.

    Recorded replies may be a few tokens long, and over before the next request arrives. So each model also writes a
    longer text meanwhile, and every question shares its batches with every model. It is given up, and gone, before
    this returns: whoever loads adapters next must know which of them are still asked (adapters/loading.py).
    """
    if not questions:
        return []
    company = list({question.model: question for question in questions}.values())
    barrier, done = Barrier(len(questions) + len(company)), Event()

    def gather() -> None:
        with suppress(BrokenBarrierError):
            barrier.wait(GATHERING_S)

    def accompany(question: Question) -> None:
        gather()
        replayer.occupy(question.model, question.prompt, COMPANY_TOKENS, done)

    def ask(question: Question) -> Outcome:
        gather()
        return replay(replayer, question.model, question.prompt, question.expected, question.tolerance)

    pool = ThreadPoolExecutor(len(questions) + len(company))
    try:
        beside = [pool.submit(accompany, question) for question in company]
        outcomes = list(pool.map(ask, questions))
        done.set()
        wait(beside, GATHERING_S)
        return outcomes
    finally:
        done.set()
        pool.shutdown(wait=False, cancel_futures=True)


def ask_alone(replayer: Replayer, question: Question, tolerance: Tolerance) -> Question:
    """The same question, expecting what the engine answers to it now, while nothing else is asked."""
    served = replayer.ask(question.model, question.prompt, len(question.expected.tokens))
    return Question(question.model, question.prompt, as_reply(served), tolerance)


def as_reply(served: Served) -> Reply:
    """A served reply in the form of a recorded one."""
    logprobs = [served.logprob(offset, token) for offset, token in enumerate(served.tokens)]
    runners_up = [
        max((logprob for other, logprob in candidates.items() if other != token), default=-inf)
        for token, candidates in zip(served.tokens, served.candidates, strict=True)
    ]
    margins = [first - second for first, second in zip(logprobs, runners_up, strict=True)]
    return Reply(
        tokens=list(served.tokens), logprobs=logprobs, margins=margins, text=served.text, stopped=served.stopped
    )


def explain(question: Question, found: Outcome) -> VerificationError:
    """The error for a model that answers otherwise in company than alone."""
    moved = f"{found.most:.3f} nats" if found.most < inf else "more than can be told"
    return VerificationError(
        f"requests for {question.model} get the weights of another model when they are computed together.",
        "leave --max-loras away from the flags after `--`; if there is none, report it, with the log",
        (
            f"log-probabilities move by {moved} when base and adapters are asked at the same moment",
            f"alone:    {question.expected.text!r}",
            f"together: {found.text!r}",
        ),
    )
