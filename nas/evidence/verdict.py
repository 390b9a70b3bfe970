"""No loss or loss: paired differences over training seeds, against a margin that was written down before."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from scipy.stats import nct
from scipy.stats import t as student

from nas.contracts import Score, jackknife_error

LEVEL = 0.975
"""Of the upper end of an interval that has 95 % between its ends."""

MOST_SEEDS = 1000


@dataclass(frozen=True)
class Judged:
    """What one judge says of a schedule and of the reference, both trained with the same seeds. `value`, `reference`: means over the seeds; `floor`: of equally
    many real images, or of `reals`, where there are no more; `differences`: of each seed, paired by noise; `error`: of their mean from sampling alone; `margin`:
    in the judge's unit."""

    judge: str
    value: float
    reference: float
    floor: float
    differences: tuple[float, ...]
    error: float
    margin: float
    decides: bool
    reals: int | None = None

    @property
    def difference(self) -> float:
        return float(np.mean(self.differences))

    @property
    def spread(self) -> float:
        """Standard error of the mean over training seeds, sampling included."""
        each, count = self.differences, len(self.differences)
        return jackknife_error([(sum(each) - x) / (count - 1) for x in each])

    @property
    def deviation(self) -> float:
        """Standard deviation of a seed's difference, and no less than sampling alone leaves of it."""
        return max(self.spread, self.error) * math.sqrt(len(self.differences))

    @property
    def half_width(self) -> float:
        """Of the 95 % interval: Student's over the seeds, or what sampling alone leaves where a few seeds happen to agree."""
        return float(max(student.ppf(LEVEL, len(self.differences) - 1) * self.spread, 1.96 * self.error))

    @property
    def interval(self) -> tuple[float, float]:
        return self.difference - self.half_width, self.difference + self.half_width

    @property
    def no_loss(self) -> bool:
        """The whole interval is below the margin."""
        return self.interval[1] <= self.margin

    @property
    def loss(self) -> bool:
        """The whole interval is above zero: a loss, be it smaller than the margin."""
        return self.interval[0] > 0

    @property
    def found(self) -> str:
        if self.no_loss:
            return "a loss within the margin" if self.loss else "no loss beyond the margin"
        return "a loss" if self.loss else "not decided"

    @property
    def words(self) -> str:
        least, most = self.interval
        real = "equally many" if self.reals is None else f"all {self.reals:,}"
        return (
            f"{self.judge}: {self.value:.4g} against {self.reference:.4g}, difference {self.difference:+.3g}, 95 % interval {least:+.3g} to {most:+.3g}, "
            f"margin {self.margin:.3g} ({real} real images {self.floor:.3g}): " + self.found
        )

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "interval": self.interval, "no_loss": self.no_loss, "words": self.words}


def judged(
    judge: str,
    mine: Sequence[Score],
    reference: Sequence[Score],
    metric: str,
    floor: float,
    share: float,
    decides: bool,
    reals: int | None = None,
) -> Judged:
    """`mine`, `reference`: of each seed, on the same noises. `share`: of the reference's distance above the floor that is the margin. Raises ValueError for
    fewer than two seeds."""
    if len(mine) < 2:
        raise ValueError("one training says nothing about the next; a verdict needs two seeds or more")
    pairs = [a.difference(b, metric) for a, b in zip(mine, reference, strict=True)]
    value, other = (float(np.mean([score.values[metric] for score in scores])) for scores in (mine, reference))
    return Judged(
        judge,
        value,
        other,
        floor,
        tuple(float(difference) for difference, _ in pairs),
        math.hypot(*(error for _, error in pairs)) / len(pairs),
        share * max(0.0, other - floor),
        decides,
        reals,
    )


@dataclass(frozen=True)
class Verdict:
    """`saved`: the share of the multiply-adds of sampling that the schedule does without."""

    protocol: str
    digest: str
    saved: float
    judges: tuple[Judged, ...]
    seen: bool
    schedule: str
    reference: str = "the full network"

    @property
    def confirmed(self) -> bool:
        return all(judge.no_loss for judge in self.judges if judge.decides)

    @property
    def contradicting(self) -> tuple[Judged, ...]:
        """Where nothing is lost, further judges that see a loss beyond doubt."""
        return tuple(judge for judge in self.judges if self.confirmed and not judge.decides and judge.loss)

    @property
    def words(self) -> str:
        """In one line; a contradiction stands on it too."""
        deciding = [judge for judge in self.judges if judge.decides]
        saving = f"the schedule, {self.saved:.0%} of the MACs saved"
        lossy = [judge.judge for judge in deciding if judge.loss and not judge.no_loss]
        undecided = [judge.judge for judge in deciding if not judge.no_loss]
        small = [judge.judge for judge in deciding if judge.loss and judge.no_loss]
        level = [judge.judge for judge in deciding if not judge.loss]
        if self.confirmed and small:
            beside = f", and not worse under {_and(level)}" if level else ""
            said = f"No loss beyond the margin: {saving}, is worse than {self.reference} equally trained by less than that under {_and(small)}{beside}"
        elif self.confirmed:
            said = f"No loss: {saving}, is not worse than {self.reference} equally trained, under {_and(level)}"
        elif lossy:
            said = f"A loss: {saving}, is worse than {self.reference} equally trained, under {_and(lossy)}"
        else:
            said = f"Not confirmed: {saving}, may lose more than the margin under {_and(undecided)}"
        known = ", on images that the search was scored against too, or may have been" if self.seen else ""
        against = f", though a loss under {_and([j.judge for j in self.contradicting])}" if self.contradicting else ""
        return f"{said}; {len(deciding[0].differences)} seeds of training{known}{against}."

    @property
    def advice(self) -> str:
        """How many seeds would decide, where these do not."""
        wanted = [judge for judge in self.judges if judge.decides and not judge.no_loss and not judge.loss]
        if any(judge.loss and not judge.no_loss for judge in self.judges if judge.decides):
            return ""
        needed = [seeds_needed(j.deviation, j.margin) for j in wanted]
        if not needed:
            return ""
        if max(needed) == MOST_SEEDS:
            return f"With this spread, not even {MOST_SEEDS:,} seeds would show no loss; judge more samples, or ask for a wider --margin under another --name."
        return f"With this spread, {max(needed)} seeds would show no loss in four of five tries if there is none; a second try is a protocol of its own, --name."

    def to_json(self) -> dict[str, Any]:
        return {
            "protocol": self.protocol,
            "digest": self.digest,
            "schedule": self.schedule,
            "saved": self.saved,
            "seen": self.seen,
            "confirmed": self.confirmed,
            "words": self.words,
            "advice": self.advice,
            "judges": [judge.to_json() for judge in self.judges],
        }


def _and(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def seeds_needed(deviation: float, margin: float, power: float = 0.8) -> int:
    """Least number of training seeds at which no loss beyond the margin is shown with this power, the true difference being 0 and differences of seeds having
    this standard deviation: P(T > t) >= power for T of the noncentral t distribution. At most 1,000, which says that none is enough."""
    if margin <= 0:
        return MOST_SEEDS
    if deviation <= 0:
        return 2
    for count in range(2, MOST_SEEDS):
        beyond = float(nct.sf(student.ppf(LEVEL, count - 1), count - 1, margin * math.sqrt(count) / deviation))
        if beyond >= power:
            return count
    return MOST_SEEDS


def in_short(verdicts: Sequence[Verdict], asked: int) -> str:
    """Of schedules asked about one after another, `asked` of them had nothing been lost: how much is saved at no loss, and why no more."""
    confirmed = [verdict.saved for verdict in verdicts if verdict.confirmed]
    most = (
        f"The largest saving shown to lose nothing: {max(confirmed):.0%} of the MACs."
        if confirmed
        else "No saving is shown to lose nothing."
    )
    if verdicts[-1].confirmed:
        return f"{most} No other schedule was asked about."
    others = "; the others were not trained" if len(verdicts) < asked else ""
    return f"{most} {'The next' if confirmed else 'The first'}, {verdicts[-1].saved:.0%}, is not{others}."
