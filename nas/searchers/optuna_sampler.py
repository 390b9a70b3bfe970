"""Any sampler of Optuna, by its class name, over the space's choices.

Before each proposal an in-memory Optuna study is built anew from the finished trials, in order of completion, and the pending
ones; the sampler sees that alone. The run's own ledger, with its rungs and verified trials, is no concern of a sampler.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import field
from functools import partial
from typing import Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, IntDistribution
from optuna.trial import FrozenTrial, TrialState, create_trial

from nas.contracts import DONE, Genome, Problem, Proposal, Signal, Trial, UserError, derive_seed
from nas.genomes.genetics import Taken, near
from nas.recipes import recipe

optuna.logging.set_verbosity(optuna.logging.ERROR)

ATTRIBUTES = "attributes"
"""Where a proposal's origin keeps what the sampler notes on its trial, such as NSGA's generation."""


@recipe
class OptunaSampler:
    """`sampler`: a class of `optuna.samplers`, such as "TPESampler", "GPSampler", "NSGAIIISampler". `arguments`: for its
    constructor, the seed apart. Options of a choice are integers in their order.

    What exceeds the budget is repaired, and what was proposed before moves to a neighbour; the sampler is told what was scored.
    """

    sampler: str = "TPESampler"
    arguments: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not isinstance(getattr(optuna.samplers, self.sampler, None), type):
            known = ", ".join(name for name in optuna.samplers.__all__ if name.endswith("Sampler"))
            raise UserError(f"Optuna has no sampler {self.sampler!r}; use one of {known}")
        for name, value in self.arguments.items():
            if isinstance(value, optuna.samplers.BaseSampler):
                raise UserError(
                    f"{name} of {self.sampler} is a {type(value).__name__}, which draws from a state of its own that no resumed search knows; leave it out"
                )

    def __repr__(self) -> str:
        """Identifies its ledgers: objects among the arguments by what they are made of, functions by their names."""
        arguments = {name: _told(value) for name, value in self.arguments.items()}
        return f"OptunaSampler(sampler={self.sampler!r}, arguments={arguments!r})"

    def make(self, seed: int) -> optuna.samplers.BaseSampler:
        """Raises UserError where the class cannot be had with these arguments."""
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                made: optuna.samplers.BaseSampler = getattr(optuna.samplers, self.sampler)(seed=seed, **self.arguments)
                return made
        except (TypeError, ValueError, ImportError) as error:
            raise UserError(
                f"sampler {self.sampler} cannot be made with {dict(self.arguments)}: {error}; see Optuna's documentation"
            ) from error

    def start(self, problem: Problem, seed: int) -> OptunaSearch:
        return OptunaSearch(self, problem, seed)


class _Told:
    """Prints as the text."""

    def __init__(self, text: str) -> None:
        self._text = text

    def __repr__(self) -> str:
        return self._text


DEEP = 8
"""Objects in each other, beyond which nobody looks."""


def _told(value: Any, depth: int = 0) -> Any:
    """What prints its place in memory by what it is made of, functions and classes by their names; as it is where that cannot be told."""
    if " at 0x" not in repr(value) or depth > DEEP:
        return value
    if isinstance(value, Mapping):
        return {name: _told(part, depth + 1) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_told(part, depth + 1) for part in value]
    if isinstance(value, partial):
        return _Told(f"partial({_told([value.func, value.args, value.keywords], depth + 1)!r})")
    if "<lambda>" not in (name := getattr(value, "__qualname__", "<lambda>")):
        return _Told(f"{value.__module__}.{name}")
    if hasattr(value, "__qualname__") or not hasattr(value, "__dict__"):
        return value
    settings = (f"{name}={_told(part, depth + 1)!r}" for name, part in sorted(vars(value).items()))
    return _Told(f"{type(value).__qualname__}({', '.join(settings)})")


class OptunaSearch:
    def __init__(self, settings: OptunaSampler, problem: Problem, seed: int) -> None:
        self._settings = settings
        self._problem = problem
        self._seed = seed
        self._names = [choice.name for choice in problem.space.choices]
        self._distributions: dict[str, BaseDistribution] = {
            choice.name: IntDistribution(0, len(choice.options) - 1) for choice in problem.space.choices
        }
        self._told: set[Genome] = set()
        self._finished: list[FrozenTrial] = []
        self._counters = self._counted()  # a sampler that cannot search this problem says so before anything is spent

    def ask(self, pending: Sequence[Genome]) -> Proposal | Signal:
        taken = Taken(self._told, pending)
        # One that counts, such as the points of a sequence, goes on with the next, once a finished trial tells it the dimensions; others draw anew.
        counters = self._counters if self._finished else []
        seed = derive_seed(self._seed, 0 if counters else len(taken), "optuna sampler")
        study = self._study(pending, seed)
        for name in counters if len(taken) > 1 else ():
            study._storage.set_study_system_attr(study._study_id, name, len(taken) - 2)
        trial = self._asked(study)
        drawn = tuple(trial.params[name] for name in self._names)
        found = near(self._problem, drawn, np.random.default_rng(seed), taken.__contains__)
        if found is None:
            return DONE
        noted = {key: value for key, value in trial.system_attrs.items() if _is_json(value)}
        return Proposal(found, {ATTRIBUTES: noted} if noted else {})

    def tell(self, trial: Trial) -> None:
        self._told.add(trial.genome)
        values = trial.objectives(self._problem.objectives)
        if trial.scored and np.isfinite(values).all():
            noted = dict(trial.origin.get(ATTRIBUTES, {}))
            self._finished.append(self._trial(trial.genome, TrialState.COMPLETE, values=values, system_attrs=noted))

    def _counted(self) -> list[str]:
        """What the sampler counts its proposals by on the study, since each is drawn from a study of its own. Raises UserError where it refuses the study,
        before anything is spent."""
        study = self._study([], derive_seed(self._seed, 0, "optuna sampler"))
        self._asked(study)
        worst = [0.0] * len(self._problem.objectives)
        study.add_trial(self._trial((0,) * len(self._names), TrialState.COMPLETE, values=worst))
        seen = []
        for _ in range(2):
            self._asked(study)
            seen.append(study._storage.get_study_system_attrs(study._study_id))
        first, second = seen
        return [name for name, value in second.items() if type(value) is int and first.get(name) == value - 1]

    def _study(self, pending: Sequence[Genome], seed: int) -> optuna.Study:
        study = optuna.create_study(
            directions=["minimize"] * len(self._problem.objectives), sampler=self._settings.make(seed)
        )
        study.add_trials(self._finished)
        study.add_trials([self._trial(genome, TrialState.RUNNING) for genome in pending])
        return study

    def _asked(self, study: optuna.Study) -> FrozenTrial:
        """Raises UserError where the sampler refuses the study."""
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                asked = study.ask(self._distributions)
        except (ValueError, ImportError, RuntimeError) as error:
            raise UserError(
                f"sampler {self._settings.sampler} cannot search {self._problem.objectives}: {error}"
            ) from error
        return study.get_trials(deepcopy=False)[asked.number]

    def _trial(self, genome: Genome, state: TrialState, **known: Any) -> FrozenTrial:
        params = dict(zip(self._names, genome, strict=True))
        return create_trial(state=state, params=params, distributions=self._distributions, **known)


def _is_json(value: Any) -> bool:
    try:
        return bool(json.loads(json.dumps(value)) == value)
    except (TypeError, ValueError):
        return False
