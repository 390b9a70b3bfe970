"""How much of the multiply-adds that a schedule saves on Stable Diffusion's network becomes time?

The network of Stable Diffusion 1.5 with random weights, latents of 64x64, bfloat16, guided, batches of 4 and 16 images, ten steps: the full network; a
schedule at no more than half of its multiply-adds that reuses blocks (some steps whole, evenly spread, between them the outermost level alone); one that is
narrower everywhere (the nearest subnet below half). Seconds for an image, the least of three runs, compiled and not; the efficiency is the
speed-up over the ratio of multiply-adds. Without a GPU a network of a fifth of the channels on latents of 16x16, float32, batches of 2, as a row
alone: what is small says nothing about what is large.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from benchmarks.common import Benchmark, Target
from nas.contracts import Guidance, Schedule, Step
from search_spaces.intervals import uniform
from search_spaces.loaded import LoadedElastic
from search_spaces.networks.slices import Arch
from search_spaces.supernet import Elastic
from studies.sd15_dip_go import UNET

STEPS = 10
DEEP = ("d1", "d2", "d3", "mid", "u0", "u1", "u2")
"""What a step reuses that runs the outermost level alone."""
SMALL: dict[str, Any] = {
    **UNET,
    "sample_size": 16,
    "block_out_channels": (64, 128, 256, 256),
    "cross_attention_dim": 64,
}


def network(config: dict[str, Any]) -> Elastic:
    channels = tuple(
        tuple(dict.fromkeys(sorted(count * share // 8 for share in (4, 5, 6, 7, 8) if not count * share % 256)))
        for count in config["block_out_channels"]
    )
    return Elastic(config, channels=channels, per_level=("width",))


def schedules(net: Elastic) -> dict[str, Schedule]:
    timesteps, full = uniform(STEPS), net.anatomy.full
    guided = Guidance(7.5)
    whole = Schedule(tuple(Step(t, full, (), guided) for t in timesteps))
    subnets = net.subnets(net.options)
    archs = [subnets.flat(i) for i in range(len(subnets))]
    half = max((a for a in archs if net.cost(a).macs <= 0.5 * net.cost(full).macs), key=lambda a: net.cost(a).macs)
    narrow = Schedule(tuple(Step(t, half, (), guided) for t in timesteps))
    kept = next(
        n for n in range(STEPS, 0, -1) if share(net, whole, _reusing(timesteps, full, guided, n)) <= 0.5 or n == 1
    )
    return {"full": whole, "reuse": _reusing(timesteps, full, guided, kept), "width": narrow}


def _reusing(timesteps: tuple[int, ...], full: Arch, guided: Guidance, kept: int) -> Schedule:
    """Of which so many steps run whole, evenly spread, the first among them."""
    places = {round(i * STEPS / kept) for i in range(kept)}
    steps = (Step(t, full, () if place in places else DEEP, guided) for place, t in enumerate(timesteps))
    return Schedule(tuple(steps))


def share(net: Elastic, whole: Schedule, other: Schedule) -> float:
    return sum(map(net.macs, other.steps)) / sum(map(net.macs, whole.steps))


@torch.inference_mode()
def seconds(net: LoadedElastic, schedule: Schedule, batch: int, dtype: torch.dtype, sync: Callable[[], None]) -> float:
    """For an image."""
    anatomy = net.recipe.anatomy
    given = anatomy.some_condition(batch).items()
    told = {name: rows.to(net.device, dtype if rows.is_floating_point() else None) for name, rows in given}
    found = []
    for _ in range(4):  # the first warms up
        x, cache = torch.randn((batch, *net.state_shape), device=net.device, dtype=dtype), None
        sync()
        started = time.perf_counter()
        for step, following in zip(schedule.steps, (*schedule.steps[1:], None), strict=True):
            call = net.denoiser(step, following.reuse if following else ())
            x, cache = call(x, step.timestep, cache, told)
            x = x[:, : net.state_shape[0]].to(dtype)
        sync()
        found.append((time.perf_counter() - started) / batch)
    return min(found[1:])


def measure(config: dict[str, Any], batch: int, compiled: bool, dtype: torch.dtype, device: str) -> dict[str, Any]:
    net = network(config)
    loaded = net.initial(0, device)
    loaded.full.to(dtype)
    sync = torch.cuda.synchronize if device == "cuda" else lambda: None
    planned = schedules(net)
    for arch in {Arch(*step.arch) for schedule in planned.values() for step in schedule.steps}:
        loaded.adopt(arch, loaded.extract(arch).to(dtype))
    loaded.run_as(False, compiled)
    times = {name: seconds(loaded, schedule, batch, dtype, sync) for name, schedule in planned.items()}
    row: dict[str, Any] = {f"{name}_s": value for name, value in times.items()}
    for name in ("reuse", "width"):
        macs = share(net, planned["full"], planned[name])
        row[f"{name}_macs_share"] = macs
        row[f"{name}_efficiency"] = times["full"] / times[name] * macs
    return row


def main() -> None:
    bench = Benchmark("text_speed", __doc__ or "", ("search_spaces/shipped/reuse.py", "search_spaces/supernet.py"))
    gpu = torch.cuda.is_available()
    torch.set_num_threads(1)
    if not gpu:
        bench.row("small network on the CPU", lambda: measure(SMALL, 2, False, torch.float32, "cpu"))
        measured = None
    else:
        rows = {
            (batch, compiled): bench.row(
                f"batch {batch}, {'compiled' if compiled else 'eager'}",
                partial(measure, UNET, batch, compiled, torch.bfloat16, "cuda"),
            )
            for batch in ((4,) if bench.quick else (4, 16))
            for compiled in (False, True)
        }
        measured = min(row[f"{name}_efficiency"] for row in rows.values() for name in ("reuse", "width"))
    bench.finish(
        [
            Target(
                "sd15_speedup_efficiency",
                "least share of the ratio of multiply-adds that becomes time, Stable Diffusion 1.5's network, reuse and width; None where there is no GPU",
                0.8,
                measured,
                at_most=False,
            )
        ]
    )


if __name__ == "__main__":
    main()
