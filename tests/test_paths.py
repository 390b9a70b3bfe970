"""The exact answer to what each step computes and what it reuses, against trying all."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evaluators.sampling import DDIM, DPMSolver
from nas.contracts import Genome, Problem, Proposal, Schedule, Score, SearchSpace, Trial
from nas.genomes.paths import ReusePath, Steps, paths, together
from nas.results.trials import prediction_of
from nas.searchers.path import Path
from nas.testing import closed, table_problem, toy_score
from search_spaces.branches import Branches
from search_spaces.intervals import per_step, uniform
from search_spaces.options import Options
from search_spaces.patterns import Every, Only
from search_spaces.shipped.graph import AROUND
from search_spaces.stepwise import Stepwise
from search_spaces.supernet import Elastic


def priced(steps: Steps, ways: tuple[int, ...]) -> tuple[int, float]:
    """Cost and error of what each step does; an infinite error where the first one reuses."""
    computing = steps.computing.shape[1]
    cost, error, last = 0, 0.0, -1
    for step, way in enumerate(ways):
        if way < computing:
            cost, error, last = cost + int(steps.computing[step, way]), error + float(steps.loss[step, way]), step
        elif last < 0:
            error = math.inf
        else:
            cost += int(steps.reusing[step, way - computing])
            error += float(steps.drift[last, step, way - computing])
    return cost, error


def tried(steps: Steps) -> list[tuple[int, float]]:
    """Cost and error of all that there is, without what another beats."""
    count, computing = steps.computing.shape
    every = range(computing + steps.reusing.shape[1])
    found = [priced(steps, ways) for ways in itertools.product(every, repeat=count)]
    front: list[tuple[int, float]] = []
    for cost, error in sorted(one for one in found if math.isfinite(one[1])):
        if not front or error < front[-1][1]:
            front.append((cost, error))
    return front


@st.composite
def instances(draw: st.DrawFn, most: int = 5) -> Steps:
    """Errors are multiples of a sixteenth, whose sums are exact."""
    count, computing, reusing = draw(st.integers(1, most)), draw(st.integers(1, 2)), draw(st.integers(0, 2))
    numbers = st.one_of(st.integers(-8, 64).map(lambda n: n / 16), st.just(math.inf))

    def table(*shape: int, of: Any = numbers, dtype: Any = np.float64) -> Any:
        size = math.prod(shape)
        return np.array(draw(st.lists(of, min_size=size, max_size=size)), dtype=dtype).reshape(shape)

    whole = st.integers(0, 30)
    return Steps(
        table(count, computing, of=whole, dtype=np.int64),
        table(count, computing),
        table(count, reusing, of=whole, dtype=np.int64),
        table(count, count, reusing),
    )


@given(instances(), st.one_of(st.just(math.inf), st.integers(0, 100)))
@settings(deadline=None, max_examples=500)
def test_paths_are_those_that_trying_all_finds(steps: Steps, most: float) -> None:
    found = paths(steps, most)
    assert [(path.cost, path.error) for path in found] == [one for one in tried(steps) if one[0] <= most]
    for path in found:
        assert priced(steps, path.ways) == (path.cost, path.error)


@given(instances(6), st.integers(1, 4))
@settings(deadline=None, max_examples=100)
def test_with_few_cells_costs_stay_exact_and_errors_keep_their_bound(steps: Steps, cells: int) -> None:
    most = int(steps.computing.max(1).sum() + steps.reusing.sum())
    found = paths(steps, most, cells)
    for path in found:
        assert priced(steps, path.ways) == (path.cost, path.error)
    slack = len(steps.computing) * (most + 1) / cells
    for cost, error in tried(steps):
        if cost + slack <= most:
            assert min(path.error for path in found if path.cost <= cost + slack) <= error


@given(st.lists(instances(3), min_size=1, max_size=3), st.floats(0, 1))
@settings(deadline=None, max_examples=60)
def test_parts_together_share_a_budget_best(parts: list[Steps], share: float) -> None:
    fronts = [paths(part) for part in parts]
    budget = share * sum(front[-1].cost for front in fronts if front)
    fitting = [
        sum(path.error for path in chosen)
        for chosen in itertools.product(*fronts)
        if sum(path.cost for path in chosen) <= budget
    ]
    [found] = together(fronts, [budget]) if all(fronts) else [None]
    if not fitting:
        assert found is None
        return
    assert found is not None
    assert sum(path.cost for path in found) <= budget
    assert sum(path.error for path in found) == min(fitting)


def test_a_step_far_from_the_computed_one_costs_more() -> None:
    """Of ten steps whose error grows with the square of the distance, three computed ones are spread evenly."""
    drift = np.array([[[float((m - j) ** 2)] for m in range(10)] for j in range(10)])
    costs = np.full((10, 1), 10), np.zeros((10, 1)), np.full((10, 1), 1), drift
    found = {path.ways.count(0): path for path in paths(Steps(*costs))}
    assert found[10] == ReusePath((0,) * 10, 100, 0.0)
    assert found[1].ways == (0, *[1] * 9)
    computed = [step for step, way in enumerate(found[3].ways) if way == 0]
    assert [b - a for a, b in itertools.pairwise((*computed, 10))] in ([4, 3, 3], [3, 4, 3], [3, 3, 4])


@pytest.mark.parametrize(
    "changed",
    [
        {"drift": np.zeros((2, 3, 1))},
        {"drift": np.full((2, 2, 1), np.nan)},
        {"loss": np.full((2, 1), -np.inf)},
        {"reusing": np.zeros((3, 1), np.int64)},
        {"computing": np.zeros((0, 1), np.int64)},
    ],
)
def test_what_makes_no_sense_is_refused(changed: dict[str, Any]) -> None:
    one = Steps(np.ones((2, 1), np.int64), np.zeros((2, 1)), np.zeros((2, 1), np.int64), np.zeros((2, 2, 1)))
    with pytest.raises(ValueError, match="must be"):
        paths(one._replace(**changed))


NET = Elastic(
    {
        "sample_size": 8,
        "in_channels": 1,
        "out_channels": 1,
        "block_out_channels": (16, 32),
        "down_block_types": ("DownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "UpBlock2D"),
        "layers_per_block": 1,
        "norm_num_groups": 4,
    },
    widths=(1.0,),
)
DIT = Elastic(
    {
        "_class_name": "DiTTransformer2DModel",
        "sample_size": 8,
        "in_channels": 1,
        "out_channels": 1,
        "patch_size": 2,
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "num_layers": 1,
        "num_embeds_ada_norm": 3,
    },
    widths=(1.0,),
)
STEPS = uniform(6)


def lost(schedule: Schedule, timesteps: tuple[int, ...]) -> float:
    """Grows with the way back to the last step that computed, more where more is reused, and more at odd steps; by branch where there are any."""
    steps = {step.timestep: step for step in schedule.steps}
    last: dict[str, int] = {}
    total = 0.0
    for place, timestep in enumerate(timesteps):
        reused = steps[timestep].reuse if timestep in steps else ("everything",)
        parts = [f"b0.{part}" for part in ("attn", "mlp")] if any("b0" in name for name in reused) else list(reused)
        names = {name for name in parts if name in reused or "b0" in reused}
        for name in {*last, *names, "step"}:
            drifts = name in names or (name == "step" and not any("b0" in one for one in reused) and bool(reused))
            if not drifts:
                last[name] = place
                continue
            weight = (1 + place % 2) * (2 if name == "everything" else 1)
            total += weight * (place - last.get(name, 0)) ** 2 / (2 if name == "step" else 1)
    return total


def searched(
    space: SearchSpace,
    loss: Callable[[Genome], float],
    trials: int,
    budgets: int = 1,
    factor: int = 1,
    limit: float = 0.6,
) -> list[Trial]:
    """`factor`: by which what is no probe loses more."""
    problem = Problem(space, ("loss", "macs"), {"macs_share": limit})
    search = Path(budgets=budgets).start(problem, 0)
    found: list[Trial] = []
    for number in range(trials):
        asked = search.ask([])
        if not isinstance(asked, Proposal):
            break
        score = Score({"loss": loss(asked.genome) * (1 if "probe" in asked.origin else factor)})
        found.append(
            Trial(number, asked.genome, "", 0, "complete", score, space.cost(asked.genome), origin=asked.origin)
        )
        search.tell(found[-1])
    return found


@pytest.mark.parametrize(
    "space",
    [
        Stepwise(NET, STEPS, per_step(STEPS), Options((1.0,)), patterns=(Every(1), Only(("u1",)), Only(()))),
        Branches(DIT, STEPS),
    ],
)
def test_where_the_model_holds_the_first_solution_is_the_best_there_is(space: SearchSpace) -> None:
    loss = lambda genome: lost(space.decode(genome), STEPS)  # noqa: E731
    problem = Problem(space, ("loss", "macs"), {"macs_share": 0.6})
    best = min(
        loss(genome)
        for genome in itertools.product(*(range(len(c.options)) for c in space.choices))
        if problem.feasible(genome)
    )
    found = searched(space, loss, 200)
    solved = [trial for trial in found if "probe" not in trial.origin]
    assert solved[0].score is not None
    assert solved[0].score.values["loss"] == pytest.approx(best)
    assert solved[0].origin["predicted"] == pytest.approx(best)


def test_what_was_scored_corrects_the_model() -> None:
    """Where schedules lose thrice what probes say, predictions soon say so."""
    steps = uniform(12)
    space = Stepwise(NET, steps, per_step(steps), Options((1.0,)), patterns=(Every(1), Only(("u1",)), Only(())))
    found = searched(space, lambda genome: lost(space.decode(genome), steps), 90, budgets=8, factor=3)
    solved = [trial for trial in found if "shortest" in trial.origin.get("operator", "")]
    off = [trial.origin["predicted"] / trial.score.values["loss"] for trial in solved if trial.score]
    assert off[0] == pytest.approx(1 / 3)
    # What runs longer than were probed is not known so well.
    assert all(0.6 < one < 1.4 for one in off[9:])
    assert len(off) > 9


def test_other_samplers_are_tried() -> None:
    """They cost nothing, so that no cost tells them apart."""
    steps = uniform(6)
    space = Stepwise(
        NET,
        steps,
        per_step(steps),
        Options((1.0,)),
        patterns=(Every(1), Only(())),
        deterministic=False,
        samplers=(DDIM(), DPMSolver()),
    )
    loss = lambda genome: 1 + (space.decode(genome).sampler == DPMSolver().name) + lost(space.decode(genome), steps)  # noqa: E731
    found = searched(space, loss, 60)
    probes = [trial for trial in found if "probe" in trial.origin]
    assert {space.decode(trial.genome).sampler for trial in probes} == {DDIM().name, DPMSolver().name}
    best = min((trial for trial in found if trial.score), key=lambda trial: trial.score.values["loss"])  # type: ignore[union-attr]
    assert space.decode(best.genome).sampler == DDIM().name


def test_what_is_not_predicted_is_not_said_to_be() -> None:
    """Neighbours of a schedule of the user's own, of options that no probe has."""
    problem = replace(table_problem(genes=5, options=6), objectives=("fd", "macs"))
    search = Path(options=3, probes=20).start(problem, 0)
    trials = []
    for number in range(60):
        own = {0: (1, 1, 1, 1, 1), 1: (2, 1, 2, 1, 2)}.get(number)
        asked = Proposal(own) if own else search.ask([])
        if not isinstance(asked, Proposal):
            break
        trials.append(closed(problem, number, asked, toy_score(asked.genome)))
        search.tell(trials[-1])
    said = [trial.origin["predicted"] for trial in trials if "predicted" in trial.origin]
    assert len(said) > 3
    assert all(map(math.isfinite, said))
    assert any(trial.origin.get("operator") == "neighbour of one of the best" for trial in trials)
    assert math.isfinite((prediction_of(trials, "fd") or {})["tau"])


def test_a_branch_that_is_reused_leaves_no_step_out() -> None:
    """Whole steps are a question of their own where steps may be left out; of branches all steps run at least in part."""
    space = Branches(DIT, uniform(4))
    search = Path(budgets=2).start(Problem(space, ("loss", "macs"), {"macs_share": 0.7}), 0)
    said = []
    for number in range(60):
        proposal = search.ask([])
        if not isinstance(proposal, Proposal):
            break
        said.append(str(proposal.origin.get("operator", "")))
        score = Score({"loss": float(sum(1 - bit for bit in proposal.genome))})
        search.tell(Trial(number, proposal.genome, "", 0, "complete", score, space.cost(proposal.genome)))
    assert any("shortest path at" in words for words in said)
    assert not any("whole steps" in words for words in said)


def test_few_probes_are_spread_over_all_steps() -> None:
    steps = uniform(40)
    space = Stepwise(NET, steps, per_step(steps), Options((1.0,)), patterns=(Every(1), Only(("u1",)), Only(())))
    search = Path(probes=30).start(Problem(space, ("loss", "macs"), {"macs_share": 0.5}), 0)
    asked = []
    for number in range(40):
        proposal = search.ask([])
        assert isinstance(proposal, Proposal)
        asked.append(proposal)
        score = Score({"loss": lost(space.decode(proposal.genome), steps)})
        search.tell(Trial(number, proposal.genome, "", 0, "complete", score, space.cost(proposal.genome)))
    probes = [one.genome for one in asked if "probe" in one.origin]
    assert len(probes) == 30
    full = max(probes, key=sum)
    changed = [
        next(place for place in range(40) if genome[place] != full[place]) for genome in probes if genome != full
    ]
    assert min(changed) <= 4
    assert max(changed) >= 30


@pytest.mark.parametrize(("early", "limit"), [(10.0, 0.6), (0.1, 0.55)])
def test_where_guidance_is_on_is_part_of_the_path(early: float, limit: float) -> None:
    """Where a step without it loses little at the clean end and much elsewhere, it is left out there; where it loses little everywhere and no guided
    step fits, nothing is guided. Every schedule keeps to the limit."""
    space = Stepwise(
        DIT,
        STEPS,
        per_step(STEPS),
        Options((1.0,)),
        patterns=(Every(1), Only((AROUND,))),
        finer=True,
        guidance=(None, 2.0),
    )

    def loss(genome: Genome) -> float:
        steps = space.decode(genome).steps
        unguided = sum((early if place < 4 else 0.1) for place, step in enumerate(steps) if step.guidance is None)
        return unguided + sum(3.0 for step in steps if step.reuse)

    found = searched(space, loss, 120, limit=limit)
    solved = [trial for trial in found if "shortest" in trial.origin.get("operator", "")]
    assert solved
    assert all(trial.cost["macs_share"] <= limit for trial in found if "probe" not in trial.origin)
    best = min(solved, key=lambda trial: trial.score.values["loss"] if trial.score else 0.0)
    guides = [step.guidance is not None for step in space.decode(best.genome).steps]
    assert all(guides[:4]) if early > 1 else not any(guides)
    assert not all(guides)
