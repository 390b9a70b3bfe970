"""What trials say by themselves: which is best, which are on the front, how two differ, what they took, and how well what proposed them knew."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from nas.contracts import WITHOUT_ATTENTION, Trial, UserError
from nas.engine.ladder import CONFIDENCE
from nas.genomes.genetics import LATENCY
from nas.genomes.pareto import front
from nas.results.audit import Agreement, bands_of

POOR = 4.0
"""Times the distance of real images at which the full network, and all that is compared with it, draws poorly."""


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
    legal = [trial for trial in verified if not beyond_limits(trial, name)]
    within = [trial for trial in legal if trial.objectives([name])[0] <= limit]
    if not within:
        least = min(trial.objectives([name])[0] for trial in legal or verified)
        kept = ", of those that keep the study's other limits" if len(legal) < len(verified) else ""
        beside = kept if legal else ", but it breaks the study's other limits"
        raise UserError(f"no verified trial keeps {name}<={limit:g}; the cheapest has {name}={least:.4g}{beside}")
    return min(within, key=lambda trial: (trial.objectives([objective])[0], trial.number))


def with_error(value: float, error: float, sign: str = " ± ") -> str:
    """A value with as many decimals as its standard error has in one digit; with three digits where there is none."""
    if not (math.isfinite(value) and math.isfinite(error)) or error <= 0:
        return f"{value:.3g}"
    decimals = max(0, -math.floor(math.log10(error)))
    if decimals > MOST_DECIMALS:
        return f"{value:.3g}{sign}{error:.1g}"
    return f"{value:.{decimals}f}{sign}{error:.{decimals}f}"


MOST_DECIMALS = 5
"""Beyond which powers of ten are read more easily."""


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


SAME_COST = ("macs", "macs_share")
"""One number, counted and as a share."""


def beyond_limits(trial: Trial, apart_from: str = "") -> bool:
    """`apart_from`: a cost whose limit does not count."""
    left_out = SAME_COST if apart_from in SAME_COST else (apart_from,)
    return any(excess > 0 for name, excess in trial.violations.items() if name not in left_out)


SPENT = ("calls", "macs", "seconds", "cached_calls", "cached_macs", "cache_hits")


def spent_on(trials: Sequence[Trial]) -> dict[str, float]:
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


def prediction_of(trials: Sequence[Trial], quality: str) -> dict[str, float] | None:
    """How well a searcher that predicts knows what it proposes: R^2 and Kendall's tau of predicted and measured scores, and
    tau inside bands of equal MACs."""
    known = [t for t in trials if t.scored and math.isfinite(t.origin.get("predicted", math.nan))]
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


def screening_of(trials: Sequence[Trial]) -> dict[str, float] | None:
    """How many offspring a model screened, of how many, and its last held-out tau."""
    known = [t.origin for t in trials if "screened" in t.origin]
    if not known:
        return None
    return {
        "offspring": len(known),
        "screened": sum(origin["screened"] > 1 for origin in known),
        "tau": known[-1]["tau"],
    }


def answers_of(trials: Sequence[Trial]) -> dict[str, int] | None:
    """What became of a proposer's answers."""
    answers = [answer for t in trials for answer in t.origin.get("answers", ())]
    if not answers:
        return None
    return {
        "answers": len(answers),
        "repaired": sum("repaired" in answer for answer in answers),
        "refused": sum("refused" in answer for answer in answers),
    }
