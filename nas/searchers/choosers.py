"""Schedules within a budget, made of keep probabilities of gates; what each way does is said in `gates`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch

from nas.contracts import Arch, Finer, Genome, Guidance, LoadedSupernet, Problem, Schedule, Step, UserError
from nas.genomes.allocation import allocate
from nas.genomes.genetics import IntervalCosts, dearest, exact_cost, most_within
from nas.searchers.pruner import arch_of

Choosing = Literal["bisection", "greedy", "knapsack", "threshold"]
Floats = npt.NDArray[np.float64]


class Chooser:
    """Genomes within a budget, made of keep probabilities.

    `meanings["asks.k"]`: for each option of interval k, whether each block runs at each of the trajectory's steps but the first; NaN where
    the interval has no say. `meanings["open.k"]`: 1 for options that choose reuse alone, at the widest subnet, and `meanings["price.k"]`
    their MACs then. `meanings["weight"]`: the share of a step's MACs that each block has by itself.
    """

    def __init__(self, problem: Problem, learned: Mapping[str, torch.Tensor], threshold: float = 0.5) -> None:
        self._problem = problem
        self._threshold = threshold
        self._costs = IntervalCosts(problem.space)
        self._keep = learned["keep"].double().numpy().clip(1e-6, 1 - 1e-6)
        self._asks: list[Floats] = []
        self._prices: list[npt.NDArray[np.int64]] = []
        self._options: list[npt.NDArray[np.int64]] = []
        for k in range(len(self._costs.tables)):
            allowed = np.flatnonzero(learned[f"open.{k}"].numpy())
            self._options.append(allowed)
            self._prices.append(learned[f"price.{k}"].numpy()[allowed])
            self._asks.append(learned[f"asks.{k}"].double().numpy()[allowed])
        self._weight = learned["weight"].double().numpy()

    @cached_property
    def budgets(self) -> tuple[float, float]:
        """MACs of the cheapest and of the dearest schedule that it can make within the limit."""
        least = float(sum(prices.min() for prices in self._prices))
        most = float(sum(prices.max() for prices in self._prices))
        return least, min(most, most_within(self._problem))

    def genome(self, way: Choosing, budget: float) -> Genome:
        """At most as dear as the budget; the cheapest where that is dearer still."""
        ways: dict[Choosing, Callable[[float], Sequence[int]]] = {
            "bisection": self._bisection,
            "greedy": self._greedy,
            "knapsack": self._knapsack,
            "threshold": self._above,
        }
        found: list[int] = []
        for k, place in enumerate(ways[way](budget)):
            table = self._costs.tables[k]
            found.extend(int(gene) for gene in np.unravel_index(self._options[k][place], table.shape))
        return tuple(found)

    def _bisection(self, budget: float) -> Sequence[int]:
        """The lowest threshold on keep probabilities whose schedule keeps the budget: costs only fall with it."""
        thresholds = np.unique(self._keep)
        low, high = 0, len(thresholds)
        while low < high:
            middle = (low + high) // 2
            options = self._nearest(self._keep >= thresholds[middle])
            low, high = (low, middle) if self._price(options) <= budget else (middle + 1, high)
        kept = self._keep >= thresholds[low] if low < len(thresholds) else np.zeros(self._keep.shape, dtype=bool)
        return self._nearest(kept)

    def _above(self, budget: float) -> Sequence[int]:
        options = self._nearest(self._keep > self._threshold)
        return options if self._price(options) <= budget else self._bisection(budget)

    def _greedy(self, budget: float) -> Sequence[int]:
        kept: npt.NDArray[np.bool_] = np.ones_like(self._keep, dtype=bool)
        skip = 1 - self._keep
        options = self._nearest(kept)
        for threshold in (*np.arange(0.95, 0.0, -0.05), -1.0):
            for block in range(kept.shape[1] - 1, -1, -1):
                steps = np.flatnonzero(kept[:, block] & (skip[:, block] > threshold))
                for step in steps[np.argsort(-skip[steps, block], kind="stable")]:
                    if self._price(options) <= budget:
                        return options
                    kept[step, block] = False
                    options = self._nearest(kept)
        return options

    def _knapsack(self, budget: float) -> Sequence[int]:
        errors = [self._regret(asks) for asks in self._asks]
        [found] = allocate([p.tolist() for p in self._prices], [e.tolist() for e in errors], [budget])
        return found[0].options if found else [int(prices.argmin()) for prices in self._prices]

    def _regret(self, asks: Floats) -> Floats:
        total: Floats = np.where(asks < 0.5, -np.log(1 - self._keep), 0.0).sum(axis=(1, 2))
        return total

    def _nearest(self, kept: npt.NDArray[np.bool_]) -> list[int]:
        """For each interval the option that runs what is kept, and what is kept for nobody to read left out; else the nearest."""
        found = []
        for asks, prices in zip(self._asks, self._prices, strict=True):
            says = ~np.isnan(asks)
            more = ((asks > 0.5) & ~kept & says) @ self._weight
            less = ((asks < 0.5) & kept & says) @ self._weight
            # Nothing beyond what is kept, as much of it as possible, and of equals the cheapest: so a block without a reader goes.
            useful = (less + 1e3 * more).sum(axis=1)
            found.append(int(np.lexsort((prices, useful.round(9)))[0]))
        return found

    def _price(self, options: Sequence[int]) -> int:
        return sum(int(prices[option]) for prices, option in zip(self._prices, options, strict=True))


class BitChooser:
    """As `Chooser`, of a space with a bit for each gate: `meanings["bits"]`, (choices, 2), says of which step but the first and of which block."""

    def __init__(self, problem: Problem, learned: Mapping[str, torch.Tensor], threshold: float = 0.5) -> None:
        tables = problem.space.interval_costs()
        bits = learned["bits"].numpy()
        self._problem = problem
        self._threshold = threshold
        self._place, self._block = bits[:, 0], bits[:, 1]
        keep = learned["keep"].double().numpy().clip(1e-6, 1 - 1e-6)
        self._keep: Floats = keep[self._place, self._block]
        self._least = float(sum(int(table[0]) for table in tables))
        self._prices = np.array([int(table[1]) - int(table[0]) for table in tables])

    @cached_property
    def budgets(self) -> tuple[float, float]:
        """MACs of the cheapest and of the dearest schedule that it can make within the limit."""
        return self._least, min(self._least + float(self._prices.sum()), most_within(self._problem))

    def genome(self, way: Choosing, budget: float) -> Genome:
        """At most as dear as the budget; the cheapest where that is dearer still."""
        ways: dict[Choosing, Callable[[float], npt.NDArray[np.bool_]]] = {
            "bisection": self._bisection,
            "greedy": self._greedy,
            "knapsack": self._knapsack,
            "threshold": self._above,
        }
        return tuple(int(bit) for bit in ways[way](budget - self._least))

    def _above(self, room: float) -> npt.NDArray[np.bool_]:
        kept: npt.NDArray[np.bool_] = self._keep > self._threshold
        return kept if self._prices[kept].sum() <= room else self._bisection(room)

    def _bisection(self, room: float) -> npt.NDArray[np.bool_]:
        """All that is kept as surely as the last one that there is room for, and nothing where not all of these have room."""
        values, places = np.unique(-self._keep, return_inverse=True)
        totals = np.cumsum(np.bincount(places, self._prices))
        fits = int(np.searchsorted(totals, room, side="right"))
        return -self._keep <= values[fits - 1] if fits else np.zeros(len(self._keep), dtype=bool)

    def _greedy(self, room: float) -> npt.NDArray[np.bool_]:
        kept: npt.NDArray[np.bool_] = np.ones(len(self._keep), dtype=bool)
        skip, total = 1 - self._keep, float(self._prices.sum())
        for threshold in (*np.arange(0.95, 0.0, -0.05), -1.0):
            for block in range(self._block.max(), -1, -1):
                mine = np.flatnonzero(kept & (self._block == block) & (skip > threshold))
                for bit in mine[np.argsort(-skip[mine], kind="stable")]:
                    if total <= room:
                        return kept
                    kept[bit] = False
                    total -= float(self._prices[bit])
        return kept

    def _knapsack(self, room: float) -> npt.NDArray[np.bool_]:
        """Of gates of one price those are shut first that are surest to be skipped: what is chosen is how many of each price are open."""
        regret = -np.log(1 - self._keep)
        groups = [np.flatnonzero(self._prices == price) for price in np.unique(self._prices)]
        groups = [group[np.argsort(-regret[group], kind="stable")] for group in groups]
        prices = [[int(self._prices[group[0]]) * count for count in range(len(group) + 1)] for group in groups]
        errors = [[float(regret[group[count:]].sum()) for count in range(len(group) + 1)] for group in groups]
        [found] = allocate(prices, errors, [room])
        kept: npt.NDArray[np.bool_] = np.zeros(len(self._keep), dtype=bool)
        for group, count in zip(groups, found[0].options if found else [0] * len(groups), strict=True):
            kept[group[:count]] = True
        return kept


def meanings(problem: Problem, net: LoadedSupernet, full: Schedule, finer: Finer) -> dict[str, torch.Tensor]:
    """What the options of the space mean for the gates, see `Chooser`."""
    space, costs = problem.space, IntervalCosts(problem.space)
    top = dearest(space)
    arch, guided = arch_of(full), {step.timestep: step.guidance for step in full.steps}
    names = net.blocks(arch, finer)
    whole = net.macs(Step(0, arch))
    found = {"weight": torch.tensor([1 - net.macs(Step(0, arch, (name,))) / whole for name in names])}
    most = exact_cost(space, top)
    places = {step.timestep: number - 1 for number, step in enumerate(full.steps)}
    any_reuse = False
    for k, (genes, table) in enumerate(zip(costs.genes, costs.tables, strict=True)):
        changed = [costs.changed(top, {k: option}) for option in np.ndindex(table.shape)]
        schedules = [space.decode(genome) for genome in changed]
        saved = [most - exact_cost(space, genome) for genome in changed]
        found[f"price.{k}"] = int(table[top[genes]]) - torch.tensor(saved)
        runs = [_running(schedule, places, names, net, finer) for schedule in schedules]
        pure = torch.tensor([_reuses_alone(schedule, arch, guided, net) for schedule in schedules])
        mine = torch.stack([run for run, is_pure in zip(runs, pure.tolist(), strict=True) if is_pure])
        say = (mine != mine[0]).any(dim=2).any(dim=0)
        asks = torch.stack(runs)
        asks[:, ~say] = torch.nan
        found[f"asks.{k}"], found[f"open.{k}"] = asks, pure
        any_reuse = any_reuse or bool(say.any())
    if not any_reuse:
        raise UserError(
            "the space offers no blocks to reuse; give it patterns, such as Stepwise(patterns=legal(levels)), or of a transformer use Branches"
        )
    return found


def _reuses_alone(schedule: Schedule, arch: Arch, guided: Mapping[int, Guidance | None], net: LoadedSupernet) -> bool:
    """Whether reuse is all that it changes: it runs this subnet, guided as the full schedule is; a held prediction is whoever's it was."""
    return all(
        step.arch == arch and (step.guidance == guided.get(step.timestep) or not net.macs(step))
        for step in schedule.steps
    )


def _running(
    schedule: Schedule, places: Mapping[int, int], names: Sequence[str], net: LoadedSupernet, finer: Finer
) -> torch.Tensor:
    """Whether each block runs at each step but the first, (steps - 1, blocks); a step that is left out runs none."""
    runs = torch.zeros(len(places) - 1, len(names))
    for step in schedule.steps:
        if step.timestep not in places:
            raise UserError(
                f"gates are learned on the steps of the dearest schedule, and timestep {step.timestep} is none of them; give the space a pattern "
                "that runs all steps, such as Every(1)"
            )
        if places[step.timestep] >= 0:
            reused = set(net.expanded(step.arch, step.reuse, finer))
            runs[places[step.timestep]] = torch.tensor([float(name not in reused) for name in names])
    return runs
