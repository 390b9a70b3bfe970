"""The command line. Each command imports what it needs, so `nas status` starts in a moment and without torch."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from nas.contracts import UserError
from nas.terminal import (
    SearchBar,
    follow,
    notes,
    out,
    print_audit,
    print_comparison,
    print_intervals,
    print_outline,
    print_status,
    progress_bars,
)

# Read by OpenMP when torch is imported: threads that wait soon sleep instead of spinning, or training on all cores would
# slow down many times over as soon as anything else wants a core.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

if TYPE_CHECKING:
    from nas.contracts import Trial
    from nas.ray_runner import Workers
    from nas.study import Study

app = typer.Typer(
    help="Step-aware neural architecture search for diffusion models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
StudyFile = Annotated[
    str, typer.Argument(metavar="STUDY", help="Python file that defines `study`.", show_default=False)
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
SearcherOption = Annotated[str | None, typer.Option(help="Searcher. Default: the study's first.", show_default=False)]
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


@app.command()
def run(
    study_file: StudyFile,
    searcher: Annotated[
        str | None,
        typer.Option(
            help="Searcher to run, several with commas between, or `all` of the study's. Default: the first.",
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
        int, typer.Option(min=0, help="CPU threads for training; 0 takes all cores. Scores use one.")
    ] = 0,
    workers: WorkersOption = 0,
    gpus_per_worker: GpusOption = 0.0,
    ray_address: AddressOption = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", help="Build and check everything without data, weights or GPU; say what it would take."
        ),
    ] = False,
    throughput: Annotated[
        float | None,
        typer.Option(min=1, help="With --dry-run: MACs a second that the device reaches.", show_default=False),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="With --dry-run: print JSON alone.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress bars, no table.")] = False,
) -> None:
    """Train what is missing, search, verify. The same command again goes on where it stopped."""
    from nas.session import open_session
    from nas.study import BASELINE, load_study

    study = load_study(study_file)
    first = next(iter(study.searchers), "evolution")
    names = list(study.searchers) if searcher == "all" else list(dict.fromkeys((searcher or first).split(",")))
    for name in names:
        study.searcher(name)
    if dry_run:
        from nas.outline import THROUGHPUT, outline

        facts = outline(study, throughput or THROUGHPUT)
        if as_json:
            _print_json(facts)
        else:
            print_outline(facts)
        return
    folder = _run_folder(study, out_dir)
    _check_device(device)
    pool = _pool(workers, gpus_per_worker, ray_address, device)
    with _resumable(folder), open_session(study, folder, storage, device) as session:
        started = time.monotonic()
        with progress_bars(quiet) as bars:
            follow(bars, session.prepare(threads))
            searches = [(name, number) for number in range(seed, seed + seeds) for name in names if name != BASELINE]
            for name, number in ((BASELINE, 0), *searches):
                label = name + (f" (seed {number})" if number else "")
                shown = SearchBar(bars, label, study.objectives[0])
                follow(bars, session.learn(name, number, pool))
                conductor = session.conductor(name, number, trials, shown)
                shown.begin(conductor)
                session.run(conductor, pool)
                shown.end()
        if not quiet:
            print_comparison(_comparison(folder, session.storage))
            notes.print(
                f"{folder} in {time.monotonic() - started:.0f} s; the same command goes on from here",
                highlight=False,
            )


@app.command()
def status(run_dir: RunDir, storage: StorageOption = None, as_json: JsonOption = False) -> None:
    """How far a run is. Reads the run folder alone."""
    from nas.report import Run

    facts = Run.open(run_dir, storage).status()
    if as_json:
        _print_json(facts)
    else:
        print_status(facts)


@app.command()
def compare(run_dir: RunDir, storage: StorageOption = None, as_json: JsonOption = False) -> None:
    """Searchers side by side: front, hypervolume, best within budgets, what was spent. Writes <run>/report/front.png and curves.png."""
    facts = _comparison(run_dir, storage)
    if as_json:
        _print_json(facts)
    else:
        print_comparison(facts)


@app.command()
def report(
    study_file: StudyFile,
    out_dir: OutOption = None,
    storage: StorageOption = None,
    device: DeviceOption = "cpu",
    as_json: JsonOption = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress bars.")] = False,
) -> None:
    """Write the run as one self-contained HTML page, <run>/report/index.html, with its pictures beside it; and give the dashboard's trials
    their pictures and notes."""
    from importlib.util import find_spec

    from nas.ledger import open_storage
    from nas.page import write_page
    from nas.report import Run
    from nas.study import load_study

    study = load_study(study_file)
    folder = _run_folder(study, out_dir)
    _check_device(device)
    found, loaded = Run.open(folder, storage), study.load(folder, device)
    _comparison(folder, storage)
    path = write_page(study, study_file, found, loaded)
    if find_spec("optuna_dashboard"):
        from nas.dashboard import attach

        opened = open_storage(folder, storage or found.facts["storage"])
        with _resumable(folder), progress_bars(quiet or as_json) as bars:
            follow(bars, attach(study, study_file, found, opened, loaded))
    if as_json:
        _print_json({"page": str(path)})
    else:
        out.print(f"{path}", highlight=False, soft_wrap=True)


@app.command()
def audit(
    study_file: StudyFile,
    schedules: Annotated[int, typer.Option(min=10, help="How many; the whole space where it is no larger.")] = 200,
    out_dir: OutOption = None,
    storage: StorageOption = None,
    device: DeviceOption = "cpu",
    workers: WorkersOption = 0,
    gpus_per_worker: GpusOption = 0.0,
    ray_address: AddressOption = None,
    as_json: JsonOption = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress bars, no table.")] = False,
) -> None:
    """Compare the study's proxies with its reference score. Writes <run>/audit/; the same command goes on after a stop."""
    from nas.audit import TABLE, measure, read_table, schedules_to_audit, summary
    from nas.plots import draw_audit
    from nas.session import open_session
    from nas.study import load_study

    study = load_study(study_file)
    if not study.proxies:
        raise UserError(
            f"study {study.name} names no proxies to audit; give it some, such as proxies={{'fd@128': ...}}"
        )
    folder = _run_folder(study, out_dir)
    _check_device(device)
    bars = progress_bars(quiet or as_json)
    with _resumable(folder), open_session(study, folder, storage, device) as session, bars:
        follow(bars, session.prepare())
        pool = _pool(workers, gpus_per_worker, ray_address, device)
        follow(bars, session.on_one_thread(measure(study, folder, schedules, device, pool)))
    rows = read_table(folder / "audit" / TABLE, set(schedules_to_audit(study.space, schedules, study.seed)))
    facts = summary(rows)
    (folder / "audit" / "audit.json").write_text(json.dumps(facts, indent=2) + "\n")
    picture = folder / "audit" / "audit.png"
    draw_audit(rows, facts, picture)
    if as_json:
        _print_json({**facts, "picture": str(picture)})
    elif not quiet:
        print_audit({**facts, "picture": str(picture)})


@app.command()
def intervals(
    study_file: StudyFile,
    count: Annotated[
        int | None,
        typer.Option(min=1, help="Intervals. Default: the elbow of the gradients' similarity.", show_default=False),
    ] = None,
    share: Annotated[
        float | None,
        typer.Option(
            min=0, max=1, help="Budget, of the full net's MACs. Default: the study's, else 0.5.", show_default=False
        ),
    ] = None,
    grid: Annotated[int, typer.Option(min=3, help="Training timesteps whose gradients are compared.")] = 32,
    out_dir: OutOption = None,
    device: DeviceOption = "cpu",
    as_json: JsonOption = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress bars, no table.")] = False,
) -> None:
    """Divide the timesteps: by gradients, sensitivity, SNR, evenly; and say how well each does. Writes <run>/intervals/."""
    from nas.plots import draw_intervals
    from nas.session import open_session
    from nas.study import load_study
    from search_spaces.partitions import Partitions
    from search_spaces.stepwise import Stepwise

    study = load_study(study_file)
    if not isinstance(study.space, Stepwise):
        raise UserError(
            f"study {study.name} searches a {type(study.space).__name__}; `nas intervals` divides a Stepwise space"
        )
    folder = _run_folder(study, out_dir)
    _check_device(device)
    bars = progress_bars(quiet or as_json)
    with _resumable(folder), open_session(study, folder, device=device) as session, bars:
        follow(bars, session.prepare())
        loaded = study.load(folder, device)
        limit = share or study.limits.get("macs_share", 0.5)
        found = Partitions(study.space, loaded, study.images, study.evaluator, folder, study.seed, grid, count, limit)
        follow(bars, session.on_one_thread(found.measure()))
    facts = found.facts()
    (folder / "intervals" / "intervals.json").write_text(json.dumps(facts, indent=2) + "\n")
    picture = folder / "intervals" / "intervals.png"
    draw_intervals(facts, picture)
    if as_json:
        _print_json({**facts, "picture": str(picture)})
    elif not quiet:
        print_intervals({**facts, "picture": str(picture)})


@app.command()
def dashboard(
    run_dir: RunDir,
    storage: StorageOption = None,
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port on the loopback address.")] = 8080,
) -> None:
    """Open the run in optuna-dashboard, on this machine only."""
    from nas.report import Run

    facts = Run.open(run_dir, storage).facts
    from nas.dashboard import serve
    from nas.ledger import open_storage

    notes.print(f"http://127.0.0.1:{port}/dashboard  (Ctrl-C ends it)", highlight=False)
    with suppress(KeyboardInterrupt):
        serve(run_dir, open_storage(run_dir, storage or facts["storage"]), port)


@app.command()
def export(
    study_file: StudyFile,
    to: Annotated[Path, typer.Option(help="New or empty folder.", show_default=False)],
    trial: TrialOption = None,
    within: WithinOption = None,
    searcher: SearcherOption = None,
    seed: SeedOption = 0,
    out_dir: OutOption = None,
    storage: StorageOption = None,
) -> None:
    """Write a trial's networks as stock diffusers folders, with the schedule, provenance and a proof of equality."""
    from nas.export import export as write
    from nas.study import load_study

    study = load_study(study_file)
    folder = _run_folder(study, out_dir)
    chosen, ledger = _choose(study, folder, storage, searcher, seed, trial, within)
    evaluator = study.load(folder, "cpu")
    assert chosen.score is not None
    provenance = {
        "study": study.name,
        "ledger": ledger,
        "trial": chosen.number,
        "genome": chosen.genome,
        "samples": chosen.rung,
        "cost": dict(chosen.cost),
        "score": chosen.score.to_json(),
        "supernet": study.supernet.digest(folder / "supernet"),
        "images": study.images.load().digest,
    }
    write(evaluator.supernet, study.space.decode(chosen.genome), evaluator.sampler, provenance, to.resolve())
    out.print(f"{ledger} trial {chosen.number} ({_summary(chosen, study)}) is in {to}", highlight=False, soft_wrap=True)


@app.command()
def sample(
    study_file: StudyFile,
    to: Annotated[Path, typer.Option(help="A .png grid, or .npy with float32 images in [-1, 1].", show_default=False)],
    trial: TrialOption = None,
    within: WithinOption = None,
    searcher: SearcherOption = None,
    search_seed: Annotated[int, typer.Option(min=0, help="Seed of the search whose trial is meant.")] = 0,
    count: Annotated[int, typer.Option(min=1, help="Images.")] = 64,
    seed: Annotated[
        int, typer.Option(min=0, max=2**32 - 1, help="Seed of the noise; image i depends on it and on i alone.")
    ] = 0,
    out_dir: OutOption = None,
    storage: StorageOption = None,
    device: DeviceOption = "cpu",
) -> None:
    """Draw images with a trial's schedule."""
    import numpy as np

    from nas.study import load_study

    if to.suffix not in (".png", ".npy"):
        raise UserError(f"--to {to} must end in .png or .npy")
    _check_device(device)
    study = load_study(study_file)
    folder = _run_folder(study, out_dir)
    chosen, _ = _choose(study, folder, storage, searcher, search_seed, trial, within)
    images = study.load(folder, device).sample(study.space.decode(chosen.genome), count, seed).cpu().numpy()
    to.parent.mkdir(parents=True, exist_ok=True)
    if to.suffix == ".npy":
        np.save(to, images)
    else:
        from evaluators.images import to_uint8
        from nas.plots import draw_samples

        draw_samples(to_uint8(images), to, scale=max(1, 96 // images.shape[-1]))
    out.print(
        f"{count} images of trial {chosen.number} ({_summary(chosen, study)}) are in {to}",
        highlight=False,
        soft_wrap=True,
    )


@app.command()
def train(
    export_dir: Annotated[
        Path, typer.Argument(metavar="EXPORT_DIR", help="Folder that `nas export` wrote.", show_default=False)
    ],
    images: Annotated[
        str,
        typer.Option(
            help="Folder of pictures, .npy in [-1, 1], or `digits` (`digits:16` enlarged).", show_default=False
        ),
    ],
    study_file: Annotated[
        str | None,
        typer.Option("--study", help="Study whose evaluator scores it, before and after.", show_default=False),
    ] = None,
    out_dir: OutOption = None,
    storage: StorageOption = None,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Gradient steps of all networks together.", show_default=False)
    ] = None,
    batch: Annotated[int | None, typer.Option(min=1, help="Images of a step.", show_default=False)] = None,
    learning_rate: Annotated[float | None, typer.Option(min=0, help="Peak of a cosine.", show_default=False)] = None,
    distillation: Annotated[
        float | None,
        typer.Option(min=0, max=1, help="Share of the full network's prediction in the target.", show_default=False),
    ] = None,
    features: Annotated[
        float | None,
        typer.Option(min=0, help="Weight of the distance of blocks' maps to the full network's.", show_default=False),
    ] = None,
    precision: Annotated[str | None, typer.Option(help="no, bf16 or fp16.", show_default=False)] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Of the noises.", show_default=False)] = None,
    device: DeviceOption = "cpu",
    as_json: JsonOption = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress bars.")] = False,
) -> None:
    """Fine-tune the networks of an exported folder into EXPORT_DIR/trained, each on the timesteps it serves, with distillation from the full
    network. The same command goes on after a stop. With --study, score and book the result."""
    from nas.handover import fine_tune, read_plan, score_and_book
    from nas.study import load_study

    folder = export_dir.resolve()
    plan = read_plan(folder)
    _check_device(device)
    study = load_study(study_file) if study_file else None
    run_folder = _run_folder(study, out_dir) if study else None
    given = {
        "steps": steps,
        "batch": batch,
        "learning_rate": learning_rate,
        "distillation": distillation,
        "features": features,
        "precision": precision,
        "seed": seed,
    }
    settings = {**plan["settings"], **{name: value for name, value in given.items() if value is not None}}
    bars = progress_bars(quiet or as_json)
    facts: dict[str, Any] = {"trained": str(folder / "trained")}
    with _resumable(folder), bars:
        from search_spaces.train_diffusers import Settings
        from search_spaces.train_diffusers import train as begin

        ticks = begin(folder, _pixels(images, plan["shape"]), Settings(**settings), device == "cpu")
        follow(bars, fine_tune(ticks, folder))
        if study is not None and run_folder is not None:
            facts |= follow(bars, score_and_book(study, run_folder, storage, folder / "trained", device))
    if as_json:
        _print_json(facts)
    elif not quiet:
        out.print(facts["trained"], highlight=False, soft_wrap=True)
        if "words" in facts:
            out.print(facts["words"], highlight=False, soft_wrap=True)


def _pixels(images: str, shape: Sequence[int]) -> Any:
    """Of a named set, a folder or an array; (n, channels, height, width) in [-1, 1]."""
    from search_spaces.train_diffusers import read_images

    name, _, size = images.partition(":")
    if name == "digits":
        from evaluators.images import Digits

        pixels = Digits(int(size or 8)).load().pixels
        if pixels.shape[1:] != tuple(shape):
            raise UserError(
                f"--images {images} are {pixels.shape[1:]}, the networks take {tuple(shape)}; use digits:{shape[-1]}"
            )
        return pixels
    path = Path(images)
    if not path.exists():
        raise UserError(f"--images {images} does not exist; give a folder of pictures, an .npy file, or digits")
    try:
        return read_images(path, shape[0], shape[1:])
    except SystemExit as error:
        raise UserError(str(error)) from error


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


# --------------------------------------------------------------------------------------------------------------- helpers


def _choose(
    study: Study,
    folder: Path,
    storage: str | None,
    searcher: str | None,
    seed: int,
    trial: int | None,
    within: str | None,
) -> tuple[Trial, str]:
    """The trial that --trial or --within means, and the name of its ledger."""
    from nas.report import Run, best_within

    if (trial is None) == (within is None):
        raise UserError("say which trial: either --trial N or --within COST=LIMIT")
    ledgers = {(info.searcher, info.seed): (info, trials) for info, trials in Run.open(folder, storage).ledgers}
    wanted = (searcher or next(iter(study.searchers), "evolution"), seed)
    if wanted not in ledgers:
        known = ", ".join(f"{name} (seed {s})" for name, s in ledgers)
        raise UserError(f"{folder} has no trials of searcher {wanted[0]} with seed {seed}; it has {known or 'none'}")
    info, trials = ledgers[wanted]
    if info.provenance != study.ledger_info(folder, *wanted).provenance:
        raise UserError(
            f"{folder} was searched under another study than {study.name} is now; restore the study file or its supernet"
        )
    if within is not None:
        name, _, limit = within.partition("=")
        try:
            return best_within(trials, name, float(limit), study.objectives[0]), info.name
        except ValueError:
            raise UserError(f"--within {within} is not COST=LIMIT, such as macs_share=0.5") from None
    chosen = next((t for t in trials if t.number == trial), None)
    if chosen is None or chosen.score is None:
        raise UserError(f"{info.name} has no scored trial {trial}; it has numbers 0 to {len(trials) - 1}")
    return chosen, info.name


def _pool(count: int, gpus: float, address: str | None, device: str) -> Workers | None:
    """Ray workers, where any option asks for them."""
    if not (count or gpus or address):
        return None
    from nas.ray_runner import Workers

    return Workers(count or 1, gpus, address, device)


@contextmanager
def _resumable(folder: Path) -> Iterator[None]:
    """Ctrl-C ends the work, not what is kept."""
    try:
        yield
    except KeyboardInterrupt:
        notes.print(
            f"interrupted; the same command goes on from the last trial or checkpoint ({folder})", highlight=False
        )
        raise SystemExit(130) from None


def _comparison(run_dir: Path, storage: Any) -> dict[str, Any]:
    from nas.plots import draw_curves, draw_front
    from nas.report import Run

    found = Run.open(run_dir, storage)
    facts = found.compare()
    ledgers = {row["searcher"]: trials for row, (_, trials) in zip(facts["searchers"], found.ledgers, strict=True)}
    picture = run_dir / "report" / "front.png"
    draw_front(ledgers, found.facts, facts["label"], picture)
    curves = run_dir / "report" / "curves.png"
    draw_curves(facts["searchers"], facts["area_until_macs"], curves)
    return {**facts, "picture": str(picture), "curves": str(curves)}


def _summary(trial: Trial, study: Study) -> str:
    values = zip(study.objectives, trial.objectives(study.objectives), strict=True)
    return f"{trial.cost['macs_share']:.1%} of the MACs, " + ", ".join(f"{name} {value:.4g}" for name, value in values)


def _run_folder(study: Study, out_dir: Path | None) -> Path:
    return (out_dir or Path("runs") / study.name).resolve()


def _check_device(device: str) -> None:
    import torch

    from nas.ledger import first_line

    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device {device!r} cannot be used ({first_line(error)}); use --device cpu") from error


def _print_json(data: Mapping[str, Any]) -> None:
    print(json.dumps(data, indent=2))


if __name__ == "__main__":
    main()
