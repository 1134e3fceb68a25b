"""`loraport bench report`: documents of benches as one page, one JSON document and one CSV.

The page is one file without scripts and without anything from the network; everything in it is in the JSON too.

    >>> write_report(Path("report.html"), read_parts([Path("throughput.json"), Path("startup.json")]))
"""

import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from loraport.bench.serving.comparable import to_csv
from loraport.bench.serving.documents import REPORT, Part
from loraport.bench.serving.section import Section
from loraport.bench.serving.sections import section_of
from loraport.bench.tables import NOTHING
from loraport.clients.errors import os_errors
from loraport.clients.home import write_json
from loraport.clients.page import render_page

TEMPLATE = Path(__file__).with_name("report.html.jinja")
GIB = 1 << 30
MOST_MODELS = 12  # named in a row


def write_report(page: Path, parts: Sequence[Part], keep: Sequence[Path] = (), **more: Any) -> list[Path]:
    """Write the page, and JSON and CSV beside it, except over those of `keep`; the paths. `more`: for the JSON."""
    document = {"bench": REPORT, **more, "parts": [part.to_json() for part in parts]}
    json, csv = page.with_suffix(".json"), page.with_suffix(".csv")
    kept = {path.resolve() for path in keep}
    written = [path for path in (page, json, csv) if path.resolve() not in kept]
    for path in written:
        if path == json:
            write_json(path, document)
        else:
            with os_errors("writing", path):
                path.write_text(render(parts) if path == page else to_csv(parts), encoding="utf-8")
    return written


def render(parts: Sequence[Part]) -> str:
    """The page."""
    documents = [part.document for part in parts if part.document]
    sections = [section_of(part) for part in parts]
    models = list(dict.fromkeys(name for document in documents for name in models_of(document)))
    return render_page(
        TEMPLATE,
        {},
        title=subject(models),
        at=min(
            (document["environment"]["at"] for document in documents if "at" in document.get("environment", {})),
            default="",
        ),
        facts=[*machine_facts(documents), *section_facts(sections)],
        verdicts=[verdict for section in sections for verdict in verdicts_of(section)],
        sections=sections,
        grounds=list(grounds(parts)),
        definitions=list(definitions_of(documents)),
    )


def models_of(document: dict[str, Any]) -> list[str]:
    """Models that its servers name, the base first."""
    return [name for server in document.get("servers", {}).values() for name in server["models"]]


def subject(models: Sequence[str]) -> str:
    """What the page is about."""
    if not models:
        return "Bench report"
    more = f" and {len(models) - 3} more" if len(models) > 3 else ""
    return f"Bench of {', '.join(models[:3])}{more}"


def machine_facts(documents: Sequence[dict[str, Any]]) -> list[tuple[str, str]]:
    """GPUs and versions, each once."""
    found: list[tuple[str, str]] = []
    for document in documents:
        if "environment" in document:
            found.append(("machine", machine_words(document["environment"])))
        found += [("vLLM", each["version"]) for each in document.get("servers", {}).values() if each["version"]]
    return list(dict.fromkeys(found))


def section_facts(sections: Sequence[Section]) -> Iterator[tuple[str, str]]:
    """Those of all sections; where two have one of the same name, with the name of the section."""
    names = [name for section in sections for name, _ in section.facts]
    for section in sections:
        for name, words in section.facts:
            yield (name if names.count(name) == 1 else f"{name}, {section.title}"), words


def gpu_words(gpus: Sequence[dict[str, Any]] | None) -> str:
    """`2 × NVIDIA H200`."""
    names = [each["name"] for each in gpus or ()]
    return ", ".join(
        f"{names.count(name)} × {name}" if names.count(name) > 1 else name for name in dict.fromkeys(names)
    )


def verdicts_of(section: Section) -> Iterator[tuple[str, str, str]]:
    """(level, title, words) for the top of the page: what is believed, withheld, missing."""
    if section.believed:
        good, total, _ = section.believed
        yield ("good" if good == total > 0 else "warning"), section.title, believed_words(*section.believed)
    for reason in section.reasons:
        yield "warning", section.title, f"withheld: {reason}"
    for remark in section.remarks:
        if remark.startswith(("not measured", "not complete")):
            yield "note", section.title, remark


def believed_words(good: int, total: int, what: str) -> str:
    """`all 3 loads are believed`, `2 of 3 loads believed`."""
    if not total:
        return f"no {what} ran"
    if good < total:
        return f"{good} of {total} {what}{'s' if total > 1 else ''} believed"
    return {1: f"the {what} is believed", 2: f"both {what}s are believed"}.get(
        total, f"all {total} {what}s are believed"
    )


def grounds(parts: Sequence[Part]) -> Iterator[dict[str, Any]]:
    """What was measured on what: a table for each environment, server and workload that differs."""
    seen: dict[str, list[str]] = {}
    tables: dict[str, list[tuple[str, str]]] = {}
    for part in parts:
        for rows in tables_of(part.document or {}):
            key = repr(rows)
            seen.setdefault(key, []).append(part.name)
            tables[key] = rows
    for key, rows in tables.items():
        title = rows[0][0]
        yield {"title": title, "of": ", ".join(seen[key]), "rows": rows}


def tables_of(document: dict[str, Any]) -> Iterator[list[tuple[str, str]]]:
    """The machine, each server, the load and the client of a document, as names and words."""
    if "environment" in document:
        yield environment_rows(document["environment"])
    for url, server in document.get("servers", {}).items():
        yield server_rows(url, server)
    if "server" in document:
        yield kv_rows(document["server"], document["options"])
    if "workload" in document:
        yield workload_rows(document["workload"])
    if "client" in document:
        yield client_rows(document["client"])


def environment_rows(environment: dict[str, Any]) -> list[tuple[str, str]]:
    """The machine that measured; what its document does not say is left out."""
    gpus, versions = environment.get("gpus") or [], environment.get("versions") or {}
    memory = environment.get("memory")
    rows = [
        ("Machine of the client", machine_words(environment)),
        ("processor", environment.get("processor")),
        ("cores", environment.get("cores")),
        ("memory", f"{memory / GIB:.0f} GiB" if memory else None),
        ("memory of a GPU", ", ".join(dict.fromkeys(f"{each['memory'] / GIB:.0f} GiB" for each in gpus))),
        ("driver", ", ".join(dict.fromkeys(each["driver"] for each in gpus)) or environment.get("driver")),
        ("system", environment.get("system")),
        ("Python", environment.get("python")),
        ("versions here", ", ".join(f"{name} {version}" for name, version in versions.items())),
    ]
    return [(name, str(words)) for name, words in rows if words]


def machine_words(environment: dict[str, Any]) -> str:
    """Its GPUs, or its processor where it has none."""
    words = gpu_words(environment.get("gpus")) or environment.get("device") or environment.get("processor")
    return str(words or "not told")


def definitions_of(documents: Sequence[dict[str, Any]]) -> Iterator[tuple[str, str]]:
    """Each definition once; those of one name that differ each with the benches that they are of."""
    found: dict[tuple[str, str], list[str]] = {}
    for document in documents:
        for key, words in document.get("definitions", {}).items():
            found.setdefault((key, words), []).append(document["bench"])
    names = [key for key, _ in found]
    for (key, words), benches in sorted(found.items(), key=lambda item: names.index(item[0][0])):
        own = f" ({', '.join(dict.fromkeys(benches))})" if names.count(key) > 1 else ""
        yield key.replace("_", " ") + own, words


def server_rows(url: str, server: dict[str, Any]) -> list[tuple[str, str]]:
    """What a server told of itself."""
    models = server["models"]
    more = f" and {len(models) - MOST_MODELS} more" if len(models) > MOST_MODELS else ""
    command = server.get("command")
    return [
        ("Server", url),
        ("vLLM", server["version"] or "not told"),
        ("models", ", ".join(models[:MOST_MODELS]) + more),
        ("context", f"{server['context']:,} tokens" if server["context"] else "not told"),
        ("flags", shlex.join(command) if command else "not available: it runs elsewhere, or as somebody else"),
    ]


def kv_rows(server: dict[str, Any], options: dict[str, Any]) -> list[tuple[str, str]]:
    """The server that `bench kv` filled, and its bounds."""
    rows = [
        ("Server", server["base_url"]),
        ("vLLM", server["version"] or "not told"),
        ("model", server["model"]),
        ("API", server["route"]),
        ("deadline of a probe", f"{options['deadline_s']:g} s"),
        ("seed", options["seed"]),
    ]
    return [(name, str(words)) for name, words in rows]


def workload_rows(work: dict[str, Any]) -> list[tuple[str, str]]:
    """What was asked."""
    lengths = [" to ".join(map("{:,}".format, dict.fromkeys(work[f"{way}_tokens"]))) for way in ("input", "output")]
    rows = [
        ("Load", f"{lengths[0]} tokens in, {lengths[1]} out{' at most' if work['natural'] else ''}"),
        ("API", work["route"]),
        ("prompts", f"{work['rows']} rows of yours" if work["rows"] else f"random {work['prompts']}, unique"),
        ("shared prefix", f"{work['shared_prefix']:,} tokens" if work["shared_prefix"] else "none"),
        ("seed", work["seed"]),
        ("sent along", ", ".join(f"{name} {value}" for name, value in work["extra"].items()) or NOTHING),
    ]
    return [(name, str(words)) for name, words in [*rows, *(("note", note) for note in work["notes"])]]


def client_rows(client: dict[str, Any]) -> list[tuple[str, str]]:
    """What sent it, and how fast that can be."""
    found = client.get("calibration")
    most = f"{found['chunks_per_second']:,.0f} chunks/s, first token after {found['ttft_ms']:.1f} ms" if found else ""
    return [
        ("Client", f"{client['processes']} process{'es' if client['processes'] > 1 else ''}"),
        ("limit of a request", f"{client['timeout_s']:g} s"),
        ("against a server that does nothing", most or "not calibrated"),
    ]
