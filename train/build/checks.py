"""Is an answer that a model wrote supported by its source? Numbers, names and most words of it must stand there.

Lexical, so it is cheap, explains itself and errs on the side of dropping: a figure, identifier, quoted name or address
that the source does not have is what models make up. It does not notice a wrong claim made of the right words; for
that, `--judge` asks the model itself once more.

    >>> problem("What is the default?", "It is 8001.", "The default port is 8000.")
    'the number 8001 is not in the source'
"""

import re

from loraport.train.build.phrases import words_in

STOP_WORDS = frozenset(
    words_in(
        """
    a about above after all also am an and any are as at be because been before being below between both but
    by can cannot could did do does doing done down during each either else etc even ever every few for from
    further get gets given gives goes had has have having here how however i if in into is it its itself just
    let like made make makes many may means might more most must my need needs no nor not of off on once one
    only or other our out over own per please same shall should since so some such than that the their them
    then there these they this those through to too under until up upon use used uses using very via was way
    we well were what when where whether which while who whom whose why will with within without would yes you
    your answer question following example allows allow provides provide called specific value values set sets
    first second
    """
    )
)
NUMBER = re.compile(r"(?<![\w.])\d[\d,_]*(?:\.\d+)*(?![\w])|(?<![\w])\d+(?:\.\d+)*(?=[a-zA-Z%]{1,4}\b)")
IDENTIFIER = re.compile(
    r"`([^`\n]+)`|(?<![\w/])(--?[a-zA-Z][\w-]+)|"
    r"\b([A-Za-z]\w*(?:_\w+|(?:\.\w+)+|(?:::\w+)+))\b(?![.]?\w)|"
    r"\b([A-Za-z][\w.]*)\(\)|\b([a-z]+[A-Z]\w+|[A-Z][a-z]+[A-Z]\w*|[A-Z]{2,}\w*)\b"
)
QUOTED = re.compile(r"[\"“]([^\"”\n]{2,80})[\"”]")
ADDRESS = re.compile(r"https?://[^\s)>\]\"'`]+")
ABOUT_THE_TEXT = re.compile(
    r"\b(?:according to|in|from|based on|described in|mentioned in|given in|provided by|as per)\s+"
    r"(?:the|this|that)\s+(?:given |provided |above |following )?"
    r"(?:text|passage|excerpt|context|snippet|paragraph)\b|"
    r"\b(?:the|this) (?:text|passage|excerpt|snippet|paragraph) (?:says|states|mentions|describes|does|is)\b|"
    r"\b(?:as|code|example|text|passage) (?:shown|mentioned|described|given) above\b|"
    r"\bprovided (?:text|context|passage|documentation)\b",
    re.I,
)
REFUSES = re.compile(
    r"^\W*(?:i'?m sorry|i am sorry|sorry|as an ai|i (?:can(?:not|'t)|do(?:n't| not) know|am unable))|"
    r"\b(?:is|are|was) not (?:mentioned|specified|stated|provided|described) (?:in|by)\b|"
    r"\bdoes not (?:mention|specify|say)\b",
    re.I,
)
NUMBER_WORDS = {
    "one": "1",
    "two": "2",
    "three": "3",
    "four": "4",
    "five": "5",
    "six": "6",
    "seven": "7",
    "eight": "8",
    "nine": "9",
    "ten": "10",
}
SUPPORTED_WORDS = 0.7
LONGEST_QUOTE = 60


def problem(question: str, answer: str, source: str) -> str:
    """What is wrong with a pair, in words; empty when nothing is found."""
    return malformed(question, answer) or unsupported(answer, source) or foreign_question(question, source)


def malformed(question: str, answer: str) -> str:
    """A pair that nobody should learn from, whatever its source says."""
    if len(question.split()) < 3 or not answer.strip():
        return "an empty question or answer"
    if ABOUT_THE_TEXT.search(question) or ABOUT_THE_TEXT.search(answer):
        return "it speaks of the text, which whoever asks does not see"
    if REFUSES.search(answer):
        return "the answer says that it does not know"
    if words_of(question) == words_of(answer):
        return "the answer repeats the question"
    return ""


def unsupported(answer: str, source: str) -> str:
    """What in an answer its source does not have; empty when all is there."""
    flat = flatten(source)
    for name, found in (("address", ADDRESS.findall(answer)), ("number", missing_numbers(answer, source))):
        for value in found:
            if name == "number" or value.rstrip(".,;:") not in source:
                return f"the {name} {value[:LONGEST_QUOTE]} is not in the source"
    plain = ADDRESS.sub(" ", answer)
    for match in IDENTIFIER.finditer(without_fences(plain)):
        name = next(group for group in match.groups() if group)
        if flatten(name) and flatten(name) not in flat:
            return f"`{name[:LONGEST_QUOTE]}` is not in the source"
    for quoted in QUOTED.findall(plain):
        if flatten(quoted) not in flat:
            return f'"{quoted[:LONGEST_QUOTE]}" is not in the source'
    return missing_words(plain, source)


def without_fences(text: str) -> str:
    """Code blocks without their fences, whose language need not be in the source."""
    return re.sub(r"^\s*(`{3,}|~{3,})\w*\s*$", " ", text, flags=re.M)


def flatten(text: str) -> str:
    """Text for comparing: small letters, markup and spaces aside."""
    return re.sub(r"[\s`*\"'“”‘’]+", " ", text.lower()).replace(" ()", "()").removesuffix("()").strip(" .,;:()")


def numbers_of(text: str) -> list[str]:
    """Numbers in a text, thousands separators and closing zeros aside; list numbers do not count."""
    text = re.sub(r"^\s*\d{1,2}[.)]\s", " ", text, flags=re.M)
    found = (re.sub(r"[,_](?=\d{3})", "", match.group(0)).rstrip(",_.") for match in NUMBER.finditer(text))
    return [re.sub(r"\.0+$", "", number) for number in found]


def missing_numbers(answer: str, source: str) -> list[str]:
    """Numbers of the answer that the source does not have, also not as a word."""
    there = set(numbers_of(source)) | {
        NUMBER_WORDS[word] for word in re.findall(r"[a-z]+", source.lower()) if word in NUMBER_WORDS
    }
    there |= set(re.findall(r"\d+(?:\.\d+)*", source))
    return [number for number in numbers_of(answer) if number not in there]


def words_of(text: str) -> list[str]:
    """The content words of a text, their endings cut so that `trains` and `training` are one."""
    found = re.findall(r"[^\W\d_][\w'-]{2,}", text.lower())
    return [stem(word) for word in found if word not in STOP_WORDS]


def stem(word: str) -> str:
    """A word without its most common endings."""
    for ending in (
        "ations",
        "ation",
        "ings",
        "ing",
        "edly",
        "ers",
        "ies",
        "ied",
        "ed",
        "er",
        "es",
        "ly",
        "s",
        "e",
        "y",
    ):
        if word.endswith(ending) and len(word) - len(ending) >= 3:
            word = word[: -len(ending)]
            break
    return word[:-1] if len(word) > 3 and word[-1] == word[-2] else word


def missing_words(answer: str, source: str) -> str:
    """Whether too many content words of an answer are foreign to the source."""
    wanted, there = words_of(answer), set(words_of(source))
    if not wanted:
        return ""
    held = sum(word in there for word in wanted) / len(wanted)
    if held >= SUPPORTED_WORDS:
        return ""
    foreign = list(dict.fromkeys(word for word in wanted if word not in there))
    return f"only {held:.0%} of its words are in the source (not: {', '.join(foreign[:5])})"


def foreign_question(question: str, source: str) -> str:
    """Names in code and numbers of a question that the source does not have."""
    flat = flatten(source)
    for match in re.finditer(r"`([^`\n]+)`", question):
        if flatten(match.group(1)) not in flat:
            return f"the question's `{match.group(1)[:LONGEST_QUOTE]}` is not in the source"
    return ""
