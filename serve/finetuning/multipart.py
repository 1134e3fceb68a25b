"""A form with a file, read as a stream: the file goes to disk piece by piece, the other fields are short texts.

A refusal is told when the client has sent what it had to send, within bounds: many clients do not read before.

    >>> form = await receive_form(request, "file", arriving, service)
    >>> form.fields["purpose"], form.filename
    ('fine-tune', 'rows.jsonl')
"""

import asyncio
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.requests import Request

from loraport.serve.finetuning.disk import Arriving, too_large
from loraport.serve.finetuning.service import Service
from loraport.serve.gateway.forward import CLOSE
from loraport.serve.gateway.refusals import Refusal, bad_request

logging.getLogger("python_multipart").addHandler(logging.NullHandler())  # else it warns on standard error
PIECE = 1 << 20  # that are parsed, checked and written at once, in a thread
FIELD_BYTES, FIELDS = 16 << 10, 16
OVERHEAD = 2 << 20  # of a form, beside its file
DRAIN_S, DRAIN_BYTES = 10.0, 1 << 30
GRACE_S, LEAST_RATE = 60.0, 16 << 10  # a body may take so long, and a second more for so many bytes of it


@dataclass
class Form:
    """The fields of a form, and what its file was called; None where none came."""

    fields: dict[str, str] = field(default_factory=dict)
    filename: str | None = None


class Reader:
    """Callbacks of the parser: fields into the form, the file into `arriving`."""

    def __init__(self, boundary: bytes, file_field: str, arriving: Arriving) -> None:
        self.form, self.file_field, self.arriving = Form(), file_field, arriving
        self.headers: dict[bytes, bytes] = {}
        self.name, self.value, self.text = b"", b"", bytearray()
        self.field = ""
        self.is_file = self.is_over = False
        self.parser = MultipartParser(
            boundary,
            {
                "on_part_begin": self.begin,
                "on_header_field": self.header_field,
                "on_header_value": self.header_value,
                "on_header_end": self.header_end,
                "on_headers_finished": self.headers_finished,
                "on_part_data": self.data,
                "on_part_end": self.end,
                "on_end": self.over,
            },
        )

    def begin(self) -> None:
        """A part begins."""
        self.headers, self.text = {}, bytearray()

    def header_field(self, data: bytes, start: int, end: int) -> None:
        """Some of a header's name."""
        self.name += data[start:end]

    def header_value(self, data: bytes, start: int, end: int) -> None:
        """Some of its value."""
        self.value += data[start:end]

    def header_end(self) -> None:
        """A header is complete."""
        self.headers[self.name.lower()] = self.value
        self.name, self.value = b"", b""

    def headers_finished(self) -> None:
        """Now it is known what the part is."""
        kind, options = parse_options_header(self.headers.get(b"content-disposition"))
        if kind != b"form-data" or b"name" not in options:
            raise bad_form("a part has no name")
        self.field = text_of(options[b"name"])
        self.is_file = self.field == self.file_field
        if self.is_file and self.form.filename is not None:
            raise bad_request("invalid_form", f"There is more than one '{self.field}'.", self.file_field)
        if self.is_file:
            self.form.filename = text_of(options.get(b"filename", b"")) or self.file_field
        elif self.field in self.form.fields or len(self.form.fields) >= FIELDS:
            raise bad_form("a field comes twice, or there are too many")

    def data(self, data: bytes, start: int, end: int) -> None:
        """Some of a part."""
        if self.is_file:
            self.arriving.write(data[start:end])
            return
        self.text += data[start:end]
        if len(self.text) > FIELD_BYTES:
            raise bad_form("a field is too long")

    def end(self) -> None:
        """A part is complete."""
        if not self.is_file:
            self.form.fields[self.field] = text_of(bytes(self.text))

    def over(self) -> None:
        """The form is complete."""
        self.is_over = True

    def feed(self, data: bytes) -> None:
        """Parse some of the body."""
        try:
            self.parser.write(data)
        except FormParserError:
            raise bad_form("its parts cannot be told apart") from None


def text_of(raw: bytes) -> str:
    """A name or value as text that both databases hold."""
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError:
        raise bad_form("a name or value is not UTF-8") from None
    if "\x00" in text:
        raise bad_form("a name or value is not text")
    return text


def bad_form(problem: str) -> Refusal:
    """400 for a form that cannot be read."""
    return bad_request("invalid_form", f"The body is not a form (multipart/form-data): {problem}.")


async def receive_form(request: Request, file_field: str, arriving: Arriving, service: Service) -> Form:
    """Read a form to its end; Refusal where it is none, too large, too slow or cut off."""
    kind, options = parse_options_header(request.headers.get("content-type"))
    boundary = options.get(b"boundary", b"")
    pieces = Pieces(request, request.app.state.gateway.settings.body_s)
    try:
        if kind != b"multipart/form-data" or not 0 < len(boundary) <= 200:
            raise Refusal(415, "unsupported_media_type", "Send a form: `Content-Type: multipart/form-data`.")
        declared = request.headers.get("content-length", "")
        if declared.isdigit() and int(declared) > arriving.most + OVERHEAD:
            raise too_large(arriving.most)
        reader = Reader(boundary, file_field, arriving)
        while data := await pieces.next():
            await service.aside(reader.feed, data)
            if pieces.count > arriving.bytes + OVERHEAD:
                raise bad_form("there is much in it beside its file")
        if not reader.is_over:
            raise bad_form("it has no end")
        if reader.form.filename is None:
            message = f"Missing required parameter: '{file_field}'."
            raise bad_request("missing_required_parameter", message, file_field)
    except Refusal as refusal:
        if not await pieces.drain():
            refusal.headers |= CLOSE
        raise
    return reader.form


class Pieces:
    """The body of a request, in pieces of about PIECE bytes. `body_s`: that may pass between two messages of it.

    `waited_s`: for the client alone; what this machine takes to write is not counted.
    """

    def __init__(self, request: Request, body_s: float) -> None:
        self.request, self.body_s = request, body_s
        self.count, self.waited_s, self.is_over, self.is_begun = 0, 0.0, False, False

    async def next(self) -> bytes:
        """The next one; empty at the end. Refusal where nothing comes, or the client is gone."""
        found = bytearray()
        while len(found) < PIECE and not self.is_over:
            self.is_begun = True
            left_s = GRACE_S + (self.count + len(found)) / LEAST_RATE - self.waited_s
            began = time.monotonic()
            try:
                message = await asyncio.wait_for(self.request.receive(), min(self.body_s, left_s))
            except TimeoutError:
                self.is_over = True
                raise Refusal(408, "body_timeout", "The request's body did not arrive.", headers=dict(CLOSE)) from None
            self.waited_s += time.monotonic() - began
            if message["type"] == "http.disconnect":
                self.is_over = True
                raise bad_request("body_cut_off", "The request's body was cut off.")
            found += message.get("body", b"")
            self.is_over = not message.get("more_body")
        self.count += len(found)
        return bytes(found)

    async def drain(self) -> bool:
        """Read on without a use, for a while; whether the end was reached."""
        if not self.is_begun and "expect" in self.request.headers:
            return False  # the client waits for a word before it sends
        try:
            async with asyncio.timeout(DRAIN_S):
                while not self.is_over and self.count < DRAIN_BYTES:
                    await self.next()
        except (Refusal, TimeoutError):
            return False
        return self.is_over


def form_schema(required: Sequence[str], properties: Mapping[str, Any]) -> dict[str, Any]:
    """What the OpenAPI description says of a route that takes a form."""
    schema = {"type": "object", "required": list(required), "properties": dict(properties)}
    return {"requestBody": {"required": True, "content": {"multipart/form-data": {"schema": schema}}}}
