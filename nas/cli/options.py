"""Options that several commands have, and what they all do with them."""

from __future__ import annotations

import inspect
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nas.base.interrupts import Answered, asked_in, exit_code
from nas.cli.terminal import notes
from nas.contracts import UserError

if TYPE_CHECKING:
    from nas.engine.cluster import Workers
    from nas.library import Chosen, StudyRun
    from nas.study import Study

StudyFile = Annotated[
    str,
    typer.Argument(
        metavar="STUDY",
        help="Python file that defines `study`. It is run, in its own folder, which relative paths in it mean too.",
        show_default=False,
    ),
]
RunDir = Annotated[Path, typer.Argument(metavar="RUN_DIR", help="Run folder that `nas run` wrote.", show_default=False)]
OutOption = Annotated[
    Path | None, typer.Option("--out", help="Run folder. Default: runs/<study name>.", show_default=False)
]
StorageOption = Annotated[
    str | None,
    typer.Option(help="Optuna storage URL (PostgreSQL, SQLite, ...). Default: <run>/journal.log.", show_default=False),
]
DeviceOption = Annotated[str, typer.Option(help="Where this process computes: cpu, cuda, cuda:1, mps.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
SearcherOption = Annotated[
    str | None,
    typer.Option(
        help="Searcher. Default: with --within any of them, with --trial the study's first.", show_default=False
    ),
]
SeedOption = Annotated[
    int, typer.Option(min=0, max=2**32 - 1, help="Seed of the search; each seed has a ledger of its own.")
]
WorkersOption = Annotated[int, typer.Option(min=0, help="Ray workers; 0 computes in this process.")]
GpusOption = Annotated[float, typer.Option(min=0, help="GPUs for each Ray worker; a fraction shares one.")]
AddressOption = Annotated[
    str | None, typer.Option(help="Ray cluster to join. Default: one on this machine.", show_default=False)
]
TrialOption = Annotated[int | None, typer.Option(help="Trial of that searcher.", show_default=False)]
WithinOption = Annotated[
    str | None,
    typer.Option(
        metavar="COST=LIMIT",
        help="The best verified trial within a budget, such as macs_share=0.5.",
        show_default=False,
    ),
]


def chosen_of(
    run: StudyRun, searcher: str | None, seed: int, trial: int | None, within: str | None, again: bool = True
) -> Chosen:
    """The trial that --trial or --within means. Within a budget all searchers of the seed compete, unless one is named, and the best is scored on noises on
    which nothing was chosen, unless not `again`."""
    if (trial is None) == (within is None):
        raise UserError("say which trial: either --trial N or --within COST=LIMIT")
    if trial is not None:
        return run.trial(trial, searcher, seed)
    assert within is not None
    cost, limit = _parted(run, within)
    return run.best(searcher, seed, again, **{cost: _limit(limit, within, "COST=LIMIT, such as macs_share=0.5")})


def several_of(run: StudyRun, searcher: str | None, seed: int, trial: int | None, within: str | None) -> list[Chosen]:
    """As `chosen_of`, of each limit where there are several with commas, the largest first."""
    if trial is not None or within is None or "," not in within:
        return [chosen_of(run, searcher, seed, trial, within, again=False)]
    cost, limits = _parted(run, within)
    form = "COST=LIMIT or COST=LIMIT,LIMIT,..., such as macs_share=0.7,0.5"
    each = sorted((_limit(limit, within, form) for limit in limits.split(",")), reverse=True)
    return [run.best(searcher, seed, again=False, **{cost: most}) for most in each]


def _parted(run: StudyRun, within: str) -> tuple[str, str]:
    cost, _, limit = (part.strip() for part in within.partition("="))
    if not cost.isidentifier() or cost in inspect.signature(run.best).parameters:
        raise UserError(
            f"--within {within}: {cost!r} is not a cost; use one that `nas compare` shows, such as macs_share=0.5"
        )
    return cost, limit


def _limit(written: str, within: str, form: str) -> float:
    try:
        return float(written)
    except ValueError:
        raise UserError(f"--within {within} is not {form}") from None


def worker_pool(count: int, gpus: float, address: str | None, device: str) -> Workers | None:
    """Ray workers, where any option asks for them."""
    if not (count or gpus or address):
        return None
    # Ray reads it where it is imported: a cluster of this machine's own is closed to others only without it.
    os.environ.pop("RAY_ADDRESS", None)
    if address:
        os.environ["RAY_ADDRESS"] = address
    from nas.engine.cluster import Workers, check_workers

    pool = Workers(count or 1, gpus, address, device)
    check_workers(pool)
    return pool


def waiting(ledger: str) -> Callable[[str], None]:
    """Says once who holds a ledger that is waited for."""
    said: set[str] = set()

    def wait(holder: str) -> None:
        if holder not in said:
            said.add(holder)
            notes.print(f"waiting for {holder}, which scores the ledger {ledger}", highlight=False)

    return wait


@contextmanager
def resumable(folder: Path) -> Iterator[None]:
    """Ctrl-C ends the work, not what is kept. What the disk refuses without a name is the folder's."""
    try:
        yield
    except (Exception, KeyboardInterrupt) as error:
        asked = asked_in(error)
        if asked is None:
            if isinstance(error, OSError) and error.errno is not None and error.filename is None:
                error.filename = str(folder)
            raise
        notes.print(
            f"interrupted; the same command goes on from the last trial or checkpoint ({folder})", highlight=False
        )
        raise Answered(exit_code(asked)) from None


def summary_of(chosen: Chosen, study: Study) -> str:
    """Which trial it is, its cost, and its objectives on noises on which nothing was chosen, or else as it was scored."""
    from nas.results.trials import cost_in_words

    shown = replace(chosen.trial, score=chosen.score)
    values = zip(study.objectives, shown.objectives(study.objectives), strict=True)
    said = f"{cost_in_words(chosen.trial)}, " + ", ".join(f"{name} {value:.4g}" for name, value in values)
    return f"{chosen.ledger} trial {chosen.trial.number} ({said})"


def facts_of(chosen: Chosen, **others: Any) -> dict[str, Any]:
    """The same for a script, and what else is to be said."""
    return {
        "ledger": chosen.ledger,
        "trial": chosen.trial.number,
        "genome": list(chosen.trial.genome),
        "cost": dict(chosen.trial.cost),
        "scores": dict(chosen.score.values),
        **others,
    }


def run_folder(study: Study, out_dir: Path | None) -> Path:
    return (out_dir or Path("runs") / study.name).resolve()


def check_device(device: str) -> None:
    import torch

    from nas.base.files import first_line

    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device {device!r} cannot be used ({first_line(error)}); use --device cpu") from error


def print_json(data: Mapping[str, Any]) -> None:
    """What is no finite number is null."""
    from nas.base.files import finite

    print(json.dumps(finite(data), indent=2, allow_nan=False))
