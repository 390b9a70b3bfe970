"""Scores that are kept in a file, charged as though they had all been made where they are asked for.

A search of more trials begins as one of fewer does, and one that was stopped begins anew: their schedules are not run again. What they would have taken, with
all that beginnings have in common, a network tells that predicts nothing, in trajectories like the real one's.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property
from os import truncate
from pathlib import Path
from typing import Any

import torch

from evaluators.frechet import LoadedFrechet
from evaluators.scoring import LoadedScore, Rows
from evaluators.trajectories import Trajectories
from nas.contracts import Condition, LoadedSupernet, Schedule, Score, Step


class Silent:
    """A loaded network that predicts nothing and decodes nothing, with the costs of another one, whose blocks are not reused."""

    def __init__(self, net: LoadedSupernet) -> None:
        self._net = net

    def __getattr__(self, name: str) -> Any:
        return getattr(self._net, name)

    def denoiser(self, step: Step, keep: Sequence[str] = ()) -> Callable[..., tuple[torch.Tensor, Any]]:
        assert not step.reuse, "how much reused blocks would keep is not known here"
        assert not keep

        def call(
            x: torch.Tensor, t: int, cache: Any = None, condition: Condition | None = None
        ) -> tuple[torch.Tensor, Any]:
            return torch.zeros_like(x), None

        return call

    def to_images(self, states: torch.Tensor) -> torch.Tensor:
        return torch.zeros(len(states), *self._net.image_shape)


def silent(evaluate: LoadedFrechet) -> LoadedScore:
    """Spends what the score does, in the same order of calls, and says nothing else."""
    real, net = evaluate.trajectories, evaluate.supernet
    trajectories = Trajectories(
        Silent(net),
        tuple(real.samplers.values()),
        real.precision,
        real.batch,
        evaluate.recipe.cache_bytes,
        real.conditions,
        real.reuse,
    )
    one = evaluate.features(torch.zeros(1, *net.image_shape)).cpu()

    def make(schedule: Schedule, seed: int, start: int, stop: int) -> Any:
        return torch.zeros(len(trajectories.images(schedule, seed, start, stop)), one.shape[1], dtype=one.dtype).numpy()

    rows = Rows(evaluate.rows.name, make)
    return LoadedScore(evaluate.recipe, trajectories, evaluate.name, rows, lambda _: (0.0, ()), evaluate.label)


class Charged:
    """`evaluate`, whose scores are kept in `file`, a JSON object in each line, by noise, schedule and number of samples. One for each search."""

    def __init__(self, evaluate: LoadedFrechet, file: Path) -> None:
        self._evaluate = evaluate
        self._file = file
        self._silent = silent(evaluate)

    @cached_property
    def _known(self) -> dict[str, Score]:
        """Without a last line that a stop cut off."""
        if not self._file.exists():
            return {}
        whole, _, rest = self._file.read_text().rpartition("\n")
        if rest:
            truncate(self._file, self._file.stat().st_size - len(rest.encode()))
        every = map(json.loads, whole.splitlines())
        return {one["key"]: Score.from_json(one) for one in every}

    def __call__(self, schedule: Schedule, rung: int, seed: int) -> Score:
        spent = self._silent(schedule, rung, seed).spent
        key = f"{seed} {schedule.digest} {rung}"
        if key not in self._known:
            self._known[key] = score = self._evaluate(schedule, rung, seed)
            self._file.parent.mkdir(parents=True, exist_ok=True)
            with self._file.open("a") as file:
                file.write(json.dumps({"key": key, **score.to_json()}) + "\n")
        return replace(self._known[key], spent=spent)
