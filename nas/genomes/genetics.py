"""Pure functions on genomes: enumerate, sample, mutate, cross, repair. Costs are additive over intervals, so a budget is a
number to subtract from, and what is feasible can be enumerated without visiting what is not."""

from __future__ import annotations

import math
import sys
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from functools import cached_property
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from nas.contracts import SAMPLER, Genome, Problem, SearchSpace, UserError

LATENCY = "latency_ms"
"""A cost that is measured: only a space with measured times has it (`nas.engine.timing`)."""

NANOSECONDS = 1e6
"""Of a millisecond."""

TRIES = 32
"""Random attempts at a new genome before the exhaustive order takes over."""

PATIENCE = 10_000
"""Genomes that break a limit, one after another, after which an exhaustive search is given up."""


class IntervalCosts:
    """Costs of genomes by interval: MACs, or nanoseconds where time is limited. `genes[k]` are the places of interval k's genes,
    `tables[k]` has an axis for each of them."""

    def __init__(self, space: SearchSpace) -> None:
        # Where time is limited the full network is still what has the most multiply-adds: on a GPU narrower calls may be slower.
        self._plain: SearchSpace | None = getattr(space, "untimed", None)
        intervals = [choice.interval for choice in space.choices]
        starts = [i for i, interval in enumerate(intervals) if i == 0 or interval != intervals[i - 1]]
        self.genes = [slice(start, stop) for start, stop in pairwise([*starts, len(intervals)])]
        self.tables = space.interval_costs()
        self._least = [
            table.min(axis=tuple(range(place + 1, table.ndim))) if place + 1 < table.ndim else table
            for table in self.tables
            for place in range(table.ndim)
        ]
        self.sizes = [len(choice.options) for choice in space.choices]
        self._home = [k for k, genes in enumerate(self.genes) for _ in range(genes.start, genes.stop)]

    def of(self, k: int, option: Genome) -> int:
        """Cost of interval k, its genes given."""
        return int(self.tables[k][option])

    def total(self, genome: Genome) -> int:
        return sum(self.of(k, genome[genes]) for k, genes in enumerate(self.genes))

    def least(self, gene: int, before: tuple[int | npt.NDArray[np.int64], ...]) -> npt.NDArray[np.int64]:
        """For each option of the gene, the least cost of its interval, (..., options); `before` are the interval's genes that stand
        before it, or an array of many genomes' for each."""
        found: npt.NDArray[np.int64] = self._least[gene][before]
        return found

    def home(self, gene: int) -> int:
        """Which interval the gene belongs to."""
        return self._home[gene]

    def by_option(self, genome: Sequence[int], gene: int) -> list[int]:
        """Costs of the gene's interval for each option of that gene, the interval's other genes as they are."""
        k = self._home[gene]
        genes = self.genes[k]
        place: list[int | slice] = list(genome[genes])
        place[gene - genes.start] = slice(None)
        row: list[int] = self.tables[k][tuple(place)].tolist()
        return row

    def changed(self, genome: Genome, options: Mapping[int, Genome]) -> Genome:
        """The genome with other options, a gene each of the interval's, at some intervals."""
        changed = list(genome)
        for k, option in options.items():
            changed[self.genes[k]] = option
        return tuple(changed)

    def cheapest(self) -> Genome:
        return self._cheapest

    @cached_property
    def _cheapest(self) -> Genome:
        return self.joined([int(table.argmin()) for table in self.tables])

    def dearest(self) -> Genome:
        """Of the most multiply-adds; among equals the last, whose options name the most."""
        return self._dearest

    @cached_property
    def _dearest(self) -> Genome:
        tables = self.tables if self._plain is None else self._plain.interval_costs()
        return self.joined([table.size - 1 - int(table.ravel()[::-1].argmax()) for table in tables])

    def joined(self, flat: Sequence[int]) -> Genome:
        """The genome of one flat option index for each interval."""
        options = (np.unravel_index(i, table.shape) for i, table in zip(flat, self.tables, strict=True))
        return tuple(int(gene) for option in options for gene in option)


Limits = tuple[tuple[str, float], ...]

_latest: tuple[weakref.ref[SearchSpace], IntervalCosts, dict[Limits, float], dict[Limits, Genome]] | None = None


def costs_of(space: SearchSpace) -> IntervalCosts:
    """Its interval costs, those of the space asked for last kept: a search asks for one space's a hundred times for each trial."""
    global _latest
    if _latest is None or _latest[0]() is not space:
        _latest = weakref.ref(space), IntervalCosts(space), {}, {}
    return _latest[1]


def cheapest(space: SearchSpace) -> Genome:
    """The genome of least cost."""
    return costs_of(space).cheapest()


def dearest(space: SearchSpace) -> Genome:
    """The genome of the most multiply-adds."""
    return costs_of(space).dearest()


def uniform_genomes(space: SearchSpace) -> list[Genome]:
    """One option index for the whole trajectory (its last one where a choice has fewer options), cheapest first; and where steps may be
    guided, the full network with each kind of guidance throughout. All of it by each sampler, where the space chooses one."""
    sizes = [len(choice.options) for choice in space.choices]
    guides = [choice.name.endswith(".guidance") for choice in space.choices]
    plain = [tuple(min(index, size - 1) for size in sizes) for index in range(max(sizes))]
    for index in range(max((size for size, guide in zip(sizes, guides, strict=True) if guide), default=0)):
        plain.append(tuple(index if guide else size - 1 for size, guide in zip(sizes, guides, strict=True)))
    found = plain
    for place, choice in enumerate(space.choices):
        if choice.name == SAMPLER:
            found = [(*g[:place], option, *g[place + 1 :]) for g in plain for option in range(sizes[place])]
    return sorted(dict.fromkeys(found), key=lambda genome: space.cost(genome)["macs"])


def budget_of(problem: Problem) -> float:
    """What a genome may cost, as `interval_costs` counts: the tighter of the limits on `macs` and `macs_share` in MACs, or the limit on
    `latency_ms` in nanoseconds; infinite where there is none. Limits on further costs are no part of it."""
    if LATENCY in problem.limits:
        return problem.limits[LATENCY] * NANOSECONDS
    least = cheapest(problem.space)
    assert _latest is not None
    known, key = _latest[2], tuple(problem.limits.items())
    if key not in known:
        cost = problem.space.cost(least)
        full = round(cost["macs"] / cost["macs_share"])
        share = problem.limits.get("macs_share", math.inf) * full
        # Up to the rounding of the share, so that who costs just as much keeps to it.
        known[key] = min(problem.limits.get("macs", math.inf), share * (1 + 4 * sys.float_info.epsilon))
    return known[key]


def most_within(problem: Problem) -> float:
    """The cost up to which budgets are spread, as `interval_costs` counts: `budget_of`, or where further limits are there about the dearest genome that keeps
    all: one network throughout, or as many intervals of the dearest as do beside those of the anchor."""
    budget = budget_of(problem)
    if all(name in _budgeted(problem) for name in problem.limits):
        return budget
    costs = costs_of(problem.space)
    full, least = costs.dearest(), anchor(problem)
    low, high = 0, len(costs.genes)
    while low < high:  # of intervals, noisy to clean; costs rise with their number
        middle = (low + high + 1) // 2
        stop = costs.genes[middle - 1].stop
        low, high = (middle, high) if problem.feasible((*full[:stop], *least[stop:])) else (low, middle - 1)
    stop = costs.genes[low - 1].stop if low else 0
    known = [(*full[:stop], *least[stop:]), *filter(problem.feasible, uniform_genomes(problem.space))]
    known += _one_throughout(problem)
    return min(budget, max(float(costs.total(genome)) for genome in known))


def _one_throughout(problem: Problem) -> list[Genome]:
    """The dearest genome that keeps all limits and has the same options at all intervals; none where there is none, or intervals are not alike."""
    costs = costs_of(problem.space)
    if len({table.shape for table in costs.tables}) > 1:
        return []
    every = sum(costs.tables[1:], costs.tables[0]).ravel()
    for flat in np.argsort(-every, kind="stable").tolist():
        genome = costs.joined([flat] * len(costs.tables))
        if problem.feasible(genome):
            return [genome]
    return []


def exact_cost(space: SearchSpace, genome: Genome) -> int:
    """Of the schedule that it decodes to, as `interval_costs` counts."""
    cost = space.cost(genome)
    return round(cost[LATENCY] * NANOSECONDS) if LATENCY in cost else int(cost["macs"])


KEPT = ("macs", "macs_share", "macs_share_without_attention", "params", LATENCY)
"""Costs that a search can keep to."""


def check_limits(limits: Mapping[str, float]) -> None:
    """Raises UserError for limits that a search cannot keep to."""
    for name in limits:
        if name not in KEPT:
            raise UserError(f"limit {name!r} is not one that a search can keep to; use {', '.join(KEPT)}")


def check_reachable(problem: Problem) -> None:
    """Raises UserError naming the cheapest genome where no genome keeps the limits, or a limit names no cost."""
    least = cheapest(problem.space)
    cost = problem.space.cost(least)
    check_limits(problem.limits)
    for name in problem.limits:
        if name not in cost:
            raise UserError(f"limit {name!r} is no cost of this space; it has {', '.join(cost)}")
    budgeted = _budgeted(problem)
    broken = [name for name, limit in problem.limits.items() if cost[name] > limit]
    for name in [name for name in broken if name in budgeted]:
        again = ", or, if the machine was busy when calls were timed, time them anew: in a new run folder (--out, and --weights-from for the supernet) delete latency.json, which it has taken along, and times.json"
        raise UserError(
            f"limit {name}={problem.limits[name]:g} cannot be met: the cheapest schedule, "
            f"{_option_names(problem.space, least)}, costs {name}={cost[name]:.4g}; raise the limit"
            + (again if name == LATENCY else "")
        )
    if broken and not problem.feasible(anchor(problem)):
        limits = ", ".join(f"{name}<={limit:g}" for name, limit in problem.limits.items())
        raise UserError(
            f"no schedule was found that keeps {limits}: the cheapest, {_option_names(problem.space, least)}, costs {broken[0]}={cost[broken[0]]:.4g}; raise one "
            "of these limits"
        )
    bound = IntervalCosts(problem.space).total(least)
    if bound > budget_of(problem):
        at_least = f"{bound:.4g} MACs (macs_share={bound * cost['macs_share'] / cost['macs']:.4g})"
        if LATENCY in problem.limits:
            at_least = f"{bound:.4g} ns"
        raise UserError(
            f"searches keep to what intervals cost whatever the one before them runs, at least {at_least}, "
            f"above the limit of {budget_of(problem):.4g}; raise the limit, or let intervals be longer"
        )


def anchor(problem: Problem) -> Genome:
    """A genome that keeps all limits: the cheapest one, or where a limit on another cost excludes that, one found from there; the cheapest where none is."""
    least = cheapest(problem.space)
    if problem.feasible(least):
        return least
    assert _latest is not None
    known, key = _latest[3], tuple(problem.limits.items())
    if key not in known:
        known[key] = _found_from(problem, least)
    return known[key]


def _budgeted(problem: Problem) -> tuple[str, ...]:
    """Costs whose limits `budget_of` is."""
    return (LATENCY,) if LATENCY in problem.limits else ("macs", "macs_share")


def _found_from(problem: Problem, least: Genome) -> Genome:
    """One network throughout, where that will do; else interval by interval another option as long as less of the excess is left, those first that take most of
    it away for what they cost. `least` where that leads nowhere."""
    costs, budget = costs_of(problem.space), budget_of(problem)
    if costs.total(least) > budget:
        return least
    for genome in uniform_genomes(problem.space):
        if problem.feasible(genome):
            return genome

    def excess(genome: Genome) -> float:
        return sum(max(0.0, over) / problem.limits[name] for name, over in problem.violations(genome).items())

    start = excess(least)
    moves: list[tuple[float, int, Genome]] = []
    for k, table in enumerate(costs.tables):
        for option in np.ndindex(table.shape):
            gain = start - excess(costs.changed(least, {k: option}))
            if gain > 0:
                moves.append((gain / max(1, costs.of(k, option) - int(table.min())), k, option))
    found = least
    for _, k, option in sorted(moves, reverse=True):
        moved = costs.changed(found, {k: option})
        if costs.total(moved) <= budget and excess(moved) < excess(found):
            found = moved
            if problem.feasible(found):
                return found
    return least


def random_genome(problem: Problem, rng: np.random.Generator) -> Genome:
    """Uniform over options, gene by gene, then repaired to the budget."""
    drawn = tuple(int(rng.integers(len(choice.options))) for choice in problem.space.choices)
    return repair(problem, drawn, rng)


def mutate(space: SearchSpace, genome: Genome, rng: np.random.Generator, rate: float) -> Genome:
    """Each gene moves with probability `rate`, at least one that can move does: up or down its options, which stand in order, by a
    step of geometric length, a third of them in the mean, that stops at the last one."""
    sizes = costs_of(space).sizes
    changing = rng.random(len(genome)) < rate
    movable = [i for i, size in enumerate(sizes) if size > 1]
    if movable and not changing[movable].any():
        changing[rng.choice(movable)] = True
    child = list(genome)
    for i in np.flatnonzero(changing):
        if sizes[i] > 1:
            step = int(rng.geometric(min(1.0, 3 / sizes[i])))
            rises = genome[i] == 0 or (genome[i] < sizes[i] - 1 and rng.random() < 0.5)
            child[i] = min(genome[i] + step, sizes[i] - 1) if rises else max(genome[i] - step, 0)
    return tuple(child)


def cross(first: Genome, second: Genome, rng: np.random.Generator) -> Genome:
    """Two-point crossover: a stretch of neighbouring intervals comes from the second parent."""
    start, stop = sorted(rng.integers(len(first) + 1, size=2))
    return first[:start] + second[start:stop] + first[stop:]


def repair(problem: Problem, genome: Genome, rng: np.random.Generator) -> Genome:
    """Moves random genes to cheaper options until the budget holds, and then, where there are limits on other costs, intervals of one random kind after another to those of a genome that
    keeps them all (`anchor`), until these hold too. Unchanged where all do."""
    costs = costs_of(problem.space)
    excess = costs.total(genome) - budget_of(problem)
    if excess <= 0 or problem.feasible(genome):
        return _within_all(problem, genome, rng)
    repaired = list(genome)
    order = rng.permutation(len(genome)).tolist()
    while excess > 0 and order:
        i = order[0]
        row = costs.by_option(repaired, i)
        cheaper = [option for option, macs in enumerate(row) if macs < row[repaired[i]]]
        if not cheaper:
            order.pop(0)
            continue
        option = int(rng.choice(cheaper))
        excess -= row[repaired[i]] - row[option]
        repaired[i] = option
        order.append(order.pop(0))
    if excess > 0:  # no single gene can save more, but several of an interval together may
        least = costs.cheapest()
        for k in rng.permutation(len(costs.genes)).tolist():
            repaired[costs.genes[k]] = least[costs.genes[k]]
            if costs.total(tuple(repaired)) <= budget_of(problem):
                break
    return _within_all(problem, tuple(repaired), rng)


def _within_all(problem: Problem, genome: Genome, rng: np.random.Generator) -> Genome:
    """What keeps the budget, moved towards a schedule that keeps all limits, until it does so too."""
    if all(name in _budgeted(problem) for name in problem.limits) or problem.feasible(genome):
        return genome
    costs, moved = costs_of(problem.space), list(genome)
    least = anchor(problem)
    # Kind by kind: what costs once however often it runs, as parameters do, is saved where its last interval goes.
    order = rng.permutation(len(costs.genes)).tolist()
    kinds = list(dict.fromkeys(genome[costs.genes[k]] for k in order))
    for k in sorted(order, key=lambda k: kinds.index(genome[costs.genes[k]])):
        moved[costs.genes[k]] = least[costs.genes[k]]
        if problem.feasible(tuple(moved)):
            break
    return tuple(moved)


def feasible_genomes(problem: Problem, patience: float = math.inf) -> Iterator[Genome]:
    """Every genome once that keeps the limits and whose intervals' costs keep the budget (where these are upper bounds, as of intervals that may reuse what the
    one before kept, some that keep it in truth are not among them), in lexicographic order of the intervals' options sorted by cost. Branches whose cheapest
    completion breaks the budget are never entered, so that the first k come in time proportional to k, where multiply-adds or times alone are limited. Limits on
    other costs, such as parameters, do not add up over intervals: genomes that break them are gone through one by one, and after `patience` of them in a row it ends."""
    tables = problem.space.interval_costs()
    table: list[list[int]] = [each.ravel().tolist() for each in tables]
    budget = budget_of(problem)
    orders: list[list[int]] = [np.argsort(row, kind="stable").tolist() for row in table]
    cheapest_after = np.append(np.cumsum([min(row) for row in table][::-1])[::-1], 0).tolist()
    chosen: list[int] = []  # positions in `orders`
    spent: list[int] = [0]
    position = beyond = 0
    while True:
        depth = len(chosen)
        if depth < len(table):
            order = orders[depth]
            fits = (
                position < len(order)
                and spent[-1] + table[depth][order[position]] + cheapest_after[depth + 1] <= budget
            )
            if fits:
                chosen.append(position)
                spent.append(spent[-1] + table[depth][order[position]])
                position = 0
                continue
        else:
            options = [np.unravel_index(orders[k][p], tables[k].shape) for k, p in enumerate(chosen)]
            genome = tuple(int(gene) for option in options for gene in option)
            beyond = 0 if problem.feasible(genome) else beyond + 1
            if beyond > patience:
                return
            if not beyond:
                yield genome
        if not chosen:
            return
        position = chosen.pop() + 1
        spent.pop()


class Taken:
    """Genomes that were told and those pending, without a copy of the former."""

    def __init__(self, told: Set[Genome], pending: Sequence[Genome]) -> None:
        self._told = told
        self._pending = {genome for genome in pending if genome not in told}

    def __contains__(self, genome: object) -> bool:
        return genome in self._told or genome in self._pending

    def __len__(self) -> int:
        return len(self._told) + len(self._pending)

    def beside(self, others: Set[Genome]) -> int:
        """How many there are besides these."""
        return len(self) - sum(genome in self for genome in others)


def novel(problem: Problem, draw: Callable[[], Genome], taken: Callable[[Genome], bool]) -> Genome | None:
    """A feasible genome that is not taken: one of `TRIES` draws, else the first in exhaustive order, else None.

    Bounded: the exhaustive order is left at its first genome that is not taken, and after `PATIENCE` in a row that break a limit.
    """
    for _ in range(TRIES):
        genome = draw()
        if not taken(genome) and problem.feasible(genome):
            return genome
    return next((genome for genome in feasible_genomes(problem, PATIENCE) if not taken(genome)), None)


def novel_random(problem: Problem, rng: np.random.Generator, taken: Callable[[Genome], bool]) -> Genome | None:
    """As `novel`, of random draws."""
    return novel(problem, lambda: random_genome(problem, rng), taken)


def near(problem: Problem, genome: Genome, rng: np.random.Generator, taken: Callable[[Genome], bool]) -> Genome | None:
    """The genome, repaired to the budget; where that is taken a mutant of it, else the first in exhaustive order, else None."""
    wanted = repair(problem, genome, rng)
    if not taken(wanted):
        return wanted
    rate = 1 / len(genome)
    return novel(problem, lambda: repair(problem, mutate(problem.space, wanted, rng, rate), rng), taken)


def _option_names(space: SearchSpace, genome: Genome) -> str:
    named = [str(choice.options[gene]) for choice, gene in zip(space.choices, genome, strict=True)]
    return f"{named[0]} everywhere" if len(set(named)) == 1 else " ".join(named)
