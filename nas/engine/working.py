"""What a run is working on, in <run>/working.json, for who looks from outside: the stage, done of total, rate, time left."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nas.base.files import read_json, write_json
from nas.contracts import Progress, UserError

FILE = "working.json"
EVERY = 2.0
"""Seconds between two notes."""


def noted(ticks: Iterator[Progress], folder: Path) -> Iterator[Progress]:
    """The same ticks, noted in the folder as they come. Work that ends leaves no note; work that is stopped leaves its last one and says so, work that is killed leaves it as it was."""
    path, stage, began, first, written = folder / FILE, "", 0.0, 0, 0.0
    note: dict[str, Any] = {}
    ended = False
    try:
        for tick in ticks:
            now = time.time()
            if tick.what != stage:
                stage, began, first, written = tick.what, now, tick.done, 0.0
            if now - written >= EVERY:
                done, passed = tick.done - first, now - began
                rate = done / passed if done > 0 and passed > 0 else None
                note = {
                    "stage": tick.what,
                    "done": tick.done,
                    "total": tick.total,
                    "values": {name: float(value) for name, value in tick.values.items()},
                    "per_second": rate,
                    "seconds_left": None if rate is None else (tick.total - tick.done) / rate,
                    "at": now,
                }
                write_json(path, note)
                written = now
            yield tick
        ended = True
    finally:
        if note and not ended:
            write_json(path, {**note, "stopped": True})
        close = getattr(ticks, "close", None)
        if close is not None:
            close()
    path.unlink(missing_ok=True)


def working_on(folder: Path) -> dict[str, Any] | None:
    """The last note, with its age in `seconds_ago`; None where nothing is under way, or was killed in the midst."""
    path = folder / FILE
    if not path.exists():
        return None
    try:
        found = read_json(path, "delete it")
        return {**found, "seconds_ago": max(0.0, time.time() - float(found["at"]))}
    except (UserError, KeyError, TypeError, ValueError):
        return None  # a note of the moment, gone or torn: nothing depends on it
