"""Faster schedules for frozen models of 50 steps, found as `nas tune` finds them: what they lose beside rules, beside what others learn, and beside fewer steps.

Question, arms, seeds, reference and test stand in `protocols/tune-50.json`, written down before any row. Models are those of `benchmarks.tune`, whose rows are
of 20 steps; what is not there of them is trained. Some twenty-two hours of one core for the three, and two more where their networks are to be trained.
"""

from __future__ import annotations

from benchmarks.common import Benchmark, needs
from benchmarks.protocol import committed
from benchmarks.tune import there_are, verdicts_of
from benchmarks.tune_arms import NETWORKS

PROTOCOL = committed("tune-50")


def main() -> None:
    files = ("benchmarks/tune.py", "benchmarks/tune_arms.py", "nas/searchers/path.py", "nas/tuning/tune.py")
    bench = Benchmark("tune_50", __doc__ or "", files, PROTOCOL, NETWORKS)
    steps = (20,) if bench.quick else PROTOCOL.settings["steps"]
    models = there_are(bench, PROTOCOL) if bench.quick else PROTOCOL.settings["models"]
    if "text" in models:
        needs("transformers", "text")
    bench.finish(verdicts_of(bench, PROTOCOL, models, steps, "tune_50.png").targets("tune_50"))


if __name__ == "__main__":
    main()
