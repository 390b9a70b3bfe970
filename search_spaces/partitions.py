"""Ways to divide the timesteps, and how well each does: the similarity of their gradients and the effect of each step's options are
measured once, and from the effects follows the best schedule that each partition allows within one budget, which is scored for
real."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from nas.contracts import (
    Evaluator,
    Genome,
    Images,
    LoadedEvaluator,
    Progress,
    Score,
    SearchSpace,
    UserError,
    derive_seed,
)
from nas.genomes.allocation import allocate
from nas.genomes.genetics import dearest
from search_spaces.intervals import (
    Boundaries,
    bounded,
    dissimilarity,
    elbow,
    equal,
    equal_snr,
    even,
    merged,
    scatter,
    segments,
    starts,
)
from search_spaces.loaded import LoadedElastic
from search_spaces.options import Options
from search_spaces.stepwise import Stepwise
from search_spaces.training.similarity import GradientSimilarity

Array = npt.NDArray[np.float64]


@dataclass
class StepEffects:
    """What each option of each sampler step changes in the score of the full network's schedule, all other steps as they are.

    `space` has one choice for each step. `table` is (steps, options), `errors` the paired standard errors.
    """

    space: SearchSpace
    evaluate: LoadedEvaluator
    metric: str
    rung: int
    seed: int

    def measure(self) -> Iterator[Progress]:
        full = dearest(self.space)
        seed = derive_seed(self.seed, "step effects")
        base = self.evaluate(self.space.decode(full), self.rung, seed)
        sizes = [len(choice.options) for choice in self.space.choices]
        self.table = np.zeros((len(sizes), max(sizes)))
        self.errors = np.zeros_like(self.table)
        cells = [(step, option) for step, size in enumerate(sizes) for option in range(size) if option != full[step]]
        # Late steps first: their schedules share the longest beginnings with the full one, which is kept.
        for number, (step, option) in enumerate(sorted(cells, reverse=True), 1):
            genome = (*full[:step], option, *full[step + 1 :])
            score = self.evaluate(self.space.decode(genome), self.rung, seed)
            self.table[step, option], self.errors[step, option] = score.difference(base, self.metric)
            yield Progress("step effects", number, len(cells))


def best_schedule(space: SearchSpace, effects: Array, intervals: Sequence[int], budget: float) -> Genome:
    """Of the schedules whose steps choose alike inside each interval, the one of least summed effect within `budget` MACs."""
    costs = np.array([row.tolist() for row in space.interval_costs()])
    bounds = [0, *np.cumsum(intervals).tolist()]
    parts = [slice(start, stop) for start, stop in pairwise(bounds)]
    price = [costs[part].sum(0).tolist() for part in parts]
    error = [effects[part].sum(0).tolist() for part in parts]
    [found] = allocate(price, error, [budget])
    return tuple(option for option, count in zip(found[0].options, intervals, strict=True) for _ in range(count))


def compare(
    effects: StepEffects, partitions: Mapping[str, Sequence[int]], share: float, rung: int, seeds: int = 3
) -> Iterator[tuple[Progress, dict[str, Any]]]:
    """For each partition the best schedule within the share of the MACs (of the full network's schedule, guided by itself where the space has guidance) and its mean score on fresh seeds, with the paired
    difference to the first partition's and its error. Yields a row with each tick."""
    space, metric = effects.space, effects.metric
    dear = space.cost(dearest(space))
    budget = share * round(dear["macs"] / dear["macs_share"])
    first: list[Score] = []
    known: dict[Genome, list[Score]] = {}
    for number, (name, intervals) in enumerate(partitions.items(), 1):
        genome = best_schedule(space, effects.table, intervals, budget)
        if genome not in known:
            known[genome] = [
                effects.evaluate(space.decode(genome), rung, derive_seed(effects.seed, "partitions", seed))
                for seed in range(seeds)
            ]
        scores = known[genome]
        first = first or scores
        differences = [score.difference(other, metric) for score, other in zip(scores, first, strict=True)]
        yield (
            Progress("partitions", number, len(partitions)),
            {
                "partition": name,
                "intervals": list(intervals),
                "genome": list(genome),
                "macs_share": space.cost(genome)["macs_share"],
                metric: float(np.mean([score.values[metric] for score in scores])),
                "difference": float(np.mean([difference for difference, _ in differences])),
                "difference_error": float(np.sqrt(sum(error**2 for _, error in differences)) / len(scores)),
            },
        )


def check_levels(space: Stepwise) -> None:
    """Raises UserError where the network has no widths of all its levels together."""
    if len({len(level) for level in space.net.channels}) > 1:
        raise UserError(
            "partitions are compared by one width of the whole network, and its levels have different numbers of channels to choose from; give each level as many, or widths"
        )


@dataclass
class Partitions:
    """Measures what the makers need, lets each divide the space's timesteps into `count` intervals (None: the elbow of the
    similarity of gradients), and compares them. What was measured is kept in `<run>/intervals/` and not measured again.
    """

    space: Stepwise
    evaluate: LoadedEvaluator
    images: Images
    evaluator: Evaluator
    folder: Path
    seed: int
    grid: int
    count: int | None
    share: float
    metric: str
    """Of the evaluator's, that partitions are compared by."""

    def measure(self) -> Iterator[Progress]:
        net = self.evaluate.supernet
        if not isinstance(net, LoadedElastic):
            raise UserError(f"gradients are those of an Elastic; this supernet is a {type(net).__name__}")
        space, last = self.space, self.space.net.noise.timesteps - 1
        if self.count is not None and self.count > self.grid:
            raise UserError(
                f"--count {self.count} intervals cannot be told apart at --grid {self.grid} timesteps; give a grid of as many"
            )
        check_levels(space)
        options = Options(space.net.widths, channels=space.net.channels)
        self.widths = space.net.subnets(options).genes[0].options
        each = space.of_each_step(options)
        least = each.cost((0,) * len(each.choices))["macs_share"]
        if least > self.share:
            raise UserError(
                f"no width of {self.widths} keeps {self.share:.0%} of the MACs, the smallest takes {least:.0%}; raise --share, or give the "
                "supernet a smaller width"
            )
        self.points = [int(t) for t in np.round(np.linspace(0, last, self.grid))]
        trained = space.net.digest(self.folder / "supernet")
        similarity = GradientSimilarity(net, self.images.load(), self.seed)
        header = {"supernet": trained, "points": self.points, "seed": self.seed, "settings": similarity.settings}
        path = self.folder / "intervals" / "similarity.json"
        yield from _kept(
            path,
            header,
            lambda: similarity.measure(self.points),
            lambda: [similarity.affinity.tolist(), similarity.agreement],
        )
        affinity, self.agreement = _read(path, header)
        self.affinity = np.array(affinity)

        effects = StepEffects(each, self.evaluate, self.metric, self.evaluator.rungs[0], self.seed)
        header = {
            "supernet": trained,
            "evaluator": self.evaluator.digest(self.folder),
            "space": each.describe(),
            "seed": self.seed,
            **({} if self.metric == self.evaluator.metrics[0] else {"metric": self.metric}),
        }
        path = self.folder / "intervals" / "effects.json"
        yield from _kept(path, header, effects.measure, lambda: [effects.table.tolist(), effects.errors.tolist()])
        effects.table, effects.errors = (np.array(table) for table in _read(path, header))
        self.effects = effects

        self.boundaries = self._divide()
        divided = {name: bounded(space.timesteps, found) for name, found in self.boundaries.items()}
        self.rows: list[dict[str, Any]] = []
        for tick, row in compare(
            effects, {**divided, "one for each step": each.intervals}, self.share, self.evaluator.rungs[-1]
        ):
            self.rows.append(row)
            yield tick

    def facts(self) -> dict[str, Any]:
        """JSON of all that was measured and found."""
        return {
            "metric": self.effects.metric,
            "samples": self.evaluator.rungs[-1],
            "share": self.share,
            "timesteps": self.space.timesteps,
            "points": self.points,
            "affinity": self.affinity.tolist(),
            "agreement_of_halves": self.agreement,
            "widths": self.widths,
            "effects": self.effects.table.tolist(),
            "effect_errors": self.effects.errors.tolist(),
            "boundaries": {name: list(found) for name, found in self.boundaries.items()},
            "rows": self.rows,
        }

    def _divide(self) -> dict[str, Boundaries]:
        """Boundaries by each maker, without those that leave an interval no step of the sampler."""
        timesteps, noise = self.space.timesteps, self.space.net.noise
        by_gradient = segments(dissimilarity(self.affinity), min(len(timesteps), self.grid))
        count = self.count or elbow([cost for _, cost in by_gradient])
        count = min(count, len(by_gradient))
        middles = [(a + b + 1) // 2 for a, b in pairwise(self.points)]
        order = np.argsort(timesteps)  # clean to noisy, as boundaries are
        by_effect, _ = segments(scatter(self.effects.table[order]), count)[-1]
        ascending = sorted(timesteps)
        found = {
            "equal steps": starts(timesteps, equal(timesteps, count)),
            "even timesteps": even(count, noise.timesteps),
            "equal SNR": equal_snr(count, noise.alphas_cumprod),
            "gradients": tuple(middles[point - 1] for point in by_gradient[count - 1][0]),
            "sensitivity": tuple((ascending[i - 1] + ascending[i] + 1) // 2 for i in by_effect),
        }
        return {name: merged(timesteps, boundaries) for name, boundaries in found.items()}


def _kept(
    path: Path, header: Mapping[str, Any], measure: Callable[[], Iterator[Progress]], result: Callable[[], Any]
) -> Iterator[Progress]:
    """Measures and writes `result()` to the file, unless it holds one of the same header."""
    if _read(path, header) is None:
        yield from measure()
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps({"header": header, "result": result()}) + "\n")
        os.replace(partial, path)


def _read(path: Path, header: Mapping[str, Any]) -> Any:
    """The file's result where its header is this one; None where there is none, or it is damaged."""
    try:
        kept = json.loads(path.read_text())
        return kept["result"] if kept["header"] == json.loads(json.dumps(header)) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None
