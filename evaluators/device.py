"""How to run networks fast on this device: batch size and memory format. Decided by measuring, once per run folder.

Nothing here changes what is computed beyond the rounding of floats. Lower precision does, so it is a setting of the score.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import filelock
import torch

from evaluators.sampling import Precision, predict
from nas.contracts import Guidance, LoadedSupernet, Step, some_condition

FILE = "execution.json"
WORTH = 0.95
"""A setting is taken where it needs at most this share of the time of the plainer one."""


@dataclass(frozen=True)
class Execution:
    """`batch`: samples per network call. `channels_last`: memory format. `compiled`: each subnet goes through torch.compile."""

    batch: int = 256
    channels_last: bool = False
    compiled: bool = False


LARGE = 2**13
"""Numbers of a state from which on a batch is small on a CPU, whose memory is not asked: 64x64 pixels or latents."""


def candidates(device: torch.device, state: Sequence[int] = ()) -> list[Execution]:
    """Settings worth timing for states of this shape, plain ones first, small ones first. None is compiled: each of the many subnets that a search meets would
    be, which takes longer than it saves. On a CPU a single one: what a loaded machine happens to measure must not decide the last bits of a score."""
    if device.type == "cpu":
        return [Execution(16 if math.prod(state) >= LARGE else 256)]
    plain = [Execution(batch) for batch in (4, 16, 64, 256, 512, 1024, 2048)]
    return plain + [Execution(batch, channels_last=True) for batch in (16, 64, 256, 1024)]


def settle(
    net: LoadedSupernet, folder: Path, precision: Precision = "float32", settings: Sequence[Execution] | None = None
) -> Execution:
    """The setting for this device and precision: as the first worker of the run measures it, while the others wait."""
    settings = candidates(net.device, net.state_shape) if settings is None else settings
    if len(settings) == 1:
        return settings[0]
    device, path = f"{fingerprint(net.device)}, {precision}", folder / FILE
    with filelock.FileLock(path.with_suffix(".lock")):
        known = json.loads(path.read_text()) if path.exists() else {}
        if device not in known:
            timed = list(measure(net, settings, precision))
            chosen, best = timed[0]
            for setting, seconds in timed[1:]:
                if seconds < WORTH * best:
                    chosen, best = setting, seconds
            rows = [{**asdict(setting), "seconds_per_image": seconds} for setting, seconds in timed]
            known[device] = {"chosen": asdict(chosen), "measured": rows}
            partial = path.with_suffix(".partial")
            partial.write_text(json.dumps(known, indent=1) + "\n")
            os.replace(partial, path)
        return Execution(**known[device]["chosen"])


def measure(
    net: LoadedSupernet, settings: Sequence[Execution], precision: Precision = "float32", repeats: int = 5
) -> Iterator[tuple[Execution, float]]:
    """Seconds per image of one call of the whole network under each setting, the least of some; guided by itself where it takes conditions, which
    takes the most memory. What does not run here, for want of memory or of a compiler, is left out, but for the first; behind that, and behind a batch that
    gains nothing, no larger one of the same form is tried."""
    least: dict[tuple[bool, bool], float] = {}
    ended: set[tuple[bool, bool]] = set()
    for number, setting in enumerate(settings):
        form = (setting.channels_last, setting.compiled)
        if form in ended:
            continue
        net.run_as(*form)
        try:
            seconds = _seconds(net, setting.batch, precision, repeats) / setting.batch
        except Exception:  # compilers fail in ways of their own
            if number == 0:
                raise
            ended.add(form)
            continue
        yield setting, seconds
        if seconds >= WORTH * least.get(form, math.inf):
            ended.add(form)
        least[form] = seconds
    net.run_as(False, False)
    if net.device.type == "cuda":  # what the largest took is others' again
        torch.cuda.empty_cache()


def fingerprint(device: torch.device) -> str:
    """Which device this is, in words."""
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}"
    return f"{device.type}, torch {torch.__version__}"


def _seconds(net: LoadedSupernet, batch: int, precision: Precision, repeats: int) -> float:
    x = torch.zeros((batch, *net.state_shape), device=net.device)
    least = float("inf")
    condition = some_condition(net, batch)
    step = Step(0, net.full_arch, (), Guidance(2.0) if condition else None)
    for _ in range(repeats + 2):  # the first calls choose kernels and compile
        wait(net.device)
        started = time.perf_counter()
        predict(net, step, x, None, precision, condition=condition)
        wait(net.device)
        least = min(least, time.perf_counter() - started)
    return least


def wait(device: torch.device) -> None:
    """Until it has done what it was asked to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
