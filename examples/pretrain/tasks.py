"""Reading tasks: synthetic documents whose questions can only be answered by copying from the context.

Real facts get memorised, not read, so names, types, defaults, descriptions and facts are drawn at random
(real ones are recombined, others are invented, some sentences are scrambled). Every answer is a piece
of the context, letter for letter. A task is a list of `(text, weight)` segments: the weight is the loss
weight of the segment's tokens, 1 for answers and `CONTEXT` for what cannot be predicted anyway.

    task = TaskMaker(functions, texts, seed=0).make()
    print("".join(text for text, _ in task))
"""

from __future__ import annotations

import json
import random
import re

from examples.pretrain.layouts import LAYOUTS, Entry
from examples.pretrain.wording import ASK, FACTS, HEADS, SYLLABLES, SYSTEMS

CONTEXT = 0.05  # loss weight of random context and question text
END = "<|endoftext|>"
TURN, TURN_END = "<|im_start|>", "<|im_end|>"

Segments = list[tuple[str, float]]
Questions = list[tuple[str, str]]


class TaskMaker:
    """Draws tasks from a seeded generator and from pools of real names, types, defaults and sentences."""

    def __init__(self, functions: list[dict], texts: list[str], seed: int) -> None:
        self.random = random.Random(seed)
        parameters = [p for f in functions for p in f["parameters"]]
        self.real = [Entry(p["name"], p["type"], p["default"], p["description"]) for p in parameters]
        self.lists = [[Entry(**p) for p in f["parameters"]] for f in functions if len(f["parameters"]) > 1]
        self.names = sorted({p.name for p in self.real})
        self.functions = sorted({f["name"] for f in functions})
        self.types = sorted({p.type for p in self.real})
        self.defaults = sorted({p.default for p in self.real if p.default})
        self.descriptions = sorted({p.description for p in self.real})
        sample = self.random.sample(texts, min(len(texts), 20_000))
        self.sentences = sorted({s for t in sample for s in re.findall(r"(?<=\. )[A-Z][^.\n]{25,110}\.(?=\s|$)", t)})
        self.words = sorted({w.lower() for d in self.descriptions for w in re.findall(r"[A-Za-z]{3,}", d)})

    def word(self) -> str:
        """A dictionary word, or an invented one in one case out of four."""
        if self.random.random() < 0.75:
            return self.random.choice(self.words)
        return "".join(self.random.choices(SYLLABLES, k=self.random.randint(2, 3)))

    def identifier(self) -> str:
        """A parameter name: real, or invented in snake case."""
        if self.random.random() < 0.5:
            return self.random.choice(self.names)
        name = "_".join(self.word() for _ in range(self.random.choice([1, 2, 2, 3])))
        return name + str(self.random.randint(0, 99)) if self.random.random() < 0.1 else name

    def function(self) -> str:
        """A function or class name, sometimes with modules before it."""
        r = self.random.random()
        if r < 0.4:
            name = self.random.choice(self.functions)
        elif r < 0.7:
            name = "_".join(self.word() for _ in range(self.random.randint(1, 3)))
        else:
            name = "".join(self.word().capitalize() for _ in range(self.random.randint(1, 3)))
        path = [self.word() for _ in range(self.random.choice([0, 0, 1, 1, 2]))]
        return ".".join([*path, name])

    def number(self) -> str:
        """A number as it is written in source code."""
        r = self.random
        return r.choice(
            [
                str(r.randint(0, 20)),
                str(r.randint(0, 5000)),
                f"{r.random() * 10:.{r.randint(1, 4)}f}",
                f"1e-{r.randint(1, 12):02d}",
                f"-{r.randint(1, 99)}",
                str(2 ** r.randint(0, 16)),
                f"{r.randint(1, 99)}e{r.randint(2, 9)}",
                f"{r.randint(0, 40)}.0",
            ]
        )

    def type(self) -> str:
        """A type description: real, or invented from the usual patterns."""
        if self.random.random() < 0.6:
            return self.random.choice(self.types)
        w, n = self.word, self.number
        base = self.random.choice(
            ["int", "float", "str", "bool", "array", "list", "ndarray", "callable", "dict", "tuple"]
        )
        options = ", ".join(f"'{w()}'" for _ in range(self.random.randint(2, 4)))
        return self.random.choice(
            [
                base,
                f"{base} or {w()}",
                f"{{{options}}}",
                f"{base} of shape ({w()}, {n()})",
                f"{base} > {n()}",
                f"{w().capitalize()}",
                f"{base} in [{n()}, {n()}]",
                f"list of {w()}",
                f"{w().capitalize()} or None",
                f"{base} of {w()} {w()}",
                f"({n()}, {n()}) {base}",
                f"{w()} {w()}",
                f"{w()}.{w().capitalize()}",
                f"{base} [{w()}={n()}]",
                f"Optional[{w().capitalize()}]",
                f"{base}, {{{options}}}",
            ]
        )

    def default(self) -> str:
        """A default value as source text: real, or invented."""
        r = self.random
        if r.random() < 0.35:
            return r.choice(self.defaults)
        return r.choice(
            [
                "None",
                "True",
                "False",
                self.number(),
                self.number(),
                self.number(),
                f"'{self.word()}'",
                f"'{self.word()}'",
                f"({self.number()}, {self.number()})",
                f"[{self.number()}]",
                f"'{self.word()}_{self.word()}'",
                f'"{self.word()}"',
                f"{self.word()}.{self.word()}",
                "()",
                f"{self.word()}",
                f"'{self.word()[:1]}'",
            ]
        )

    def description(self) -> str:
        """A sentence: real, joined from two halves, scrambled, or random words."""
        r = self.random
        first = r.choice(self.descriptions)
        kind = r.random()
        if kind < 0.55:
            return first
        words = first.split()
        if kind < 0.7:
            other = r.choice(self.descriptions).split()
            return " ".join(words[: len(words) // 2 + 1] + other[len(other) // 2 :])[:150]
        if kind < 0.85:
            r.shuffle(words)
            return " ".join(words)
        return " ".join(self.word() for _ in range(r.randint(2, 12)))

    def entry(self) -> Entry:
        """A parameter: a real one with its default redrawn now and then, or one recombined at random."""
        r = self.random
        if r.random() < 0.4:
            entry = r.choice(self.real)
            return entry._replace(default=self.default()) if r.random() < 0.5 else entry
        default = self.default() if r.random() < 0.7 else ""
        return Entry(self.identifier(), self.type(), default, self.description())

    def varied(self, text: str) -> str:
        """The text with one of its words or numbers replaced, or one word more or less: a near miss."""
        r = self.random
        spans = [m.span() for m in re.finditer(r"[A-Za-z0-9]+", text)]
        if not spans:
            return text + str(r.randint(0, 9))
        start, end = r.choice(spans)
        old = text[start:end]
        if old.isdigit():
            new = str(r.randint(0, 10 ** len(old)))
        elif len(old) <= 2:
            new = r.choice("abcdefghijklmnopqrstuvwxyz") + old[1:]
        else:
            new = r.choice([self.word(), self.word(), f"{old} {self.word()}", old[:-1], old + r.choice("sxy2")])
        return text[:start] + new + text[end:]

    def sibling(self, entry: Entry) -> Entry:
        """A parameter that is easily taken for `entry`: any of its fields the same or nearly so."""
        r = self.random
        name = r.choice(
            [f"{entry.name}_{self.word()}", f"{self.word()}_{entry.name}", self.varied(entry.name).replace(" ", "_")]
        )
        kind = r.choice([entry.type, self.varied(entry.type), self.varied(entry.type), self.type()])
        default = r.choice([entry.default, self.varied(entry.default), self.default(), ""]) if entry.default else ""
        description = r.choice([self.varied(entry.description), self.varied(entry.description), self.description()])
        return Entry(name if r.random() < 0.7 else self.identifier(), kind, default, description)

    def entries(self) -> list[Entry]:
        """One to twelve parameters (mostly two to five) with different names and descriptions.

        Drawn one by one, or the list of a real function; some get siblings that make careless reading fail.
        """
        r = self.random
        count = r.choice([1, 2, 2, 3, 3, 3, 4, 4, 5, 5, 6, 8, 12])
        if r.random() < 0.25:
            real = r.choice(self.lists)
            start = r.randrange(max(1, len(real) - count + 1))
            drawn = real[start : start + count]
        else:
            drawn = [self.entry() for _ in range(count)]
        if r.random() < 0.4:
            drawn = drawn[: max(1, count // 2)]
            drawn = drawn + [self.sibling(r.choice(drawn)) for _ in range(max(1, count - len(drawn)))]
            r.shuffle(drawn)
        unique = {e.name: e for e in drawn}
        return list({e.description: e for e in unique.values()}.values())

    def parameter_list(self) -> tuple[str, Questions]:
        """A parameter list in one of a dozen layouts, and questions about it."""
        function, entries = self.function(), self.entries()
        layout = self.random.choice(LAYOUTS)
        body = layout(
            entries, self.random.choice(["default {}", "default={}", "default: {}", "by default {}", "defaults to {}"])
        )
        head = self.random.choice(HEADS).format(f=function)
        short = function.split(".")[-1] if self.random.random() < 0.7 else function
        count = min(self.random.choice([1, 2, 4, 6, 8]), 3 * len(entries))
        questions = [self.ask(function, short, entries) for _ in range(count)]
        return f"{head}\n{body}", list(dict.fromkeys(questions))

    def ask(self, function: str, short: str, entries: list[Entry]) -> tuple[str, str]:
        """One question about a parameter list and its answer."""
        r = self.random
        index = r.randrange(len(entries))
        entry = entries[index]
        kinds = ["type", "type", "description", "description", "name", "name"]
        kinds += ["default"] * 3 + ["default_by_description"] if entry.default else []
        kinds += ["type_by_description"] + (["function"] if r.random() < 0.5 else [])
        kinds += ["name_by_type"] if sum(e.type == entry.type for e in entries) == 1 else []
        kinds += ["name_by_default"] if entry.default and sum(e.default == entry.default for e in entries) == 1 else []
        kinds += ["after"] if index + 1 < len(entries) and r.random() < 0.5 else []
        kinds += ["before"] if index > 0 and r.random() < 0.5 else []
        kind = r.choice(kinds)
        answer = {
            "type": entry.type,
            "type_by_description": entry.type,
            "description": entry.description,
            "function": function,
            "default": entry.default,
            "default_by_description": entry.default,
            "after": entries[min(index + 1, len(entries) - 1)].name,
            "before": entries[index - 1].name,
        }.get(kind, entry.name)
        words = entry.description.split()
        part = " ".join(words[: max(4, r.randint(len(words) // 2, len(words)))])
        if sum(part in e.description for e in entries) > 1:
            part = entry.description
        question = r.choice(ASK[kind])
        return question.format(n=entry.name, f=short, d=part, t=entry.type, x=entry.default), answer

    def records(self) -> tuple[str, Questions]:
        """Lines of settings, a table or JSON with random keys and values, and questions by key."""
        r = self.random
        keys = list(dict.fromkeys(self.identifier() for _ in range(r.randint(2, 10))))
        values = [r.choice([self.default, self.number, self.word, self.function, self.type])() for _ in keys]
        mark = r.choice([" = ", ": ", "=", " -> ", "\t", ", ", " is ", " | "])
        text = "\n".join(f"{k}{mark}{v}" for k, v in zip(keys, values, strict=True))
        if r.random() < 0.15:
            text = json.dumps(dict(zip(keys, values, strict=True)), indent=r.choice([None, 1, 2]))
        head = r.choice(["", "", "Settings:\n", f"[{self.word()}]\n", f"{self.function()}\n"])
        asks = ["What is {k}?", "What is the value of {k}?", "value of {k}", "Which value belongs to {k}?", "Give {k}."]
        pairs = [(r.choice(asks).format(k=k), v) for k, v in zip(keys, values, strict=True)]
        pairs += [
            (f"Which key has the value {v}?", k) for k, v in zip(keys, values, strict=True) if values.count(v) == 1
        ]
        if text.startswith("{"):
            pairs = [(q, a) for q, a in pairs if a in text]
        return head + text, r.sample(pairs, min(len(pairs), r.randint(1, 8)))

    def facts(self) -> tuple[str, Questions]:
        """Short statements about invented people and places, and questions about them."""
        r = self.random
        statements, questions = [], []
        for sentence, asks in r.choices(FACTS, k=r.randint(2, 8)):
            names = ["".join(r.choices(SYLLABLES, k=r.randint(2, 3))).capitalize() for _ in "ab"]
            values = {
                "a": names[0],
                "b": names[1],
                "w": self.word(),
                "y": str(r.randint(1200, 2030)),
                "k": str(r.randint(2, 99)),
                "m": f"{r.randint(10, 59)}",
                "p": str(r.randint(1, 30)),
                "c": f"{self.word()}-{r.randint(1, 999)}",
            }
            statements.append(sentence.format(**values))
            question, key = r.choice(asks)
            questions.append((question.format(**values), values[key]))
        return r.choice([" ", "\n"]).join(statements), r.sample(questions, r.randint(1, len(questions)))

    def passage(self) -> tuple[str, Questions]:
        """Real sentences in random order; quote the one that mentions or continues something."""
        r = self.random
        sentences = r.sample(self.sentences, r.randint(2, 6))
        questions = []
        for index, sentence in enumerate(sentences):
            words = sentence.split()
            cut = r.randint(2, max(2, len(words) - 2))
            start, rest = " ".join(words[:cut]), " ".join(words[cut:])
            middle = " ".join(words[max(0, cut - 2) : cut + 1])
            questions += [(f"Complete: {start}", rest), (f'Which sentence says "{middle}"?', sentence)]
            questions += [(f"What comes after this: {sentences[index - 1]}", sentence)] if index else []
        return r.choice([" ", "\n", "\n- "]).join(sentences), r.sample(questions, r.randint(1, min(5, len(questions))))

    def exercise(self) -> tuple[str, Questions]:
        """A context with its questions, of one of the four families."""
        families = [self.parameter_list, self.records, self.facts, self.passage]
        return self.random.choices(families, weights=[70, 12, 9, 9])[0]()

    def make(self, filler: str = "") -> Segments:
        """A whole document, plain or as a chat; `filler` is text put between context and question."""
        context, questions = self.exercise()
        if filler:
            before = self.random.choice(["", filler])
            context = f"{before}\n\n{context}\n\n{'' if before else filler}".strip()
        if self.random.random() < 0.4:
            return self.chat(context, questions)
        return self.plain(context, questions)

    def plain(self, context: str, questions: Questions) -> Segments:
        """Context, then marked questions and answers, as a text document."""
        q, a = self.random.choice(
            [("Question:", "Answer:"), ("Q:", "A:"), ("", "->"), ("Question:", "The answer is:"), ("?", "=")]
        )
        gap = self.random.choice(["\n", "\n\n"])
        segments: Segments = [(context + gap, CONTEXT)]
        for question, answer in questions:
            segments += [(f"{q} {question}\n{a}".strip(), CONTEXT), (f" {answer}\n", 1.0)]
        return [*segments, (END, 1.0)]

    def chat(self, context: str, questions: Questions) -> Segments:
        """The same as a ChatML conversation; later questions are further turns."""
        r = self.random
        system = f"{TURN}system\n{r.choice(SYSTEMS)}{TURN_END}\n" if r.random() < 0.3 else ""
        ask = r.choice(
            [
                "{c}\n\n{q}",
                "{c}\n{q}",
                "Context:\n{c}\n\nQuestion: {q}",
                "{q}\n\n{c}",
                "{c}\n---\n{q}",
                "Read this.\n\n{c}\n\n{q}",
            ]
        )
        if r.random() < 0.15:  # the context in the system turn
            system, ask = f"{TURN}system\n{context}{TURN_END}\n", "{q}"
        segments: Segments = [(system, CONTEXT)] if system else []
        for index, (question, answer) in enumerate(questions):
            content = question if index else ask.replace("{c}", context).replace("{q}", question)
            segments += [
                (f"{TURN}user\n{content}{TURN_END}\n{TURN}assistant\n", CONTEXT),
                (f"{answer}{TURN_END}", 1.0),
                ("\n", CONTEXT),
            ]
        return segments
