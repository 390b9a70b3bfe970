"""A study that takes seconds, whole or with scores by a formula, and `nas` in this process."""

from __future__ import annotations

import contextlib
import io
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nas import cli
from nas.testing import toy_score

TINY = {
    "sample_size": 8,
    "in_channels": 1,
    "out_channels": 1,
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "norm_num_groups": 2,
    "attention_head_dim": 4,
}

STUDY = """
from evaluators.frechet import Frechet
from evaluators.images import Digits
from nas.searchers.evolution import Evolution
from nas.searchers.routing import Routing
from nas.searchers.relaxation import Relaxation
from nas.study import Study
from search_spaces.intervals import per_step, uniform
from search_spaces.stepwise import Stepwise
from search_spaces.supernet import Elastic
from search_spaces.training import Sandwich
from benchmarks.tiny_study import TINY
images, steps = Digits(), uniform(4)
net = Elastic(TINY, widths=(0.25, 0.5, 1.0))
study = Study(
    name="faults", space=Stepwise(net, steps, per_step(steps)), supernet=net, images=images,
    training=Sandwich(steps={steps}, batch=16, warmup=5, checkpoint_every=25),
    evaluator=Frechet(images, rungs=(32, 64)), limits={{"macs_share": 0.6}}, trials=10, verified=3,
    searchers={{"routing": Routing(warm_start=Relaxation(steps=60, batch=4)), "evolution": Evolution(population=6)}},
)
"""


class Formula:
    """An evaluator, a supernet and a training in one, for studies without networks."""

    rungs, metrics = (1,), ("fd",)

    def describe(self) -> dict[str, Any]:
        return {}

    def digest(self, folder: Path) -> str:
        return "formula"

    def prepare(self, folder: Path, seed: int, device: str) -> Iterator[Any]:
        yield from ()

    def run(self, *given: Any) -> Iterator[Any]:
        yield from ()

    def load(self, *given: Any) -> Any:
        return self

    def __call__(self, schedule: Any, rung: int, seed: int) -> Any:
        return toy_score(tuple(gene for step in schedule.steps for gene in step.arch))


def command(*arguments: object) -> tuple[int, str]:
    """Exit code and error stream of `nas` in this process."""
    out, err = io.StringIO(), io.StringIO()
    argv, sys.argv = sys.argv, ["nas", *map(str, arguments)]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            cli.main()
        code = 0
    except SystemExit as ended:
        code = int(ended.code or 0) if not isinstance(ended.code, str) else 1
    finally:
        sys.argv = argv
    return code, err.getvalue()
