"""One schedule put to the test: verdicts from paired differences, judges of different kinds, and the whole command on a small study."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import t as student
from sklearn.decomposition import PCA
from typer.testing import CliRunner

from evaluators.features import SmallClassifier
from evaluators.frechet import Frechet, KernelDistance
from evaluators.images import Digits, HeldOutHalf
from evaluators.label_free import PixelComponents, RandomFeatures
from evaluators.proxies import DenoisingLoss, TeacherDistance
from evaluators.scoring import Scores
from nas.cli import app
from nas.contracts import Guidance, Schedule, Score, Step, UserError
from nas.evidence.confirm import full_in_words
from nas.evidence.judges import judges_of
from nas.evidence.verdict import Judged, Verdict, in_short, judged, seeds_needed
from nas.results.report import verdicts
from nas.study import Study
from search_spaces.shipped.train_diffusers import Settings
from search_spaces.supernet import Elastic

IMAGES = Digits(holdout=0.3)


def score(value: float, replicates: tuple[float, ...] = (0.0, 0.0)) -> Score:
    return Score({"fd": value}, {"fd": replicates})


def of(differences: list[float], margin: float, error: float = 0.0, decides: bool = True) -> Judged:
    return Judged("a judge", 1.0, 1.0, 0.0, tuple(differences), error, margin, decides)


# -------------------------------------------------------------------------------------------------------------- verdicts


def test_the_interval_is_students_over_the_seeds() -> None:
    differences = [0.01, -0.02, 0.03, 0.0, 0.015]
    found = of(differences, 0.05)
    spread = np.std(differences, ddof=1) / math.sqrt(5)
    assert found.interval == pytest.approx(student.interval(0.95, 4, np.mean(differences), spread))


def test_seeds_that_happen_to_agree_do_not_hide_the_error_of_sampling() -> None:
    least, most = of([0.01, 0.01, 0.01], 0.05, error=0.02).interval
    assert (least, most) == pytest.approx((0.01 - 1.96 * 0.02, 0.01 + 1.96 * 0.02))


def test_the_margin_is_a_share_of_what_is_above_the_floor() -> None:
    mine, full = [score(2.1), score(2.3)], [score(2.0), score(2.0)]
    found = judged("a judge", mine, full, "fd", 1.5, 0.1, True)
    assert found.margin == pytest.approx(0.05)
    assert found.differences == pytest.approx((0.1, 0.3))
    # A reference as good as real images leaves no room: nothing but an improvement is no loss.
    assert judged("a judge", mine, full, "fd", 2.5, 0.1, True).margin == 0
    with pytest.raises(ValueError, match="two seeds"):
        judged("a judge", mine[:1], full[:1], "fd", 1.5, 0.1, True)


def test_a_verdict_needs_both_judges_and_says_who_contradicts() -> None:
    fine, bad = of([0.0, 0.001, -0.001], 0.05), of([0.2, 0.21, 0.19], 0.05)
    unsure = of([0.2, -0.2, 0.1], 0.05)

    def verdict(*judges: Judged) -> Verdict:
        return Verdict("name", "digest", 0.6, judges, False, "schedule")

    assert verdict(fine, fine).confirmed
    steps = tuple(Step(t, ("full",), (), guide) for t, guide in ((9, Guidance(2.5)), (5, None)))
    guided = replace(verdict(fine, fine), reference=full_in_words(Schedule(steps)))
    assert "is not worse than the full network guided at 2.5 equally trained" in guided.words
    assert full_in_words(Schedule(steps[1:])) == "the full network"
    assert verdict(fine, fine).words.startswith("No loss: the schedule, 60% of the MACs saved")
    beside = replace(bad, judge="another", decides=False)
    assert verdict(fine, fine, beside).confirmed
    assert "though a loss under another" in verdict(fine, fine, beside).words
    assert verdict(fine, bad).words.startswith("A loss")
    assert verdict(fine, unsure).words.startswith("Not confirmed")
    assert "seeds would show no loss in four of five tries" in verdict(fine, unsure).advice
    assert "not even 1,000 seeds would show" in verdict(fine, of([9.0, -9.0], 0.05)).advice
    for lost in (verdict(fine, bad), verdict(fine, unsure)):
        assert not lost.confirmed
    assert verdict(fine, bad).advice == verdict(fine, fine).advice == ""
    small = replace(of([0.02, 0.021, 0.019], 0.05), judge="a finer one")
    assert small.no_loss
    assert small.loss
    assert small.words.endswith(": a loss within the margin")
    said = verdict(fine, small).words
    assert said.startswith(
        "No loss beyond the margin: the schedule, 60% of the MACs saved, is worse than the full network"
    )
    assert "by less than that under a finer one, and not worse under " in said


def test_seeds_that_happen_to_agree_are_no_advice_to_take_fewer() -> None:
    """What sampling alone leaves of three seeds' mean is as wide as the margin, however near they are to each other."""
    lucky = of([0.001, -0.001, 0.0], 0.05, error=0.05)
    assert not lucky.no_loss
    said = Verdict("name", "digest", 0.6, (lucky,), False, "schedule").advice
    [count] = [int(word) for word in said.split() if word.isdigit()]
    # As many as bring 1.96 errors of so many seeds below the margin, at the least.
    assert 1.96 * 0.05 * math.sqrt(3 / count) <= 0.05


def test_of_several_the_largest_saving_is_told_and_why_no_more() -> None:
    def verdict(saved: float, *differences: float) -> Verdict:
        return Verdict("name", "digest", saved, (of([*differences], 0.05),), False, "schedule")

    small, more, lost = verdict(0.3, 0.0, 0.0), verdict(0.5, 0.01, 0.011), verdict(0.6, 0.2, 0.21)
    assert in_short((small, more), 2).endswith("50% of the MACs. No other schedule was asked about.")
    assert in_short((small, lost), 3).endswith("30% of the MACs. The next, 60%, is not; the others were not trained.")
    assert in_short((small, lost), 2).endswith("The next, 60%, is not.")
    assert in_short((lost,), 2).startswith("No saving is shown to lose nothing. The first, 60%, is not;")


@pytest.mark.parametrize("deviation", [0.05, 0.12])
def test_so_many_seeds_have_the_power_that_they_are_said_to_have(deviation: float) -> None:
    margin, tries = 0.1, 4000
    rng = np.random.default_rng(0)

    def confirmed(count: int, truth: float) -> float:
        draws = rng.normal(truth, deviation, (tries, count))
        ends = draws.mean(1) + student.ppf(0.975, count - 1) * draws.std(1, ddof=1) / math.sqrt(count)
        return float((ends <= margin).mean())

    needed = seeds_needed(deviation, margin)
    noise = 3 * math.sqrt(0.25 / tries)  # of a share of so many tries
    assert confirmed(needed, 0.0) >= 0.8 - noise
    assert needed == 2 or confirmed(needed - 1, 0.0) <= 0.8 + noise
    # A schedule that loses all of the margin is confirmed in one try of forty.
    assert confirmed(needed, margin) == pytest.approx(0.025, abs=noise)
    assert seeds_needed(deviation, 0.0) == seeds_needed(100.0, margin) == 1000


# ---------------------------------------------------------------------------------------------------------------- judges


def test_components_are_those_of_a_principal_component_analysis(tmp_path: Path) -> None:
    images = IMAGES.load()
    recipe = PixelComponents(10)
    assert [tick.done for tick in recipe.prepare(images, tmp_path, 0, "cpu")] == [0, 1]
    found = recipe.load(tmp_path, torch.device("cpu"))(torch.from_numpy(images.pixels)).numpy()
    theirs = PCA(10).fit_transform(images.pixels.reshape(len(images), -1).astype(np.float64))
    # Each up to its sign, in float32 sums of 64 pixels.
    assert np.abs(np.abs(found) - np.abs(theirs)).max() < 1e-4
    assert list(recipe.prepare(images, tmp_path, 0, "cpu")) == []
    with pytest.raises(UserError, match="other images"):
        list(recipe.prepare(Digits().load(), tmp_path, 0, "cpu"))


def test_large_images_are_averaged_down_before_their_components(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).uniform(-1, 1, (80, 3, 64, 48)).astype(np.float32)
    images = replace(IMAGES.load(), pixels=pixels, labels=None)
    recipe = PixelComponents(4)
    list(recipe.prepare(images, tmp_path, 0, "cpu"))
    assert recipe.load(tmp_path, torch.device("cpu"))(torch.from_numpy(pixels)).shape == (80, 4)


def test_random_features_are_the_same_everywhere_and_need_nothing(tmp_path: Path) -> None:
    grey = torch.from_numpy(IMAGES.load().pixels[:50])
    first, again = (RandomFeatures(33).load(tmp_path, torch.device("cpu"))(grey) for _ in range(2))
    assert torch.equal(first, again)
    assert first.shape == (50, 33)
    in_colour = RandomFeatures(33).load(tmp_path, torch.device("cpu"))(grey.expand(-1, 3, -1, -1))
    assert torch.allclose(first, in_colour, atol=1e-5)
    assert not torch.allclose(first, RandomFeatures(33, seed=1).load(tmp_path, torch.device("cpu"))(grey))
    assert RandomFeatures(33).digest(tmp_path) != RandomFeatures(33, seed=1).digest(tmp_path)


def test_the_halves_of_what_is_held_out_are_all_of_it_and_have_nothing_in_common() -> None:
    whole, first, second = (one.load() for one in (IMAGES, HeldOutHalf(IMAGES, "first"), HeldOutHalf(IMAGES, "second")))
    parts = [{image.tobytes() for image in part.reference.pixels} for part in (whole, first, second)]
    assert parts[1] | parts[2] == parts[0]
    assert not parts[1] & parts[2]
    assert np.array_equal(first.pixels, whole.pixels)
    assert len({part.digest for part in (whole, first, second)}) == 3
    with pytest.raises(UserError, match="holdout"):
        HeldOutHalf(Digits(), "first").load()


def test_halves_of_what_is_held_out_share_what_is_trained(tmp_path: Path) -> None:
    """A search's classifier and another score's are of the same images, whichever half each judges by."""
    whole, first, second = (one.load() for one in (IMAGES, HeldOutHalf(IMAGES, "first"), HeldOutHalf(IMAGES, "second")))
    classifier = SmallClassifier(steps=3)
    assert len([*classifier.prepare(first, tmp_path, 0, "cpu")]) == 4
    digest = classifier.digest(tmp_path)
    assert not [*classifier.prepare(second, tmp_path, 0, "cpu")]
    assert not [*classifier.prepare(whole, tmp_path, 0, "cpu")]
    assert classifier.digest(tmp_path) == digest
    for other, seed in (
        (replace(whole, pixels=-whole.pixels, digest="other"), 0),
        (first, 1),
        (replace(first, labels=None, digest="other", source=""), 0),
    ):
        with pytest.raises(UserError, match="was trained on other images"):
            [*classifier.prepare(other, tmp_path, seed, "cpu")]


def test_a_classifier_of_one_class_learns_something_else(tmp_path: Path) -> None:
    images = IMAGES.load()
    alike = replace(images, labels=np.zeros_like(images.labels), digest="alike")
    ticks = [*SmallClassifier(steps=30).prepare(alike, tmp_path, 0, "cpu")]
    assert ticks[0].values["loss"] > 1.0  # of four quarter turns to tell apart
    assert SmallClassifier(steps=30).held_out_accuracy(tmp_path) is None


def test_judges_look_at_images_that_the_search_did_not_see(tiny_study: Study) -> None:
    first = replace(tiny_study, images=IMAGES, evaluator=Frechet(HeldOutHalf(IMAGES, "first"), rungs=(32, 64)))
    judges, seen = judges_of(first)
    assert not seen
    assert all(judge.evaluator.images == HeldOutHalf(IMAGES, "second") for judge in judges)
    assert [judge.decides for judge in judges] == [True, True, False, False]
    judges, seen = judges_of(replace(first, evaluator=Scores((Frechet(IMAGES, rungs=(32, 64)),))))
    assert seen
    assert judges[0].evaluator.features == SmallClassifier()
    for other, looked in (
        (KernelDistance(IMAGES, rungs=(32, 64)), True),
        (TeacherDistance(IMAGES, rungs=(32, 64)), False),
    ):
        assert judges_of(replace(first, evaluator=Scores((first.evaluator, other))))[1] == looked
    with pytest.raises(UserError, match="holds no images out"):
        judges_of(tiny_study)


def test_judges_sample_as_the_study_does(tiny_study: Study) -> None:
    """Whichever score of it says how."""
    given: dict[str, Any] = {"rungs": (32, 64), "precision": "bfloat16", "batch": 4, "reuse_bytes": 2**20}
    for score in (
        KernelDistance(HeldOutHalf(IMAGES, "first"), **given),
        Scores((TeacherDistance(IMAGES, **given),)),
        Frechet(HeldOutHalf(IMAGES, "first"), **given),
    ):
        judges, _ = judges_of(
            replace(tiny_study, images=IMAGES, evaluator=score, objectives=(score.metrics[0], "macs"))
        )
        told = given if not isinstance(score, Scores) else {name: v for name, v in given.items() if name != "batch"}
        assert all(getattr(judge.evaluator, name) == value for judge in judges for name, value in told.items())


def test_a_file_of_statistics_is_no_held_out_images(tiny_study: Study, tmp_path: Path) -> None:
    """Nobody knows of which images it is."""
    given = Frechet(Digits(), PixelComponents(), rungs=(32, 64), reference=str(tmp_path / "stats.npz"))
    with pytest.raises(UserError, match="holds no images out"):
        judges_of(replace(tiny_study, evaluator=given))
    halved = replace(given, images=HeldOutHalf(IMAGES, "first"))
    judges, seen = judges_of(replace(tiny_study, images=IMAGES, evaluator=halved))
    assert seen
    assert all(judge.evaluator.images == HeldOutHalf(IMAGES, "second") for judge in judges)
    own = judges[0].evaluator
    assert isinstance(own, Frechet)
    assert own.reference is None


EVALUATORS: dict[str, Any] = {
    "no features": DenoisingLoss(IMAGES, rungs=(16, 32)),
    "a kernel distance": KernelDistance(HeldOutHalf(IMAGES, "first"), RandomFeatures(), rungs=(16, 32)),
    "components": Frechet(HeldOutHalf(IMAGES, "first"), PixelComponents(), rungs=(16, 32)),
    "a classifier": Frechet(HeldOutHalf(IMAGES, "first"), rungs=(16, 32)),
}


@pytest.mark.parametrize("name", EVALUATORS)
def test_every_judge_can_judge_once_it_is_prepared_and_two_of_different_kind_decide(
    name: str, tiny_study: Study, tmp_path: Path
) -> None:
    evaluator = EVALUATORS[name]
    study = replace(tiny_study, images=IMAGES, evaluator=evaluator, objectives=(evaluator.metrics[0], "macs"))
    net = study.supernet.initial(0)  # type: ignore[attr-defined]
    list(study.evaluator.prepare(tmp_path, study.seed, "cpu"))
    judges, _ = judges_of(study)
    for judge in judges:
        list(judge.prepare(tmp_path, study.seed, "cpu"))
        loaded = judge.load(net, tmp_path)
        assert math.isfinite(loaded(study.space.decode((0,) * 4), 16, 0).values[judge.metric])
    kinds = [type(judge.evaluator.features) for judge in judges if judge.decides]
    assert len(kinds) == len(set(kinds)) == 2
    # What was made of the images that the search was scored against serves for the others: both are made of the train images.
    list(study.evaluator.prepare(tmp_path, study.seed, "cpu"))


def test_the_floor_says_how_many_real_images_there_are(tiny_study: Study) -> None:
    few, many = (
        judges_of(replace(tiny_study, images=IMAGES, evaluator=Frechet(IMAGES, rungs=(32, rung))))[0][0]
        for rung in (64, 4096)
    )
    assert (few.reals, many.reals) == (64, len(IMAGES.load()))
    assert "(equally many real images" in of([0.0, 0.1], 0.05).words
    assert "(all 1,257 real images" in replace(of([0.0, 0.1], 0.05), reals=1257).words


# ------------------------------------------------------------------------------------------------------------ the command

STUDY = """
from evaluators.frechet import Frechet
from evaluators.images import Digits, HeldOutHalf
from nas.searchers.random import Random
from nas.study import Study
from search_spaces.intervals import per_step, uniform
from search_spaces.stepwise import Stepwise
from search_spaces.supernet import Elastic
from search_spaces.training import Sandwich
from tests.conftest import TINY

net, images, steps = Elastic(TINY, widths=(0.25, 0.5, 1.0), groups="count"), Digits(holdout=0.3), uniform(4)
study = Study(
    name="confirmed",
    space=Stepwise(net, steps, per_step(steps)),
    supernet=net,
    images=images,
    training=Sandwich(steps=10, batch=8, warmup=2),
    evaluator=Frechet(HeldOutHalf(images, "first"), rungs=(16, 32)),
    searchers={"random": Random()},
    trials=4,
    verified=2,
)
"""


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study file beside its run."""
    from nas.engine.session import open_session
    from nas.study import load_study

    folder = tmp_path_factory.mktemp("confirm")
    (folder / "study.py").write_text(STUDY)
    study = load_study(folder / "study.py")
    with open_session(study, folder / "run") as session:
        for _ in session.prepare(threads=1):
            pass
        for name in ("uniform", "random"):
            session.run(session.conductor(name))
    return folder


def confirm(folder: Path, *options: str) -> Any:
    given = [str(folder / "study.py"), "--out", str(folder / "run"), "--seeds", "2", "--steps", "6", "--batch", "8"]
    return CliRunner().invoke(app, ["confirm", *given, *options])


def test_a_claim_is_written_down_trained_equally_judged_and_shown(searched: Path) -> None:
    name = ("--within", "macs_share=0.6", "--name", "whole")
    place = searched / "run" / "confirm" / "whole"
    assert confirm(searched, *name, "--protocol-only").exit_code == 0
    protocol = json.loads((place / "protocol.json").read_text())
    assert [path.name for path in place.iterdir()] == ["protocol.json"]
    assert protocol["seeds"] == [0, 1]
    done = confirm(searched, *name, "--json")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout[done.stdout.index("{\n") :])
    assert found["digest"] == _digest(protocol)
    assert len(found["judges"]) == 4
    assert {len(judge["differences"]) for judge in found["judges"]} == {2}
    assert found["saved"] == pytest.approx(1 - _share(searched, protocol))
    assert not found["seen"]
    for arm, steps in protocol["settings"]["gradient_steps"].items():
        kept = json.loads((place / f"{arm}-1" / "trained" / "settings.json").read_text())
        assert kept["steps"] == steps
    # Two seeds are two trainings, and the two arms of a seed are judged on the same noises.
    kept = json.loads((place / "scores.json").read_text())
    assert len({json.dumps(score["the study's FD"]["values"]) for score in kept.values()}) == 4

    trained = place / "schedule-0" / "trained" / "losses.jsonl"
    before = trained.stat().st_mtime_ns
    again = confirm(searched, *name, "--json")
    assert json.loads(again.stdout[again.stdout.index("{\n") :])["judges"] == found["judges"]
    assert trained.stat().st_mtime_ns == before

    changed = confirm(searched, *name, "--margin", "0.2")
    assert changed.exit_code == 1
    assert "a protocol is not changed once it is written" in " ".join(str(changed.exception).split())

    to = searched / "model"
    study, run = str(searched / "study.py"), str(searched / "run")
    told = CliRunner().invoke(app, ["export", study, "--out", run, "--within", "macs_share=0.6", "--to", str(to)])
    assert told.exit_code == 0, told.output
    assert found["words"] in (to / "README.md").read_text()
    assert CliRunner().invoke(app, ["report", study, "--out", run]).exit_code == 0
    assert "Put to the test" in (searched / "run" / "report" / "index.html").read_text()
    weights = json.loads((place / "protocol.json").read_text())["settings"]["supernet"]
    assert [one["words"] for one in verdicts(searched / "run", weights)] == [found["words"]]
    assert verdicts(searched / "run", "of other weights") == []


@pytest.mark.long
def test_several_are_asked_about_one_after_another_until_one_loses(searched: Path) -> None:
    """The full network against itself, equally trained, loses nothing; what an untrained supernet finds is not shown to lose nothing by two seeds; and what would
    come after is not trained."""
    import nas

    run = nas.open_run(searched / "study.py", searched / "run")
    space, limit = run.study.space, {"steps": 6, "batch": 8}
    found = {info.searcher: trials for info, trials in run.results.ledgers}
    full = next(trial for trial in found["uniform"] if trial.cost["macs_share"] == 1)
    others = sorted(found["random"], key=lambda trial: -trial.cost["macs_share"])
    chosen = [run.trial(full.number, "uniform"), *(run.trial(trial.number, "random") for trial in others[:2])]
    made = run.confirmation(chosen, "several", 2, 0.001, limit)
    assert made.sequence == ("schedule-1", "schedule-2", "schedule-3")
    shares = [space.cost(space.genome(made.schedule(arm)))["macs_share"] for arm in made.sequence]  # type: ignore[attr-defined]
    assert shares == sorted(shares, reverse=True)
    assert made.trained_as("schedule-1") == "schedule-1"
    assert made.trained_as("full") == "schedule-1", "what is trained the same is trained once"
    first, second = run.put_to_the_test(made)
    assert first.confirmed
    assert {difference for judge in first.judges for difference in judge.differences} == {0.0}
    assert not second.confirmed
    assert not list(made.place.glob("schedule-3-*"))
    kept = json.loads((made.place / "verdict.json").read_text())
    assert [one["words"] for one in kept["verdicts"]] == [first.words, second.words]
    shown = (run.report()).read_text()
    assert shown.count(f"Protocol several, {first.digest}") == 2

    # Where one schedule is the best within both budgets, it is asked about once.
    done = confirm(searched, "--within", "macs_share=0.9,0.9", "--protocol-only")
    assert done.exit_code == 0, done.output
    protocol = json.loads((searched / "run" / "confirm" / "macs_share-0.9-0.9" / "protocol.json").read_text())
    assert list(protocol["arms"]) == ["schedule", "full"]
    assert "each only where all before it were confirmed" in made.protocol.test


def _digest(protocol: dict[str, Any]) -> str:
    from nas.evidence.protocol import Protocol

    return Protocol.from_json(protocol, "the test's").digest


def _share(searched: Path, protocol: dict[str, Any]) -> float:
    from nas.contracts import Schedule
    from nas.study import load_study

    space = load_study(searched / "study.py").space
    schedule = Schedule.from_json(json.dumps(protocol["settings"]["schedules"]["schedule"]))
    return space.cost(space.genome(schedule))["macs_share"]  # type: ignore[attr-defined]


@pytest.mark.parametrize("learned_variance", [False, True])
def test_both_are_trained_for_as_many_multiply_adds(
    learned_variance: bool, tiny_net: Elastic, tiny_study: Study
) -> None:
    """Where a network says where the variance lies the teacher is asked at every step, since it says it too."""
    from nas.evidence.confirm import equal_steps

    if learned_variance:
        tiny_net = Elastic({**tiny_net.config, "out_channels": 2}, tiny_net.widths, groups="count")
    net = tiny_net.initial(0)
    schedule = tiny_study.space.decode((0, 1, 2, 0))
    for distillation in (0.0, 0.5):
        settings = Settings(steps=600, distillation=distillation)
        steps = equal_steps(net, schedule, settings)
        # Of `train`: every network has the share of the steps that its timesteps have of all 1,000.
        bounds = [1000, *(step.timestep + 1 for step in schedule.steps[1:]), 0]
        teacher = tiny_net.cost(tiny_net.anatomy.full).macs if distillation or learned_variance else 0
        spent = sum(
            steps * (start - stop) / 1000 * (3 * tiny_net.cost(step.arch).macs + teacher)
            for step, start, stop in zip(schedule.steps, bounds, bounds[1:], strict=False)
        )
        whole = 600 * (3 * tiny_net.cost(tiny_net.anatomy.full).macs + teacher)
        assert spent == pytest.approx(whole, rel=0.5 / steps)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--within", "macs_share=0.6", "--name", "../x"), "no plain name"),
        ((), "say which trial"),
        (("--within", "macs_share=0.000001"), "macs_share"),
        (("--within", "macs_share=0.5,half"), "COST=LIMIT,LIMIT"),
        (("--within", "seed=0.5"), "'seed' is not a cost"),
    ],
)
def test_what_cannot_be_asked_is_refused_in_words(searched: Path, options: tuple[str, ...], words: str) -> None:
    done = confirm(searched, *options)
    assert done.exit_code == 1
    assert isinstance(done.exception, UserError)
    assert words in str(done.exception)
