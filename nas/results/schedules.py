"""Schedules as small pictures that stand in a page or beside a README: a bar for each step, or what runs of each block. Without matplotlib, which takes
longer for each of them than all else of a page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape

from nas.contracts import LoadedSupernet, Schedule, Step

WIDTH, HEIGHT, LEFT, TOP = 640, 120, 40, 14
CELLS, ROW, NAMES, TICKS = 360, 15, 52, 6
"""Of a map: width of its cells together, height of a row, room for the blocks' names, most timesteps named."""

PALE, DEEP = (226, 240, 252), (29, 78, 137)
"""Colours of a block of which nothing runs, as by width it nearly may, and of which all does."""


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


def mapped(timesteps: Sequence[int], profiles: Mapping[int, Mapping[str, float]], ink: str = "currentColor") -> str:
    """An SVG of what runs when: the share of each block's MACs at each timestep, a cross where its output is reused, a gap where the step is left out.
    `profiles[timestep][block]`, negative where reused."""
    blocks = list(next(iter(profiles.values())))
    each, tall = CELLS / len(timesteps), ROW * len(blocks)
    marks = []
    for row, block in enumerate(blocks):
        y = ROW * row
        marks.append(f'<text x="{NAMES - 6}" y="{y + 11}" text-anchor="end">{escape(block)}</text>')
        for column, timestep in enumerate(timesteps):
            if timestep not in profiles:
                continue
            share, x = profiles[timestep][block], NAMES + column * each
            words = f"<title>{escape(block)} at t = {timestep}: {'reused' if share < 0 else f'{share:.0%}'}</title>"
            if share < 0:
                middle, reach = x + each / 2, min(3.0, each / 3)
                marks.append(
                    f'<path d="M{middle - reach:.1f} {y + 4.5:.1f}l{2 * reach:.1f} 6m0 -6l{-2 * reach:.1f} 6" stroke="{ink}" opacity="0.6">{words}</path>'
                )
            else:
                colour = "#" + "".join(
                    f"{round(a + (b - a) * min(share, 1)):02x}" for a, b in zip(PALE, DEEP, strict=True)
                )
                marks.append(
                    f'<rect x="{x:.1f}" y="{y}" width="{max(each - 0.5, 0.5):.1f}" height="{ROW - 0.5}" fill="{colour}">{words}</rect>'
                )
    count = min(TICKS, len(timesteps))
    for place in sorted({round(i * (len(timesteps) - 1) / max(count - 1, 1)) for i in range(count)}):
        at = NAMES + (place + 0.5) * each
        marks.append(f'<text x="{at:.1f}" y="{tall + 14}" text-anchor="middle">{timesteps[place]}</text>')
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {NAMES + CELLS + 20} {tall + 20}" font-family="sans-serif" font-size="11" fill="{ink}">'
        f"{''.join(marks)}</svg>\n"
    )
