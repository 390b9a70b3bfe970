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
from nas.contracts import WITHOUT_ATTENTION, Score, Trial, UserError
from nas.engine.facts import read_facts
from nas.engine.ladder import CONFIDENCE
from nas.engine.learning import learned_macs
from nas.engine.ledger import read_ledgers
from nas.engine.storage import open_storage
from nas.engine.working import working_on
from nas.genomes.genetics import LATENCY
from nas.genomes.pareto import front, hypervolume
from nas.results.audit import Agreement, bands_of
from nas.study import CONFIRMED, TRAINED, LedgerInfo

SHARES = (0.25, 0.4, 0.5, 0.6)
"""Budgets, as shares of what the full net takes, at which searchers are compared."""

POOR = 4.0
"""Times the distance of real images at which the full network, and all that is compared with it, draws poorly."""

GROUNDS = "grounds.json"
"""In <run>/report: how far real images and the full network are from the held-out ones, once a report was made."""

CONFIRMATIONS, VERDICT = "confirm", "verdict.json"
"""In the run folder, where `nas confirm` writes."""


def best_within(trials: Sequence[Trial], name: str, limit: float, objective: str) -> Trial:
    """The verified trial of the lowest `objective` whose cost `name` is at most `limit`. Its score is the least of several on the same
    noise, so it flatters; what is said of it is a score on another noise (`Run.confirmed`).

    Raises UserError where there is none, naming the cheapest verified one.
    """
    verified = [trial for trial in trials if trial.status == "complete" and trial.score is not None]
    if not verified:
        raise UserError("no trial is verified yet; let `nas run` finish, or name one with --trial")
    known = [*verified[0].cost, *([LATENCY] if LATENCY in verified[0].score.values else [])]  # type: ignore[union-attr]
    if name not in known:
        raise UserError(f"{name!r} is not a cost; use one of {', '.join(dict.fromkeys(known))}")
    within = [trial for trial in verified if trial.objectives([name])[0] <= limit]
    if not within:
        least = min(trial.objectives([name])[0] for trial in verified)
        raise UserError(f"no verified trial keeps {name}<={limit:g}; the cheapest has {name}={least:.4g}")
    return min(within, key=lambda trial: (trial.objectives([objective])[0], trial.number))


def cost_in_words(trial: Trial) -> str:
    """Share of the MACs, and the time for an image where it is known."""
    [milliseconds] = trial.objectives((LATENCY,))
    time = "" if math.isnan(milliseconds) else f", {milliseconds:.3g} ms an image"
    share = trial.cost.get(WITHOUT_ATTENTION)
    attention = "" if share is None else f" ({share:.1%} without attention products)"
    return f"{trial.cost['macs_share']:.1%} of the MACs{attention}{time}"


def verified_front(trials: Sequence[Trial], objectives: Sequence[str]) -> list[Trial]:
    """Non-dominated feasible trials of the last rung, ordered by the last objective."""
    done = [trial for trial in trials if trial.status == "complete"]
    excess = [sum(max(0.0, v) for v in trial.violations.values()) for trial in done]
    return [done[i] for i in front([trial.objectives(objectives) for trial in done], excess)]


def far_words(full: float, floor: float) -> str:
    """How far the full network is from real images, with a warning where that is far."""
    words = f"{full / floor:.1f} times as far as real images"
    if full < POOR * floor:
        return words
    return (
        words
        + ": the network draws poorly. Train it longer, or a larger one, before you believe what a search finds in it"
    )


def full_network(uniform: Sequence[Trial], quality: str) -> Trial | None:
    """The full network at every step, guided as does it best where steps may be guided."""
    done = [trial for trial in uniform if trial.status == "complete" and trial.cost["macs_share"] == 1]
    return min(done, key=lambda trial: trial.objectives((quality,)), default=None)


def verdicts(folder: Path) -> list[dict[str, Any]]:
    """What `nas confirm` has found of schedules of this run: `words` in a line, `judges` with theirs, the `schedule`'s digest, the `protocol`'s name."""
    found = sorted((folder / CONFIRMATIONS).glob(f"*/{VERDICT}"))
    kept = [read_json(path, "delete it; `nas confirm` writes it again") for path in found]
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
        """What its schedules are compared by. The full net takes what the dearest uniform schedule takes."""
        limits = self.facts["limits"]
        uniform = [t for info, trials in self.ledgers for t in trials if info.searcher == self.facts["baseline"]]
        known = uniform or [t for _, trials in self.ledgers for t in trials]
        for words, cost in (("time", LATENCY), ("MACs", "macs")):
            if cost in limits:
                full = max((t.cost[cost] for t in known), default=limits[cost])
                return Scale(words, cost, full, limits[cost] / full)
        return Scale("MACs", "macs_share", 1.0, limits.get("macs_share"))

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
            best = verified_front(trials, info.objectives)
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
                        **_spent(done),
                        "learning_macs": learned_macs(self.folder, info),
                        "wall_seconds": wall_seconds(trials),
                    },
                    "prediction": _prediction(done, quality),
                    "screening": _screening(done),
                    "answers": _answers(done),
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
            within = [t for t in trials if t.scored and t.rung == info.rungs[0] and not _over(t)]
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
                    share: mean_and_spread([best[quality] for row in group if (best := row["best_within"][share])])
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
        within = [t for t in trials if t.status == "complete" and self.scale.share(t) <= share]
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


def area(curve: Sequence[tuple[float, float]], until: float) -> float:
    """Mean height of a step curve of (MACs spent, hypervolume) from 0 to `until`."""
    if not curve or until <= 0:
        return 0.0
    starts = [min(spent, until) for spent, _ in curve]
    widths = np.diff([*starts, until])
    return float(sum(height * width for (_, height), width in zip(curve, widths, strict=True)) / until)


def mean_and_spread(values: Sequence[float]) -> dict[str, float] | None:
    """Mean, standard deviation over seeds, and their number; None for none."""
    if not values:
        return None
    spread = float(np.std(values, ddof=1)) if len(values) > 1 else math.nan
    return {"mean": float(np.mean(values)), "sd": spread, "seeds": len(values)}


def wall_seconds(trials: Sequence[Trial]) -> float:
    """Time during which at least one trial was under way; pauses between runs do not count."""
    busy, end = 0.0, -math.inf
    for start, stop in sorted(trial.clock for trial in trials if trial.clock is not None):
        busy += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return busy


def _over(trial: Trial) -> bool:
    return any(excess > 0 for excess in trial.violations.values())


SPENT = ("calls", "macs", "seconds", "cached_calls", "cached_macs", "cache_hits")


def _spent(trials: Sequence[Trial]) -> dict[str, float]:
    """Sums over trials; a score taken from another searcher is charged in full."""
    return {key: sum(t.score.spent.get(key, 0.0) for t in trials if t.score) for key in SPENT}


def against(trial: Trial, other: Trial | None, quality: str, same: bool = False) -> dict[str, Any] | None:
    """`trial` minus `other`: the paired difference, its error, and whether it is outside of that error. None where the two
    are one schedule, unless its weights are others (`same`). An evaluator without replicates has no error, as for the ladder."""
    if other is None or trial.score is None or other.score is None or (trial.digest == other.digest and not same):
        return None
    difference, error = trial.score.difference(other.score, quality)
    known = math.isfinite(error)
    conclusive = abs(difference) > CONFIDENCE * (error if known else 0.0)
    words = f"at {trial.rung:,} samples: {difference:+.2g} ± {f'{error:.1g}' if known else 'an unknown error'}"
    return {
        "trial": other.number,
        "difference": difference,
        "error": error,
        "conclusive": conclusive,
        "words": f"told apart {words}" if conclusive else f"inconclusive {words}",
    }


def _prediction(trials: Sequence[Trial], quality: str) -> dict[str, float] | None:
    """How well a searcher that predicts knows what it proposes: R^2 and Kendall's tau of predicted and measured scores, and
    tau inside bands of equal MACs."""
    known = [t for t in trials if "predicted" in t.origin]
    if len(known) < 3:
        return None
    predicted = np.array([t.origin["predicted"] for t in known])
    measured = np.array([t.objectives((quality,))[0] for t in known])
    bands = bands_of(np.array([t.cost["macs"] for t in known]))
    ones = np.ones((1, len(known)))
    spread = float(((measured - measured.mean()) ** 2).sum())
    return {
        "schedules": len(known),
        "r_squared": 1 - float(((measured - predicted) ** 2).sum()) / spread if spread else math.nan,
        "tau": float(Agreement(predicted, measured).tau(ones)[0]),
        "tau_in_band": float(Agreement(predicted, measured, bands).tau(ones)[0]),
    }


def _screening(trials: Sequence[Trial]) -> dict[str, float] | None:
    """How many offspring a model screened, of how many, and its last held-out tau."""
    known = [t.origin for t in trials if "screened" in t.origin]
    if not known:
        return None
    return {
        "offspring": len(known),
        "screened": sum(origin["screened"] > 1 for origin in known),
        "tau": known[-1]["tau"],
    }


def _answers(trials: Sequence[Trial]) -> dict[str, int] | None:
    """What became of a proposer's answers."""
    answers = [answer for t in trials for answer in t.origin.get("answers", ())]
    if not answers:
        return None
    return {
        "answers": len(answers),
        "repaired": sum("repaired" in answer for answer in answers),
        "refused": sum("refused" in answer for answer in answers),
    }


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
