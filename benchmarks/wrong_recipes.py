"""Every recipe of the project with one wrong value, from types and ranges that none of them takes; what is legal is used."""

from __future__ import annotations

import math
import random
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import MISSING, fields, replace
from pathlib import Path
from typing import Any

from benchmarks.tiny_study import TINY, Formula
from evaluators.agreement import Agreement
from evaluators.captions import Captioned, TextsAlone
from evaluators.clip import ClipScore
from evaluators.conditions import Captions, Labels, Prompts
from evaluators.fashion import FashionMNIST
from evaluators.features import ExternalFeatures, SmallClassifier
from evaluators.frechet import Frechet, KernelDistance
from evaluators.images import Digits, ImageArray, ImageFolder, PhotoPatches
from evaluators.latency import Latency, Timed
from evaluators.proxies import (
    Additive,
    DenoisingLoss,
    TeacherDistance,
    TeacherFrechet,
    TeacherSimilarity,
    TrajectoryDistance,
)
from evaluators.sampling import DDIM, DDPM, DPMSolver
from evaluators.scoring import Scores
from nas.engine.session import open_session
from nas.searchers.ddsm import DDSM
from nas.searchers.evolution import Evolution
from nas.searchers.gates import Gates
from nas.searchers.knapsack import Knapsack
from nas.searchers.nevergrad import Nevergrad
from nas.searchers.optuna_sampler import OptunaSampler
from nas.searchers.proposers import Chat, Local
from nas.searchers.pruner import Pruner
from nas.searchers.relaxation import Relaxation
from nas.searchers.rounds import Rounds
from nas.searchers.routing import Routing
from nas.study import Study
from nas.testing import TableSpace
from search_spaces.codec import Autoencoder
from search_spaces.intervals import per_step, uniform
from search_spaces.noise import NoiseSchedule
from search_spaces.options import Options
from search_spaces.patterns import Every, Only, Subset
from search_spaces.stepwise import Stepwise
from search_spaces.supernet import Elastic
from search_spaces.text import ClassTable, TextEncoder
from search_spaces.training import Experts, Order, Sandwich, Stages, TrainAutoencoder

WRONG: tuple[Any, ...] = (
    -1,
    0,
    10**15,
    10**30,
    -(10**20),
    1.5,
    -0.5,
    math.nan,
    math.inf,
    "x",
    "",
    None,
    True,
    [],
    [1, "a"],
    (),
    {},
    {"a": 1},
    object(),
    b"x",
    [math.nan],
    1j,
)
"""What each field of each recipe is given in turn."""


CODEC = {"in_channels": 1, "latent_channels": 1, "channels": (4, 4), "norm_groups": 2, "steps": 2, "batch": 4}


def recipes() -> dict[str, tuple[type, dict[str, Any]]]:
    """Every recipe, with what it needs besides the wrong value."""
    net, steps, images = Elastic(TINY, widths=(0.25, 0.5, 1.0)), uniform(4), Digits()
    found: list[tuple[type, dict[str, Any]]] = [
        (Digits, {}), (PhotoPatches, {}), (ImageFolder, {"path": "nowhere", "size": (8, 8)}), (ImageArray, {"path": "nowhere.npz"}),
        (SmallClassifier, {}), (ExternalFeatures, {"path": "nowhere.pt", "name": "x"}), (Frechet, {"images": images}),
        (KernelDistance, {"images": images}), (TeacherFrechet, {"images": images}), (TeacherDistance, {"images": images}),
        (TeacherSimilarity, {"images": images}), (TrajectoryDistance, {"images": images}), (DenoisingLoss, {"images": images}),
        (Additive, {"base": Frechet(images), "intervals": (1, 1, 1, 1)}), (Timed, {"base": Frechet(images)}), (Latency, {}), (DDIM, {}), (DDPM, {}),
        (Sandwich, {"steps": 3}), (Stages, {"stages": (Sandwich(3),)}), (Experts, {"each": Sandwich(3)}), (Order, {}), (NoiseSchedule, {}),
        (Options, {}), (Every, {"period": 2}), (Only, {"computed": ("d0",)}), (Subset, {"kept": 2}),
        (Stepwise, {"net": net, "timesteps": steps, "intervals": per_step(steps)}), (Elastic, {"config": TINY, "widths": (0.25, 0.5, 1.0)}),
        (Evolution, {}), (DDSM, {}), (Knapsack, {}), (Rounds, {}), (Routing, {}), (Gates, {}), (Pruner, {}), (Relaxation, {}), (Nevergrad, {}),
        (DPMSolver, {}), (FashionMNIST, {"count": 16}), (Labels, {"images": images}), (Agreement, {"images": images, "conditions": Labels(images)}),
        (Scores, {"parts": (Frechet(images),)}), (Autoencoder, {"path": "nowhere"}), (TrainAutoencoder, CODEC),
        (TextEncoder, {"path": "nowhere"}), (ClassTable, {"path": "nowhere"}), (Captions, {"images": images, "encoder": TextEncoder("nowhere")}),
        (Prompts, {"path": "nowhere", "encoder": TextEncoder("nowhere")}), (Captioned, {"images": images, "names": tuple("abcdefghij")}),
        (TextsAlone, {"path": "nowhere", "size": 8}), (ClipScore, {"model": "nowhere", "conditions": Prompts("nowhere", TextEncoder("nowhere"))}),
        (OptunaSampler, {}), (Local, {}), (Chat, {"url": "http://127.0.0.1:9/v1", "model": "m"}),
    ]  # fmt: skip
    return {kind.__name__: (kind, needed) for kind, needed in found}


def runs_with(made: Any, folder: Path) -> None:
    """A small study with this part in its place, searched to its end."""
    shutil.rmtree(folder, ignore_errors=True)
    base: Any = Formula()
    table = Study(
        "faults",
        TableSpace(((1, 4, 9, 16),) * 4),
        base,
        Digits(),
        base,
        base,
        {"mine": Evolution()},
        limits={"macs_share": 0.6},
        trials=12,
    )
    net, steps, images = Elastic(TINY, widths=(0.25, 0.5, 1.0)), uniform(4), Digits()
    real = Study(
        "faults",
        Stepwise(net, steps, per_step(steps)),
        net,
        images,
        Sandwich(3, batch=8),
        Frechet(images, rungs=(8, 16)),
        {"mine": Evolution()},
        trials=3,
        verified=1,
    )
    kind = type(made)
    if hasattr(made, "start") and kind is not Gates:
        study = replace(table, searchers={"mine": made})
    elif kind in (Local, Chat):
        study = replace(table, searchers={"mine": Rounds(proposer=made)})
    elif kind in (TextEncoder, ClassTable):
        made.load(None, "cpu")
        return
    elif kind in (Captions, Prompts):
        made.load().of(0, 0, 2)
        return
    elif kind in (Captioned, TextsAlone):
        made.load()
        return
    elif kind in (Digits, PhotoPatches, ImageFolder, ImageArray, FashionMNIST):
        size, channels = (made.size, 1) if kind in (Digits, FashionMNIST) else (8, 3)
        wide = replace(
            net,
            config={
                **TINY,
                "sample_size": size if isinstance(size, int) else 8,
                "in_channels": channels,
                "out_channels": channels,
            },
        )
        study = replace(
            real,
            images=made,
            supernet=wide,
            space=Stepwise(wide, steps, per_step(steps)),
            evaluator=Frechet(made, rungs=(8, 16)),
        )
    elif kind in (SmallClassifier, ExternalFeatures):
        study = replace(real, evaluator=Frechet(images, features=made, rungs=(8, 16)))
    elif kind in (DDIM, DDPM, DPMSolver):
        study = replace(real, evaluator=Frechet(images, sampler=made, rungs=(8, 16)))
    elif kind in (Autoencoder, TrainAutoencoder):
        latent, enlarged = replace(net, codec=made), Digits(16)
        study = replace(
            real,
            images=enlarged,
            supernet=latent,
            space=Stepwise(latent, steps, per_step(steps)),
            evaluator=Frechet(enlarged, rungs=(8, 16)),
        )
    elif kind is Latency:
        study = replace(
            real,
            evaluator=Timed(
                Frechet(images, rungs=(8, 16)), replace(made, repeats=min(made.repeats, 2), batch=min(made.batch, 8))
            ),
        )
    elif hasattr(made, "metrics"):
        study = replace(real, evaluator=made, objectives=(made.metrics[0], "macs"))
    elif hasattr(made, "parts"):
        study = replace(real, training=made)
    elif kind is Elastic:
        study = replace(real, supernet=made, space=Stepwise(made, steps, per_step(steps)))
    elif kind is Stepwise:
        study = replace(real, space=made, supernet=made.net)
    elif kind is Options:
        study = replace(real, space=Stepwise(net, steps, per_step(steps), options=made))
    elif kind in (Every, Only, Subset):
        study = replace(real, space=Stepwise(net, steps, (4,), patterns=(Every(1), made)))
    elif kind is NoiseSchedule:
        noisy = replace(net, noise=made)
        few = tuple(t * made.timesteps // 1000 for t in (900, 500, 100))
        study = replace(real, supernet=noisy, space=Stepwise(noisy, few, per_step(few)))
    elif kind in (Relaxation, Pruner):
        return  # values that pass are settings of a gradient descent, which (b) runs
    else:
        return
    study.check()
    with open_session(study, folder) as session:
        for _ in session.prepare(threads=1):
            pass
        session.run(session.conductor("mine"))


def recipe_cases(draw: random.Random, folder: Path) -> Iterator[tuple[str, Callable[[], tuple[int, str]]]]:
    for name, (kind, needed) in recipes().items():
        for field in fields(kind):
            for number, value in enumerate(WRONG):

                def run(
                    kind: type = kind, needed: Mapping[str, Any] = needed, field: Any = field, value: Any = value
                ) -> tuple[int, str]:
                    made = kind(**{**needed, field.name: value})
                    if field.default is MISSING or value != field.default:
                        runs_with(made, folder / "recipe")
                    return 0, ""

                yield f"{name}.{field.name} = {number}: {value!r:.40}", run
