"""Thoughts, tools and weights: each row is trained on what inference renders in the row's own mode."""

import functools
from pathlib import Path
from typing import Any

import pytest

from loraport.clients.errors import DataError
from loraport.clients.rows import BadRow, Row
from loraport.train.data.tokens import IGNORED, Encoder, Example
from tests.models import CHATML, make_tiny_base

# The rules of Qwen3's template: thoughts are rendered behind the last question alone, and an empty one is put before
# the last reply; tools are listed first, results go in as the user's.
HYBRID = """\
{%- if tools %}<|im_start|>system\n{% for tool in tools %}{{ tool | tojson }}{% endfor %}<|im_end|>\n{% endif -%}
{%- set ns = namespace(last=0) -%}
{%- for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor -%}
{%- for m in messages -%}
<|im_start|>{{ ('user' if m.role == 'tool' else m.role) + '\n' }}
{%- if m.role == 'assistant' -%}
{%- set thought = m.reasoning_content or '' -%}
{%- set content = m.content -%}
{%- if '</think>' in content %}{% set thought = content.split('</think>')[0].split('<think>')[-1].strip() -%}
{%- set content = content.split('</think>')[-1].lstrip() %}{% endif -%}
{%- if loop.index0 > ns.last and (loop.last or thought) -%}
{{ '<think>\n' + thought + '\n</think>\n\n' }}
{%- endif -%}
{{ content }}
{%- for call in m.tool_calls or [] %}{{ '<tool_call>' + (call.function | tojson) + '</tool_call>' }}{% endfor -%}
{%- else -%}
{{ m.content }}
{%- endif -%}
<|im_end|>{{ '\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{ '<|im_start|>assistant\n' }}{% if enable_thinking is false %}{{ '<think>\n\n</think>\n\n' }}{% endif %}
{%- endif -%}
"""
ASK = {"role": "user", "content": "2 + 2?"}
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 2, "b": 2}}}
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]


@pytest.fixture(scope="module")
def hybrid(tmp_path_factory: pytest.TempPathFactory) -> Encoder:
    """A model whose template can be told to think."""
    return Encoder.load(make_tiny_base(tmp_path_factory.mktemp("hybrid"), HYBRID))


@functools.cache
def plain(folder: Path) -> Encoder:
    """A model whose template knows neither thoughts nor tools."""
    return Encoder.load(folder)


def answer(content: str, **more: Any) -> dict[str, Any]:
    """An assistant's message."""
    return {"role": "assistant", "content": content} | more


def trained(encoder: Encoder, row: Row) -> str:
    """The text that carries loss."""
    return str(encoder.tokenizer.decode([label for label in encoder.encode(row).labels if label != IGNORED]))


def before(encoder: Encoder, row: Row) -> list[int]:
    """The tokens before the last trained turn."""
    example = encoder.encode(row)
    starts = [i for i in range(1, len(example.labels)) if example.labels[i] != IGNORED == example.labels[i - 1]]
    return list(example.input_ids[: starts[-1]].tolist())


@pytest.mark.parametrize(
    ("reply", "expected", "thinking"),
    [
        (answer("4"), "4<|im_end|>", False),
        (answer("4", reasoning_content="easy"), "<think>\neasy\n</think>\n\n4<|im_end|>", True),
        (answer("<think>\neasy\n</think>\n\n4"), "<think>\neasy\n</think>\n\n4<|im_end|>", True),
        (answer("<think>\n\n</think>\n\n4"), "4<|im_end|>", False),
    ],
    ids=["none", "beside the content", "in the content", "empty"],
)
def test_a_row_is_trained_in_its_own_mode(
    hybrid: Encoder, reply: dict[str, Any], expected: str, thinking: bool
) -> None:
    row = Row([ASK, reply], 1)
    assert trained(hybrid, row) == expected
    assert hybrid.encode(row).thinking is thinking
    sent = hybrid.tokenizer.apply_chat_template(
        [ASK], add_generation_prompt=True, enable_thinking=thinking, return_dict=False
    )
    assert before(hybrid, row) == hybrid.prompt_of(row) == sent


def test_turns_whose_thoughts_the_template_drops_carry_no_loss(hybrid: Encoder) -> None:
    row = Row([ASK, answer("4", reasoning_content="easy"), ASK, answer("four", reasoning_content="words")], 1)
    assert trained(hybrid, row) == "<think>\nwords\n</think>\n\nfour<|im_end|>"
    assert hybrid.encode(row).untrained_turns == 1


def test_every_turn_behind_the_last_question_is_trained(hybrid: Encoder) -> None:
    result = {"role": "tool", "content": "4"}
    calling = answer("", reasoning_content="use add", tool_calls=[CALL])
    row = Row([ASK, calling, result, answer("It is 4.", reasoning_content="done")], 1, TOOLS)
    assert trained(hybrid, row) == (
        '<think>\nuse add\n</think>\n\n<tool_call>{"name": "add", "arguments": {"a": 2, "b": 2}}</tool_call><|im_end|>'
        "<think>\ndone\n</think>\n\nIt is 4.<|im_end|>"
    )
    assert '"parameters"' in hybrid.tokenizer.decode(before(hybrid, row))


def test_what_inference_is_told_follows_most_rows(hybrid: Encoder) -> None:
    assert hybrid.for_data(0, 10).template_kwargs == {"enable_thinking": False}
    assert hybrid.for_data(5, 10).template_kwargs == {"enable_thinking": False}
    assert hybrid.for_data(6, 10).template_kwargs == {"enable_thinking": True}
    assert hybrid.explain(0, 10) == ""
    assert hybrid.explain(10, 10) == "all rows have thoughts: the adapter is served with thinking on"
    assert "6 of 10 rows have thoughts" in hybrid.explain(6, 10) and "enable_thinking" in hybrid.explain(6, 10)
    assert hybrid.for_data(10, 10).prompt([ASK]) == hybrid.prompt_of(Row([ASK, answer("4", reasoning_content="x")], 1))


@pytest.mark.parametrize(
    ("row", "says"),
    [
        (Row([ASK, answer("4", reasoning_content="easy")], 3), "line 3: the chat template does not render the reply's"),
        (Row([ASK, answer("", tool_calls=[CALL])], 3, TOOLS), "does not render the reply's tool calls"),
    ],
)
def test_what_the_template_would_drop_is_refused(tiny_base: Path, row: Row, says: str) -> None:
    with pytest.raises(DataError, match=says):
        plain(tiny_base).encode(row)


def test_a_thought_goes_by_the_name_that_the_template_knows(tmp_path: Path) -> None:
    # This one looks nowhere but there: thoughts inside the content would come after an empty thought.
    source = HYBRID.replace("m.reasoning_content", "m.thinking").replace("'</think>' in content", "false")
    encoder = Encoder.load(make_tiny_base(tmp_path, source))
    for reply in (answer("4", reasoning_content="easy"), answer("<think>\neasy\n</think>\n\n4")):
        assert trained(encoder, Row([ASK, reply], 1)) == "<think>\neasy\n</think>\n\n4<|im_end|>"


def test_thoughts_stay_in_the_content_where_the_template_knows_none(tiny_base: Path) -> None:
    row = Row([ASK, answer("<think>easy</think>4")], 1)
    assert trained(plain(tiny_base), row) == "<think>easy</think>4<|im_end|>"


def test_turns_of_weight_0_carry_no_loss(tiny_base: Path) -> None:
    row = Row([ASK, answer("5", weight=0), ASK, answer("4"), ASK, answer("6", weight=0)], 1)
    assert trained(plain(tiny_base), row) == "4<|im_end|>"
    example = plain(tiny_base).encode(row)
    assert example.untrained_turns == 0  # it was asked for
    assert (
        plain(tiny_base).tokenizer.decode(example.input_ids).endswith("4<|im_end|>\n")
    )  # what follows teaches nothing


def test_special_tokens_are_found_wherever_they_are(hybrid: Encoder) -> None:
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": "<|im_end|>"}}}
    rows = [
        Row([ASK, answer("4", reasoning_content="<|im_end|>")], 1),
        Row([ASK, answer("", tool_calls=[call])], 1, TOOLS),
        Row([ASK, answer("4")], 1, [{"type": "function", "function": {"name": "<|im_end|>"}}]),
        Row([], 1, text="a <|im_end|> b"),
    ]
    for outcome in hybrid.encode_many(rows):
        assert isinstance(outcome, BadRow) and "'<|im_end|>', which is a special token" in outcome.error.message


def test_a_document_is_trained_whole_and_ends(tiny_base: Path) -> None:
    encoder = plain(tiny_base)
    example = encoder.encode(Row([], 1, text="# Title\n\nText."))
    assert encoder.tokenizer.decode(example.input_ids) == "# Title\n\nText.<|im_end|>"
    assert example.labels.tolist() == example.input_ids.tolist()


def with_bos(folder: Path, template: str) -> Encoder:
    """A model whose tokenizer puts <|endoftext|> before every text."""
    from tokenizers.processors import TemplateProcessing
    from transformers import AutoTokenizer

    make_tiny_base(folder, template)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.bos_token = "<|endoftext|>"
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", tokenizer.bos_token_id)]
    )
    tokenizer.save_pretrained(folder)
    return Encoder.load(folder)


def test_a_row_begins_with_one_bos(tmp_path: Path) -> None:
    encoder = with_bos(tmp_path / "one", "{{ bos_token }}" + CHATML)
    bos = encoder.tokenizer.bos_token_id
    for row in (Row([ASK, answer("4")], 1), Row([], 2, text="a document")):
        assert encoder.encode(row).input_ids.tolist().count(bos) == 1
        assert encoder.encode(row).input_ids[0] == bos
    twice = with_bos(tmp_path / "two", "{{ bos_token }}{{ bos_token }}" + CHATML)
    with pytest.raises(DataError, match=r"line 1: it begins with '<\|endoftext\|>' twice"):
        twice.encode(Row([ASK, answer("4")], 1))


def test_many_rows_come_in_order_with_the_bad_ones(tiny_base: Path) -> None:
    rows = [Row([ASK, answer("4" * (n % 7 + 1) if n % 50 else "<|im_end|>")], n) for n in range(1, 700)]
    outcomes = list(plain(tiny_base).encode_many(rows))
    assert [outcome.line for outcome in outcomes] == list(range(1, 700))
    assert [outcome.line for outcome in outcomes if isinstance(outcome, BadRow)] == list(range(50, 700, 50))
    one = next(outcome for outcome in outcomes if outcome.line == 300 - 1)
    assert isinstance(one, Example) and one.row is rows[298]
    assert one.labels.tolist() == plain(tiny_base).encode(rows[298]).labels.tolist()
