"""A server of token streams with a KV cache that fills up, a prefix cache, and vLLM's /metrics about both.

A word is a token. A request waits until its prompt fits and fewer than `seats` run; it holds its prompt and each token
of its reply; where a token does not fit, the newest request is thrown out and waits again. What it does wrong is in
its knobs.

    with KvServer(Knobs(capacity=1000, context=300)) as server:
        bench_kv(server.base_url)
"""

import json
import select
import threading
import time
from dataclasses import dataclass

from tests.fake_engine import Replies
from tests.loopback import Loopback

BLOCK = 16


@dataclass
class Knobs:
    """How it behaves. Lengths in tokens, of prompt and reply together where it is about a context."""

    capacity: int = 1000
    seats: int = 64  # requests at once
    context: int = 300
    told: int | None = 0  # by /v1/models; 0: the context
    names_limit: bool = True  # in its refusals
    metrics: bool = True
    token_s: float = 0.004
    prompt_s: float = 0.0  # for each token of a prompt that is not in the prefix cache
    hangs_from: int = 1 << 30  # contexts that are never answered
    cuts_from: int = 1 << 30  # contexts whose connection breaks half-way
    shortens: bool = False  # longer prompts, without a word
    refuses_from: int = 1 << 30  # requests at once, with 429
    dies_at: int = 1 << 30  # requests, after which nothing is answered
    is_deaf: bool = False  # nothing at all is answered


class KvServer(Loopback):
    """`running`, `waiting`: requests now. `cut`: requests whose client went away."""

    def __init__(self, knobs: Knobs) -> None:
        self.knobs = knobs
        self.changed = threading.Condition()
        self.holds: dict[int, int] = {}  # request → tokens, of those that run, in the order of their start
        self.waiting: set[int] = set()
        self.thrown: set[int] = set()
        self.prefixes: set[int] = set()
        self.preemptions = self.queries = self.hits = self.asked = self.cut = self.most_running = 0
        self.closing = threading.Event()
        super().__init__(Handler)
        self.server.request_queue_size = 1024
        self.server.handle_error = lambda *_: None  # type: ignore[method-assign]  # clients that went away
        self.base_url = f"{self.origin}/v1"

    def stop(self) -> None:
        """Stop; what hangs ends too."""
        self.closing.set()
        super().stop()

    @property
    def used(self) -> int:
        """Tokens in the cache."""
        return sum(self.holds.values())

    def page(self) -> str:
        """/metrics."""
        knobs, label = self.knobs, '{engine="0",model_name="m"}'
        cache = f'cache_dtype="auto",block_size="{BLOCK}",num_gpu_blocks="{knobs.capacity // BLOCK}"'
        sizes = f'kv_cache_size_tokens="{knobs.capacity}",enable_prefix_caching="True"'
        figures = {
            "num_requests_running": len(self.holds),
            "num_requests_waiting": len(self.waiting),
            "kv_cache_usage_perc": self.used / knobs.capacity,
            "num_preemptions_total": self.preemptions,
            "prefix_cache_queries_total": self.queries,
            "prefix_cache_hits_total": self.hits,
        }
        lines = [f"vllm:{name}{label} {value}" for name, value in figures.items()]
        return "\n".join(["# HELP nothing", *lines, f"vllm:cache_config_info{{{cache},{sizes}}} 1.0", ""])

    def count_prefix(self, words: list[str]) -> int:
        """Tokens of a prompt that are not in the prefix cache; its blocks are there from now on."""
        ends = [hash(tuple(words[:end])) for end in range(BLOCK, len(words) + 1, BLOCK)]
        hits = BLOCK * sum(end in self.prefixes for end in ends)
        self.prefixes.update(ends)
        self.queries += len(words)
        self.hits += hits
        return len(words) - hits

    def make_room(self, number: int) -> None:
        """One more token for a request; where there is none, the newest is thrown out."""
        while self.used >= self.knobs.capacity and number in self.holds:
            newest = list(self.holds)[-1]
            del self.holds[newest]
            self.thrown.add(newest)
            self.preemptions += 1
        if number in self.holds:
            self.holds[number] += 1


class Handler(Replies):
    """One connection."""

    owner: KvServer
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""

    def do_GET(self) -> None:
        """The model, and /metrics."""
        knobs = self.owner.knobs
        if self.path == "/v1/models":
            told = knobs.context if knobs.told == 0 else knobs.told
            self.answer(200, {"data": [{"id": "m", "object": "model", "max_model_len": told}]})
        elif self.path == "/metrics" and knobs.metrics:
            with self.owner.changed:
                page = self.owner.page()
            self.send(200, page.encode(), "text/plain")
        else:
            self.answer(404, {"error": {"message": "Not Found"}})

    def do_POST(self) -> None:
        """A completion, or the trouble that the knobs order."""
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path != "/v1/completions":
            return self.answer(404, {"detail": "Not Found"})
        server, knobs = self.owner, self.owner.knobs
        words = body["prompt"].split()
        reply, size = body["max_tokens"], len(words) + body["max_tokens"]
        with server.changed:
            server.asked += 1
            number = server.asked
        if knobs.is_deaf or number >= knobs.dies_at or size >= knobs.hangs_from:
            return self.hang()
        if knobs.shortens:
            words = words[: knobs.context - reply]
        elif size > knobs.context:
            named = f"the maximum context length is {knobs.context} tokens" if knobs.names_limit else "too long"
            return self.answer(400, {"error": {"message": f"No: {named}."}})
        if len(server.holds) + len(server.waiting) >= knobs.refuses_from:
            return self.answer(429, {"error": {"message": "too many at once"}})
        return self.complete(number, words, reply, size >= knobs.cuts_from)

    def complete(self, number: int, words: list[str], reply: int, is_cut: bool) -> None:
        """Wait for room, compute the prompt, stream the reply."""
        server, knobs = self.owner, self.owner.knobs
        try:
            self.enter(number, len(words))
            with server.changed:
                new = server.count_prefix(words)
            time.sleep(new * knobs.prompt_s)
            self.begin()
            for index in range(reply):
                self.chunk(json.dumps({"choices": [{"text": f" {index}"}]}))
                if is_cut:
                    return self.hang_up()
                time.sleep(knobs.token_s)
                with server.changed:
                    server.make_room(number)
                    is_thrown = number in server.thrown
                if is_thrown:
                    self.enter(number, len(words) + index)
            usage = {"prompt_tokens": len(words), "completion_tokens": reply}
            self.chunk(json.dumps({"choices": [], "usage": usage}))
            self.chunk("[DONE]")
            self.wfile.write(b"0\r\n\r\n")
        except OSError:
            server.cut += 1
            self.close_connection = True
        finally:
            with server.changed:
                server.waiting.discard(number)
                server.thrown.discard(number)
                server.holds.pop(number, None)
                server.changed.notify_all()

    def enter(self, number: int, size: int) -> None:
        """Wait until the request fits; OSError when its client went away meanwhile."""
        server, knobs = self.owner, self.owner.knobs
        with server.changed:
            server.waiting.add(number)
            while (
                min(server.waiting) != number or len(server.holds) >= knobs.seats or server.used + size > knobs.capacity
            ):
                server.changed.wait(0.02)
                if server.closing.is_set() or select.select([self.connection], [], [], 0)[0]:
                    raise ConnectionError
            server.waiting.discard(number)
            server.thrown.discard(number)
            server.holds[number] = size
            server.most_running = max(server.most_running, len(server.holds))
            server.changed.notify_all()

    def hang(self) -> None:
        """Say nothing, until the client goes away."""
        while not self.owner.closing.is_set() and not select.select([self.connection], [], [], 0.02)[0]:
            pass
        self.owner.cut += 1
        self.close_connection = True

    def hang_up(self) -> None:
        """Break the connection off."""
        self.connection.shutdown(2)
        self.close_connection = True

    def begin(self) -> None:
        """Headers of a stream."""
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
