"""`loraport data check` and `loraport data show`; `loraport data build` is in train/build/cli.py.

$ loraport data check rows.jsonl --model Qwen/Qwen3-8B --eval-data heldout.jsonl
$ loraport data show rows.jsonl --model Qwen/Qwen3-8B --row 7
"""

from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from loraport.clients.errors import DataError, UsageError
from loraport.clients.terminal import console, print_json, program

# The groups' commands that live in other modules, imported when they are called: command -> (module, its help line).
ELSEWHERE = {"build": ("loraport.train.build.cli", "Make chat rows of documentation or source code.")}


class LazyGroup(TyperGroup):
    """A group in which the commands of ELSEWHERE are names with a line of help until one is called."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """The command that `args` call."""
        name, command, rest = super().resolve_command(ctx, args)
        return name, load_command(name) if name in ELSEWHERE else command, rest


def load_command(name: str) -> Any:
    """A command of ELSEWHERE, imported; the function has the command's name."""
    single = typer.Typer(add_completion=False, rich_markup_mode=None)
    single.command(name)(getattr(import_module(ELSEWHERE[name][0]), name))
    return typer.main.get_command(single)


data = typer.Typer(cls=LazyGroup, no_args_is_help=True, rich_markup_mode=None)

DataArgument = Annotated[
    str | None, typer.Argument(help="Rows: a file, a folder, or a hub data set org/name.", show_default=False)
]
Config = Annotated[Path | None, typer.Option("--config", help="The YAML file of loraport train; flags win.")]
Model = Annotated[str | None, typer.Option("--model", help="Base model: a folder, or an id on the model hub.")]
Revision = Annotated[str | None, typer.Option("--revision", help="Branch, tag or commit of a model on the hub.")]
Format = Annotated[str | None, typer.Option("--format", help="How rows are written. [default: auto, by their keys]")]
Length = Annotated[
    int | None,
    typer.Option("--sequence-length", min=16, help="Longest row in tokens. [default: the model's own limit]"),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]


@data.command("check")
def check_rows(
    rows: DataArgument = None,
    model: Model = None,
    eval_data: Annotated[
        str | None, typer.Option("--eval-data", help="Rows to evaluate on: nothing of them may be trained.")
    ] = None,
    config: Config = None,
    revision: Revision = None,
    format: Format = None,
    sequence_length: Length = None,
    task: Annotated[
        str,
        typer.Option("--task", help="What they teach: classification, format, qa, text, code, reasoning, preference."),
    ] = "auto",
    method: Annotated[
        str | None, typer.Option("--method", help="Of the training: sft or dpo. [default: what the rows are for]")
    ] = None,
    fix: Annotated[Path | None, typer.Option("--fix", help="Write a cleaned copy to this JSONL file.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite that file.")] = False,
    json: Json = False,
) -> None:
    """Check every row on the exact tokens that training sees."""
    from loraport.train.data.fix import check_target, refuse_own_rows
    from loraport.train.data.inputs import read_inputs
    from loraport.train.data.verdict import TASKS

    if task not in ("auto", *TASKS):
        raise UsageError(f"there is no task {task!r}.", f"tasks are auto, {', '.join(TASKS)}")
    if fix:
        check_target(fix, force)
    inputs = read_inputs(
        config,
        model=model,
        revision=revision,
        data=rows,
        eval_data=eval_data,
        format=format,
        sequence_length=sequence_length,
        method=method,
    )
    if fix:
        refuse_own_rows(fix, inputs.source, inputs.eval_source)
    from loraport.train.data.check import check
    from loraport.train.data.check_report import show_fixed, show_report
    from loraport.train.data.fix import fix as write_fixed

    with console.status("reading rows") as status:

        def tell(rows: int) -> None:
            status.update(f"{rows:,} rows checked")

        limits, method = inputs.limits, inputs.method
        report = check(inputs.source, inputs.eval_source, inputs.encoder, limits, inputs.format, task, tell, method)
    document = report.document()
    if not json:
        show_report(report)
    errors = report.errors
    if fix:
        with console.status(f"writing {fix}"):
            fixed = write_fixed(inputs.source, inputs.eval_source, inputs.encoder, limits, fix, inputs.format, method)
        document["fixed"] = fixed.document()
        errors = fixed.remaining
        if not json:
            show_fixed(fixed)
    if json:
        print_json(document)
    if errors:
        kinds = ", ".join(finding.kind.replace("_", " ") for finding in errors)
        fixable = f"{program()} data check ... --fix clean.jsonl leaves them out"
        hint = fixable if report.train.usable else "no row can be used: --fix would have nothing to keep"
        hint = "they are in the evaluation rows" if fix else hint
        raise DataError(f"{inputs.source.name} has errors: {kinds}.", hint)


@data.command("show")
def show(
    rows: DataArgument = None,
    model: Model = None,
    row: Annotated[
        str | None, typer.Option("--row", help="Its number as check names it, or FILE:NUMBER. [default: the first]")
    ] = None,
    config: Config = None,
    revision: Revision = None,
    format: Format = None,
    sequence_length: Length = None,
    json: Json = False,
) -> None:
    """Show the tokens of a row, and which of them are trained."""
    from loraport.train.data.inputs import read_inputs

    inputs = read_inputs(
        config, model=model, revision=revision, data=rows, format=format, sequence_length=sequence_length
    )
    from loraport.train.data.show import print_row, show_row

    shown = show_row(inputs.source, row, inputs.format, inputs.encoder)
    if json:
        print_json(shown.document())
    else:
        print_row(shown, inputs.limits.sequence_length)


@data.command("build", help=ELSEWHERE["build"][1])
def build() -> None:
    """Stands for the command of train/build/cli.py: see LazyGroup."""
