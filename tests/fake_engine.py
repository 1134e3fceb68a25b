"""A stand-in for vLLM's server: a real HTTP process with the same command line, log lines and way of dying.

It answers golden prompts from the manifests of the adapters it is given. What it does wrong is set in its environment:

    FAKE_WORDING=0.25        log lines of that version (default 0.32)
    FAKE_START_S=2           seconds from spawn to ready
    FAKE_CRASH=weights       die at that phase, with FAKE_LAST_WORDS as its last lines and status FAKE_STATUS
    FAKE_CRASHING=-1.sock    only the engine whose socket is called so
    FAKE_TOO_LONG=700        die so while its cache is made where the context is longer
    FAKE_DEAD_CORE=1         answer as vLLM's API server does once its core has died
    FAKE_TARGETS_FAIL=1      die so where LoRA slots are limited to some linears
    FAKE_REPLIES=base        answer for adapters as the base does; `garbage`: as nobody does; default `golden`;
                             `mixed`: for the base as an adapter does, while one is asked too, as vLLM's CPU kernels do;
                             `other base`: for the base as nobody does, as after a training on its 4-bit weights
    FAKE_HIDE=demo           do not list that model
    FAKE_REFUSE=demo@v2      refuse to load that adapter, as vLLM does where its weights do not fit
    FAKE_WRONG=demo@v2       answer for that adapter as the base does
    FAKE_TOKEN_S=0.05        seconds for each token
    FAKE_LOAD_S=0.1          seconds that an adapter takes into host memory (--max-cpu-loras); FAKE_MOVE_S: into a slot
    FAKE_CROWD_S=60          seconds that a request takes while another one is asked
    FAKE_IGNORE_SIGTERM=1    survive SIGTERM
    FAKE_FREEZE=/a/file      while that file exists, requests are not answered
    FAKE_BUSY=1              what /metrics counts goes on moving, frozen or not
    FAKE_GRANDCHILD=1        start a process of its own that outlives it, as a crashed vLLM does

Asked anything else than a golden prompt (chat, streams, text), it answers `max_tokens` words and refuses prompts beyond
its context in the words of FAKE_WORDING. A word is a token. GET /seen shows what reached it, GET /slots which adapter
is in which of --max-loras slots; POST /knob sets one of these while it runs. For these replies:

    FAKE_DIE_AT=5            die after that many words of a stream
    FAKE_HANG_AT=5           say nothing more after that many words
    FAKE_SILENT_S=5          seconds until the headers of a reply
    FAKE_WORD_BYTES=9999     length of the words of a stream
"""

import argparse
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

STARTS = {
    "0.32": """\
configuration|(APIServer pid=7) INFO 11-21 23:21:14 [api_utils.py:347]  ▄▄ ▄█ █     █     █ ▀▄▀ █  version 0.32.0
configuration|(APIServer pid=7) INFO 11-21 23:21:14 [api_utils.py:286] non-default args: {'enable_lora': True}
engine process|(APIServer pid=7) INFO 11-21 23:21:31 [model.py:733] Resolved architecture: Qwen3ForCausalLM
worker|(EngineCore pid=9) INFO 11-21 23:21:46 [core.py:133] Initializing a V1 LLM engine (v0.32.0) with config: ...
weights|(Worker pid=9) INFO 11-21 23:22:02 [cpu_model_runner.py:68] Starting to load model /models/tiny...
LoRA slots|(Worker pid=9) INFO 11-21 23:22:02 [default_loader.py:501] Loading weights took 0.01 seconds
KV cache|(EngineCore pid=9) INFO 11-21 23:22:03 [kv_cache_utils.py:2327] CPU KV cache size: 4,194,304 tokens
front end|(EngineCore pid=9) INFO 11-21 23:22:09 [core.py:402] init engine (profile, create kv cache) took 5.91 s
front end|(APIServer pid=7) INFO 11-21 23:22:10 [entry.py:140] Starting vLLM server on http://127.0.0.1:8000""",
    "0.25": """\
configuration|(APIServer pid=7) INFO 06-01 10:00:22 [api_server.py:1351] vLLM API server version 0.25.1
engine process|(APIServer pid=7) INFO 06-01 10:00:30 [model.py:547] Resolved architecture: Qwen3ForCausalLM
worker|(EngineCore pid=9) INFO 06-01 10:00:46 [core.py:76] Initializing a V1 LLM engine (v0.25.1) with config: ...
weights|(EngineCore pid=9) INFO 06-01 10:00:50 [gpu_model_runner.py:2653] Starting to load model /models/8b...
LoRA slots|(EngineCore pid=9) INFO 06-01 10:00:53 [default_loader.py:267] Loading weights took 2.59 seconds
compilation|(EngineCore pid=9) INFO 06-01 10:00:54 [gpu_model_runner.py:2698] Model loading took 15.3 GiB and 3.6 s
compilation|(EngineCore pid=9) INFO 06-01 10:01:14 [backends.py:559] Dynamo bytecode transform time: 20.10 s
profiling|(EngineCore pid=9) INFO 06-01 10:01:44 [monitor.py:34] torch.compile took 41.20 s in total
KV cache|(EngineCore pid=9) INFO 06-01 10:01:49 [monitor.py:50] Initial profiling/warmup run took 5.02 s
KV cache|(EngineCore pid=9) INFO 06-01 10:01:50 [gpu_worker.py:298] Available KV cache memory: 111.75 GiB
graph capture|(EngineCore pid=9) INFO 06-01 10:01:51 [kv_cache_utils.py:1087] GPU KV cache size: 813,696 tokens
warm-up|(EngineCore pid=9) INFO 06-01 10:02:25 [gpu_model_runner.py:3480] Graph capturing finished in 34 secs
front end|(EngineCore pid=9) INFO 06-01 10:02:44 [core.py:210] init engine (profile, create kv cache) took 110.2 s
front end|(APIServer pid=7) INFO 06-01 10:02:45 [api_server.py:1634] Starting vLLM API server 0 on http://0.0.0.0:8000""",
}
GARBAGE = 7
LONG = 64  # tokens of a reply that is company for others
REPLIES = ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages")
LIMITS = ("max_completion_tokens", "max_tokens", "max_output_tokens")


def start_lines(wording: str) -> list[tuple[str, str]]:
    """(phase, log line) of a start, in order."""
    pairs = (line.partition("|") for line in STARTS[wording].splitlines())
    return [(phase, text) for phase, _, text in pairs]


def knob(name: str, default: str = "") -> str:
    """A setting from the environment."""
    return os.environ.get(f"FAKE_{name}", default)


def log(line: str) -> None:
    """Say a line as the engine does."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def parse(arguments: list[str]) -> argparse.Namespace:
    """The part of vLLM's command line that matters here."""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--model", required=True)
    parser.add_argument("--served-model-name", nargs="+", required=True)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--uds")
    parser.add_argument("--max-model-len", type=int, required=True)
    parser.add_argument("--lora-modules", nargs="*", type=json.loads, default=[])
    parser.add_argument("--default-chat-template-kwargs", type=json.loads, default={})
    parser.add_argument("--max-loras", type=int, default=1)
    parser.add_argument("--max-cpu-loras", type=int)
    parser.add_argument("--lora-target-modules", nargs="*")
    return parser.parse_known_args(arguments)[0]


def run_phases() -> None:
    """Log a start, or the part of it before the crash."""
    lines = start_lines(knob("WORDING", "0.32"))
    for phase, line in lines:
        log(line)
        if phase == knob("CRASH"):
            log(knob("LAST_WORDS"))
            sys.exit(int(knob("STATUS", "1")))
        time.sleep(float(knob("START_S", "0")) / len(lines))


class Models:
    """The models of this engine, and its replies."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.names = [*options.served_model_name, *(module["name"] for module in options.lora_modules)]
        self.bases = options.served_model_name
        self.limit = options.max_model_len
        self.template_kwargs = options.default_chat_template_kwargs
        self.manifests: dict[str, dict[str, Any]] = {}
        self.folders = {module["name"]: module["path"] for module in options.lora_modules}
        for module in options.lora_modules:
            self.manifests[module["name"]] = json.loads((Path(module["path"]) / "loraport.json").read_text())
        self.golden = {name: manifest["golden"] for name, manifest in self.manifests.items()}
        self.slots: list[str | None] = [None] * options.max_loras
        self.recent: list[str] = []  # adapters in slots, that asked least recently first
        self.host: list[str] = []  # and in host memory
        self.most_in_host = options.max_cpu_loras or options.max_loras
        self.lock = threading.Lock()
        self.asked: list[str] = []  # models of the requests that are being answered

    def load(self, body: dict[str, Any]) -> tuple[int, str]:
        """(status, words) of loading an adapter while the engine runs, as vLLM answers."""
        name, folder = body["lora_name"], Path(body["lora_path"])
        if name in self.names:
            return 400, f"The lora adapter '{name}' has already been loaded. If you want to load the adapter in place,"
        if not folder.is_dir():
            return 404, f"Loading lora {name} failed: No adapter found for {folder}"
        if name == knob("REFUSE"):
            return 500, "Call to add_lora method failed: LoRA rank 64 is greater than max_lora_rank 16."
        path = folder / "loraport.json"
        if path.is_file():
            self.manifests[name] = json.loads(path.read_text())
            self.golden[name] = self.manifests[name]["golden"]
        self.names.append(name)
        self.folders[name] = str(folder)
        self.touch(name)
        return 200, f"Success: LoRA adapter '{name}' added successfully."

    def unload(self, body: dict[str, Any]) -> tuple[int, str]:
        """(status, words) of unloading one: the name goes, its slot stays as it is."""
        name = body["lora_name"]
        if name not in self.names or name in self.bases:
            return 404, f"The lora adapter '{name}' cannot be found."
        self.names.remove(name)
        return 200, f"Success: LoRA adapter '{name}' removed successfully."

    def touch(self, name: str) -> None:
        """An adapter is asked: where it is in no slot, it gets the first free one, or that of the one asked least."""
        with self.lock:
            if name in self.host:
                self.host.remove(name)
            else:
                time.sleep(float(knob("LOAD_S", "0")))
            self.host = [*self.host, name][-self.most_in_host :]
            if name in self.recent:
                self.recent.remove(name)
            elif None not in self.slots:
                self.slots[self.slots.index(self.recent.pop(0))] = None
            if name not in self.slots:
                time.sleep(float(knob("MOVE_S", "0")))
                self.slots[self.slots.index(None)] = name
            self.recent.append(name)

    def is_golden(self, body: dict[str, Any]) -> bool:
        """Whether a request is one of a verification: a recorded conversation, or a prompt of tokens, unstreamed."""
        known = [golden["messages"] for entries in self.golden.values() for golden in entries]
        return body.get("messages") in known if "messages" in body else isinstance(body.get("prompt"), list)

    def reply(self, model: str, prompt: list[int], most: int) -> dict[str, Any]:
        """A completion choice for a golden prompt, beside whatever else is asked at this moment."""
        with self.lock:
            self.asked.append(model)
        try:
            time.sleep(0 if knob("REPLIES") != "mixed" else 0.2 if most < LONG else 1)
            time.sleep(float(knob("CROWD_S", "0")) if len(self.asked) > 1 else 0)
            return self.choose(model, prompt, most)
        finally:
            with self.lock:
                self.asked.remove(model)

    def who_answers(self, model: str) -> str:
        """`base`, `adapter`, or `nobody`."""
        replies, is_base = knob("REPLIES"), model in self.bases or model in knob("WRONG").split(",")
        if replies == "garbage" or (replies == "other base" and is_base):
            return "nobody"
        if replies == "mixed" and is_base and set(self.asked) - set(self.bases):
            return "adapter"
        return "base" if is_base or replies == "base" else "adapter"

    def tokenize(self, model: str, messages: list[dict[str, str]], told: dict[str, bool]) -> list[int]:
        """A golden prompt's tokens; others when the template is told something else than in training."""
        manifest = self.manifests[model]
        tokens, *_ = [golden["prompt_tokens"] for golden in manifest["golden"] if golden["messages"] == messages]
        return [*tokens[:-1], GARBAGE] if self.template_kwargs | told != manifest["chat_template_kwargs"] else tokens

    def choose(self, model: str, prompt: list[int], most: int) -> dict[str, Any]:
        """A completion choice for a golden prompt, or for one that part of its reply was added to."""
        who = self.who_answers(model)
        for golden in self.golden.get(model) or [entry for entries in self.golden.values() for entry in entries]:
            if who == "nobody":
                break
            known = golden[who]
            whole = golden["prompt_tokens"] + known["tokens"]
            start = len(prompt) - len(golden["prompt_tokens"])
            if start >= 0 and whole[: len(prompt)] == prompt:
                return self.choice(known["tokens"][start:], known["logprobs"][start:], known, most)
        logprob = -1.5 if who == "adapter" and model not in self.manifests else -1.0
        return self.choice([GARBAGE] * most, [logprob] * most, {"text": "?" * most, "stopped": False}, most)

    def choice(self, tokens: list[int], logprobs: list[float], known: dict[str, Any], most: int) -> dict[str, Any]:
        """What vLLM puts into `choices`."""
        time.sleep(float(knob("TOKEN_S", "0")) * min(len(tokens), most))
        stopped = known["stopped"] and len(tokens) <= most
        names = [f"token_id:{token}" for token in tokens[:most]]
        return {
            "index": 0,
            "text": known["text"],
            "logprobs": {
                "tokens": names,
                "token_logprobs": logprobs[:most],
                "top_logprobs": [{name: value} for name, value in zip(names, logprobs, strict=False)],
            },
            "finish_reason": "stop" if stopped else "length",
        }


class Seen:
    """What reached the engine: (method, path, headers, body) of each request; streams that run and that were cut."""

    def __init__(self) -> None:
        self.requests: list[dict[str, Any]] = []
        self.running = self.cut = 0


def too_long(prompt: int, wanted: int, limit: int) -> str | None:
    """What vLLM says to a request that does not fit, in the wording of FAKE_WORDING; None where it answers."""
    if knob("WORDING", "0.32") == "0.25" and prompt + wanted > limit:
        return (
            f"This model's maximum context length is {limit} tokens. However, you requested {wanted} output tokens and "
            f"your prompt contains at least {limit - wanted + 1} input tokens, for a total of at least {limit + 1} "
            "tokens. Please reduce the length of the input prompt or the number of requested output tokens."
        )
    if prompt > limit:
        return (
            f"This model's maximum context length is {limit} tokens. However, your prompt contains at least "
            f"{limit + 1} input tokens, which exceeds this limit even without any output tokens. "
            "Please reduce the length of the input prompt."
        )
    return None


def words(body: dict[str, Any]) -> int:
    """Tokens of a prompt: its words, and 4 for each message."""
    if isinstance(body.get("prompt"), list):
        return len(body["prompt"])
    turns = body.get("messages") or body.get("input") or body.get("prompt") or ""
    if isinstance(turns, str):
        return len(turns.split())
    return sum(4 + len(str(turn["content"]).split()) for turn in turns)


class Replies(BaseHTTPRequestHandler):
    """Documents, and events of a stream, as servers of models send them."""

    def chunk(self, text: str) -> None:
        """One event of a stream."""
        data = f"data: {text}\n\n".encode()
        self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))

    def answer(self, status: int, document: dict[str, Any]) -> None:
        """Send a JSON document."""
        self.send(status, json.dumps(document).encode(), "application/json")

    def send(self, status: int, data: bytes, kind: str) -> None:
        """Send a body."""
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


class Handler(Replies):
    """The routes that Loraport uses."""

    models: Models
    seen = Seen()
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def do_GET(self) -> None:
        """/health and /v1/models."""
        if self.path == "/health":
            self.answer(200, {})
        elif self.path == "/v1/models":
            listed = [{"id": name, "object": "model"} for name in self.models.names if name != knob("HIDE")]
            for card in listed:
                is_base = card["id"] in self.models.bases
                known = {"parent": self.models.bases[0], "root": self.models.folders.get(card["id"])}
                card |= {"max_model_len": self.models.limit} if is_base else known
            self.answer(200, {"object": "list", "data": listed})
        elif self.path == "/seen":
            self.answer(200, vars(self.seen))
        elif self.path == "/slots":
            self.answer(200, {"slots": self.models.slots})
        elif self.path == "/metrics":
            counted = time.monotonic() if knob("BUSY") else 0
            gauge = "# TYPE vllm:num_requests_running gauge\nvllm:num_requests_running 0.0\n"
            slots = f'vllm:lora_requests_info{{max_lora="{len(self.models.slots)}",running_lora_adapters=""}} 1.0\n'
            self.send(200, f"{gauge}{slots}vllm:prompt_tokens_total {counted}\n".encode(), "text/plain")
        else:
            self.answer(404, {"error": {"message": "Not Found", "code": 404}})

    def do_POST(self) -> None:
        """/v1/completions and /tokenize, and /die, which ends the engine as a crash does."""
        raw = self.rfile.read(int(self.headers["Content-Length"])) or b"{}"
        body = json.loads(raw)
        self.seen.requests.append({"path": self.path, "headers": dict(self.headers), "body": raw.decode()})
        while knob("FREEZE") and Path(knob("FREEZE")).exists():
            time.sleep(0.02)
        if self.path == "/die":
            log("(EngineCore pid=9) ERROR 11-21 23:30:00 [core.py:1] RuntimeError: the fake was told to die")
            os._exit(9)
        if body.get("model") in self.models.names and body["model"] not in self.models.bases:
            self.models.touch(body["model"])
        if self.path == "/knob":
            os.environ.update({f"FAKE_{name}": value for name, value in body.items()})
            self.answer(200, {})
        elif self.path in ("/v1/load_lora_adapter", "/v1/unload_lora_adapter"):
            self.change(*(self.models.load if "/load" in self.path else self.models.unload)(body))
        elif body.get("model") not in self.models.names:
            self.answer(404, {"error": {"message": f"The model `{body.get('model')}` does not exist.", "code": 404}})
        elif self.path == "/v1/embeddings":
            self.answer(404, {"detail": "Not Found"})
        elif self.path == "/tokenize" and not self.models.is_golden(body):
            self.answer(200, {"count": words(body), "max_model_len": self.models.limit, "tokens": []})
        elif self.path in REPLIES and not (self.path == "/v1/completions" and self.models.is_golden(body)):
            self.write_words(body)
        elif self.path == "/tokenize":
            told = body.get("chat_template_kwargs") or {}
            self.answer(200, {"tokens": self.models.tokenize(body["model"], body["messages"], told)})
        elif self.path != "/v1/completions":
            self.answer(404, {"error": {"message": "Not Found", "code": 404}})
        else:
            choice = self.models.reply(body["model"], body["prompt"], body["max_tokens"])
            self.answer(200, {"object": "text_completion", "model": body["model"], "choices": [choice]})

    def change(self, status: int, words: str) -> None:
        """The answer to a change of adapters: plain words, or an error."""
        if status == 200:
            return self.send(200, words.encode(), "text/plain")
        kinds = {400: "InvalidUserInput", 404: "NotFoundError", 500: "InternalServerError"}
        return self.answer(status, {"error": {"message": words, "type": kinds[status], "param": None, "code": status}})

    def write_words(self, body: dict[str, Any]) -> None:
        """A reply of as many words as were asked for, whole or as a stream."""
        limit, prompt = self.models.limit, words(body)
        asked = next((body[name] for name in LIMITS if body.get(name)), None)
        refusal = too_long(prompt, asked or 1, limit)
        if refusal:
            return self.answer(400, {"error": {"message": refusal, "type": "BadRequestError", "code": 400}})
        if knob("DEAD_CORE"):
            message = "EngineCore encountered an issue. See stack trace (above) for the root cause."
            return self.answer(500, {"error": {"message": message, "type": "InternalServerError", "code": 500}})
        time.sleep(float(knob("SILENT_S", "0")))
        most = min(asked or 8, limit - prompt)
        usage = {"prompt_tokens": prompt, "completion_tokens": most, "total_tokens": prompt + most}
        if body.get("stream"):
            return self.stream(body, most, usage)
        time.sleep(float(knob("TOKEN_S", "0")) * most)
        reply = {"role": "assistant", "content": "word " * most}
        choice = {"index": 0, "message": reply, "text": reply["content"], "finish_reason": "length"}
        document = {"id": "x", "object": "chat.completion", "created": 0, "model": body["model"], "choices": [choice]}
        return self.answer(200, document | {"usage": usage})

    def stream(self, body: dict[str, Any], most: int, usage: dict[str, int]) -> None:
        """A stream of chunks, with the usage at its end where that was asked for."""
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream; charset=utf-8")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        head = {"id": "x", "object": "chat.completion.chunk", "created": 0, "model": body["model"]}
        self.seen.running += 1
        try:
            for index in range(most):
                if knob("DIE_AT") == str(index):
                    os._exit(9)
                time.sleep(600 if knob("HANG_AT") == str(index) else float(knob("TOKEN_S", "0")))
                choice = {
                    "index": 0,
                    "delta": {"content": f"word{index} ".ljust(int(knob("WORD_BYTES", "0")))},
                    "finish_reason": None,
                }
                self.chunk(json.dumps(head | {"choices": [choice]}))
            if (body.get("stream_options") or {}).get("include_usage"):
                self.chunk(json.dumps(head | {"choices": [], "usage": usage}))
            self.chunk("[DONE]")
            self.wfile.write(b"0\r\n\r\n")
        except OSError:
            self.seen.cut += 1
            self.close_connection = True
        finally:
            self.seen.running -= 1

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: the access log is off."""


class Server(ThreadingHTTPServer):
    """On a port, with room for hundreds of clients at the same moment."""

    request_queue_size = 1024
    daemon_threads = True


class SocketServer(Server):
    """On a Unix socket."""

    address_family = socket.AF_UNIX

    def server_bind(self) -> None:
        """Bind; there is no host name to look up."""
        self.socket.bind(self.server_address)
        self.server_name, self.server_port = "engine", 0

    def get_request(self) -> tuple[socket.socket, Any]:
        """A connection; its clients have no address."""
        connection, _ = self.socket.accept()
        return connection, ("engine", 0)


class SocketHandler(Handler):
    """The same on a Unix socket, which has no Nagle's algorithm to switch off."""

    disable_nagle_algorithm = False


def make_server(options: argparse.Namespace) -> Server:
    """A server on the Unix socket where one is given, else on the port."""
    return SocketServer(options.uds, SocketHandler) if options.uds else Server((options.host, options.port), Handler)


def main() -> None:
    """Start like vLLM, then serve until SIGTERM."""
    options = parse(sys.argv[1:])
    if knob("IGNORE_SIGTERM"):
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    else:
        signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    if knob("GRANDCHILD"):
        sleeper = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"
        subprocess.Popen([sys.executable, "-c", sleeper])
    if not (options.uds or "").endswith(knob("CRASHING")):
        os.environ.pop("FAKE_CRASH", None)
    if knob("TOO_LONG") and options.max_model_len > int(knob("TOO_LONG")):
        os.environ["FAKE_CRASH"] = "KV cache"
    if knob("TARGETS_FAIL") and options.lora_target_modules:
        os.environ["FAKE_CRASH"] = "weights"
    run_phases()
    Handler.models = Models(options)
    make_server(options).serve_forever()


if __name__ == "__main__":
    main()
