"""The path of a candidate: resume, propose, settle. `run_here` evaluates in this process; `ray_runner` on workers."""

from __future__ import annotations

import math
import traceback
from collections import Counter, deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

from nas.contracts import (
    DONE,
    WAIT,
    Genome,
    Problem,
    Proposal,
    Schedule,
    Score,
    Search,
    Signal,
    Trial,
    UserError,
    derive_seed,
)
from nas.engine.ladder import FAILURES_PER_GENOME, Climb, Ladder, Patience
from nas.engine.ledger import Ledger
from nas.study import noise_of

FAILURES_IN_A_ROW = 5
"""So many candidates, and not one success between them, have a cause outside of them."""


@dataclass(frozen=True, slots=True)
class Job:
    """One evaluation to be done: `samples` samples of `schedule` with the noises of `seed`."""

    trial: Trial
    schedule: Schedule
    samples: int
    seed: int


class Conductor:
    """Hands out jobs and books their outcomes, for one searcher and its ledger. Where jobs run is the runner's affair.

    On creation it replays the ledger: finished trials are told to the search in order of completion, RUNNING ones of a
    killed run are handed out again first. `known` holds scores of other ledgers of the run, by (digest, rung): they are
    taken instead of run again; this one's are added. `noise`: purpose of the noises of all rungs, where it is not the rung's own. `forgiven`: genomes whose
    failures in earlier runs do not count, so that they are tried again. `on_settled` sees every trial that is closed in this run.
    """

    def __init__(
        self,
        ledger: Ledger,
        search: Search,
        problem: Problem,
        ladder: Ladder,
        seed: int,
        known: dict[tuple[str, int], tuple[str, Score]] | None = None,
        on_settled: Callable[[Trial], None] = lambda trial: None,
        noise: str | None = None,
        forgiven: Collection[Genome] = (),
    ) -> None:
        self.ledger = ledger
        self._noise = noise
        self._search = search
        self._problem = problem
        self._ladder = ladder
        self._patience = Patience(ladder)
        self._proposed = sum(self._counts(trial) for trial in ledger.trials)
        self._seed = seed
        self._known = {} if known is None else known
        self._on_settled = on_settled
        self._rungs = ledger.info.rungs
        self._failures: Counter[tuple[str, int]] = Counter()
        self._failed_in_a_row: list[tuple[str, int]] = []
        self._retries: deque[Trial] = deque()
        self._search_done = False
        uncounted = self._replay([t for t in ledger.finished if t.status != "failed" or t.genome not in forgiven])
        self._climb = Climb(ladder, (trial for trial in ledger.trials if trial.number not in uncounted))
        self._running = {trial.number: trial for trial in ledger.trials if trial.status == "running"}
        self._stale = deque(self._running.values())
        reopened = {(trial.digest, trial.rung) for trial in self._running.values()}
        self._retries = deque(trial for trial in self._retries if (trial.digest, trial.rung) not in reopened)

    def _replay(self, finished: Sequence[Trial]) -> set[int]:
        """Tells what was told before. Failures of a streak that ended a run had a cause outside of the candidates: they do not count, and where a candidate was
        not tried since it is tried again. Those of a streak of too few candidates are told, but for one that ended a run. Returned are the numbers of the
        failures that do not count."""
        last = {(trial.digest, trial.rung): trial.number for trial in finished}
        under_way = [trial for trial in self.ledger.trials if trial.status == "running"]
        failures: Counter[tuple[str, int]] = Counter()
        given_up: set[int] = set()  # numbers of failures with which a run gives a candidate up
        for trial in finished:
            if trial.status == "failed":
                failures[trial.digest, trial.rung] += 1
                given_up |= {trial.number} if failures[trial.digest, trial.rung] >= FAILURES_PER_GENOME else set()
        streaks: set[int] = set()
        behind = 0
        for failed, group in groupby(finished, lambda trial: trial.status == "failed"):
            streak = list(group)
            behind += len(streak)
            if not failed or len(streak) < FAILURES_IN_A_ROW:
                continue
            candidates = {(trial.digest, trial.rung) for trial in streak}
            for_good = {t.number: (t.digest, t.rung) for t in streak if t.number in given_up}
            tried = {trial.origin.get("retry") for trial in (*finished[behind:], *under_way)}
            # A run of few candidates ended with it where all of them were given up and nothing else was to be done, or where one is tried once more behind it.
            idle = behind == len(finished) and not under_way and {*for_good.values()} == candidates
            if len(candidates) >= FAILURES_IN_A_ROW or idle or tried & {*for_good}:
                streaks |= {trial.number for trial in streak}
        for trial in finished:
            if trial.number not in streaks:
                self._absorb(trial)
            elif last[trial.digest, trial.rung] == trial.number:
                self._retries.append(trial)
        return streaks

    @property
    def proposed(self) -> int:
        """Proposals on the first rung so far; a second attempt at a failed one does not count."""
        return self._proposed

    def _counts(self, trial: Trial) -> bool:
        return trial.rung == self.ledger.info.rungs[0] and "retry" not in trial.origin

    @property
    def planned(self) -> int:
        """How many trials this run is expected to close in all."""
        searched = self.proposed if self._search_done or self._patience.over else self._ladder.trials
        return searched + sum(min(self._ladder.room(level), searched) for level in range(1, len(self._rungs)))

    def next(self) -> Job | Signal:
        """The next evaluation, WAIT while it depends on one that is running, or DONE.

        Raises UserError after failures of several candidates in a row without any success; of fewer, where there are no others.
        """
        if len(set(self._failed_in_a_row)) >= FAILURES_IN_A_ROW:
            raise self._failing()
        while True:
            opened = self._begun_again() if self._stale else self._open_next()
            if opened is DONE and len(self._failed_in_a_row) >= FAILURES_IN_A_ROW:
                raise self._failing()
            if isinstance(opened, Signal):
                return opened
            known = self._known.get((opened.digest, opened.rung))
            if known is None:
                return self._job(opened)
            mine = known[0].startswith(
                f"{self.ledger.info.name}#"
            )  # another genome of the same schedule: paid for already
            self.settle(opened.number, replace(known[1], spent={}) if mine else known[1].charged_in_full())

    def _begun_again(self) -> Trial:
        """One that was under way when a run was killed."""
        trial = self._stale.popleft()
        self.ledger.begin_again(trial.number)
        return trial

    def _failing(self) -> UserError:
        last = next(trial for trial in reversed(self.ledger.finished) if trial.status == "failed")
        return UserError(
            f"{len(set(self._failed_in_a_row))} candidates in a row failed, the last with: {last.failure}; once the cause is mended, the same command tries them "
            "again"
        )

    def check_scored(self, genomes: Collection[Genome]) -> None:
        """Raises UserError, with the reason, where the last trial of one of these failed."""
        last = {trial.genome: trial for trial in self.ledger.finished if trial.genome in genomes}
        failed = next((trial for trial in last.values() if trial.status == "failed"), None)
        if failed is not None:
            raise UserError(
                f"a schedule that was chosen could not be scored once more: {failed.failure}; once the cause is mended, the same command tries it again"
            )

    def settle(self, number: int, outcome: Score | str) -> Trial:
        """Books a score, or the reason of a failure, and tells the search what it should know."""
        del self._running[number]
        if isinstance(outcome, Score):
            objectives = replace(self.ledger.trial(number), score=outcome).objectives(self._problem.objectives)
            if not all(math.isfinite(value) for value in objectives):
                outcome = f"a score is not finite: {dict(outcome.values)}"
        trial = self.ledger.fail(number, outcome) if isinstance(outcome, str) else self.ledger.close(number, outcome)
        if trial.status == "failed":
            self._failed_in_a_row.append((trial.digest, trial.rung))
        else:
            self._failed_in_a_row.clear()
        self._climb.note(trial)
        self._absorb(trial)
        self._on_settled(trial)
        return trial

    def _open_next(self) -> Trial | Signal:
        if self._retries:
            failed = self._retries.popleft()
            return self._open(Proposal(failed.genome, {**failed.origin, "retry": failed.number}), failed.rung)
        searching = not self._search_done and self.proposed < self._ladder.trials and not self._patience.over
        leader = self._climb.next(searching)
        if leader is not None:
            return self._open(Proposal(leader.genome, {"rises_from": leader.number}), self._above(leader.rung))
        if searching:
            pending = [trial.genome for trial in self._running.values() if trial.rung == self._rungs[0]]
            answer = self._search.ask(pending)
            if isinstance(answer, Proposal):
                self._check(answer)
                return self._open(answer, self._rungs[0])
            if not isinstance(answer, Signal):
                raise UserError(
                    f"searcher {self.ledger.info.searcher} answered {answer!r}; `ask` returns Proposal(genome), WAIT or DONE"
                )
            if answer is WAIT and self._running:
                return WAIT
            self._search_done = True
            return self._open_next()
        return WAIT if self._running else DONE

    def _check(self, proposal: Proposal) -> None:
        """A searcher's word is not enough: nothing over budget is evaluated, but for probes, which say so."""
        sizes = [len(choice.options) for choice in self._problem.space.choices]
        genome = proposal.genome
        if len(genome) != len(sizes) or not all(0 <= gene < size for gene, size in zip(genome, sizes, strict=True)):
            raise UserError(f"searcher {self.ledger.info.searcher} proposed {genome}, which is no genome of the space")
        if "probe" not in proposal.origin and not self._problem.feasible(genome):
            limits = dict(self._problem.limits)
            raise UserError(f"searcher {self.ledger.info.searcher} proposed {genome}, which breaks the limits {limits}")

    def _above(self, rung: int) -> int:
        return self._rungs[self._rungs.index(rung) + 1]

    def _open(self, proposal: Proposal, rung: int) -> Trial:
        schedule = self._problem.space.decode(proposal.genome)
        known = self._known.get((schedule.digest, rung))
        if known is not None:
            proposal = Proposal(proposal.genome, {**proposal.origin, "scored_by": known[0]})
        trial = self.ledger.open(proposal, schedule, rung)
        self._running[trial.number] = trial
        self._climb.note(trial)
        self._proposed += self._counts(trial)
        return trial

    def _job(self, trial: Trial) -> Job:
        purpose = self._noise or noise_of(trial.rung, self._rungs)
        return Job(trial, self._problem.space.decode(trial.genome), trial.rung, derive_seed(self._seed, purpose))

    def _absorb(self, trial: Trial) -> None:
        """What follows from a closed trial, live or replayed: a first failure is tried again, all else is told."""
        key = trial.digest, trial.rung
        self._retries = deque(other for other in self._retries if (other.digest, other.rung) != key)
        if trial.status == "failed":
            self._failures[key] += 1
            if self._failures[key] < FAILURES_PER_GENOME:
                self._retries.append(trial)
                return
        elif trial.score is not None:
            self._known.setdefault(key, (f"{self.ledger.info.name}#{trial.number}", trial.score))
        self._tell(trial)

    def _tell(self, trial: Trial) -> None:
        if trial.rung == self._rungs[0]:
            self._search.tell(trial)
            self._patience.note(trial)


def run_here(conductor: Conductor, load: Callable[[], Callable[[Schedule, int, int], Score]]) -> None:
    """Runs every job in this process, one after another. Deterministic: a resumed run repeats an uninterrupted one. `load`: gives what scores, at the first job:
    a run that is done needs none."""
    evaluate: Callable[[Schedule, int, int], Score] | None = None
    while isinstance(job := conductor.next(), Job):
        evaluate = load() if evaluate is None else evaluate
        conductor.settle(job.trial.number, attempt(evaluate, job.schedule, job.samples, job.seed))


def attempt(
    evaluate: Callable[[Schedule, int, int], Score], schedule: Schedule, samples: int, seed: int
) -> Score | str:
    """The score, or the traceback of what went wrong: one bad candidate must not end a search."""
    try:
        return Score.plain(evaluate(schedule, samples, seed))
    except Exception:  # whatever a user's evaluator raises is the trial's reason
        return traceback.format_exc(limit=-5)
