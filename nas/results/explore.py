"""What the report's own chart shows of each verified schedule to who points at it: figures, what runs when, samples, the command."""

from __future__ import annotations

import base64
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from nas.base.files import finite
from nas.contracts import Trial
from nas.results.recommendation import next_command
from nas.results.report import Run
from nas.results.schedules import bars_of, drawn
from nas.results.trials import cost_in_words, verified_front
from nas.study import Study

PICTURED, ROOM = 40, 16 * 2**20
"""Verified schedules of which samples are in the page, those on fronts first, while these are of so many bytes: one of small images has some tens of kilobytes."""


def points(
    study: Study,
    study_file: str,
    run: Run,
    ledgers: Mapping[str, Sequence[Trial]],
    whose: Mapping[str, tuple[str, int]],
    loaded: Any,
    samples_of: Callable[[Trial], Path],
) -> list[dict[str, Any]]:
    """One for each verified schedule of each searcher. `whose`: searcher and seed of each ledger. `samples_of` draws samples, or finds them drawn."""
    quality = study.objectives[0]
    found: list[tuple[bool, Trial, dict[str, Any]]] = []
    for name, trials in ledgers.items():
        front = {trial.number for trial in verified_front(trials, study.objectives)}
        for trial in trials:
            if trial.status != "complete" or trial.score is None:
                continue
            searcher, seed = whose[name]
            found.append(
                (
                    trial.number in front,
                    trial,
                    {
                        "searcher": name,
                        "trial": trial.number,
                        "share": run.scale.share(trial),
                        "value": trial.score.values[quality],
                        "error": finite(trial.score.error(quality)),
                        "front": trial.number in front,
                        "cost": cost_in_words(trial),
                        "figures": {
                            metric: [value, finite(trial.score.error(metric))]
                            for metric, value in trial.score.values.items()
                            if math.isfinite(value)
                        },
                        "schedule": drawn(
                            bars_of(study.space.decode(trial.genome), loaded.supernet), "currentColor", ""
                        ),
                        "command": next_command(study_file, run, searcher, seed, trial.number),
                        "samples": None,
                    },
                )
            )
    room = ROOM
    for _, trial, told in sorted(found, key=lambda one: (not one[0], one[1].number))[:PICTURED]:
        picture = samples_of(trial).read_bytes()
        room -= len(picture)
        if room < 0:
            break
        told["samples"] = "data:image/png;base64," + base64.b64encode(picture).decode()
    return [told for _, _, told in found]
