"""Faster schedules for frozen models of 50 steps, found as `nas tune` finds them: what they lose beside rules, beside what others learn, and beside fewer steps.

Question, arms, seeds, reference and test stand in `protocols/tune-50.json`, written down before any row. Models are those of `benchmarks.tune`, whose rows are
of 20 steps. Some twenty-two hours of one core for the three models; their networks are those that `benchmarks.latent`, `.transformer` and `.text` leave, two more.
"""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.common import Benchmark, device
from benchmarks.protocol import committed
from benchmarks.tune import there_are, verdicts_of
from benchmarks.tune_arms import Cell, trained

PROTOCOL = committed("tune-50")


def check(bench: Benchmark, models: Sequence[str]) -> None:
    """Raises SystemExit where a network of the protocol's is missing, and where rows are kept of others, or of times of another processor."""
    if missing := [model for model in PROTOCOL.settings["models"] if model not in models]:
        commands = ", ".join(f"`python -m benchmarks.{model}`" for model in missing)
        raise SystemExit(
            f"error: the protocol asks for all of its models; run {commands} first, up to the row of the judge"
        )
    digests = {}
    for model in models:
        setting, run = trained(model, False)
        cell = Cell(bench.folder, PROTOCOL.settings, False, model, PROTOCOL.settings["steps"][0], 0)
        digests[model] = cell.study({}).supernet.digest(run / "supernet")
        looks = setting.scores(2) if model == "latent" else setting.evaluator(2)
        digests[f"judge of {model}"] = looks.digest(setting.judged if model == "latent" else run)
    bench.rest_on(processor=device(), **digests)


def main() -> None:
    files = ("benchmarks/tune.py", "benchmarks/tune_arms.py", "nas/searchers/path.py", "nas/tuning/tune.py")
    bench = Benchmark("tune_50", __doc__ or "", files, PROTOCOL)
    steps = (20,) if bench.quick else PROTOCOL.settings["steps"]
    models = there_are(PROTOCOL, bench.quick)
    if not bench.quick:
        check(bench, models)
    bench.finish(verdicts_of(bench, PROTOCOL, models, steps, "tune_50.png").targets("tune_50"))


if __name__ == "__main__":
    main()
