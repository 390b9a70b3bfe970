"""How long should a CPU thread that waits for the others look for work before it sleeps, when a training runs on all cores?

Gradient steps of the study of garments' network, in processes of their own, by how many times OpenMP's threads look (GOMP_SPINCOUNT): alone, and beside one
process that wants a core all the time. In rounds, each with every count once, in turn; the median over the rounds. A process of one thread stands beside
them. Some six minutes; meant for a quiet machine.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from statistics import median

from benchmarks.common import Benchmark, Target
from nas import LOOKS

COUNTS = (300, 1_000, LOOKS, 10_000, 30_000, 300_000)
"""The last is OpenMP's own."""
ALONE, BESIDE = "alone", "beside another"
SLOWER = 1.25

STEPS = """
import json, sys, time
from statistics import median
import torch
from diffusers import UNet2DModel
from studies.fashion_latent import UNET
torch.manual_seed(0)
torch.set_num_threads(int(sys.argv[1]))
net, batch = UNet2DModel(**UNET), 64
optimiser = torch.optim.Adam(net.parameters())
x = torch.randn(batch, net.config.in_channels, net.config.sample_size, net.config.sample_size)
t, labels = torch.randint(0, 1000, (batch,)), torch.randint(0, 10, (batch,))
seconds = []
for _ in range(int(sys.argv[2])):
    started = time.perf_counter()
    optimiser.zero_grad()
    (net(x, t, labels).sample - x).square().mean().backward()
    optimiser.step()
    seconds.append(time.perf_counter() - started)
print(json.dumps(median(seconds[2:])))
"""
BUSY = "import torch; torch.set_num_threads(1); a = torch.randn(256, 256)\nprint(flush=True)\nwhile True: a @ a"


def step(threads: int, looks: int, steps: int) -> float:
    """Seconds of a gradient step, the median in a process."""
    environment = {**os.environ, "GOMP_SPINCOUNT": str(looks)}
    command = [sys.executable, "-c", STEPS, str(threads), str(steps)]
    return float(json.loads(subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE).stdout))


@contextmanager
def busy() -> Iterator[None]:
    with subprocess.Popen([sys.executable, "-c", BUSY], stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        other.stdout.readline()
        try:
            yield
        finally:
            other.kill()


def measured(where: str, count: int, steps: int) -> dict[str, dict[str, float]]:
    """Seconds by count, and of one thread."""
    found: dict[str, list[float]] = {}
    with busy() if where == BESIDE else nullcontext():
        for _ in range(count):
            for looks in COUNTS:
                found.setdefault(str(looks), []).append(step(os.cpu_count() or 1, looks, steps))
            found.setdefault("one thread", []).append(step(1, LOOKS, steps))
    return {"seconds_of_a_step": {name: median(each) for name, each in found.items()}}


def main() -> None:
    bench = Benchmark("threads", __doc__ or "", ("nas/__init__.py",))
    size = (1, 4) if bench.quick else (3, 12)
    over = {}
    for where in (ALONE, BESIDE):
        seconds = bench.row(where, partial(measured, where, *size))["seconds_of_a_step"]
        over[where] = seconds[str(LOOKS)] / min(seconds[str(looks)] for looks in COUNTS)
    bench.finish(
        [
            Target(
                f"threads_{name}",
                f"seconds of a gradient step on all cores, {where}, threads looking {LOOKS:,} times before they sleep, over the least of {len(COUNTS)} counts",
                SLOWER,
                over[where],
            )
            for name, where in (("alone", ALONE), ("beside", BESIDE))
        ]
    )


if __name__ == "__main__":
    main()
