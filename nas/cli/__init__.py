"""The command line. Each command imports what it needs, so `nas status` starts in a moment and without torch."""

from __future__ import annotations

import os
import sys

import typer
from rich.markup import escape

from nas.cli import measure, models, search
from nas.contracts import UserError
from nas.terminal import notes

# Read by OpenMP when torch is imported: threads that wait soon sleep instead of spinning, or training on all cores would
# slow down many times over as soon as anything else wants a core.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

app = typer.Typer(
    help="Step-aware neural architecture search for diffusion models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for command in (
    search.run,
    search.status,
    search.compare,
    search.report,
    search.dashboard,
    measure.audit,
    measure.intervals,
    models.export,
    models.sample,
    models.train,
):
    app.command()(command)


def main() -> None:
    """Entry point: a `UserError` becomes one line and exit code 1."""
    try:
        app()
    except UserError as error:
        notes.print(f"[bold red]error:[/] {escape(str(error))}", highlight=False, soft_wrap=True)
        sys.exit(1)
    except (FileExistsError, PermissionError, NotADirectoryError, IsADirectoryError) as error:
        notes.print(f"[bold red]error:[/] {escape(str(error))}; choose another path", highlight=False, soft_wrap=True)
        sys.exit(1)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
