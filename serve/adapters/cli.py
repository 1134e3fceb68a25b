"""`loraport adapters`: the adapters on this machine, and those of the endpoint that serves here.

`list`, `show` and `remove` work on the home; `load`, `unload`, `rollback` and `verify` ask a running endpoint, which
opens its admin routes to LORAPORT_ADMIN_KEY, or to the key that it leaves in the home for its owner.

    $ loraport adapters load support@v4 && loraport adapters rollback support
"""

from typing import Annotated, Any

import typer

from loraport.clients.errors import AdapterError
from loraport.clients.home import Home
from loraport.clients.terminal import console, print_json, program, say
from loraport.serve.adapters import remote
from loraport.serve.adapters.catalog import Catalog, locate
from loraport.serve.adapters.remove import remove_all, remove_version
from loraport.train.adapters import adapter_names, check_whole, versions
from loraport.train.manifest import Manifest

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]
BaseUrl = Annotated[str | None, typer.Option(help="The endpoint. Default: the one that serves here.")]
Served = Annotated[str, typer.Argument(help="NAME of an adapter that is served.")]

adapters = typer.Typer(no_args_is_help=True, rich_markup_mode=None)


@adapters.command("list")
def list_adapters(json: Json = False) -> None:
    """List the adapters on this machine, and which are served."""
    home = Home.default()
    rows = list_home(home)
    serving = {(entry["name"], entry["version"]): entry for entry in remote.listings(home)}
    for row in rows:
        row |= {"serving": serving.pop((row["name"], row["version"]), None)}
    others = [{**entry, "aliases": ["latest"], "serving": entry} for entry in serving.values()]  # not in the home
    if json:
        print_json([*rows, *others])
    elif rows or others:
        print_table([*rows, *others])
    else:
        say(f"no adapters in {home.adapters}; train one: {program()} train --name NAME --data rows.jsonl --model MODEL")


def list_home(home: Home) -> list[dict[str, Any]]:
    """The manifests in the home, each with its folder and its aliases."""
    rows = []
    for name in adapter_names(home):
        known = Catalog(home).aliases(name)
        for path in versions(home, name):
            try:
                manifest = Manifest.read(path)
            except AdapterError as error:  # one damaged folder must not hide the others
                say(f"warning: {error.message}", "yellow")
                continue
            pointing = [alias for alias, entry in known.by_name.items() if entry and entry.folder == str(path)]
            fields = manifest.model_dump(mode="json", exclude={"golden", "run"})
            rows.append(fields | {"folder": str(path), "aliases": pointing})
    return rows


def print_table(rows: list[dict[str, Any]]) -> None:
    """A line for each version."""
    from rich.table import Column, Table

    whole = [Column(name, no_wrap=True) for name in ("adapter", "version", "alias", "serving")]
    table = Table(
        *whole, "base", "rank", "rows", "eval loss", Column("created", no_wrap=True), box=None, padding=(0, 1, 0, 0)
    )
    for row in rows:
        base = row["base"]["model"] if isinstance(row["base"], dict) else row["base"]
        loss = (row.get("metrics") or {}).get("eval_loss")
        table.add_row(
            row["name"],
            row["version"],
            ", ".join(row["aliases"]),
            row["serving"]["state"] if row["serving"] else "",
            base.rstrip("/").rsplit("/", 1)[-1],
            str(row["rank"]),
            str(row["data"]["rows"]) if row.get("data") else "",
            f"{loss:.3f}" if loss is not None else "",
            str(row.get("created", ""))[:16].replace("T", " "),
        )
    console.print(table)
    for row in rows:
        if row["serving"] and row["serving"].get("reason"):
            say(f"{row['name']} is not served: {row['serving']['reason']}", "yellow")


@adapters.command("show")
def show_adapter(
    reference: Annotated[str, typer.Argument(help="NAME, NAME@VERSION, NAME:prev, or a folder.")], json: Json = False
) -> None:
    """Print the manifest of an adapter as JSON."""
    home = Home.default()
    folder, _ = locate(home, reference)
    manifest = Manifest.read(folder)
    check_whole(folder, manifest)
    print_json({"folder": str(folder)} | manifest.model_dump(mode="json"))


@adapters.command("load")
def load_adapter(
    reference: Annotated[str, typer.Argument(help="NAME, NAME@VERSION, or a folder (NAME=FOLDER).")],
    name: Annotated[str | None, typer.Option(help="Serve it under this name. Default: its own.")] = None,
    base_url: BaseUrl = None,
    json: Json = False,
) -> None:
    """Serve an adapter, or another version of it, from now on."""
    home = Home.default()
    if "/" in reference or "=" in reference:
        folder, given = locate(home, reference)  # relative to here, not to where the endpoint was started
        reference, name = str(folder), name or given
    with console.status("loading and verifying"):
        entry = remote.ask(home, base_url, "POST", "/admin/adapters", {"reference": reference, "name": name})
    tell(entry, json, "serves now")


@adapters.command("unload")
def unload_adapter(name: Served, base_url: BaseUrl = None, json: Json = False) -> None:
    """Serve an adapter no longer; requests that run are answered."""
    document = remote.ask(Home.default(), base_url, "DELETE", f"/admin/adapters/{name}")
    if json:
        print_json(document)
    else:
        say(f"{name} is served no longer.")


@adapters.command("rollback")
def roll_back(name: Served, base_url: BaseUrl = None, json: Json = False) -> None:
    """Serve the version that was served before; again goes back."""
    with console.status("verifying"):
        entry = remote.ask(Home.default(), base_url, "POST", f"/admin/adapters/{name}/rollback", {})
    tell(entry, json, "serves again")


@adapters.command("verify")
def verify_adapter(name: Served, base_url: BaseUrl = None, json: Json = False) -> None:
    """Replay the recorded replies of an adapter that is served."""
    with console.status("replaying recorded replies"):
        entry = remote.ask(Home.default(), base_url, "POST", f"/admin/adapters/{name}/verify", {})
    tell(entry, json, "serves")


@adapters.command("remove")
def remove_adapter(
    reference: Annotated[str, typer.Argument(help="NAME@VERSION, or NAME with --all.")],
    every: Annotated[bool, typer.Option("--all", help="All versions of it.")] = False,
    json: Json = False,
) -> None:
    """Delete a version of an adapter from this machine."""
    home = Home.default()
    removed = remove_all(home, reference) if every else [remove_version(home, reference)]
    if json:
        print_json({"removed": [str(folder) for folder in removed]})
    for folder in removed:
        say(f"removed {folder}")


def tell(entry: dict[str, Any], json: bool, does: str) -> None:
    """What became of an adapter."""
    if json:
        print_json(entry)
        return
    proof = (
        "its replies cannot be compared, but it is applied" if entry["is_foreign"] else "no reply tells it from base"
    )
    if entry["state"] == "verified":
        proof = (
            f"{entry['prompts']} replies as in training, {entry['telling']} unlike the base's, "
            f"within {entry['difference']:.3f} nats"
        )
    say(f"{entry['name']} {does} {entry['version']}, {entry['state']}: {proof}", "bold")
    for warning in entry.get("warnings") or ():
        say(warning, "yellow")
    if entry.get("prev"):
        say(f"  before: {entry['prev']}; back to it: {program()} adapters rollback {entry['name']}")
