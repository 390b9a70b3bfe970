"""What the distances of a run stand on: how far real images are from each other, and the full network's samples from them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from nas.base.files import write_json
from nas.contracts import Grounded, Trial
from nas.results.report import GROUNDS, Run
from nas.results.trials import full_network
from nas.study import BASELINE, Study

LOOKED_AT = 512
"""Samples of which is told whether they repeat train images: a share of one in twenty is then known to one in a hundred."""


def winner_of(
    ledgers: Mapping[str, Sequence[Trial]], limits: Mapping[str, float], quality: str
) -> tuple[str, Trial] | None:
    """The best verified schedule of any searcher within the limits."""
    done = [
        (name, trial)
        for name, trials in ledgers.items()
        for trial in trials
        if name != BASELINE
        and trial.status == "complete"
        and all(trial.cost.get(cost, 0) <= limit for cost, limit in limits.items())
    ]
    return min(done, key=lambda found: found[1].objectives((quality,))[0]) if done else None


def samples_looked_at(study: Study) -> int:
    return min(LOOKED_AT, study.evaluator.rungs[-1])


def keep_grounds(study: Study, run: Run, loaded: Any) -> Mapping[str, Any] | None:
    """What `Grounded.grounds` says with the samples of the run's best, and "full", the full network's distance, where it is one of these. Kept for comparisons,
    which tell of it too; None where nothing is verified, no image is held out, or the score is of another kind."""
    quality = study.objectives[0]
    by_name: dict[str, list[Trial]] = {}
    for info, trials in run.ledgers:
        by_name.setdefault(info.searcher, []).extend(trials)
    winner = winner_of(by_name, run.facts["limits"], quality)
    if winner is None or not isinstance(loaded, Grounded):
        return None
    told = loaded.grounds(study.space.decode(winner[1].genome), samples_looked_at(study), study.seed)
    if told is None:
        return None
    facts, full = dict(told), full_network(by_name.get(BASELINE, ()), quality)
    floor = float(facts["fd_of_train_images"])
    if full is not None and full.score is not None and quality == "fd" and floor > 0:
        facts["full"] = full.score.values[quality]
        folder = run.folder / "report"
        folder.mkdir(exist_ok=True)
        told = {"floor": floor, "train": facts["train"], "full": facts["full"], "samples": study.evaluator.rungs[-1]}
        write_json(folder / GROUNDS, told)
    return facts
