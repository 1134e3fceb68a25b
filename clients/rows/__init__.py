"""Rows of any format, one at a time: what training learns from, and what `loraport eval` asks again.

`iter_rows` streams a file, a folder or a hub data set and converts what it finds to chat rows; a row that cannot be
used comes as a BadRow, so that a checker can list all of them. `read_rows` is for small files: it raises at the first.
Everything here is about one row by itself; what a chat template or a context length makes of it is for `train/`.

    >>> read_rows(Path("examples/demo/heldout.jsonl"))[0].reference
    'Answer: ...'
"""

from loraport.clients.rows.chat import as_request, check_message, check_messages
from loraport.clients.rows.formats import FORMATS, convert, detect, parse_row
from loraport.clients.rows.read import iter_rows, read_rows
from loraport.clients.rows.row import EXAMPLE, ROLES, BadRow, Message, Row, place
from loraport.clients.rows.source import Source, find_source, hash_source, looks_like_hub_id, unit_of

__all__ = [
    "EXAMPLE",
    "FORMATS",
    "ROLES",
    "BadRow",
    "Message",
    "Row",
    "Source",
    "as_request",
    "check_message",
    "check_messages",
    "convert",
    "detect",
    "find_source",
    "hash_source",
    "iter_rows",
    "looks_like_hub_id",
    "parse_row",
    "place",
    "read_rows",
    "unit_of",
]
