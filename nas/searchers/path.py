"""Exact search over reuse: what a step loses that reuses depends on how far back the last computed one lies (DPCache's idea).

Probes let runs of one, two, four, eight steps reuse after each computed step of the full network, and make of that what each further step loses; single
steps that compute something else are probed alone. A shortest path over (last computed step, step) is then the best for every budget under that model.
What it leads to is scored like any other schedule, corrects the model, and its neighbours follow: only real scores count.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Annotated

import numpy as np
import numpy.typing as npt
from pydantic import Field
from scipy.optimize import nnls

from nas.contracts import DONE, WAIT, Genome, Problem, Proposal, Signal, Trial, derive_seed
from nas.genomes.genetics import Taken, most_within, novel_random
from nas.genomes.paths import Floats, ReusePath, Steps, paths, together
from nas.recipes import Few, recipe
from nas.searchers.tracks import Option, Tracks

BANDS = 4
"""Parts of the trajectory whose losses are corrected by a factor each."""

ALIKE, HELD = 0.3, 0.1
"""How strongly neighbouring factors are held alike, and all of them to 1, beside one scored schedule."""

REFIT = 8
"""Told trials after which the model is corrected."""

LEAST = 1e-3
"""A factor is no less, so that what must not be stays so."""

BEST = 5
"""Schedules whose neighbours are tried, one after another."""

POWERS = (1.0, 0.5)
"""Losses of a run add up where they are unrelated; their roots do where all point one way."""


@recipe
class Path:
    """`reach`: the longest run that is probed. `probes`: upper limit of their number; of more, computed steps are left out evenly, and what they would have
    said is interpolated. `budgets`: how many are solved for, equally spaced from the cheapest to the limit. `options`: of an interval, how many are probed.

    The space has an interval for each step, as `Stepwise(intervals=per_step(...))`, or one for each branch of each step, as `Branches`, whose branches have
    a path each. Probes may exceed the limits; they are ordinary trials, charged and shown, but cannot win.
    """

    reach: Annotated[int, Field(ge=1, le=64)] = 8
    probes: Annotated[int, Field(ge=1, le=10**6)] = 512
    budgets: Few = 4
    options: Annotated[int, Field(ge=2, le=64)] = 8

    def start(self, problem: Problem, seed: int) -> PathSearch:
        return PathSearch(self, problem, seed)


class PathSearch:
    def __init__(self, settings: Path, problem: Problem, seed: int) -> None:
        self._settings = settings
        self._problem = problem
        self._seed = seed
        self._tracks = Tracks(problem.space, settings.options, settings.reach, settings.probes)
        self._costs = self._tracks.costs
        self._full = self._tracks.full
        self._most = most_within(problem)
        self._measured: dict[Genome, float] = {}
        self._left: set[Genome] | None = None
        self._known: tuple[dict[Genome, float], list[tuple[float, Genome]]] = ({}, [])
        self._told: set[Genome] = set()
        self._solved: list[tuple[Genome, float, str]] | None = None
        self._current: tuple[int, list[tuple[Genome, float, str]]] = (-1, [])
        self._fitted: tuple[int, Floats] = (-1, np.ones(BANDS))
        self._best: list[tuple[float, Genome]] = []

    def ask(self, pending: Sequence[Genome]) -> Proposal | Signal:
        taken = Taken(self._told, pending)
        for genome, words in self._tracks.probes.items():
            if genome not in taken:
                return Proposal(genome, {"probe": words})
        if any(genome in pending for genome in self._tracks.probes):
            return WAIT
        for current in (False, True):
            for genome, predicted, words in self._solutions(current):
                if genome not in taken:
                    said = {"predicted": predicted} if math.isfinite(predicted) else {}
                    return Proposal(genome, {"operator": words, **said})
        rng = np.random.default_rng(derive_seed(self._seed, len(taken), "path"))
        drawn = novel_random(self._problem, rng, taken.__contains__)
        return DONE if drawn is None else Proposal(drawn, {"operator": "random"})

    def tell(self, trial: Trial) -> None:
        self._told.add(trial.genome)
        value = self._problem.quality(trial)
        if value is not None:
            self._measured[trial.genome] = value
            if self._problem.feasible(trial.genome):
                self._best = sorted([*self._best, (value, trial.genome)])[:BEST]
        if self._left is None:
            self._left = set(self._tracks.probes)
        last = self._left == {trial.genome}
        self._left.discard(trial.genome)
        if last or (not self._left and len(self._told) % REFIT == 0):
            self._refresh()

    def _refresh(self) -> None:
        """From now on solutions follow from what was measured up to here."""
        self._known = (dict(self._measured), list(self._best))
        self._solved = None

    # ------------------------------------------------------------------------------------------------------- model

    def _lost(self, genome: Genome) -> float | None:
        """What it loses against the full network; None where one of them has no score."""
        measured = self._known[0]
        if genome not in measured or self._full not in measured:
            return None
        return measured[genome] - measured[self._full]

    @cached_property
    def _losses(self) -> tuple[tuple[list[Floats], Floats], ...]:
        """Of each track, once all probes are scored: of each place what each computing option loses, and of each label, by (computed place + 1, place),
        what the whole run from the one behind the other loses, (places + 1, places, labels)."""
        found = []
        for number, track in enumerate(self._tracks.each):
            runs = [run for run in self._tracks.runs if run.track == number]
            computing = [np.full(len(options), np.inf) for options in track.computing]
            for place in range(len(computing)):
                computing[place][0] = 0.0
            known: dict[str, dict[int, dict[int, float]]] = {label: {} for label in track.labels}
            for run in runs:
                lost = self._lost(self._tracks.genome_of(run))
                if lost is not None and run.option:
                    computing[run.start][run.option] = lost
                elif lost is not None:
                    known[run.label].setdefault(run.length, {})[run.start] = lost
            count = len(track.intervals)
            drift = np.stack(
                [_interpolated(known[label], count) for label in track.labels] or [np.empty((count + 1, count))], -1
            )
            found.append((computing, drift if track.labels else drift[..., :0]))
        return tuple(found)

    @cached_property
    def _added(self) -> tuple[Floats, ...]:
        """What each further step of a run adds, by the model."""
        return tuple(_increments(drift, 1.0) for _, drift in self._losses)

    def _steps(self, number: int, power: float, window: tuple[int, int], whole: bool) -> Steps:
        """The track's ways and what they lose by the model, corrected; guided in the window of places alone; `whole`: steps run whole or are left out. An
        interval before the first stands for what runs there anyway."""
        track, (computing, drift) = self._tracks.each[number], self._losses[number]
        count, (start, stop) = len(track.intervals), window
        factors = self._factors[self._band(np.arange(count), count)]
        most = max(map(len, track.computing))
        cost, loss = np.zeros((count + 1, most), np.int64), np.full((count + 1, most), np.inf)
        loss[0, 0] = 0.0
        reusing = np.zeros((count + 1, len(track.labels)), np.int64)
        between = np.full((count + 1, count + 1, len(track.labels)), np.inf)
        between[:, 1:] = _increments(drift, power) * factors[:, None] ** power
        between[:, 0] = np.inf
        for place, k in enumerate(track.intervals):
            price, free = self._tracks.prices[k], track.unguided[place]
            guided = not any(track.unguided) or start <= place < stop
            for way, option in enumerate(track.computing[place]):
                cost[place + 1, way] = price[option]
                if guided == (option not in free):
                    lost = computing[place][way] * factors[place]
                    loss[place + 1, way] = np.sign(lost) * abs(lost) ** power
            for way, label in enumerate(track.labels):
                option = track.reusing[place].get(label, ())
                reusing[place + 1, way] = price.get(option, 0)
                left_out = self._leaves_out(k, option)
                if option not in price or not (left_out or (guided == (option not in free) and not whole)):
                    between[:, place + 1, way] = np.inf
                elif guided and start and not left_out:  # what unguided steps kept is not enough for a guided one
                    between[: start + 1, place + 1, way] = np.inf
        return Steps(cost, loss, reusing, between)

    def _leaves_out(self, k: int, option: Option) -> bool:
        """Whether nothing of the step runs. A branch that is reused costs nothing either, while others of its step run."""
        return len(self._tracks.each) == 1 and self._tracks.prices[k].get(option) == 0

    def _band(self, places: npt.NDArray[np.int64], count: int) -> npt.NDArray[np.int64]:
        return places * BANDS // count

    def _by_band(self, genome: Genome) -> Floats | None:
        """What the model, not corrected, says that it loses in each band; None where it says nothing."""
        found = np.zeros(BANDS)
        for track, (computing, _), increments in zip(self._tracks.each, self._losses, self._added, strict=True):
            last = 0
            for place, k in enumerate(track.intervals):
                option = genome[self._costs.genes[k]]
                band = int(self._band(np.array(place), len(track.intervals)))
                if option in track.computing[place]:
                    found[band] += computing[place][track.computing[place].index(option)]
                    last = place + 1
                else:
                    label = "/".join(map(str, option))
                    if label not in track.labels:
                        return None
                    found[band] += increments[last, place, track.labels.index(label)]
        return found if np.isfinite(found).all() else None

    @property
    def _factors(self) -> Floats:
        """By which each band's losses are corrected: least squares of what was scored beside what the model said, relatively."""
        measured = self._known[0]
        if self._fitted[0] != len(measured):
            rows = []
            for genome in measured:
                lost = self._lost(genome)
                if (
                    genome in self._tracks.probes
                    or lost is None
                    or lost <= 0
                    or (said := self._by_band(genome)) is None
                ):
                    continue
                rows.append(said / lost)
            said_in_all = np.array(rows).reshape(-1, BANDS)
            scale = float(said_in_all.sum(1).mean()) if rows else 1.0
            alike = ALIKE * scale * math.sqrt(max(1, len(rows))) * np.diff(np.eye(BANDS), axis=0)
            held = HELD * scale * np.full((1, BANDS), 1 / BANDS)
            wanted = np.array([*[1.0] * len(rows), *[0.0] * (BANDS - 1), HELD * scale])
            self._fitted = (
                len(measured),
                np.maximum(nnls(np.vstack([said_in_all, alike, held]), wanted)[0], LEAST),
            )
        return self._fitted[1]

    # --------------------------------------------------------------------------------------------------- solutions

    def _solutions(self, current: bool) -> list[tuple[Genome, float, str]]:
        """Genomes to be scored, best first, with what the model says of them, of which those that were scored already are left out by who asks. They
        follow from what was measured when the model was last corrected, or from all where it is to be `current`."""
        if self._solved is None:
            self._solved = list(self._solve())
        if not current:
            return self._solved
        if self._current[0] != len(self._told):
            known, self._known = self._known, (self._measured, self._best)
            self._current = (len(self._told), list(self._solve()))
            self._known = known
        return self._current[1]

    def _solve(self) -> Iterator[tuple[Genome, float, str]]:
        if self._full not in self._known[0]:
            return
        most = min(self._most, float(self._costs.total(self._full)))
        least = float(self._costs.total(self._costs.cheapest()))
        shares = [1 - number / self._settings.budgets for number in range(self._settings.budgets)]
        budgets = [least + (most - least) * share for share in shares]
        best: list[tuple[float, str, Genome]] = []
        count = len(self._tracks.each[0].intervals)
        kinds = [(power, window, False) for power in POWERS for window in self._tracks.each[0].windows]
        # Which steps run at all is a question of its own, whose answer the others are compared with.
        leaves_out = any(
            self._leaves_out(k, option) for k, prices in enumerate(self._tracks.prices) for option in prices
        )
        kinds += [(1.0, (0, count), True)] if leaves_out else []
        for power, window, whole in kinds:
            for number, chosen in enumerate(self._shortest(power, window, whole, budgets)):
                genome = None if chosen is None else self._tracks.decoded(chosen)
                if genome is not None and self._problem.feasible(genome):
                    words = (
                        f"shortest path{' of whole steps' if whole else ''} at {shares[number]:.0%}, power {power:g}"
                    )
                    best.append((self._predicted(genome), words, genome))
        # Guided throughout or in part, the best for each budget and power; the others when these are known.
        first = {words: min(one for one in best if one[1] == words) for _, words, _ in best}
        for predicted, words, genome in dict.fromkeys([*first.values(), *sorted(best)[: len(first)]]):
            yield genome, predicted, words
        for lost, genome in self._known[1]:
            yield from self._neighbours(lost, genome)

    def _shortest(
        self, power: float, window: tuple[int, int], whole: bool, budgets: Sequence[float]
    ) -> list[tuple[ReusePath, ...] | None]:
        fronts = [
            paths(self._steps(number, power, window, whole), max(budgets)) for number in range(len(self._tracks.each))
        ]
        return together(fronts, budgets) if all(fronts) else [None] * len(budgets)

    def _predicted(self, genome: Genome) -> float:
        said = self._by_band(genome)
        return math.nan if said is None else float(self._known[0][self._full] + said @ self._factors)

    def _neighbours(self, lost: float, best: Genome) -> Iterator[tuple[Genome, float, str]]:
        """Of a schedule within the limits: one interval changed, or two near ones exchanged; those first of which the model expects most."""
        found: dict[Genome, float] = {}
        offset = lost - self._predicted(best)
        for track in self._tracks.each:
            options = [[*c, *r.values()] for c, r in zip(track.computing, track.reusing, strict=True)]
            for place, k in enumerate(track.intervals):
                moves = [{k: option} for option in options[place]]
                for other in range(place + 1, min(place + 3, len(track.intervals))):
                    mine, theirs = (best[self._costs.genes[i]] for i in (k, track.intervals[other]))
                    if theirs in options[place] and mine in options[other]:
                        moves.append({k: theirs, track.intervals[other]: mine})
                for move in moves:
                    genome = self._costs.changed(best, move)
                    if genome not in self._told and genome not in found and self._problem.feasible(genome):
                        found[genome] = self._predicted(genome)
        for genome in sorted(found, key=lambda one: (math.isnan(found[one]), found[one])):
            yield genome, found[genome] + (0.0 if math.isnan(offset) else offset), "neighbour of one of the best"


def _interpolated(known: Mapping[int, Mapping[int, float]], count: int) -> Floats:
    """What a run loses that reuses from the place behind j up to m, (count + 1, count) by (j, m), j = 0 before the first place; infinite where nothing is
    known. `known[length][start]`: as it was scored. Between lengths and starts it is linear; beyond the longest it goes on as between the last two."""
    found = np.full((count + 1, count), np.inf)
    lengths = sorted(length for length, starts in known.items() if starts)
    if not lengths:
        return found
    for start in range(count):
        anchors = [0, *lengths]
        values = [0.0]
        for length in lengths:
            starts = sorted(known[length])
            values.append(float(np.interp(start, starts, [known[length][one] for one in starts])))
        slope = (values[-1] - values[-2]) / (anchors[-1] - anchors[-2])
        for length in range(1, count - start + 1):
            beyond = max(0, length - anchors[-1])
            found[start, start + length - 1] = np.interp(length, anchors, values) + beyond * slope
    return found


def _increments(drift: Floats, power: float) -> Floats:
    """What each further step of a run adds, to the sum of losses or of their powers."""
    grown = np.sign(drift) * np.abs(drift) ** power
    before = np.concatenate([np.zeros_like(grown[:, :1]), grown[:, :-1]], axis=1)
    with np.errstate(invalid="ignore"):
        first = ~np.isfinite(before)
        return np.where(np.isfinite(grown), grown - np.where(first, 0.0, before), np.inf)
