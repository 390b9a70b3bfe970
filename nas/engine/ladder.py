"""Successive halving on the sample count: who is scored again with more samples, and when.

Asynchronous: a rung's leaders go on as soon as enough others have been scored, while the search still proposes. Only the last
rung, which verifies, waits for the search to end: whoever is verified should be ahead of everyone.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice, pairwise

import numpy as np
import numpy.typing as npt

from nas.contracts import Trial
from nas.genomes.pareto import best_first

FAILURES_PER_GENOME = 2
"""After which a schedule is given up on a rung."""

CONFIDENCE = 2.0
"""Standard errors of a paired difference beyond which two scores are told apart."""


@dataclass(frozen=True)
class Ladder:
    """`trials` schedules start on the first of `rungs`, `verified` of them reach the last, each rung between keeps the same
    share of the one below. `everything`: all go up, whatever their scores, the limits notwithstanding. `patience`: so many schedules on the first rung that leave
    its front, and so its hypervolume, as it was end the search early.
    """

    rungs: tuple[int, ...]
    objectives: tuple[str, ...]
    trials: int
    verified: int
    everything: bool = False
    patience: int | None = None

    def room(self, level: int) -> int:
        """How many schedules rung number `level` is meant for."""
        if level == 0 or self.everything:
            return self.trials
        kept = min(self.verified, self.trials) / self.trials
        return round(self.trials * math.pow(kept, level / (len(self.rungs) - 1)))

    def planned(self) -> list[tuple[int, int]]:
        """For each rung, how many schedules it is meant for, and their samples. Of one rung alone all are verified on it."""
        return [(self.room(level), samples) for level, samples in enumerate(self.rungs)]

    def next(self, trials: Sequence[Trial], searching: bool) -> Trial | None:
        """The trial to score again on the rung above its own; None where there is none yet. A function of the trials alone, so
        a resumed run promotes the same ones."""
        return Climb(self, trials).next(searching)

    def leaders(self, trials: Sequence[Trial], rung: int) -> list[Trial]:
        """The feasible schedules of a rung that are ahead, or not told apart from those ahead, best first: by rank, within a
        rank those that spread it most. One trial per schedule."""
        return list(Climb(self, trials).leaders(rung))

    def admits(self, trial: Trial) -> bool:
        """Whether it may lead: scored and within the limits."""
        return trial.scored and (self.everything or all(excess <= 0 for excess in trial.violations.values()))


class Climb:
    """A ladder and the trials on it, kept up to date trial by trial: what happens next costs the same however many there are."""

    def __init__(self, ladder: Ladder, trials: Iterable[Trial] = ()) -> None:
        self._ladder = ladder
        self._rungs = {rung: _Rung() for rung in ladder.rungs}
        for trial in trials:
            self.note(trial)

    def note(self, trial: Trial) -> None:
        """To be told of every trial as it is opened and again as it is closed."""
        rung = self._rungs.get(trial.rung)
        if rung is None:  # of a ledger that had other rungs
            return
        rung.tried.add(trial.digest)
        if trial.status == "running":
            rung.running.add(trial.number)
            return
        rung.running.discard(trial.number)
        if trial.status == "failed":
            rung.failures[trial.digest] += 1
        if trial.scored:
            rung.scored.add(trial.digest)
            rung.failures.pop(trial.digest, None)
        if self._ladder.admits(trial) and trial.digest not in rung.candidates:
            rung.candidates[trial.digest] = trial
            rung.fresh.append(trial)
            rung.order = None

    def next(self, searching: bool) -> Trial | None:
        """As `Ladder.next` of all trials."""
        ladder, quiet = self._ladder, not searching
        for level, (lower, upper) in enumerate(pairwise(ladder.rungs)):
            below, above = self._rungs[lower], self._rungs[upper]
            quiet = quiet and not below.running
            if level + 2 == len(ladder.rungs) and searching:
                return None
            room = ladder.room(level + 1)
            if not quiet:
                room = math.floor(room / ladder.room(level) * len(below.scored))
                if len(above.tried) >= room:
                    continue
            # Who is given up there keeps nobody's place. Where all leaders have room their order is of no matter, which costs more the more there are.
            few = None if quiet else self._unbeaten(below)
            ahead = few if few is not None and len(few) <= room else self.leaders(lower)
            leaders = (t for t in ahead if above.failures[t.digest] < FAILURES_PER_GENOME)
            waiting = [t for t in islice(leaders, room) if t.digest not in above.tried]
            if waiting:
                return min(waiting, key=lambda trial: trial.number)
            quiet = quiet and not above.running
        return None

    def _unbeaten(self, rung: _Rung) -> list[Trial] | None:
        """The leaders in no order; None where all are. Whoever beats another beats all whom that one beats, so that who comes later is compared with these alone."""
        if self._ladder.everything:
            return None
        for trial in rung.fresh:
            others = [*rung.unbeaten, trial]
            beaten = _Beaten(others, self._ladder.objectives)
            if not beaten(len(others) - 1):
                rung.unbeaten = [one for i, one in enumerate(others) if not beaten(i)]
        rung.fresh.clear()
        return rung.unbeaten

    def leaders(self, rung: int) -> Iterator[Trial]:
        """As `Ladder.leaders` of all trials, one after another."""
        here = self._rungs[rung]
        if not here.candidates:
            return
        if here.order is None:
            here.order = _Order([*here.candidates.values()], self._ladder.objectives)
        yield from here.order.trials if self._ladder.everything else here.order.leaders()


@dataclass
class _Rung:
    """`tried`, `scored`: digests of schedules; `failures`: how often one failed that has no score. `running`: numbers of trials. `candidates`: who may lead, one
    for each schedule; `unbeaten`: of those but the `fresh`, whom nobody clearly beats."""

    tried: set[str] = field(default_factory=set)
    scored: set[str] = field(default_factory=set)
    running: set[int] = field(default_factory=set)
    failures: Counter[str] = field(default_factory=Counter)
    candidates: dict[str, Trial] = field(default_factory=dict)
    fresh: list[Trial] = field(default_factory=list)
    unbeaten: list[Trial] = field(default_factory=list)
    order: _Order | None = None


class _Order:
    """Candidates best first, and which of them somebody beats, found out as they are asked for."""

    def __init__(self, candidates: Sequence[Trial], objectives: Sequence[str]) -> None:
        values = np.array([trial.objectives(objectives) for trial in candidates])
        self.trials = [candidates[i] for i in best_first(values)]
        self._beaten = _Beaten(self.trials, objectives)
        self._found: list[Trial] = []
        self._seen = 0

    def leaders(self) -> Iterator[Trial]:
        yield from self._found
        while self._seen < len(self.trials):
            self._seen += 1
            if not self._beaten(self._seen - 1):
                self._found.append(self.trials[self._seen - 1])
                yield self._found[-1]


class _Beaten:
    """Whether trial i is clearly beaten by another."""

    def __init__(self, trials: Sequence[Trial], objectives: Sequence[str]) -> None:
        self._values = np.array([trial.objectives(objectives) for trial in trials])
        self._costs = np.array([name in trials[0].cost for name in objectives])
        self._replicates = {
            column: _centred(trials, name) for column, name in enumerate(objectives) if not self._costs[column]
        }

    def __call__(self, i: int) -> bool:
        """Is there one that costs no more and is better in every measured objective by more than the paired error allows? Only who is
        better at all is looked at closer."""
        mine = self._values[i]
        better = np.where(self._costs, self._values <= mine, self._values < mine).all(1)
        if self._costs.all():
            better &= (self._values < mine).any(1)
        others = np.flatnonzero(better)
        for column, replicates in self._replicates.items():
            gain = mine[column] - self._values[others, column]
            if replicates is not None:
                gain -= CONFIDENCE * _errors(replicates[others] - replicates[i])
            others = others[gain > 0]
        return len(others) > 0


def clearly_beaten(trials: Sequence[Trial], objectives: Sequence[str]) -> npt.NDArray[np.bool_]:
    """For each trial of one rung: is there another that costs no more and is better in every measured objective by more
    than the paired standard error allows? (n,)"""
    beaten = _Beaten(trials, objectives)
    return np.array([beaten(i) for i in range(len(trials))])


def _centred(trials: Sequence[Trial], name: str) -> npt.NDArray[np.float64] | None:
    """Jackknife replicates less their mean, (n, replicates); None where scores have none."""
    replicates = [trial.score.replicates.get(name, ()) if trial.score else () for trial in trials]
    if len({len(values) for values in replicates}) != 1 or len(replicates[0]) < 2:
        return None
    values = np.array(replicates, dtype=np.float64)
    centred: npt.NDArray[np.float64] = values - values.mean(axis=1, keepdims=True)
    return centred


def _errors(differences: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Jackknife standard errors of differences of centred replicates, (n, replicates) to (n,)."""
    count = differences.shape[-1]
    errors: npt.NDArray[np.float64] = np.sqrt((count - 1) / count * (differences**2).sum(-1))
    return errors


def paired_errors(trials: Sequence[Trial], name: str) -> npt.NDArray[np.float64]:
    """Jackknife standard error of the difference of each pair of scores, (n, n); 0 where a score has no replicates."""
    centred = _centred(trials, name)
    if centred is None:
        return np.zeros((len(trials), len(trials)))
    return np.array([_errors(centred - mine) for mine in centred])


class Patience:
    """Counts the schedules since the last one that moved the front of the first rung: a function of the trials in order of completion, so a resumed run ends where
    an uninterrupted one does."""

    def __init__(self, ladder: Ladder) -> None:
        self._ladder = ladder
        self._front: list[tuple[float, ...]] = []
        self._since = 0

    @property
    def over(self) -> bool:
        return self._ladder.patience is not None and self._since >= self._ladder.patience

    def note(self, trial: Trial) -> None:
        """A closed trial of the first rung; what failed moves nothing. A probe beyond the limits cannot move the front, and does not count."""
        mine = trial.objectives(self._ladder.objectives)
        within = all(excess <= 0 for excess in trial.violations.values())
        if "probe" in trial.origin and not within:
            return
        legal = trial.scored and within
        if not legal or any(all(a <= b for a, b in zip(other, mine, strict=True)) for other in self._front):
            self._since += 1
            return
        kept = [other for other in self._front if not all(a <= b for a, b in zip(mine, other, strict=True))]
        self._front, self._since = [*kept, mine], 0
