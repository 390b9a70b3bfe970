"""What happens when things go wrong: wrong inputs of every kind, kills, damaged journals, a full disk.

(a) Generated wrong inputs, over recipes, commands and kinds of files: each is answered in one line with a non-zero exit, or it is legal and
runs. A line that calls itself a fault of the program counts as a traceback. (b) A study is searched, exported, reported and trained, killed
again and again on the way; its end is compared with that of an uninterrupted one. (c) Journals damaged in six ways: each is refused, or ends
as the whole one. (d) Disks of many sizes that run full; the same command goes on once there is room.
"""

from __future__ import annotations

from benchmarks.common import Benchmark, Target
from benchmarks.damaged_journals import damages
from benchmarks.stops import full_disks, kills
from benchmarks.wrong_inputs import wrong_inputs


def main() -> None:
    parts = ("stops", "damaged_journals", "wrong_inputs", "wrong_recipes", "tiny_study")
    files = (*(f"benchmarks/{part}.py" for part in parts), "nas", "evaluators", "search_spaces")
    bench = Benchmark("faults", __doc__ or "", files)
    inputs = bench.row("wrong inputs", lambda: wrong_inputs(bench.folder / "inputs", 120 if bench.quick else 1400))
    journals = bench.row("journals", lambda: damages(bench.folder / "journals", 12 if bench.quick else 200))
    levels = [2**14, 2**18] if bench.quick else [int(2 ** (12 + 0.55 * i)) for i in range(20)]
    disks = bench.row("full disks", lambda: full_disks(levels))
    stopped = bench.reckon("kills", kills(bench))
    bench.finish(
        [
            Target(
                "bad_inputs_clear",
                f"share of {inputs['inputs']:,} wrong inputs answered in one line, or legal and run",
                0.995,
                inputs["clear_share"],
                at_most=False,
            ),
            Target(
                "tracebacks", "wrong inputs that end in a traceback, or in words for one", 0, inputs.get("traceback", 0)
            ),
            Target("endless_inputs", "wrong inputs that do not end within a minute", 0, inputs.get("endless", 0)),
            Target(
                "kills_survived",
                f"share of studies, stopped {stopped['kills']} times in all, that end as the uninterrupted one",
                1.0,
                stopped["survived"],
                at_most=False,
            ),
            Target(
                "silent_damage",
                f"of {journals['damages']} damaged journals, those that end otherwise without a word",
                0,
                journals["silent"],
            ),
            Target(
                "full_disks_clear",
                f"of {len(levels)} full disks, those told in one line and gone on from",
                len(levels),
                min(disks["clear"], disks["went_on"]),
                at_most=False,
            ),
        ]
    )


if __name__ == "__main__":
    main()
