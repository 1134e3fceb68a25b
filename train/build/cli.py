"""`loraport data build`: documents in, chat rows out."""

import os
from pathlib import Path
from typing import Annotated

import typer

from loraport.clients.endpoint import PLACEHOLDER_KEY
from loraport.clients.errors import UsageError
from loraport.clients.terminal import console, print_json, say


def build(
    sources: Annotated[
        list[Path], typer.Argument(help="Files and folders: Markdown, HTML, text, PDF, RST, source code.")
    ],
    out: Annotated[
        Path, typer.Option("--out", "-o", help="A folder for train.jsonl and eval.jsonl, or a file *.jsonl.")
    ],
    model: Annotated[
        str | None, typer.Option("--model", help="Count the tokens of this model: a folder or hub id.")
    ] = None,
    max_tokens: Annotated[int, typer.Option("--max-tokens", min=64, help="Longest row.")] = 1024,
    subject: Annotated[
        str | None, typer.Option("--subject", help='What the documents are about, as questions name it: "Zig 0.14".')
    ] = None,
    with_context: Annotated[
        bool,
        typer.Option("--with-context", help="Also rows with the text in the prompt and the answer copied from it."),
    ] = False,
    with_code: Annotated[
        bool, typer.Option("--with-code", help="Also rows that ask for the code of functions.")
    ] = False,
    phrasings: Annotated[int, typer.Option("--phrasings", min=1, max=4, help="Ways to ask for the same answer.")] = 1,
    ask_url: Annotated[
        str | None,
        typer.Option("--ask-url", help="Let a model write pairs: the base URL of any OpenAI-compatible endpoint."),
    ] = None,
    ask_model: Annotated[str | None, typer.Option("--ask-model", help="The model to ask there.")] = None,
    ask_key_env: Annotated[
        str | None, typer.Option("--ask-key-env", help="The variable that holds its key. [default: OPENAI_API_KEY]")
    ] = None,
    ask_pairs: Annotated[int, typer.Option("--ask-pairs", min=1, max=30, help="Pairs to write for a piece.")] = 5,
    ask_concurrency: Annotated[int, typer.Option("--ask-concurrency", min=1, max=256, help="Requests at once.")] = 8,
    ask_only: Annotated[
        bool, typer.Option("--ask-only", help="Only what the model writes, no pairs from structure.")
    ] = False,
    judge: Annotated[
        bool, typer.Option("--judge", help="Ask the model once more whether the text supports each answer.")
    ] = False,
    eval_fraction: Annotated[
        float, typer.Option("--eval-fraction", min=0, max=0.5, help="Share of rows to hold out.")
    ] = 0.1,
    seed: Annotated[int, typer.Option("--seed", help="Chooses phrases and held-out documents.")] = 0,
    force: Annotated[bool, typer.Option("--force", help="Replace files of an earlier run.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print the result as one JSON document.")] = False,
) -> None:
    """Make chat rows of documentation or source code."""
    from loraport.train.build import build as story
    from loraport.train.build.report import document_of, tell
    from loraport.train.build.writer import Ask

    ask = None
    if (ask_url is None) != (ask_model is None):
        raise UsageError("--ask-url and --ask-model belong together.", "give both, or neither")
    if ask_url and ask_model:
        ask = Ask(ask_url.rstrip("/"), ask_model, key_from(ask_key_env), ask_pairs, ask_concurrency, judge=judge)
    elif ask_only or judge:
        raise UsageError("--ask-only and --judge need an endpoint.", "give --ask-url and --ask-model")
    settings = story.Settings(
        model=model, max_tokens=max_tokens, subject=subject, with_context=with_context, with_code=with_code,
        phrasings=phrasings, eval_fraction=eval_fraction, seed=seed, force=force, ask=ask, ask_only=ask_only,
    )  # fmt: skip
    built = story.build(sources, out, settings, show_progress)
    if json:
        print_json(document_of(built, settings))
    else:
        tell(built, settings)


def key_from(variable: str | None) -> str:
    """The key in a variable of the environment. UsageError when the variable is named and not set."""
    if variable is None:
        return os.environ.get("OPENAI_API_KEY") or PLACEHOLDER_KEY  # never LORAPORT_API_KEY: this may be any server
    key = os.environ.get(variable)
    if not key:
        raise UsageError(f"the variable {variable} is not set.", "export it, or leave --ask-key-env out")
    return key


def show_progress(done: int, of: int) -> None:
    """A line now and then: on a terminal in place, in a log every tenth."""
    if console.is_terminal:
        console.print(f"asked {done} of {of}", end="\r" if done < of else "\n")
    elif done == of or done % max(1, of // 10) == 0:
        say(f"asked {done} of {of}")
