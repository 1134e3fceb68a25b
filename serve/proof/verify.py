"""The proof that an adapter is applied: its golden replies, replayed through the endpoint that users will call.

vLLM can load and list an adapter and still answer with the base model. So after each load the prompts in the manifest
are sent as tokens, greedily, and the tokens and their log-probabilities are compared with those that PEFT recorded in
training. A token may differ only where training was undecided itself (its margin over the runner-up is below the
tolerance) and the recorded token is still as likely as it was; the replay then goes on behind the recorded token, so
that nothing stays unchecked.
"""

from contextlib import suppress
from dataclasses import dataclass
from math import inf
from statistics import mean
from threading import Event
from typing import Any, Protocol

import httpx

from loraport.clients.errors import EndpointError, VerificationError
from loraport.serve.engine.connect import no_answer
from loraport.serve.proof.tolerance import Tolerance, tolerance_for
from loraport.train.manifest import Golden, Manifest, Reply

TOP = 5  # candidates that are asked for at each position: the expected token must be among them
TIMEOUT_S = 300.0  # an engine with many requests lets a new one wait for its turn
COMPLETIONS = "/v1/completions"


@dataclass(frozen=True)
class Outcome:
    """What the replay of one golden reply showed.

    `most` and `mean`: differences of log-probabilities in nats. `at`: the first position that rounding does not
    explain, if any; `text`: what was served from the last position on at which the replay was taken up.
    """

    most: float
    mean: float
    at: int | None = None
    text: str = ""

    @property
    def agrees(self) -> bool:
        """Whether this is the recorded reply."""
        return self.at is None


@dataclass(frozen=True)
class Verified:
    """An adapter that answers as in training. `telling`: prompts on which adapter and base differ; 0 proves nothing."""

    name: str
    prompts: int
    telling: int
    difference: float
    tolerance: Tolerance

    @property
    def state(self) -> str:
        """One word for lists."""
        return "verified" if self.telling else "unproven"


@dataclass(frozen=True)
class Served:
    """One reply: token ids, candidates with log-probabilities at each position, text, and whether it stopped by itself.

    `others`: log-probability to assume at each position for a token that is not among the candidates.
    """

    tokens: tuple[int, ...]
    candidates: tuple[dict[int, float], ...]
    others: tuple[float, ...]
    text: str
    stopped: bool

    def logprob(self, offset: int, token: int) -> float:
        """Log-probability of `token` at a position of the reply."""
        return self.candidates[offset].get(token, self.others[offset])


class Replayer:
    """Sends prompts as tokens and reads greedy replies as tokens, through a client of the engine's root."""

    def __init__(self, client: httpx.Client, *manifests: Manifest) -> None:
        self.client = client
        self.ends = {manifest.name: manifest.stop_tokens for manifest in manifests}

    def ask(self, model: str, prompt: list[int], tokens: int) -> Served:
        """A greedy reply of at most `tokens` tokens; EndpointError when there is none.

        Every sampling default that a model's generation_config.json may set is switched off: the recorded replies are
        plain greedy ones.
        """
        body = {"model": model, "prompt": prompt, "max_tokens": tokens, "temperature": 0, "logprobs": TOP, "seed": 0}
        body |= {"return_tokens_as_token_ids": True, "skip_special_tokens": True}
        body |= {"top_p": 1, "top_k": -1, "min_p": 0, "repetition_penalty": 1, "presence_penalty": 0}
        body |= {"frequency_penalty": 0, "stop_token_ids": self.ends.get(model, [])}
        return self.send(body)

    def occupy(self, model: str, prompt: list[int], tokens: int, done: Event) -> None:
        """Let `model` write `tokens` tokens, or until `done`: company for the requests beside it, which nobody reads.

        A stream that is given up ends in the engine at once.
        """
        body = {"model": model, "prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True}
        with (
            suppress(httpx.HTTPError),
            self.client.stream("POST", COMPLETIONS, json=body | {"stream": True}, timeout=TIMEOUT_S) as answer,
        ):
            for _ in answer.iter_raw():
                if done.is_set():
                    return

    def send(self, body: dict[str, Any]) -> Served:
        """The reply to one completion request; EndpointError when there is none."""
        try:
            answer = self.client.post(COMPLETIONS, json=body, timeout=TIMEOUT_S)
            if answer.status_code != 200:
                raise EndpointError(f"the engine answered {answer.status_code} to a replay: {answer.text[:300]}.", "")
            return read_reply(answer.json()["choices"][0])
        except (httpx.HTTPError, RuntimeError) as error:  # RuntimeError: the client was closed meanwhile
            raise no_answer(COMPLETIONS, error, TIMEOUT_S) from error
        except (ValueError, KeyError, TypeError, IndexError) as error:
            raise EndpointError(
                f"the engine's answer to a replay cannot be read: {type(error).__name__} {error}.", ""
            ) from error


def read_reply(choice: dict[str, Any]) -> Served:
    """A completion choice with `logprobs`, whose tokens read `token_id:123`."""
    logprobs = choice["logprobs"]
    tokens = tuple(token_id(token) for token in logprobs["tokens"])
    chosen = ({token: float(value)} for token, value in zip(tokens, logprobs["token_logprobs"], strict=True))
    tops = ({token_id(name): float(value) for name, value in top.items()} for top in logprobs["top_logprobs"])
    candidates = tuple(top | own for top, own in zip(tops, chosen, strict=True))
    return Served(tokens, candidates, (-inf,) * len(tokens), choice["text"], choice["finish_reason"] == "stop")


def token_id(name: str) -> int:
    """5 of `token_id:5`."""
    return int(name.removeprefix("token_id:"))


class Asker(Protocol):
    """What a replay needs: an endpoint, or recorded replies that stand in for one."""

    def ask(self, model: str, prompt: list[int], tokens: int) -> Served:
        """A greedy reply of at most `tokens` tokens."""


def replay(replayer: Asker, model: str, prompt: list[int], expected: Reply, tolerance: Tolerance) -> Outcome:
    """Ask `model` for one recorded reply, going on behind each position at which training was undecided.

    A reply that stopped in training must stop here, at the same token, by itself: one token more is asked for.
    """
    differences: list[float] = []
    while len(differences) < len(expected.tokens):
        start = len(differences)
        more = len(expected.tokens) - start + expected.stopped
        served = replayer.ask(model, prompt + expected.tokens[:start], more)
        for offset, token in enumerate(served.tokens[: len(expected.tokens) - start]):
            position = start + offset
            wanted = expected.tokens[position]
            differences.append(abs(served.logprob(offset, wanted) - expected.logprobs[position]))
            other = token != wanted
            if differences[-1] > tolerance.most or (other and expected.margins[position] > tolerance.most):
                return outcome(differences, position, served)
            if other:
                break
        else:
            whole = len(differences) == len(expected.tokens)
            too_long = expected.stopped and not (served.stopped and len(served.tokens) == len(expected.tokens) - start)
            if not whole or too_long:
                return outcome(differences, len(differences), served)
    if mean(differences) > tolerance.mean:
        worst = differences.index(max(differences))
        return outcome(differences, worst, served)
    return outcome(differences, None, served)


def outcome(differences: list[float], at: int | None, served: Served) -> Outcome:
    """Sum up a replay that agreed (`at` is None) or ended at a position."""
    return Outcome(max(differences, default=0.0), mean(differences or [0.0]), at, served.text)


@dataclass(frozen=True)
class Recorded:
    """Answers every prompt with one recorded reply, to find out whether it could pass for another.

    A token that is not the recorded one is taken for the runner-up, the best that it can be.
    """

    reply: Reply
    prompt_length: int

    def ask(self, model: str, prompt: list[int], tokens: int) -> Served:
        """The part of the reply that follows the prompt's extra tokens, whatever these are."""
        start = len(prompt) - self.prompt_length
        reply = self.reply
        stopped = reply.stopped and len(reply.tokens) - start <= tokens
        end = start + tokens
        pairs = list(zip(reply.tokens, reply.logprobs, reply.margins, strict=True))[start:end]
        candidates = tuple({token: logprob} for token, logprob, _ in pairs)
        others = tuple(logprob - margin for _, logprob, margin in pairs)
        return Served(tuple(reply.tokens[start:end]), candidates, others, reply.text, stopped)


def tells_apart(golden: Golden, tolerance: Tolerance) -> bool:
    """Whether the base's recorded reply could not pass for the adapter's."""
    base = Recorded(golden.base, len(golden.prompt_tokens))
    return not replay(base, "base", golden.prompt_tokens, golden.adapter, tolerance).agrees


def verify(client: httpx.Client, manifest: Manifest, serving_dtype: str) -> Verified:
    """Replay all golden replies of the model that the engine calls `manifest.name`.

    VerificationError says what differs; EndpointError: no answer.
    """
    tolerance = tolerance_for(manifest, serving_dtype)
    replayer = Replayer(client, manifest)
    outcomes = []
    for golden in manifest.golden:
        outcomes.append(replay(replayer, manifest.name, golden.prompt_tokens, golden.adapter, tolerance))
        if not outcomes[-1].agrees:
            raise explain_mismatch(replayer, manifest, len(outcomes), outcomes[-1], tolerance)
    telling = sum(tells_apart(golden, tolerance) for golden in manifest.golden)
    most = max((outcome.most for outcome in outcomes), default=0.0)
    return Verified(manifest.name, len(outcomes), telling, most, tolerance)


def explain_mismatch(
    replayer: Replayer, manifest: Manifest, number: int, found: Outcome, tolerance: Tolerance
) -> VerificationError:
    """The error for reply `number`, which is not the recorded one: the base's, or something else."""
    golden = manifest.golden[number - 1]
    as_base = replay(replayer, manifest.name, golden.prompt_tokens, golden.base, tolerance)
    token = min(found.at or 0, len(golden.adapter.tokens) - 1) + 1
    moved = (
        f"differ by up to {found.most:.3f} nats" if found.most < inf else f"lack the recorded token in the top {TOP}"
    )
    details = (
        f"prompt {number} of {len(manifest.golden)}, token {token} of {len(golden.adapter.tokens)}; log-probabilities "
        f"{moved}, {found.mean:.3f} on average (allowed: {tolerance.most} and {tolerance.mean})",
        f"expected: {golden.adapter.text!r}",
        f"got:      {found.text!r}",
        f"base:     {golden.base.text!r}",
    )
    if as_base.agrees and tells_apart(golden, tolerance):
        return VerificationError(
            f"the adapter {manifest.name} is loaded but not applied: the engine answers as the base does.",
            "check that its target modules are ones that vLLM applies LoRA to; then report it, with the log",
            details,
        )
    return VerificationError(
        f"the adapter {manifest.name} does not answer as it did in training (prompt {number}, token {token}).",
        "its weights or its base were changed, or the engine computes it wrongly: train it again, or check the engine",
        details,
    )
