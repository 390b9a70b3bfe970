"""Commands that measure before anybody searches: which cheaper scores to trust, and where to divide the timesteps."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Annotated

import typer

from nas.base.files import write_json
from nas.cli.options import (
    AddressOption,
    DeviceOption,
    GpusOption,
    JsonOption,
    OutOption,
    StorageOption,
    StudyFile,
    WorkersOption,
    check_device,
    print_json,
    resumable,
    run_folder,
    worker_pool,
)
from nas.cli.progress import follow, progress_bars
from nas.cli.terminal import print_audit, print_intervals
from nas.contracts import UserError

if TYPE_CHECKING:
    from nas.study import Study


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
    from nas.engine.session import open_session
    from nas.results.audit import TABLE, check_enough, measure, read_table, schedules_to_audit, summary
    from nas.results.plots import draw_audit
    from nas.study import load_study

    study = load_study(study_file)
    if not study.proxies:
        raise UserError(
            f"study {study.name} names no proxies to audit; give it some, such as proxies={{'fd@128': ...}}"
        )
    folder = run_folder(study, out_dir)
    check_device(device)
    study.check()
    audited = schedules_to_audit(study.space, schedules, study.seed)
    check_enough(audited)
    pool = worker_pool(workers, gpus_per_worker, ray_address, device)
    bars = progress_bars(quiet or as_json)
    with resumable(folder), open_session(study, folder, storage, device) as session, bars:
        follow(bars, session.prepare())
        follow(bars, session.on_one_thread(measure(study, folder, schedules, device, pool)))
    rows = read_table(folder / "audit" / TABLE, set(audited), study.objectives[0])
    facts = summary(rows)
    write_json(folder / "audit" / "audit.json", {**facts, "of": sorted(row["digest"] for row in rows)})
    picture = folder / "audit" / "audit.png"
    draw_audit(rows, facts, picture)
    if as_json:
        print_json({**facts, "picture": str(picture)})
    elif not quiet:
        print_audit({**facts, "picture": str(picture)})


def study_share(study: Study) -> float:
    """What the study's limits leave of the full network's multiply-adds; half of them where they say nothing of these."""
    full, most = study.full, study.limits.get
    share = min(most("macs_share", math.inf), most("macs", math.inf) * full["macs_share"] / full["macs"])
    return share if math.isfinite(share) else 0.5


def intervals(
    study_file: StudyFile,
    count: Annotated[
        int | None,
        typer.Option(min=1, help="Intervals. Default: the elbow of the gradients' similarity.", show_default=False),
    ] = None,
    share: Annotated[
        float | None,
        typer.Option(
            min=0,
            max=1,
            help="Budget, of the full net's MACs, guided where the study is. Default: the study's, else 0.5.",
            show_default=False,
        ),
    ] = None,
    grid: Annotated[int, typer.Option(min=3, help="Training timesteps whose gradients are compared.")] = 32,
    out_dir: OutOption = None,
    device: DeviceOption = "cpu",
    as_json: JsonOption = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress bars, no table.")] = False,
) -> None:
    """Divide the timesteps: by gradients, sensitivity, SNR, evenly; and say how well each does. Writes <run>/intervals/."""
    from nas.engine.session import open_session
    from nas.results.plots import draw_intervals
    from nas.study import load_study
    from search_spaces.partitions import Partitions, check_levels
    from search_spaces.stepwise import Stepwise

    study = load_study(study_file)
    if not isinstance(study.space, Stepwise):
        raise UserError(
            f"study {study.name} searches a {type(study.space).__name__}; `nas intervals` divides a Stepwise space"
        )
    check_levels(study.space)
    folder = run_folder(study, out_dir)
    check_device(device)
    study.check()
    limit = study_share(study) if share is None else share
    bars = progress_bars(quiet or as_json)
    with resumable(folder), open_session(study, folder, device=device) as session, bars:
        follow(bars, session.prepare())
        loaded = study.load(folder, device)
        metric = study.objectives[0]
        found = Partitions(
            study.space, loaded, study.images, study.evaluator, folder, study.seed, grid, count, limit, metric
        )
        follow(bars, session.on_one_thread(found.measure()))
    facts = found.facts()
    (folder / "intervals" / "intervals.json").write_text(json.dumps(facts, indent=2) + "\n")
    picture = folder / "intervals" / "intervals.png"
    draw_intervals(facts, picture)
    if as_json:
        print_json({**facts, "picture": str(picture)})
    elif not quiet:
        print_intervals({**facts, "picture": str(picture)})
