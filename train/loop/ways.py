"""How a model runs in training: fused layers, packed attention, our own loss; and the check that it is the same.

An architecture may do something in its attention, its norms or its head that our shorter ways leave out. So before a
run two short documents go through the model in training's way, packed behind each other, and through transformers' and
PEFT's own, one by one. Where hidden states or losses differ, or one document sees the other, the run falls back, one
way after the other, and says so. Losses alone would not do: a model with small weights hides much in them.

    >>> with trained(model, agreeing(model)):
    ...     model(**micro_step.to(device))
"""

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from loraport.clients.errors import BaseModelError, Refused
from loraport.clients.terminal import say
from loraport.train.loop.attention import packed
from loraport.train.loop.fused import fuse, unfuse
from loraport.train.loop.loss import with_loss, without_loss
from loraport.train.loop.packing import join

LENGTHS = (13, 9)  # tokens of the two documents
LAYERS = 6  # that are compared: one of each kind, also where every sixth differs
WINDOW = 5  # of sliding attention while it is compared: less than a document, or nothing would be
LOSS = {torch.float32: 1e-3, torch.float16: 0.03, torch.bfloat16: 0.06}  # nats a token
# Difference of hidden states as a part of them, and the same when only the other document changes.
HIDDEN = {torch.float32: 1e-3, torch.float16: 0.03, torch.bfloat16: 0.1}
LEAK = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 0.01}
INT8 = 3.0  # bitsandbytes' own int8 product rounds activations to 8 bits, ours does not: as many times the difference


@dataclass(frozen=True)
class Ways:
    """`fused`: our layers; `packed`: several documents a micro-step; `own_head`: our chunked loss."""

    fused: bool = True
    packed: bool = True
    own_head: bool = True


LADDER = (
    Ways(),
    Ways(own_head=False),
    Ways(fused=False),
    Ways(fused=False, own_head=False),
    Ways(fused=False, packed=False),
    Ways(fused=False, packed=False, own_head=False),
)


@contextlib.contextmanager
def trained(model: Any, ways: Ways) -> Iterator[None]:
    """While it lasts, the PeftModel `model` runs in these ways and takes micro-steps; then it is itself again."""
    with packed(model) if ways.packed else contextlib.nullcontext():
        try:
            if ways.fused:
                fuse(model)
            with_loss(model, ways.packed, ways.own_head)
            yield
        finally:
            without_loss(model)
            unfuse(model)


@dataclass(frozen=True)
class Seen:
    """What a model makes of the documents: mean loss in nats and last hidden states (T, H) of each."""

    losses: list[float]
    hidden: list[Tensor]


def agreeing(model: Any) -> Ways:
    """The first of the LADDER in which the model computes what it is meant to.

    Raises Refused when its loss is not finite, BaseModelError when it cannot be trained in any of them.
    """
    model.eval()
    with small_windows(model), first_layers(model):
        wanted = own_way(model)
        if not all(math.isfinite(loss) for loss in wanted.losses):
            raise Refused("the model's loss is not finite before the first step.", "look at the base's weights")
        for ways in LADDER:
            if is_right(model, ways, wanted):
                say_missing(ways)
                return ways
    raise BaseModelError(
        f"{type(model.get_base_model()).__name__} does not compute the same in training as by itself.",
        "please report it, with the model's config.json",
    )


def say_missing(ways: Ways) -> None:
    """What these ways do without, in words."""
    parts = {"fused layers": ways.fused, "packing": ways.packed, "the chunked loss": ways.own_head}
    missing = " and ".join(name for name, used in parts.items() if not used)
    if missing:
        say(f"note: this architecture is trained without {missing}: slower, the result is the same", "dim")


def is_right(model: Any, ways: Ways, wanted: Seen) -> bool:
    """Whether the model computes what is wanted in these ways, and no document sees another."""
    config = model.config.get_text_config()
    if ways.own_head and getattr(config, "final_logit_softcapping", None):
        return False  # small logits do not show it
    drops = any(getattr(config, name, None) for name in ("attention_dropout", "attn_pdrop"))
    if drops and (ways.fused or ways.packed):
        return False  # only training does, and only the model's own attention
    documents = documents_for(model)
    try:
        with trained(model, ways):
            found = in_ways(model, ways, documents)
            changed = in_ways(model, ways, [documents[0].flip(0), documents[1]])
    except (AttributeError, KeyError, TypeError, ValueError, RuntimeError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        return False
    dtype = model.get_input_embeddings().weight.dtype
    dtype = dtype if dtype in LOSS else torch.bfloat16
    times = INT8 if any(type(module).__name__ == "Linear8bitLt" for module in model.modules()) else 1.0
    losses_agree = all(abs(a - b) <= times * LOSS[dtype] for a, b in zip(found.losses, wanted.losses, strict=True))
    hidden_agree = all(apart(a, b) <= times * HIDDEN[dtype] for a, b in zip(found.hidden, wanted.hidden, strict=True))
    return losses_agree and hidden_agree and apart(changed.hidden[1], found.hidden[1]) <= times * LEAK[dtype]


def apart(found: Tensor, wanted: Tensor) -> float:
    """Norm of the difference, as a part of the norm."""
    return float((found - wanted).norm() / wanted.norm())


def documents_for(model: Any) -> list[Tensor]:
    """Two short documents of arbitrary tokens."""
    vocabulary = model.get_input_embeddings().weight.shape[0]
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(vocabulary, (length,), generator=generator) for length in LENGTHS]


@contextlib.contextmanager
def first_layers(model: Any) -> Iterator[None]:
    """While it lasts, the model ends behind its first LAYERS: rounding to 16 bits adds up from layer to layer, and
    behind dozens of them it hides a mistake, or looks like one.
    """
    config = model.config.get_text_config()
    before = config.num_hidden_layers
    config.num_hidden_layers = min(before, LAYERS)
    try:
        yield
    finally:
        config.num_hidden_layers = before


@contextlib.contextmanager
def small_windows(model: Any) -> Iterator[None]:
    """While it lasts, attention that slides over a window or is cut into chunks does so within a few tokens."""
    holders = {id(each): each for module in model.modules() for each in (module, getattr(module, "config", module))}
    kept = []
    for holder in holders.values():
        for name in ("sliding_window", "attention_chunk_size"):
            value = getattr(holder, "__dict__", {}).get(name)
            if isinstance(value, int) and value > WINDOW:
                kept.append((holder, name, value))
                setattr(holder, name, WINDOW)
    try:
        yield
    finally:
        for holder, name, value in kept:
            setattr(holder, name, value)


@contextlib.contextmanager
def watched(model: Any) -> Iterator[list[Tensor]]:
    """While it lasts, the list gets the last hidden states (T, H) of each call, in float32."""
    causal = model.get_base_model()
    kept: list[Tensor] = []
    body = causal.get_decoder()
    body = causal.model if body is causal else body  # Llama 4 does not say where it is
    handle = body.register_forward_hook(lambda _, __, output: kept.append(output[0][0].float()))
    try:
        yield kept
    finally:
        handle.remove()


@torch.no_grad()
def own_way(model: Any) -> Seen:
    """Each document by itself, by the model's own forward."""
    losses = []
    with watched(model) as hidden:
        for ids_T in documents_for(model):
            ids_1T = ids_T[None].to(model.device)
            logits_TV = model(input_ids=ids_1T, use_cache=False).logits[0, :-1].float()
            losses.append(float(torch.nn.functional.cross_entropy(logits_TV, ids_1T[0, 1:])))
    return Seen(losses, hidden)


@torch.no_grad()
def in_ways(model: Any, ways: Ways, documents: list[Tensor]) -> Seen:
    """The documents in training's ways: in one sequence where it packs. The losses take a call for each."""
    losses, hidden = [], []
    for group in [documents] if ways.packed else [[each] for each in documents]:
        items = [{"input_ids": ids_T.numpy(), "labels": ids_T.numpy()} for ids_T in group]
        given = join(items, ()).to(model.device)
        lengths = [len(ids_T) for ids_T in group]
        # Targets of one document are behind those of the other; each has one less than tokens.
        counts = [length - 1 for length in lengths]
        parts = zip(given.pop("positions").split(counts), given.pop("targets").split(counts), strict=True)
        with watched(model) as seen:
            sums = [model(**given, positions=at_K, targets=next_K)[0] for at_K, next_K in parts]
        losses += [float(loss) / count for loss, count in zip(sums, counts, strict=True)]
        hidden += seen[0].split(lengths)
    return Seen(losses, hidden)
