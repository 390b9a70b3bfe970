"""Jobs for processes of their own, which import this alone."""

from __future__ import annotations

import time
from pathlib import Path


def measured_or_not(number: int, place: Path) -> dict[str, int]:
    """The first fails once the second has begun, the second ends well after."""
    (place / str(number)).touch()
    while not (place / "1").exists():
        time.sleep(0.01)
    if number == 0:
        raise ValueError("no such row")
    time.sleep(0.5)
    return {"number": number}
