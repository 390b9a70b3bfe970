"""How many of the kernels that oneDNN compiles on a CPU should be kept, when a schedule is fine-tuned?

A batch's timesteps fall to the schedule's networks as they are drawn, so that each network's part has another size at each step, and oneDNN compiles its
convolutions for each size; it keeps 1,024 of its own accord. Fine-tunes of `benchmarks.spaces`' networks in processes of their own, by the number kept, in
rounds, each with every number once, in turn; the median over the rounds, and the most memory. Some seven minutes of one core.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from functools import partial
from statistics import median
from typing import Any

from benchmarks.common import Benchmark, Target
from nas import KERNELS

OWN = 1_024
"""OneDNN's."""
COUNTS = (OWN, 4_096, KERNELS)
SPACES = ("width alone", "+ depth")

STEPS = """
import json, resource, sys, time
from pathlib import Path
import numpy as np, torch
from benchmarks.digits import images
from benchmarks.spaces import Setting
from nas.contracts import derive_seed
from search_spaces.training import FineTune
torch.set_num_threads(1)
setting = Setting(sys.argv[1], 0, Path(), (), False)
net, space, data = setting.net.initial(0), setting.study.space, images.load()
random = np.random.default_rng(derive_seed(0, "kernels"))
schedule = space.decode(tuple(int(random.integers(len(choice.options))) for choice in space.choices))
started = time.perf_counter()
for _ in FineTune(int(sys.argv[2]), distillation=0.5).fit(net, schedule, data, 0):
    pass
seconds = time.perf_counter() - started
print(json.dumps([seconds / int(sys.argv[2]), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10]))
"""


def step(space: str, kernels: int, steps: int) -> list[float]:
    """Seconds of a gradient step, and the most MiB of memory."""
    environment = {**os.environ, "ONEDNN_PRIMITIVE_CACHE_CAPACITY": str(kernels)}
    command = [sys.executable, "-c", STEPS, space, str(steps)]
    told = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE).stdout
    return [float(number) for number in json.loads(told)]


def measured(space: str, rounds: int, steps: int) -> dict[str, Any]:
    found: dict[str, Sequence[list[float]]] = {str(count): [] for count in COUNTS}
    for _ in range(rounds):
        for count in COUNTS:
            found[str(count)] = [*found[str(count)], step(space, count, steps)]
    return {
        "seconds_of_a_step": {count: median(seconds for seconds, _ in each) for count, each in found.items()},
        "mib": {count: max(most for _, most in each) for count, each in found.items()},
    }


def main() -> None:
    bench = Benchmark("kernels", __doc__ or "", ("nas/__init__.py", "search_spaces/training"))
    size = (1, 4) if bench.quick else (3, 250)
    over = []
    for space in SPACES:
        seconds = bench.row(space, partial(measured, space, *size))["seconds_of_a_step"]
        over.append(seconds[str(KERNELS)] / seconds[str(OWN)])
    bench.finish(
        [
            Target(
                "kernels_kept",
                f"seconds of a fine-tune's gradient step with {KERNELS:,} compiled kernels kept over those with oneDNN's own {OWN:,}, the larger of {len(SPACES)} spaces",
                0.9,
                max(over),
            )
        ]
    )


if __name__ == "__main__":
    main()
