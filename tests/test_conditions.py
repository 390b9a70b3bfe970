"""Class-conditional networks: who sample i is, guidance against calls by hand, its cost, its reuse, and label dropout."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file

from benchmarks.cost import macs_of
from evaluators.agreement import Agreement
from evaluators.conditions import Labels
from evaluators.features import SmallClassifier
from evaluators.frechet import Frechet
from evaluators.images import Digits
from evaluators.proxies import DenoisingLoss, TeacherDistance, TrajectoryDistance
from evaluators.sampling import DDIM, DDPM, DPMSolver, sample
from evaluators.scoring import Scores
from evaluators.trajectories import Trajectories
from nas.base.exported import ExportError, read_export
from nas.base.pictures import PictureError
from nas.contracts import Guidance, ImageSet, Problem, Schedule, Step, UserError
from nas.genomes.genetics import IntervalCosts, dearest, uniform_genomes
from nas.genomes.timed import TimedSpace, calls, key
from nas.handover.export import export
from nas.results.samples import class_by_class
from nas.searchers.choosers import Chooser
from nas.searchers.gates import Gates
from nas.searchers.pruner import Pruner, learn_gates
from nas.study import Study
from nas.testing import check_evaluator, check_space, check_supernet
from search_spaces.intervals import per_step, uniform
from search_spaces.loaded import LoadedElastic
from search_spaces.networks.slices import Arch
from search_spaces.options import Options
from search_spaces.partitions import Partitions, StepEffects, compare
from search_spaces.patterns import Every, Only
from search_spaces.shipped.graph import graph_of
from search_spaces.shipped.reuse import run
from search_spaces.shipped.train_data import folder_labels
from search_spaces.shipped.train_diffusers import Settings, train
from search_spaces.shipped.walks import arguments
from search_spaces.stepwise import Stepwise
from search_spaces.supernet import WEIGHTS, Elastic
from search_spaces.training import Sandwich
from search_spaces.training.optimiser import Batches
from tests.arithmetic import CALL, SAMPLES
from tests.conftest import TINY
from tests.test_cli import nas
from tests.test_supernet import randomised

ROOT = Path(__file__).parent.parent

CLASSES = 10
NET = Elastic({**TINY, "num_class_embeds": CLASSES + 1}, (0.5, 1.0))
WHOLE, HALF = NET.uniform(1.0), NET.uniform(0.5)
BY_HALF = Guidance(2.5, HALF)


@pytest.fixture(scope="module")
def loaded() -> LoadedElastic:
    found: LoadedElastic = randomised(NET)
    return found


def batch(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x, labels, and the null label as often."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(5, 1, 8, 8, generator=generator), torch.tensor([0, 3, 9, 3, 1]), torch.full((5,), CLASSES)


# -------------------------------------------------------------------------------------------------------- who sample i is


@given(st.integers(0, 99), st.integers(0, 4000), st.integers(1, 300))
def test_the_label_of_a_sample_depends_on_seed_and_place_alone(seed: int, start: int, count: int) -> None:
    labels = Labels(Digits()).load()
    rows = labels.of(seed, start, start + count)["class_labels"]
    middle = start + count // 2
    parts = [labels.of(seed, *span)["class_labels"] for span in ((start, middle), (middle, start + count))]
    assert torch.equal(torch.cat(parts), rows)


def test_every_image_is_met_once_before_any_is_met_again_and_classes_are_spread_evenly() -> None:
    data = Digits().load()
    assert data.labels is not None
    count, labels = len(data), Labels(Digits()).load()
    real = np.bincount(data.labels, minlength=CLASSES)
    for seed, number in ((0, 0), (0, 1), (7, 0)):
        rows = labels.of(seed, number * count, (number + 1) * count)["class_labels"].numpy()
        assert np.array_equal(np.bincount(rows, minlength=CLASSES), real)
        for start in range(0, count - 100, 50):
            here = np.bincount(rows[start : start + 100], minlength=CLASSES)
            assert np.abs(here - 100 * real / count).max() < 2, (
                "of n evenly spread places one more or less falls into a window"
            )
    first, second, other = (
        labels.of(seed, start, start + 200)["class_labels"] for seed, start in ((0, 0), (0, count), (1, 0))
    )
    assert not torch.equal(first, second)
    assert not torch.equal(first, other)


def test_images_without_labels_condition_nothing() -> None:
    class Bare(Digits):
        def load(self) -> ImageSet:
            return replace(super().load(), labels=None)

    with pytest.raises(UserError, match="have no labels to condition samples on"):
        Labels(Bare()).load()


# ---------------------------------------------------------------------------------------------------------------- a step


@pytest.mark.parametrize("guide", [Guidance(2.0), Guidance(0.0), Guidance(1.0), BY_HALF], ids=str)
def test_a_guided_step_is_two_calls(loaded: LoadedElastic, guide: Guidance) -> None:
    x, labels, null = batch()
    with torch.no_grad():
        noise, _ = loaded.denoiser(Step(400, WHOLE, (), guide))(x, 400, None, {"class_labels": labels})
        told = loaded.extract(WHOLE)(x, 400, class_labels=labels).sample
        plain = loaded.extract(Arch(*(guide.arch or WHOLE)))(x, 400, class_labels=null).sample
    assert torch.allclose(noise, plain + guide.scale * (told - plain), atol=5 * CALL)
    assert torch.equal(loaded.null_condition({"class_labels": labels})["class_labels"], null)


@pytest.mark.parametrize("guide", [None, Guidance(2.0), BY_HALF], ids=str)
def test_a_guided_steps_cost_is_that_of_what_runs(loaded: LoadedElastic, guide: Guidance | None) -> None:
    x, t = torch.zeros(1, 1, 8, 8), torch.tensor([400])
    calls = [WHOLE] if guide is None else [WHOLE, Arch(*(guide.arch or WHOLE))]
    counted = 0
    for arch in calls:
        model = loaded.extract(arch)
        counted += macs_of(model, arguments(model, x, t, {"class_labels": torch.tensor([1])}))[0]
    assert loaded.macs(Step(400, WHOLE, (), guide)) == counted


@pytest.mark.parametrize("before", [None, Guidance(3.0), BY_HALF], ids=str)
@pytest.mark.parametrize("guide", [None, Guidance(2.0), BY_HALF], ids=str)
def test_a_guided_step_reuses_what_each_of_its_calls_had(
    loaded: LoadedElastic, before: Guidance | None, guide: Guidance | None
) -> None:
    """The reference runs both predictions apart, each with blocks of its own."""
    if guide == Guidance(2.0) and before != Guidance(3.0):
        return  # who guides itself needs both; the space does not ask for it
    (first, labels, null), (x, _, _) = batch(0), batch(1)
    model, half = loaded.extract(WHOLE), loaded.extract(HALF)
    graph = graph_of(model)
    reuse = tuple(name for name in graph.blocks if name not in ("d0", "u1"))
    told, untold = {"class_labels": labels}, {"class_labels": null}
    with torch.no_grad():
        _, cache = loaded.denoiser(Step(500, WHOLE, (), before), reuse)(first, 500, None, told)
        noise, _ = loaded.denoiser(Step(400, WHOLE, reuse, guide))(x, 400, cache, told)
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


def test_a_guided_step_without_conditions_is_refused(loaded: LoadedElastic) -> None:
    with pytest.raises(ValueError, match="needs the samples' conditions"):
        loaded.denoiser(Step(400, WHOLE, (), Guidance(2.0)))(batch()[0], 400)


# ----------------------------------------------------------------------------------------------------------- trajectories


SCHEDULES = {
    "unguided": Schedule((Step(900, WHOLE), Step(500, HALF), Step(100, WHOLE))),
    "guided in the middle": Schedule((Step(900, WHOLE), Step(500, WHOLE, (), Guidance(3.0)), Step(100, HALF))),
    "guided by the half": Schedule((Step(900, WHOLE, (), BY_HALF), Step(500, WHOLE, (), BY_HALF))),
    "reused": Schedule(
        (
            Step(900, WHOLE, (), Guidance(3.0)),
            Step(700, WHOLE, ("mid", "u0"), Guidance(2.0)),
            Step(500, WHOLE, ("d0", "d1", "mid", "u0", "u1"), Guidance(2.0)),
            Step(300, WHOLE, ("mid",), Guidance(2.0)),
            Step(100, WHOLE, ("mid",)),
        )
    ),
}


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("sampler", [DDIM(), DDPM(), DPMSolver()], ids=lambda sampler: type(sampler).__name__)
def test_shared_beginnings_change_no_bit(loaded: LoadedElastic, name: str, sampler: Any) -> None:
    conditions, schedule = Labels(Digits()).load(), SCHEDULES[name]
    shared = Trajectories(loaded, sampler, conditions=conditions)
    expected = sample(loaded, schedule, sampler, 0, 0, 8, conditions)
    for _ in range(2):
        assert torch.equal(shared.images(schedule, 0, 0, 8), expected)
    changed = Schedule((*schedule.steps[:-1], replace(schedule.steps[-1], arch=HALF, reuse=(), guidance=None)))
    assert torch.equal(shared.images(changed, 0, 0, 8), sample(loaded, changed, sampler, 0, 0, 8, conditions))
    assert shared.meter.macs + shared.meter.cached_macs == 8 * (
        2 * sum(map(loaded.macs, schedule.steps)) + sum(map(loaded.macs, changed.steps))
    )
    parts = torch.cat([sample(loaded, schedule, sampler, 0, start, start + 4, conditions) for start in (0, 4)])
    assert torch.allclose(parts, expected, atol=SAMPLES)


def test_guidance_survives_json_and_older_schedules_keep_their_digests() -> None:
    for schedule in SCHEDULES.values():
        assert Schedule.from_json(schedule.to_json()) == schedule
    old = Schedule((Step(900, (0.5, 1.0)), Step(100, (1.0, 1.0), ("mid",))))
    assert old.to_json() == '[[900,[0.5,1.0],[]],[100,[1.0,1.0],["mid"]]]'
    guided = Schedule((Step(900, (0.5, 1.0), (), Guidance(2.0)), Step(100, (1.0, 1.0), ("mid",))))
    assert guided.digest != old.digest
    assert SCHEDULES["guided by the half"].archs == (WHOLE, HALF)


# ------------------------------------------------------------------------------------------------------------------ spaces


GUIDES = (None, 1.5, Guidance(3.0, HALF))
SPACES = {
    "guidance alone": Stepwise(Elastic(dict(NET.config), (1.0,)), uniform(6), (2, 2, 2), guidance=(None, 1.5, 3.0)),
    "guidance and width": Stepwise(NET, uniform(6), (2, 2, 2), guidance=GUIDES),
    "always guided": Stepwise(NET, uniform(6), (2, 2, 2), guidance=(2.0,)),
    "and reuse": Stepwise(NET, uniform(6), (2, 2, 2), guidance=GUIDES, patterns=(Every(1), Every(2))),
    "and reuse, held": Stepwise(
        NET,
        uniform(6),
        (3, 3),
        guidance=GUIDES,
        patterns=(Every(1), Every(2), Every(3, ("d0", "u1"))),
        deterministic=False,
    ),
    "by the last of two samplers": Stepwise(NET, uniform(6), (2, 2, 2), guidance=GUIDES, samplers=(DDPM(), DDIM())),
    "of experts": Stepwise(Elastic(dict(NET.config), (0.5, 1.0), experts=(500,)), uniform(6), (3, 3), guidance=GUIDES),
}


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
def test_class_conditional_supernets_keep_the_laws(name: str, loaded: LoadedElastic) -> None:
    check_supernet(loaded, SPACES[name], samples=4)


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


# --------------------------------------------------------------------------------------------------------- scores, training


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("conditional")
    training = Sandwich(steps=12, batch=16, warmup=2, checkpoint_every=5)
    for _ in training.run(NET, Digits(), folder / "supernet", 0, "cpu"):
        pass
    return folder


@pytest.mark.parametrize("guidance", [(2.0,), (None, Guidance(3.0, HALF))])
def test_timesteps_are_divided_by_guided_schedules(guidance: tuple[Any, ...], run_folder: Path, tmp_path: Path) -> None:
    """By those that the study would find, and within its limit on them."""
    images, net = Digits(), NET.load(run_folder / "supernet", "cpu")
    recipe = TrajectoryDistance(images, rungs=(4, 8), conditions=Labels(images))
    space = Stepwise(NET, uniform(4), (2, 2), guidance=guidance)
    (tmp_path / "supernet").symlink_to(run_folder / "supernet")
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
    guidance: tuple[Any, ...], run_folder: Path
) -> None:
    """Also where the space's own dearest schedule, by a smaller guide, takes less."""
    images, each = Digits(), Stepwise(NET, uniform(4), (1, 1, 1, 1), guidance=guidance)
    recipe = TrajectoryDistance(images, rungs=(4,), conditions=Labels(images))
    evaluate = recipe.load(NET.load(run_folder / "supernet", "cpu"), run_folder)
    effects = StepEffects(each, evaluate, "trajectory_mse", 4, 0)
    effects.table = np.array([[1.0, 0.0]] * 4)  # the smaller one is worse at every step
    for share in (0.4, 0.5, 0.55, 0.6):
        [(_, row)] = compare(effects, {"each": each.intervals}, share, 4, seeds=1)
        genomes = itertools.product(range(2), repeat=4)
        most = max((genome for genome in genomes if each.cost(genome)["macs_share"] <= share), key=sum)
        assert sum(row["genome"]) == sum(most)
        assert row["macs_share"] == each.cost(most)["macs_share"]


def test_who_guides_counts_along_the_trajectory(run_folder: Path) -> None:
    """A score does not depend on what was scored before, and a weaker guide is no full network."""
    images = Digits()
    recipe = TrajectoryDistance(images, rungs=(16,), conditions=Labels(images))
    net = NET.load(run_folder / "supernet", "cpu")

    def scored(evaluator: Any, arch: Arch, by: Guidance) -> float:
        schedule = Schedule(tuple(Step(t, arch, (), by) for t in uniform(3)))
        return float(evaluator(schedule, 16, 0).values["trajectory_mse"])

    weaker, same = Guidance(2.5, HALF), Guidance(2.5)
    assert scored(recipe.load(net, run_folder), WHOLE, same) == 0
    assert scored(recipe.load(net, run_folder), WHOLE, weaker) > 1e-4
    together = recipe.load(net, run_folder)
    whole = Guidance(2.5, WHOLE)
    for by in (whole, same):
        assert scored(together, HALF, by) == pytest.approx(scored(recipe.load(net, run_folder), HALF, by))


@pytest.mark.parametrize("kind", [Frechet, DenoisingLoss, TeacherDistance, TrajectoryDistance])
def test_scores_of_guided_schedules_keep_the_laws(kind: Any, run_folder: Path) -> None:
    images = Digits()
    evaluator = kind(images, rungs=(32, 64), conditions=Labels(images))
    check_evaluator(evaluator, NET, SPACES["guidance and width"], run_folder)
    assert evaluator.digest(run_folder) != replace(evaluator, conditions=None).digest(run_folder)


def test_agreement_is_the_share_that_the_judge_puts_into_their_class(run_folder: Path) -> None:
    images = Digits()
    data, labels = images.load(), Labels(images)
    evaluator = Agreement(images, rungs=(32, 64), conditions=labels)
    check_evaluator(evaluator, NET, SPACES["guidance and width"], run_folder)
    loaded = evaluator.load(NET.load(run_folder / "supernet", "cpu"), run_folder)
    classify = SmallClassifier().classifier(run_folder, torch.device("cpu"))
    with torch.inference_mode():
        real = classify(torch.from_numpy(data.pixels)).argmax(1).numpy()
        seen = classify(loaded.sample(SCHEDULES["guided in the middle"], 64, 5)).argmax(1)
    assert (real == data.labels).mean() > 0.9, "the judge knows real digits"
    asked = labels.load().of(5, 0, 64)["class_labels"]
    score = loaded(SCHEDULES["guided in the middle"], 64, 5)
    assert score.values["disagreement"] == pytest.approx(float((seen != asked).double().mean()))
    with pytest.raises(UserError, match=r"give it conditions=Labels\(images\)"):
        Agreement(images)


def test_the_full_model_may_have_timesteps_and_guidance_of_its_own(run_folder: Path) -> None:
    """A schedule that is guided in part alone is compared with what is guided throughout."""
    images, net = Digits(), NET.load(run_folder / "supernet", "cpu")
    given: dict[str, Any] = {"images": images, "conditions": Labels(images), "rungs": (16, 32)}
    own = TeacherDistance(**given, timesteps=uniform(6), guidance=2.5).load(net, run_folder)
    guided = Schedule(tuple(Step(t, WHOLE, (), Guidance(2.5)) for t in uniform(6)))
    plain = Schedule(tuple(Step(t, WHOLE) for t in uniform(6)))
    assert own(guided, 16, 0).values["teacher_mse"] == 0
    assert own(plain, 16, 0).values["teacher_mse"] > 0
    assert TeacherDistance(**given).load(net, run_folder)(plain, 16, 0).values["teacher_mse"] == 0
    with pytest.raises(UserError, match="give timesteps="):
        TeacherDistance(**given, guidance=2.5)


def test_several_scores_of_the_same_samples_cost_their_samples_once(run_folder: Path) -> None:
    images = Digits()
    labels = Labels(images)
    parts = (Frechet(images, rungs=(32, 64), conditions=labels), Agreement(images, rungs=(32, 64), conditions=labels))
    both = Scores(parts)
    check_evaluator(both, NET, SPACES["guidance and width"], run_folder)
    fresh = [part.load(NET.load(run_folder / "supernet", "cpu"), run_folder) for part in (both, *parts)]
    together, fd, disagreement = (loaded(SCHEDULES["reused"], 32, 0) for loaded in fresh)
    assert together.values == {**fd.values, **disagreement.values}
    assert together.replicates == {**fd.replicates, **disagreement.replicates}
    assert (together.spent["calls"], together.spent["macs"]) == (fd.spent["calls"], fd.spent["macs"])
    assert together.charged_in_full().spent["macs"] == fd.charged_in_full().spent["macs"]
    with pytest.raises(UserError, match="parts of Scores have the rungs"):
        Scores((parts[0], replace(parts[1], rungs=(16,))))
    with pytest.raises(UserError, match="each may stand there once"):
        Scores((parts[0], parts[0]))


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


def test_labels_are_dropped_by_the_steps_own_generator(loaded: LoadedElastic) -> None:
    data = Digits().load()
    generators = [torch.Generator().manual_seed(3) for _ in range(2)]
    x0, kept = Batches(loaded, data, 2000, flip=False).images(generators[0])
    again, dropped = Batches(loaded, data, 2000, flip=False, drop=0.25).images(generators[1])
    assert torch.equal(x0, again)
    assert kept is not None
    assert dropped is not None
    null = dropped["class_labels"] == CLASSES
    assert float(null.float().mean()) == pytest.approx(0.25, abs=4 * (0.25 * 0.75 / 2000) ** 0.5)
    assert torch.equal(dropped["class_labels"][~null], kept["class_labels"][~null])


def test_a_stopped_training_ends_as_the_uninterrupted_one(run_folder: Path, tmp_path: Path) -> None:
    training = Sandwich(steps=12, batch=16, warmup=2, checkpoint_every=5)
    stopped = training.run(NET, Digits(), tmp_path, 0, "cpu")
    for _ in range(7):
        next(stopped)
    stopped.close()  # type: ignore[attr-defined]
    for _ in training.run(NET, Digits(), tmp_path, 0, "cpu"):
        pass
    first, second = (
        NET.read(folder / WEIGHTS, "cpu").full.state_dict() for folder in (run_folder / "supernet", tmp_path)
    )
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_recipes_of_networks_without_labels_are_described_as_ever() -> None:
    assert "drop" not in Sandwich(steps=1).describe()
    assert Sandwich(steps=1, drop=0.2).describe()["drop"] == 0.2
    assert "conditions" not in Frechet(Digits()).describe()
    assert "guidance" not in Stepwise(NET, uniform(2), (1, 1)).describe()


@pytest.mark.parametrize(
    ("embeds", "conditions", "message"),
    [
        (CLASSES + 1, None, r"give the evaluator conditions=Labels\(images\)"),
        (None, Labels(Digits()), "takes no conditions; leave out"),
    ],
)
def test_a_study_whose_parts_disagree_on_conditions_is_refused(
    embeds: int | None, conditions: Any, message: str, tiny_study: Study
) -> None:
    net = Elastic({**TINY, "num_class_embeds": embeds}, (0.5, 1.0))
    space = replace(tiny_study.space, net=net)  # type: ignore[type-var]
    with pytest.raises(UserError, match=message):
        replace(tiny_study, supernet=net, space=space, evaluator=Frechet(Digits(), conditions=conditions))


def test_labels_that_the_network_has_no_room_for_are_refused() -> None:
    few = Elastic({**TINY, "num_class_embeds": CLASSES}, (0.5, 1.0))
    with pytest.raises(
        UserError, match="and the network knows 9 classes and one of none; set num_class_embeds to 11 or more"
    ):
        Sandwich(steps=1).check(few, Digits().load())
    with pytest.raises(UserError, match="use images with labels"):
        Sandwich(steps=1).check(NET, replace(Digits().load(), labels=None))


# ---------------------------------------------------------------------------------------------------------------- hand-over


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("sampler", [DDIM(), DPMSolver()], ids=lambda sampler: type(sampler).__name__)
def test_an_exported_folder_samples_the_classes_asked_for_as_ours(
    name: str, sampler: Any, loaded: LoadedElastic, tmp_path: Path
) -> None:
    folder, conditions = str(tmp_path / "model"), Labels(Digits()).load()
    export(loaded, SCHEDULES[name], sampler.describe(), {}, Path(folder))
    read_export(Path(folder))
    pipeline = DiffusionPipeline.from_pretrained(folder, custom_pipeline=folder, trust_remote_code=True)
    labels = conditions.of(0, 0, 6)["class_labels"]
    images = pipeline(class_labels=labels, seed=0, output_type="pt").images * 2 - 1
    assert torch.allclose(images, sample(loaded, SCHEDULES[name], sampler, 0, 0, 6, conditions), atol=SAMPLES)
    others = pipeline(class_labels=[0] * 6, seed=0, output_type="pt").images * 2 - 1
    assert not torch.allclose(images, others, atol=1e-2)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"batch_size": 2}, "need class_labels, one from 0 to 9"),
        ({"batch_size": 3, "class_labels": [1, 2]}, "2 class_labels for 3 images"),
        ({"class_labels": [1, 11]}, "from 0 to 9, or 10 for no class"),
        ({"class_labels": []}, "give one for each"),
    ],
)
def test_labels_that_a_pipeline_cannot_draw_are_refused(
    asked: dict[str, Any], message: str, loaded: LoadedElastic, tmp_path: Path
) -> None:
    folder = str(tmp_path / "model")
    export(loaded, SCHEDULES["unguided"], DDIM().describe(), {}, Path(folder))
    pipeline = DiffusionPipeline.from_pretrained(folder, custom_pipeline=folder, trust_remote_code=True)
    with pytest.raises(ValueError, match=message):
        pipeline(**asked)


@pytest.mark.parametrize(
    "guidance", [{"scale": "2", "model": "unet_1"}, {"scale": 2.0, "model": "../unet_1"}, {"scale": 2.0}, 3]
)
def test_guidance_of_an_exported_folder_is_not_trusted(guidance: Any, loaded: LoadedElastic, tmp_path: Path) -> None:
    export(loaded, SCHEDULES["guided by the half"], DDIM().describe(), {}, tmp_path / "model")
    plan = json.loads((tmp_path / "model" / "schedule.json").read_text())
    assert plan["steps"][0]["guidance"] == {"scale": 2.5, "model": "unet_1", "arch": [[0.5, 0.5], [], [], ""]}
    assert plan["null_label"] == CLASSES
    plan["steps"][0]["guidance"] = guidance
    (tmp_path / "model" / "schedule.json").write_text(json.dumps(plan))
    with pytest.raises(ExportError):
        read_export(tmp_path / "model")


def test_guidance_of_networks_without_labels_is_refused(loaded: LoadedElastic, tmp_path: Path) -> None:
    export(loaded, SCHEDULES["guided by the half"], DDIM().describe(), {}, tmp_path / "model")
    plan = json.loads((tmp_path / "model" / "schedule.json").read_text())
    del plan["null_label"]
    (tmp_path / "model" / "schedule.json").write_text(json.dumps(plan))
    with pytest.raises(ExportError, match="guides steps of networks that take no labels"):
        read_export(tmp_path / "model")


def test_exported_networks_are_trained_with_labels_and_resume_exactly(loaded: LoadedElastic, tmp_path: Path) -> None:
    data = Digits().load()
    settings = Settings(steps=12, batch=8, warmup=2, checkpoint_every=3)
    weights = "diffusion_pytorch_model.safetensors"
    found = []
    for name, stop in (("whole", 99), ("parts", 4)):
        folder = tmp_path / name
        export(loaded, SCHEDULES["guided by the half"], DDIM().describe(), {}, folder)
        ticks = train(folder, data.pixels, settings, cpu=True, labels=data.labels)
        for _, _ in zip(range(stop), ticks, strict=False):
            pass
        ticks.close()
        list(train(folder, data.pixels, settings, cpu=True, labels=data.labels))
        found.append({path.name: load_file(path / weights) for path in sorted((folder / "trained").glob("unet_*"))})
    assert [*found[0]] == ["unet_0", "unet_1"], "the network that guides is trained too"
    for network in found[0]:
        assert all(torch.equal(found[0][network][name], found[1][network][name]) for name in found[0][network])
    before = load_file(tmp_path / "whole" / "unet_0" / weights)
    assert (before["class_embedding.weight"] != found[0]["unet_0"]["class_embedding.weight"]).any()


@pytest.mark.parametrize("labels", [None, np.full(1797, CLASSES), np.full(1797, -1)])
def test_networks_with_labels_are_trained_on_images_with_labels(
    labels: Any, loaded: LoadedElastic, tmp_path: Path
) -> None:
    export(loaded, SCHEDULES["unguided"], DDIM().describe(), {}, tmp_path / "model")
    with pytest.raises(ExportError, match="need a label from 0 to 9 for each image"):
        next(train(tmp_path / "model", Digits().load().pixels, Settings(), cpu=True, labels=labels))


def test_folders_are_classes_where_asked(tmp_path: Path) -> None:
    for name, count in (("b", 2), ("a", 1)):
        (tmp_path / name).mkdir()
        for i in range(count):
            Image.new("L", (8, 8)).save(tmp_path / name / f"{i}.png")
    assert folder_labels(tmp_path).tolist() == [0, 1, 1]
    Image.new("L", (8, 8)).save(tmp_path / "c.png")
    with pytest.raises(PictureError, match="lies in no class's folder"):
        folder_labels(tmp_path)


# ------------------------------------------------------------------------------------------------------------- all the way

STUDY = """
from dataclasses import replace
from evaluators.agreement import Agreement
from evaluators.conditions import Labels
from evaluators.frechet import Frechet
from evaluators.proxies import DenoisingLoss, TeacherFrechet
from evaluators.scoring import Scores
from nas.searchers.knapsack import Knapsack
from nas.searchers.routing import Routing
from nas.searchers.relaxation import Relaxation
from search_spaces.training import Sandwich
from studies.digits_classes import images, labels, study as digits

settings = {"rungs": (32, 64), "conditions": labels}
study = replace(
    digits,
    training=Sandwich(steps=30, batch=16),
    evaluator=Scores((Frechet(images, **settings), Agreement(images, **settings))),
    searchers={**digits.searchers, "knapsack": Knapsack(), "routing": Routing(warm_start=Relaxation(steps=3, batch=4))},
    trials=5,
    verified=2,
    proxies={"loss": DenoisingLoss(images, rungs=(32,), conditions=labels), "teacher": TeacherFrechet(images, rungs=(32,), conditions=labels)},
)
"""


def test_samples_are_shown_class_by_class() -> None:
    asked = Labels(Digits()).load().of(3, 0, 40)["class_labels"].numpy()
    images = asked[:, None, None, None].astype(np.float32)
    shown = class_by_class(images, Frechet(Digits(), conditions=Labels(Digits())), 3)
    assert shown.ravel().tolist() == sorted(asked.tolist())
    assert class_by_class(images, Frechet(Digits()), 3) is images


@pytest.mark.long
def test_a_class_conditional_study_goes_all_the_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study, run, model = tmp_path / "study.py", tmp_path / "run", tmp_path / "model"
    study.write_text(STUDY)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.syspath_prepend(str(ROOT))
    for command in (
        ("run", study, "--dry-run", "--out", run),
        ("run", study, "--searcher", "evolution,knapsack,routing", "--out", run, "-q"),
        ("compare", run),
        ("report", study, "--out", run),
        ("audit", study, "--schedules", 20, "--out", run, "-q"),
        ("export", study, "--within", "macs_share=0.5", "--to", model, "--out", run),
        ("sample", study, "--within", "macs_share=0.5", "--to", tmp_path / "samples.png", "--count", 20, "--out", run),
        ("sample", study, "--within", "macs_share=0.5", "--to", tmp_path / "samples.npy", "--count", 20, "--out", run),
        ("train", model, "--steps", 12, "--study", study, "--out", run, "-q"),
    ):
        done = nas(*command)
        assert done.returncode == 0, (command, done.stderr)
    alone = subprocess.run(
        [sys.executable, "sample.py", "--count", "12", "--labels", "3", "7"],
        cwd=model / "trained",
        capture_output=True,
        text=True,
        check=False,
    )
    assert alone.returncode == 0, alone.stderr
    page = (Path(run) / "report" / "index.html").read_text()
    assert "1,438 to 359 images" in page
    assert page.count("nearer to a train image than") == 2
    told = json.loads((model / "provenance.json").read_text())
    assert set(told["confirmed"]["values"]) == {"fd", "disagreement"}
    folder = str(model)
    pipeline = DiffusionPipeline.from_pretrained(folder, custom_pipeline=folder, trust_remote_code=True)
    asked = Labels(Digits(holdout=0.2)).load().of(0, 0, 20)["class_labels"]
    images = pipeline(class_labels=asked, seed=0, output_type="pt").images * 2 - 1
    assert torch.allclose(images, torch.from_numpy(np.load(tmp_path / "samples.npy")), atol=SAMPLES)
