"""Replies on held-out prompts: batched as one by one, scored as by hand, checked as the user says."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from loraport.clients.errors import ConfigError, ResourceError
from loraport.clients.rows import Row
from loraport.train.data.tokens import Encoder
from loraport.train.proof import generate as generate_module
from loraport.train.proof.check import CheckFailed, check_sha256, load_check, try_check
from loraport.train.proof.evaluate import compare, hold_out, score
from loraport.train.proof.generate import batches, generate, reply_limit
from loraport.train.proof.golden import greedy_reply
from loraport.train.proof.scores import (
    Scored,
    bleu,
    common_length,
    has_loop,
    rouge_l,
    same_text,
    summarise,
    words,
)


@pytest.fixture(scope="module")
def encoder(tiny_base: Path) -> Encoder:
    return Encoder.load(tiny_base)


@pytest.fixture(scope="module")
def model(tiny_base: Path) -> Any:
    """The tiny base in fp32 with an adapter of random weights, so that the two reply differently."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(1)
    base = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32, attn_implementation="sdpa")
    return get_peft_model(base, LoraConfig(r=4, init_lora_weights=False, target_modules="all-linear")).eval()


def ask(number: int) -> Row:
    question = {"role": "user", "content": f"colour {'and shape ' * number}?"}
    return Row([question, {"role": "assistant", "content": f"red {number}"}], number)


def test_a_batch_replies_as_each_prompt_alone(model: Any, encoder: Encoder) -> None:
    prompts = [encoder.prompt(ask(number).prompt) for number in (0, 5, 1, 9)]
    limits = [12, 30, 7, 30]
    # A stop token that some of them do say, so that rows end at different steps.
    said = greedy_reply(model, encoder, prompts[1], 30).tokens[4]
    stops = encoder.stop_tokens | {said}
    alone = [generate(model, [prompt], [limit], stops)[0] for prompt, limit in zip(prompts, limits, strict=True)]
    assert generate(model, prompts, limits, stops) == alone
    first = greedy_reply(model, encoder, prompts[0], 12)
    assert generate(model, prompts[:1], [12], encoder.stop_tokens)[0].tokens == first.tokens
    assert alone[1].stopped and alone[1].tokens[-1] == said and len(alone[1].tokens) <= 5
    assert all(len(reply.tokens) <= limit for reply, limit in zip(alone, limits, strict=True))
    assert all(len(reply.tokens) == limit or reply.stopped for reply, limit in zip(alone, limits, strict=True))


def test_a_batch_that_does_not_fit_is_halved(model: Any, encoder: Encoder, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = [encoder.prompt(ask(number).prompt) for number in range(5)]
    wanted = generate(model, prompts, [4] * 5, encoder.stop_tokens)
    whole, sizes = generate_module.reply_to, []

    def small(prompts: Any, limits: Any, model: Any, stops: Any) -> Any:
        sizes.append(len(prompts))
        if len(prompts) > 2:
            raise torch.OutOfMemoryError
        return whole(prompts, limits, model, stops)

    monkeypatch.setattr(generate_module, "reply_to", small)
    seen: list[int] = []
    assert generate(model, prompts, [4] * 5, encoder.stop_tokens, seen.append) == wanted
    assert sizes == [5, 2, 3, 1, 2] and sum(seen) == 5


def test_no_memory_for_a_single_prompt_is_refused(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: Any) -> Any:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(generate_module, "reply_to", never)
    with pytest.raises(ResourceError, match="a held-out prompt of 3 tokens"):
        generate(model, [[1, 2, 3]], [4], {0})


def test_batches_hold_like_lengths_within_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generate_module, "BATCH_TOKENS", 100)
    found = list(batches([10, 200, 10, 30, 10], [10, 10, 10, 10, 40]))
    assert sorted(index for batch in found for index in batch) == [0, 1, 2, 3, 4]
    assert found == [[0, 2], [3], [1], [4]]  # 2 × 20; a third would make 3 × 40; 210 alone; 50 apart from 210


def test_the_room_of_a_reply() -> None:
    assert (reply_limit(1), reply_limit(100), reply_limit(2000)) == (34, 232, 2256)


def test_both_models_are_asked_and_compared(model: Any, encoder: Encoder) -> None:
    rows = [ask(number) for number in range(4)]
    document = Row([], 9, text="plain text has no prompt")
    asked = hold_out(encoder, [*rows, document])
    assert [each.reference for each in asked] == ["red 0", "red 1", "red 2", "red 3"]
    compared = compare(model, encoder, asked, load_check("regex:."))
    assert [sample.adapter.text for sample in compared.samples] != [sample.base.text for sample in compared.samples]
    with model.disable_adapter():
        alone = greedy_reply(model, encoder, asked[0].prompt, reply_limit(len(asked[0].reference_tokens)))
    assert compared.samples[0].base.text == alone.text
    metrics = compared.metrics()
    assert metrics["gain"] == metrics["success"] - metrics["base_success"]
    assert metrics["stop_rate"] == sum(sample.adapter.stopped for sample in compared.samples) / 4


def test_a_reply_is_scored(encoder: Encoder) -> None:
    (asked,) = hold_out(encoder, [ask(3)])
    good = encoder.tokenizer("red  3")["input_ids"]
    stop = next(iter(encoder.stop_tokens))
    scored = score(encoder, asked, [*good, stop], True, None)
    assert (scored.text, scored.exact, scored.success, scored.tokens) == ("red  3", True, 1.0, len(good) + 1)
    assert score(encoder, asked, good, False, None).success == 0  # exact, but cut off
    looping = score(encoder, asked, good * 20, False, None)
    assert looping.loops and not looping.exact
    failed = score(encoder, asked, [*good, stop], True, load_check("regex:blue"))
    assert (failed.checked, failed.success, failed.exact) == (0.0, 0.0, True)


def reply(text: str, stopped: bool = True, checked: float | None = None, exact: bool = False) -> Scored:
    return Scored(text, len(text.split()), stopped, exact, 0.5, False, checked)


def test_figures_of_a_model_are_means() -> None:
    replies = [reply("a b", exact=True), reply("c d e f", stopped=False, exact=True), reply("x", checked=0.5)]
    scores = summarise(replies, ["a b", "c d e f", "y"])
    assert scores.success == pytest.approx((1 + 0 + 0.5) / 3)
    assert (scores.exact_match, scores.stop_rate) == (pytest.approx(2 / 3), pytest.approx(2 / 3))
    assert (scores.reply_tokens, scores.longest_reply, scores.rouge_l) == (pytest.approx(7 / 3), 4, 0.5)
    assert scores.rate("stop_rate").count == 2
    assert scores.to_metrics("base_")["base_success"] == scores.success


@pytest.mark.parametrize(
    ("text", "reference", "value"),
    [
        ("the cat sat", "the cat sat", 1.0),
        ("The cat, sat!", "the cat sat", 1.0),
        ("the cat sat", "the cat sat down", 2 * 3 / 7),
        ("sat cat the", "the cat sat", 2 * 1 / 6),
        ("police killed the gunman", "police kill the gunman", 0.75),  # Lin 2004, section 3.1
        ("the gunman kill police", "police kill the gunman", 0.5),
        ("", "the cat", 0.0),
        ("", "", 1.0),
        ("你好世界", "你好地球", 0.5),
        ("größer", "grösser", 0.0),
        ("===", "===", 1.0),
    ],
)
def test_rouge_l_by_hand(text: str, reference: str, value: float) -> None:
    assert rouge_l(text, reference) == pytest.approx(value)


def plain_common_length(first: list[str], second: list[str]) -> int:
    """The table of the textbook."""
    table = [[0] * (len(second) + 1) for _ in range(len(first) + 1)]
    for i, a in enumerate(first, 1):
        for j, b in enumerate(second, 1):
            table[i][j] = table[i - 1][j - 1] + 1 if a == b else max(table[i - 1][j], table[i][j - 1])
    return table[-1][-1]


def test_the_longest_common_subsequence_is_the_textbooks() -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        sizes = torch.randint(0, 90, (2,), generator=generator).tolist()
        first, second = ([str(n) for n in torch.randint(0, 6, (size,), generator=generator).tolist()] for size in sizes)
        assert common_length(first, second) == plain_common_length(first, second)


def test_words_of_any_script() -> None:
    assert words("Ms. Lee's tea — 2 €") == ["ms", "lee", "s", "tea", "2"]
    assert words("Это 你好") == ["это", "你", "好"]


def test_bleu_is_sacrebleus() -> None:
    assert bleu(["the cat sat on the mat"], ["the cat sat on the mat"]) == pytest.approx(100)
    # Four words of five in place: precisions 4/5, 3/4, 2/3, 1/2, no brevity penalty.
    assert bleu(["a b c d x"], ["a b c d e"]) == pytest.approx(100 * (4 / 5 * 3 / 4 * 2 / 3 * 1 / 2) ** 0.25)
    assert bleu(["yes"], ["yes"]) == pytest.approx(100)  # shorter than four words
    assert bleu(["", ""], ["a", "b"]) == 0


def test_white_space_does_not_count() -> None:
    assert same_text(" a\n b ", "a b") and not same_text("ab", "a b")


@pytest.mark.parametrize(
    ("tokens", "loops"),
    [
        ([7] * 24, True),
        ([7] * 23, False),
        ([1, 2, 3, *([4, 5, 6] * 8), 9], True),
        ([4, 5, 6] * 7, False),
        (list(range(30)) * 4, True),
        (list(range(30)) * 3, False),
        (list(range(200)), False),
        ([], False),
    ],
)
def test_loops(tokens: list[int], loops: bool) -> None:
    assert has_loop(tokens) is loops


def test_a_regular_expression() -> None:
    judge = load_check(r"regex:^Source: \w+$").judge
    assert judge("42\nSource: stft", {}) == 1 and judge("Source: ?", {}) == 0


def test_a_json_schema(tmp_path: Path) -> None:
    schema = {"type": "object", "required": ["name"], "properties": {"name": {"type": "string"}}}
    (tmp_path / "schema.json").write_text(json.dumps(schema))
    judge = load_check(f"json-schema:{tmp_path}/schema.json").judge
    assert [judge(reply, {}) for reply in ('{"name": "x"}', ' {"name": 1}', "no JSON", "[" * 100_000)] == [1, 0, 0, 0]


CHECKS = """
print("loading")
def good(reply, row):
    print("judging")
    return reply == row["messages"][-1]["content"]
def half(reply, row):
    return 0.5
def breaks(reply, row):
    return reply.no_such_thing
def strange(reply, row):
    return "yes"
def leaves(reply, row):
    raise SystemExit("bye")
LIST = []
"""


def test_a_function(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "checks.py"
    file.write_text(CHECKS)
    row = {"messages": [{"role": "assistant", "content": "tea"}]}
    assert load_check(f"python:{file}:good").judge("tea", row) == 1
    assert load_check(f"python:{file}:half").judge("tea", row) == 0.5
    assert capsys.readouterr().out == ""  # standard output is for --json
    with pytest.raises(CheckFailed, match=r"checks.py, line 9: AttributeError: 'str' object has no attribute"):
        load_check(f"python:{file}:breaks").judge("tea", row)
    with pytest.raises(CheckFailed, match="strange returned 'yes' instead of True"):
        load_check(f"python:{file}:strange").judge("tea", row)
    with pytest.raises(CheckFailed, match="SystemExit: bye"):
        load_check(f"python:{file}:leaves").judge("tea", row)


def test_a_check_is_what_its_file_says_wherever_it_lies(tmp_path: Path) -> None:
    (tmp_path / "checks.py").write_text(CHECKS)
    (tmp_path / "moved.py").write_text(CHECKS)
    (tmp_path / "other.py").write_text(CHECKS + "\n")
    first, moved, other = (check_sha256(f"python:{tmp_path}/{name}.py:good") for name in ("checks", "moved", "other"))
    assert first == moved != other
    assert check_sha256(f"python:{tmp_path}/checks.py:half") != first
    assert check_sha256("regex:a:b") != check_sha256("regex:b")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("tea", "--check tea is no check"),
        ("regex:", "is no check"),
        ("regex:(", "is no regular expression: missing"),
        ("json-schema:none.json", "cannot use none.json as a JSON schema: No such file"),
        ("json-schema:{folder}/broken.json", "as a JSON schema: Expecting value"),
        ("json-schema:{folder}/wrong.json", "as a JSON schema: 'no type' is not valid"),
        ("python:check", "names no function"),
        ("python:none.py:f", "there is no Python file none.py"),
        ("python:{folder}/checks.py:LIST", "has no function LIST"),
        ("python:{folder}/syntax.py:f", "syntax.py, line 2: SyntaxError"),
        ("python:{folder}/raises.py:f", "raises.py, line 1: ZeroDivisionError: division by zero"),
    ],
)
def test_a_check_that_cannot_be_used_is_refused_before_training(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "checks.py").write_text(CHECKS)
    (tmp_path / "syntax.py").write_text("x = 1\ndef f(:\n")
    (tmp_path / "raises.py").write_text("1 / 0\n")
    (tmp_path / "broken.json").write_text("x")
    (tmp_path / "wrong.json").write_text('{"type": "no type"}')
    with pytest.raises(ConfigError) as caught:
        load_check(text.format(folder=tmp_path))
    assert message in caught.value.message and caught.value.hint


def test_a_check_is_tried_on_references(tmp_path: Path) -> None:
    (tmp_path / "checks.py").write_text(CHECKS)
    assert try_check(load_check("regex:^A"), [("A1", {}), ("B2", {})]) == ["B2"]
    with pytest.raises(ConfigError, match="accepts none of 2 references"):
        try_check(load_check("regex:^C"), [("A1", {}), ("B2", {})])
    with pytest.raises(ConfigError, match="goes wrong on a reference"):
        try_check(load_check(f"python:{tmp_path}/checks.py:breaks"), [("A1", {})])


def test_a_check_that_breaks_on_a_reply_fails_that_reply(encoder: Encoder, tmp_path: Path) -> None:
    (tmp_path / "checks.py").write_text(CHECKS)
    (asked,) = hold_out(encoder, [ask(3)])
    tokens = [*encoder.tokenizer("red 3")["input_ids"], next(iter(encoder.stop_tokens))]
    scored = score(encoder, asked, tokens, True, load_check(f"python:{tmp_path}/checks.py:breaks"))
    assert scored.success == 0 and "AttributeError" in scored.complaint
