"""The command that puts schedules to the test: trained beside the full network, by a protocol written down before."""

from __future__ import annotations

import re
from functools import partial
from typing import Annotated, Any

import typer

from nas.cli.options import (
    DeviceOption,
    JsonOption,
    OutOption,
    SearcherOption,
    SeedOption,
    StorageOption,
    StudyFile,
    TrialOption,
    check_device,
    print_json,
    resumable,
    run_folder,
    several_of,
)
from nas.cli.progress import follow, progress_bars
from nas.cli.terminal import notes, out
from nas.contracts import UserError


def confirm(
    study_file: StudyFile,
    within: Annotated[
        str | None,
        typer.Option(
            metavar="COST=LIMIT[,LIMIT]",
            help="The best verified trial within a budget, such as macs_share=0.5; of several, one after another, the largest first, until something is lost.",
            show_default=False,
        ),
    ] = None,
    trial: TrialOption = None,
    searcher: SearcherOption = None,
    seed: SeedOption = 0,
    seeds: Annotated[
        int, typer.Option(min=2, max=1000, help="Trainings of the schedule, and of the full network.")
    ] = 3,
    steps: Annotated[int, typer.Option(min=1, help="Gradient steps of the full network.")] = 1000,
    batch: Annotated[int | None, typer.Option(min=1, help="Images of a step.", show_default=False)] = None,
    learning_rate: Annotated[float | None, typer.Option(min=0, help="Peak of a cosine.", show_default=False)] = None,
    distillation: Annotated[
        float,
        typer.Option(
            min=0,
            max=1,
            help="Share of the full network's prediction in the target; none of it, so that neither is taught by the other.",
        ),
    ] = 0.0,
    margin: Annotated[
        float,
        typer.Option(
            min=0.001,
            max=1,
            help="What still counts as no loss: a share of what the full network's distance is above that of equally many real images.",
        ),
    ] = 0.05,
    name: Annotated[
        str | None, typer.Option(help="Name of the claim. Default: the budget, or the trial.", show_default=False)
    ] = None,
    protocol_only: Annotated[
        bool, typer.Option("--protocol-only", help="Write the protocol, for a commit of yours, and train nothing yet.")
    ] = False,
    out_dir: OutOption = None,
    storage: StorageOption = None,
    device: DeviceOption = "cpu",
    as_json: JsonOption = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress bars.")] = False,
) -> None:
    """Train a schedule and the full network equally, with several seeds, and say whether anything is lost: named before, judged on held-out images
    and on noises that nothing was chosen on. Of several budgets: how much can be saved. The same command goes on after a stop."""
    from nas.engine.show import Show
    from nas.evidence.confirm import PROTOCOL
    from nas.evidence.verdict import in_short
    from nas.library import StudyRun
    from nas.study import load_study

    study = load_study(study_file)
    folder = run_folder(study, out_dir)
    check_device(device)
    called = name or re.sub(r"\s*[=,]\s*", "-", (within or f"trial-{trial}").strip())
    if not re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9_.-]*", called):
        raise UserError(f"--name {called} is no plain name; use letters, digits, dots, dashes and underscores")
    given = {"batch": batch, "learning_rate": learning_rate}
    training: dict[str, Any] = {
        "steps": steps,
        "distillation": distillation,
        **{key: value for key, value in given.items() if value is not None},
    }
    bars = progress_bars(quiet or as_json)
    run = StudyRun(study, folder, storage, device, Show(partial(follow, bars)))
    with resumable(folder), bars:
        chosen = several_of(run, searcher, seed, trial, within)
        made = run.confirmation(chosen, called, seeds, margin, training)
        if protocol_only:
            made.write_down()
        else:
            verdicts = run.put_to_the_test(made)
    path = made.place / PROTOCOL
    if protocol_only:
        if as_json:
            print_json({"protocol": str(path), "digest": made.protocol.digest})
        else:
            out.print(f"{path}: {made.protocol.question} Nothing is trained yet.", highlight=False, soft_wrap=True)
        return
    several, short = "," in (within or ""), in_short(verdicts, len(made.sequence))
    if as_json:
        told = [verdict.to_json() for verdict in verdicts]
        whole = {"verdicts": told, "words": short} if several else told[0]
        print_json({**whole, "folder": str(made.place)})
        return
    for verdict in verdicts:
        for line in (verdict.words, *(f"  {judge.words}" for judge in verdict.judges), verdict.advice):
            if line:
                out.print(line, highlight=False, soft_wrap=True)
    if several:
        out.print(short, highlight=False, soft_wrap=True)
    if not quiet:
        notes.print(
            f"protocol {made.protocol.digest}, scores and trained networks: {made.place}",
            highlight=False,
            soft_wrap=True,
        )
