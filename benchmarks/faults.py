"""What happens when things go wrong: wrong inputs of every kind, kills, damaged journals, a full disk.

(a) Generated wrong inputs, over recipes, commands and kinds of files: each is answered in one line with a non-zero exit, or it is legal and
runs. A line that calls itself a fault of the program counts as a traceback. (b) A study is searched, exported, reported and trained, killed
again and again on the way; its end is compared with that of an uninterrupted one. (c) Journals damaged in six ways: each is refused, or ends
as the whole one. (d) Disks of many sizes that run full; the same command goes on once there is room.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import math
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import MISSING, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.common import Benchmark, Target
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
from evaluators.sampling import DDIM, DDPM
from nas import cli
from nas.contracts import UserError
from nas.files import tensors_digest
from nas.journal import CHECK, JOURNAL
from nas.ledger import read_ledgers
from nas.proposers import Chat, Local
from nas.pruner import Pruner
from nas.relaxation import Relaxation
from nas.searchers.ddsm import DDSM
from nas.searchers.evolution import Evolution
from nas.searchers.gates import Gates
from nas.searchers.knapsack import Knapsack
from nas.searchers.nevergrad import Nevergrad
from nas.searchers.optuna_sampler import OptunaSampler
from nas.searchers.rounds import Rounds
from nas.searchers.routing import Routing
from nas.session import open_session
from nas.storage import open_storage
from nas.study import Study
from nas.testing import TableSpace, toy_score
from search_spaces.importance import Order
from search_spaces.intervals import per_step, uniform
from search_spaces.noise import NoiseSchedule
from search_spaces.options import Options
from search_spaces.patterns import Every, Only, Subset
from search_spaces.stepwise import Stepwise
from search_spaces.supernet import ElasticUNet
from search_spaces.training import Experts, Sandwich, Stages

SECONDS = 60
"""After which an input counts as endless."""

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
from nas.relaxation import Relaxation
from nas.study import Study
from search_spaces.intervals import per_step, uniform
from search_spaces.stepwise import Stepwise
from search_spaces.supernet import ElasticUNet
from search_spaces.training import Sandwich
from benchmarks.faults import TINY
images, steps = Digits(), uniform(4)
net = ElasticUNet(TINY, widths=(0.25, 0.5, 1.0))
study = Study(
    name="faults", space=Stepwise(net, steps, per_step(steps)), supernet=net, images=images,
    training=Sandwich(steps={steps}, batch=16, warmup=5, checkpoint_every=25),
    evaluator=Frechet(images, rungs=(32, 64)), limits={{"macs_share": 0.6}}, trials=10, verified=3,
    searchers={{"routing": Routing(warm_start=Relaxation(steps=60, batch=4)), "evolution": Evolution(population=6)}},
)
"""


# ------------------------------------------------------------------------------------------------------- wrong inputs


class EndlessError(BaseException):
    """An input took longer than it may."""


@contextlib.contextmanager
def bounded(seconds: int) -> Iterator[None]:
    def end(number: int, frame: Any) -> None:
        raise EndlessError

    signal.signal(signal.SIGALRM, end)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)


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


def verdict(run: Callable[[], tuple[int, str]]) -> tuple[str, str]:
    """ "clear", "legal", "traceback", "endless" or "unclear", and what was said."""
    try:
        with bounded(SECONDS):
            code, said = run()
    except EndlessError:
        return "endless", ""
    except UserError as error:
        return ("clear" if "\n" not in str(error) else "unclear"), str(error)
    except Exception as error:
        return "traceback", f"{type(error).__name__}: {error}"
    if "Traceback" in said or "fault of the program" in said:
        return "traceback", said
    if code == 0:
        return "legal", said
    told = [line for line in said.splitlines() if "error: " in line.lower() or line.startswith("│")]
    usage = code == 2 and told  # the command line's own words, in a frame
    one_line = len([line for line in said.splitlines() if line.startswith("error: ")]) == 1
    return ("clear" if one_line or usage else "unclear"), said


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


def recipes() -> dict[str, tuple[type, dict[str, Any]]]:
    """Every recipe, with what it needs besides the wrong value."""
    net, steps, images = ElasticUNet(TINY, widths=(0.25, 0.5, 1.0)), uniform(4), Digits()
    found: list[tuple[type, dict[str, Any]]] = [
        (Digits, {}), (PhotoPatches, {}), (ImageFolder, {"path": "nowhere", "size": (8, 8)}), (ImageArray, {"path": "nowhere.npz"}),
        (SmallClassifier, {}), (ExternalFeatures, {"path": "nowhere.pt", "name": "x"}), (Frechet, {"images": images}),
        (KernelDistance, {"images": images}), (TeacherFrechet, {"images": images}), (TeacherDistance, {"images": images}),
        (TeacherSimilarity, {"images": images}), (TrajectoryDistance, {"images": images}), (DenoisingLoss, {"images": images}),
        (Additive, {"base": Frechet(images), "intervals": (1, 1, 1, 1)}), (Timed, {"base": Frechet(images)}), (Latency, {}), (DDIM, {}), (DDPM, {}),
        (Sandwich, {"steps": 3}), (Stages, {"stages": (Sandwich(3),)}), (Experts, {"each": Sandwich(3)}), (Order, {}), (NoiseSchedule, {}),
        (Options, {}), (Every, {"period": 2}), (Only, {"computed": ("d0",)}), (Subset, {"kept": 2}),
        (Stepwise, {"net": net, "timesteps": steps, "intervals": per_step(steps)}), (ElasticUNet, {"config": TINY, "widths": (0.25, 0.5, 1.0)}),
        (Evolution, {}), (DDSM, {}), (Knapsack, {}), (Rounds, {}), (Routing, {}), (Gates, {}), (Pruner, {}), (Relaxation, {}), (Nevergrad, {}),
        (OptunaSampler, {}), (Local, {}), (Chat, {"url": "http://127.0.0.1:9/v1", "model": "m"}),
    ]  # fmt: skip
    return {kind.__name__: (kind, needed) for kind, needed in found}


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
    net, steps, images = ElasticUNet(TINY, widths=(0.25, 0.5, 1.0)), uniform(4), Digits()
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
    elif kind in (Digits, PhotoPatches, ImageFolder, ImageArray):
        size, channels = (made.size, 1) if kind is Digits else (8, 3)
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
    elif kind in (DDIM, DDPM):
        study = replace(real, evaluator=Frechet(images, sampler=made, rungs=(8, 16)))
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
    elif kind is ElasticUNet:
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


def command_cases(folder: Path, run: Path, exported: Path) -> Iterator[tuple[str, Callable[[], tuple[int, str]]]]:
    study = folder / "study.py"
    lines: list[tuple[object, ...]] = [
        ("run",), ("run", "nowhere.py"), ("run", folder), ("run", study, "--searcher", "nobody"), ("run", study, "--searcher", ""),
        ("run", study, "--trials", "0"), ("run", study, "--trials", "x"), ("run", study, "--seed", "-1"), ("run", study, "--seed", 2**40),
        ("run", study, "--seeds", "0"), ("run", study, "--device", "tpu"), ("run", study, "--device", "cuda:99"), ("run", study, "--threads", "-2"),
        ("run", study, "--workers", "-1"), ("run", study, "--gpus-per-worker", "-1"), ("run", study, "--ray-address", "127.0.0.1:9"),
        ("run", study, "--ray-address", "nowhere"), ("run", study, "--storage", "nonsense"), ("run", study, "--storage", "postgresql://u:p@127.0.0.1:1/x"),
        ("run", study, "--storage", "sqlite:////nowhere/x.db"), ("run", study, "--out", "/proc/x"), ("run", study, "--out", study),
        ("run", study, "--out", "x" * 5000), ("run", study, "--throughput", "0"), ("run", study, "--unknown"), ("status",), ("status", "nowhere"),
        ("status", folder), ("status", study), ("compare", "nowhere"), ("compare", folder), ("report", study, "--out", "nowhere"), ("report", "nowhere.py"),
        ("repair", "nowhere"), ("repair", folder), ("dashboard", "nowhere"), ("dashboard", run, "--port", "0"), ("dashboard", run, "--port", "99999999"),
        ("audit", study, "--out", run), ("audit", study, "--schedules", "1"), ("intervals", study, "--grid", "1"), ("intervals", study, "--share", "7"),
        ("intervals", study, "--count", "0"), ("export", study), ("export", study, "--to", folder / "x"), ("export", study, "--to", run, "--within", "macs_share=0.5", "--out", run),
        ("train", "nowhere", "--images", "digits"), ("train", run, "--images", "digits"), ("train", exported), ("train", exported, "--images", "nowhere"),
        ("train", exported, "--images", "digits:9"), ("train", exported, "--images", "digits:x"), ("train", exported, "--images", study),
        ("train", exported, "--images", "digits", "--steps", "0"), ("train", exported, "--images", "digits", "--distillation", "2"),
        ("train", exported, "--images", "digits", "--precision", "int8"), ("train", exported, "--images", "digits", "--study", "nowhere.py"),
        ("train", exported, "--images", "digits", "--study", study, "--out", "nowhere"), ("train", exported, "--images", "digits", "--device", "abacus"), ("nonsense",),
    ]  # fmt: skip
    for within in (
        "macs_share",
        "macs_share=",
        "macs_share=x",
        "=0.5",
        "speed=3",
        "macs_share=nan",
        "macs_share=-1",
        "macs_share=1e-9",
        "macs=0",
        "latency_ms=1",
    ):
        lines += [
            ("export", study, "--to", folder / "x", "--within", within, "--out", run),
            ("sample", study, "--to", folder / "x.png", "--within", within, "--out", run),
        ]
    for trial in ("-1", "999", "x", "1.5"):
        lines += [
            ("export", study, "--to", folder / "x", "--trial", trial, "--out", run),
            ("sample", study, "--to", folder / "x.png", "--trial", trial, "--out", run),
        ]
    for to in ("x", "x.jpg", "", "/proc/x.png"):
        lines.append(("sample", study, "--to", to, "--within", "macs_share=0.5", "--out", run))
    for count in ("0", "-1", "x"):
        lines.append(
            ("sample", study, "--to", folder / "x.png", "--within", "macs_share=0.5", "--out", run, "--count", count)
        )
    for line in lines:

        def given(line: tuple[object, ...] = line) -> tuple[int, str]:
            return command(*line)

        yield f"nas {' '.join(map(str, line))}"[:120], given


def spoiled(content: bytes, how: str, draw: random.Random) -> bytes:
    place = draw.randrange(max(len(content), 1))
    flipped = bytearray(content)
    if flipped:
        flipped[place] ^= 1 << draw.randrange(8)
    return {
        "cut": content[:place],
        "empty": b"",
        "flipped": bytes(flipped),
        "random": draw.randbytes(len(content) or 9),
        "nested": b"[" * 100_000,
        "number": b"7",
        "null": b"null",
        "text": b'"x"',
        "list": b"[1, 2]",
        "object": b"{}",
    }[how]


def file_cases(
    draw: random.Random, folder: Path, run: Path, exported: Path
) -> Iterator[tuple[str, Callable[[], tuple[int, str]]]]:
    kinds = ("cut", "empty", "flipped", "random", "nested", "number", "null", "text", "list", "object")
    study = folder / "study.py"
    for name in (
        f"{where}/{file}"
        for where in ("",)
        for file in (
            "train.json",
            "schedule.json",
            "model_index.json",
            "provenance.json",
            "unet_0/config.json",
            "unet_0/diffusion_pytorch_model.safetensors",
        )
    ):
        for how, _ in itertools.product(kinds, range(3)):

            def damaged(name: str = name, how: str = how) -> tuple[int, str]:
                copy = folder / "exported-copy"
                shutil.rmtree(copy, ignore_errors=True)
                shutil.copytree(exported, copy)
                path = copy / name.lstrip("/")
                path.write_bytes(spoiled(path.read_bytes(), how, draw))
                return command("train", copy, "--images", "digits", "--steps", 2, "--batch", 2, "-q")

            yield f"exported {name} {how}", damaged
    for name, what in (
        ("study.json", "status"),
        (JOURNAL, "status"),
        (CHECK, "status"),
        ("supernet/weights.safetensors", "export"),
        ("features/classifier.safetensors", "export"),
    ):
        for how, _ in itertools.product(kinds, range(2)):

            def hurt(name: str = name, how: str = how, what: str = what) -> tuple[int, str]:
                copy = folder / "run-copy"
                shutil.rmtree(copy, ignore_errors=True)
                shutil.copytree(run, copy)
                (copy / name).write_bytes(spoiled((copy / name).read_bytes(), how, draw))
                if what == "status":
                    return command("status", copy)
                shutil.rmtree(folder / "to", ignore_errors=True)
                return command("export", study, "--within", "macs_share=0.6", "--to", folder / "to", "--out", copy)

            yield f"run {name} {how}", hurt
    picture = io.BytesIO()
    Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8)).save(picture, "PNG")
    for how, _ in itertools.product(("cut", "empty", "flipped", "random"), range(6)):

        def pictures(how: str = how) -> tuple[int, str]:
            where = folder / "pictures"
            shutil.rmtree(where, ignore_errors=True)
            where.mkdir()
            for number in range(16):
                (where / f"{number}.png").write_bytes(
                    picture.getvalue() if number else spoiled(picture.getvalue(), how, draw)
                )
            return command(
                "train", exported_fresh(folder, exported), "--images", where, "--steps", 1, "--batch", 2, "-q"
            )

        yield f"picture {how}", pictures
    modes = ("1", "L", "P", "LA", "RGB", "RGBA", "CMYK", "I;16", "I", "F", "YCbCr", "HSV")
    for mode, suffix in itertools.product(modes, (".png", ".tif", ".gif", ".bmp", ".webp")):

        def of_mode(mode: str = mode, suffix: str = suffix) -> tuple[int, str]:
            where = folder / "pictures"
            shutil.rmtree(where, ignore_errors=True)
            where.mkdir()
            for number in range(16):
                try:
                    Image.new(mode, (8, 8)).save(where / f"{number}{suffix}")
                except (OSError, ValueError, KeyError):
                    return 1, "error: this kind of file does not exist"
            ImageFolder(str(where), 8, channels=1).load()
            return 0, ""

        yield f"picture of mode {mode} as {suffix}", of_mode
    texts = (
        "",
        "study = 3",
        "x =",
        "import nothing_like_this",
        "raise SystemExit(3)",
        "study = Study()",
        "1/0",
        "def f(:",
        "\x00",
        "import os; os._exit",
        "study = None",
        "print(open('nowhere').read())",
        "from nas.study import Study\nstudy = Study(*range(8))",
    )
    for number, text in enumerate(texts):

        def study_of(text: str = text) -> tuple[int, str]:
            (folder / "odd.py").write_text(text)
            return command("run", folder / "odd.py", "--out", folder / "odd-run")

        yield f"study file {number}", study_of
    good = {"mu": np.zeros(64), "sigma": np.eye(64)}
    changes: dict[str, Any] = {
        "asymmetric": {"sigma": np.eye(64) + np.triu(np.ones((64, 64)), 1)}, "nan": {"mu": np.full(64, np.nan)}, "negative": {"sigma": -np.eye(64)},
        "short": {"mu": np.zeros(8), "sigma": np.eye(8)}, "flat": {"sigma": np.ones(64)}, "text": {"mu": np.array(["a"] * 64)},
        "object": {"mu": np.array([{}] * 64)}, "empty": {"mu": np.zeros(0), "sigma": np.zeros((0, 0))}, "complex": {"sigma": 1j * np.eye(64)}, "huge": {"sigma": np.full((64, 64), np.inf)},
    }  # fmt: skip
    for name, change in changes.items():

        def statistics(change: Any = change) -> tuple[int, str]:
            np.savez(folder / "statistics.npz", **{**good, **change})
            Frechet(Digits(), reference=str(folder / "statistics.npz")).check()
            return 0, ""

        yield f"statistics {name}", statistics


def exported_fresh(folder: Path, exported: Path) -> Path:
    copy = folder / "exported-fresh"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(exported, copy)
    return copy


def wrong_inputs(folder: Path, most: int) -> dict[str, Any]:
    """A seeded sample of all cases of recipes, and all of the others."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    draw = random.Random(0)
    (folder / "study.py").write_text(STUDY.format(steps=5))
    run, exported = folder / "run", folder / "exported"
    assert command("run", folder / "study.py", "--searcher", "evolution", "--out", run, "-q")[0] == 0
    assert command("export", folder / "study.py", "--within", "macs_share=0.6", "--to", exported, "--out", run)[0] == 0
    of_recipes = list(recipe_cases(draw, folder))
    others = [*command_cases(folder, run, exported), *file_cases(draw, folder, run, exported)]
    kept = draw.sample(of_recipes, min(len(of_recipes), max(most - len(others), most // 2)))
    others = others if most >= len(others) else draw.sample(others, most // 2)
    before = Path.cwd()
    os.chdir(folder)  # what is written to a relative path is written here
    counts: Counter[str] = Counter()
    told: list[list[str]] = []
    try:
        for name, case in (*kept, *others):
            found, said = verdict(case)
            counts[found] += 1
            if found not in ("clear", "legal"):
                told.append([name, found, said[-400:]])
    finally:
        os.chdir(before)
    total = sum(counts.values())
    return {"inputs": total, **dict(counts), "clear_share": (counts["clear"] + counts["legal"]) / total, "told": told}


# --------------------------------------------------------------------------------------------------------------- kills


def journey(folder: Path) -> list[list[str]]:
    """The commands of one study, from nothing to trained networks."""
    study, run, to = (str(folder / name) for name in ("study.py", "run", "exported"))
    return [
        ["run", study, "--searcher", "routing,evolution", "--out", run, "--threads", "1", "-q"],
        ["export", study, "--within", "macs_share=0.6", "--to", to, "--out", run],
        ["report", study, "--out", run, "-q"],
        ["train", to, "--images", "digits", "--steps", "60", "--batch", "8", "--study", study, "--out", run, "-q"],
    ]


def outcome(folder: Path) -> dict[str, Any]:
    """What a journey has come to, without times."""
    ledgers = {
        info.name: [
            (
                t.number,
                t.genome,
                t.rung,
                t.status,
                t.score and dict(t.score.values),
                {k: v for k, v in t.origin.items() if k != "weights"},
            )
            for t in trials
        ]
        for info, trials in read_ledgers(open_storage(folder / "run"))
    }
    weights = {
        str(path.relative_to(folder)): tensors_digest(path)
        for where in ("run/supernet", "run/features", "run/learned", "exported")
        for path in sorted((folder / where).rglob("*.safetensors"))
        if not path.name.startswith(".") and "snapshot" not in path.name
    }
    return {"ledgers": ledgers, "weights": weights, "report": (folder / "run" / "report" / "index.html").exists()}


def killed(
    folder: Path, kills: int, number: signal.Signals, seed: int, times: list[tuple[float, float]]
) -> dict[str, Any]:
    """The journey, stopped about so many times at moments spread over its commands; each command is given again until it ends by itself.

    `times`: of each command, the seconds from nothing, and of those the seconds that it also takes when all is done.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (folder / "study.py").write_text(STUDY.format(steps=120))
    draw = random.Random(seed)
    whole = sum(seconds for seconds, _ in times)
    happened, left, wrong = 0, 0.0, []
    for arguments, (seconds, idle) in zip(journey(folder), times, strict=True):
        left += kills * seconds / whole
        step = 2 * max(seconds - idle, 0.1 * seconds) / max(round(left), 1)
        while left >= 0.5:
            run = subprocess.Popen(
                [sys.executable, "-m", "nas.cli", *arguments],
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
            )
            # The imports take a while in which there is nothing to lose.
            time.sleep(0.8 * idle + draw.uniform(0, step))
            run.send_signal(number)
            _, said = run.communicate()
            if run.returncode == 0 or "is not empty" in said:
                break
            happened, left = happened + 1, left - 1
            expected = -signal.SIGKILL if number == signal.SIGKILL else 143
            if run.returncode not in (expected, -number) or "Traceback" in said:
                wrong.append([arguments[0], run.returncode, said[-300:]])
        end = subprocess.run([sys.executable, "-m", "nas.cli", *arguments], capture_output=True, text=True, check=False)
        already = arguments[0] == "export" and "is not empty" in end.stderr
        if end.returncode and not already:
            wrong.append([arguments[0], end.returncode, end.stderr[-400:]])
            break
    return {"kills": happened, "wrong": wrong, **outcome(folder)}


def uninterrupted(folder: Path) -> dict[str, Any]:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (folder / "study.py").write_text(STUDY.format(steps=120))
    times = []
    for arguments in journey(folder):
        both = []
        for again in (False, True):
            started = time.monotonic()
            command_line = [sys.executable, "-m", "nas.cli", *arguments]
            subprocess.run(command_line, check=not again, capture_output=True)
            both.append(time.monotonic() - started)
        times.append((both[0], min(both)))
    return {"times": times, "replicates": outcome(folder)}


def kills(bench: Benchmark) -> dict[str, Any]:
    """Journeys until so many stops have happened, two side by side."""
    expected = bench.row("uninterrupted", lambda: json.loads(json.dumps(uninterrupted(bench.folder / "whole"))))
    rows = []
    for number, wanted in (
        ((signal.SIGKILL, 2), (signal.SIGTERM, 2)) if bench.quick else ((signal.SIGKILL, 100), (signal.SIGTERM, 40))
    ):
        done: list[dict[str, Any]] = []
        while (missing := wanted - sum(row["kills"] for row in done)) > 0 and len(done) < 20:
            seeds = [len(done), len(done) + 1] if missing > 20 else [len(done)]

            def one(seed: int, number: signal.Signals = number, count: int = min(missing, 20)) -> dict[str, Any]:
                found = killed(bench.folder / f"{number.name}{seed}", count, number, seed, expected["times"])
                found = json.loads(json.dumps(found))
                equal = all(found[key] == value for key, value in expected["replicates"].items())
                return {"signal": number.name, "kills": found["kills"], "equal": equal, "wrong": found["wrong"]}

            missed = [seed for seed in seeds if not bench.has(f"{number.name} {seed}")]
            with ThreadPoolExecutor(2) as pool:
                for seed, row in zip(missed, pool.map(one, missed), strict=True):
                    bench.reckon(f"{number.name} {seed}", row)
            done += [bench.kept(f"{number.name} {seed}") for seed in seeds]
        rows += done
    return {
        "kills": sum(row["kills"] for row in rows),
        "by signal": {
            name: sum(row["kills"] for row in rows if row["signal"] == name) for name in ("SIGKILL", "SIGTERM")
        },
        "survived": float(np.mean([row["equal"] and not row["wrong"] for row in rows])),
    }


# ------------------------------------------------------------------------------------------------------------- journals


def damages(folder: Path, count: int) -> dict[str, Any]:
    base: Any = Formula()
    study = Study(
        "faults",
        TableSpace(((1, 4, 9, 16),) * 5),
        base,
        Digits(),
        base,
        base,
        {"evolution": Evolution(population=8)},
        limits={"macs_share": 0.6},
        trials=30,
    )

    def search(where: Path) -> list[Any]:
        with open_session(study, where) as session:
            for name in ("uniform", "evolution"):
                session.run(session.conductor(name))
            return [
                (info.name, [(t.genome, t.status, t.score and dict(t.score.values)) for t in trials])
                for info, trials in read_ledgers(session.storage)
            ]

    whole = folder / "whole"
    shutil.rmtree(folder, ignore_errors=True)
    before = search(whole)
    content = (whole / JOURNAL).read_bytes()
    lines = content.splitlines(keepends=True)
    draw, counts, silent = random.Random(0), Counter[str](), []
    kinds = ("cut", "lost", "doubled", "joined", "flipped", "foreign")
    for number in range(count):
        kind, place, made = kinds[number % len(kinds)], draw.randrange(len(lines)), list(lines)
        if kind == "lost":
            del made[place]
        elif kind == "doubled":
            made.insert(draw.randrange(len(lines) + 1), made[place])
        elif kind == "joined":
            made[place] = made[place].rstrip(b"\n")
        elif kind == "flipped":
            line = bytearray(made[place])
            line[draw.randrange(len(line))] ^= 1 << draw.randrange(8)
            made[place] = bytes(line)
        elif kind == "foreign":
            made.insert(place, b'{"op_code":6,"worker_id":"x","trial_id":3,"state":3,"values":null}\n')
        after = b"".join(made) if kind != "cut" else content[: draw.randrange(len(content))]
        copy = folder / "copy"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(whole, copy)
        (copy / JOURNAL).write_bytes(after)
        try:
            found = search(copy)
        except UserError as error:
            named = "journal" in str(error) and "nas repair" in str(error)
            counts["refused by line" if named and " line " in str(error) else "refused"] += 1
            code, _said = command("repair", copy)
            counts["repaired and searched on" if code == 0 and search(copy) else "not repaired"] += 1
            continue
        counts["goes on to the same end" if found == before else "silently different"] += 1
        if found != before:
            silent.append([kind, place])
    return {"damages": count, **dict(counts), "silent": counts["silently different"], "which": silent}


# ------------------------------------------------------------------------------------------------------------ full disks


@contextlib.contextmanager
def small_disk(size: int) -> Iterator[tuple[Path, bool]]:
    """A file system of so many bytes, where this user may mount one; else a folder whose files may not grow beyond."""
    with tempfile.TemporaryDirectory(prefix="nas-disk-") as temporary:
        mounted = (
            subprocess.run(
                ["mount", "-t", "tmpfs", "-o", f"size={size}", "none", temporary], capture_output=True, check=False
            ).returncode
            == 0
        )
        try:
            yield Path(temporary), mounted
        finally:
            if mounted:
                subprocess.run(["umount", temporary], check=False)


def full_disks(levels: list[int]) -> dict[str, Any]:
    rows = []
    for size in levels:
        with small_disk(size) as (disk, mounted), tempfile.TemporaryDirectory() as elsewhere:
            study = Path(elsewhere) / "study.py"
            study.write_text(STUDY.format(steps=30))

            def limited(size: int = size) -> None:
                signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
                resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

            arguments = [
                sys.executable,
                "-m",
                "nas.cli",
                "run",
                str(study),
                "--searcher",
                "evolution",
                "--out",
                str(disk / "run"),
                "-q",
            ]
            done = subprocess.run(
                arguments, capture_output=True, text=True, check=False, preexec_fn=None if mounted else limited
            )
            clear = done.returncode == 0 or (
                done.returncode == 1
                and "Traceback" not in done.stderr
                and len([line for line in done.stderr.splitlines() if line.startswith("error: ")]) == 1
                and "fault of" not in done.stderr
            )
            if mounted:
                subprocess.run(["mount", "-o", f"remount,size={2**28}", str(disk)], check=True)
            again = subprocess.run(arguments, capture_output=True, text=True, check=False)
            rows.append(
                {
                    "bytes": size,
                    "mounted": mounted,
                    "rc": done.returncode,
                    "clear": clear,
                    "went_on": again.returncode == 0,
                    "said": done.stderr.strip()[-200:],
                }
            )
    return {"levels": rows, "clear": sum(row["clear"] for row in rows), "went_on": sum(row["went_on"] for row in rows)}


def main() -> None:
    bench = Benchmark("faults", __doc__ or "", ("nas", "evaluators", "search_spaces"))
    inputs = bench.row("wrong inputs", lambda: wrong_inputs(bench.folder / "inputs", 120 if bench.quick else 1400))
    journals = bench.row("journals", lambda: damages(bench.folder / "journals", 12 if bench.quick else 200))
    levels = [2**14, 2**18] if bench.quick else [int(2 ** (12 + 0.55 * i)) for i in range(20)]
    disks = bench.row("full disks", lambda: full_disks(levels))
    stopped = bench.reckon("kills", kills(bench))
    bench.finish(
        [
            Target(
                "bad_inputs_clear",
                f"share of {inputs['inputs']:,} wrong inputs answered in one line, or legal and run",
                0.995,
                inputs["clear_share"],
                at_most=False,
            ),
            Target(
                "tracebacks", "wrong inputs that end in a traceback, or in words for one", 0, inputs.get("traceback", 0)
            ),
            Target("endless_inputs", "wrong inputs that do not end within a minute", 0, inputs.get("endless", 0)),
            Target(
                "kills_survived",
                f"share of studies, stopped {stopped['kills']} times in all, that end as the uninterrupted one",
                1.0,
                stopped["survived"],
                at_most=False,
            ),
            Target(
                "silent_damage",
                f"of {journals['damages']} damaged journals, those that end otherwise without a word",
                0,
                journals["silent"],
            ),
            Target(
                "full_disks_clear",
                f"of {len(levels)} full disks, those told in one line and gone on from",
                len(levels),
                min(disks["clear"], disks["went_on"]),
                at_most=False,
            ),
        ]
    )


if __name__ == "__main__":
    main()
