"""Scores that are kept in a file, charged as though they had all been made where they are asked for.

A search of more trials begins as one of fewer does, and one that was stopped begins anew: their schedules are not run again. What they would have taken, with
all that beginnings have in common, a network tells that predicts nothing, in trajectories like the real one's.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from evaluators.frechet import LoadedFrechet
from evaluators.scoring import LoadedScore, Rows
from evaluators.trajectories import Trajectories
from nas.contracts import Condition, LoadedEvaluator, LoadedSupernet, Schedule, Score, Step


class Silent:
    """A loaded network that predicts nothing and decodes nothing, with the costs of another one, and keeps as much to be reused: how much that is, one sample of
    the other one tells at the first call of a kind."""

    def __init__(self, net: LoadedSupernet) -> None:
        self._net = net
        self._shapes: dict[Any, dict[str, tuple[int, torch.Tensor]]] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._net, name)

    def denoiser(self, step: Step, keep: Sequence[str] = ()) -> Callable[..., tuple[torch.Tensor, Any]]:
        def call(
            x: torch.Tensor, t: int, cache: Any = None, condition: Condition | None = None
        ) -> tuple[torch.Tensor, Any]:
            predicted = torch.zeros_like(x)
            if not keep:
                return predicted, None
            given = {name: len(rows) // len(x) for name, rows in (cache or {}).items()}
            kind = replace(step, timestep=0), tuple(keep), *given.items()
            if kind not in self._shapes:
                one = None if cache is None else {name: cache[name][: given[name]].clone() for name in given}
                told = None if condition is None else {name: rows[:1] for name, rows in condition.items()}
                _, kept = self._net.denoiser(step, keep)(x[:1], t, one, told)
                # Of no size itself, whatever it is expanded to.
                self._shapes[kind] = {n: (len(rows), torch.zeros_like(rows[:1])) for n, rows in kept.items()}
            each = self._shapes[kind].items()
            return predicted, {
                name: torch.zeros((), dtype=like.dtype).expand(rows * len(x), *like.shape[1:])
                for name, (rows, like) in each
            }

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


class Kept:
    """Scores in a file, a JSON object in each line, by a key of one's own. Several processes may add to it; a line that a stop has cut off is none."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._known: dict[str, Score] = {}
        self._read = 0

    def get(self, key: str) -> Score | None:
        if key not in self._known and self._file.exists():
            with self._file.open("rb") as file:
                file.seek(self._read)
                whole, _, _ = file.read().rpartition(b"\n")
            self._read += len(whole)
            for line in whole.splitlines():
                with suppress(ValueError):
                    told = json.loads(line)
                    self._known[told["key"]] = Score.from_json(told)
        return self._known.get(key)

    def put(self, key: str, score: Score) -> None:
        self._known[key] = score
        self._file.parent.mkdir(parents=True, exist_ok=True)
        with self._file.open("ab", buffering=0) as file:
            # In one piece, on a line of its own whatever stands before.
            file.write(f"\n{json.dumps({'key': key, **score.to_json()})}\n".encode())


class Charged:
    """`evaluate`, whose scores are `kept`, by noise, schedule and number of samples, and charged as `silent` is. Both are of one search alone, from its beginning."""

    def __init__(self, evaluate: LoadedEvaluator, silent: LoadedEvaluator, kept: Kept) -> None:
        self._evaluate = evaluate
        self._silent = silent
        self._kept = kept

    def __call__(self, schedule: Schedule, rung: int, seed: int) -> Score:
        spent = self._silent(schedule, rung, seed).spent
        key = f"{seed} {schedule.digest} {rung}"
        score = self._kept.get(key)
        if score is None:
            self._kept.put(key, score := self._evaluate(schedule, rung, seed))
        return replace(score, spent=spent)
