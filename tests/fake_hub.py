"""A model hub on loopback: a server that speaks as much of the Hugging Face hub's protocol as a download uses.

Model info, file tree, and `resolve` with ETag, X-Repo-Commit, redirects to a CDN path for large files, and ranges.
Anonymous requests for unknown repositories get 401, as the real one answers; gated ones show their card and refuse
their files.

    with FakeHub() as hub:
        hub.add("org/tiny", {"config.json": b"{}", "model.safetensors": bytes(1000)})
        subprocess.run([...], env={"HF_ENDPOINT": hub.url, "HF_HOME": ...})
        assert hub.count("GET", "/cdn/") == 1
"""

import hashlib
import json
import re
from dataclasses import dataclass, field
from functools import lru_cache
from http.server import BaseHTTPRequestHandler
from typing import Any
from urllib.parse import unquote, urlsplit

from tests.loopback import Loopback

LARGE = 100_000  # bytes; larger files are "LFS": elsewhere, by redirect


@lru_cache
def digest(kind: str, content: bytes) -> str:
    """Hash in hexadecimal, computed once."""
    return hashlib.new(kind, content).hexdigest()


@dataclass
class Repository:
    """A model's files under one commit. `cuts`: the coming transfers break after so many bytes."""

    files: dict[str, bytes]
    gated: bool = False
    cuts: list[int] = field(default_factory=list)

    @property
    def commit(self) -> str:
        """A commit hash that changes with the files."""
        return digest("sha1", "".join(name + digest("sha1", self.files[name]) for name in self.files).encode())

    def entry(self, name: str) -> dict[str, Any]:
        """A file as the hub's API describes it."""
        content = self.files[name]
        oid, size = digest("sha1", content), len(content)
        sha256 = digest("sha256", content)  # "oid" in the tree, "sha256" in the model info
        large = {"oid": sha256, "sha256": sha256, "size": size, "pointerSize": 130}
        return {"type": "file", "path": name, "oid": oid, "size": size} | ({"lfs": large} if size > LARGE else {})


class FakeHub(Loopback):
    """The server; `url` is what HF_ENDPOINT shall be. Use it as a context manager."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.requests: list[tuple[str, str, str]] = []  # method, path, range
        super().__init__(Handler)
        self.url = self.origin

    def add(self, name: str, files: dict[str, bytes], **knobs: Any) -> Repository:
        """Publish a model, or a data set under the name datasets/org/name."""
        self.repositories[name] = Repository(files, **knobs)
        return self.repositories[name]

    def count(self, method: str, start: str) -> int:
        """Requests so far by `method` whose path begins with `start`."""
        return sum(1 for m, path, _ in self.requests if m == method and path.startswith(start))


class Handler(BaseHTTPRequestHandler):
    """One request. Routes are those of the real hub; /cdn/ stands for its file servers."""

    owner: FakeHub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing: the tests ask `hub.requests`."""

    def do_HEAD(self) -> None:
        """Metadata of a file."""
        self.route()

    def do_GET(self) -> None:
        """Model info, tree or content."""
        self.route()

    def route(self) -> None:
        """Find the repository and revision that the path names, and answer."""
        path = unquote(urlsplit(self.path).path)
        self.owner.requests.append((self.command, path, self.headers.get("Range", "")))
        for pattern, answer in (
            (r"/api/models/([^/]+/[^/]+|[^/]+)(?:/revision/(?P<revision>.+))?", self.send_info),
            (r"/api/(datasets/[^/]+/[^/]+)(?:/revision/(?P<revision>.+))?", self.send_info),
            (r"/api/models/([^/]+/[^/]+|[^/]+)/tree/(?P<revision>[^/]+)", self.send_tree),
            (r"/api/(datasets/[^/]+/[^/]+)/tree/(?P<revision>[^/]+)", self.send_tree),
            (r"/((?:datasets/)?[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<file>.+)", self.resolve),
            (r"/cdn/((?:datasets/[^/]+/)?[^/]+/[^/]+)/(?P<file>.+)", self.send_file),
        ):
            if found := re.fullmatch(pattern, path):
                self.answer(answer, found)
                return
        self.refuse(404, "", "no such page")

    def answer(self, answer: Any, found: re.Match[str]) -> None:
        """Answer for a repository, or refuse as the hub does where it or its revision is unknown."""
        repository, named = self.owner.repositories.get(found[1]), found.groupdict()
        if repository is None:
            known = self.headers.get("Authorization")
            self.refuse(*(404, "RepoNotFound", "Repository not found") if known else (401, "", "Invalid username."))
        elif named.get("revision") not in (None, "main", repository.commit):
            self.refuse(404, "RevisionNotFound", f"Invalid rev id: {named['revision']}")
        elif "file" in named and repository.gated:
            self.refuse(403 if self.headers.get("Authorization") else 401, "GatedRepo", "Access is restricted")
        elif "file" in named and named["file"] not in repository.files:
            self.refuse(404, "EntryNotFound", "Entry not found")
        else:
            answer(found[1], repository, named.get("file"))

    def send_info(self, name: str, repository: Repository, _: str | None) -> None:
        """GET /api/models/…: the model's card, with sizes."""
        siblings = [
            {"rfilename": file, "size": entry["size"], "blobId": entry["oid"], "lfs": entry.get("lfs")}
            for file in repository.files
            for entry in [repository.entry(file)]
        ]
        card = {
            "id": name.removeprefix("datasets/"),
            "modelId": name,
            "sha": repository.commit,
            "private": False,
            "siblings": siblings,
        }
        self.send_json({**card, "gated": "manual" if repository.gated else False, "tags": [], "downloads": 0})

    def send_tree(self, name: str, repository: Repository, _: str | None) -> None:
        """GET /api/models/…/tree/…: the files."""
        self.send_json([repository.entry(file) for file in repository.files])

    def resolve(self, name: str, repository: Repository, file: str) -> None:
        """A file by its name: small ones at once, large ones by redirect."""
        entry = repository.entry(file)
        if "lfs" not in entry:
            self.send_file(name, repository, file)
            return
        self.send_response(302)
        self.send_header("Location", f"{self.owner.url}/cdn/{name}/{file}")
        self.send_header("X-Linked-Size", str(entry["size"]))
        self.send_header("X-Linked-Etag", f'"{entry["lfs"]["oid"]}"')
        self.send_header("X-Repo-Commit", repository.commit)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def send_file(self, name: str, repository: Repository, file: str) -> None:
        """A file's bytes from the start of the range asked for; broken off where the repository says so."""
        content, asked = repository.files[file], re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        first = int(asked[1]) if asked else 0
        self.send_response(206 if asked else 200)
        if asked:
            self.send_header("Content-Range", f"bytes {first}-{len(content) - 1}/{len(content)}")
        self.send_header("ETag", f'"{repository.entry(file)["oid"]}"')
        self.send_header("X-Repo-Commit", repository.commit)
        self.send_header("Content-Length", str(len(content) - first))
        self.end_headers()
        if self.command == "HEAD":
            return
        if repository.cuts and len(content) > LARGE:
            self.wfile.write(content[first : first + repository.cuts.pop(0)])
            self.close_connection = True
            return
        self.wfile.write(content[first:])

    def send_json(self, document: Any) -> None:
        """A JSON answer."""
        body = json.dumps(document).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def refuse(self, status: int, code: str, message: str) -> None:
        """An error with the hub's headers."""
        self.send_response(status)
        if code:
            self.send_header("X-Error-Code", code)
        self.send_header("X-Error-Message", message)
        self.send_header("Content-Length", "0")
        self.end_headers()
