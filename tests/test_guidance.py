"""Guidance: its steps against calls by hand, its cost and its reuse, spaces that choose it, and what scores and gates make of it."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.cost import macs_of
from evaluators.conditions import Labels
from evaluators.frechet import Frechet
from evaluators.images import Digits
from evaluators.proxies import DenoisingLoss, TeacherDistance, TrajectoryDistance
from evaluators.sampling import DDIM, DDPM, DPMSolver, sample
from evaluators.trajectories import Trajectories
from nas.contracts import Guidance, Problem, Schedule, Step, UserError
from nas.genomes.genetics import IntervalCosts, dearest, uniform_genomes
from nas.genomes.timed import TimedSpace, calls, key
from nas.searchers.choosers import Chooser
from nas.searchers.gates import Gates
from nas.searchers.pruner import Pruner, learn_gates
from nas.testing import check_evaluator, check_space, check_supernet
from search_spaces.intervals import per_step, uniform
from search_spaces.loaded import LoadedElastic
from search_spaces.networks.slices import Arch
from search_spaces.options import Options
from search_spaces.partitions import Partitions, StepEffects, compare
from search_spaces.patterns import Every, Only
from search_spaces.shipped.graph import graph_of
from search_spaces.shipped.reuse import run
from search_spaces.shipped.walks import arguments
from search_spaces.stepwise import Stepwise
from search_spaces.supernet import Elastic
from tests.arithmetic import CALL, SAMPLES
from tests.labelled import BY_HALF, HALF, NET, SCHEDULES, SPACES, WHOLE, batch
from tests.test_supernet import randomised


@pytest.mark.parametrize("guide", [Guidance(2.0), Guidance(0.0), Guidance(1.0), BY_HALF], ids=str)
def test_a_guided_step_is_two_calls(labelled: LoadedElastic, guide: Guidance) -> None:
    x, labels, null = batch()
    with torch.no_grad():
        noise, _ = labelled.denoiser(Step(400, WHOLE, (), guide))(x, 400, None, {"class_labels": labels})
        told = labelled.extract(WHOLE)(x, 400, class_labels=labels).sample
        plain = labelled.extract(Arch(*(guide.arch or WHOLE)))(x, 400, class_labels=null).sample
    assert torch.allclose(noise, plain + guide.scale * (told - plain), atol=5 * CALL)
    assert torch.equal(labelled.null_condition({"class_labels": labels})["class_labels"], null)


@pytest.mark.parametrize("guide", [None, Guidance(2.0), BY_HALF], ids=str)
def test_a_guided_steps_cost_is_that_of_what_runs(labelled: LoadedElastic, guide: Guidance | None) -> None:
    x, t = torch.zeros(1, 1, 8, 8), torch.tensor([400])
    calls = [WHOLE] if guide is None else [WHOLE, Arch(*(guide.arch or WHOLE))]
    counted = 0
    for arch in calls:
        model = labelled.extract(arch)
        counted += macs_of(model, arguments(model, x, t, {"class_labels": torch.tensor([1])}))[0]
    assert labelled.macs(Step(400, WHOLE, (), guide)) == counted


@pytest.mark.parametrize("before", [None, Guidance(3.0), BY_HALF], ids=str)
@pytest.mark.parametrize("guide", [None, Guidance(2.0), BY_HALF], ids=str)
def test_a_guided_step_reuses_what_each_of_its_calls_had(
    labelled: LoadedElastic, before: Guidance | None, guide: Guidance | None
) -> None:
    """The reference runs both predictions apart, each with blocks of its own."""
    if guide == Guidance(2.0) and before != Guidance(3.0):
        return  # who guides itself needs both; the space does not ask for it
    (first, labels, null), (x, _, _) = batch(0), batch(1)
    model, half = labelled.extract(WHOLE), labelled.extract(HALF)
    graph = graph_of(model)
    reuse = tuple(name for name in graph.blocks if name not in ("d0", "u1"))
    told, untold = {"class_labels": labels}, {"class_labels": null}
    with torch.no_grad():
        _, cache = labelled.denoiser(Step(500, WHOLE, (), before), reuse)(first, 500, None, told)
        noise, _ = labelled.denoiser(Step(400, WHOLE, reuse, guide))(x, 400, cache, told)
        own = run(model, x, 400, reuse, (), run(model, first, 500, (), reuse, None, told)[1], told)[0]
        if guide is None:
            expected = own
        elif guide.arch:
            other = half(x, 400, class_labels=null).sample
            expected = other + guide.scale * (own - other)
        else:
            other = run(model, x, 400, reuse, (), run(model, first, 500, (), reuse, None, untold)[1], untold)[0]
            expected = other + guide.scale * (own - other)
    assert torch.allclose(noise, expected, atol=5 * CALL)


def test_a_guided_step_without_conditions_is_refused(labelled: LoadedElastic) -> None:
    with pytest.raises(ValueError, match="needs the samples' conditions"):
        labelled.denoiser(Step(400, WHOLE, (), Guidance(2.0)))(batch()[0], 400)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("sampler", [DDIM(), DDPM(), DPMSolver()], ids=lambda sampler: type(sampler).__name__)
def test_shared_beginnings_change_no_bit(labelled: LoadedElastic, name: str, sampler: Any) -> None:
    conditions, schedule = Labels(Digits()).load(), SCHEDULES[name]
    shared = Trajectories(labelled, sampler, conditions=conditions)
    expected = sample(labelled, schedule, sampler, 0, 0, 8, conditions)
    for _ in range(2):
        assert torch.equal(shared.images(schedule, 0, 0, 8), expected)
    changed = Schedule((*schedule.steps[:-1], replace(schedule.steps[-1], arch=HALF, reuse=(), guidance=None)))
    assert torch.equal(shared.images(changed, 0, 0, 8), sample(labelled, changed, sampler, 0, 0, 8, conditions))
    assert shared.meter.macs + shared.meter.cached_macs == 8 * (
        2 * sum(map(labelled.macs, schedule.steps)) + sum(map(labelled.macs, changed.steps))
    )
    parts = torch.cat([sample(labelled, schedule, sampler, 0, start, start + 4, conditions) for start in (0, 4)])
    assert torch.allclose(parts, expected, atol=SAMPLES)


def test_guidance_survives_json_and_older_schedules_keep_their_digests() -> None:
    for schedule in SCHEDULES.values():
        assert Schedule.from_json(schedule.to_json()) == schedule
    old = Schedule((Step(900, (0.5, 1.0)), Step(100, (1.0, 1.0), ("mid",))))
    assert old.to_json() == '[[900,[0.5,1.0],[]],[100,[1.0,1.0],["mid"]]]'
    guided = Schedule((Step(900, (0.5, 1.0), (), Guidance(2.0)), Step(100, (1.0, 1.0), ("mid",))))
    assert guided.digest != old.digest
    assert SCHEDULES["guided by the half"].archs == (WHOLE, HALF)


@pytest.mark.parametrize("name", SPACES)
def test_spaces_with_guidance_keep_the_laws(name: str) -> None:
    space = SPACES[name]
    check_space(space, samples=100)
    net = space.net
    rng = np.random.default_rng(0)
    for _ in range(100):
        genome = tuple(int(rng.integers(len(choice.options))) for choice in space.choices)
        schedule = space.decode(genome)
        macs = sum(net.macs(step) for step in schedule.steps)
        assert space.cost(genome)["macs"] == macs <= IntervalCosts(space).total(genome)
        assert space.cost(genome)["macs_share"] == macs / (6 * 2 * net.cost(net.uniform(1.0)).macs)
        assert space.cost(genome)["params"] == sum(net.cost(Arch(*arch)).params for arch in schedule.archs)
        if not space.patterns:
            assert IntervalCosts(space).total(genome) == macs
        for before, step in zip((None, *schedule.steps), schedule.steps, strict=False):
            if step.reuse and step.guidance and not step.guidance.arch:
                assert before is not None
                assert before.guidance is not None
                assert not before.guidance.arch, "who guides itself reuses of who did"


@pytest.mark.parametrize("experts", [(), (500,), (300,)])
@pytest.mark.parametrize("guidance", [(2.0,), (None, 2.0)])
def test_steps_that_hold_a_guided_prediction_have_a_time(
    guidance: tuple[float | None, ...], experts: tuple[int, ...]
) -> None:
    """They call nothing, whatever was called before."""
    net = replace(NET, experts=experts)
    space = Stepwise(
        net, uniform(4), (2, 2), guidance=guidance, patterns=(Every(1), Every(2), Only(())), deterministic=False
    )
    times = {key(step): 0.0 if not space.net.macs(step) else 1.0 + len(key(step)) for step in calls(space)}
    timed = TimedSpace(space, times)
    for genome in itertools.product(*(range(len(choice.options)) for choice in space.choices)):
        steps = timed.decode(genome).steps
        known = sum(times[key(step)] for step in steps if space.net.macs(step))
        assert timed.cost(genome)["latency_ms"] == pytest.approx(known)
        assert IntervalCosts(timed).total(genome) / 1e6 >= known - 1e-6


@pytest.mark.parametrize("name", SPACES)
def test_every_schedule_of_such_a_space_can_be_sampled(name: str) -> None:
    space = SPACES[name]
    loaded = randomised(space.net)
    for seed, expert in enumerate(space.net.expert_names):
        loaded.experts[expert] = space.net.initial(seed).full
    rng, conditions = np.random.default_rng(1), Labels(Digits()).load()
    for _ in range(3):
        genome = tuple(int(rng.integers(len(choice.options))) for choice in space.choices)
        assert sample(loaded, space.decode(genome), DDIM(), 0, 0, 2, conditions).isfinite().all()


@pytest.mark.parametrize("name", ["guidance and width", "and reuse"])
def test_class_conditional_supernets_keep_the_laws(name: str, labelled: LoadedElastic) -> None:
    check_supernet(labelled, SPACES[name], samples=4)


@pytest.mark.parametrize("name", SPACES)
def test_single_steps_are_guided_as_the_dearest_schedule_is(name: str) -> None:
    space = SPACES[name]
    full = space.decode(dearest(space))
    each = space.of_each_step(Options((0.5, 1.0)) if 0.5 in space.net.widths else Options((1.0,)))
    found = each.decode(dearest(each))
    assert [step.guidance for step in found.steps] == [full.steps[0].guidance] * 6
    assert found.sampler == full.sampler
    assert each.cost(dearest(each)) == space.cost(dearest(space))
    assert len(each.choices) == 6


def test_the_baseline_has_the_full_network_with_each_kind_of_guidance() -> None:
    space = SPACES["guidance and width"]
    schedules = [space.decode(genome) for genome in uniform_genomes(space)]
    whole = {steps[0].guidance for steps in (s.steps for s in schedules) if {step.arch for step in steps} == {WHOLE}}
    assert whole == {None, Guidance(1.5), Guidance(3.0, HALF)}
    assert all(len({step.guidance for step in schedule.steps}) == 1 for schedule in schedules)


def test_genes_of_guidance_are_named() -> None:
    assert [choice.name for choice in SPACES["guidance alone"].choices] == [
        f"interval{k:02d}.guidance" for k in range(3)
    ]
    assert SPACES["guidance and width"].choices[1].options == ("none", "1.5", "3 by 0.5/0.5")


def test_guidance_that_cannot_be_is_refused(tiny_net: Elastic) -> None:
    with pytest.raises(UserError, match="guidance needs a network that takes conditions"):
        Stepwise(tiny_net, uniform(4), (4,), guidance=(None, 2.0))
    with pytest.raises(UserError, match="must be distinct"):
        Stepwise(NET, uniform(4), (4,), guidance=(2.0, Guidance(2.0)))
    with pytest.raises(UserError, match="guidance"):
        Stepwise(NET, uniform(4), (4,), guidance=(-1.0, None))


@pytest.mark.parametrize("guidance", [(2.0,), (None, Guidance(3.0, HALF))])
def test_timesteps_are_divided_by_guided_schedules(
    guidance: tuple[Any, ...], labelled_run: Path, tmp_path: Path
) -> None:
    """By those that the study would find, and within its limit on them."""
    images, net = Digits(), NET.load(labelled_run / "supernet", "cpu")
    recipe = TrajectoryDistance(images, rungs=(4, 8), conditions=Labels(images))
    space = Stepwise(NET, uniform(4), (2, 2), guidance=guidance)
    (tmp_path / "supernet").symlink_to(labelled_run / "supernet")
    scored: list[Schedule] = []
    evaluate = recipe.load(net, tmp_path)

    class Heard:
        def __getattr__(self, name: str) -> Any:
            return getattr(evaluate, name)

        def __call__(self, schedule: Schedule, rung: int, seed: int) -> Any:
            scored.append(schedule)
            return evaluate(schedule, rung, seed)

    found = Partitions(space, Heard(), images, recipe, tmp_path, 0, 3, 2, 0.6, "trajectory_mse")
    list(found.measure())
    asked = guidance[-1] if isinstance(guidance[-1], Guidance) else Guidance(guidance[-1])
    kinds = {step.guidance for schedule in scored for step in schedule.steps}
    assert kinds <= {asked, Guidance(asked.scale)}
    assert None not in kinds
    whole = sum(NET.macs(Step(t, WHOLE, (), Guidance(1.0))) for t in uniform(4))
    rows = found.facts()["rows"]
    for row in rows:
        assert row["macs_share"] <= 0.6
        schedule = space.of_each_step(Options((0.5, 1.0))).decode(tuple(row["genome"]))
        assert row["macs_share"] == sum(map(NET.macs, schedule.steps)) / whole


@pytest.mark.parametrize("guidance", [(2.0,), (Guidance(3.0, HALF),)])
def test_a_partition_may_spend_the_share_of_the_full_guided_network(
    guidance: tuple[Any, ...], labelled_run: Path
) -> None:
    """Also where the space's own dearest schedule, by a smaller guide, takes less."""
    images, each = Digits(), Stepwise(NET, uniform(4), (1, 1, 1, 1), guidance=guidance)
    recipe = TrajectoryDistance(images, rungs=(4,), conditions=Labels(images))
    evaluate = recipe.load(NET.load(labelled_run / "supernet", "cpu"), labelled_run)
    effects = StepEffects(each, evaluate, "trajectory_mse", 4, 0)
    effects.table = np.array([[1.0, 0.0]] * 4)  # the smaller one is worse at every step
    for share in (0.4, 0.5, 0.55, 0.6):
        [(_, row)] = compare(effects, {"each": each.intervals}, share, 4, seeds=1)
        genomes = itertools.product(range(2), repeat=4)
        most = max((genome for genome in genomes if each.cost(genome)["macs_share"] <= share), key=sum)
        assert sum(row["genome"]) == sum(most)
        assert row["macs_share"] == each.cost(most)["macs_share"]


def test_who_guides_counts_along_the_trajectory(labelled_run: Path) -> None:
    """A score does not depend on what was scored before, and a weaker guide is no full network."""
    images = Digits()
    recipe = TrajectoryDistance(images, rungs=(16,), conditions=Labels(images))
    net = NET.load(labelled_run / "supernet", "cpu")

    def scored(evaluator: Any, arch: Arch, by: Guidance) -> float:
        schedule = Schedule(tuple(Step(t, arch, (), by) for t in uniform(3)))
        return float(evaluator(schedule, 16, 0).values["trajectory_mse"])

    weaker, same = Guidance(2.5, HALF), Guidance(2.5)
    assert scored(recipe.load(net, labelled_run), WHOLE, same) == 0
    assert scored(recipe.load(net, labelled_run), WHOLE, weaker) > 1e-4
    together = recipe.load(net, labelled_run)
    whole = Guidance(2.5, WHOLE)
    for by in (whole, same):
        assert scored(together, HALF, by) == pytest.approx(scored(recipe.load(net, labelled_run), HALF, by))


@pytest.mark.parametrize("kind", [Frechet, DenoisingLoss, TeacherDistance, TrajectoryDistance])
def test_scores_of_guided_schedules_keep_the_laws(kind: Any, labelled_run: Path) -> None:
    images = Digits()
    evaluator = kind(images, rungs=(32, 64), conditions=Labels(images))
    check_evaluator(evaluator, NET, SPACES["guidance and width"], labelled_run)
    assert evaluator.digest(labelled_run) != replace(evaluator, conditions=None).digest(labelled_run)


def test_the_full_model_may_have_timesteps_and_guidance_of_its_own(labelled_run: Path) -> None:
    """A schedule that is guided in part alone is compared with what is guided throughout."""
    images, net = Digits(), NET.load(labelled_run / "supernet", "cpu")
    given: dict[str, Any] = {"images": images, "conditions": Labels(images), "rungs": (16, 32)}
    own = TeacherDistance(**given, timesteps=uniform(6), guidance=2.5).load(net, labelled_run)
    guided = Schedule(tuple(Step(t, WHOLE, (), Guidance(2.5)) for t in uniform(6)))
    plain = Schedule(tuple(Step(t, WHOLE) for t in uniform(6)))
    assert own(guided, 16, 0).values["teacher_mse"] == 0
    assert own(plain, 16, 0).values["teacher_mse"] > 0
    assert TeacherDistance(**given).load(net, labelled_run)(plain, 16, 0).values["teacher_mse"] == 0
    with pytest.raises(UserError, match="give timesteps="):
        TeacherDistance(**given, guidance=2.5)


def of_labels(labels: torch.Tensor) -> Any:
    """Conditions of the chosen ones of these labels."""
    return lambda chosen: {"class_labels": labels[chosen]}


def test_gates_are_learned_with_labels() -> None:
    """Through the gated network, whose answer at open gates is the plain network's."""
    loaded, labels = randomised(NET), torch.tensor([7, 2])
    settings = Pruner(steps=2, batch=2)
    full = Schedule(tuple(Step(t, WHOLE) for t in (900, 500, 100)))
    seen: list[torch.Tensor] = []
    gated = loaded.gated

    def watched(arch: Any) -> Any:
        call = gated(arch)

        def noted(x: Any, t: Any, gates: Any, cache: Any = None, condition: Any = None, guidance: Any = None) -> Any:
            seen.append(condition["class_labels"])
            return call(x, t, gates, cache, condition, guidance)

        return noted

    loaded.gated = watched
    for _ in learn_gates(settings, loaded, full, 0, conditions=of_labels(labels), images=len(labels)):
        pass
    assert {tuple(rows.tolist()) for rows in seen} <= {(7, 2), (2, 7), (7, 7), (2, 2)}
    assert len(seen) >= 2 * 2 * 3
    x, asked, _ = batch()
    told = {"class_labels": asked}
    with torch.no_grad():
        plain = loaded.denoiser(Step(400, WHOLE))(x, 400, None, told)[0]
        assert torch.allclose(gated(WHOLE)(x, 400, {}, None, told)[0], plain, atol=CALL)


@pytest.mark.parametrize("guidance", [Guidance(2.0), BY_HALF], ids=["by itself", "by the half"])
def test_hard_gates_of_guided_steps_are_what_the_guided_denoiser_reuses(guidance: Guidance) -> None:
    loaded = randomised(NET)
    x, asked, _ = batch()
    told, names = {"class_labels": asked}, loaded.blocks(WHOLE)
    reuse = loaded.reused(WHOLE, names[-1:])
    assert 0 < len(reuse) < len(names)
    gates = {name: torch.tensor(float(name not in reuse)) for name in names}
    with torch.no_grad():
        _, cache = loaded.denoiser(Step(600, WHOLE, (), guidance), reuse)(x, 600, None, told)
        expected, _ = loaded.denoiser(Step(400, WHOLE, reuse, guidance))(x, 400, cache, told)
        call = loaded.gated(WHOLE)
        _, mine = call(x, 600, {}, None, told, guidance)
        assert torch.allclose(call(x, 400, gates, mine, told, guidance)[0], expected, atol=CALL)
        after, _ = call(x, 400, gates, mine, told)  # an unguided step takes the rows of the samples' own conditions
        unguided, _ = loaded.denoiser(Step(400, WHOLE, reuse))(x, 400, cache, told)
        assert torch.allclose(after, unguided, atol=CALL)


@pytest.mark.parametrize("scope", ["trajectory", "step"])
def test_gates_are_learned_of_guided_steps(scope: Any) -> None:
    """By itself, by another, not at all, and by itself again, where nothing that is kept is enough."""
    loaded, labels = randomised(NET), torch.tensor([7, 2])
    told = (Guidance(2.0), Guidance(2.0), BY_HALF, None, Guidance(1.5))
    full = Schedule(tuple(Step(t, WHOLE, (), by) for t, by in zip((900, 700, 500, 300, 100), told, strict=True)))
    learning = learn_gates(
        Pruner(steps=2, batch=2, scope=scope), loaded, full, 0, conditions=of_labels(labels), images=len(labels)
    )
    while True:
        try:
            next(learning)
        except StopIteration as end:
            keep, spent = end.value
            break
    assert keep.shape == (4, len(loaded.blocks(WHOLE)))
    runs = 1 + (3 if scope == "step" else 4)
    assert spent == 2 * 2 * runs * sum(map(loaded.macs, full.steps))
    start = 1 / (1 + np.exp(-1))
    assert ((keep[:3] - start).abs() > 1e-6).any()
    # The last step's gates have no say, so all that moves them is the price of what they keep open.
    quiet = learn_gates(
        Pruner(steps=2, batch=2, scope=scope, sparsity=0.0, weight_decay=0.0, scores="plain"),
        loaded,
        full,
        0,
        conditions=of_labels(labels),
        images=len(labels),
    )
    while True:
        try:
            next(quiet)
        except StopIteration as end:
            untouched, _ = end.value
            break
    assert torch.allclose(untouched[3], torch.full_like(untouched[3], start), atol=1e-6)


def test_gates_choose_among_options_that_are_guided_alike() -> None:
    steps = uniform(4)
    space = Stepwise(NET, steps, (2, 2), Options((1.0,)), patterns=(Every(1), Every(2)), guidance=(None, 2.0))
    problem = Problem(space, ("fd", "macs"), {"macs_share": 0.8})
    gates = Gates(pruner=Pruner(steps=1, batch=2))
    learning = gates.learn(problem, randomised(NET), Digits().load(), 0)
    while True:
        try:
            next(learning)
        except StopIteration as end:
            learned, _ = end.value
            break
    chooser = Chooser(problem, learned)
    least, most = chooser.budgets
    for way in ("bisection", "greedy", "knapsack"):
        for budget in np.linspace(least, most, 3):
            schedule = space.decode(chooser.genome(way, budget))
            assert {step.guidance for step in schedule.steps} == {Guidance(2.0)}
            assert sum(map(NET.macs, schedule.steps)) <= budget


@given(st.lists(st.tuples(st.integers(0, 2), st.booleans()), min_size=6, max_size=6))
def test_costs_of_steps_that_nothing_guides_add_up_where_others_may_be_guided(asked: list[tuple[int, bool]]) -> None:
    """Whatever ran before kept enough for them; for one that guides itself it may not have, and then the table says more."""
    patterns = (Every(1), Only(("d0", "u1")), Only(()))
    net = Elastic(dict(NET.config), (1.0,))
    space = Stepwise(net, uniform(6), per_step(uniform(6)), patterns=patterns, guidance=(None, 2.0))
    whole = len(patterns) - 1
    steps = [(whole, True), *asked[1:]]  # the first runs whole whatever it is asked for
    for guided in (False, True):
        pairs = [(runs, int(own and guided)) for runs, own in steps]
        told = sum(int(table[pair]) for table, pair in zip(space.interval_costs(), pairs, strict=True))
        macs = space.cost(tuple(itertools.chain.from_iterable(pairs)))["macs"]
        assert macs <= told
        assert guided or macs == told
