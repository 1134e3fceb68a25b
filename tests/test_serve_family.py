"""Parsers of thoughts and calls: chosen from what a template renders, and tried with vLLM's own classes.

The templates are short ones in the forms of well-known families. What a template renders for a call is given to the
parser that was chosen for it, whole and token by token: it must come out as the call that went in.
"""

import json
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from loraport.serve.engine.chat import QUESTION, TOOL, TOOL_NAME, VALUE, Chat, read_chat
from loraport.serve.engine.family import FORMS, SWITCHED, Family, choose_family, read_family
from loraport.train.base_model import Base
from loraport.train.manifest import Golden, Manifest, Reply

NEW = (0, 32)
TOOLS = (
    "{% if tools %}<|im_start|>system\n{% for tool in tools %}{{ tool | tojson }}{% endfor %}<|im_end|>\n{% endif %}"
)
TURNS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.reasoning_content is defined and THINKS %}<think>\n{{ m.reasoning_content }}\n</think>\n\n{% endif %}"
    "{{ m.content }}{% for call in m.tool_calls or [] %}{% set f = call.function %}CALL{% endfor %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\nPROMPT{% endif %}"
)
JSON_CALL = '<tool_call>\n{"name": "{{ f.name }}", "arguments": {{ f.arguments | tojson }}}\n</tool_call>'
XML_CALL = (
    "<tool_call>\n<function={{ f.name }}>\n{% for k, v in f.arguments.items() %}<parameter={{ k }}>\n{{ v }}\n"
    "</parameter>\n{% endfor %}</function>\n</tool_call>"
)
OFF = "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}"


def chatml(call: str, thinks: bool = False, prompt: str = "") -> str:
    return TOOLS + TURNS.replace("CALL", call).replace("THINKS", str(thinks).lower()).replace("PROMPT", prompt)


LLAMA = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
    "{% if tools and loop.first %}{{ tools[0] | tojson }}{% endif %}{{ m.content }}"
    '{% for call in m.tool_calls or [] %}{"name": "{{ call.function.name }}", '
    '"parameters": {{ call.function.arguments | tojson }}}{% endfor %}<|eot_id|>{% endfor %}'
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
MISTRAL = (
    "{% for m in messages %}{% if m.role == 'user' %}"
    "{% if tools %}[AVAILABLE_TOOLS]{{ tools | tojson }}[/AVAILABLE_TOOLS]{% endif %}[INST]{{ m.content }}[/INST]"
    "{% elif m.tool_calls %}[TOOL_CALLS]{% for call in m.tool_calls %}"
    "{% if call.id | length != 9 %}{{ raise_exception('nine characters') }}{% endif %}"
    '[{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}, "id": "{{ call.id }}"}]'
    "{% endfor %}{{ eos_token }}{% else %}{{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)
R1 = (
    "{% for m in messages %}{% if m.role == 'user' %}<｜User｜>{{ m.content }}"
    "{% else %}<｜Assistant｜>{{ m.content.split('</think>')[-1] }}<｜end▁of▁sentence｜>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<｜Assistant｜>PROMPT{% endif %}"
)
LFM2 = chatml("<|tool_call_start|>[{{ f.name }}(city='{{ f.arguments.city }}')]<|tool_call_end|>")
GEMMA2 = "{% for m in messages %}<start_of_turn>{{ m.role }}\n{{ m.content }}<end_of_turn>\n{% endfor %}"
R1_END = "<｜end▁of▁sentence｜>"
THINK, LFM2_MARKS = ("<think>", "</think>"), ("<|tool_call_start|>", "<|tool_call_end|>")
QWEN3 = chatml(JSON_CALL, thinks=True, prompt=OFF)


def chat(template: str, *tokens: str, ends: str = "<|im_end|>") -> Chat:
    known = {text: number for number, text in enumerate((ends, "<tool_call>", "</tool_call>", *tokens), 300)}
    return Chat(template, template, known, frozenset({300}), {"bos_token": "<s>", "eos_token": "</s>"})


@dataclass(frozen=True)
class Case:
    """A family: its model_type, its chat, and what must be chosen for it."""

    kind: str
    chat: Chat
    reasoning: str | None
    tools: str | None


CASES = {
    "Qwen2.5": Case("qwen2", chat(chatml(JSON_CALL)), None, "hermes"),
    "Qwen3": Case("qwen3", chat(QWEN3, *THINK), "qwen3", "hermes"),
    "Qwen3 Instruct 2507, which never thinks": Case("qwen3_moe", chat(chatml(JSON_CALL), *THINK), None, "hermes"),
    "Qwen3 Thinking 2507, which always does": Case(
        "qwen3", chat(chatml(JSON_CALL, thinks=True, prompt="<think>\n"), *THINK), "qwen3", "hermes"
    ),
    "Qwen3-Coder": Case("qwen3_moe", chat(chatml(XML_CALL)), None, "qwen3_xml"),
    "Qwen3.5": Case("qwen3_5", chat(chatml(XML_CALL, thinks=True, prompt=OFF), *THINK), "qwen3", "qwen3_xml"),
    "Llama 3": Case("llama", chat(LLAMA, "<|python_tag|>", ends="<|eot_id|>"), None, "llama3_json"),
    "Mistral": Case("mistral", chat(MISTRAL, "[TOOL_CALLS]"), None, "mistral"),
    "R1's distillation": Case(
        "qwen2", chat(R1.replace("PROMPT", "<think>\n"), *THINK, ends=R1_END), "deepseek_r1", None
    ),
    "an older one": Case("llama", chat(R1.replace("PROMPT", ""), *THINK, ends=R1_END), "deepseek_r1", None),
    "LFM2": Case("lfm2", chat(LFM2, *LFM2_MARKS), None, "lfm2"),
    "Gemma 2, which knows no tools": Case("gemma2", chat(GEMMA2), None, None),
    "thoughts in an unknown family": Case("new_model", chat(QWEN3, *THINK), None, "hermes"),
    "no token for thoughts": Case("qwen3", chat(QWEN3), None, "hermes"),
    "no token for calls": Case("llama", chat(LLAMA), None, None),
    "no template": Case("llama", chat(""), None, None),
    "a template that cannot be read": Case("llama", chat("{% if %}"), None, None),
}


@pytest.mark.parametrize("name", CASES)
def test_a_family_is_told_by_what_its_template_renders(name: str) -> None:
    case = CASES[name]
    family = choose_family(case.kind, case.chat, [], NEW)
    assert (family.reasoning, family.tools) == (case.reasoning, case.tools)


def test_flags_and_words() -> None:
    family = choose_family("qwen3", chat(QWEN3, *THINK), [], NEW)
    assert family.arguments() == [
        *("--reasoning-parser", "qwen3"),
        *("--enable-auto-tool-choice", "--tool-call-parser", "hermes"),
    ]
    assert [choice.name for choice in family.choices] == ["thoughts", "tool calls"]
    assert Family().arguments() == []


def manifest(text: str, tokens: list[int], *, stopped: bool = True, **kwargs: bool) -> Manifest:
    count = len(tokens)
    reply = Reply(tokens=tokens, logprobs=[0.0] * count, margins=[1.0] * count, text=text, stopped=stopped)
    golden = Golden(messages=[QUESTION], prompt_tokens=[1], adapter=reply, base=reply)
    return Manifest.model_construct(name="mine", chat_template_kwargs=kwargs, golden=[golden])


END = chat(QWEN3, *THINK).tokens["</think>"]
ADAPTERS = {
    "trained with thinking off": (manifest("Rome.", [5, 6], enable_thinking=False), "qwen3"),
    "trained with thoughts": (manifest("so</think>Rome.", [5, END, 6], enable_thinking=True), "qwen3"),
    "cut off while it thought": (manifest("so", [5, 6], stopped=False, enable_thinking=True), "qwen3"),
    "trained without thoughts, in the mode with them": (manifest("Rome.", [5, 6]), None),
}


@pytest.mark.parametrize("name", ADAPTERS)
def test_an_adapter_whose_replies_a_parser_would_hide_goes_without(name: str) -> None:
    trained, expected = ADAPTERS[name]
    family = choose_family("qwen3", chat(QWEN3, *THINK), [trained], NEW)
    assert family.reasoning == expected
    if expected is None:
        assert (family.choices[0].name, family.choices[0].value) == ("thoughts", "stay in the reply")


def test_an_adapter_without_recorded_replies_goes_without() -> None:
    unknown = Manifest.model_construct(name="mine", chat_template_kwargs={}, golden=[])
    assert choose_family("qwen3", chat(QWEN3, *THINK), [unknown], NEW).reasoning is None


def test_a_base_that_was_never_tuned_is_not_waited_for() -> None:
    base = replace(chat(QWEN3, *THINK), ends=frozenset({0}))  # ends on a token that its template never writes
    assert choose_family("qwen3", base, [], NEW).reasoning is None
    trained, _ = ADAPTERS["trained with thoughts"]
    assert choose_family("qwen3", base, [trained], NEW).reasoning == "qwen3"


def test_a_model_folder_is_read(tiny_base: Path) -> None:
    folder = Base(str(tiny_base), tiny_base)
    found = read_chat(folder)
    assert found.tokens == {"<|endoftext|>": 0, "<|im_start|>": 1, "<|im_end|>": 2} and found.ends == {0, 2}
    assert found.is_tuned and found.prompt().endswith("<|im_start|>assistant\n")
    assert read_family(folder, [], NEW) == Family()


def test_several_templates_by_name(tmp_path: Path) -> None:
    named = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": chatml(JSON_CALL)}]
    (tmp_path / "config.json").write_text('{"model_type": "llama", "eos_token_id": 7}')
    added = {"7": {"content": "<|im_end|>"}}
    settings = {"chat_template": named, "added_tokens_decoder": added, "bos_token": {"content": "<s>"}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    found = read_chat(Base(str(tmp_path), tmp_path))
    assert (found.template, found.tokens, found.specials) == ("plain", {"<|im_end|>": 7}, {"bos_token": "<s>"})
    assert read_family(Base(str(tmp_path), tmp_path), [], NEW).tools == "hermes"


def test_every_name_is_registered() -> None:
    from vllm.reasoning import _REASONING_PARSERS_TO_REGISTER as REASONING
    from vllm.tool_parsers import _TOOL_PARSERS_TO_REGISTER as CALLS

    assert {form.parser for form in FORMS} <= set(CALLS)
    assert {*SWITCHED.values(), "deepseek_r1", "seed_oss", "openai_gptoss"} <= set(REASONING)


def test_a_default_that_an_older_version_has_not_is_waited_for() -> None:
    template = chatml(JSON_CALL, prompt="{% if enable_thinking %}<|think|>{% endif %}")
    assert choose_family("gemma4", chat(template), [], NEW).reasoning == "gemma4"
    assert choose_family("gemma4", chat(template), [], (0, 25)).reasoning is None


@cache
def make_tokenizer(tokens: tuple[str, ...]) -> Any:
    """Bytes, and tokens beside them."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE(vocab={letter: number for number, letter in enumerate(letters)}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, eos_token="</s>")
    tokenizer.add_tokens(list(tokens))
    return tokenizer


@dataclass
class Parsed:
    """What a client would see."""

    thoughts: str = ""
    content: str = ""
    name: str = ""
    arguments: str = ""


def parse(case: Case, reply: str, *, with_tools: bool, **switches: bool) -> tuple[Parsed, Parsed]:
    """(the reply as vLLM answers it whole, and as it streams it), parsed as its chat endpoint does."""
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
    from vllm.parser.parser_manager import ParserManager

    tokenizer = make_tokenizer(tuple(case.chat.tokens))
    kind = ParserManager.get_parser(case.tools, case.reasoning, case.tools is not None, "m", tokenizer=tokenizer)
    assert kind is not None
    asked = {"tools": [TOOL]} if with_tools else {}
    request = ChatCompletionRequest(model="m", messages=[QUESTION], **asked)
    tokens = tokenizer.encode(reply, add_special_tokens=False)
    parser = kind(tokenizer, request.tools, chat_template_kwargs=switches)
    thoughts, content, calls = parser.parse(reply, request, enable_auto_tools=True, model_output_token_ids=tokens)
    whole = Parsed(thoughts or "", content or "", *((calls[0].name, calls[0].arguments) if calls else ()))
    parser, streamed = kind(tokenizer, request.tools, chat_template_kwargs=switches), Parsed()
    prompt = tokenizer.encode(case.chat.prompt(**switches), add_special_tokens=False)
    for number, token in enumerate(tokens, 1):
        text, last = tokenizer.decode([token]), number == len(tokens)
        delta = parser.parse_delta(text, [token], request, prompt_token_ids=prompt, finished=last)
        if delta:
            streamed.thoughts += delta.reasoning or ""
            streamed.content += delta.content or ""
            for call in delta.tool_calls or []:
                streamed.name += (call.function.name if call.function else "") or ""
                streamed.arguments += (call.function.arguments if call.function else "") or ""
    return whole, streamed


def rendered_call(case: Case) -> str:
    """What the template makes of a call, without the turn around it."""
    text = case.chat.call()
    begins = ("<tool_call>", "[TOOL_CALLS]", "<|tool_call_start|>", '{"name"')
    start = min(at for begin in begins if (at := text.find(begin)) >= 0)
    ends = ("<|im_end|>", "<|eot_id|>", "</s>")
    return text[start : min(at for end in ends if (at := text.find(end, start)) >= 0)]


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.tools])
def test_a_call_comes_out_of_vllm_as_it_went_in(name: str) -> None:
    case = CASES[name]
    before = "so</think>" if case.reasoning and "always" in name else "<think>so</think>" if case.reasoning else ""
    for parsed in parse(case, before + rendered_call(case), with_tools=True):
        assert (parsed.name, json.loads(parsed.arguments)) == (TOOL_NAME, {"city": VALUE})
        assert (parsed.thoughts, parsed.content) == ("so" if before else "", "")


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.reasoning])
def test_thoughts_are_kept_apart(name: str) -> None:
    opens = "" if CASES[name].chat.prompt().endswith("<think>\n") else "<think>"
    for parsed in parse(CASES[name], f"{opens}so it is</think>Rome.", with_tools=False):
        assert (parsed.thoughts, parsed.content) == ("so it is", "Rome.")


@pytest.mark.parametrize("with_tools", [True, False])
@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.reasoning and case.chat.switch()])
def test_with_thinking_off_a_plain_reply_is_the_reply(name: str, with_tools: bool) -> None:
    for parsed in parse(CASES[name], "It is in Rome.", with_tools=with_tools, enable_thinking=False):
        assert parsed == Parsed(content="It is in Rome.")


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.tools and not case.reasoning])
def test_what_looks_like_a_call_is_text_where_nobody_offered_tools(name: str) -> None:
    reply = '{"name": "Rome", "parameters": {"river": "Tiber"}}'
    for parsed in parse(CASES[name], reply, with_tools=False):
        assert parsed == Parsed(content=reply)
