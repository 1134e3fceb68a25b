"""Is an adapter without golden replies applied at least? Base and adapter are asked the same; something must differ.

An adapter that PEFT saved elsewhere brings no replies to compare with. What can be seen is whether the engine computes
with it at all: log-probabilities after a few prompts move, and by more than those of the base move between two askings.
The replies that were seen can then stand for golden ones while the engine runs (`together.py`).

    >>> witness(client, "base", "demo@1f0c2a9b")[0].adapter.logprobs[0]
    -1.25
"""

from math import inf

import httpx

from loraport.clients.errors import VerificationError
from loraport.serve.proof.together import as_reply
from loraport.serve.proof.verify import Replayer, Served
from loraport.train.manifest import Golden

# Token ids, so that neither template nor tokenizer comes between; every vocabulary has these.
PROBES = ([5, 17, 29, 41, 53, 65, 77, 89], [60, 11, 34, 85, 22, 71], [90, 3, 80, 13, 70, 23, 61, 33, 50, 43])
PROBE_TOKENS = 8


def witness(client: httpx.Client, base: str, adapter: str) -> list[Golden]:
    """What the engine answers to the probes now, as base and as adapter; VerificationError where that is the same."""
    replayer = Replayer(client)
    found, moved, noise = [], 0.0, 0.0
    for prompt in PROBES:
        plain, again, adapted = (replayer.ask(model, prompt, PROBE_TOKENS) for model in (base, base, adapter))
        noise, moved = max(noise, distance(plain, again)), max(moved, distance(plain, adapted))
        found.append(Golden(messages=[], prompt_tokens=prompt, adapter=as_reply(adapted), base=as_reply(plain)))
    if moved <= noise:
        raise VerificationError(
            f"the adapter {adapter} is loaded but not applied: the engine answers as the base does.",
            "check that it was trained on this base, and on modules that vLLM applies LoRA to",
            (f"log-probabilities move by {moved:.6f} nats, between two askings of the base by {noise:.6f}",),
        )
    return found


def distance(one: Served, other: Served) -> float:
    """Nats by which the log-probabilities of two greedy replies differ, up to the first token in which they do."""
    most = 0.0
    for index, (first, second) in enumerate(zip(one.candidates, other.candidates, strict=False)):
        shared = first.keys() & second.keys()
        most = max([most, *(abs(first[token] - second[token]) for token in shared)]) if shared else inf
        if one.tokens[index] != other.tokens[index]:
            break
    return most
