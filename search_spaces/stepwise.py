"""The search space: for each interval of timesteps, which subnet of the supernet runs there, at which of its steps, and which blocks
it reuses from the step before."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from typing import Annotated, Any, Protocol, TypeVar

import numpy as np
import numpy.typing as npt
from pydantic import Field

from nas.contracts import (
    SAMPLER,
    WITHOUT_ATTENTION,
    Choice,
    Finer,
    Genome,
    Guidance,
    Price,
    Schedule,
    Step,
    UserError,
    frozen,
)
from nas.genomes.genetics import dearest
from nas.recipes import Count, recipe
from search_spaces.intervals import Timesteps, free, per_step
from search_spaces.networks.slices import Arch
from search_spaces.options import Options, Subnets
from search_spaces.patterns import ALL, Computed, Pattern, check_listed
from search_spaces.shipped.graph import AROUND
from search_spaces.supernet import Elastic

Part = TypeVar("Part")


class NamedSampler(Protocol):
    """What there is to know of a sampler in order to choose it."""

    @property
    def name(self) -> str: ...
    @property
    def stochastic(self) -> bool: ...
    @property
    def multistep(self) -> bool: ...
    def describe(self) -> dict[str, Any]: ...


@recipe
class Stepwise:
    """For each interval, noisy to clean, one gene for each decision: width, and what else the options leave open.

    `intervals[k]` is how many of the `timesteps` interval k holds. `options`: what interval k may choose, one for each, or one
    for all; by default whatever the supernet was made for. `budgets`: upper limits of what interval k's subnet costs, as shares of
    the full net's MACs, such as `linear_budgets`; none by default. Raises UserError where they do not add up, leave the supernet's
    range, or ask for subnets that it is not trained for.

    `patterns`: what the steps of an interval may compute, as one more gene of each; by default the whole subnet at each step. The
    first step computes everything; so does a step whose subnet is another one than that of the step before, since nothing of that can be
    reused. `finer`: branches without a reader, or "layers", do not run either, where otherwise blocks run whole. `deterministic`: the sampler is DDIM
    without noise and without memory, where a step that computes nothing equals a longer step, and so leaves the schedule; otherwise it stays and holds
    the prediction, which only UNets can.

    A transformer's step may run what stands `AROUND` its blocks alone, `Every(2, (AROUND,))`: all that they add is that of the step before, gated anew.

    `guidance`: how the steps of an interval may be guided, as one more gene of each; None for not at all, a scale, or `Guidance(scale, arch)`
    where another subnet predicts without the condition. By default no step is guided.

    `samplers`: which may run the trajectory, as one more gene of all of it; the evaluator is given the same. By default the evaluator's own.
    """

    net: Elastic
    timesteps: Annotated[Timesteps, Field(min_length=1)]
    intervals: Annotated[tuple[Count, ...], Field(min_length=1)]
    options: Options | tuple[Options, ...] | None = None
    budgets: tuple[Annotated[float, Field(gt=0, le=1)], ...] = ()
    patterns: tuple[Pattern, ...] = ()
    finer: Finer = False
    deterministic: bool = True
    guidance: tuple[Annotated[float, Field(gt=0, le=1000)] | Guidance | None, ...] = ()
    samplers: tuple[NamedSampler, ...] = ()

    def __post_init__(self) -> None:
        if any(self.guidance) and not self.net.conditional:
            raise UserError(
                "guidance needs a network that takes conditions; give the UNet config num_class_embeds, one more than there are classes, or one that reads texts"
            )
        if len(set(self._guides)) != len(self._guides):
            raise UserError(f"guidance {self.guidance} must be distinct")
        for guide in self._guides:
            self.net.check_guidance(guide)
        if len({one.name for one in self.samplers}) != len(self.samplers):
            raise UserError(f"samplers {', '.join(one.name for one in self.samplers)} must be distinct")
        if self.needs_deterministic and any(one.stochastic or one.multistep for one in self.samplers):
            raise UserError(
                "steps that compute nothing are left out, which only a deterministic sampler without memory does not notice; give "
                "deterministic=False, or DDIM alone"
            )
        free(*self.timesteps)
        if sum(self.intervals) != len(self.timesteps) or min(self.intervals, default=0) < 1:
            raise UserError(
                f"intervals of {self.intervals} steps do not add up to the sampler's {len(self.timesteps)} steps"
            )
        if self.timesteps[0] >= self.net.noise.timesteps:
            raise UserError(f"timestep {self.timesteps[0]} is past the supernet's last, {self.net.noise.timesteps - 1}")
        for name, given in (("options", self.options), ("budgets", self.budgets or None)):
            if isinstance(given, tuple) and len(given) != len(self.intervals):
                raise UserError(
                    f"{len(given)} {name} for {len(self.intervals)} intervals; give one for each, or one for all"
                )
        for k, subnets in enumerate(self.subnets):
            if not subnets.options.within(self.net.options):
                raise UserError(
                    f"interval {k} asks for {subnets.options}, but the supernet is trained for {self.net.options}; choose among those"
                )

    @cached_property
    def subnets(self) -> tuple[Subnets, ...]:
        """What each interval may run."""
        options = self.options or self.net.options
        each = (options,) * len(self.intervals) if isinstance(options, Options) else options
        budgets = self.budgets or (1.0,) * len(self.intervals)
        return tuple(self.net.subnets(one, share) for one, share in zip(each, budgets, strict=True))

    @cached_property
    def choices(self) -> tuple[Choice, ...]:
        return tuple(
            # It stands first among the genes of the first interval, and costs nothing.
            Choice(name if name == SAMPLER else f"interval{k:02d}.{name}", options, k)
            for k, subnets in enumerate(self.subnets)
            for name, options in self._genes(k, subnets)
        )

    @property
    def spans(self) -> tuple[tuple[int, int], ...]:
        """First and last timestep of each interval, for who labels them."""
        ends = np.cumsum(self.intervals)
        return tuple(
            (self.timesteps[end - count], self.timesteps[end - 1])
            for end, count in zip(ends.tolist(), self.intervals, strict=True)
        )

    @property
    def needs_deterministic(self) -> bool:
        """Whether its schedules presuppose a sampler without noise and without memory."""
        return self.deterministic and bool(self.patterns)

    def decode(self, genome: Genome) -> Schedule:
        """Equal schedules for genomes that come to the same: what a step cannot reuse it computes, and a block that nobody reads does
        not run."""
        steps: list[Step] = []
        for k, genes in enumerate(self._split(genome)):
            steps += self._run(k, genes, steps[-1] if steps else None)
        return Schedule(tuple(steps), self._sampler(genome))

    def running(self, pattern: Pattern, guided: int | None = None) -> Schedule:
        """The full network by a pattern of the whole trajectory, such as `search_spaces.layouts` reads, with the first sampler. The first `guided` steps, all
        where that is not said, are guided by what the space guides with, the dearest where it has several. Raises UserError where the network lacks what the
        pattern names, or where it is one of another number of steps."""
        full = self.net.anatomy.full
        computed = pattern.steps(len(self.timesteps))
        for one in dict.fromkeys(computed):
            self._check_computed(pattern, one)
        guide = max(self._guides, key=lambda one: self.net.macs(Step(0, full, (), self._guided_by(one, full))))
        served = [pair for steps in self._steps for pair in steps]
        asked = (
            (t, full.replace(expert=expert) if expert else full, runs, guide if guided is None or n < guided else None)
            for n, ((t, expert), runs) in enumerate(zip(served, computed, strict=True))
        )
        return Schedule(tuple(self._follow(asked, None)), self.samplers[0].name if self.samplers else "")

    def genome(self, made: Schedule | Pattern) -> Genome:
        """One that decodes to this schedule, such as another run found, or to what is `running` by this pattern. Raises UserError where an interval has no
        options that do."""
        schedule = made if isinstance(made, Schedule) else self.running(made)
        found: Genome = ()
        last: Step | None = None
        for k, (here, shape) in enumerate(zip(self._steps, self._shapes, strict=True)):
            served = {t for t, _ in here}
            wanted = [step for step in schedule.steps if step.timestep in served]
            # What an interval runs does not depend on later ones, so that its options are found one interval after another.
            for option in np.ndindex(*shape):
                genes = tuple(int(gene) for gene in option)
                if self._run(k, genes, last) == wanted and (k > 0 or self._sampler(genes) == schedule.sampler):
                    break
            else:
                raise UserError(
                    f"the schedule {schedule.digest} is none of this space: no options of interval {k} run what it runs there"
                )
            found, last = found + genes, wanted[-1] if wanted else last
        if self.decode(found) != schedule:
            raise UserError(
                f"the schedule {schedule.digest} has steps at other timesteps than this space; give it those"
            )
        return found

    def cost(self, genome: Genome) -> dict[str, float]:
        """`params` counts a subnet again for each expert that runs it. A network with attention has its share as papers count it that
        leave out attention's products, too."""
        attends = self._full_attention_macs > 0
        attention = 0
        if self.patterns:
            schedule = self.decode(genome)
            macs = sum(self.net.macs(step) for step in schedule.steps)
            attention = sum(self.net.attention_macs(step) for step in schedule.steps) if attends else 0
            archs = {Arch(*arch) for arch in schedule.archs}
        else:
            genes = self._split(genome)
            macs = sum(int(table[option]) for table, option in zip(self._tables, genes, strict=True))
            if attends:
                attention = sum(int(t[option]) for t, option in zip(self._attention_tables, genes, strict=True))
            each = (one for k, own in enumerate(genes) for one in self._asked(k, own))
            asked = [(arch, self._guided_by(guide, arch)) for _, arch, _, guide in each]
            archs = {arch for arch, _ in asked} | {Arch(*by.arch) for _, by in asked if by and by.arch}
        params = sum(self.net.cost(arch).params for arch in archs)
        cost = {"macs": macs, "macs_share": macs / self._full_macs, "params": params}
        if attends:
            cost[WITHOUT_ATTENTION] = (macs - attention) / (self._full_macs - self._full_attention_macs)
        return cost

    def of_each_step(self, options: Options) -> Stepwise:
        """A space whose every step chooses by itself among the options: guided as this one's dearest schedule, by the last of its samplers, without
        reuse."""
        genome = dearest(self)
        guide = self._guides[genome[-1] if len(self._guides) > 1 else 0]
        sampler = genome[0] if len(self.samplers) > 1 else 0
        return Stepwise(
            self.net,
            self.timesteps,
            per_step(self.timesteps),
            options,
            guidance=() if guide is None else (guide,),
            samplers=self.samplers[sampler : sampler + 1],
        )

    def interval_costs(self, price: Price | None = None) -> tuple[npt.NDArray[np.int64], ...]:
        return self._tables if price is None else self._priced(price)

    def describe(self) -> dict[str, Any]:
        described: dict[str, Any] = {
            "class": "Stepwise",
            "timesteps": self.timesteps,
            "intervals": self.intervals,
            "options": [subnets.options.describe() for subnets in self.subnets],
            "budgets": self.budgets,
            "experts": self.net.experts,
        }
        if self.patterns:
            asked = [[pattern.steps(count) for pattern in self._patterns[k]] for k, count in enumerate(self.intervals)]
            described |= {"patterns": asked, "finer": self.finer, "deterministic": self.deterministic}
        if any(self.guidance):
            described["guidance"] = self._guides
        if self.samplers:
            described["samplers"] = [one.describe() for one in self.samplers]
        return described

    # --------------------------------------------------------------------------------------------------- guidance

    @property
    def _guides(self) -> tuple[Guidance | None, ...]:
        """What an interval may choose; a single one, of no guidance, where nothing is said."""
        each = (Guidance(one) if isinstance(one, int | float) else one for one in self.guidance or (None,))
        return tuple(one and Guidance(float(one.scale), frozen(one.arch)) for one in each)

    def _guided_by(self, guide: Guidance | None, arch: Arch) -> Guidance | None:
        """By the subnet's own weights where they are an expert's, and by itself where it is the subnet that guides."""
        return self.net.guided_by(guide, arch)

    def _guidance_gene(self) -> list[tuple[str, tuple[str, ...]]]:
        if len(self._guides) < 2:
            return []
        return [("guidance", tuple(_guide_label(guide) for guide in self._guides))]

    def _genes(self, k: int, subnets: Subnets) -> list[tuple[str, tuple[float | int | str, ...]]]:
        """Names and options of interval k's genes."""
        return [*self._sampler_gene(k), *self._subnet_genes(k, subnets), *self._pattern_gene(k), *self._guidance_gene()]

    def _sampler_gene(self, k: int) -> list[tuple[str, tuple[str, ...]]]:
        return [(SAMPLER, tuple(one.name for one in self.samplers))] if k == 0 and len(self.samplers) > 1 else []

    # ------------------------------------------------------------------------------------------------------ reuse

    @cached_property
    def _patterns(self) -> tuple[tuple[Pattern, ...], ...]:
        """Of each interval, the cheapest first, as the full net would run them."""
        full = self.net.anatomy.full
        order = []
        for k, count in enumerate(self.intervals):
            priced = [
                (sum(self._macs(full, one) for one in pattern.steps(count)), pattern) for pattern in self.patterns
            ]
            order.append(tuple(pattern for _, pattern in sorted(priced, key=lambda pair: pair[0])))
            for pattern in self.patterns:
                for computed in pattern.steps(count):
                    self._check_computed(pattern, computed)
            labels = [pattern.label for pattern in order[k]]
            if len(set(labels)) != len(labels):
                raise UserError(f"patterns {labels} must be distinct")
        return tuple(order)

    def _check_computed(self, pattern: Pattern, computed: Computed) -> None:
        """Raises UserError for blocks that the network lacks, and for a set of which nothing would run, or not all."""
        graph = self.net.cost.graph(self.net.anatomy.full)
        check_listed(pattern, graph)
        if computed == () and graph.predicts_anew and not self.deterministic:
            raise UserError(
                f"pattern {pattern.label!r} would hold a prediction, which a transformer does not: what stands around its blocks predicts anew; "
                "say (AROUND,) instead of ()"
            )
        if not computed or computed == ALL:
            return
        if graph.predicts_anew and computed == (AROUND,):
            return
        unknown = [name for name in computed if not graph.expand([name])]
        if unknown:
            raise UserError(
                f"pattern {pattern.label!r} names {', '.join(unknown)}; the network's blocks are {', '.join(graph.blocks)}"
            )
        if graph.predicts_anew and graph.live(computed, self.finer) != graph.expand(computed):
            raise UserError(f"pattern {pattern.label!r} names branches, and blocks run whole here; give finer=True")
        if not graph.live(computed, self.finer):
            hint = "" if self.finer else ", whole blocks, or branches with finer=True"
            raise UserError(
                f"pattern {pattern.label!r} would run nothing, since nobody reads {', '.join(computed)}; name {graph.blocks[-1]} and what leads to it{hint}"
            )

    def _subnet_genes(self, k: int, subnets: Subnets) -> list[tuple[str, tuple[float | int | str, ...]]]:
        """None where one subnet is all there is and the interval has something else to choose, of which the sampler is in the first alone."""
        several = (self.patterns, self._guides, self.samplers if k == 0 else ())
        single = len(subnets) == 1 and any(len(options) > 1 for options in several)
        return [] if single else [(gene.name, gene.options) for gene in subnets.genes]

    def _pattern_gene(self, k: int) -> list[tuple[str, tuple[str, ...]]]:
        return [("reuse", tuple(pattern.label for pattern in self._patterns[k]))] if len(self.patterns) > 1 else []

    def _asked(self, k: int, genes: Genome) -> Iterator[tuple[int, Arch, Computed, Guidance | None]]:
        """For each timestep of interval k the subnet, what its genes ask it to compute, whether that can be had or not, and what is to
        guide it."""
        subnets, genes = self.subnets[k], genes[len(self._sampler_gene(k)) :]
        own = len(self._subnet_genes(k, subnets))
        arch = subnets.arch(genes[:own] if own else (0,) * len(subnets.shape))
        guide = self._guides[genes[-1] if len(self._guides) > 1 else 0]
        for (t, expert), computed in zip(self._steps[k], self._computed(k, genes[own:]), strict=True):
            yield t, arch.replace(expert=expert) if expert else arch, computed, guide

    def _run(self, k: int, genes: Genome, last: Step | None) -> list[Step]:
        """Steps of interval k, after the last one that ran before it."""
        return self._follow(self._asked(k, genes), last)

    def _follow(self, asked: Iterable[tuple[int, Arch, Computed, Guidance | None]], last: Step | None) -> list[Step]:
        steps: list[Step] = []
        for t, arch, computed, guide in asked:
            last = steps[-1] if steps else last
            idle = computed is None or (not computed and self.deterministic)
            if idle and last is not None:
                continue
            if last is not None and not computed:
                # It holds the prediction, whose it may be, guided as it was.
                steps.append(Step(t, last.arch, self._everything(Arch(*last.arch)), last.guidance))
                continue
            by = self._guided_by(guide, arch)
            can = last is not None and arch == Arch(*last.arch) and _keeps(last, by)
            steps.append(Step(t, arch, self._reused(arch, computed) if can else (), by))
        return steps

    def _sampler(self, genome: Genome) -> str:
        return self.samplers[genome[0] if len(self.samplers) > 1 else 0].name if self.samplers else ""

    @cached_property
    def _steps(self) -> list[tuple[tuple[int, str], ...]]:
        """Of each interval the timesteps, and the expert that serves each."""
        return list(_parts([(t, self.net.expert_at(t)) for t in self.timesteps], self.intervals))

    def _computed(self, k: int, gene: Genome) -> tuple[Computed, ...]:
        count = self.intervals[k]
        chosen = gene[0] if len(self.patterns) > 1 else 0
        return self._patterns[k][chosen].steps(count) if self.patterns else (ALL,) * count

    def _reused(self, arch: Arch, computed: Computed) -> tuple[str, ...]:
        if computed == ALL:
            return ()
        key = arch.replace(widths=(), expert=""), computed
        if key not in self._known_reuse:
            graph = self.net.cost.graph(arch)
            running = graph.live(computed or (), self.finer)
            self._known_reuse[key] = graph.collapse(graph.expand(graph.blocks) - running, self.finer)
        return self._known_reuse[key]

    def _everything(self, arch: Arch) -> tuple[str, ...]:
        """What a step reuses that holds the prediction: all that any step after it may reuse."""
        graph = self.net.cost.graph(arch)
        return graph.collapse(graph.expand(graph.blocks), self.finer)

    @cached_property
    def _known_reuse(self) -> dict[Any, tuple[str, ...]]:
        return {}

    def _macs(self, arch: Arch, computed: Computed) -> int:
        return self.net.cost.macs(arch, self._reused(arch, computed)) if computed else 0

    @cached_property
    def _tables(self) -> tuple[npt.NDArray[np.int64], ...]:
        return self._priced(self.net.macs)

    @cached_property
    def _attention_tables(self) -> tuple[npt.NDArray[np.int64], ...]:
        return self._priced(self.net.attention_macs)

    def _priced(self, price: Price) -> tuple[npt.NDArray[np.int64], ...]:
        """What an interval takes whatever the one before runs: its first running step may reuse blocks only where all intervals
        run the same subnet, and whatever that kept is enough for it."""
        alike = len({subnets.arch((0,) * len(subnets.shape)) for subnets in self.subnets}) == 1 and not self.net.experts
        alike = alike and all(len(subnets) == 1 for subnets in self.subnets)
        found = []
        for k, (subnets, served) in enumerate(zip(self.subnets, self._steps, strict=True)):
            experts = [expert for _, expert in served]
            choices = (len(self.patterns),) if len(self.patterns) > 1 else ()
            patterns = [self._computed(k, gene) for gene in np.ndindex(*choices)]
            costs = [
                self._interval_cost(
                    price,
                    subnets.arch(option),
                    steps,
                    experts,
                    k == 0,
                    alike and self._finds_enough(guide, subnets.arch(option)),
                    guide,
                )
                for option in np.ndindex(*subnets.shape)
                for steps in patterns
                for guide in self._guides
            ]
            samplers = math.prod(len(options) for _, options in self._sampler_gene(k))
            found.append(np.array(costs * samplers, dtype=np.int64).reshape(self._shapes[k]))
        return tuple(found)

    def _finds_enough(self, guide: Guidance | None, arch: Arch) -> bool:
        """Whether a step so guided can reuse what any other of its subnet kept: one that guides itself needs both halves."""
        by = self._guided_by(guide, arch)
        return len(self._guides) == 1 or by is None or bool(by.arch)

    def _interval_cost(
        self,
        price: Price,
        arch: Arch,
        steps: Sequence[Computed],
        experts: Sequence[str],
        first: bool,
        alike: bool,
        guide: Guidance | None,
    ) -> int:
        total, before = 0, experts[0] if alike and not first else None
        distinct = dict.fromkeys(experts)
        for place, (computed, expert) in enumerate(zip(steps, experts, strict=True)):
            if computed or (first and place == 0):
                mine = arch.replace(expert=expert) if expert else arch
                by = self._guided_by(guide, mine)
                whole = Step(0, mine, (), by)
                if first and place == 0 and self._holds:  # a later interval may hold what it predicts
                    self._held(price, arch, expert, guide)
                reused = Step(0, mine, self._reused(arch, computed), by) if computed else whole
                if before == expert:
                    total += price(reused)
                elif before is None and not (first and place == 0):  # the interval before may have run the same subnet
                    total += max(price(whole), price(reused))
                else:
                    total += price(whole)
                before = expert
            elif not computed and computed is not None and not self.deterministic:
                # Of whichever subnet ran last, guided as it was: one of another interval is priced there.
                total += max(self._held(price, arch, expert, guide) for expert in distinct)
        return total

    @cached_property
    def _holds(self) -> bool:
        """Whether a step of some interval may hold a prediction."""
        every = (pattern.steps(count) for pattern in self.patterns for count in self.intervals)
        return not self.deterministic and any(() in steps for steps in every)

    def _held(self, price: Price, arch: Arch, expert: str, guide: Guidance | None) -> int:
        """Of a step that holds what a whole call of this subnet predicted, which is priced along."""
        mine = arch.replace(expert=expert) if expert else arch
        by = self._guided_by(guide, mine)
        price(Step(0, mine, (), by))
        return price(Step(0, mine, self._everything(arch), by))

    # ----------------------------------------------------------------------------------------------------- genomes

    @cached_property
    def _shapes(self) -> list[tuple[int, ...]]:
        return [tuple(len(options) for _, options in self._genes(k, subnets)) for k, subnets in enumerate(self.subnets)]

    def _split(self, genome: Genome) -> list[Genome]:
        """The genes of each interval. Raises ValueError for a genome that is not of this space."""
        sizes = [size for shape in self._shapes for size in shape]
        if len(genome) != len(sizes) or not all(0 <= gene < size for gene, size in zip(genome, sizes, strict=True)):
            raise ValueError(f"genome {genome} must hold {len(sizes)} option indices below {sizes}")
        return list(_parts(genome, [len(shape) for shape in self._shapes]))

    @cached_property
    def _full_macs(self) -> int:
        """Of the full net at every timestep, guided by itself where the space has guidance."""
        return len(self.timesteps) * self.net.macs(self._full_step)

    @cached_property
    def _full_attention_macs(self) -> int:
        return len(self.timesteps) * self.net.attention_macs(self._full_step)

    @property
    def _full_step(self) -> Step:
        return Step(0, self.net.anatomy.full, (), Guidance(1.0) if any(self._guides) else None)


def _keeps(last: Step, by: Guidance | None) -> bool:
    """Whether what a step kept is enough for one so guided: who guides itself needs outputs of twice as many rows."""
    return by is None or bool(by.arch) or (last.guidance is not None and not last.guidance.arch)


def _guide_label(guide: Guidance | None) -> str:
    if guide is None:
        return "none"
    other = f" by {'/'.join(f'{share:g}' for share in Arch(*guide.arch).widths)}" if guide.arch else ""
    return f"{guide.scale:g}{other}"


def _parts(whole: Sequence[Part], lengths: Sequence[int]) -> Iterator[tuple[Part, ...]]:
    start = 0
    for length in lengths:
        yield tuple(whole[start : start + length])
        start += length
