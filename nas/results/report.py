"""What a run has come to, as plain data: rows for the terminal, for scripts and for pictures."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from optuna.storages import BaseStorage

from nas.base.files import read_json
from nas.contracts import WITHOUT_ATTENTION, Score, Trial
from nas.engine.facts import read_facts
from nas.engine.learning import learned_macs
from nas.engine.ledger import read_ledgers
from nas.engine.storage import open_storage
from nas.engine.working import working_on
from nas.genomes.genetics import LATENCY
from nas.genomes.pareto import front, hypervolume
from nas.results.audit import Agreement
from nas.results.trials import (
    against,
    answers_of,
    area,
    beyond_limits,
    cost_in_words,
    far_words,
    mean_and_spread,
    prediction_of,
    screening_of,
    spent_on,
    verified_front,
    wall_seconds,
)
from nas.study import BASELINE, CONFIRMED, TRAINED, LedgerInfo

SHARES = (0.25, 0.4, 0.5, 0.6)
"""Budgets, as shares of what the full net takes, at which searchers are compared."""

GROUNDS = "grounds.json"
"""In <run>/report: how far real images and the full network are from the held-out ones, once a report was made."""

CONFIRMATIONS, VERDICT = "confirm", "verdict.json"
"""In the run folder, where `nas confirm` writes."""


def verdicts(folder: Path, supernet: str) -> list[dict[str, Any]]:
    """What `nas confirm` has found of schedules of this run: `words` in a line, `judges` with theirs, the `schedule`'s digest, the `protocol`'s name. `supernet`:
    the digest of its weights; what was found of other weights that lay there before is left out."""
    again = "delete it; `nas confirm` writes it again"
    found = []
    for path in sorted((folder / CONFIRMATIONS).glob(f"*/{VERDICT}")):
        protocol = path.with_name("protocol.json")
        of = read_json(protocol, again)["settings"].get("supernet") if protocol.exists() else None
        found += [path] if of in (None, supernet) else []
    kept = [read_json(path, again) for path in found]
    return [one for told in kept for one in told.get("verdicts", [told])]


@dataclass(frozen=True)
class Scale:
    """The cost that schedules are compared by, as a share of the full net's at every step: multiply-adds, or time where that is limited."""

    words: str
    cost: str
    full: float
    limit: float | None
    """Of the study, as such a share; None where it limits another cost or none."""

    @property
    def budgets(self) -> tuple[float, ...]:
        """Shares within which searchers are compared: the limit, and what is usual below it."""
        most = 1.0 if self.limit is None else self.limit
        return (*(share for share in SHARES if share < most), most)

    @property
    def name(self) -> str:
        """Of the share."""
        return self.cost.partition("_")[0] + "_share"

    def share(self, trial: Trial) -> float:
        return trial.cost[self.cost] / self.full


@dataclass(frozen=True)
class Run:
    """A run folder as it stands. Reads neither torch nor ray nor the study file."""

    folder: Path
    facts: Mapping[str, Any]
    ledgers: Sequence[tuple[LedgerInfo, Sequence[Trial]]]
    trained: Sequence[Trial] = ()
    """Schedules whose networks were fine-tuned after export."""
    confirmed: Mapping[str, Score] = field(default_factory=dict)
    """By digest, scores of chosen schedules on noises on which nothing was chosen."""
    others: int = 0
    """How many ledgers are kept beside these, of other limits, objectives, rungs or settings."""

    @classmethod
    def open(
        cls, folder: Path, storage: BaseStorage | str | None = None, searched: Mapping[str, Any] | None = None
    ) -> Run:
        """`searched`: what the study searches for (`what_is_searched`), where it may be another than what was run last. Raises UserError where the folder is not of
        a run, or its storage cannot be opened."""
        facts = {**read_facts(folder), **(searched or {})}
        opened = open_storage(folder, storage or facts["storage"]) if not isinstance(storage, BaseStorage) else storage
        every = read_ledgers(opened, facts["study"])
        ledgers = [
            (info, _unlimited(trials, facts) if info.searcher == facts["baseline"] else trials)
            for info, trials in every
            if _is_now(info, facts)
        ]
        trained = [trial for info, trials in ledgers if info.searcher == TRAINED for trial in trials]
        again = [trial for info, trials in ledgers if info.searcher == CONFIRMED for trial in trials]
        confirmed = {trial.digest: trial.score for trial in again if trial.score is not None}
        searches = [one for one in ledgers if one[0].searcher not in (TRAINED, CONFIRMED)]
        return cls(folder, facts, searches, trained, confirmed, len(every) - len(ledgers))

    def chosen(self) -> list[Trial]:
        """The trials whose numbers are said to be the best within a budget, one for each schedule."""
        quality = self.facts["objectives"][0]
        found: dict[str, Trial] = {}
        for _, trials in self.ledgers:
            for share in self.scale.budgets:
                trial = self._best_trial(trials, share, quality)
                if trial is not None:
                    found.setdefault(trial.digest, trial)
        return list(found.values())

    @cached_property
    def scale(self) -> Scale:
        """What its schedules are compared by. The full net's is what it takes at all steps, guided where that is possible."""
        limits = self.facts["limits"]
        uniform = [t for info, trials in self.ledgers for t in trials if info.searcher == self.facts["baseline"]]
        known = uniform or [t for _, trials in self.ledgers for t in trials]
        for words, cost in (("time", LATENCY), ("MACs", "macs")):
            if cost in limits:
                # In milliseconds a narrower network may take longer.
                whole = [t for t in known if t.cost["macs_share"] == 1] or known
                full = max((t.cost[cost] for t in whole), default=limits[cost])
                return Scale(words, cost, full, limits[cost] / full)
        return Scale("MACs", "macs_share", 1.0, limits.get("macs_share"))

    @property
    def guided(self) -> bool:
        """Whether steps may be guided; what others are compared with is then the full network guided at all of them."""
        return any(name.endswith(".guidance") for name, _ in self.facts.get("choices", ()))

    def status(self) -> dict[str, Any]:
        """Counts by state for each ledger, and what is being prepared at the moment."""
        rows = []
        for info, trials in self.ledgers:
            first = [t for t in trials if t.rung == info.rungs[0] and "retry" not in t.origin]
            rows.append(
                {
                    "searcher": _label(info),
                    "proposed": len(first),
                    "planned": None if info.searcher == self.facts["baseline"] else self.facts["trials"],
                    "running": sum(t.status == "running" for t in trials),
                    "scored": sum(t.status == "pruned" for t in trials),
                    "verified": sum(t.status == "complete" for t in trials),
                    "failed": sum(t.status == "failed" for t in trials),
                }
            )
        return {
            "study": self.facts["study"],
            "folder": str(self.folder),
            "training": self._training(),
            "working": working_on(self.folder),
            "other_ledgers": self.others,
            "searchers": rows,
        }

    def _training(self) -> list[dict[str, Any]]:
        """What each finished stage of the supernet's training took: its `class`, settings and `macs`."""
        path = self.folder / "supernet" / "training.json"
        stages: list[dict[str, Any]] = json.loads(path.read_text()) if path.exists() else []
        return stages

    def compare(self) -> dict[str, Any]:
        """One row per ledger: trials, front, hypervolume, best within budgets, what was spent, and how well it predicted.

        `curve`: after each scored trial, MACs spent and the hypervolume of what the first rung has shown to be feasible and ahead;
        `area`: its mean height over the MACs that every searcher has spent. `over_seeds`: mean and standard deviation of searchers
        that ran with several seeds.

        Of each best within a budget, `confirmed` is its score on noises on which nothing was chosen, None where that is still to be made.

        Each front member is compared with the next cheaper one, each best within a budget with the best of all searchers, on the
        same noise: where the paired difference is within two standard errors, `words` say that it is inconclusive.
        """
        quality, scale = self.facts["objectives"][0], self.scale
        reference = self._reference(quality)
        curves = self._curves(quality)
        common = min(
            (curve[-1][0] for name, curve in curves.items() if curve and name != self.facts["baseline"]), default=0.0
        )
        rows: list[dict[str, Any]] = []
        for info, trials in self.ledgers:
            done = [t for t in trials if t.scored and t.score is not None]
            best = sorted(verified_front(trials, info.objectives), key=scale.share)
            points = [(*t.objectives((quality,)), scale.share(t)) for t in best]
            rows.append(
                {
                    "searcher": _label(info),
                    "baseline": info.searcher == self.facts["baseline"],
                    "trials": len(done),
                    "probes": sum("probe" in t.origin for t in done),
                    "failed": sum(t.status == "failed" for t in trials),
                    "front": [
                        {**_member(t, quality, scale), "against_cheaper": against(t, cheaper, quality)}
                        for t, cheaper in zip(best, [None, *best], strict=False)
                    ],
                    "hypervolume": hypervolume(points, reference) if points else 0.0,
                    "best_within": {f"{share:g}": self._best(trials, share, quality) for share in scale.budgets},
                    "curve": curves[_label(info)],
                    "area": area(curves[_label(info)], common),
                    "spent": {
                        **spent_on(done),
                        "learning_macs": learned_macs(self.folder, info),
                        "wall_seconds": wall_seconds(trials),
                    },
                    "prediction": prediction_of(done, quality),
                    "screening": screening_of(done),
                    "answers": answers_of(done),
                }
            )
        self._mark_leaders(rows, quality)
        return {
            "study": self.facts["study"],
            "objective": quality,
            "label": self.label(quality),
            "compared_by": scale.words,
            "hypervolume_reference": dict(zip((quality, scale.name), reference, strict=True)),
            "area_until_macs": common,
            "searchers": rows,
            "over_seeds": self._over_seeds(rows, quality),
            "other_ledgers": self.others,
            "trained": self._after_training(quality),
            "grounds": self._grounds(),
        }

    def _grounds(self) -> dict[str, Any] | None:
        """What the distances were found to stand on, and whether the network is a poor one, in words."""
        path = self.folder / "report" / GROUNDS
        if not path.exists():
            return None
        found = read_json(path, "delete it; `nas report` writes it again")
        if "train" not in found:  # of all train images, which are nearer than as many as there are samples
            return None
        # The full network's distance was another then.
        if found.get("samples", self.facts["rungs"][-1]) != self.facts["rungs"][-1]:
            return None
        return {**found, "words": far_words(float(found["full"]), float(found["floor"]))}

    def _after_training(self, quality: str) -> dict[str, Any] | None:
        """What the supernet scored and what the exported networks score after their fine-tuning, on the same noises, and how well the one
        ranks the other: Kendall's tau, from three schedules on."""
        known = {(info.name, t.number): t for info, trials in self.ledgers for t in trials}
        pairs = []
        for trial in self.trained:
            before = known.get((trial.origin["ledger"], trial.origin["trial"]))
            if trial.status == "complete" and before is not None and before.rung == trial.rung:
                pairs.append((before, trial))
        if not pairs:
            return None
        rows = [
            {
                "ledger": trial.origin["ledger"],
                "trial": before.number,
                "booked": trial.number,
                "macs_share": trial.cost["macs_share"],
                "before": before.objectives((quality,))[0],
                "after": trial.objectives((quality,))[0],
                "difference": against(trial, before, quality, same=True),
            }
            for before, trial in pairs
        ]
        scores = np.array([[row["before"], row["after"]] for row in rows])
        ones = np.ones((1, len(rows)))
        tau = float(Agreement(scores[:, 0], scores[:, 1]).tau(ones)[0]) if len(rows) >= 3 else None
        return {"schedules": rows, "tau": tau}

    def _curves(self, quality: str) -> dict[str, list[tuple[float, float]]]:
        """By ledger; against the worst feasible score of any ledger's first rung, and all that the full net takes."""
        scale = self.scale

        def first_rung(info: LedgerInfo, trials: Sequence[Trial]) -> list[tuple[float, ...]]:
            within = [t for t in trials if t.scored and t.rung == info.rungs[0] and not beyond_limits(t)]
            return [(*t.objectives((quality,)), scale.share(t)) for t in within]

        worst = max((value for ledger in self.ledgers for value, _ in first_rung(*ledger)), default=0.0) * 1.0001
        found = {}
        for info, trials in self.ledgers:
            spent, points, curve = float(learned_macs(self.folder, info)), [], []
            for trial in trials:
                if trial.scored and trial.score is not None:
                    spent += trial.score.spent.get("macs", 0.0)
                    points += first_rung(info, [trial])
                    points = [points[i] for i in front(points)]
                    curve.append((spent, hypervolume(points, (worst, 1.0001))))
            found[_label(info)] = curve
        return found

    def _over_seeds(self, rows: Sequence[Mapping[str, Any]], quality: str) -> list[dict[str, Any]]:
        by_searcher: dict[str, list[Mapping[str, Any]]] = {}
        for (info, _), row in zip(self.ledgers, rows, strict=True):
            by_searcher.setdefault(info.searcher, []).append(row)
        return [
            {
                "searcher": name,
                "seeds": len(group),
                "hypervolume": mean_and_spread([row["hypervolume"] for row in group]),
                "area": mean_and_spread([row["area"] for row in group]),
                "best_within": {
                    share: _over([best for row in group if (best := row["best_within"][share])], quality)
                    for share in group[0]["best_within"]
                },
            }
            for name, group in by_searcher.items()
            if len(group) > 1
        ]

    def label(self, quality: str) -> str:
        """What the verified objective is called: distance, sample count, extractor."""
        labels = [
            t.score.labels.get(quality, quality)
            for _, trials in self.ledgers
            for t in trials
            if t.status == "complete" and t.score
        ]
        return labels[0] if labels else quality

    def _reference(self, quality: str) -> tuple[float, float]:
        """Worst verified quality of the run, and all that the full net takes: the same for every searcher."""
        worst = [t.objectives((quality,))[0] for _, trials in self.ledgers for t in trials if t.status == "complete"]
        return (max(worst) * 1.0001 if worst else 0.0), 1.0001

    def _best(self, trials: Sequence[Trial], share: float, quality: str) -> dict[str, Any] | None:
        trial = self._best_trial(trials, share, quality)
        if trial is None:
            return None
        score = self.confirmed.get(trial.digest)
        confirmed = None if score is None else {quality: score.values[quality], "error": score.error(quality)}
        return {**_member(trial, quality, self.scale), "confirmed": confirmed}

    def _best_trial(self, trials: Sequence[Trial], share: float, quality: str) -> Trial | None:
        done = [t for t in trials if t.status == "complete" and not beyond_limits(t, self.scale.cost)]
        within = [t for t in done if self.scale.share(t) <= share]
        return min(within, key=lambda t: t.objectives((quality,))[0], default=None)

    def _mark_leaders(self, rows: Sequence[dict[str, Any]], quality: str) -> None:
        """Says for each searcher's best within each budget how it stands against the best of all searchers."""
        ledgers = {_label(info): {t.number: t for t in trials} for info, trials in self.ledgers}
        for share in self.scale.budgets:
            best = [(row["searcher"], row["best_within"][f"{share:g}"]) for row in rows]
            held = [(ledgers[name][m["trial"]], m) for name, m in best if m is not None]
            if held:
                leader = min(held, key=lambda pair: pair[1][quality])[0]
                for trial, member in held:
                    member["against_leader"] = None if trial is leader else against(trial, leader, quality)


def _member(trial: Trial, quality: str, scale: Scale) -> dict[str, Any]:
    assert trial.score is not None
    [milliseconds] = trial.objectives((LATENCY,))
    return {
        "trial": trial.number,
        "genome": trial.genome,
        "macs_share": trial.cost["macs_share"],
        scale.name: scale.share(trial),
        "cost": cost_in_words(trial),
        **({LATENCY: milliseconds} if not math.isnan(milliseconds) else {}),
        **{name: trial.cost[name] for name in (WITHOUT_ATTENTION,) if name in trial.cost},
        quality: trial.score.values[quality],
        "error": trial.score.error(quality),
    }


def _over(members: Sequence[Mapping[str, Any]], quality: str) -> dict[str, Any] | None:
    """Of the best of each seed within a budget: on noises on which nothing was chosen, and `confirmed` says whether all were scored on these."""
    found = mean_and_spread([(best["confirmed"] or best)[quality] for best in members])
    return found and {**found, "confirmed": all(best["confirmed"] for best in members)}


def _is_now(info: LedgerInfo, facts: Mapping[str, Any]) -> bool:
    """Whether this is a ledger of the study as the run folder has it now, not of one with other limits, objectives, rungs or settings of the searcher."""
    if info.searcher in (TRAINED, CONFIRMED):
        return info.rungs[-1:] == tuple(facts.get("rungs", info.rungs))[-1:]
    settings = facts.get("searchers", {}).get(info.searcher, info.provenance.get("searcher"))
    limits = info.searcher == facts["baseline"] or dict(info.limits) == facts["limits"]
    return (
        limits
        and list(info.objectives) == facts["objectives"]
        and list(info.rungs) == list(facts.get("rungs", info.rungs))
        and info.provenance.get("searcher") == settings
    )


def _unlimited(trials: Sequence[Trial], facts: Mapping[str, Any]) -> list[Trial]:
    """The baseline's, which were scored whatever the limits were, with the violations of those that the study has now."""
    limits = facts["limits"]
    return [replace(t, violations={n: t.cost[n] - most for n, most in limits.items() if n in t.cost}) for t in trials]


def _label(info: LedgerInfo) -> str:
    return info.searcher + (f" (seed {info.seed})" if info.seed else "")


def best_searcher(facts: Mapping[str, Any]) -> str:
    """Whose front has the largest volume, of what `Run.compare` says; the baseline's name where nobody has one."""
    rows = [row for row in facts["searchers"] if not row["baseline"] and row["front"]]
    return str(max(rows, key=lambda row: row["hypervolume"])["searcher"]) if rows else BASELINE
