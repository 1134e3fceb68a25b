"""`loraport keys create|list|revoke`: the keys of the gateways of this home.

A key is printed once, alone on standard output, and kept only as a hash; all else goes to standard error. A running
gateway sees each change at its next request.

    $ export LORAPORT_API_KEY=$(loraport keys create laptop --models demo --rate 60)
"""

import re
import time
from contextlib import closing
from typing import Annotated, Any

import typer

from loraport.clients.errors import UsageError
from loraport.clients.home import Home
from loraport.clients.terminal import console, print_json, say
from loraport.serve.gateway import keys
from loraport.serve.gateway.keys import Key
from loraport.serve.gateway.usage import Used, read_folder

SECONDS = {"m": 60, "h": 3600, "d": 86400}
Json = Annotated[bool, typer.Option("--json", help="One JSON document on standard output.")]
Name = Annotated[str, typer.Argument(help="The key's name: letters, digits, dots, dashes and _.")]


def keys_create(
    name: Name,
    models: Annotated[
        list[str] | None,
        typer.Option("--models", "--adapters", help="What it may use: NAME,NAME; `base` too. [default: everything]"),
    ] = None,
    rate: Annotated[int | None, typer.Option(help="Most requests a minute. [default: no limit]")] = None,
    concurrency: Annotated[int | None, typer.Option(help="Most requests at once. [default: no limit]")] = None,
    expires_in: Annotated[
        str | None, typer.Option(metavar="TIME", help="90m, 12h or 30d. [default: lasts until it is revoked]")
    ] = None,
    admin: Annotated[bool, typer.Option("--admin", help="May load, unload and watch, too.")] = False,
    json: Json = False,
) -> None:
    """Make an API key and print it, this once."""
    home = Home.default()
    path = home.keys
    allowed = words(models)
    lifetime_s = seconds(expires_in) if expires_in is not None else None
    is_first = not keys.read(path)
    text, key = keys.create(
        path,
        name,
        adapters=allowed,
        requests_per_minute=rate,
        concurrency=concurrency,
        is_admin=admin,
        lifetime_s=lifetime_s,
    )
    if json:
        print_json({"key": text, **document(key, Used())})
    else:
        typer.echo(text)
    warn_of_unknown(home, allowed or [])
    warn_of_inherited(home, name)
    if is_first:
        say("this is the first key: from now on every request needs one, on this machine too", "yellow")
    say(f"{name} {rights(key)}; it is shown only now. Clients take it from LORAPORT_API_KEY or OPENAI_API_KEY.", "dim")


def keys_list(
    revoked: Annotated[bool, typer.Option("--all", help="Also those that were revoked.")] = False, json: Json = False
) -> None:
    """List the API keys, what they may do and what they have used."""
    home = Home.default()
    used = read_folder(home.root / "usage")
    found = keys.read(home.keys)
    shown = [key for key in found if revoked or key.revoked is None]
    if json:
        print_json([document(key, used_by(key, used)) for key in shown])
    elif shown:
        print_table(shown, used)
    elif found:
        say("every key was revoked, so nobody can ask (--all shows them)", "yellow")
    else:
        say("there are no keys: on this machine everybody may ask; `loraport keys create NAME` makes one")


def keys_revoke(name: Name, json: Json = False) -> None:
    """Revoke an API key: the next request with it is refused."""
    path = Home.default().keys
    key = keys.revoke(path, name)
    if json:
        print_json(document(key, Used()))
    say(f"{name} is revoked; a running gateway refuses it from the next request on")
    if not any(other.is_living() for other in keys.read(path)):
        say("no key is left, so nobody can ask; make one.", "yellow")
        say("To ask without on this machine: delete keys.json, and start `loraport serve` again.", "yellow")


def words(given: list[str] | None) -> list[str] | None:
    """Names given as `a,b` or one by one; None for everything. UsageError for an empty list."""
    if given is None:
        return None
    names = list(dict.fromkeys(name.strip() for text in given for name in text.split(",") if name.strip()))
    if not names:
        raise UsageError("--models names nothing.", "give names, or leave it out: then the key may use everything")
    return names


def seconds(text: str) -> float:
    """A time as 90m, 12h or 30d, in seconds."""
    found = re.fullmatch(r"([1-9]\d{0,4})([mhd])", text.strip())
    if not found:
        raise UsageError(f"--expires-in {text} is not a time.", "give minutes, hours or days: 90m, 12h, 30d")
    return float(found[1]) * SECONDS[found[2]]


def warn_of_unknown(home: Home, names: list[str]) -> None:
    """Say which of the names are no adapter here: mistyped, or not trained yet."""
    from loraport.serve.gateway.models import VERSION
    from loraport.train.adapters import adapter_names

    known = {*adapter_names(home), "base"}
    unknown = [name for name in names if name not in known and VERSION.sub("", name) not in known]
    if unknown:
        verb = "is no adapter" if len(unknown) == 1 else "are no adapters"
        say(f"note: {', '.join(unknown)} {verb} on this machine; the key works for a model that is served so", "yellow")


def warn_of_inherited(home: Home, name: str) -> None:
    """Say that files and jobs of an earlier key of that name are this one's; as far as the home's own database knows.

    Asked without SQLAlchemy (serve/store), which takes longer to import than the rest of the command.
    """
    import sqlite3

    path = home.root / "jobs.sqlite"
    try:
        with closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)) as database:
            asked = "SELECT (SELECT count(*) FROM files WHERE tenant = ? AND status != 'deleted'), "
            asked += "(SELECT count(*) FROM jobs WHERE tenant = ?)"
            files, jobs = database.execute(asked, (name, name)).fetchone()
    except sqlite3.Error:  # there is none, or one of another version
        return
    if files or jobs:
        words = f"{files:,} {'file' if files == 1 else 'files'} and {jobs:,} {'job' if jobs == 1 else 'jobs'}"
        say(f"warning: {words} of an earlier key named {name}, and its models, are this key's now", "yellow")


def rights(key: Key) -> str:
    """What a key may do, in words."""
    return ", ".join([f"may use {', '.join(key.adapters) if key.adapters else 'everything'}", *limits(key)])


def limits(key: Key) -> list[str]:
    """What bounds a key, or sets it above others."""
    found = ["admin"] if key.is_admin else []
    found += [f"{key.requests_per_minute} a minute"] if key.requests_per_minute else []
    found += [f"{key.concurrency} at once"] if key.concurrency else []
    return found + ([f"until {day(key.expires)}"] if key.expires else [])


def used_by(key: Key, used: dict[str, Used]) -> Used:
    """What a key has used. Usage goes by name: a revoked key whose name was given anew has none of its own."""
    return used.get(key.name, Used()) if key.revoked is None else Used()


def state(key: Key) -> str:
    """`valid`, `revoked` or `expired`."""
    return "revoked" if key.revoked is not None else "valid" if key.is_living() else "expired"


def document(key: Key, used: Used) -> dict[str, Any]:
    """A key as JSON types, without its hash; times are seconds since the epoch."""
    return {
        "name": key.name,
        "state": state(key),
        "models": None if key.adapters is None else list(key.adapters),
        "requests_per_minute": key.requests_per_minute,
        "concurrency": key.concurrency,
        "is_admin": key.is_admin,
        "created": key.created,
        "expires": key.expires,
        "revoked": key.revoked,
        "usage": {
            "requests": used.requests,
            "refused": used.refused,
            "prompt_tokens": used.prompt_tokens,
            "completion_tokens": used.completion_tokens,
            "uncounted": used.uncounted,
            "last": used.last or None,
        },
    }


def day(moment: float | None) -> str:
    """A moment as date and time of this machine."""
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(moment)) if moment else "-"


def print_table(shown: list[Key], used: dict[str, Used]) -> None:
    """Keys for people."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for heading in ("key", "state", "models", "limits"):
        table.add_column(heading)
    for heading in ("requests", "tokens in", "out"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("last used", no_wrap=True)
    for key in shown:
        sums = used_by(key, used)
        counts = (sums.requests, sums.prompt_tokens, sums.completion_tokens)
        cells = (state(key), ", ".join(key.adapters or ("all",)), ", ".join(limits(key)) or "-")
        table.add_row(key.name, *cells, *(f"{count:,}" for count in counts), day(sums.last))
    console.print(table)
