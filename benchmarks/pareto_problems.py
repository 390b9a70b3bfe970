"""Public test problems of several objectives, discretised: our evolution beside pymoo's NSGA-II."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from nas.contracts import Problem, Proposal, Score
from nas.genomes.pareto import hypervolume
from nas.searchers.evolution import Evolution
from nas.testing import TableSpace, closed

Array = npt.NDArray[np.float64]

LEVELS = 30


def zdt(number: int) -> Callable[[Array], Array]:
    """ZDT1 to 3 (Zitzler, Deb and Thiele 2000): x (n, 30) in [0, 1]; two objectives (n, 2)."""

    def problem(x: Array) -> Array:
        first = x[:, 0]
        g = 1 + 9 * x[:, 1:].mean(1)
        ratio = first / g
        h = {1: 1 - np.sqrt(ratio), 2: 1 - ratio**2, 3: 1 - np.sqrt(ratio) - ratio * np.sin(10 * np.pi * first)}[number]
        found: Array = np.stack([first, g * h], axis=1)
        return found

    return problem


def dtlz2(x: Array) -> Array:
    """DTLZ2 (Deb et al. 2002) with three objectives: x (n, 12) in [0, 1]; (n, 3)."""
    g = ((x[:, 2:] - 0.5) ** 2).sum(1)
    a, b = (x[:, i] * np.pi / 2 for i in range(2))
    sphere: Array = np.stack([np.cos(a) * np.cos(b), np.cos(a) * np.sin(b), np.sin(a)], axis=1)
    found: Array = sphere * (1 + g)[:, None]
    return found


PROBLEMS: dict[str, tuple[Callable[[Array], Array], int, int]] = {
    **{f"ZDT{number}": (zdt(number), 30, 2) for number in (1, 2, 3)},
    "DTLZ2": (dtlz2, 12, 3),
}


def objectives_of(name: str, genomes: npt.NDArray[np.int64]) -> Array:
    return PROBLEMS[name][0](genomes / (LEVELS - 1))


def reference_of(name: str) -> Array:
    """The worst of a thousand random points in each objective."""
    _, genes, _ = PROBLEMS[name]
    rng = np.random.default_rng(0)
    worst: Array = objectives_of(name, rng.integers(LEVELS, size=(1000, genes))).max(0)
    return worst


def evolved(name: str, population: int, evaluations: int, seed: int) -> float:
    """Hypervolume of all that our evolution evaluated."""
    _, genes, count = PROBLEMS[name]
    names = tuple(f"f{i}" for i in range(count))
    problem = Problem(TableSpace(((1,) * LEVELS,) * genes), names)
    search = Evolution(population=population, uniform=False, screened=1).start(problem, seed)
    points = []
    for number in range(evaluations):
        proposal = search.ask([])
        assert isinstance(proposal, Proposal)
        values = objectives_of(name, np.array([proposal.genome]))[0].tolist()
        points.append(values)
        search.tell(closed(problem, number, proposal, Score(dict(zip(names, values, strict=True)))))
    return hypervolume(points, reference_of(name).tolist())


def by_pymoo(name: str, population: int, evaluations: int, seed: int) -> float:
    """The same by pymoo's NSGA-II, with the operators and settings that its documentation has for integers."""
    from pymoo.algorithms.moo.nsga2 import NSGA2
    from pymoo.core.problem import Problem as PymooProblem
    from pymoo.operators.crossover.sbx import SBX
    from pymoo.operators.mutation.pm import PM
    from pymoo.operators.repair.rounding import RoundingRepair
    from pymoo.operators.sampling.rnd import IntegerRandomSampling
    from pymoo.optimize import minimize

    _, genes, count = PROBLEMS[name]
    points: list[list[float]] = []

    class Levels(PymooProblem):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__(n_var=genes, n_obj=count, xl=0, xu=LEVELS - 1, vtype=int)

        def _evaluate(self, x: Any, out: dict[str, Any], *_: Any, **__: Any) -> None:
            out["F"] = objectives_of(name, np.asarray(x))
            points.extend(out["F"].tolist())

    algorithm = NSGA2(
        pop_size=population,
        sampling=IntegerRandomSampling(),
        crossover=SBX(prob=1.0, eta=3.0, vtype=float, repair=RoundingRepair()),
        mutation=PM(prob=1.0, eta=3.0, vtype=float, repair=RoundingRepair()),
        eliminate_duplicates=True,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        minimize(Levels(), algorithm, ("n_eval", evaluations), seed=seed, verbose=False)
    return hypervolume(points[:evaluations], reference_of(name).tolist())


def on_problem(name: str, population: int, evaluations: int, seeds: int) -> dict[str, Any]:
    ours = [evolved(name, population, evaluations, seed) for seed in range(seeds)]
    theirs = [by_pymoo(name, population, evaluations, seed) for seed in range(seeds)]
    return {
        "evolution": float(np.median(ours)),
        "pymoo": float(np.median(theirs)),
        "ratio_of_medians": float(np.median(ours) / np.median(theirs)),
        "better_of": [int((np.array(ours) > np.array(theirs)).sum()), seeds],
    }
