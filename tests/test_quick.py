"""Every benchmark runs to its end at small sizes, from nothing: minutes each, by `make test-all` alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SCRIPTS = sorted(path.stem for path in (ROOT / "benchmarks").glob("*.py") if "__main__" in path.read_text())
OTHERS = {"mutation", "table"}
"""The first has tests of its own as its subject, the second measures nothing."""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working folder for them all: what several need is trained once."""
    folder = tmp_path_factory.mktemp("quick")
    (folder / "studies").symlink_to(ROOT / "studies")
    return folder


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("name", [name for name in SCRIPTS if name not in OTHERS])
def test_a_benchmark_ends_with_its_targets(name: str, place: Path) -> None:
    before = {path: path.read_bytes() for path in (ROOT / "benchmarks" / "results").iterdir()}
    done = subprocess.run(
        [sys.executable, "-m", f"benchmarks.{name}", "--quick"],
        cwd=place,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    result = json.loads(done.stdout)
    assert result["name"] == name
    assert result["rows"]
    assert result["targets"] or name == "gates"  # it compares, and aims at nothing
    # Some figures are none where their condition is not met, and say so.
    assert all(target["measured"] is not None or "None where" in target["what"] for target in result["targets"])
    assert {path: path.read_bytes() for path in (ROOT / "benchmarks" / "results").iterdir()} == before
