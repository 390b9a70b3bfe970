"""The rung above the counts of samples: scores of subnets that are fine-tuned first."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from evaluators.frechet import Frechet
from evaluators.images import Digits
from evaluators.latency import Latency, Timed
from nas.base.exported import read_network
from nas.contracts import Schedule, UserError, derive_seed, digest_of
from nas.evidence.confirm import equal_steps, gradient_macs
from nas.evidence.recovered import FOLDER, Recovered
from nas.handover.export import export
from nas.handover.training import adopt
from nas.library import StudyRun
from nas.results.forecast import forecast
from nas.searchers.knapsack import Knapsack
from nas.study import Study
from nas.testing import check_evaluator
from search_spaces.intervals import uniform
from search_spaces.options import Options
from search_spaces.patterns import Every
from search_spaces.shipped.train_diffusers import TRAINED, settings_of, train
from search_spaces.stepwise import Stepwise
from search_spaces.supernet import Elastic
from search_spaces.training import Sandwich
from tests.test_own import ATTEND

FROZEN = Frechet(Digits(), rungs=(16, 32))
RECOVERED = Recovered(FROZEN, Digits(), above=16, steps=3, intervals=2, batch=8)


@pytest.fixture
def run(tiny_run: Path, tmp_path: Path) -> Path:
    """A run folder with trained weights in which nothing was recovered yet."""
    for part in ("supernet", "features"):
        (tmp_path / part).symlink_to(tiny_run / part)
    return tmp_path


def loaded(study: Study, run: Path, recipe: Any = RECOVERED) -> Any:
    return recipe.load(study.supernet.load(run / "supernet", "cpu"), run)


def networks(run: Path) -> list[Path]:
    return sorted(path.parent for path in (run / FOLDER).glob("*/config.json"))


def test_it_is_an_evaluator(tiny_study: Study, run: Path) -> None:
    check_evaluator(RECOVERED, tiny_study.supernet, tiny_study.space, run)


def test_few_samples_are_of_the_subnets_as_they_are(tiny_study: Study, run: Path) -> None:
    schedule = tiny_study.space.decode((0, 1, 2, 0))
    mine, plain = (loaded(tiny_study, run, recipe)(schedule, 16, 0) for recipe in (RECOVERED, FROZEN))
    assert (mine.values, mine.replicates, mine.labels) == (plain.values, plain.replicates, plain.labels)
    assert not networks(run)


def test_more_samples_are_of_what_an_exported_schedule_becomes_by_training(
    tiny_study: Study, run: Path, tmp_path: Path
) -> None:
    """Where there is one interval and one subnet, an exported folder is trained on the same timesteps."""
    schedule = tiny_study.space.decode((1, 1, 1, 1))
    arch = schedule.steps[0].arch
    score = loaded(tiny_study, run, replace(RECOVERED, intervals=1))(schedule, 32, 7)
    evaluator = loaded(tiny_study, run, FROZEN)
    frozen = evaluator(schedule, 32, 7)
    net, folder = evaluator.supernet, tmp_path / "exported"
    export(net, schedule, evaluator.sampler_of(schedule), {}, folder)
    given = {**net.training_settings, "steps": 3, "batch": 8, "learning_rate": 2e-4, "distillation": 0.0}
    seed = derive_seed(0, 0, digest_of(arch), "recovery") % 2**31
    settings = replace(settings_of(given), seed=seed, steps=equal_steps(net, schedule, settings_of(given)), warmup=1)
    assert settings.steps > 3
    for _ in train(folder, Digits().load().pixels, settings, cpu=True):
        pass
    adopt(evaluator, folder / TRAINED)
    assert score.values == evaluator(schedule, 32, 7).values != frozen.values
    assert "after 3 steps of fine-tune" in score.labels["fd"]


def test_a_training_serves_every_schedule_with_that_subnet_in_that_interval(tiny_study: Study, run: Path) -> None:
    evaluator = loaded(tiny_study, run)
    first, second = (tiny_study.space.decode(genome) for genome in ((0, 0, 1, 1), (1, 1, 1, 1)))
    net, plain = evaluator.supernet, loaded(tiny_study, run, FROZEN)
    paid = evaluator(first, 32, 0).spent["macs"] - plain(first, 32, 0).spent["macs"]
    settings = settings_of({**net.training_settings, "distillation": 0.0})
    equal = RECOVERED.steps * RECOVERED.batch * gradient_macs(net, net.full_arch, settings)
    assert paid == pytest.approx(equal, rel=0.2)  # as many as of the full network, but for whole steps
    before = networks(run)
    assert len(before) == 2
    score = evaluator(second, 32, 0)
    [new] = set(networks(run)) - set(before)
    trained = [read_network(path).state_dict() for path in networks(run)]
    same_arch = [one for one in trained if one["conv_in.weight"].shape == read_network(new).conv_in.weight.shape]
    assert len(same_arch) == 2  # one for each interval, of other timesteps
    assert not torch.equal(same_arch[0]["conv_in.weight"], same_arch[1]["conv_in.weight"])
    again = loaded(tiny_study, run)(second, 32, 0)  # as another worker would
    assert again.values == score.values
    assert again.spent["macs"] < score.spent["macs"]
    assert again.charged_in_full().spent["macs"] == pytest.approx(score.charged_in_full().spent["macs"])
    # Pictures are of what the last scores are of; nothing is trained for a picture.
    assert not torch.equal(evaluator.sample_as_scored(second, 4, 0), plain.sample(second, 4, 0))
    assert torch.equal(evaluator.sample(second, 4, 0), plain.sample(second, 4, 0)), "as it is handed out"
    other = tiny_study.space.decode((2, 2, 2, 2))
    assert torch.equal(evaluator.sample_as_scored(other, 4, 0), plain.sample(other, 4, 0))


@pytest.mark.long
def test_a_training_that_was_stopped_goes_on(
    tiny_study: Study, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    schedule = tiny_study.space.decode((2, 2, 2, 2))
    taken = []

    def stopped(*arguments: Any, **named: Any) -> Any:
        for tick in train(*arguments, **named):
            yield tick
            taken.append(tick["step"])
            if len(taken) == 2:
                raise KeyboardInterrupt

    monkeypatch.setattr("nas.evidence.recovered.train", stopped)
    with pytest.raises(KeyboardInterrupt):
        loaded(tiny_study, run, replace(RECOVERED, steps=8))(schedule, 32, 0)
    assert not networks(run)
    score = loaded(tiny_study, run, replace(RECOVERED, steps=8))(schedule, 32, 0)
    monkeypatch.undo()
    other = tmp_path / "other"
    other.mkdir()
    for part in ("supernet", "features"):
        (other / part).symlink_to(run / part)
    assert score.values == loaded(tiny_study, other, replace(RECOVERED, steps=8))(schedule, 32, 0).values


def test_networks_that_were_trained_otherwise_are_scored_as_they_are(tiny_study: Study, run: Path) -> None:
    schedule = tiny_study.space.decode((0, 0, 0, 0))
    evaluator, plain = loaded(tiny_study, run), loaded(tiny_study, run, FROZEN)
    other = tiny_study.supernet.initial(9)  # type: ignore[attr-defined]
    for one in (evaluator, plain):
        one.supernet.adopt(schedule.steps[0].arch, other.extract(schedule.steps[0].arch))
    assert evaluator(schedule, 32, 0).values == plain(schedule, 32, 0).values
    assert not networks(run)


def test_steps_that_hold_a_prediction_train_nothing(tiny_study: Study, tiny_net: Elastic, run: Path) -> None:
    space = Stepwise(tiny_net, uniform(4), (4,), Options((1.0,)), patterns=(Every(4, ()),), deterministic=False)
    schedule = space.decode((0,) * len(space.choices))
    evaluator = loaded(tiny_study, run)
    assert [evaluator.supernet.macs(step) > 0 for step in schedule.steps] == [True, False, False, False]
    evaluator(schedule, 32, 0)
    assert len(networks(run)) == 1
    scored = evaluator.sample_as_scored(schedule, 4, 0)
    assert not torch.equal(scored, evaluator.sample(schedule, 4, 0))


def test_a_search_verifies_what_leads_by_it(tiny_study: Study, run: Path, tmp_path: Path) -> None:
    study = replace(tiny_study, evaluator=Timed(RECOVERED, Latency(batch=2, repeats=1)), trials=8, verified=2)
    searched = StudyRun(study, run)
    searched.search("evolution")
    assert (searched.trials().status == "complete").sum() >= 2
    best = searched.best(macs_share=0.6)
    assert "fine-tune" in best.score.labels["fd"]
    searched.export(best, tmp_path / "model")
    schedule = searched.schedule(best)
    assert isinstance(schedule, Schedule)
    timed = loaded(study, run, study.evaluator)
    scored = timed.sample_as_scored(schedule, 4, 0)
    assert torch.equal(scored, timed.base.sample_as_scored(schedule, 4, 0))
    assert not torch.equal(scored, timed.sample(schedule, 4, 0)), "as pictures of a report are drawn"
    network = read_network(tmp_path / "model" / "unet_0").state_dict()
    frozen = study.supernet.load(run / "supernet", "cpu").extract(schedule.archs[0]).state_dict()
    assert all(torch.equal(network[name], tensor) for name, tensor in frozen.items())  # what is exported is not trained


@pytest.mark.long
def test_the_exact_solver_adds_up_what_trained_subnets_lose(tiny_study: Study, run: Path) -> None:
    """Nine schedules of three subnets in two intervals are made of six trainings."""
    grid = uniform(4)
    space = Stepwise(tiny_study.supernet, grid, (2, 2))  # type: ignore[arg-type]
    recipe = replace(RECOVERED, above=0)
    study = replace(
        tiny_study,
        space=space,
        evaluator=recipe,
        searchers={"knapsack": Knapsack()},
        limits={"macs_share": 1.0},
        trials=9,
    )
    searched = StudyRun(study, run)
    searched.search("knapsack")
    assert len(networks(run)) == 6
    scored = searched.trials()
    assert (scored.searcher == "knapsack").sum() >= 9


def test_some_rung_must_be_above() -> None:
    with pytest.raises(UserError, match="above=32 must be less than the last of the rungs"):
        replace(RECOVERED, above=32).check()
    RECOVERED.check()


def test_networks_of_ones_own_are_refused(tmp_path: Path) -> None:
    net = Elastic({}, widths=(0.5, 1.0), network=ATTEND).initial(0)
    with pytest.raises(UserError, match="Recovered trains networks of diffusers, and a Attend is none"):
        RECOVERED.load(net, tmp_path)


def test_a_dry_run_says_what_it_leaves_out(tiny_study: Study) -> None:
    study = replace(tiny_study, evaluator=RECOVERED, training=Sandwich(steps=2, batch=8))
    assert "up to 3 gradient steps" in " ".join(forecast(study, ["evolution"], threads=1).words)
