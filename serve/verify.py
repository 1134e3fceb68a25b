"""The proof that an adapter is applied: its golden replies, replayed through the endpoint that users will call.

vLLM can load and list an adapter and still answer with the base model. So after each load the prompts in the manifest
are sent as tokens, greedily, and the tokens and their log-probabilities are compared with those that PEFT recorded in
training. A token may differ only where training was undecided itself (its margin over the runner-up is below the
tolerance); the replay then goes on behind the recorded token, so that nothing stays unchecked.
"""

from dataclasses import dataclass
from typing import Any

import httpx

from loraport.clients.errors import EndpointError, VerificationError
from loraport.train.manifest import Golden, Manifest, Reply

# Log-probabilities may differ by so many nats, by the types that training and serving computed in.
TOLERANCE = {"float32": 0.02, "bfloat16": 0.25, "nf4": 1.0}
TIMEOUT_S = 120.0


@dataclass(frozen=True)
class Outcome:
    """What the replay of one golden reply showed.

    `difference`: the largest difference of log-probabilities, in nats, at tokens that agree. `ties`: positions at which
    another token was chosen where training was undecided. `at`: the position that cannot be explained so, if any,
    with the token ids that were served from there on.
    """

    difference: float
    ties: tuple[int, ...] = ()
    at: int | None = None
    served: tuple[int, ...] = ()
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
    tolerance: float

    @property
    def state(self) -> str:
        """One word for lists."""
        return "verified" if self.telling else "unproven"


@dataclass(frozen=True)
class Served:
    """One reply of the endpoint: token ids, their log-probabilities, text, and whether it stopped by itself."""

    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    text: str
    stopped: bool


class Replayer:
    """Sends prompts as tokens and reads greedy replies as tokens."""

    def __init__(self, base_url: str) -> None:
        self.url = f"{base_url}/completions"
        self.client = httpx.Client(timeout=TIMEOUT_S, trust_env=False)

    def ask(self, model: str, prompt: list[int], tokens: int) -> Served:
        """A greedy reply of at most `tokens` tokens; EndpointError when there is none.

        Every sampling default that a model's generation_config.json may set is switched off: the recorded replies are
        plain greedy ones.
        """
        body = {"model": model, "prompt": prompt, "max_tokens": tokens, "temperature": 0, "logprobs": 1, "seed": 0}
        body |= {"return_tokens_as_token_ids": True, "skip_special_tokens": True}
        body |= {"top_p": 1, "top_k": -1, "min_p": 0, "repetition_penalty": 1, "presence_penalty": 0}
        body |= {"frequency_penalty": 0}
        try:
            answer = self.client.post(self.url, json=body)
            if answer.status_code != 200:
                raise EndpointError(f"the engine answered {answer.status_code} to a replay: {answer.text[:300]}.", "")
            return read_reply(answer.json()["choices"][0])
        except (httpx.HTTPError, ValueError, KeyError, TypeError, IndexError) as error:
            raise EndpointError(f"the engine did not answer a replay: {type(error).__name__} {error}.", "") from error


def read_reply(choice: dict[str, Any]) -> Served:
    """A completion choice with `logprobs`, whose tokens read `token_id:123`."""
    logprobs = choice["logprobs"]
    tokens = tuple(int(token.removeprefix("token_id:")) for token in logprobs["tokens"])
    values = tuple(float(value) for value in logprobs["token_logprobs"])
    return Served(tokens, values, choice["text"], choice["finish_reason"] == "stop")


def compare(expected: Reply, served: Served, tolerance: float, start: int = 0) -> tuple[int | None, float]:
    """(first position from `start` at which `served` is not `expected`, largest difference of log-probabilities).

    A reply that stopped in training must stop here, at the same token, by itself.
    """
    difference = 0.0
    for offset, position in enumerate(range(start, len(expected.tokens))):
        if offset >= len(served.tokens) or served.tokens[offset] != expected.tokens[position]:
            return position, difference
        difference = max(difference, abs(served.logprobs[offset] - expected.logprobs[position]))
        if difference > tolerance:
            return position, difference
    if expected.stopped and not (served.stopped and len(served.tokens) == len(expected.tokens) - start):
        return len(expected.tokens) - 1, difference
    return None, difference


def replay(replayer: Replayer, model: str, prompt: list[int], expected: Reply, tolerance: float) -> Outcome:
    """Ask `model` for one recorded reply, going on behind each position at which training was undecided."""
    start, difference = 0, 0.0
    ties: list[int] = []
    while True:
        more = len(expected.tokens) - start + (1 if expected.stopped else 0)
        served = replayer.ask(model, prompt + expected.tokens[:start], more)
        position, found = compare(expected, served, tolerance, start)
        difference = max(difference, min(found, tolerance))
        if position is None:
            return Outcome(difference, tuple(ties))
        offset = position - start
        other = offset < len(served.tokens) and served.tokens[offset] != expected.tokens[position]
        if not (other and is_tie(expected, served, position, offset, tolerance)):
            return Outcome(max(difference, found), tuple(ties), position, served.tokens[offset:], served.text)
        ties.append(position)
        start = position + 1
        if start == len(expected.tokens):
            return Outcome(difference, tuple(ties))


def is_tie(expected: Reply, served: Served, position: int, offset: int, tolerance: float) -> bool:
    """Whether another token may have won here: the margin was small, and the winner is about as likely as expected.

    Two log-probabilities may each be off by the tolerance, so that a margin of twice that much can turn.
    """
    near = abs(served.logprobs[offset] - expected.logprobs[position]) <= 2 * tolerance
    return near and expected.margins[position] <= 2 * tolerance


def tolerance_for(manifest: Manifest, serving_dtype: str) -> float:
    """Nats of difference that rounding explains: those of the coarser of the two types."""
    return max(TOLERANCE.get(dtype, TOLERANCE["bfloat16"]) for dtype in (manifest.base_dtype, serving_dtype))


def tells_apart(golden: Golden, tolerance: float) -> bool:
    """Whether the base's recorded reply could not pass for the adapter's."""
    base = golden.base
    as_served = Served(tuple(base.tokens), tuple(base.logprobs), base.text, base.stopped)
    position, _ = compare(golden.adapter, as_served, tolerance)
    if position is None:
        return False
    other = position < len(base.tokens) and base.tokens[position] != golden.adapter.tokens[position]
    return not (other and is_tie(golden.adapter, as_served, position, position, tolerance))


def verify(base_url: str, manifest: Manifest, serving_dtype: str) -> Verified:
    """Replay all golden replies of one adapter. VerificationError says what differs; EndpointError: no answer."""
    tolerance = tolerance_for(manifest, serving_dtype)
    replayer = Replayer(base_url)
    outcomes = []
    for golden in manifest.golden:
        outcome = replay(replayer, manifest.name, golden.prompt_tokens, golden.adapter, tolerance)
        outcomes.append(outcome)
        if not outcome.agrees:
            raise explain_mismatch(replayer, manifest, len(outcomes), golden, outcome, tolerance)
    telling = sum(tells_apart(golden, tolerance) for golden in manifest.golden)
    largest = max((outcome.difference for outcome in outcomes), default=0.0)
    return Verified(manifest.name, len(outcomes), telling, largest, tolerance)


def explain_mismatch(
    replayer: Replayer, manifest: Manifest, number: int, golden: Golden, outcome: Outcome, tolerance: float
) -> VerificationError:
    """The error for a reply that is not the recorded one: the base's, or something else."""
    as_base = replay(replayer, manifest.name, golden.prompt_tokens, golden.base, tolerance)
    details = (
        f"prompt {number} of {len(manifest.golden)}, token {(outcome.at or 0) + 1} of {len(golden.adapter.tokens)}, "
        f"log-probabilities differ by up to {outcome.difference:.3f} nats (tolerance {tolerance})",
        f"expected: {golden.adapter.text!r}",
        f"got:      {outcome.text!r}",
        f"base:     {golden.base.text!r}",
    )
    if as_base.agrees and tells_apart(golden, tolerance):
        return VerificationError(
            f"the adapter {manifest.name} is loaded but not applied: the engine answers as the base does.",
            "check that its target modules are ones that vLLM applies LoRA to; then report it, with the log",
            details,
        )
    return VerificationError(
        f"the adapter {manifest.name} does not answer as it did in training (prompt {number}, "
        f"token {(outcome.at or 0) + 1}).",
        "its weights or its base were changed, or the engine computes it wrongly: train it again, or check the engine",
        details,
    )
