"""Successive halving on the sample count: who is scored again with more samples, and when.

Asynchronous: a rung's leaders go on as soon as enough others have been scored, while the search still proposes. Only the last
rung, which verifies, waits for the search to end: whoever is verified should be ahead of everyone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from nas.contracts import Trial
from nas.pareto import best_first

CONFIDENCE = 2.0
"""Standard errors of a paired difference beyond which two scores are told apart."""


@dataclass(frozen=True)
class Ladder:
    """`trials` schedules start on the first of `rungs`, `verified` of them reach the last, each rung between keeps the same
    share of the one below. `everything`: all go up, whatever their scores, the limits notwithstanding.
    """

    rungs: tuple[int, ...]
    objectives: tuple[str, ...]
    trials: int
    verified: int
    everything: bool = False

    def room(self, level: int) -> int:
        """How many schedules rung number `level` is meant for."""
        if level == 0 or self.everything:
            return self.trials
        kept = min(self.verified, self.trials) / self.trials
        return round(self.trials * math.pow(kept, level / (len(self.rungs) - 1)))

    def next(self, trials: Sequence[Trial], searching: bool) -> Trial | None:
        """The trial to score again on the rung above its own; None where there is none yet. A function of the trials alone, so
        a resumed run promotes the same ones."""
        quiet = not searching
        for level, (lower, upper) in enumerate(zip(self.rungs, self.rungs[1:], strict=False)):
            last = level + 2 == len(self.rungs)
            quiet = quiet and not any(t.rung == lower and t.status == "running" for t in trials)
            if last and searching:
                return None
            tried = {trial.digest for trial in trials if trial.rung == upper}
            scored = len({trial.digest for trial in trials if trial.scored and trial.rung == lower})
            room = self.room(level + 1)
            if not quiet:
                room = math.floor(room / self.room(level) * scored)
                if len(tried) >= room:
                    continue
            waiting = [t for t in self.leaders(trials, lower)[:room] if t.digest not in tried]
            if waiting:
                return min(waiting, key=lambda trial: trial.number)
            quiet = quiet and not any(t.rung == upper and t.status == "running" for t in trials)
        return None

    def leaders(self, trials: Sequence[Trial], rung: int) -> list[Trial]:
        """The feasible schedules of a rung that are ahead, or not told apart from those ahead, best first: by rank, within a
        rank those that spread it most. One trial per schedule."""
        scored: dict[str, Trial] = {}
        for trial in trials:
            feasible = self.everything or all(excess <= 0 for excess in trial.violations.values())
            if trial.scored and trial.rung == rung and feasible:
                scored.setdefault(trial.digest, trial)
        candidates = list(scored.values())
        if not candidates:
            return []
        beaten = clearly_beaten(candidates, self.objectives)
        order = best_first(np.array([trial.objectives(self.objectives) for trial in candidates]))
        return [candidates[i] for i in order if self.everything or not beaten[i]]


def clearly_beaten(trials: Sequence[Trial], objectives: Sequence[str]) -> npt.NDArray[np.bool_]:
    """For each trial of one rung: is there another that costs no more and is better in every measured objective by more
    than the paired standard error allows? (n,)"""
    values = np.array([trial.objectives(objectives) for trial in trials])
    beats = np.ones((len(trials), len(trials)), dtype=bool)  # [i, j]: i beats j
    for column, name in enumerate(objectives):
        difference = values[:, None, column] - values[None, :, column]
        if name in trials[0].cost:
            beats &= difference <= 0
        else:
            beats &= difference < -CONFIDENCE * paired_errors(trials, name)
    if all(name in trials[0].cost for name in objectives):
        beats = beats & ~beats.T
    return np.asarray(beats.any(0))


def paired_errors(trials: Sequence[Trial], name: str) -> npt.NDArray[np.float64]:
    """Jackknife standard error of the difference of each pair of scores, (n, n); 0 where a score has no replicates."""
    replicates = [trial.score.replicates.get(name, ()) if trial.score else () for trial in trials]
    if len({len(values) for values in replicates}) != 1 or len(replicates[0]) < 2:
        return np.zeros((len(trials), len(trials)))
    centred = np.array(replicates) - np.mean(replicates, axis=1, keepdims=True)
    products = centred @ centred.T
    squares = np.diag(products)
    spread = np.maximum(squares[:, None] + squares[None] - 2 * products, 0.0)
    count = len(replicates[0])
    errors: npt.NDArray[np.float64] = np.sqrt((count - 1) / count * spread)
    return errors
