"""Is a found schedule better than a static network of the same cost, on Fashion-MNIST's latents, frozen and after an equal fine-tune?

Arms, seeds, reference and test stand in `protocols/quality-latents.json`, written down before any row; trainings and judge are those of
`benchmarks.recover`. Some four hours of one core.
"""

from __future__ import annotations

from benchmarks import confirm_pilot
from benchmarks.common import Benchmark, Target
from benchmarks.protocol import committed
from benchmarks.quality import summary
from benchmarks.recover import (
    PIXELS,
    Row,
    Setting,
    by_interval,
    chosen,
    fine_tuned,
    judged,
    prepared,
    specialists,
)
from nas.genomes.genetics import dearest

PROTOCOL = committed("quality-latents")
SETTINGS = PROTOCOL.settings
FULL, UNIFORM, FOUND = "full", "uniform 0.75", f"recovered {SETTINGS['recovered']}"


def main() -> None:
    bench = Benchmark("quality_latents", __doc__ or "", ("benchmarks/recover.py", "nas/evidence"), PROTOCOL)
    setting = Setting(bench.folder, bench.quick)
    prepared(bench, setting)
    study, recovered = setting.study, SETTINGS["recovered"]
    choices = study.space.choices
    for width in range(len(choices[0].options)):
        whole, folder = (
            by_interval(study.space.decode((width,) * len(choices))),
            specialists(setting, width, recovered),
        )
        bench.row(
            f"specialists of width {width}",
            lambda whole=whole, folder=folder: fine_tuned(setting, whole, recovered, -recovered, folder),  # type: ignore[misc]
        )
    genomes = {
        FULL: dearest(study.space),
        UNIFORM: (choices[0].options.index(SETTINGS["uniform"]),) * len(choices),
        "by hand": confirm_pilot.by_hand(setting.confirmed, SETTINGS["budget"]),
        "frozen": chosen(bench, setting, "frozen", 0, SETTINGS["budget"], SETTINGS),
        FOUND: chosen(bench, setting, FOUND, recovered, SETTINGS["budget"], SETTINGS),
    }
    schedules = {name: study.space.decode(tuple(genome)) for name, genome in genomes.items()}
    distinct = {schedule.digest: schedule for schedule in schedules.values()}
    pairs = [(schedule, seed) for seed in PROTOCOL.seeds for schedule in distinct.values()]
    places = {pair: bench.folder / "trained" / f"{pair[0].digest}-{pair[1]}" for pair in pairs}
    bench.rows(
        {
            f"training of {schedule.digest}, seed {seed}": (
                fine_tuned,
                setting,
                schedule,
                SETTINGS["steps"],
                seed,
                places[schedule, seed],
            )
            for schedule, seed in pairs
        }
    )
    keys = {
        (schedule.digest, seed, tuned): f"{schedule.digest}, seed {seed}, {'fine-tuned' if tuned else 'frozen'}"
        for schedule, seed in pairs
        for tuned in (False, True)
    }
    rows = bench.rows(
        {
            keys[schedule.digest, seed, tuned]: (
                judged,
                setting,
                schedule,
                seed,
                places[schedule, seed] if tuned else None,
            )
            for schedule, seed in pairs
            for tuned in (False, True)
        }
    )

    def of(name: str, tuned: bool, by_pixels: bool = False) -> list[Row]:
        share = study.space.cost(tuple(genomes[name]))["macs_share"]
        found = [rows[keys[schedules[name].digest, seed, tuned]] for seed in PROTOCOL.seeds]
        return [{**(row[PIXELS] if by_pixels else row), "macs_share": share} for row in found]

    losses: dict[tuple[str, bool], float] = {}
    for tuned in (False, True):
        for name in schedules:
            words = f"{name}, {'fine-tuned' if tuned else 'frozen'}"
            pixels = summary(of(name, tuned, by_pixels=True), of(FULL, tuned, by_pixels=True))
            told = bench.reckon(
                words, {"genome": genomes[name], **summary(of(name, tuned), of(FULL, tuned)), PIXELS: pixels}
            )
            losses[name, tuned] = told["loss"]
    worth = all(losses[UNIFORM, tuned] > 0 for tuned in (False, True))
    ratio = max(losses[FOUND, tuned] / losses[UNIFORM, tuned] for tuned in (False, True)) if worth else None
    bench.finish(
        [
            Target(
                "fashion_loss_ratio_vs_uniform",
                "FD lost by the schedule found within 51 % of the MACs / by the uniform 0.75 net, Fashion-MNIST latents, means of 3 training seeds, the larger of frozen and fine-tuned; None where the uniform net loses nothing",
                0.5,
                ratio,
            )
        ]
    )


if __name__ == "__main__":
    main()
