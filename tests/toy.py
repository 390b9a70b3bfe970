"""A study without networks: costs and scores are formulas, so engine tests take milliseconds. Everything else is real."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from nas.contracts import Choice, Genome, ImageSet, Price, Progress, Schedule, Score, Step, Trial
from nas.engine.session import open_session
from nas.searchers.evolution import Evolution
from nas.searchers.random import Random
from nas.study import Study


@dataclass(frozen=True)
class ToySpace:
    """`genes` intervals of one step each; option j costs (j + 1)^2 MACs."""

    genes: int = 6
    options: int = 4

    @property
    def choices(self) -> tuple[Choice, ...]:
        return tuple(Choice(f"gene{i:04d}", tuple(range(self.options)), i) for i in range(self.genes))

    def decode(self, genome: Genome) -> Schedule:
        if len(genome) != self.genes or not all(0 <= gene < self.options for gene in genome):
            raise ValueError(f"genome {genome} does not fit")
        return Schedule(tuple(Step(self.genes - 1 - i, gene) for i, gene in enumerate(genome)))

    def cost(self, genome: Genome) -> dict[str, float]:
        macs = sum((gene + 1) ** 2 for gene in genome)
        return {
            "macs": macs,
            "macs_share": macs / (self.genes * self.options**2),
            "params": sum({gene + 1 for gene in genome}),
        }

    def interval_costs(self, price: Price | None = None) -> tuple[npt.NDArray[np.int64], ...]:
        return (np.arange(1, self.options + 1) ** 2,) * self.genes

    def describe(self) -> dict[str, Any]:
        return {"class": "ToySpace", "genes": self.genes, "options": self.options}


@dataclass(frozen=True)
class ToySupernet:
    version: str = "1"

    def describe(self) -> dict[str, Any]:
        return {"version": self.version}

    def digest(self, folder: Path) -> str:
        return self.version

    def load(self, folder: Path, device: str) -> Any:
        return self


@dataclass(frozen=True)
class ToyImages:
    def load(self) -> ImageSet:
        return ImageSet(np.zeros((16, 1, 2, 2), np.float32), None, "zeros")


@dataclass(frozen=True)
class NoTraining:
    def describe(self) -> dict[str, Any]:
        return {}

    def macs(self, supernet: Any) -> float:
        return 0.0

    def run(self, supernet: Any, images: Any, folder: Path, seed: int, device: str) -> Iterator[Progress]:
        yield from ()


@dataclass(frozen=True)
class ToyEvaluator:
    """fd falls with every gene, clean ones more, plus noise that falls with the sample count.

    `seconds`: how long a call takes. `failing`: genes that raise. `log`: file that gets a line for each call.
    `fatal`: genes at which the process dies the first time, once, as if the machine had killed it.
    """

    rungs: tuple[int, ...] = (64, 256)
    seconds: float = 0.0
    failing: tuple[Genome, ...] = ()
    not_a_number: tuple[Genome, ...] = ()
    fatal: tuple[Genome, ...] = ()
    log: str = ""
    metrics: tuple[str, ...] = field(default=("fd",), repr=False)
    kind: str = ""

    def describe(self) -> dict[str, Any]:
        return {"rungs": self.rungs}

    def digest(self, folder: Path) -> str:
        return f"{self.rungs}{self.kind}"

    def prepare(self, folder: Path, seed: int, device: str) -> Iterator[Progress]:
        yield from ()

    def load(self, supernet: Any, folder: Path) -> Any:
        return self

    def __call__(self, schedule: Schedule, rung: int, seed: int) -> Score:
        time.sleep(self.seconds)
        if self.log:
            with open(self.log, "a") as file:
                file.write(f"{schedule.digest} {rung}\n")
        genome = tuple(step.arch for step in schedule.steps)
        if genome in self.failing:
            raise RuntimeError(f"genome {genome} was told to fail")
        if genome in self.fatal and not os.path.exists(f"{self.log}.died"):
            open(f"{self.log}.died", "w").close()
            os._exit(1)
        error = sum((i + 1) / (gene + 1) for i, gene in enumerate(genome)) / len(genome)
        rng = np.random.default_rng([seed, rung, int(schedule.digest, 16) % 2**32])
        blocks = error + 0.1 / math.sqrt(rung) * rng.standard_normal(20)
        value = math.nan if genome in self.not_a_number else float(blocks.mean())
        replicates = tuple(float((blocks.sum() - b) / 19) for b in blocks)
        spent: Mapping[str, float] = {"calls": rung * len(genome), "macs": rung * len(genome), "seconds": self.seconds}
        return Score({"fd": value}, {"fd": replicates}, spent, {"fd": f"toy@{rung}"})

    def sample(self, schedule: Schedule, count: int, seed: int) -> Any:
        raise AssertionError("a toy has no images")


def toy_study(**changes: Any) -> Study:
    """A toy study; keywords replace fields of `Study`, `evaluator__x` and `space__x` those of its parts."""
    parts: dict[str, dict[str, Any]] = {"evaluator": {}, "space": {}, "supernet": {}}
    for key in [key for key in changes if "__" in key]:
        part, name = key.split("__", 1)
        parts[part][name] = changes.pop(key)
    settings: dict[str, Any] = {
        "name": "toy",
        "space": ToySpace(**parts["space"]),
        "supernet": ToySupernet(**parts["supernet"]),
        "images": ToyImages(),
        "training": NoTraining(),
        "evaluator": ToyEvaluator(**parts["evaluator"]),
        "searchers": {"evolution": Evolution(population=8), "random": Random()},
        "limits": {"macs_share": 0.6},
        "trials": 30,
        "verified": 5,
    }
    return Study(**{**settings, **changes})


def run(study: Study, folder: Path, searcher: str = "evolution", trials: int | None = None) -> list[Trial]:
    with open_session(study, folder) as session:
        conductor = session.conductor(searcher, trials=trials)
        session.run(conductor)
        return conductor.ledger.trials


def facts(trials: list[Trial]) -> list[tuple[Any, ...]]:
    return [
        (t.number, t.genome, t.rung, t.status, dict(t.origin), t.score.values["fd"] if t.score else None)
        for t in trials
    ]
