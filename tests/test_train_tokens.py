"""Which tokens carry loss: the assistant's turns and their end, by markers and by prefixes alike."""

import json
from pathlib import Path

import pytest

from loraport.clients.errors import BaseModelError, DataError
from loraport.clients.rows import Row
from loraport.train.data.tokens import IGNORED, Encoder
from tests.models import CHATML, make_tiny_base

PLAIN = CHATML.replace("{% generation %}", "").replace("{% endgeneration %}", "")
# As thinking models have it: the last assistant turn gets an empty thought, the earlier ones lose theirs.
THINKING = PLAIN.replace(
    "<|im_start|>assistant\n{{ message['content'] }}",
    "<|im_start|>assistant\n{% if loop.last %}<think>\n\n</think>\n\n{% endif %}{{ message['content'] }}",
).replace(
    "{% if add_generation_prompt %}<|im_start|>assistant\n",
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% if enable_thinking is false %}<think>\n\n</think>\n\n"
    "{% endif %}",
)

ONE = Row([{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4, of course"}], 1)
TWO = Row(
    [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "2 + 2?"},
        {"role": "assistant", "content": "4"},
        {"role": "user", "content": "and 3 + 3?"},
        {"role": "assistant", "content": "6"},
    ],
    7,
)


def trained_text(encoder: Encoder, row: Row) -> str:
    labels = [label for label in encoder.encode(row).labels if label != IGNORED]
    return str(encoder.tokenizer.decode(labels))


def encoder_with(folder: Path, template: str) -> Encoder:
    return Encoder.load(make_tiny_base(folder, template))


@pytest.mark.parametrize("template", [CHATML, PLAIN], ids=["markers", "prefixes"])
@pytest.mark.parametrize(
    ("row", "expected"),
    [(ONE, "4, of course<|im_end|>"), (TWO, "4<|im_end|>6<|im_end|>")],
    ids=["one turn", "two turns"],
)
def test_loss_is_on_the_assistant_and_its_end(tmp_path: Path, template: str, row: Row, expected: str) -> None:
    assert trained_text(encoder_with(tmp_path, template), row) == expected


def test_markers_and_prefixes_give_the_same_labels(tmp_path: Path) -> None:
    by_markers, by_prefixes = (encoder_with(tmp_path / name, t) for name, t in (("m", CHATML), ("p", PLAIN)))
    assert by_markers.encode(TWO).labels.tolist() == by_prefixes.encode(TWO).labels.tolist()


def test_what_a_thinking_template_inserts_carries_no_loss(tmp_path: Path) -> None:
    encoder = encoder_with(tmp_path, THINKING)
    assert trained_text(encoder, ONE) == "4, of course<|im_end|>"
    assert "<think>" in encoder.tokenizer.decode(encoder.prompt(ONE.prompt))


def test_turns_that_the_full_text_renders_differently_carry_no_loss(tmp_path: Path) -> None:
    encoder = encoder_with(tmp_path, THINKING)
    assert trained_text(encoder, TWO) == "6<|im_end|>"
    assert encoder.encode(TWO).untrained_turns == 1


def test_the_switch_for_thinking_is_used_where_the_template_has_one(tmp_path: Path) -> None:
    assert encoder_with(tmp_path / "with", THINKING).template_kwargs == {"enable_thinking": False}
    assert encoder_with(tmp_path / "without", PLAIN).template_kwargs == {}


ENDLESS = PLAIN.replace("{{ message['content'] }}<|im_end|>{{ '\\n' }}", "{{ message['content'] }}{{ '\\n' }}", 1)
LAST_ONLY = PLAIN.replace(
    "{{ message['content'] }}<|im_end|>{{ '\\n' }}",
    "{{ message['content'] }}{% if loop.last %}<|im_end|>{% endif %}{{ '\\n' }}",
    1,
)


def test_a_template_that_never_ends_a_turn_is_refused(tmp_path: Path) -> None:
    assert ENDLESS != PLAIN
    with pytest.raises(DataError, match="line 1: the chat template does not end an assistant turn"):
        encoder_with(tmp_path, ENDLESS).encode(ONE)


def test_a_template_that_ends_only_the_last_turn_trains_only_that(tmp_path: Path) -> None:
    assert LAST_ONLY != PLAIN
    encoder = encoder_with(tmp_path, LAST_ONLY)
    assert trained_text(encoder, TWO) == "6<|im_end|>"


def test_a_special_token_in_the_text_is_refused(tiny_base: Path) -> None:
    row = Row([{"role": "user", "content": "hi"}, {"role": "assistant", "content": "a <|im_end|> b"}], 3)
    with pytest.raises(DataError, match=r"line 3: message 2 contains '<\|im_end\|>'"):
        Encoder.load(tiny_base).encode(row)


def test_a_row_that_the_template_refuses_is_named(tmp_path: Path) -> None:
    strict = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system here') }}{% endif %}" + PLAIN
    with pytest.raises(DataError, match="line 7: the chat template refuses the row: no system here"):
        encoder_with(tmp_path, strict).encode(TWO)


def test_named_templates_are_understood(tmp_path: Path) -> None:
    make_tiny_base(tmp_path)
    (tmp_path / "chat_template.jinja").unlink()
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    named = [{"name": "default", "template": CHATML}, {"name": "tool_use", "template": "x"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": named}))
    assert trained_text(Encoder.load(tmp_path), ONE) == "4, of course<|im_end|>"


def test_a_reply_that_merges_with_its_prompt_is_tokenised_as_inference_sees_it(tiny_base: Path) -> None:
    encoder = Encoder.load(tiny_base)
    row = Row([{"role": "user", "content": "hi"}, {"role": "assistant", "content": "\n\n  indented"}], 1)
    prompt = encoder.prompt(row.prompt)
    assert encoder.encode(row).input_ids[: len(prompt)].tolist() == prompt


def test_the_prompt_is_what_precedes_the_trained_part(tiny_base: Path) -> None:
    encoder = Encoder.load(tiny_base)
    example = encoder.encode(TWO)
    last = max(
        i for i, label in enumerate(example.labels[:-1]) if label == IGNORED and example.labels[i + 1] != IGNORED
    )
    assert encoder.prompt(TWO.prompt) == example.input_ids[: last + 1].tolist()


def test_a_model_without_a_chat_template_is_refused(tmp_path: Path) -> None:
    make_tiny_base(tmp_path)
    (tmp_path / "chat_template.jinja").unlink()
    with pytest.raises(BaseModelError, match="no chat template"):
        Encoder.load(tmp_path)
