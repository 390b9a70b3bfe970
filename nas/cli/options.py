"""Options that several commands have, and what they all do with them."""

from __future__ import annotations

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
    from nas.contracts import Score, Trial
    from nas.engine.ray_runner import Workers
    from nas.results.report import Run
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


def choose(
    study: Study,
    folder: Path,
    storage: str | None,
    searcher: str | None,
    seed: int,
    trial: int | None,
    within: str | None,
) -> tuple[Trial, str]:
    """The trial that --trial or --within means, and the name of its ledger. Within a budget all searchers of the seed compete, unless
    one is named."""
    from nas.results.report import Run, best_within

    if (trial is None) == (within is None):
        raise UserError("say which trial: either --trial N or --within COST=LIMIT")
    ledgers = {(info.searcher, info.seed): (info, trials) for info, trials in Run.open(folder, storage).ledgers}
    name = searcher or (None if within else next(iter(study.searchers), "evolution"))
    meant = {key: ledger for key, ledger in ledgers.items() if key[1] == seed and name in (None, key[0])}
    if not meant:
        known = ", ".join(f"{name} (seed {s})" for name, s in ledgers)
        wanted = f"trials of searcher {name}" if name else "trials"
        raise UserError(f"{folder} has no {wanted} with seed {seed}; it has {known or 'none'}")
    for key, (info, _) in meant.items():
        if study.ledger_info(folder, *key).changed(info.provenance):
            raise UserError(
                f"{folder} was searched by {key[0]} under another study than {study.name} is now; restore the study file or its "
                "supernet, or name another --searcher"
            )
    if within is not None:
        cost, _, limit = within.partition("=")
        try:
            best = best_within([t for _, ts in meant.values() for t in ts], cost, float(limit), study.objectives[0])
        except ValueError:
            raise UserError(f"--within {within} is not COST=LIMIT, such as macs_share=0.5") from None
        return best, next(info.name for info, trials in meant.values() if any(best is trial for trial in trials))
    [(info, trials)] = meant.values()
    chosen = next((t for t in trials if t.number == trial), None)
    if chosen is None or chosen.score is None:
        raise UserError(f"{info.name} has no scored trial {trial}; it has numbers 0 to {len(trials) - 1}")
    return chosen, info.name


def check_study(study: Study, folder: Path, run: Run) -> None:
    """Raises UserError where the run was searched under another space, supernet or evaluator than the study has now."""
    from nas.study import BASELINE

    now = study.ledger_info(folder, BASELINE, 0)
    for info, _ in run.ledgers:
        changed = [part for part in ("space", "supernet", "evaluator") if not now.same(part, info.provenance.get(part))]
        if changed:
            raise UserError(
                f"{folder} was searched with another {' and '.join(changed)} than study {study.name} has now; restore the study file"
            )


def worker_pool(count: int, gpus: float, address: str | None, device: str) -> Workers | None:
    """Ray workers, where any option asks for them."""
    if not (count or gpus or address):
        return None
    if address:
        os.environ["RAY_ADDRESS"] = address
    from nas.engine.ray_runner import Workers, check_workers

    pool = Workers(count or 1, gpus, address, device)
    check_workers(pool)
    return pool


@contextmanager
def on_workers(pool: Workers | None) -> Iterator[None]:
    """One cluster for all that is run meanwhile, where there are workers."""
    if pool is None:
        yield
        return
    from nas.engine.ray_runner import cluster

    with cluster(pool):
        yield


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
            if isinstance(error, OSError) and error.filename is None:
                error.filename = str(folder)
            raise
        notes.print(
            f"interrupted; the same command goes on from the last trial or checkpoint ({folder})", highlight=False
        )
        raise Answered(exit_code(asked)) from None


def confirmed(study: Study, folder: Path, storage: str | None, trial: Trial, device: str = "cpu") -> Score:
    """The score of a chosen trial on noises on which nothing was chosen; made now where the run has not."""
    from nas.engine.session import open_session
    from nas.results.report import Run

    found = Run.open(folder, storage)
    known = found.confirmed.get(trial.digest)
    if known is None:
        with resumable(folder), open_session(study, folder, storage or found.facts["storage"], device) as session:
            session.run(session.confirmation([trial.genome]))
        known = Run.open(folder, storage).confirmed.get(trial.digest)
    if known is None:
        raise UserError(
            f"trial {trial.number} could not be scored again; `nas status {folder}` shows how the ledger stands"
        )
    return known


def comparison(run_dir: Path, storage: Any) -> dict[str, Any]:
    from nas.results.plots import draw_curves, draw_front
    from nas.results.report import Run

    found = Run.open(run_dir, storage)
    if not found.ledgers:
        raise UserError(f"{run_dir} holds no search yet; the same `nas run` command goes on to it")
    facts = found.compare()
    ledgers = {row["searcher"]: trials for row, (_, trials) in zip(facts["searchers"], found.ledgers, strict=True)}
    picture = run_dir / "report" / "front.png"
    draw_front(ledgers, found.facts, found.scale, facts["label"], picture)
    curves = run_dir / "report" / "curves.png"
    draw_curves(facts["searchers"], facts["area_until_macs"], curves)
    return {**facts, "picture": str(picture), "curves": str(curves)}


def summary_of(trial: Trial, study: Study, score: Score | None = None) -> str:
    """Its cost and its objectives: as `score` has them, or else as it was scored."""
    from nas.results.report import cost_in_words

    shown = replace(trial, score=score or trial.score)
    values = zip(study.objectives, shown.objectives(study.objectives), strict=True)
    return f"{cost_in_words(trial)}, " + ", ".join(f"{name} {value:.4g}" for name, value in values)


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
    print(json.dumps(data, indent=2))
