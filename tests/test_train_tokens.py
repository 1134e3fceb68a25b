"""Which tokens carry loss: the assistant's turns and their end, by markers and by prefixes alike."""

from pathlib import Path

import pytest

from loraport.clients.errors import BaseModelError, DataError
from loraport.clients.rows import Row
from loraport.train.tokens import IGNORED, Encoder, encode_rows
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
    assert by_markers.encode(TWO) == by_prefixes.encode(TWO)


def test_what_a_thinking_template_inserts_carries_no_loss(tmp_path: Path) -> None:
    encoder = encoder_with(tmp_path, THINKING)
    assert trained_text(encoder, ONE) == "4, of course<|im_end|>"
    assert "<think>" in encoder.tokenizer.decode(encoder.prompt(ONE))


def test_turns_that_training_and_inference_render_differently_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"line 7.*renders message 3 differently"):
        encoder_with(tmp_path, THINKING).encode(TWO)


def test_a_template_that_never_ends_a_turn_is_refused(tmp_path: Path) -> None:
    endless = CHATML.replace("<|im_end|>{% endgeneration %}", "{% endgeneration %}<|im_end|>")
    with pytest.raises(DataError, match="generation does not stop"):
        encoder_with(tmp_path, endless).encode(ONE)


def test_the_prompt_is_what_precedes_the_trained_part(tiny_base: Path) -> None:
    encoder = Encoder.load(tiny_base)
    example = encoder.encode(TWO)
    last = max(
        i for i, label in enumerate(example.labels[:-1]) if label == IGNORED and example.labels[i + 1] != IGNORED
    )
    assert encoder.prompt(TWO) == example.input_ids[: last + 1]


def test_long_rows_are_refused_with_their_lines_and_the_length_to_ask_for(tiny_base: Path) -> None:
    encoder = Encoder.load(tiny_base)
    longest = len(encoder.encode(TWO).input_ids)
    with pytest.raises(DataError, match=r"rows.jsonl: 1 of 2 rows are longer than 30 tokens \(lines 7\)") as caught:
        encode_rows(encoder, [ONE, TWO], 30, Path("rows.jsonl"))
    assert f"--sequence-length {longest}" in caught.value.hint


def test_a_model_without_a_chat_template_is_refused(tmp_path: Path) -> None:
    make_tiny_base(tmp_path)
    (tmp_path / "chat_template.jinja").unlink()
    with pytest.raises(BaseModelError, match="no chat template"):
        Encoder.load(tmp_path)
