"""Replies into figures: exact match, ROUGE-L, BLEU, stop rate, repetition, lengths.

BLEU is sacrebleu's, because a BLEU of one's own is comparable with nobody's. ROUGE-L is written out: its usual package
has had no release since 2022 and drops every letter outside a to z. What a user's own check says comes from check.py.

    >>> rouge_l("the cat sat", "the cat sat down")
    0.857...
"""

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from loraport.clients.rates import Rate, make_rate

# A word, or one character of a script that is written without blanks (kana, Han, Hangul).
SEPARATE = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af"
WORD = re.compile(rf"[{SEPARATE}]|[^\W{SEPARATE}]+")
LONGEST_BLOCK = 64  # tokens of a block that is looked for in loops
LOOPS, LEAST_LOOPED = 4, 24  # times in a row, and tokens altogether, from which repetition is a loop


@dataclass(frozen=True)
class Scored:
    """One reply and what it is worth. `checked`: 0 to 1 from the user's check, None where there is none."""

    text: str
    tokens: int
    stopped: bool
    exact: bool
    rouge_l: float
    loops: bool
    checked: float | None = None
    complaint: str = ""  # what went wrong in the user's check

    @property
    def success(self) -> float:
        """0 to 1: the user's check, else exact match; 0 for a reply that does not stop by itself."""
        if not self.stopped:
            return 0.0
        return float(self.exact) if self.checked is None else self.checked


@dataclass(frozen=True)
class Scores:
    """The figures of one model over all its replies; shares and ROUGE-L from 0 to 1, BLEU from 0 to 100."""

    replies: int
    success: float
    exact_match: float
    rouge_l: float
    bleu: float
    stop_rate: float
    repetition: float  # share of replies that fall into a loop which their reference does not have
    reply_tokens: float  # mean, the stop token included
    longest_reply: int

    def to_metrics(self, prefix: str = "") -> dict[str, float]:
        """By name, as they stand in the manifest and in requirements; `base_success` is the base's."""
        return {prefix + name: float(value) for name, value in asdict(self).items() if name != "replies"}

    def rate(self, name: str) -> Rate:
        """A share with its 95% interval."""
        return make_rate(round(getattr(self, name) * self.replies), self.replies)


def summarise(replies: Sequence[Scored], references: Sequence[str]) -> Scores:
    """The figures of a model over its replies, one for each reference; at least one."""
    count = len(replies)
    return Scores(
        replies=count,
        success=sum(reply.success for reply in replies) / count,
        exact_match=sum(reply.exact for reply in replies) / count,
        rouge_l=sum(reply.rouge_l for reply in replies) / count,
        bleu=bleu([reply.text for reply in replies], references),
        stop_rate=sum(reply.stopped for reply in replies) / count,
        repetition=sum(reply.loops for reply in replies) / count,
        reply_tokens=sum(reply.tokens for reply in replies) / count,
        longest_reply=max(reply.tokens for reply in replies),
    )


def same_text(reply: str, reference: str) -> bool:
    """Whether two texts are equal, white space counting as one blank."""
    return reply.split() == reference.split()


def words(text: str) -> list[str]:
    """Lower-case words of a text in any script, punctuation left out; all characters where there is no word."""
    found = WORD.findall(text.lower())
    return found or [character for character in text if not character.isspace()]


def rouge_l(reply: str, reference: str) -> float:
    """F1 of the longest common subsequence of words (Lin 2004), from 0 to 1."""
    own, wanted = words(reply), words(reference)
    common = common_length(own, wanted)
    return 2 * common / (len(own) + len(wanted)) if common else float(not own and not wanted)


def common_length(first: Sequence[str], second: Sequence[str]) -> int:
    """Length of the longest common subsequence, a whole row of the table at a time as bits (Hyyrö 2004)."""
    positions: dict[str, int] = {}
    for index, word in enumerate(first):
        positions[word] = positions.get(word, 0) | 1 << index
    everything = (1 << len(first)) - 1
    row = everything
    for word in second:
        matches = row & positions.get(word, 0)
        row = ((row + matches) | (row - matches)) & everything
    return len(first) - row.bit_count()


def bleu(replies: Sequence[str], references: Sequence[str]) -> float:
    """Corpus BLEU-4 from 0 to 100 as sacrebleu computes it (tokens of mteval 13a; of each character for Han script)."""
    import sacrebleu

    tokenizer = "zh" if re.search("[\u4e00-\u9fff]", "".join(references)) else "13a"
    scored = sacrebleu.corpus_bleu(
        list(replies), [list(references)], tokenize=tokenizer, use_effective_order=True, force=True
    )
    return float(scored.score)


def has_loop(tokens: Sequence[int]) -> bool:
    """Whether a block of up to 64 tokens follows itself at least three times, over 24 tokens or more.

    With period p, tokens that equal the one p before them make up the loop without its first block.
    """
    for period in range(1, min(LONGEST_BLOCK, len(tokens) // LOOPS) + 1):
        needed, run = max((LOOPS - 1) * period, LEAST_LOOPED - period), 0
        for token, earlier in zip(tokens[period:], tokens, strict=False):
            run = run + 1 if token == earlier else 0
            if run >= needed:
                return True
    return False
