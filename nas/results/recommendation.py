"""Which schedule to take, in words: the cheapest that cannot be told from the full network, or else the best within the limits."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from shlex import quote
from typing import Any

from nas.contracts import Trial
from nas.engine.ladder import CONFIDENCE
from nas.results.report import Run
from nas.results.trials import full_network
from nas.study import LedgerInfo

INTERVAL = 1.96
"""Standard errors on each side of 95 %."""


def recommended(run: Run, study_file: str = "STUDY.py") -> dict[str, Any] | None:
    """Of all verified schedules within the limits: `words` with what it saves and what it loses, with its interval, and the `command` to go on with. None where
    none is verified yet."""
    quality, scale = run.facts["objectives"][0], run.scale
    uniform = [t for info, trials in run.ledgers if info.searcher == run.facts["baseline"] for t in trials]
    full = full_network(uniform, quality)
    found = [
        (info, trial)
        for info, trials in run.ledgers
        for trial in trials
        if _fits(info, trial, run) and (full is None or trial.digest != full.digest)
    ]
    if not found:
        return None
    level = [one for one in found if full is not None and _level(one[1], full, quality)]
    if level:
        info, trial = min(level, key=lambda one: scale.share(one[1]))
    else:
        info, trial = min(found, key=lambda one: one[1].objectives((quality,))[0])
    share = scale.share(trial)
    told = {
        "searcher": info.searcher,
        "seed": info.seed,
        "trial": trial.number,
        scale.name: share,
        "command": next_command(study_file, run, info.searcher, info.seed, trial.number),
    }
    called = f"{info.searcher}'s trial {trial.number}" + (f", seed {info.seed}" if info.seed else "")
    what = f"{1 - share:.0%} of the full network's {scale.words} saved, {quality} {trial.objectives((quality,))[0]:.4g}"
    guided = " The full network is guided throughout." if run.guided else ""
    several = f"{len(found)} schedules verified" if len(found) > 1 else "one schedule verified"
    if full is None or full.score is None or trial.score is None:
        return {**told, "words": f"Take {called}: {what}; the best of {several} within the limits.{guided}"}
    difference, error = trial.score.difference(full.score, quality)
    what += f" where the full network has {full.score.values[quality]:.4g}, on the noises that verified both"
    if math.isfinite(error):
        low, high = difference - INTERVAL * error, difference + INTERVAL * error
        told |= {"difference": difference, "interval": [low, high]}
        what += f": {difference:+.2g}, 95 % interval {low:+.2g} to {high:+.2g}, before any fine-tuning"
    if level:
        return {
            **told,
            "words": f"Take {called}: {what}. It is the cheapest that cannot be told from it, of {several} within the limits.{guided}",
        }
    return {
        **told,
        "words": f"Of {several} within the limits none is level with the full network. The best is {called}: {what}.{guided}",
    }


def _fits(info: LedgerInfo, trial: Trial, run: Run) -> bool:
    limits: Mapping[str, float] = run.facts["limits"]
    return (
        info.searcher != run.facts["baseline"]
        and trial.status == "complete"
        and all(trial.cost.get(name, 0.0) <= limit for name, limit in limits.items())
    )


def _level(trial: Trial, full: Trial, quality: str) -> bool:
    """Not shown to lose anything. Where errors are not known, no larger."""
    if trial.score is None or full.score is None:
        return False
    difference, error = trial.score.difference(full.score, quality)
    return difference <= (CONFIDENCE * error if math.isfinite(error) else 0.0)


def next_command(study_file: str, run: Run, searcher: str, seed: int, trial: int) -> str:
    """What to do with a trial, complete for a shell: its export; samples of a network that no folder of stock models can hold."""
    if run.facts.get("exportable", True):
        seeded = f" --seed {seed}" if seed else ""
        return f"nas export {of_trial(study_file, run.folder, searcher, trial)}{seeded} --to exported"
    seeded = f" --search-seed {seed}" if seed else ""
    return f"nas sample {of_trial(study_file, run.folder, searcher, trial)}{seeded} --to samples.png"


def of_trial(study_file: str, folder: Path, searcher: str, trial: int) -> str:
    """What a command is told to mean a trial, for a shell."""
    return f"{quote(study_file)} --out {quote(str(folder))} --searcher {quote(searcher)} --trial {trial}"
