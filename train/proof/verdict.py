"""What the curves and the replies mean, in words, and what to do about it.

`history` is transformers' `trainer.state.log_history`: entries of a step with `loss`, entries of an evaluation with
`eval_loss`. Thresholds are small on purpose: a verdict is advice, requirements (gate.py) are what fails a run.

    >>> judge_curves([{"step": 10, "loss": 0.4}, {"step": 10, "eval_loss": 0.35}, ...])[0].text
    'evaluation loss rose from 0.350 at step 10 to 0.420 at step 30 while training loss fell from 0.400 to 0.240'
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import exp, inf
from typing import Any, Literal

from loraport.train.proof.scores import Scored, Scores

NOTABLE = 0.02  # share by which a loss must change to mean anything
LEARNT = 0.6  # share of held-out pairs ranked right from which on DPO has learnt something: half is chance
UNLIKELY = -1.0  # reward of the preferred replies, times 1 / beta nats, below which the run drove both replies out
CLOSE = 0.01  # ROUGE-L difference below which two models reply alike

History = Sequence[dict[str, Any]]


@dataclass(frozen=True)
class Verdict:
    """`title`: a few words. `text`: one clause without a full stop. `advice`: what to do, may be empty."""

    level: Literal["good", "note", "warning"]
    title: str
    text: str
    advice: str = ""

    def __str__(self) -> str:
        return f"{self.title}: {self.text}" + (f"; {self.advice}" if self.advice else "")


@dataclass(frozen=True)
class Evaluated:
    """One evaluation: its step and loss, the mean training loss since the one before, and of DPO `accuracy` and
    `margin` of the rewards.
    """

    step: int
    eval_loss: float
    train_loss: float | None
    rewards: dict[str, float] = field(default_factory=dict)

    @property
    def perplexity(self) -> float:
        """Exponential of the loss; infinite where that is too large for a float."""
        return exp(self.eval_loss) if self.eval_loss < 700 else inf


def evaluations(history: History) -> list[Evaluated]:
    """The evaluations of a run, one for each step, the last where a step has several."""
    found: dict[int, Evaluated] = {}
    since: list[float] = []
    for entry in history:
        if "loss" in entry:
            since.append(float(entry["loss"]))
        if "eval_loss" in entry:
            step = int(entry["step"])
            train_loss = sum(since) / len(since) if since else found[step].train_loss if step in found else None
            rewards = {
                name: float(value)
                for name in ("accuracy", "margin")
                if (value := entry.get(f"eval_reward_{name}")) is not None
            }
            found[step] = Evaluated(step, float(entry["eval_loss"]), train_loss, rewards)
            since = []
    return list(found.values())


def judge_curves(history: History) -> list[Verdict]:
    """Overfitting, or that more training may help, or that nothing was learnt."""
    found = evaluations(history)
    if len(found) < 2:
        return []
    best, last = min(found, key=lambda each: each.eval_loss), found[-1]
    if last.eval_loss > best.eval_loss * (1 + NOTABLE):
        return [judge_rise(best, last)]
    before = found[-2]
    if last is best and last.eval_loss < before.eval_loss * (1 - 5 * NOTABLE):
        text = f"evaluation loss still fell at the end, from {before.eval_loss:.3f} to {last.eval_loss:.3f}"
        return [Verdict("note", "not finished", text, "more epochs may bring more")]
    return []


def judge_rise(best: Evaluated, last: Evaluated) -> Verdict:
    """Evaluation loss rose after `best`: overfitting where training loss fell meanwhile, else instability."""
    from_to = f"from {best.eval_loss:.3f} at step {best.step} to {last.eval_loss:.3f} at step {last.step}"
    rose = f"evaluation loss rose {from_to}"
    kept = f"the checkpoint of step {best.step} is the one that is kept"
    if best.train_loss is None or last.train_loss is None or last.train_loss >= best.train_loss:
        return Verdict("warning", "evaluation loss rose", f"{rose}, {kept}", "a lower --learning-rate may help")
    fell = f"while training loss fell from {best.train_loss:.3f} to {last.train_loss:.3f}"
    return Verdict("warning", "overfitting", f"{rose} {fell}; {kept}", "train for fewer epochs, or on more rows")


def judge_preferences(metrics: Mapping[str, float]) -> list[Verdict]:
    """Of DPO: whether held-out pairs are ranked right, and whether the preferred replies became rarer too."""
    accuracy, margin = metrics["eval_reward_accuracy"], metrics["eval_reward_margin"]
    text = f"{accuracy:.0%} of the held-out pairs are ranked as preferred, with a margin of {margin:.2f}"
    if accuracy < LEARNT:
        advice = "train longer (--epochs, --learning-rate), or look whether the rows agree on what is preferred"
        found = [Verdict("warning", "learnt no preference", text, advice)]
    else:
        found = [Verdict("good", "learnt the preference", text)]
    reward = metrics["eval_chosen_reward"]
    if reward < UNLIKELY:
        text = f"the preferred outputs became less likely than under the base, too (reward {reward:.2f})"
        advice = "a lower --learning-rate, fewer --epochs or a higher --beta keeps them, or sft on them first"
        found.append(Verdict("note", "both replies fell", text, advice))
    return found


def judge_change(adapter: Sequence[Scored], base: Sequence[Scored]) -> list[Verdict]:
    """Of DPO: whether what was learnt shows in what is said; it may rank replies anew that it would not give."""
    alike = sum(one.text == other.text for one, other in zip(adapter, base, strict=True))
    if not adapter or alike < len(adapter):
        return []
    text = f"all {len(adapter)} replies are the base's own: the ranking changed, and what is said did not"
    advice = "train longer, lower --beta, raise --learning-rate, or train on the preferred outputs with sft"
    return [Verdict("warning", "shows in no reply", text, advice)]


def judge_replies(adapter: Scores, base: Scores, replies: Sequence[Scored], method: str = "sft") -> list[Verdict]:
    """Whether the adapter brought anything, stops, repeats itself, and whether the user's check went wrong.

    To reply as the references do is not the aim of DPO, which teaches to prefer them to other replies: there a user's
    check tells what was brought, or nothing does.
    """
    has_gain = method == "sft" or any(reply.checked is not None for reply in replies)
    found = [judge_gain(adapter, base)] if has_gain else []
    unending = round((1 - adapter.stop_rate) * adapter.replies)
    if unending:
        text = f"{unending} of {adapter.replies} replies do not stop by themselves"
        advice = "train longer (--epochs, --learning-rate), or look whether the rows end where a reply should"
        if method == "dpo":
            advice = "a lower --learning-rate or a higher --beta stays nearer to the base, or sft on such outputs first"
        found.append(Verdict("warning", "never stops", text, advice))
    looping = round(adapter.repetition * adapter.replies)
    if looping:
        text = f"{looping} of {adapter.replies} replies fall into a loop"
        advice = "look for repetition in the rows, or train " + ("less" if method == "dpo" else "longer")
        found.append(Verdict("warning", "repeats itself", text, advice))
    complaints = [reply.complaint for reply in replies if reply.complaint]
    if complaints:
        text = f"on {len(complaints)} of {adapter.replies} replies, which count as failed: {complaints[0]}"
        found.append(Verdict("warning", "your check went wrong", text))
    return found


def judge_gain(adapter: Scores, base: Scores) -> Verdict:
    """What the adapter brought over its base, from success first and ROUGE-L where success is equal."""
    counts = (
        f"{adapter.success:.0%} success against {base.success:.0%} of the base on {adapter.replies} held-out prompts"
    )
    gain = adapter.success - base.success or adapter.rouge_l - base.rouge_l
    advice = "look at the samples: is the base good enough, or are the rows not what you mean to teach?"
    if gain < -CLOSE:
        return Verdict(
            "warning",
            "worse than the base",
            f"{counts}, ROUGE-L {adapter.rouge_l:.2f} against {base.rouge_l:.2f}",
            advice,
        )
    if gain < CLOSE:
        return Verdict("warning", "brought nothing", f"the base answers as well: {counts}", advice)
    if adapter.success == base.success:
        text = f"success is {adapter.success:.0%} for both, ROUGE-L {adapter.rouge_l:.2f} against {base.rouge_l:.2f}"
        return Verdict("note", "closer to the references", text, "a --check of your own may say more than exact match")
    return Verdict("good", "better than the base", counts)
