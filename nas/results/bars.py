"""A schedule as a small picture that stands in a page or beside a README: a bar for each step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from nas.contracts import LoadedSupernet, Schedule, Step

WIDTH, HEIGHT, LEFT, TOP = 640, 120, 40, 14


@dataclass(frozen=True)
class Bar:
    """A step: its share of the full network's multiply-adds, `words` for who points at it, and whether it reuses blocks or is guided."""

    timestep: int
    share: float
    words: str
    reuses: bool = False
    guided: bool = False


def bars_of(schedule: Schedule, net: LoadedSupernet) -> list[Bar]:
    full = net.macs(Step(schedule.steps[0].timestep, net.full_arch))
    found = []
    for step in schedule.steps:
        share = net.macs(step) / full
        words = f"t = {step.timestep}: {share:.0%} of the full network's multiply-adds"
        words += f", reuses {', '.join(step.reuse)}" if step.reuse else ""
        words += f", guided by {step.guidance.scale:g}" if step.guidance else ""
        found.append(Bar(step.timestep, share, words, bool(step.reuse), step.guidance is not None))
    return found


def drawn(bars: Sequence[Bar], ink: str = "#334155", ground: str = "#f8fafc") -> str:
    """An SVG: bars as high as their shares; paler where blocks are reused, ringed where a step is guided."""
    each, largest = WIDTH / len(bars), max(1.0, *(bar.share for bar in bars))
    told = []
    for place, bar in enumerate(bars):
        tall = max(1.0, bar.share / largest * HEIGHT)
        x, y, wide = LEFT + place * each + 1, TOP + HEIGHT - tall, max(1.0, each - 3)
        ring = ' stroke="#1e3a8a" stroke-width="2"' if bar.guided else ""
        told.append(
            f'<rect x="{x:.1f}" y="{y:.1f}" width="{wide:.1f}" height="{tall:.1f}" fill="{"#93c5fd" if bar.reuses else "#3b82f6"}"{ring}>'
            f"<title>{bar.words}</title></rect>"
        )
    back = f'<rect width="100%" height="100%" fill="{ground}"/>' if ground else ""
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH + LEFT + 20} {HEIGHT + 44}" font-family="sans-serif" font-size="12" fill="{ink}">'
        f'{back}<text x="4" y="{TOP + 6}">{largest:.0%}</text><text x="18" y="{TOP + HEIGHT}">0</text>{"".join(told)}'
        f'<text x="{LEFT}" y="{TOP + HEIGHT + 20}">t = {bars[0].timestep}, noise</text>'
        f'<text x="{WIDTH + LEFT}" y="{TOP + HEIGHT + 20}" text-anchor="end">t = {bars[-1].timestep}, image</text></svg>\n'
    )
