"""Who is scored again with more samples."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from nas.contracts import Trial
from nas.pareto import best_first


def promotions(trials: Sequence[Trial], rung: int, objectives: Sequence[str], count: int) -> list[Trial]:
    """The best `count` scored trials of a rung: by rank, within a rank those that spread it most.

    Not the front alone: on few samples a good schedule may stand just behind a lucky one. One trial per schedule. A
    function of the trials alone, so a resumed run promotes the same ones.
    """
    scored: dict[str, Trial] = {}
    for trial in trials:
        if trial.scored and trial.rung == rung:
            scored.setdefault(trial.digest, trial)
    candidates = list(scored.values())
    if not candidates:
        return []
    best = best_first(np.array([trial.objectives(objectives) for trial in candidates]))[:count]
    return [candidates[i] for i in sorted(best)]
