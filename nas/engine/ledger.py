"""The only memory of a search: an Optuna study used as a write-ahead log.

A trial is written RUNNING with its genes, exact cost and constraint violations before it is evaluated, and closed after.
Trials of the last rung close as COMPLETE, so Optuna's `best_trials` and the dashboard's axes show verified candidates alone;
trials of lower rungs close as PRUNED, their scores beside them. One Optuna study holds one searcher; one storage holds a run.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution
from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial, TrialState, create_trial

from nas.contracts import Problem, Proposal, Schedule, Score, Status, Trial, UserError, plain
from nas.engine.journal import AGAIN
from nas.study import LedgerInfo, noise_of

optuna.logging.set_verbosity(optuna.logging.ERROR)

RECORD = "nas:record"
SCORE = "nas:score"
REASON = "nas:reason"
STUDY = "nas:study"

_STATES: dict[TrialState, Status] = {
    TrialState.RUNNING: "running",
    TrialState.WAITING: "running",
    TrialState.COMPLETE: "complete",
    TrialState.PRUNED: "pruned",
    TrialState.FAIL: "failed",
}


class Ledger:
    """The trials of one searcher. One process writes at a time; `check` raises where this one may not any more.

    A search with other limits, objectives, rungs or settings has a ledger of its own, beside those of before. Raises UserError where the stored ledgers were made of
    other weights, spaces, noises or scores.
    """

    def __init__(
        self, storage: BaseStorage, info: LedgerInfo, problem: Problem, check: Callable[[], None] = lambda: None
    ) -> None:
        self.info = settled(storage, info)
        self._check = check
        self._problem = problem
        self._storage = storage
        self._study_id = self._open_study()
        self._distributions: dict[str, BaseDistribution] = {
            c.name: CategoricalDistribution(c.options) for c in problem.space.choices
        }
        self._ids: dict[int, int] = {}
        self._trials: dict[int, Trial] = {}
        self._closed: list[int] = []
        self._order = 0
        self._load()

    @property
    def trials(self) -> list[Trial]:
        """All trials, by number."""
        return list(self._trials.values())

    def trial(self, number: int) -> Trial:
        return self._trials[number]

    @property
    def closed(self) -> int:
        """How many trials are finished."""
        return len(self._closed)

    @property
    def finished(self) -> list[Trial]:
        """Closed trials in order of completion: what a searcher is told again on resume."""
        return [self._trials[number] for number in self._closed]

    def open(self, proposal: Proposal, schedule: Schedule, rung: int) -> Trial:
        """Writes a RUNNING trial. From here a crash loses nothing."""
        self._check()
        genome = tuple(int(gene) for gene in proposal.genome)
        cost, violations = (plain(of) for of in (self._problem.space.cost(genome), self._problem.violations(genome)))
        digest = schedule.digest
        origin = dict(proposal.origin)
        record = {
            "genome": genome,
            "digest": digest,
            "rung": rung,
            "cost": cost,
            "violations": violations,
            "origin": origin,
        }
        template = create_trial(
            state=TrialState.RUNNING,
            params={c.name: c.options[gene] for c, gene in zip(self._problem.space.choices, genome, strict=True)},
            distributions=self._distributions,
            constraints=violations,
            # The dashboard still reads constraints from this attribute alone.
            system_attrs={RECORD: record, "constraints": list(violations.values())},
            user_attrs={"samples": rung, **cost},
        )
        trial_id = self._storage.create_new_trial(self._study_id, template_trial=template)
        number = self._storage.get_trial_number_from_id(trial_id)
        self._ids[number] = trial_id
        self._trials[number] = Trial(number, genome, digest, rung, "running", None, cost, violations, origin)
        return self._trials[number]

    def begin_again(self, number: int) -> None:
        """Notes that a trial that was under way when a run stopped is handed out again: its clock begins anew."""
        self._check()
        self._storage.set_trial_system_attr(self._ids[number], AGAIN, time.time())

    def close(self, number: int, score: Score) -> Trial:
        """Books the score: COMPLETE on the last rung, PRUNED below it."""
        self._check()
        self._storage.set_trial_system_attr(self._ids[number], SCORE, {**score.to_json(), "order": self._next()})
        self._storage.set_trial_user_attr(self._ids[number], "spent", dict(score.spent))
        for name, error in ((name, score.error(name)) for name in score.values):
            if math.isfinite(error):
                self._storage.set_trial_user_attr(self._ids[number], f"{name} error", error)
        return self._finish(number, score)

    def fail(self, number: int, reason: str) -> Trial:
        """Books a failure with its reason."""
        self._check()
        trial_id = self._ids[number]
        self._storage.set_trial_system_attr(trial_id, REASON, {"reason": reason, "order": self._next()})
        failed = replace(self._trials[number], status="failed", reason=reason)
        self._storage.set_trial_user_attr(trial_id, "failed", failed.failure)
        self._storage.set_trial_state_values(trial_id, state=TrialState.FAIL)
        return self._settled(failed)

    def _next(self) -> int:
        """Place in the order of completion."""
        self._order += 1
        return self._order - 1

    def _finish(self, number: int, score: Score) -> Trial:
        status: Status = "complete" if self._trials[number].rung == self.info.rungs[-1] else "pruned"
        trial = replace(self._trials[number], status=status, score=score)
        # Scores of fewer samples and other noises stand beside the trial, not on the axis of those that were verified.
        if status == "complete":
            values = trial.objectives(self.info.objectives)
            self._storage.set_trial_state_values(self._ids[number], state=TrialState.COMPLETE, values=values)
        else:
            for name, value in score.values.items():
                self._storage.set_trial_user_attr(self._ids[number], f"{name} on {trial.rung} samples", value)
            self._storage.set_trial_state_values(self._ids[number], state=TrialState.PRUNED)
        return self._settled(trial)

    def _settled(self, trial: Trial) -> Trial:
        self._trials[trial.number] = trial
        self._closed.append(trial.number)
        return trial

    def _open_study(self) -> int:
        """Creates the Optuna study, or finds it; a ledger that is refused is not written to."""
        known = {study.study_name: study._study_id for study in self._storage.get_all_studies()}
        study_id = known.get(self.info.name)
        stored = None if study_id is None else _identity(self._storage, study_id)
        if study_id is not None and stored is not None:
            if self._check_same(LedgerInfo.from_json(stored)):
                self._identify(study_id)
            return study_id
        if study_id is not None and self._storage.get_n_trials(study_id):
            raise UserError(f"the storage holds an Optuna study {self.info.name} of another program; rename the study")
        study = optuna.create_study(
            storage=self._storage,
            study_name=self.info.name,
            directions=["minimize"] * len(self.info.objectives),
            load_if_exists=True,
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            study.set_metric_names(list(self.info.objectives))
        study_id = self._storage.get_study_id_from_name(self.info.name)
        self._identify(study_id)
        return study_id

    def _identify(self, study_id: int) -> None:
        """Twice, so that one damaged line of a journal does not make a ledger nobody's."""
        self._storage.set_study_user_attr(study_id, STUDY, self.info.to_json())
        self._storage.set_study_system_attr(study_id, STUDY, self.info.to_json())

    def _load(self) -> None:
        stored = self._storage.get_all_trials(self._study_id, deepcopy=False)
        orders: dict[int, int] = {}
        scored: list[tuple[int, Score]] = []
        for frozen in stored:
            trial = read_trial(frozen)
            if trial is None:
                continue
            self._trials[trial.number] = trial
            self._ids[trial.number] = frozen._trial_id
            if trial.status != "running":
                # A trial that was closed from outside, in the dashboard say, has no place in the order: it comes last.
                booked = frozen.system_attrs.get(SCORE) or frozen.system_attrs.get(REASON) or {"order": len(stored)}
                orders[trial.number] = booked["order"]
            elif SCORE in frozen.system_attrs:
                self._order = max(self._order, frozen.system_attrs[SCORE]["order"] + 1)
                scored.append((trial.number, Score.from_json(frozen.system_attrs[SCORE])))
        self._closed = sorted(orders, key=orders.__getitem__)
        self._order = max(self._order, max(orders.values(), default=-1) + 1)
        for number, score in scored:  # killed between booking the score and closing the trial
            self._finish(number, score)

    def _check_same(self, stored: LedgerInfo) -> bool:
        """Whether it is stored under a former name. Raises UserError where it is another."""
        changed = [
            f"{part} was {stored.provenance.get(part)}, now {self.info.provenance[part]}"
            for part in self.info.changed(stored.provenance)
        ]
        if changed:
            raise UserError(
                f"ledger {self.info.name} was written for something else: {'; '.join(changed)}. "
                "Its scores do not compare with new ones; use another --out, or change it back"
            )
        return dict(stored.provenance) != dict(self.info.provenance)


def read_trial(frozen: FrozenTrial) -> Trial | None:
    """A stored trial; None where something else than this engine wrote it."""
    record = frozen.system_attrs.get(RECORD)
    if record is None:
        return None
    score = frozen.system_attrs.get(SCORE)
    status = _STATES[frozen.state]
    reason = frozen.system_attrs.get(REASON, {}).get("reason", "")
    if status in ("complete", "pruned") and not score:
        status, reason = "failed", "it was closed from outside, without a score"
    return Trial(
        number=frozen.number,
        genome=tuple(record["genome"]),
        digest=record["digest"],
        rung=record["rung"],
        status=status,
        score=Score.from_json(score) if score and status in ("complete", "pruned") else None,
        cost=record["cost"],
        violations=record["violations"],
        origin=record["origin"],
        reason=reason,
        clock=(
            frozen.system_attrs.get(AGAIN, frozen.datetime_start.timestamp()),
            frozen.datetime_complete.timestamp(),
        )
        if frozen.datetime_start and frozen.datetime_complete
        else None,
    )


def read_ledgers(storage: BaseStorage, study: str | None = None) -> list[tuple[LedgerInfo, list[Trial]]]:
    """All ledgers of a storage (of one study), for looking only. Needs no space, no torch and no lock."""
    found: list[tuple[LedgerInfo, list[Trial]]] = []
    for frozen_study in storage.get_all_studies():
        identity = _identity(storage, frozen_study._study_id)
        if identity is None:
            continue
        info = LedgerInfo.from_json(identity)
        if study is None or info.study == study:
            trials = [read_trial(frozen) for frozen in storage.get_all_trials(frozen_study._study_id, deepcopy=False)]
            found.append((info, [trial for trial in trials if trial is not None]))
    return found


def _identity(storage: BaseStorage, study_id: int) -> Mapping[str, Any] | None:
    """What a stored ledger says it is; None for an Optuna study of another program."""
    found: Mapping[str, Any] | None = storage.get_study_user_attrs(study_id).get(STUDY)
    return found or storage.get_study_system_attrs(study_id).get(STUDY)


def settled(storage: BaseStorage, info: LedgerInfo) -> LedgerInfo:
    """The ledger that this very search has, or is to have: a further one where others of its searcher and seed compare with it, but were searched otherwise."""
    identities = (_identity(storage, study._study_id) for study in storage.get_all_studies())
    stored = [LedgerInfo.from_json(found) for found in identities if found is not None]
    beside = [one for one in stored if one.base_name == info.base_name]
    for one in beside:
        if info.continues(one):
            return replace(info, variant=one.variant)
    fits = all(info.compares(one) for one in beside)
    return replace(info, variant=info.of_its_search) if beside and fits else info


def known_scores(storage: BaseStorage, info: LedgerInfo) -> dict[tuple[str, int], tuple[str, Score]]:
    """(digest, rung) -> (which trial, its score) over all ledgers whose scores compare with this one's, of rungs on the same noises."""
    known: dict[tuple[str, int], tuple[str, Score]] = {}
    for other, trials in read_ledgers(storage, info.study):
        if info.compares(other):
            for trial in trials:
                same_noise = trial.rung in info.rungs and noise_of(trial.rung, info.rungs) == noise_of(
                    trial.rung, other.rungs
                )
                if trial.score is not None and same_noise:
                    known.setdefault((trial.digest, trial.rung), (f"{other.name}#{trial.number}", trial.score))
    return known
