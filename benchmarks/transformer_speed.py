"""How much of the multiply-adds that a schedule saves on DiT-XL/2 becomes time?

DiT-XL/2 of 256 pixels with random weights, bfloat16, guided, batches of 8 and 32 images, ten steps: the full network; schedules at no more than half of
its multiply-adds, one that reuses branches (some steps whole, evenly spread, between them what stands around the branches alone), one that is narrower and
one that is shallower everywhere. Seconds for an image, the least of three runs, compiled and not; the efficiency is the speed-up over the ratio of
multiply-adds. Without a GPU a network of 8 blocks and 192 channels, float32, batches of 4, as a row alone: what is small says nothing about what is large.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from benchmarks.common import Benchmark, Target
from benchmarks.text_speed import STEPS, seconds, share
from nas.contracts import Guidance, Schedule, Step
from search_spaces.intervals import uniform
from search_spaces.networks.slices import Arch
from search_spaces.supernet import Elastic
from studies.dit_xl2_dip_go import DIT

SMALL: dict[str, Any] = {**DIT, "num_attention_heads": 8, "attention_head_dim": 24, "num_layers": 8, "sample_size": 16}


def schedules(net: Elastic) -> dict[str, Schedule]:
    timesteps, full = uniform(STEPS), net.anatomy.full
    guided = Guidance(1.5)
    whole = Schedule(tuple(Step(t, full, (), guided) for t in timesteps))
    blocks = net.cost.graph(full).blocks

    def reusing(kept: int) -> Schedule:
        places = {round(i * STEPS / kept) for i in range(kept)}
        steps = (Step(t, full, () if place in places else blocks, guided) for place, t in enumerate(timesteps))
        return Schedule(tuple(steps))

    def alone(arch: Arch) -> Schedule:
        return Schedule(tuple(Step(t, arch, (), guided) for t in timesteps))

    [depth], most = net.anatomy.full_depths, net.cost(full).macs
    kept = max((n for n in range(1, STEPS) if share(net, whole, reusing(n)) <= 0.5), default=1)
    narrow = max((w for w in net.widths if net.cost(Arch((w,))).macs <= 0.5 * most), default=net.widths[0])
    shallow = max(n for n in range(1, depth) if net.cost(Arch((1.0,), (n,))).macs <= 0.5 * most)
    return {
        "full": whole,
        "reuse": reusing(kept),
        "width": alone(Arch((narrow,))),
        "depth": alone(Arch((1.0,), (shallow,))),
    }


def measure(config: dict[str, Any], batch: int, compiled: bool, dtype: torch.dtype, device: str) -> dict[str, Any]:
    heads, blocks = config["num_attention_heads"], config["num_layers"]
    net = Elastic(config, tuple(k / heads for k in range(heads // 2, heads + 1)), depths=tuple(range(1, blocks + 1)))
    loaded = net.initial(0, device)
    loaded.full.to(dtype)
    sync = torch.cuda.synchronize if device == "cuda" else lambda: None
    planned = schedules(net)
    for arch in {Arch(*step.arch) for schedule in planned.values() for step in schedule.steps}:
        loaded.adopt(arch, loaded.extract(arch).to(dtype))
    loaded.run_as(False, compiled)
    times = {name: seconds(loaded, schedule, batch, dtype, sync) for name, schedule in planned.items()}
    row: dict[str, Any] = {f"{name}_s": value for name, value in times.items()}
    for name in ("reuse", "width", "depth"):
        macs = share(net, planned["full"], planned[name])
        row[f"{name}_macs_share"] = macs
        row[f"{name}_efficiency"] = times["full"] / times[name] * macs
    return row


def main() -> None:
    files = ("search_spaces/shipped/walks.py", "search_spaces/networks/transformer.py")
    bench = Benchmark("transformer_speed", __doc__ or "", files)
    torch.set_num_threads(1)
    measured = None
    if not torch.cuda.is_available():
        bench.row("small network on the CPU", lambda: measure(SMALL, 4, False, torch.float32, "cpu"))
    else:
        rows = {
            (batch, compiled): bench.row(
                f"batch {batch}, {'compiled' if compiled else 'eager'}",
                partial(measure, DIT, batch, compiled, torch.bfloat16, "cuda"),
            )
            for batch in ((8,) if bench.quick else (8, 32))
            for compiled in (False, True)
        }
        names = ("reuse", "width", "depth")
        measured = min(row[f"{name}_efficiency"] for row in rows.values() for name in names)
    bench.finish(
        [
            Target(
                "dit_speedup_efficiency",
                "least share of the ratio of multiply-adds that becomes time, DiT-XL/2, reuse, width and depth; None where there is no GPU",
                0.85,
                measured,
                at_most=False,
            )
        ]
    )


if __name__ == "__main__":
    main()
