"""`loraport train`. Its flags are the fields of the run configuration."""

import inspect
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin

import typer
from typer.core import TyperCommand

from loraport.clients.errors import UsageError
from loraport.clients.home import Home
from loraport.clients.terminal import print_json, program, say
from loraport.train.adapters import Adapter
from loraport.train.config import RunConfig, explain, load_config, section_of
from loraport.train.progress_file import ProgressFile, describe_checkpoint, ended


def train(
    config: Path | None,
    force: bool,
    resume: bool,
    json: bool,
    resume_or_start: bool = False,
    progress: Path | None = None,
    **flags: Any,
) -> None:
    """Train a LoRA adapter on rows and prove it."""
    home, file = Home.default(), ProgressFile(progress)
    names: list[str] = []  # of the adapter, once it is known
    with ended(file, lambda: last_step(home, names)):
        check_ways(force, resume, resume_or_start)
        resolved = load_config(config, flags)
        names.append(resolved.name)
        from loraport.train.run import train as run

        trained = run(resolved, home, force, resume, resume_or_start, file)
    from loraport.train.checkpoint_adapters import checkpoint_adapters

    checkpoints = checkpoint_adapters(home, trained)
    if json:
        manifest = trained.manifest.model_dump(mode="json", exclude={"golden"})
        found = [describe_checkpoint(each) for each in checkpoints]
        print_json({"folder": str(trained.folder)} | manifest | {"checkpoints": found})
    else:
        report(trained, checkpoints)


def check_ways(force: bool, resume: bool, resume_or_start: bool) -> None:
    """UsageError where the flags say to begin and to go on."""
    if force and resume:
        raise UsageError("--force begins anew, and --resume goes on.", "give one of them")
    if resume_or_start and (force or resume):
        other = "--force" if force else "--resume"
        raise UsageError(f"--resume-or-start chooses by itself what {other} says.", "give one of them")


def last_step(home: Home, names: list[str]) -> int | None:
    """The step of the last whole checkpoint of a run that is called so, if it has a name yet and one is kept."""
    from loraport.train.loop.checkpoints import run_folder, step_of, whole

    found = [path for name in names for path in whole(run_folder(home, name))]
    return step_of(found[-1]) if found else None


def report(adapter: Adapter, checkpoints: list[Adapter]) -> None:
    """The result for people, and what to do next."""
    manifest = adapter.manifest
    accuracy = manifest.metrics.get("eval_reward_accuracy")
    say(
        f"{manifest.name} {manifest.version}  {manifest.trainable_parameters:,} parameters, "
        f"{manifest.adapter_bytes / 2**20:.1f} MiB, eval loss {manifest.metrics['eval_loss']:.3f}, "
        f"{f'reward accuracy {accuracy:.0%}, ' if accuracy is not None else ''}"
        f"trained in {manifest.metrics['seconds']:.0f} s",
        "bold",
    )
    say(f"  {adapter.folder}  (look at report.html there)")
    for each in checkpoints:
        say(f"  {each.manifest.name} {each.manifest.version}  eval loss {each.manifest.metrics['eval_loss']:.3f}")
    say(f"next: {program()} serve {manifest.name}")


class SectionedCommand(TyperCommand):
    """A command whose help lists the fields of the run configuration by section, its other options first."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write a section of options after the other."""
        sections: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            name = parameter.name or ""
            section = section_of(name) if name in RunConfig.model_fields else "Options"
            record = parameter.get_help_record(ctx)
            sections.setdefault(section, []).extend([record] if record else [])
        for section, records in sections.items():
            with formatter.section(section):
                formatter.write_dl(records)


def flag(name: str) -> inspect.Parameter:
    """The command line flag of a field of the run configuration; not given means None."""
    field = RunConfig.model_fields[name]
    kind = list[str] if get_origin(field.annotation) is tuple else field.annotation
    dashed = name.replace("_", "-")
    switch = bool in get_args(field.annotation) or field.annotation is bool
    option = typer.Option(
        f"--{dashed}/--no-{dashed}" if switch else f"--{dashed}", help=explain(name), show_default=False
    )
    return inspect.Parameter(
        name,
        inspect.Parameter.KEYWORD_ONLY,
        default=None,
        annotation=Annotated[kind | None, option],  # type: ignore[operator]
    )


def train_signature() -> inspect.Signature:
    """The command's own options, and a flag for each field of the run configuration."""
    own = {
        "config": (Path | None, None, typer.Option("--config", help="YAML file with the keys below; flags win.")),
        "force": (bool, False, typer.Option("--force", help="Train in any case, from the beginning.")),
        "resume": (bool, False, typer.Option("--resume", help="Continue a run that was ended, where it was.")),
        "resume_or_start": (
            bool,
            False,
            typer.Option(
                "--resume-or-start",
                help="Continue a run of these settings where there is one, else begin: the same command, however "
                "often it was ended, makes one version.",
            ),
        ),
        "progress": (
            Path | None,
            None,
            typer.Option("--progress", help="Append what happens to this file, one JSON object a line."),
        ),
        "json": (bool, False, typer.Option("--json", help="Print the result as one JSON document.")),
    }
    parameters = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, option])
        for name, (kind, default, option) in own.items()
    ]
    return inspect.Signature([*parameters, *(flag(name) for name in RunConfig.model_fields)])


train.__signature__ = train_signature()  # type: ignore[attr-defined]
train.command_class = SectionedCommand  # type: ignore[attr-defined]
train.__annotations__ = {name: p.annotation for name, p in train_signature().parameters.items()}
