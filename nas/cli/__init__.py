"""The command line. Each command imports what it needs, so `nas status` starts in a moment and without torch."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Event, Thread
from typing import Annotated

import typer
from rich.text import Text

from nas.base.failures import explained
from nas.base.files import first_line
from nas.base.interrupts import Answered, answer_sigterm, exit_code, terminated
from nas.cli import confirm, measure, models, new, search, tune
from nas.cli.terminal import notes, say_in_words

SOON = 0.7
"""Seconds without an output that nobody wonders about."""

app = typer.Typer(
    help="Step-aware neural architecture search for diffusion models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for command in (
    new.new,
    new.studies,
    search.run,
    tune.tune,
    search.status,
    search.compare,
    search.report,
    search.dashboard,
    search.repair,
    measure.audit,
    measure.intervals,
    models.export,
    models.sample,
    models.train,
    confirm.confirm,
):
    app.command()(command)


def _say_version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        print(version("step-aware-nas"))
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_say_version, is_eager=True, help="Say the version and exit.")
    ] = False,
) -> None:
    """Step-aware neural architecture search for diffusion models."""


@contextmanager
def announced() -> Iterator[None]:
    """Says within a second that imports take seconds, where they do, unless asked to be quiet."""
    done = Event()

    def say() -> None:
        done.wait(SOON)
        while "torch" not in sys.modules and not done.wait(0.2):
            pass
        if not done.is_set():
            notes.print("loading torch, diffusers and what the study needs", style="dim", highlight=False)

    if "torch" not in sys.modules and not {"-q", "--quiet"} & {*sys.argv}:
        Thread(target=say, daemon=True).start()
    try:
        yield
    finally:
        done.set()


def main() -> None:
    """Entry point: what a user or the machine can mend becomes one line and exit code 1, being asked to stop 130 or 143."""
    answer_sigterm()
    say_in_words()
    try:
        with announced():
            app()
    except SystemExit as end:
        if end.code == 130 and not isinstance(end, Answered):  # typer's own answer to an interrupt
            notes.print("interrupted", highlight=False)
            sys.exit(143 if terminated() else 130)
        raise
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except KeyboardInterrupt as asked:
        notes.print("interrupted", highlight=False)
        sys.exit(exit_code(asked))
    except Exception as error:
        if os.environ.get("NAS_TRACEBACK"):
            raise
        words = explained(error)
        if words is None:
            words = f"{type(error).__name__}: {first_line(error)}; this is a fault of the program: NAS_TRACEBACK=1 shows where it happened"
        notes.print(
            Text.assemble(("error:", "bold red"), f" {' '.join(words.split())}"), highlight=False, soft_wrap=True
        )
        sys.exit(1)
