"""Wrong inputs of every kind, each given to the command that takes it: recipes, options, and files cut, flipped, or of another kind."""

from __future__ import annotations

import contextlib
import io
import itertools
import os
import random
import shutil
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.tiny_study import STUDY, command
from benchmarks.wrong_recipes import recipe_cases
from evaluators.frechet import Frechet
from evaluators.images import Digits, ImageFolder
from nas.contracts import UserError
from nas.engine.journal import CHECK, JOURNAL

SECONDS = 60
"""After which an input counts as endless."""


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
