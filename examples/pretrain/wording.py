"""The words of the reading tasks: syllables for invented names, headings, question wordings, fact sentences."""

from __future__ import annotations

SYLLABLES = (  # noqa: SIM905
    "ba be bo bra dan del dor el en fal fen gar gil hal hol in jor kal ken kri la lin lo lum mar mer mi mon na nel "
    "nor ol or pel per pra qui ra rel ri ron sa sel sim sol ta tel tin tor tra ul um va vel vin vor wa wen wis xan "
    "yel zan zor"
).split()
SYSTEMS = [
    "You are a helpful assistant.",
    "Answer from the text alone.",
    "You answer questions about documentation.",
    "Be brief.",
    "Reply with the answer and nothing else.",
    "You are a careful reader.",
]
HEADS = [
    "Parameters of {f}:",
    "{f}",
    "Function {f} takes these parameters.",
    "Documentation of {f}\n",
    "{f}(...)",
    "# {f}",
    "The options of {f} are:",
    "Arguments for {f}:",
    "{f} parameters\n",
    "class {f}:",
    "def {f}",
    "From the manual of {f}:",
]
ASK = {
    "type": [
        "What is the type of {n}?",
        "What is the type of {n} in {f}?",
        "Which type does {n} have?",
        "type of {n}",
        "What type of value does {f} expect for {n}?",
        "Of what type is the parameter {n}?",
        "Give the type of {n}.",
        "In {f}, what kind of value may {n} be?",
        "What can {n} be?",
        "Tell me the type of `{n}`.",
    ],
    "default": [
        "What is the default of {n}?",
        "What is the default value of {n} in {f}?",
        "Which default does {n} have?",
        "default of {n}",
        "What value does {f} use for {n} when it is not given?",
        "Give the default of {n}.",
        "If I leave out {n}, which value is used?",
        "To what does {n} default?",
        "Tell me the default of `{n}` in {f}.",
    ],
    "description": [
        "What does {n} mean?",
        "What is {n} for?",
        "What does the parameter {n} of {f} do?",
        "Describe {n}.",
        "meaning of {n}",
        "How does {f} describe {n}?",
        "What is said about {n}?",
        "Explain the parameter `{n}`.",
    ],
    "name": [
        'Which parameter is described as "{d}"?',
        "Which parameter of {f} does this describe: {d}?",
        "Name the parameter: {d}",
        "What is the name of the parameter for: {d}?",
        "{d}: which parameter is that?",
        'Which parameter has the meaning "{d}"?',
        "Which argument of {f} is meant by '{d}'?",
    ],
    "type_by_description": [
        'What is the type of the parameter described as "{d}"?',
        "Of what type is the parameter that means: {d}?",
    ],
    "default_by_description": [
        'What is the default of the parameter described as "{d}"?',
        "Which default belongs to: {d}?",
    ],
    "name_by_type": [
        "Which parameter has the type {t}?",
        "Which parameter of {f} is of type {t}?",
        "What is of type {t} here?",
    ],
    "name_by_default": ["Which parameter has the default {x}?", "Which parameter of {f} is {x} unless given?"],
    "after": ["Which parameter comes after {n}?", "What parameter follows {n} in the list?"],
    "before": ["Which parameter comes before {n}?", "What is listed right before {n}?"],
    "function": ["Which function is this about?", "What is documented here?", "Whose parameters are these?"],
}
FACTS = [
    ("{a} lives in {b}.", [("Where does {a} live?", "b"), ("Who lives in {b}?", "a")]),
    (
        "The {w} of {a} was built in {y}.",
        [("When was the {w} of {a} built?", "y"), ("Whose {w} was built in {y}?", "a")],
    ),
    ("{a} bought {k} {w} from {b}.", [("How many {w} did {a} buy?", "k"), ("From whom did {a} buy {w}?", "b")]),
    ("In {y}, {a} moved to {b}.", [("When did {a} move to {b}?", "y"), ("Where did {a} move in {y}?", "b")]),
    ("The code for {a} is {c}.", [("What is the code for {a}?", "c"), ("To whom does the code {c} belong?", "a")]),
    (
        "{a}, a {w} from {b}, is {k} years old.",
        [("How old is {a}?", "k"), ("Where is {a} from?", "b"), ("What is {a}?", "w")],
    ),
    ("{a} is the {w} of {b}.", [("Who is the {w} of {b}?", "a"), ("What is {a} to {b}?", "w")]),
    (
        "The train to {b} leaves at {k}:{m} from platform {p}.",
        [("From which platform does the train to {b} leave?", "p")],
    ),
    ("{a} paid {k}.{m} for the {w}.", [("What did {a} pay for?", "w"), ("Who paid for the {w}?", "a")]),
    ("The {w} is stored in {c}.", [("Where is the {w} stored?", "c"), ("What is stored in {c}?", "w")]),
]
