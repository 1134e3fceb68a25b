"""A heading into a question: what a person would ask to be told what stands under it.

Rules of English for the titles of technical documentation, no model. Where no rule knows, the question asks what the
documentation says about the heading, which is always right and never elegant. Phrases are chosen by a hash of what
is asked, so that the same documents give the same rows and no phrase becomes a habit.

    >>> ask_heading("Installing the server", "Tea", "Tea", Words.of(""), Choice(0))
    'How do I install the server in Tea?'
"""

import hashlib
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from loraport.train.build.phrases import (
    ABOUT,
    BOTH,
    DETERMINERS,
    DOUBLED,
    GENERIC_OF,
    HOW,
    NOUN_GERUNDS,
    OF_THE_WHOLE,
    PREPOSITIONS,
    STARTS,
    UNASKED,
    VERBS,
    WHAT,
    terms_in,
)


@dataclass(frozen=True)
class Choice:
    """Chooses by what is asked about: the same for the same words and `seed`."""

    seed: int

    def of(self, phrases: Sequence[str], about: str) -> str:
        """One of the phrases."""
        return self.order(phrases, about)[0]

    def order(self, phrases: Sequence[str], about: str) -> list[str]:
        """All phrases in the order in which they are used."""

        def rank(phrase: str) -> bytes:
            return hashlib.sha256(f"{self.seed}\0{about}\0{phrase}".encode()).digest()

        return sorted(phrases, key=rank)


@dataclass(frozen=True)
class Words:
    """How often the prose of a document has a word in small letters and capitalised: what is a name, what is not."""

    small: Counter[str] = field(default_factory=Counter)
    capital: Counter[str] = field(default_factory=Counter)
    names: frozenset[str] = frozenset()  # words of the subjects

    @classmethod
    def of(cls, prose: str, names: Sequence[str] = ()) -> "Words":
        """Count the words of a text, code spans and first words of sentences aside; `names` keep their capitals."""
        text = re.sub(r"`[^`]*`", " ", prose)
        small = Counter(re.findall(r"(?<![\w./-])[a-z][a-z-]+(?![\w/])", text))
        capital = Counter(word.lower() for word in re.findall(r"(?<=[a-z,] )[A-Z][a-z-]+", text))
        return cls(small, capital, frozenset(word for name in names for word in name.lower().split()) - COMMON)

    def lower(self, heading: str, first: int = 0) -> str:
        """A heading, from its word `first` on, inside a sentence: what may be a name keeps its capital."""
        parts = heading.split()
        kept = {at for at, word in enumerate(parts) if self.may_be_name(word, at + first)}
        if kept - {0}:  # "Load Balancer Problems": all or nothing between the first and the last that may be a name
            kept |= set(range(min(kept), max(kept) + 1))
        return " ".join(word if at in kept else lower_first(word) for at, word in enumerate(parts))

    def may_be_name(self, word: str, at: int) -> bool:
        """Whether a capitalised word of a heading is a name, as far as the documents tell."""
        core = word.strip("()[],.:;\"'")
        small = core.lower()
        is_word = re.fullmatch(r"[A-Z][a-z]*(?:-[A-Za-z]+)*", core)
        if small in self.names:
            return True
        return bool(is_word) and small not in COMMON and self.small[small] + (at == 0) <= self.capital[small]


def lower_first(word: str) -> str:
    """A word with a small first letter, if it is capitalised and nothing more: not `API`, not `FastAPI`."""
    return word.lower() if re.fullmatch(r"[(\[\"']*[A-Z][a-z]*(?:-[A-Za-z]+)*[)\],.:;\"']*", word) else word


COMMON = frozenset((*VERBS, *BOTH, *DETERMINERS, *PREPOSITIONS)) | terms_in(
    "and, or, of, is, are, not, how, what, why, when, where, this, that, other, using, basic, advanced"
)


def gerund(verb: str) -> str:
    """`configuring` of `configure`."""
    if verb in DOUBLED:
        return f"{verb}{verb[-1]}ing"
    return f"{verb[:-1]}ing" if verb.endswith("e") and not verb.endswith("ee") else f"{verb}ing"


GERUNDS = {gerund(verb): verb for verb in (*VERBS, *BOTH, "begin", "work", "plug")}


def is_unasked(heading: str) -> bool:
    """Whether nobody asks a model about a section of this heading."""
    return bool(UNASKED.fullmatch(heading.strip(" .:!?`*")))


def action(heading: str, words: Words) -> str:
    """What a heading tells how to do ("install the server"), or empty when it names a thing."""
    first, _, rest = heading.partition(" ")
    first, second = first.lower(), rest.split(" ")[0].lower()
    if first in ("how",) and second == "to":
        return words.lower(rest.partition(" ")[2], first=2)
    verb = GERUNDS.get(first, first)
    if not rest or second in ("and", "or", "/", "&", "of") or verb not in (*VERBS, *BOTH):
        return ""
    ambiguous = verb in (NOUN_GERUNDS if first in GERUNDS else BOTH)
    if verb == "use" and second in ("case", "cases"):
        return ""
    if ambiguous and second not in DETERMINERS | (PREPOSITIONS if first in GERUNDS else {"up", "out"}):
        return ""
    rest = words.lower(rest, first=1)
    return " ".join([verb, re.sub(r"\b(and|or) (\w+ing)\b", lambda m: f"{m[1]} {GERUNDS.get(m[2], m[2])}", rest)])


def with_subject(words: str, subject: str) -> str:
    """`words in subject`, unless they name it already."""
    names = re.findall(r"\w+", subject.lower())
    return (
        words
        if not subject or not names or set(names) <= set(re.findall(r"\w+", words.lower()))
        else f"{words} in {subject}"
    )


def ask_heading(heading: str, owner: str, subject: str, words: Words, choice: Choice, defines: str = "") -> list[str]:
    """Questions for a section's heading, the first the one to use; none when it cannot be asked for.

    `owner`: the nearest heading above that says something. `subject`: what the documents are about. `defines`: the
    thing that the section's first sentence defines, if it does.
    """
    heading = re.sub(r"^about\s+(?=\w)", "", heading, flags=re.I)
    heading = re.sub(
        r"^(?:step|phase|stage|task|part|option|method|example)\s+#?(?:\d+(?:\.\d+)?|[A-Z])\s*[:.)–-]\s+",
        "",
        heading,
        flags=re.I,
    ).strip()
    if re.fullmatch(r"\w+ install(?:ation|ing)?", heading, re.I):
        heading = "Installation"
    phrases = GENERIC_OF.get(heading.lower().strip(" .:!"))
    if phrases is not None:
        is_whole = (
            owner.split(" ")[0].lower() in PREPOSITIONS
            or phrases in OF_THE_WHOLE
            or owner.lower() == heading.lower()
            or not is_short(owner)
        )
        about = (
            subject
            if is_whole and subject
            else with_subject(words.lower(owner) if owner != subject else owner, subject)
        )
        if not phrases:
            return [p.format(with_subject(heading.lower(), about)) for p in choice.order(ABOUT, heading + about)]
        return [p.format(about) for p in choice.order(phrases, heading + about)] if about else []
    if heading.lower().strip(" .:") in ("faq", "faqs", "frequently asked questions", "q&a"):
        return []
    if heading.endswith("?"):
        return [asked(heading, subject)]
    special = question_word(heading, subject, words)
    if special:
        return [special]
    if re.match(r"(?:before|after|when|if|while) \w", heading, re.I):
        return [f"What should I know {with_subject(words.lower(heading), subject)}?"]
    if is_name(heading):
        name = heading if "`" in heading else f"`{heading}`"
        return [p.format(name) for p in choice.order(name_phrases(name, subject), heading)]
    done = action(heading, words)
    if done:
        return [p.format(with_subject(done, subject)) for p in choice.order(HOW, heading)]
    if heading.split()[0].lower() in PREPOSITIONS and " " in heading and not defines:
        heading = f"{owner if owner != subject else f'using {subject}'} {words.lower(heading)}"
        owner = subject
    thing = defines or words.lower(heading)
    if not defines and len(heading.split()) < 3 and owner not in (subject, heading, "") and is_short(owner):
        thing = f"{thing} ({words.lower(owner)})"
    thing = with_subject(thing, subject)
    return [p.format(thing) for p in choice.order(WHAT if defines else ABOUT, heading)]


def ask_title(name: str, choice: Choice) -> list[str]:
    """Questions for the text under the title of what all documents are about."""
    return [
        phrase.format(name)
        for phrase in choice.order(("What is {}?", "Tell me about {}.", "Explain what {} is."), name)
    ]


def is_short(owner: str) -> bool:
    """Whether a heading can stand in brackets behind another one."""
    return len(owner.split()) < 5 and not owner.endswith("?")


def asked(heading: str, subject: str) -> str:
    """A heading that is a question already; what "it" is stands before it."""
    question = heading[0].upper() + heading[1:]
    unclear = re.search(r"\b(?:it|this|these|they|that|we|you)\b", heading, re.I) or len(heading.split()) < 4
    return (
        f"About {subject}: {question}" if subject and unclear and subject.lower() not in heading.lower() else question
    )


def question_word(heading: str, subject: str, words: Words) -> str:
    """A heading like "When to use it" or "How caching works" as a question; empty when it is none of these."""
    works = re.fullmatch(r"how (?!to )(.+?) works?", heading, re.I)
    if works:
        thing = subject if works.group(1).lower() == "it" and subject else words.lower(works.group(1))
        return f"How does {with_subject(thing, subject)} work?"
    to = re.fullmatch(r"(when|where|what|which \w+) (not )?to (.+)", heading, re.I)
    if to:
        return f"{to[1].capitalize()} should I {to[2] or ''}{with_subject(words.lower(to[3]), subject)}?"
    is_ = re.fullmatch(r"(what|who|where|why) (is|are|does|do|should|can) (.+)", heading, re.I)
    if is_:
        return asked(f"{heading}?", subject)
    if STARTS.match(heading) and not re.match(r"how to\b", heading, re.I) and len(heading.split()) > 2:
        return f"Explain {with_subject(heading[0].lower() + heading[1:], subject)}."
    return ""


def is_name(heading: str) -> bool:
    """Whether a heading is code: a function, an option, a file, a key."""
    bare = heading.strip("`")
    if re.fullmatch(r"`[^`]+`", heading):
        return True
    return " " not in bare and bool(
        re.search(r"[a-z]_[a-z]|\w\(\)|^--?\w|\w\.\w+\b(?<!\.)|::|[a-z][A-Z]|^/\w|^[A-Z]+(?:_[A-Z]+)+$", bare)
    )


def name_phrases(name: str, subject: str) -> tuple[str, ...]:
    """How to ask for something in code."""
    inside = f" in {subject}" if subject and subject.lower() not in name.lower() else ""
    if re.search(r"\)`?$|^`?--?\w", name):
        return (f"What does {{}} do{inside}?", f"What is {{}} for{inside}?", f"Explain {{}}{inside}.")
    return (f"What is {{}}{inside}?", f"What is {{}} for{inside}?", f"Explain {{}}{inside}.")
