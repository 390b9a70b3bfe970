"""Commands of a search: run it, see how far it is, compare, report, and look at it in the dashboard."""

from __future__ import annotations

import time
from contextlib import nullcontext, suppress
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.text import Text

from nas.cli.options import (
    AddressOption,
    DeviceOption,
    GpusOption,
    JsonOption,
    OutOption,
    RunDir,
    SeedOption,
    StorageOption,
    StudyFile,
    WorkersOption,
    check_device,
    print_json,
    resumable,
    run_folder,
    waiting,
    worker_pool,
)
from nas.cli.progress import Naming, SearchBar, follow, progress_bars
from nas.cli.terminal import notes, out, print_comparison, print_forecast, print_outline, print_status
from nas.contracts import UserError

if TYPE_CHECKING:
    from nas.study import Study


def run(
    study_file: StudyFile,
    searcher: Annotated[
        list[str] | None,
        typer.Option(
            help="Searcher to run, several with commas between or as several options, or `all` of the study's. Default: the first.",
            show_default=False,
        ),
    ] = None,
    trials: Annotated[
        int | None, typer.Option(min=1, help="Proposals. Default: the study's.", show_default=False)
    ] = None,
    seed: SeedOption = 0,
    seeds: Annotated[int, typer.Option(min=1, help="How many seeds of each search, from --seed on.")] = 1,
    out_dir: OutOption = None,
    storage: StorageOption = None,
    device: DeviceOption = "cpu",
    threads: Annotated[
        int,
        typer.Option(min=0, help="CPU threads for training; 0 takes OMP_NUM_THREADS, or all cores. Scores use one."),
    ] = 0,
    workers: WorkersOption = 0,
    gpus_per_worker: GpusOption = 0.0,
    ray_address: AddressOption = None,
    weights_from: Annotated[
        Path | None,
        typer.Option(
            metavar="RUN_DIR",
            help="Run folder whose supernet and features are taken, where this one has none.",
            show_default=False,
        ),
    ] = None,
    patience: Annotated[
        int | None,
        typer.Option(
            min=1, help="End a search after so many schedules that leave its front as it was.", show_default=False
        ),
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Build and check everything without training: images, files, device; say what it would take.",
        ),
    ] = False,
    throughput: Annotated[
        float | None,
        typer.Option(
            min=1,
            help="With --dry-run: MACs a second of another device, to reckon with; without, this one is measured for some seconds.",
            show_default=False,
        ),
    ] = None,
    price: Annotated[
        float | None, typer.Option(min=0, help="With --dry-run: price of an hour of the device.", show_default=False)
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="With --dry-run: print JSON alone.")] = False,
    quiet: Annotated[
        bool, typer.Option("--quiet", "-q", help="No progress bars; no comparison, which `nas compare` makes.")
    ] = False,
) -> None:
    """Train what is missing, search, verify. The same command again goes on where it stopped. `accelerate launch -m nas.cli run STUDY` trains the supernet in several processes."""
    from nas.engine.show import Show
    from nas.engine.storage import check_answers
    from nas.library import StudyRun, check_times
    from nas.study import BASELINE, load_study

    reckoned = {"--json": as_json, "--price": price is not None, "--throughput": throughput is not None}
    for option in [name for name, given in reckoned.items() if given and not dry_run]:
        raise UserError(f"{option} is of what --dry-run reckons; give it too, or leave {option} out")
    study = load_study(study_file)
    first = next(iter(study.searchers), "evolution")
    asked = ",".join(searcher or [first])
    names = list(study.searchers) if asked == "all" else list(dict.fromkeys(asked.split(",")))
    for name in names:
        study.searcher(name)
    if storage is not None:
        check_answers(storage)
    check_device(device)
    if dry_run:
        planned = study if trials is None else replace(study, trials=trials)
        searching = [name for name in names if name != BASELINE]  # which runs before all others anyway
        left_out = {
            "--workers": workers,
            "--gpus-per-worker": gpus_per_worker,
            "--ray-address": ray_address,
            "--weights-from": weights_from,
            "--patience": patience,
        }
        unreckoned = [option for option, given in left_out.items() if given]
        _dry_run(planned, searching, seeds, device, threads, throughput, price, as_json, quiet, unreckoned)
        return
    study.check()
    folder = run_folder(study, out_dir)
    # Seconds of imports, which a study that cannot be read shall not wait for.
    from search_spaces.training.team import helps

    if (place := helps()) is not None:  # one of the processes of `accelerate launch`
        for _ in study.help_to_train(folder, f"cuda:{place}" if device == "cuda" else device):
            pass
        return
    pool = worker_pool(workers, gpus_per_worker, ray_address, device)
    check_times(study, device, pool)
    started = time.monotonic()
    with resumable(folder):
        with progress_bars(quiet) as bars:
            naming = Naming(bars, None if quiet else folder)
            show = Show(naming, partial(SearchBar, bars, objective=study.objectives[0]), pool, waiting)
            opened = StudyRun(study, folder, storage, device, show, study_file)
            if weights_from is not None:
                opened.take_weights(weights_from)
            opened.search(*names, trials=trials, seed=seed, seeds=seeds, threads=threads, patience=patience)
        if not quiet:
            with notes.status("looking at what the scores stand on"):
                opened.look_at_grounds()
            print_comparison(opened.compare())
            notes.print(
                f"{folder} in {time.monotonic() - started:.0f} s; the same command goes on from here",
                highlight=False,
            )


def _dry_run(
    study: Study,
    names: list[str],
    seeds: int,
    device: str,
    threads: int,
    throughput: float | None,
    price: float | None,
    as_json: bool,
    quiet: bool,
    unreckoned: list[str],
) -> None:
    """What it would take by its multiply-adds, then the check, then what it would take here. `unreckoned`: options that change that, and are not looked at."""
    from nas.results.forecast import forecast
    from nas.results.outline import outline

    facts = outline(study, throughput, price, seeds)
    in_words = not (as_json or quiet)
    if in_words:
        print_outline(facts)
    try:
        study.check()
        if throughput is None:
            with nullcontext() if quiet else notes.status(f"measuring {device} for some seconds"):
                here = forecast(study, names, device, threads, seeds=seeds).to_json(names, price)
            if unreckoned:
                here["words"].append(
                    f"{', '.join(unreckoned)}: not reckoned with; this is of one process, from nothing to the last trial"
                )
            facts["here"] = here
    finally:
        if as_json:
            print_json(facts)
    if "here" in facts and in_words:
        print_forecast(facts["here"], device)


def repair(run_dir: RunDir, as_json: JsonOption = False) -> None:
    """Mend a damaged journal: keep every whole trial, set the rest aside in a file."""
    from nas.engine.journal import JOURNAL
    from nas.engine.journal import repair as mend
    from nas.engine.storage import lock_run

    path = run_dir.resolve() / JOURNAL
    if not path.exists():
        raise UserError(f"{path} does not exist; give the folder that `nas run` printed")
    lock = lock_run(run_dir.resolve())
    try:
        done = mend(path)
    finally:
        lock.release()
    if as_json:
        print_json({**asdict(done), "aside": None if done.aside is None else str(done.aside)})
        return
    words = f"{path}: {done.kept} finished trials are whole"
    if done.aside is not None:
        words += (
            f"; {done.again} will be run again, {done.lost} are lost; {done.lines} lines were set aside in {done.aside}"
        )
    out.print(words, highlight=False, soft_wrap=True)


def status(run_dir: RunDir, storage: StorageOption = None, as_json: JsonOption = False) -> None:
    """How far a run is. Reads the run folder alone."""
    from nas.results.report import Run

    with notes.status(Text(f"reading {run_dir}")):  # seconds, where there are many thousands of trials
        facts = Run.open(run_dir, storage).status()
    if as_json:
        print_json(facts)
    else:
        print_status(facts)


def compare(
    run_dir: RunDir,
    storage: StorageOption = None,
    details: Annotated[bool, typer.Option("--details", help="All remarks, not a handful.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Searchers side by side: front, hypervolume, best within budgets, what was spent. Writes <run>/report/front.png and curves.png."""
    from nas.library import compared
    from nas.results.report import Run

    with notes.status(Text(f"comparing the searches of {run_dir}")):
        facts = compared(Run.open(run_dir, storage))
    if as_json:
        print_json(facts)
    else:
        print_comparison(facts, details)


def report(
    study_file: StudyFile,
    out_dir: OutOption = None,
    storage: StorageOption = None,
    device: DeviceOption = "cpu",
    as_json: JsonOption = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress bars.")] = False,
) -> None:
    """Write the run as one self-contained page, <run>/report/index.html; give the dashboard's trials their pictures and notes."""
    from importlib.util import find_spec

    from nas.engine.storage import open_storage
    from nas.library import StudyRun
    from nas.study import load_study

    study = load_study(study_file)
    folder = run_folder(study, out_dir)
    check_device(device)
    opened = StudyRun(study, folder, storage, device, file=study_file)
    with notes.status(Text(f"drawing the report of {folder}")):
        found, loaded = opened.results, opened.loaded
        path = opened.report(loaded)
    if find_spec("optuna_dashboard"):
        from nas.results.dashboard import attach

        place = open_storage(folder, storage or found.facts["storage"])
        with resumable(folder), progress_bars(quiet or as_json) as bars:
            follow(bars, attach(study, study_file, found, place, loaded))
    if as_json:
        print_json({"page": str(path)})
    else:
        out.print(f"{path}", highlight=False, soft_wrap=True)


def dashboard(
    run_dir: RunDir,
    storage: StorageOption = None,
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port on the loopback address.")] = 8080,
) -> None:
    """Open the run in optuna-dashboard, on this machine only."""
    from nas.results.report import Run

    facts = Run.open(run_dir, storage).facts
    from nas.engine.storage import open_storage
    from nas.results.dashboard import serve

    notes.print(f"http://127.0.0.1:{port}/dashboard  (Ctrl-C ends it)", highlight=False)
    with suppress(KeyboardInterrupt):
        serve(run_dir, open_storage(run_dir, storage or facts["storage"]), port)
