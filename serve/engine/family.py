"""Which of vLLM's parsers read a base's thoughts and calls of tools, and how `--reasoning-parser` and the like say so.

A wrong parser is worse than none: a reasoning parser that waits for an end of thoughts which never comes takes the
whole reply for thoughts, and the client sees an empty one. So a parser is chosen only where the chat template renders
the very form that it reads (chat.py), where the tokenizer has the tokens that it looks for (vLLM 0.32 does not start
without them), and where the recorded replies of every adapter would not be lost in it. Otherwise there is none.

All names here are registered in 0.25 and 0.32 alike (vllm/reasoning/__init__.py, vllm/tool_parsers/__init__.py).

    >>> read_family(base, manifests, (0, 32)).arguments()
    ['--reasoning-parser', 'qwen3', '--enable-auto-tool-choice', '--tool-call-parser', 'hermes']
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from loraport.serve.engine.chat import ARGUMENT, TOOL_NAME, Chat, read_chat
from loraport.serve.engine.versions import Version
from loraport.serve.plan.settings import Choice
from loraport.train.base_model import Base
from loraport.train.manifest import Manifest, Reply


@dataclass(frozen=True)
class Form:
    """A way to write the call of a tool. `pattern`: in a rendered call; `tokens` that the parser does not do without.

    `kinds`: beginnings of the model_type that it is for; empty: whatever writes so.
    """

    parser: str
    pattern: str
    shown: str
    tokens: tuple[str, ...] = ()
    kinds: tuple[str, ...] = ()


JSON_CALL = rf'\{{"name": "{TOOL_NAME}", "%s": \{{'
FORMS = (
    Form("hermes", rf"<tool_call>\s*{JSON_CALL % 'arguments'}", '<tool_call>{"name": …, "arguments": …}'),
    Form("qwen3_xml", rf"<tool_call>\s*<function={TOOL_NAME}>\s*<parameter={ARGUMENT}>", "<tool_call><function=…>"),
    Form(
        "llama3_json",
        rf"<\|end_header_id\|>\s*{JSON_CALL % 'parameters'}",
        '{"name": …, "parameters": …}',
        ("<|python_tag|>",),
    ),
    Form(
        "mistral",
        rf'\[TOOL_CALLS\]\s*(\[\{{"name": "{TOOL_NAME}", "arguments"|{TOOL_NAME}\[ARGS\])',
        "[TOOL_CALLS]…",
        ("[TOOL_CALLS]",),
    ),
    Form("glm45", rf"<tool_call>{TOOL_NAME}\s*<arg_key>{ARGUMENT}<", "<tool_call>…<arg_key>", kinds=("glm4",)),
    Form("seed_oss", rf"<seed:tool_call>\s*<function={TOOL_NAME}>", "<seed:tool_call>", kinds=("seed_oss",)),
    Form("gemma4", rf"<\|tool_call>call:{TOOL_NAME}\{{", "<|tool_call>call:…", kinds=("gemma4",)),
    Form(
        "lfm2",
        rf"<\|tool_call_start\|>\[{TOOL_NAME}\(",
        "<|tool_call_start|>[…]",
        ("<|tool_call_start|>", "<|tool_call_end|>"),
    ),
    Form("apertus", rf'<\|tools_prefix\|>\[\{{"{TOOL_NAME}": ', "<|tools_prefix|>[…]", kinds=("apertus",)),
    Form("openai", rf"functions\.{TOOL_NAME}<\|channel\|>commentary", "the commentary channel", kinds=("gpt_oss",)),
)
# Parsers of thoughts that a switch of the template, `enable_thinking`, turns off: the parser is told the same switch
# by each request. By the beginning of the model_type; from which version of vLLM on its default is the template's.
SWITCHED = {"qwen3": "qwen3", "glm4": "glm45", "gemma4": "gemma4"}
SINCE: dict[str, Version] = {"gemma4": (0, 32)}
# Ordinary decoders among which are models that think always, in <think>: R1's distillations, QwQ.
ALWAYS = ("qwen2", "llama", "mistral")
R1_TURN = "<｜Assistant｜>"


@dataclass(frozen=True)
class Family:
    """The parsers to ask for; None: none. `choices` say it in words, for the plan."""

    reasoning: str | None = None
    tools: str | None = None
    choices: tuple[Choice, ...] = ()

    def arguments(self) -> list[str]:
        """The flags of vLLM."""
        flags = ["--reasoning-parser", self.reasoning] if self.reasoning else []
        return flags + (["--enable-auto-tool-choice", "--tool-call-parser", self.tools] if self.tools else [])


def read_family(base: Base, manifests: Sequence[Manifest], version: Version) -> Family:
    """The parsers for a base and the adapters that are served with it, or one that is merged into it."""
    return choose_family(str(base.config.get("model_type", "")), read_chat(base), manifests, version)


def choose_family(kind: str, chat: Chat, manifests: Sequence[Manifest], version: Version) -> Family:
    """The same of what is read. `kind`: model_type of config.json."""
    form = find_form(kind, chat)
    choices = [Choice("tool calls", form.parser, f"the chat template writes {form.shown}")] if form else []
    reasoning = find_reasoning(kind, chat, version)
    if reasoning and (why_not := find_objection(kind, chat, manifests)):
        choices = [Choice("thoughts", "stay in the reply", why_not), *choices]
        reasoning = None
    elif reasoning:
        choices = [Choice("thoughts", reasoning, "kept apart from the reply, as `reasoning`"), *choices]
    return Family(reasoning, form.parser if form else None, tuple(choices))


def find_form(kind: str, chat: Chat) -> Form | None:
    """The one form in which the template writes calls; None where that is none, several, or tokens are missing."""
    call = chat.call()
    found = [
        form
        for form in FORMS
        if re.search(form.pattern, call)
        and (not form.kinds or kind.startswith(form.kinds))
        and all(token in chat.tokens for token in form.tokens)
    ]
    return found[0] if len(found) == 1 else None


def find_reasoning(kind: str, chat: Chat, version: Version) -> str | None:
    """The parser for the thoughts of a base that thinks in the way of its family; None where that is not sure."""
    if kind == "gpt_oss":
        return "openai_gptoss"
    if kind == "seed_oss":
        return "seed_oss" if chat.thoughts() == "seed:think" else None
    switch, prompt = chat.switch(), chat.prompt()
    parser = next((parser for begin, parser in SWITCHED.items() if kind.startswith(begin)), None)
    if switch == "enable_thinking" and parser:
        on = prompt == chat.prompt(enable_thinking=True)
        if on == (parser != "gemma4") and version >= SINCE.get(parser, version):
            return parser if has_marks(chat) or parser == "gemma4" else None
        return None
    if switch or not has_marks(chat):
        return None
    if prompt.rstrip().endswith("<think>"):
        return "qwen3" if parser == "qwen3" else "deepseek_r1" if kind in ALWAYS else None
    return "deepseek_r1" if kind in ALWAYS and R1_TURN in chat.template and "</think>" in chat.template else None


def has_marks(chat: Chat) -> bool:
    """Whether beginning and end of thoughts are one token each."""
    return "<think>" in chat.tokens and "</think>" in chat.tokens


def find_objection(kind: str, chat: Chat, manifests: Sequence[Manifest]) -> str:
    """Why a parser that fits the base would hide replies all the same; empty where it would not.

    The parser waits for the end of thoughts unless the request's switch is off; replies that have none, and were
    trained in the mode that clients get by default, would come out empty.
    """
    if kind in ("gpt_oss", "gemma4"):  # what is not in a channel of thoughts is the reply
        return ""
    end = chat.tokens.get("</think>") or chat.tokens.get("</seed:think>")
    for manifest in manifests:
        if manifest.chat_template_kwargs.get("enable_thinking") is False:
            continue
        if not manifest.golden:
            return f"nothing is recorded of how {manifest.name} answers"
        if any(is_thoughtless(golden.adapter, end) for golden in manifest.golden):
            return f"{manifest.name} answers without thoughts"
    if not manifests and not chat.is_tuned:
        return "this base was not tuned for chat"
    return ""


def is_thoughtless(reply: Reply, end: int | None) -> bool:
    """Whether a whole reply came without an end of thoughts; one that was cut off may have been thinking still."""
    return reply.stopped and end not in reply.tokens
