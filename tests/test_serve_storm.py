"""Many streams while the engine is killed: each request ends in a reply or in an error in words, and memory stays flat.

python -m tests.test_serve_storm 60       # the figure of docs/log.md: 200 streams for a minute
"""

import asyncio
import json
import sys
import tempfile
from collections import Counter
from pathlib import Path

import aiohttp
import psutil

from loraport.clients.home import Home
from loraport.serve.engine.leftovers import read_traces, session_of
from tests.models import make_tiny_base
from tests.serving import FAKE, Serving, serving, wait_until

STREAMS, WORDS = 200, 20
PATIENCE = aiohttp.ClientTimeout(total=60)


async def one(session: aiohttp.ClientSession, url: str) -> str:
    """How a stream ended: complete, broken (an error in the stream), a status, or refused (no connection)."""
    body = {"model": "base", "messages": [{"role": "user", "content": "a b"}], "max_tokens": WORDS, "stream": True}
    async with session.post(f"{url}/chat/completions", json=body) as response:
        text = await response.text()
    if response.status != 200:
        error = json.loads(text)["error"]
        assert response.status in (502, 503) and error["message"] and response.headers.get("Retry-After"), text
        return str(response.status)
    events = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]
    failed = [event for event in events if "error" in event]
    assert failed or (text.rstrip().endswith("[DONE]") and len(events) == WORDS), text[-300:]
    assert all(event["error"]["message"] for event in failed)
    return "broken" if failed else "complete"


async def storm(running: Serving, url: str, seconds: float) -> tuple[Counter[str], list[float]]:
    """(ends of all requests, MiB of the gateway's process now and then), while the engine is killed twice."""
    ends: Counter[str] = Counter()
    memory: list[float] = []
    loop = asyncio.get_running_loop()
    until = loop.time() + seconds

    async def client(session: aiohttp.ClientSession) -> None:
        while loop.time() < until:
            end = await one(session, url)
            ends[end] += 1
            await asyncio.sleep(0.2 if end in ("502", "503") else 0)

    async def kill() -> None:
        for _ in range(2):
            await asyncio.sleep(seconds / 3)
            session_of(read_traces(running.home)[0])[-1].kill()

    async def look() -> None:
        process = psutil.Process(running.process.pid)
        while loop.time() < until:
            memory.append(process.memory_info().rss / 2**20)
            await asyncio.sleep(0.5)

    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=PATIENCE) as session:
        await asyncio.gather(kill(), look(), *(client(session) for _ in range(STREAMS)))
    return ends, memory


def run(home: Home, base: Path, seconds: float) -> tuple[Counter[str], list[float]]:
    """A storm over a `loraport serve` of its own."""
    with serving(home, "--model", str(base), "--engine-command", FAKE, token_s="0.05", start_s="0.5") as running:
        url = running.ready()["base_url"]
        ends, memory = asyncio.run(storm(running, url, seconds))
        wait_until(lambda: "ready again" in running.text, "the engine is back")
    return ends, memory


def test_every_request_ends_in_words_while_the_engine_is_killed_twice(home: Home, tiny_base: Path) -> None:
    ends, memory = run(home, tiny_base, 9)
    assert set(ends) <= {"complete", "broken", "503", "502"}, ends
    assert ends["complete"] > STREAMS and ends["broken"] > 0 and ends["503"] > 0
    assert max(memory) < memory[len(memory) // 4] + 60, "memory of the gateway grows"


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        ends, memory = run(Home(folder / "home"), make_tiny_base(folder / "tiny"), float(sys.argv[1]))
        sys.stdout.write(f"{dict(ends)}, {min(memory):.0f} to {max(memory):.0f} MiB\n")
