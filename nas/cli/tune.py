"""The command that makes a faster schedule for a pipeline folder."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nas.cli.options import (
    DeviceOption,
    GpusOption,
    JsonOption,
    WorkersOption,
    check_device,
    print_json,
    resumable,
    worker_pool,
)
from nas.cli.progress import Naming, SearchBar, progress_bars
from nas.cli.terminal import notes, out
from nas.contracts import UserError

if TYPE_CHECKING:
    from nas.tuning.found import Found


def tune(
    pipeline: Annotated[
        Path,
        typer.Argument(
            metavar="PIPELINE_FOLDER",
            help="Local folder of a diffusers pipeline; nothing is downloaded.",
            show_default=False,
        ),
    ],
    within: Annotated[
        str,
        typer.Option(
            metavar="MEASURE=SHARE",
            help="What a schedule may take of the full pipeline's time or macs, such as time=0.5.",
            show_default=False,
        ),
    ],
    to: Annotated[
        Path | None, typer.Option(help="Folder for schedule and report. Default: tuned/<pipeline>.", show_default=False)
    ] = None,
    steps: Annotated[
        str,
        typer.Option(
            help="Steps of the full pipeline that schedules choose from; several with commas, each a schedule of its own; weights, times and first tries are shared."
        ),
    ] = "20",
    full_steps: Annotated[
        int | None,
        typer.Option(
            min=2,
            help="Steps of the full pipeline that they are compared with; the limit stays a share of --steps. Default: as many.",
            show_default=False,
        ),
    ] = None,
    guidance: Annotated[
        float | None,
        typer.Option(
            min=1,
            help="The full pipeline's guidance, 1 for none. Default: the usual one of Stable Diffusion, XL, DiT and PixArt; of other conditional pipelines say it.",
            show_default=False,
        ),
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(help="Text file with a prompt in each line, where the network reads texts.", show_default=False),
    ] = None,
    labels: Annotated[
        str, typer.Option(help="Classes to ask for, with commas, or `all`, where the network takes labels.")
    ] = "all",
    extractor: Annotated[
        Path | None,
        typer.Option(
            help="TorchScript or .pt2 file of features, for a perceptual distance too. It is run.", show_default=False
        ),
    ] = None,
    start: Annotated[
        Path | None,
        typer.Option(
            help="schedule.json of another model, resolution or number of steps: tried first, and searched from where it loses.",
            show_default=False,
        ),
    ] = None,
    trials: Annotated[int, typer.Option(min=10, help="Schedules to score.")] = 240,
    samples: Annotated[str, typer.Option(help="Samples that search, and others that verify.")] = "32,256",
    batch: Annotated[
        int | None,
        typer.Option(min=1, help="Images of a call whose time is measured. Default: 4.", show_default=False),
    ] = None,
    out_dir: Annotated[
        Path | None,
        typer.Option("--out", help="Folder of the run folders. Default: runs/tune-<pipeline>.", show_default=False),
    ] = None,
    write_study: Annotated[
        Path | None, typer.Option(help="Write the study here too, to go on by hand.", show_default=False)
    ] = None,
    device: DeviceOption = "cpu",
    workers: WorkersOption = 0,
    gpus_per_worker: GpusOption = 0.0,
    as_json: JsonOption = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress bars.")] = False,
) -> None:
    """Make a faster schedule for the pipeline in a folder, without training: which steps run, which blocks at each, and where guidance is on."""
    from nas.engine.show import Show
    from nas.library import on_workers
    from nas.tuning.page import check_target, compared
    from nas.tuning.study import LOSS, Wanted
    from nas.tuning.tune import read_file
    from nas.tuning.tune import tune as search

    measure, _, share = within.partition("=")
    if measure not in ("time", "macs") or _number(share) is None:
        raise UserError(f"--within {within} is not time=SHARE or macs=SHARE, such as time=0.5")
    counts = _numbers("--steps", steps)
    few = _numbers("--samples", samples)
    if len(few) != 2 or not 2 <= few[0] < few[1]:
        raise UserError(f"--samples {samples} must be two numbers, the second larger, such as 32,256")
    if batch is not None and measure == "macs":
        raise UserError(
            f"--batch {batch} is of calls that are timed, and --within {within} times none; leave it out, or limit time"
        )
    if not pipeline.is_dir():
        raise UserError(f"{pipeline} is no folder; give that of a local diffusers pipeline")
    if write_study is not None and write_study.is_dir():
        raise UserError(f"--write-study {write_study} is a folder; give a file, such as {write_study / 'study.py'}")
    check_device(device)
    if gpus_per_worker and not device.startswith("cuda"):
        raise UserError(
            f"calls are timed and pictures sampled on --device {device}, but workers with GPUs compute on cuda; give --device cuda too"
        )
    pool = worker_pool(workers, gpus_per_worker, None, device)
    name = pipeline.resolve().name
    into, runs = to or Path("tuned") / name, out_dir or Path("runs") / f"tune-{name}"
    several = len(counts) > 1
    targets = [into / f"{count}-steps" if several else into for count in counts]
    for target in targets:
        check_target(target)
    plan = None if start is None else read_file(start)
    wanted = Wanted(
        pipeline.resolve(),
        measure,  # type: ignore[arg-type]
        float(share),
        counts[0],
        full_steps,
        guidance,
        prompts,
        () if labels == "all" else tuple(_numbers("--labels", labels)),
        extractor,
        (few[0], few[1]),
        batch or 4,
        trials,
    )
    each = [replace(wanted, steps=count) for count in counts]
    for one in each:  # before the first is searched
        one.check()
    made: list[_Made] = []
    with on_workers(pool):
        for asked, count, target in zip(each, counts, targets, strict=True):
            folder = (runs / f"{count}-{measure}-{wanted.limit:g}").resolve()
            beside = made[-1].folder if made else None
            # A first try at another number of steps.
            also = next((read_file(one.schedule) for one in reversed(made) if one.schedule), None)
            with resumable(folder), progress_bars(quiet or as_json) as bars:
                show = Show(
                    Naming(bars, None if quiet or as_json else folder), partial(SearchBar, bars, objective=LOSS), pool
                )
                found = search(asked, folder, show, device, plan, beside, also)
                by_hand = write_study
                if by_hand is not None and several:
                    by_hand = by_hand.with_stem(f"{by_hand.stem}-{count}")
                made.append(_written(found, target, folder, by_hand, device))
            if not as_json:
                made[-1].say()
    together = compared([one.found for one in made])
    if as_json:
        print_json({"schedules": [one.to_json() for one in made], "together": together})
    elif together:
        out.print(together, highlight=False, soft_wrap=True)


@dataclass(frozen=True)
class _Made:
    """What was found for one number of steps, where it and its run folder lie, and why other formats cannot say it."""

    found: Found
    target: Path
    folder: Path
    left_out: Sequence[str]

    @property
    def schedule(self) -> Path | None:
        """None where nothing found is worth a file."""
        from nas.tuning.page import SCHEDULE

        return None if self.found.far else self.target / SCHEDULE

    @property
    def report(self) -> Path:
        return self.target / "report.html"

    def to_json(self) -> dict[str, Any]:
        return {
            "steps": self.found.wanted.steps,
            "schedule": self.schedule and str(self.schedule),
            "report": str(self.report),
            "run": str(self.folder),
            "verdict": self.found.verdict,
            "searched": self.found.searched,
            "share": self.found.chosen.share,
            "loss": self.found.chosen.loss,
            "apart": self.found.apart,
            "spent_samples": self.found.spent["samples"],
            "other_formats": self.left_out,
        }

    def say(self) -> None:
        from nas.tuning.page import usage

        for words in self.found.verdict:
            out.print(words, highlight=False, soft_wrap=True)
        for words in self.left_out:
            notes.print(words, highlight=False, soft_wrap=True)
        files = [str(file) for file in (self.schedule, self.report) if file]
        out.print(", ".join(files), highlight=False, soft_wrap=True)
        if self.schedule:
            notes.print(usage(self.found, self.target, self.folder), highlight=False, soft_wrap=True)


def _written(found: Found, target: Path, folder: Path, by_hand: Path | None, device: str) -> _Made:
    """Schedule, report and study in the target; the study in another file too, for who goes on by hand."""
    from nas.tuning.page import SCHEDULE, aside_of, keep_study, study_file, write_found

    for path in filter(None, (target / "study.py", by_hand)):
        path.parent.mkdir(parents=True, exist_ok=True)
        if aside := keep_study(path, study_file(found, folder)):
            notes.print(f"{path} was another study, which is now {aside}", highlight=False, soft_wrap=True)
    evaluator = found.study.load(folder, device)
    sampler = evaluator.sampler_of(found.chosen.schedule)
    schedule, before = target / SCHEDULE, None
    if schedule.exists():
        before = aside_of(schedule)
        shutil.copy(schedule, before)
    try:
        left_out = write_found(found, evaluator.supernet, sampler, target, folder)
    finally:
        if before is not None and schedule.exists() and schedule.read_bytes() == before.read_bytes():
            before.unlink()
    if before is not None and before.exists():
        notes.print(f"{schedule} was another schedule, which is now {before}", highlight=False, soft_wrap=True)
    return _Made(found, target, folder, left_out)


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _numbers(option: str, text: str) -> list[int]:
    try:
        found = [int(part) for part in text.split(",")]
    except ValueError:
        raise UserError(f"{option} {text} must be whole numbers with commas between") from None
    return found
