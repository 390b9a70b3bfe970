"""The rooms of the house: imports point down only."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import nas
from nas.contracts import UserError
from nas.study import MOVED, load_study

ROOT = Path(__file__).parent.parent


def _lint(folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from importlinter.cli import lint_imports_command as l; l()", "--no-cache"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


def test_imports_point_down_only() -> None:
    done = _lint(ROOT)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    ("file", "arrow"),
    [
        ("nas/genomes/genetics.py", "from nas.engine.ledger import Ledger"),
        ("search_spaces/networks/parts.py", "from search_spaces.networks.unet import Anatomy"),
        ("evaluators/sampling.py", "from search_spaces.stepwise import Stepwise"),
        ("nas/results/report.py", "import evaluators.images"),
    ],
)
def test_an_arrow_that_runs_up_is_found(file: str, arrow: str, tmp_path: Path) -> None:
    for package in ("nas", "search_spaces", "evaluators"):
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    with (tmp_path / file).open("a") as changed:
        changed.write(f"\n{arrow}\n")
    done = _lint(tmp_path)
    assert done.returncode != 0
    assert "BROKEN" in done.stdout


@pytest.mark.parametrize("old", MOVED)
def test_a_study_file_that_imports_from_a_former_place_is_told_the_present_one(old: str, tmp_path: Path) -> None:
    assert importlib.util.find_spec(MOVED[old]) is not None
    file = tmp_path / "study.py"
    file.write_text(f"import math\nfrom {old} import anything\n")
    with pytest.raises(UserError, match=rf"imports {old} in line 2, which is {MOVED[old]} now; change the import"):
        load_study(file)


@pytest.mark.parametrize("package", [False, True])
def test_each_study_imports_its_own_neighbours(package: bool, tmp_path: Path) -> None:
    """In one process, as in a notebook, whether their folders say that they are packages or not."""
    for name, trials in (("one", 7), ("two", 9)):
        (tmp_path / name / "kit").mkdir(parents=True)
        if package:
            (tmp_path / name / "kit" / "__init__.py").touch()
        (tmp_path / name / "kit" / "numbers.py").write_text(f"TRIALS = {trials}\n")
        (tmp_path / name / "parts.py").write_text("from kit.numbers import TRIALS\n")
        (tmp_path / name / "study.py").write_text(
            "from parts import TRIALS\nfrom tests.toy import toy_study\nstudy = toy_study(trials=TRIALS)\n"
        )
    assert [load_study(tmp_path / name / "study.py").trials for name in ("one", "two", "one")] == [7, 9, 7]


@pytest.mark.parametrize("first", ["import nas", "import evaluators.frechet", "import search_spaces.supernet"])
def test_a_cpu_is_used_well_whatever_is_imported_first(first: str) -> None:
    """Threads that wait sleep, or training on all cores slows down many times over as soon as anything else wants one; compiled kernels are kept. OpenMP
    and oneDNN read it once, when torch is imported and at the first kernel."""
    said = {"GOMP_SPINCOUNT": nas.LOOKS, "ONEDNN_PRIMITIVE_CACHE_CAPACITY": nas.KERNELS}
    without = {name: value for name, value in os.environ.items() if name not in said}
    code = f"""
import os, sys
class Seen:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            sys.exit(print(*map(os.environ.get, {list(said)})))  # before seconds of imports
sys.meta_path.insert(0, Seen())
{first}
import torch
"""
    done = subprocess.run([sys.executable, "-c", code], env=without, check=True, capture_output=True, text=True)
    assert done.stdout.split() == [str(count) for count in said.values()]
