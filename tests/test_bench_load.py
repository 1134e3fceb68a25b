"""The load client: timelines by an injected clock, typed errors of a server that misbehaves, prompts, arrivals."""

import asyncio
import json
import statistics
from dataclasses import replace
from itertools import islice, pairwise
from pathlib import Path
from socket import SHUT_WR
from typing import Any

import pytest

from loraport.bench.load.arrivals import arrivals, ramped
from loraport.bench.load.conversation import Talk
from loraport.bench.load.figures import read_records
from loraport.bench.load.fleet import Fleet, NullServer
from loraport.bench.load.prompts import Prompts, Source
from loraport.bench.load.record import ERRORS, Record, bucket_of, gap_seconds
from loraport.bench.load.reply import Reply
from loraport.bench.load.stage import Load, Stage, Target
from loraport.bench.load.wire import Address, Connection, Exchange, Pool
from loraport.clients.errors import EndpointError
from tests.misbehaving import Misbehaving

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
USAGE = '{"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": 3, "prompt_tokens_details": null}}'


def event(data: str) -> bytes:
    """An event in a chunk of HTTP."""
    text = f"data: {data}\n\n".encode()
    return b"%x\r\n%s\r\n" % (len(text), text)


class Wire(asyncio.Transport):
    """A transport that goes nowhere."""

    def write(self, data: Any) -> None:
        """Take what is sent."""

    def abort(self) -> None:
        """Close."""


def play(pieces: list[tuple[float, bytes]], sent: float = 100.0) -> Exchange:
    """The exchange of a connection that is given these bytes at these times."""
    now = [sent]

    async def run() -> Exchange:
        connection = Connection(lambda: now[0])
        connection.connection_made(Wire())
        exchange = Exchange()
        asking = asyncio.create_task(connection.ask(b"", exchange))
        await asyncio.sleep(0)
        for at, data in pieces:
            now[0] = at
            connection.data_received(data)
        await asking
        return exchange

    return asyncio.run(run())


def ask(base_url: str, model: str, timeout_s: float = 20, chat: bool = False) -> Exchange:
    """One request over a real socket."""
    body: dict[str, Any] = {"model": model, "max_tokens": 3, "stream": True}
    body |= {"messages": [{"role": "user", "content": "Hi"}]} if chat else {"prompt": "Hi"}

    async def once() -> Exchange:
        route = "/chat/completions" if chat else "/completions"
        return await Pool(Address.parse(base_url)).ask(route, json.dumps(body).encode(), timeout_s)

    return asyncio.run(once())


def test_times_are_those_of_the_clock_when_bytes_arrived() -> None:
    tokens = [event(json.dumps({"choices": [{"text": text}]})) for text in ("a", "b", "c")]
    last = event(USAGE) + event("[DONE]") + b"0\r\n\r\n"
    got = play([(100.5, HEAD), (101.0, tokens[0]), (101.25, tokens[1]), (102.0, tokens[2]), (103.0, last)])
    assert (got.sent, got.first, got.first_text, got.last) == (100.0, 101.0, 101.0, 102.0)
    assert (got.chunks, got.prompt, got.completion, got.error) == (3, 7, 3, "")
    assert got.gaps == {bucket_of(0.25): 1, bucket_of(0.75): 1}


def test_bytes_may_be_cut_anywhere() -> None:
    stream = HEAD + event('{"choices": [{"text": "ü"}]}') * 3 + event(USAGE) + event("[DONE]") + b"0\r\n\r\n"
    got = play([(100.0 + at, stream[at : at + 1]) for at in range(len(stream))])
    assert (got.chunks, got.completion, got.error) == (3, 3, "")
    assert got.first is not None and got.last is not None and got.first < got.last


def test_a_role_is_no_token_and_a_token_without_text_is_no_first_text() -> None:
    reply = Reply()
    deltas = [{"role": "assistant", "content": ""}, {"content": ""}, {"reasoning_content": "hm"}, {"content": "x"}, {}]
    for at, delta in enumerate(deltas):
        reply.feed(f"data: {json.dumps({'choices': [{'delta': delta}]})}\n\n".encode(), float(at))
    assert (reply.first, reply.first_text, reply.last, reply.chunks) == (1.0, 2.0, 4.0, 4)


def test_gaps_are_known_within_half_a_percent() -> None:
    for gap in (1e-6, 0.00123, 0.025, 1.7, 600.0):
        assert gap_seconds(bucket_of(gap)) == pytest.approx(gap, rel=0.005)


@pytest.mark.parametrize(
    ("model", "error", "status"),
    [
        ("good", "", 200),
        ("crlf", "", 200),
        ("silent", "no usage", 200),
        ("wrong", "5xx", 500),
        ("refusing", "4xx", 400),
        ("cut", "cut", 200),
        ("gone", "cut", 0),
        ("failing", "stream error", 200),
        ("empty", "no tokens", 200),
        ("whole", "not a stream", 200),
        ("half", "cut", 200),
        ("locked", "4xx", 401),
        ("busy", "429", 429),
        ("garbage", "stream error", 200),
        ("odd", "stream error", 200),
    ],
)
def test_every_trouble_has_its_name(model: str, error: str, status: int) -> None:
    with Misbehaving([model]) as server:
        got = ask(server.base_url, model)
    assert (got.error, got.status) == (error, status)
    assert not error or error in ERRORS


def test_headers_that_do_not_come_are_a_timeout() -> None:
    with Misbehaving(["late"]) as server:
        got = ask(server.base_url, "late", timeout_s=0.3)
    assert (got.error, got.status) == ("timeout", 0)


def test_an_event_without_end_does_not_fill_the_memory() -> None:
    reply = Reply()
    for _ in range(20):
        reply.feed(b"x" * (1 << 20), 1.0)
    assert reply.error == "stream error" and len(reply.carry) <= 1 << 24


def test_a_server_says_when_to_come_back() -> None:
    with Misbehaving(["busy"]) as server:
        assert ask(server.base_url, "busy").said == "too many (Retry-After: 7)"


def test_what_the_server_says_is_kept_in_a_line() -> None:
    with Misbehaving(["wrong", "failing"], limit=2) as server:
        said = [ask(server.base_url, model).said for model in ("wrong", "failing")]
        limited = ask(server.base_url, "good")
    assert said == ["it broke", "the engine died"]
    assert (limited.error, limited.said) == ("429", "too many")


def test_a_reply_that_does_not_end_is_a_timeout_and_its_connection_is_not_used_again() -> None:
    with Misbehaving(["hanging", "good"]) as server:

        async def both() -> tuple[Exchange, Exchange, int]:
            pool = Pool(Address.parse(server.base_url))
            body = b'{"model": "%s", "prompt": "Hi", "max_tokens": 3}'
            first = await pool.ask("/completions", body % b"hanging", 0.3)
            kept = len(pool.free)
            return first, await pool.ask("/completions", body % b"good", 20), kept

        hung, good, kept = asyncio.run(both())
    assert (hung.error, hung.chunks, kept) == ("timeout", 1, 0)
    assert good.error == ""


def test_nobody_listens() -> None:
    got = ask("http://127.0.0.1:1/v1", "any")
    assert (got.error, got.said) == ("refused", "Connection refused")


def test_a_connection_that_was_closed_while_idle_is_replaced() -> None:
    with Misbehaving(["good"]) as server:

        async def twice() -> list[str]:
            pool = Pool(Address.parse(server.base_url))
            body = b'{"model": "good", "prompt": "Hi", "max_tokens": 1}'
            first = await pool.ask("/completions", body, 20)
            assert pool.free[0].transport
            pool.free[0].transport.get_extra_info("socket").shutdown(SHUT_WR)  # what is written next will not arrive
            return [first.error, (await pool.ask("/completions", body, 20)).error]

        assert asyncio.run(twice()) == ["", ""]


@pytest.mark.parametrize(
    ("url", "known"),
    [
        ("http://h:1/v1", Address("h", 1, "/v1")),
        ("https://h/x/v1/", Address("h", 443, "/x/v1", is_tls=True)),
        ("unix:/run/e.sock", Address("engine", 80, "/v1", socket="/run/e.sock")),
    ],
)
def test_addresses(url: str, known: Address) -> None:
    assert Address.parse(url) == known


@pytest.mark.parametrize("url", ["127.0.0.1:8000", "http://", "http://h:99999/v1", "ftp://h/v1"])
def test_what_is_no_address(url: str) -> None:
    with pytest.raises(EndpointError, match="is not a URL"):
        Address.parse(url)


def test_prompts_are_unique_exact_and_the_same_for_the_same_seed() -> None:
    source = Source("ids", "/completions", [str(n) for n in range(50)], (16, 16), (4, 8), seed=1, prefix=5)
    bodies = [json.loads(Prompts(source).body(number, "m")) for number in range(200)]
    assert {len(body["prompt"]) for body in bodies} == {16}
    assert len({tuple(body["prompt"]) for body in bodies}) == 200
    assert len({tuple(body["prompt"][:5]) for body in bodies}) == 1
    assert {body["max_tokens"] for body in bodies} == {4, 5, 6, 7, 8}
    assert bodies[7] == json.loads(Prompts(source).body(7, "m"))
    assert bodies[0]["stream_options"] == {"include_usage": True}


@pytest.mark.parametrize(
    ("parts", "length", "is_unique"), [(64, 8, True), (64, 6, False), (2, 41, True), (1, 99, False)]
)
def test_prompts_with_room_for_their_numbers_cannot_be_the_same(parts: int, length: int, is_unique: bool) -> None:
    source = Source("ids", "/completions", [str(n) for n in range(parts)], (length, length), (1, 1), seed=1)
    assert source.all_unique == is_unique
    stage = 1 << 24
    numbers = [*range(300), *range(stage, stage + 300), *range(9 * stage, 9 * stage + 300), 1 << 40]
    prompts = {Prompts(source).body(number, "m") for number in numbers} if is_unique else set(numbers)
    assert len(prompts) == 901


def test_rows_are_told_apart_by_a_mark_unless_they_are_sent_as_they_are() -> None:
    row = json.dumps([{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}])
    source = Source("rows", "/chat/completions", [row], (1, 1), (4, 4), seed=1)
    bodies = [json.loads(Prompts(source).body(number, "m"))["messages"] for number in (0, 1, 36)]
    assert [messages[1]["content"] for messages in bodies] == ["[0] Hi", "[1] Hi", "[10] Hi"]
    assert {messages[0]["content"] for messages in bodies} == {"Be brief."}, "a prefix that all share stays one"
    plain = json.loads(Prompts(replace(source, as_is=True)).body(7, "m"))["messages"]
    assert plain == json.loads(row)


def test_a_conversation_goes_on_with_the_servers_replies() -> None:
    call = {"role": "assistant", "content": "", "tool_calls": [{"id": "1"}]}
    told = {"role": "tool", "content": "12", "tool_call_id": "1"}
    first, second = {"role": "user", "content": "a"}, {"role": "user", "content": "b"}
    talk = Talk([first, {"role": "assistant", "content": "recorded"}, second, call, told, call])
    assert talk.ask() == [first] and talk.turn == 1
    talk.hear("heard")
    assert talk.ask() == [first, {"role": "assistant", "content": "heard"}, second]
    talk.hear("words in place of a call")
    assert (talk.ask() or [])[-2:] == [call, told], "the answer of a tool needs its call"
    talk.hear("")
    assert talk.ask() is None and talk.turn == 3


def test_words_leave_room_for_what_the_server_adds() -> None:
    source = Source("words", "/chat/completions", ["tea"], (20, 20), (4, 4), seed=1, overhead=6)
    (message,) = json.loads(Prompts(source).body(0, 'a "b"'))["messages"]
    assert message == {"role": "user", "content": " ".join(["tea"] * 14)}


def test_arrivals_have_their_rate_and_their_burstiness() -> None:
    assert list(islice(arrivals("constant", 4, 1, 0), 3)) == [0, 0.25, 0.5]
    for kind, burstiness, spread in (("poisson", 1.0, 1.0), ("gamma", 0.25, 2.0)):
        times = list(islice(arrivals(kind, 50.0, burstiness, 3), 20_000))  # type: ignore[arg-type]
        gaps = [later - earlier for earlier, later in pairwise(times)]
        assert statistics.mean(gaps) == pytest.approx(0.02, rel=0.05)
        assert statistics.stdev(gaps) / statistics.mean(gaps) == pytest.approx(spread, rel=0.1)
        assert times[:9] == list(islice(arrivals(kind, 50.0, burstiness, 3), 9))  # type: ignore[arg-type]


@pytest.mark.parametrize(("first", "last"), [(1.0, 9.0), (9.0, 1.0), (4.0, 4.0)])
def test_a_ramp_goes_evenly_from_rate_to_rate(first: float, last: float) -> None:
    times = list(ramped(arrivals("constant", 1, 1, 0), first, last, seconds=10))
    assert len(times) == round(10 * (first + last) / 2) and times == sorted(times) and times[-1] < 10
    middle = sum(time < 5 for time in times)
    assert middle == pytest.approx(5 * (first + (first + last) / 2) / 2, abs=1)


@pytest.mark.parametrize(("processes", "concurrency"), [(1, 3), (2, 3), (3, 2)])
def test_processes_share_a_stage_without_a_gap(tmp_path: Path, processes: int, concurrency: int) -> None:
    source = Source("ids", "/completions", ["1", "2"], (4, 4), (5, 5), seed=1)
    with NullServer() as server, Fleet(source, tmp_path, processes) as fleet:
        targets = [Target(server.base_url, name) for name in ("a", "b")]
        fleet.run(Stage(0, "closed", targets, Load("closed", concurrency), requests=17))
        fleet.run(Stage(1, "open", targets, Load("open", rate=500), requests=20, first=1000))
    records = [Record.parse(line) for path in tmp_path.glob("*.jsonl") for line in path.read_text().splitlines()]
    for stage, count in ((0, 17), (1, 20)):
        own = [record for record in records if record.stage == stage]
        assert sorted(record.index for record in own) == list(range(count))
        assert all(record.model == "ab"[record.index % 2] for record in own)
        assert {(record.error, record.completion_tokens, record.prompt_tokens) for record in own} == {("", 5, 4)}
    found = read_records(tmp_path)
    assert (found[0].requests, found[1].requests) == (17, 20)


def test_a_server_that_only_refuses_is_left_alone(tmp_path: Path) -> None:
    source = Source("words", "/completions", ["x"], (4, 4), (5, 5), seed=1)
    with Misbehaving(["good"], limit=0) as server, Fleet(source, tmp_path) as fleet:
        for number, load in enumerate((Load("open", rate=100), Load("closed", 8))):
            (effort,) = fleet.run(Stage(number, "", [Target(server.base_url, "good")], load, seconds=600))
            assert effort.gave_up
    for records in read_records(tmp_path).values():
        assert 50 <= records.errors["429"] <= records.requests < 500
        assert set(records.errors) <= {"429", "stopped"}, "those under way when it was given up"


def test_what_is_late_is_cut_off_where_a_stage_has_an_end(tmp_path: Path) -> None:
    source = Source("words", "/completions", ["x"], (4, 4), (5, 5), seed=1)
    with Misbehaving(["hanging"]) as server, Fleet(source, tmp_path) as fleet:
        for number, load in enumerate((Load("open", rate=20), Load("closed", 3))):
            target = Target(server.base_url, "hanging")
            (effort,) = fleet.run(Stage(number, "", [target], load, seconds=1.0, drain_s=0.2))
            assert not effort.gave_up
    for records in read_records(tmp_path).values():
        assert set(records.errors) == {"stopped"} and records.requests >= 1


def test_a_record_line_that_was_cut_by_a_kill_is_left_out(tmp_path: Path) -> None:
    record = Record(0, 0, "m", 1.0, 1.0, 2.0, 2.0, 3.0, 2, [], 4, 2)
    (tmp_path / "records-0.jsonl").write_text(record.line() + record.line()[:40])
    assert read_records(tmp_path)[0].requests == 1
