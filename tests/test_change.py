"""Changing one's mind: other limits, objectives, rungs, settings or numbers of trials on the same weights. Nothing is scored twice, and the baseline stands."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from nas.contracts import Schedule, Score, UserError
from nas.library import StudyRun, open_run
from nas.searchers.evolution import Evolution
from nas.study import BASELINE, Study, with_rungs
from tests.toy import ToyEvaluator, toy_study

CALLS: Counter[tuple[str, int, int]] = Counter()
"""Of which schedule, on how many samples, on noises of which seed."""


@dataclass(frozen=True)
class Counted(ToyEvaluator):
    def __call__(self, schedule: Schedule, rung: int, seed: int) -> Score:
        CALLS[schedule.digest, rung, seed] += 1
        return super().__call__(schedule, rung, seed)


def study(**changes: Any) -> Study:
    return replace(toy_study(evaluator__rungs=(64, 256)), **{"evaluator": Counted(rungs=(64, 256)), **changes})


CHANGES: dict[str, dict[str, Any]] = {
    "a tighter limit": {"limits": {"macs_share": 0.5}},
    "no limit": {"limits": {}},
    "another objective": {"objectives": ("fd", "params")},
    "more verified trials": {"verified": 9},
    "more trials": {"trials": 40},
    "another rung on top": {"evaluator": Counted(rungs=(64, 256, 1024))},
    "other settings of the searcher": {"searchers": {"evolution": Evolution(population=5)}},
}


@pytest.fixture
def first(tmp_path: Path) -> StudyRun:
    """A run that was searched to its end."""
    CALLS.clear()
    opened = open_run(study(), tmp_path / "run")
    opened.search("evolution")
    return opened


@pytest.mark.parametrize("change", CHANGES)
def test_nothing_is_scored_twice(first: StudyRun, change: str) -> None:
    before = Counter(CALLS)
    baseline = [trials for info, trials in first.results.ledgers if info.searcher == BASELINE]
    changed = open_run(study(**CHANGES[change]), first.folder)
    changed.search("evolution")
    assert set(CALLS.values()) == {1}
    assert {(digest, rung) for digest, rung, _ in CALLS} >= {(digest, rung) for digest, rung, _ in before}
    # What was searched before is there as it was, when the study is as it was.
    assert [trials for info, trials in first.results.ledgers if info.searcher == BASELINE] == baseline


@pytest.mark.parametrize("change", ["a tighter limit", "another objective", "other settings of the searcher"])
def test_another_search_has_a_ledger_of_its_own(first: StudyRun, change: str) -> None:
    mine = first.trials("evolution")
    changed = open_run(study(**CHANGES[change]), first.folder)
    changed.search("evolution")
    theirs = changed.trials("evolution")
    assert not theirs.empty
    assert first.trials("evolution").equals(mine)
    assert changed.results.others > 0
    limit = changed.study.limits["macs_share"]
    assert (theirs["macs_share"] <= limit).all()
    names = [one.best("evolution", macs_share=limit).ledger for one in (first, changed)]
    assert names[1].startswith(f"{names[0]}.")
    assert changed.compare()["other_ledgers"] == changed.results.others
    # And the search goes on where it is, whichever the study is.
    count = sum(CALLS.values())
    for one in (first, changed):
        one.search("evolution")
    assert sum(CALLS.values()) == count


def test_the_baseline_knows_no_limit(first: StudyRun) -> None:
    changed = open_run(study(limits={"macs_share": 0.3}), first.folder)
    [before], [after] = (
        [(info.name, trials) for info, trials in one.results.ledgers if info.searcher == BASELINE]
        for one in (first, changed)
    )
    assert before[0] == after[0]
    assert [trial.score for trial in before[1]] == [trial.score for trial in after[1]]
    for trial in after[1]:
        assert trial.violations == {"macs_share": pytest.approx(trial.cost["macs_share"] - 0.3)}


def test_what_is_known_is_charged_as_known(first: StudyRun) -> None:
    changed = open_run(study(searchers={"evolution": Evolution(population=5)}), first.folder)
    changed.search("evolution")
    [trials] = [trials for info, trials in changed.results.ledgers if info.searcher == "evolution"]
    known = {(t.digest, t.rung) for _, ledger in first.results.ledgers for t in ledger}
    shared = [trial for trial in trials if (trial.digest, trial.rung) in known]
    assert shared
    for trial in shared:
        assert trial.score is not None
        assert trial.score.spent["macs"] > 0  # as if it had paid itself: searches compare


@pytest.mark.parametrize(
    "change", [{"evaluator": Counted(rungs=(64, 256), kind="another")}, {"seed": 3}], ids=["evaluator", "seed"]
)
def test_scores_that_do_not_compare_are_still_refused(first: StudyRun, change: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="written for something else"):
        open_run(study(**change), first.folder).search("evolution")


def test_rungs_are_replaced_wherever_they_stand(tiny_study: Study) -> None:
    from evaluators.frechet import Frechet, KernelDistance
    from evaluators.images import Digits
    from evaluators.latency import Timed
    from evaluators.scoring import Scores

    def nested(*rungs: int) -> Timed:
        return Timed(Scores((Frechet(Digits(), rungs=rungs), KernelDistance(Digits(), rungs=rungs))))

    assert with_rungs(nested(32, 64), (8,)) == nested(8)
    assert with_rungs(tiny_study.evaluator, (8,)).rungs == (8,)


# ------------------------------------------------------------------------------------------- less work for the same answer


def test_a_search_ends_early_when_its_front_stands_still(tmp_path: Path) -> None:
    CALLS.clear()
    patient = open_run(study(trials=400, verified=4), tmp_path / "run")
    patient.search("random", patience=12)
    trials = [t for info, ts in patient.results.ledgers if info.searcher == "random" for t in ts if t.rung == 64]
    assert 12 < len(trials) < 400

    def moved(trial: Any, others: list[Any]) -> bool:
        mine = trial.objectives(("fd", "macs"))
        return not any(all(a <= b for a, b in zip(o.objectives(("fd", "macs")), mine, strict=True)) for o in others)

    steps = [moved(trial, trials[:place]) for place, trial in enumerate(trials)]
    # The last twelve moved nothing, and no earlier twelve in a row did so.
    assert not any(steps[-12:])
    assert steps[-13]
    assert all(any(steps[place : place + 12]) for place in range(len(steps) - 12))
    # Its leaders are verified all the same, and the same call again does nothing.
    assert "complete" in set(patient.trials("random")["status"])
    count = sum(CALLS.values())
    patient.search("random", patience=12)
    assert sum(CALLS.values()) == count


def test_weights_and_features_come_from_another_run(
    tiny_study: Study, tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = open_run(replace(tiny_study, name="other", limits={"macs_share": 0.4}), tmp_path / "other")
    other.take_weights(tiny_run)
    heard: list[str] = []
    told = replace(other.show, follow=lambda ticks: heard.extend(tick.what for tick in ticks))
    replace(other, show=told).prepare()
    assert "supernet" not in heard
    assert "features" not in heard
    assert other.study.supernet.digest(other.folder / "supernet") == tiny_study.supernet.digest(tiny_run / "supernet")
    with pytest.raises(UserError, match="no trained supernet"):
        other.take_weights(tmp_path)
