"""The adapter against its base on held-out prompts: both reply, both are scored, and they are laid side by side.

>>> asked = hold_out(encoder, spread(eval_rows, config.eval_prompts))
>>> compared = compare(model, encoder, asked, load_check("regex:^Source: "))
>>> compared.metrics()["success"], compared.metrics()["base_success"]
(0.95, 0.0)
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from loraport.clients.rows import Row
from loraport.train.data.tokens import Encoder
from loraport.train.proof.check import Check, CheckFailed
from loraport.train.proof.scores import Scored, Scores, has_loop, rouge_l, same_text, summarise


@dataclass(frozen=True)
class HeldOut:
    """One prompt that was not trained on. `row` is what a user's check is given beside the reply."""

    line: int
    messages: list[dict[str, Any]]
    prompt: list[int]
    reference: str
    reference_tokens: list[int]
    row: dict[str, Any]


@dataclass(frozen=True)
class Sample:
    """A held-out prompt with the replies of both models."""

    asked: HeldOut
    adapter: Scored
    base: Scored


@dataclass(frozen=True)
class Comparison:
    """All samples, and the figures of both models over them."""

    samples: list[Sample]
    adapter: Scores
    base: Scores

    def metrics(self) -> dict[str, float]:
        """Figures by the names that requirements use; the base's begin with `base_`."""
        gain = self.adapter.success - self.base.success
        return self.adapter.to_metrics() | self.base.to_metrics("base_") | {"gain": gain}


def hold_out(encoder: Encoder, rows: Sequence[Row]) -> list[HeldOut]:
    """Rows as prompts with references: the last assistant turn is asked for. Documents have none and are left out."""
    return [
        HeldOut(
            line=row.line,
            messages=list(row.prompt),
            prompt=encoder.prompt_of(row),
            reference=row.reference,
            reference_tokens=list(encoder.tokenizer(row.reference, add_special_tokens=False)["input_ids"]),
            row={"messages": row.messages} | ({"tools": row.tools} if row.tools else {}),
        )
        for row in rows
        if row.text is None
    ]


def compare(
    model: Any,
    encoder: Encoder,
    asked: Sequence[HeldOut],
    check: Check | None = None,
    on_reply: Callable[[int], None] = lambda count: None,
) -> Comparison:
    """Replies and figures of adapter and base to at least one prompt. `on_reply` is told how many came.

    `model`: a PeftModel in evaluation mode, whose adapter is switched off for the base. Raises ResourceError.
    """
    from loraport.train.proof.generate import generate, reply_limit

    prompts = [each.prompt for each in asked]
    limits = [reply_limit(len(each.reference_tokens)) for each in asked]
    replied = generate(model, prompts, limits, encoder.stop_tokens, on_reply)
    with model.disable_adapter():
        before = generate(model, prompts, limits, encoder.stop_tokens, on_reply)
    samples = [
        Sample(each, *(score(encoder, each, reply.tokens, reply.stopped, check) for reply in replies))
        for each, *replies in zip(asked, replied, before, strict=True)
    ]
    references = [each.reference for each in asked]
    return Comparison(
        samples,
        summarise([sample.adapter for sample in samples], references),
        summarise([sample.base for sample in samples], references),
    )


def score(encoder: Encoder, asked: HeldOut, tokens: list[int], stopped: bool, check: Check | None) -> Scored:
    """What one reply is worth; a check that goes wrong makes it a failed one with a complaint."""
    text = str(encoder.tokenizer.decode(tokens[:-1] if stopped else tokens))
    checked, complaint = None, ""
    if check:
        try:
            checked = check.judge(text, asked.row)
        except CheckFailed as error:
            checked, complaint = 0.0, str(error)
    return Scored(
        text=text,
        tokens=len(tokens),
        stopped=stopped,
        exact=same_text(text, asked.reference),
        rouge_l=rouge_l(text, asked.reference),
        loops=has_loop(tokens) and not has_loop(asked.reference_tokens),
        checked=checked,
        complaint=complaint,
    )
