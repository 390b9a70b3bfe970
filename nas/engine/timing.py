"""Measures what the calls of a limit on time take, once for a run folder."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nas.base.files import write_json
from nas.contracts import LoadedSupernet, Progress, SearchSpace, UserError
from nas.genomes.timed import FILE, Timing, calls, key, read_times


def measure(space: SearchSpace, timing: Timing, net: LoadedSupernet, folder: Path) -> Iterator[Progress]:
    """Measures what <folder>/times.json lacks. Times of one run are those of one device."""
    path = folder / FILE
    device = timing.timed_on(net)
    kept: dict[str, Any] = {"device": device, "milliseconds": {}}
    if path.exists():
        kept = read_times(path)
    if kept["device"] != device:
        raise UserError(
            f"{path} holds times of {kept['device']}, this is {device}; go on as they were taken, or limit searches by new times in another --out"
        )
    missing = [step for step in calls(space) if key(step) not in kept["milliseconds"]]
    for number, step in enumerate(missing):
        yield Progress("timing calls", number, len(missing))
        kept["milliseconds"][key(step)] = timing.milliseconds(step, net, folder)
        write_json(path, kept, indent=1)
    yield Progress("timing calls", len(missing), len(missing))
