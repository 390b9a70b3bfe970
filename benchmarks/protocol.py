"""Protocols of benchmarks, committed in `protocols/` before their rows, and the check that they were."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterable
from pathlib import Path

from nas.contracts import UserError
from nas.evidence.protocol import Protocol

PROTOCOLS = Path(__file__).parent / "protocols"
BEFORE, UNKNOWN = "written before its rows", "order not verifiable"


def committed(name: str) -> Protocol:
    return Protocol.read(PROTOCOLS / f"{name}.json")


def order(name: str, digest: str, commits: Iterable[str], file: Path | None = None) -> str:
    """In words, whether every commit that made rows held this very protocol. Not so where a commit cannot be found, had changed files, or where there are no
    rows. `file`: the protocol's, by default the one of that name in `protocols/`."""
    file = file or PROTOCOLS / f"{name}.json"
    found = list(dict.fromkeys(commits))
    return BEFORE if found and all(_held(file, digest, commit) for commit in found) else UNKNOWN


def _held(file: Path, digest: str, commit: str) -> bool:
    if not commit or commit.endswith("+") or commit == "unknown":
        return False
    done = subprocess.run(
        ["git", "show", f"{commit}:./{file.name}"], cwd=file.parent, check=False, capture_output=True, text=True
    )
    try:
        return done.returncode == 0 and Protocol.from_json(json.loads(done.stdout), file.name).digest == digest
    except (ValueError, UserError):
        return False
