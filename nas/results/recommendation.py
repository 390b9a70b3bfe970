"""Which schedule to take, in words: the cheapest that cannot be told from the full network, or else the best within the limits."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from shlex import quote
from typing import Any, NamedTuple

from scipy.stats import t as student

from nas.contracts import Trial
from nas.engine.ladder import CONFIDENCE
from nas.results.report import Run
from nas.results.trials import full_network
from nas.study import LedgerInfo


class Pick(NamedTuple):
    """A schedule to take, the full network, whether the two are level, and of how many it was taken."""

    info: LedgerInfo
    trial: Trial
    full: Trial | None
    level: bool
    among: int


def picked(run: Run) -> Pick | None:
    """Of all verified schedules within the limits. None where none is verified yet."""
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
    return Pick(info, trial, full, bool(level), len(found))


def compared_of(run: Run) -> list[Trial]:
    """Whose difference is told, to be scored on noises on which neither was chosen: the schedule to take, and the full network."""
    pick = picked(run)
    return [] if pick is None or pick.full is None else [pick.trial, pick.full]


def recommended(run: Run, study_file: str = "STUDY.py") -> dict[str, Any] | None:
    """What `picked` finds in `words`, with what it saves and what it loses, with its interval, and the `command` to go on with. None where none is verified yet."""
    pick = picked(run)
    if pick is None:
        return None
    quality, scale = run.facts["objectives"][0], run.scale
    info, trial, full, level, among = pick
    share = scale.share(trial)
    told = {
        "searcher": info.searcher,
        "seed": info.seed,
        "trial": trial.number,
        scale.name: share,
        "command": next_command(study_file, run, info.searcher, info.seed, trial.number),
    }
    called = f"{info.searcher}'s trial {trial.number}" + (f", seed {info.seed}" if info.seed else "")
    mine, theirs = (None if one is None else run.confirmed.get(one.digest) for one in (trial, full))
    again = mine is not None and theirs is not None
    if not again:
        mine, theirs = (None if one is None else one.score for one in (trial, full))
    value = trial.objectives((quality,))[0] if mine is None else mine.values[quality]
    what = f"{1 - share:.0%} of the full network's {scale.words} saved, {quality} {value:.4g}"
    guided = " The full network is guided throughout." if run.guided else ""
    several = f"{among} schedules verified" if among > 1 else "one schedule verified"
    if mine is None or theirs is None:
        return {**told, "words": f"Take {called}: {what}; the best of {several} within the limits.{guided}"}
    difference, error = mine.difference(theirs, quality)
    noises = "noises that chose neither" if again else "the noises that verified both, and chose it"
    what += f" where the full network has {theirs.values[quality]:.4g}, on {noises}"
    if math.isfinite(error):
        # As many blocks as replicates were left out in turn.
        wide = float(student.ppf(0.975, len(mine.replicates[quality]) - 1)) * error
        low, high = difference - wide, difference + wide
        told |= {"difference": difference, "interval": [low, high]}
        what += f": {difference:+.2g}, 95 % interval {low:+.2g} to {high:+.2g}, before any fine-tuning"
    if level:
        apart = again and (low if math.isfinite(error) else difference) > 0
        still = " On these noises it can be told from it." if apart else ""
        return {
            **told,
            "words": f"Take {called}: {what}. It is the cheapest that cannot be told from it, of {several} within the limits.{still}{guided}",
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
