"""What tuning came to, and what is to be said of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from nas.contracts import Schedule, Score
from nas.study import Study
from nas.tuning.study import LOSS, Wanted

CONFIDENCE = 1.645
"""Standard errors, of one side, beyond which a difference is said to be one."""

FAR = 0.25
"""A schedule whose samples are this share of the way to unrelated ones is none."""


@dataclass(frozen=True)
class Candidate:
    """A schedule with what is known of it on noises that no search has seen. `share`: of the full pipeline's time, decoding included, or of its
    multiply-adds. `trial`: its number in the search, where that scored it."""

    name: str
    schedule: Schedule
    share: float
    score: Score
    trial: int | None = None

    @property
    def loss(self) -> float:
        return self.score.values[LOSS]

    @property
    def error(self) -> float:
        return self.score.error(LOSS)


@dataclass(frozen=True)
class Found:
    """`best` of the search, and of its schedules of whole steps `fewer`, the nearest of a few on the very noises that both are told by, so that reuse has no advantage. `rival`: fewer whole steps by another sampler, as its scheduler spaces them. `start`: a schedule
    that was given. `apart`: mean squared distance of two unrelated samples of the full pipeline. `spent`: samples of the full pipeline that as many
    multiply-adds are, and seconds. `milliseconds`: an image of the full pipeline, where time is limited.
    `kept_prompts`: how many, on which nothing was chosen, the scores are of; None where there are none. `device`: that times are of."""

    wanted: Wanted
    study: Study
    best: Candidate
    fewer: Candidate | None
    rival: Candidate | None
    start: Candidate | None
    apart: float
    trials: int
    spent: Mapping[str, float]
    milliseconds: float | None = None
    searched: bool = True
    kept_prompts: int | None = None
    device: str = "cpu"
    images: Mapping[str, Any] = field(default_factory=dict, compare=False)

    @property
    def far(self) -> bool:
        """Whether even the best is so far from the full pipeline's samples that it is no schedule for it."""
        return self._far(self.chosen)

    def _far(self, candidate: Candidate) -> bool:
        return candidate.loss > FAR * self.apart

    @property
    def chosen(self) -> Candidate:
        """Fewer steps where reuse is not shown to lose less: they are simpler; where these are too far, what is not. Those of another sampler where they are shown to
        lose less than that, or are near where that is not."""
        own, rival = self._own, self.rival
        nearer = rival is not None and (_less(rival, own) or (self._far(own) and not self._far(rival)))
        return rival if rival is not None and nearer else own

    @property
    def grid(self) -> tuple[int, ...]:
        """Timesteps of which the chosen schedule's are some."""
        return self.chosen.schedule.timesteps if self.chosen == self.rival else self.wanted.grid(self.wanted.steps)

    @property
    def _own(self) -> Candidate:
        fewer = self.fewer
        return self.best if fewer is None or self.gains or (self._far(fewer) and not self._far(self.best)) else fewer

    @property
    def gains(self) -> bool:
        """Whether the best loses less than fewer whole steps, beyond the error of the paired difference."""
        if self.fewer is None or self.fewer.schedule == self.best.schedule:
            return self.fewer is None
        return _less(self.best, self.fewer)

    def _made_of(self, candidate: Candidate) -> str:
        """What its steps save, in words."""
        steps = candidate.schedule.steps
        reusing, plain = sum(bool(step.reuse) for step in steps), sum(step.guidance is None for step in steps)
        guided = f", {plain} not guided" if plain and self.wanted.scale is not None else ""
        return (f"{reusing} of which reuse blocks" if reusing else "none of which reuses a block") + guided

    @property
    def verdict(self) -> list[str]:
        """In words, the most important first."""
        chosen, count = self.chosen, self.wanted.steps
        share = f"{chosen.share:.0%} of {self.wanted.whole} {self.wanted.measure}"
        lost = chosen.loss / self.apart
        near = f"samples are {percent(lost)} (± {percent(CONFIDENCE * chosen.error / self.apart)}) of the way from the full pipeline's own to unrelated ones"
        if self.far:
            words = [
                f"No gain: keep {self.wanted.full_steps or count} steps. The best schedule within {share} is too far: {near}."
            ]
        elif chosen == self.rival:
            words = [
                f"Another sampler is nearer: {len(chosen.schedule.steps)} whole steps of DPM-Solver++ take {share}; {near}. The schedule that DDIM is best with "
                f"loses {times(self._own, chosen)}."
            ]
        elif chosen != self.fewer:
            level = (
                "" if self.gains else " That it loses less than fewer whole steps is not shown, but these are too far."
            )
            words = [
                f"A schedule of {len(chosen.schedule.steps)} steps, {self._made_of(chosen)}, takes {share}; {near}.{level}"
            ]
        else:
            kept = len(chosen.schedule.steps)
            words = [
                f"Reuse adds nothing here that is beyond the error: take {kept} of the {count} steps, whole. They take {share}; {near}."
            ]
        if self.fewer is not None and self.fewer.schedule != self.best.schedule:
            difference, error = self.best.score.difference(self.fewer.score, LOSS)
            words.append(
                f"Beside {len(self.fewer.schedule.steps)} whole steps ({self.fewer.share:.0%}), the best of those that were tried within the limit, the best schedule found "
                f"loses {times(self.best, self.fewer)}; the difference is {percent(difference / self.apart)} ± {percent(CONFIDENCE * error / self.apart)}."
            )
        if self.rival is not None and chosen != self.rival:
            words.append(
                f"Another sampler, DPM-Solver++ in {len(self.rival.schedule.steps)} whole steps ({self.rival.share:.0%}), loses {times(self.rival, chosen)}."
            )
        if self.start is not None:
            over = ", more than is wanted," if self.start.share > self.wanted.limit * (1 + 1e-9) else ""
            words.append(
                f"The schedule that was given takes {self.start.share:.0%} here{over} and its samples are {percent(self.start.loss / self.apart)} of the way; "
                + (
                    "it loses no more of it than where it was found, so nothing was searched."
                    if not self.searched
                    else "more was searched for."
                )
            )
        return words


def _less(one: Candidate, than: Candidate) -> bool:
    """Whether it loses less, beyond the error of the paired difference."""
    difference, error = one.score.difference(than.score, LOSS)
    return difference + CONFIDENCE * error < 0


def times(one: Candidate, of: Candidate) -> str:
    """How much it loses beside another, which may lose nothing: where what is reused would have come out the same."""
    if of.loss > 0:
        return f"{one.loss / of.loss:.2g} times as much"
    return "more" if one.loss > 0 else "as much"


def percent(share: float) -> str:
    """With three digits that say something."""
    return f"{100 * share:.3g} %"
