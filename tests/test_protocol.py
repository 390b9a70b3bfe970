"""Protocols say all beforehand, and that they came first is checked against the history."""

from __future__ import annotations

import json
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import protocol as benchmarks_protocol
from nas.contracts import UserError
from nas.evidence.protocol import Protocol

WHOLE = Protocol(
    name="whole",
    question="Is it better?",
    arms={"ours": "the best found", "theirs": "as published"},
    reference="theirs",
    seeds=(3, 4),
    outcome="FD",
    margin=0.05,
    test="one-sided, 5 %",
    stopping="after all seeds",
    settings={"samples": [32, 256]},
)


@pytest.mark.parametrize("margin", [0.05, 1])
def test_a_protocol_is_read_as_it_was_written(tmp_path: Path, margin: float) -> None:
    written = replace(WHOLE, margin=margin)
    written.write(tmp_path / "whole.json")
    read = Protocol.read(tmp_path / "whole.json")
    assert read == written
    assert read.digest == written.digest


@pytest.mark.parametrize("change", [{"seeds": (3, 4, 5)}, {"margin": 0.06}, {"settings": {"samples": [32, 128]}}])
def test_every_change_shows_in_the_digest(change: dict[str, object]) -> None:
    assert replace(WHOLE, **change).digest != WHOLE.digest  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "change",
    [{"question": ""}, {"seeds": ()}, {"seeds": (3, 3)}, {"margin": -0.1}, {"margin": float("nan")}, {"stopping": ""}],
)
def test_what_is_not_said_beforehand_is_refused(change: dict[str, object]) -> None:
    with pytest.raises(UserError, match="protocol whole"):
        replace(WHOLE, **change)  # type: ignore[arg-type]


def test_a_file_that_is_no_protocol_is_refused_in_words(tmp_path: Path) -> None:
    path = tmp_path / "whole.json"
    WHOLE.write(path)
    told = json.loads(path.read_text())
    del told["margin"]
    path.write_text(json.dumps({**told, "winner": "ours"}))
    with pytest.raises(UserError, match="it says winner; it lacks margin"):
        Protocol.read(path)


def _git(folder: Path, *arguments: str) -> str:
    command = ["git", "-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false", *arguments]
    return subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True).stdout.strip()


def test_only_rows_of_commits_that_hold_the_protocol_count_as_later(tmp_path: Path) -> None:
    _git(tmp_path, "init", "-q")
    _git(tmp_path, "commit", "-q", "--allow-empty", "-m", "before")
    before = _git(tmp_path, "rev-parse", "HEAD")
    path = tmp_path / "protocols" / "whole.json"
    path.parent.mkdir()
    WHOLE.write(path)
    _git(tmp_path, "add", "."), _git(tmp_path, "commit", "-q", "-m", "protocol")
    written = _git(tmp_path, "rev-parse", "HEAD")
    replace(WHOLE, margin=0.1).write(path)
    _git(tmp_path, "commit", "-q", "-a", "-m", "changed after a look")
    changed = _git(tmp_path, "rev-parse", "HEAD")

    def order(*commits: str) -> str:
        return benchmarks_protocol.order("whole", WHOLE.digest, commits, path)

    assert order(written) == benchmarks_protocol.BEFORE
    for commits in ((before,), (changed,), (written, before), (written + "+",), ("unknown",), ("0" * 40,), ()):
        assert order(*commits) == benchmarks_protocol.UNKNOWN


def test_committed_protocols_are_whole() -> None:
    for path in benchmarks_protocol.PROTOCOLS.glob("*.json"):
        assert benchmarks_protocol.committed(path.stem).name == path.stem
