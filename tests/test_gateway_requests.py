"""What is done to a request, without a server: bodies, thinking, context, models, the state of the engine."""

import json
from typing import Any

import pytest

from loraport.serve.gateway import body as bodies
from loraport.serve.gateway import context
from loraport.serve.gateway.body import Body
from loraport.serve.gateway.calls import loggable, request_id
from loraport.serve.gateway.refusals import Refusal, not_ready
from loraport.serve.gateway.state import EngineState, Model, Phase, Replica, Snapshot
from loraport.serve.gateway.upstream import HiddenUsage

CHAT = "/v1/chat/completions"


def parsed(**fields: Any) -> Body:
    return bodies.parse(json.dumps(fields).encode(), 64)


# As vLLM 0.25 and 0.32 and their relatives say it.
SAID = [
    (
        "This model's maximum context length is 16384 tokens. However, you requested 8192 output tokens and your "
        "prompt contains at least 8193 input tokens, for a total of at least 16385 tokens. Please reduce the length of "
        "the input prompt or the number of requested output tokens.",
        (16384, 8193, False),
    ),
    (
        "This model's maximum context length is 64 tokens. However, your prompt contains 90 input tokens, which "
        "exceeds this limit even without any output tokens. Please reduce the length of the input prompt.",
        (64, 90, True),
    ),
    (
        "This model's maximum context length is 64 tokens. However, your prompt contains 9000 characters (more than "
        "640 characters, which is the upper bound for 64 input tokens). Please reduce the length of the input prompt.",
        (64, None, False),
    ),
    (
        "This model's maximum context length is 64 tokens. However, you requested 90 tokens (60 in the messages, …",
        (64, 60, True),
    ),
    (
        "'max_tokens' or 'max_completion_tokens' is too large: 60. This model's maximum context length is 64 tokens "
        "and your request has 10 input tokens (60 > 64 - 10). None",
        (64, 10, True),
    ),
    ("Input length (90) exceeds model's maximum context length (64).", (64, 90, True)),
    ("The engine prompt length 90 exceeds the max_model_len 64. Please reduce prompt.", (64, 90, True)),
    ("The decoder prompt (length 90) is longer than the maximum model length of 64. Make sure that …", (64, 90, True)),
    (
        "max_completion_tokens=99 cannot be greater than max_model_len=64. Please request fewer output tokens.",
        (64, None, False),
    ),
    ("The chat template failed.", None),
]


@pytest.mark.parametrize(("message", "expected"), SAID)
def test_an_engines_words_about_its_context(message: str, expected: tuple[int, int | None, bool] | None) -> None:
    said = context.read_overflow(message)
    assert (said and (said.limit, said.prompt, said.is_exact)) == expected


@pytest.mark.parametrize("more", [{}, {"stream": True}, {"tools": [{"type": "function"}]}])
def test_a_request_fits_surely_when_its_bytes_do(more: dict[str, Any]) -> None:
    short = parsed(messages=[{"role": "user", "content": "hi"}], **more)
    assert context.fits_surely(CHAT, short, 1000, 100)
    assert not context.fits_surely(CHAT, short, 1000, 900)
    picture = parsed(messages=[{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}])
    assert not context.fits_surely(CHAT, picture, 100000, 1)


TOKENIZE, COUNT = "/tokenize", "/v1/messages/count_tokens"
QUESTIONS: list[tuple[str, dict[str, Any], list[tuple[str, dict[str, Any]]]]] = [
    ("/v1/completions", {"prompt": "a"}, [(TOKENIZE, {"prompt": "a"})]),
    ("/v1/completions", {"prompt": ["a", "b"]}, [(TOKENIZE, {"prompt": "a"}), (TOKENIZE, {"prompt": "b"})]),
    ("/v1/completions", {"prompt": ["a"] * 17}, []),
    ("/v1/completions", {"prompt": [1, 2]}, []),
    (CHAT, {"messages": [1], "tools": [2], "top_p": 1}, [(TOKENIZE, {"messages": [1], "tools": [2]})]),
    ("/v1/responses", {"input": "a", "instructions": "b"}, [
        (TOKENIZE, {"messages": [{"role": "system", "content": "b"}, {"role": "user", "content": "a"}]})]),
    ("/v1/responses", {"input": [{"role": "user", "content": [{"type": "input_text", "text": "a"}]}]}, [
        (TOKENIZE, {"messages": [{"role": "user", "content": "a"}]})]),
    ("/v1/responses", {"input": [{"type": "other"}]}, []),
    ("/v1/messages", {"messages": [1], "system": "s", "tools": [2], "max_tokens": 9, "stream": True}, [
        (COUNT, {"messages": [1], "system": "s", "tools": [2]})]),
]  # fmt: skip


@pytest.mark.parametrize(("path", "fields", "expected"), QUESTIONS)
def test_what_the_tokenizer_is_asked(
    path: str, fields: dict[str, Any], expected: list[tuple[str, dict[str, Any]]]
) -> None:
    asked = context.token_questions(path, parsed(model="m", **fields))
    assert asked == [(route, {"model": "m", **one}) for route, one in expected]


@pytest.mark.parametrize(("prompt", "tokens"), [([1, 2, 3], 3), ([[1], [1, 2]], 2), ("text", 0), ([], 0), (None, 0)])
def test_prompts_of_token_ids_are_counted_here(prompt: Any, tokens: int) -> None:
    assert context.counted(parsed(prompt=prompt)) == tokens


WANTED = [
    (CHAT, {"max_completion_tokens": 3, "max_tokens": 4}, 3),
    (CHAT, {"max_tokens": 4}, 4),
    (CHAT, {"max_tokens": True}, None),
    (CHAT, {"max_tokens": "4"}, None),
    ("/v1/responses", {"max_output_tokens": 5}, 5),
    ("/tokenize", {"max_tokens": 5}, None),
]


@pytest.mark.parametrize(("path", "fields", "expected"), WANTED)
def test_the_longest_reply_that_is_asked_for(path: str, fields: dict[str, Any], expected: int | None) -> None:
    assert bodies.wanted_tokens(path, parsed(**fields)) == expected


def test_thinking_moves_and_what_was_set_counts_more() -> None:
    body = parsed(enable_thinking=True, chat_template_kwargs={"enable_thinking": False, "x": 1})
    bodies.move_thinking(CHAT, body)
    assert json.loads(body.raw) == {"chat_template_kwargs": {"enable_thinking": False, "x": 1}} == body.fields
    for odd in ({"enable_thinking": True, "chat_template_kwargs": 3}, {"thinking": 3}, {"reasoning_effort": 1}):
        body = parsed(**odd)
        raw = body.raw
        bodies.move_thinking(CHAT, body)
        assert body.raw is raw
    text = parsed(enable_thinking=True)
    bodies.move_thinking("/v1/completions", text)
    assert text.fields == {"enable_thinking": True}


EFFORTS: list[tuple[dict[str, Any], bool | None]] = [
    ({"output_config": {"effort": "high"}}, False),
    ({"output_config": {"effort": "high"}, "thinking": {"type": "adaptive"}}, None),
    ({"output_config": {"effort": "high"}, "thinking": {"type": "enabled", "budget_tokens": 2000}}, True),
    ({"output_config": {"format": {}}}, None),
    ({"thinking": {"type": "disabled"}}, False),
]


@pytest.mark.parametrize(("fields", "expected"), EFFORTS)
def test_effort_without_thinking_is_no_thinking_in_anthropics_api(
    fields: dict[str, Any], expected: bool | None
) -> None:
    body = parsed(**fields)
    bodies.move_thinking("/v1/messages", body)
    kwargs = {} if expected is None else {"chat_template_kwargs": {"enable_thinking": expected}}
    assert body.fields == fields | kwargs


USAGE = b'data: {"id":"x","choices":[],"usage":{"prompt_tokens":1}}\n\n'
EVENTS = [b'data: {"choices":[{"delta":{"content":"a \\"choices\\":[] b"}}]}\n\n', USAGE, b"data: [DONE]\n\n"]


@pytest.mark.parametrize("size", [1, 7, 64, 1000])
def test_usage_that_nobody_asked_for_is_taken_out_however_it_is_cut(size: int) -> None:
    stream, hidden = b"".join(EVENTS), HiddenUsage()
    pieces = [stream[at : at + size] for at in range(0, len(stream), size)]
    assert b"".join(map(hidden.take, pieces)) == EVENTS[0] + EVENTS[2] and hidden.rest == b""
    assert HiddenUsage().take(EVENTS[0] + USAGE) == EVENTS[0]
    assert HiddenUsage().take(USAGE) == b""


@pytest.mark.parametrize(("path", "more", "expected"), [
    (CHAT, {"stream": True}, True),
    ("/v1/completions", {"stream": True}, True),
    (CHAT, {"stream": False}, False),
    (CHAT, {"stream": True, "stream_options": {}}, False),
    (CHAT, {"stream": True, "stream_options": None}, False),
    ("/v1/messages", {"stream": True}, False),
])  # fmt: skip
def test_usage_is_asked_for_where_the_client_leaves_it_open(path: str, more: dict[str, Any], expected: bool) -> None:
    body = parsed(model="m", **more)
    before = body.raw
    assert bodies.ask_usage(path, body) is expected
    if expected:
        assert json.loads(body.raw) == {"stream_options": {"include_usage": True}, "model": "m", **more}
        assert body.raw.endswith(before.removeprefix(b"{"))
    else:
        assert body.raw is before


def test_a_changed_body_keeps_odd_text() -> None:
    body = bodies.parse(b'{"model": "a", "x": "\\ud800 \xc3\xa9"}', 8)
    bodies.rename_model(body, "b")
    assert json.loads(body.raw) == {"model": "b", "x": "\ud800 é"}


@pytest.mark.parametrize("raw", [b"[" * 100000, b'{"a":' * 100000, b'{"a": ' + b"[" * 9 + b"]" * 9 + b"}"])
def test_deep_bodies_are_refused(raw: bytes) -> None:
    with pytest.raises(Refusal) as refused:
        bodies.parse(raw, 8)
    assert refused.value.status == 400


def test_many_brackets_are_no_depth() -> None:
    assert bodies.parse(b'{"a": [' + b"[1]," * 1000 + b"[2]]}", 8).fields["a"][-1] == [2]


def test_the_state_tells_what_is_left_and_keeps_the_address() -> None:
    state = EngineState()
    state.ready([Model("a")], base_url="http://127.0.0.1:9/v1/")
    before = state.snapshot
    state.begin(Phase.RESTARTING, "it ran out of memory", expected_s=10)
    assert state.snapshot.best.target.base_url == "http://127.0.0.1:9" and state.snapshot.models == before.models
    assert before.phase is Phase.READY  # a snapshot does not change
    assert state.snapshot.left_s(state.snapshot.since + 3.5) == 7
    assert state.snapshot.left_s(state.snapshot.since + 9.5) == 1
    assert state.snapshot.left_s(state.snapshot.since + 99) is None
    refusal = not_ready(state.snapshot)
    assert refusal.message == "The engine is restarting: it ran out of memory; about 10 s left."
    assert refusal.headers == {"Retry-After": "10"} and refusal.status == 503


def test_an_engine_that_is_overdue_is_no_second_away() -> None:
    late = Snapshot((Replica(Phase.STARTING, "weights", expected_s=-3.0),))
    assert late.is_overdue and not Snapshot((Replica(Phase.STARTING),)).is_overdue
    refusal = not_ready(late)
    assert refusal.message == "The engine is starting: weights; it takes longer than usual."
    assert refusal.headers == {"Retry-After": "5"} and refusal.document()["error"]["expected_s"] is None


def test_an_engine_that_is_down_says_why_without_a_time() -> None:
    refusal = not_ready(Snapshot((Replica(Phase.DOWN, "it crashed three times within ten minutes."),)))
    assert refusal.message == "The engine is down: it crashed three times within ten minutes."
    assert refusal.document()["error"]["expected_s"] is None


@pytest.mark.parametrize("given", [None, "", "a b", "x" * 101, "a\nb", "lp-0123456789abc", "é"])
def test_odd_request_ids_are_replaced(given: str | None) -> None:
    assert request_id(given).startswith("req-")


def test_paths_cannot_break_a_line_of_the_log() -> None:
    assert loggable("/a b\n\x1b[31m/sk-0123456789abcdef") == "/a?b??[31m/…"
    assert len(loggable("/" * 9999)) == 100
