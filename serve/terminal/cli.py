"""`loraport jobs`: fine-tuning jobs of a running endpoint, through OpenAI's API: the same jobs as everybody's.

The key is LORAPORT_API_KEY's, else the one that the endpoint leaves in the home for its owner, who sees all jobs.

    $ loraport jobs submit rows.jsonl --epochs 2 --suffix support --watch
    $ loraport jobs watch                       # all jobs, as they go
    $ loraport jobs logs ftjob-3f…
"""

import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from loraport.clients.errors import Refused, Shortfall
from loraport.clients.home import Home
from loraport.clients.terminal import console, print_json, printable, program, say
from loraport.serve.terminal.shown import ENDED, describe, describe_cost, ours, print_table, table_of

if TYPE_CHECKING:
    from openai import OpenAI

JobId = Annotated[str, typer.Argument(metavar="JOB", help="The job's id, ftjob-….", show_default=False)]
BaseUrl = Annotated[str | None, typer.Option(help="The endpoint. Default: the one that serves here.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]
LOOK_S = 1.0
AWAY_S = 600.0  # that an endpoint may be away while a job is followed
SHOWN = 20  # jobs of a table
LEVELS = {"warn": "yellow", "error": "bold red"}


@contextmanager
def asking(base_url: str | None) -> Iterator["OpenAI"]:
    """The unmodified client of the endpoint; its errors become EndpointError."""
    from openai import BadRequestError, NotFoundError, OpenAI

    from loraport.clients.endpoint import endpoint_errors, find_base_url, find_record, server_words
    from loraport.serve.terminal.submission import key_for

    home = Home.default()
    url = find_base_url(base_url, home)
    key = key_for(find_record(url, home))
    with endpoint_errors(url), closing(OpenAI(base_url=url, api_key=key)) as client:
        try:
            yield client
        except (BadRequestError, NotFoundError) as error:  # its words say what to do
            raise Refused(f"{server_words(error)}.") from error


def jobs_submit(
    data: Annotated[Path | None, typer.Argument(help="Rows to train on: a JSONL file.", show_default=False)] = None,
    config: Annotated[Path | None, typer.Option(help="A run configuration, as of `loraport train`.")] = None,
    model: Annotated[str | None, typer.Option(help="Base. Default: the one that is served.")] = None,
    eval_data: Annotated[Path | None, typer.Option(help="Rows to evaluate on. Default: a part of the others.")] = None,
    suffix: Annotated[str | None, typer.Option("--suffix", "--name", help="A part of the model's name.")] = None,
    method: Annotated[str | None, typer.Option(help="supervised or dpo.")] = None,
    epochs: Annotated[int | None, typer.Option(min=1, help="Passes over the rows. Default: derived.")] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Rows a step. Default: derived.")] = None,
    learning_rate: Annotated[float | None, typer.Option(min=0, help="Default: derived.")] = None,
    preset: Annotated[str | None, typer.Option(help="Rank, alpha, dropout and target modules by name.")] = None,
    rank: Annotated[int | None, typer.Option(min=1, help="Rank of the adapter.")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Of initialisation, order and dropout.")] = None,
    require: Annotated[list[str] | None, typer.Option(help="What the result must reach: 'success>=0.9'.")] = None,
    priority: Annotated[int | None, typer.Option(help="The higher, the earlier; above 0 with an admin key.")] = None,
    setting: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Any other key of the run configuration.")
    ] = None,
    metadata: Annotated[list[str] | None, typer.Option(metavar="KEY=VALUE", help="A label of the job.")] = None,
    watch: Annotated[bool, typer.Option("--watch", help="Follow it to its end.")] = False,
    base_url: BaseUrl = None,
    json: Json = False,
) -> None:
    """Upload rows and create a job."""
    from loraport.serve.terminal.submission import Wish, pairs_of, settings_of, submit

    given: dict[str, Any] = {
        "data": data,
        "eval_data": eval_data,
        "model": model,
        "name": suffix,
        "method": method,
        "epochs": epochs,
        "batch_size": batch_size,
        "learning_rate": learning_rate,
        "preset": preset,
        "rank": rank,
        "seed": seed,
        "require": require,
        "priority": priority,
    }
    wish = Wish.of(config, {**given, **settings_of(setting or [])}, pairs_of("--metadata", metadata or []))
    with asking(base_url) as client:
        job = submit(client, wish, lambda words: say(words, "dim"))
        if not json:
            say(f"{job.id} is created: {program()} jobs watch {job.id}", "bold")
        if watch:
            job = follow(client, job.id)
    if json:
        print_json(job.model_dump(mode="json"))
    if watch:
        end_with(job)


def jobs_list(
    limit: Annotated[int, typer.Option(min=1, help="Most jobs to show, the newest.")] = SHOWN,
    base_url: BaseUrl = None,
    json: Json = False,
) -> None:
    """List the jobs, the newest first."""
    with asking(base_url) as client:
        found = newest(client, limit)
    if json:
        print_json([job.model_dump(mode="json") for job in found])
    elif found:
        print_table(found)
    else:
        say(f"no jobs yet; create one: {program()} jobs submit rows.jsonl")


def jobs_show(job: JobId, base_url: BaseUrl = None, json: Json = False) -> None:
    """Show a job: its settings, what came of it, its checkpoints."""
    with asking(base_url) as client:
        found = client.fine_tuning.jobs.retrieve(job)
        checkpoints = list(client.fine_tuning.jobs.checkpoints.list(job))
        cost = cost_of(client, job)
    if json:
        shown = [each.model_dump(mode="json") for each in checkpoints]
        print_json({"job": found.model_dump(mode="json"), "cost": cost, "checkpoints": shown})
        return
    lines = [*describe(found), *describe_cost(cost)]
    width = max(len(name) for name, _ in lines)
    for name, value in lines:
        say(f"  {name:{width}}  {printable(value)}")
    for each in reversed(checkpoints):
        figures = each.metrics.model_dump(exclude_none=True, exclude={"step"})
        said = ", ".join(f"{name} {value:.3f}" for name, value in figures.items() if not name.startswith("full_"))
        say(f"  {'checkpoint':{width}}  {each.fine_tuned_model_checkpoint}  {said}")


def jobs_logs(
    job: JobId,
    follow_it: Annotated[bool, typer.Option("--follow", "-f", help="Go on until the job has ended.")] = False,
    base_url: BaseUrl = None,
) -> None:
    """Print all that a job's trainer has said."""
    import sys

    from openai._legacy_response import HttpxBinaryResponseContent

    with asking(base_url) as client:
        after, is_over = 0, False
        while True:
            path = f"/fine_tuning/jobs/{job}/log"
            answer = client.get(path, cast_to=HttpxBinaryResponseContent, options={"params": {"after": after}})
            said = answer.read()
            sys.stdout.write(plain(said))
            sys.stdout.flush()
            if said:
                after = int(answer.response.headers["x-log-end"])
                continue
            if is_over or not follow_it:
                break
            is_over = client.fine_tuning.jobs.retrieve(job).status in ENDED
            time.sleep(0 if is_over else LOOK_S)


def jobs_cancel(job: JobId, base_url: BaseUrl = None, json: Json = False) -> None:
    """Cancel a job."""
    change(job, base_url, json, lambda client: client.fine_tuning.jobs.cancel)


def jobs_pause(job: JobId, base_url: BaseUrl = None, json: Json = False) -> None:
    """Pause a job: its checkpoint is kept, its GPU is free."""
    change(job, base_url, json, lambda client: client.fine_tuning.jobs.pause)


def jobs_resume(job: JobId, base_url: BaseUrl = None, json: Json = False) -> None:
    """Let a paused job go on, from its checkpoint."""
    change(job, base_url, json, lambda client: client.fine_tuning.jobs.resume)


def jobs_watch(
    job: Annotated[str | None, typer.Argument(metavar="[JOB]", help="One job.", show_default="all jobs")] = None,
    base_url: BaseUrl = None,
    json: Json = False,
) -> None:
    """Follow a job to its end, or see all jobs as they go."""
    with asking(base_url) as client:
        if job is None:
            watch_all(client)
            return
        found = follow(client, job)
    if json:
        print_json(found.model_dump(mode="json"))
    end_with(found)


# What these are made of.


def change(job: str, base_url: str | None, json: bool, verb: "Callable[[OpenAI], Callable[[str], Any]]") -> None:
    """Ask for a change of a job, and say what it is now."""
    with asking(base_url) as client:
        found = verb(client)(job)
    if json:
        print_json(found.model_dump(mode="json"))
        return
    wanted = (ours(found).get("wanted") or "") if found.status not in ENDED else ""
    say(f"{job} is {found.status}{f'; it is to {wanted} as soon as its trainer has ended' if wanted else ''}.", "bold")


def plain(said: bytes) -> str:
    """A part of a log for any terminal: a trainer must not steer it. What overwrites its line gets lines of its own."""
    return printable(said.decode(errors="replace").replace("\r\n", "\n").replace("\r", "\n"))


def newest(client: "OpenAI", limit: int) -> list[Any]:
    """The newest jobs."""
    found = []
    for job in client.fine_tuning.jobs.list(limit=min(limit, 100)):
        found.append(job)
        if len(found) == limit:
            break
    return found


def cost_of(client: "OpenAI", job_id: str) -> dict[str, Any]:
    """GPU-hours of a job and their cost."""
    found = client.get(f"/fine_tuning/jobs/{job_id}/cost", cast_to=object)
    return dict(found) if isinstance(found, dict) else {}


def follow(client: "OpenAI", job_id: str) -> Any:
    """Tell a job's events as they come, until it has ended; the job as it is then."""
    told: set[str] = set()
    while True:
        job, news = patiently(lambda: look(client, job_id, told))
        for event in reversed(news):
            told.add(event.id)
            at = datetime.fromtimestamp(event.created_at).strftime("%H:%M:%S")
            say(f"{at}  {printable(event.message)}", LEVELS.get(event.level, "dim" if event.type == "metrics" else ""))
        if job.status in ENDED:
            return job
        time.sleep(LOOK_S)


def patiently(ask: Callable[[], tuple[Any, list[Any]]]) -> tuple[Any, list[Any]]:
    """An answer, also of an endpoint that is being started again; its error when it stays away."""
    from openai import APIConnectionError, InternalServerError

    end, is_told = time.monotonic() + AWAY_S, False
    while True:
        try:
            return ask()
        except (APIConnectionError, InternalServerError) as error:
            if time.monotonic() > end:
                raise
            if not is_told:
                say(f"the endpoint does not answer now ({type(error).__name__}); the job goes on.", "yellow")
            is_told = True
            time.sleep(LOOK_S)


def look(client: "OpenAI", job_id: str, told: set[str]) -> tuple[Any, list[Any]]:
    """(a job as it is now, what is to be told of it)."""
    return client.fine_tuning.jobs.retrieve(job_id), unknown_events(client, job_id, told)


def unknown_events(client: "OpenAI", job_id: str, told: set[str]) -> list[Any]:
    """Events that were not told yet, the newest first."""
    found = []
    for event in client.fine_tuning.jobs.list_events(job_id, limit=100):
        if event.id in told:
            break
        found.append(event)
    return found


def watch_all(client: "OpenAI") -> None:
    """A table of the newest jobs that changes with them, until Ctrl-C; once, where nobody looks."""
    from rich.live import Live

    if not console.is_terminal:
        print_table(newest(client, SHOWN))
        return
    with Live(table_of(newest(client, SHOWN)), console=console, auto_refresh=False) as shown:
        while True:
            time.sleep(LOOK_S)
            shown.update(table_of(newest(client, SHOWN)), refresh=True)


def end_with(job: Any) -> None:
    """The end of a command that has followed a job: Shortfall, or Refused, unless it has succeeded."""
    if job.status == "succeeded":
        say(f"{job.fine_tuned_model} answers: {program()} chat --model {job.fine_tuned_model}", "bold green")
        return
    reason = f": {job.error.message.rstrip('.')}" if job.error and job.error.message else ""
    kind = Shortfall if job.error and job.error.code == "requirements_not_met" else Refused
    raise kind(f"{job.id} has {'failed' if job.status == 'failed' else 'been cancelled'}{reason}.", logs_hint(job))


def logs_hint(job: Any) -> str:
    """Where to look for the reason."""
    return f"`{program()} jobs logs {job.id}` shows all that its trainer said"
