"""Who is scored again with more samples."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from nas.contracts import Trial
from nas.pareto import crowding, ranks


def promotions(trials: Sequence[Trial], rung: int, objectives: Sequence[str], count: int) -> list[Trial]:
    """Scored trials of a rung that deserve the next: the best `count` by rank, within a rank those that spread the front.

    One trial per schedule. A function of the trials alone, so a resumed run promotes the same ones.
    """
    scored = {trial.digest: trial for trial in trials if trial.scored and trial.rung == rung}
    candidates = sorted(scored.values(), key=lambda trial: trial.number)
    if not candidates:
        return []
    values = np.array([trial.objectives(objectives) for trial in candidates])
    rank = ranks(values)
    front = np.flatnonzero(rank == 0)
    distance = crowding(values[front])
    chosen = sorted(range(len(front)), key=lambda i: (-distance[i], candidates[front[i]].number))[:count]
    return sorted((candidates[front[i]] for i in chosen), key=lambda trial: trial.number)
