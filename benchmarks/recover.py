"""What tells which schedules are good once they are trained? Predictors against 32 trained schedules of Fashion-MNIST's latents, in four bands of multiply-adds.

Arms, truth, seeds and test stand in `protocols/recover.json`, written down before any row. A subnet of an interval that is fine-tuned on its timesteps
alone is part of every schedule that has this width there: fifteen of them make all 243 schedules of the space, so that a short fine-tune of
each is a score of all. It takes the network that `benchmarks.latent` left; some ten hours of one core.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from benchmarks import confirm_pilot, latent
from benchmarks.common import Benchmark, Target
from benchmarks.handover import compared
from benchmarks.protocol import committed
from evaluators.frechet import Frechet
from evaluators.images import load_once
from nas.base.exported import read_export, read_network
from nas.contracts import Genome, LoadedSupernet, Schedule, derive_seed
from nas.engine.session import open_session
from nas.evidence.confirm import equal_steps, gradient_macs
from nas.evidence.judges import judges_of
from nas.genomes.genetics import dearest
from nas.handover.export import export
from nas.results.audit import RESAMPLES, Agreement, with_interval
from nas.study import Study
from search_spaces.loaded import LoadedElastic
from search_spaces.shipped.train_diffusers import TRAINED, Settings, settings_of, train

PROTOCOL = committed("recover")
SETTINGS = PROTOCOL.settings
WINNERS = SETTINGS["winners"]
CLAIMED = f"recovered {SETTINGS['recovered'][-1]}"
"""The arm of the targets."""
PIXELS = "pixels"
"""Of a judged row, what the pixels' components say."""
Array = npt.NDArray[np.float64]
Row = dict[str, Any]


@dataclass(frozen=True)
class Setting:
    """`folder`: the benchmark's."""

    folder: Path
    quick: bool

    @property
    def confirmed(self) -> confirm_pilot.Setting:
        """Whose space and judge this one has."""
        return confirm_pilot.Setting(self.folder, self.quick, guidance=None)

    @property
    def study(self) -> Study:
        """Unguided: so is the full network's FD least."""
        return replace(self.confirmed.study(), name="recover")

    @property
    def run(self) -> Path:
        return self.confirmed.run

    def net(self) -> LoadedElastic:
        """With a copy of the weights for each interval."""
        net = self.study.supernet.load(self.run / "supernet", "cpu")
        assert isinstance(net, LoadedElastic)
        net.experts.update(dict.fromkeys(confirm_pilot.SPECIALISTS, net.full))
        return net

    def settings(self, net: LoadedSupernet, steps: int, seed: int) -> Settings:
        given: dict[str, Any] = {**dict(net.training_settings), **SETTINGS["training"]}
        if self.quick:
            given["batch"] = 8
        return settings_of({**given, "steps": steps, "seed": derive_seed(0, seed, "recovery") % 2**31})

    def steps(self, many: int) -> int:
        return max(1, many // 100) if self.quick else many

    @property
    def samples(self) -> tuple[int, int]:
        """Of an arm's score, and of the truth's."""
        return (16, 32) if self.quick else (SETTINGS["scored"], SETTINGS["judged"])


def by_interval(schedule: Schedule) -> Schedule:
    """With the weights of each step's interval."""
    each = len(schedule.steps) // len(confirm_pilot.SPECIALISTS)
    return confirm_pilot.started_as(schedule, [name for name in confirm_pilot.SPECIALISTS for _ in range(each)])


def genomes_of(study: Study) -> list[Genome]:
    return list(product(*(range(len(choice.options)) for choice in study.space.choices)))


def drawn(setting: Setting) -> list[Genome]:
    """As many of each band."""
    study = setting.study
    shares = {genome: study.space.cost(genome)["macs_share"] for genome in genomes_of(study)}
    rng = np.random.default_rng(0)
    count = SETTINGS["schedules"] // len(SETTINGS["bands"])
    found = []
    for least, most in SETTINGS["bands"]:
        inside = [genome for genome, share in shares.items() if least <= share < most]
        found += [inside[place] for place in sorted(rng.permutation(len(inside))[: 2 if setting.quick else count])]
    return found


def fine_tuned(setting: Setting, schedule: Schedule, steps: int, seed: int, folder: Path) -> Row:
    """Exports the schedule's networks and trains each on the timesteps that it serves, all for as many multiply-adds as so many steps of the full network."""
    torch.set_num_threads(1)
    net, study = setting.net(), setting.study
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        export(net, schedule, study.evaluator.load(net, setting.run).sampler_of(schedule), {}, folder)
    whole = setting.settings(net, setting.steps(steps), seed)
    settings = replace(whole, steps=equal_steps(net, schedule, whole))
    settings = replace(settings, warmup=max(1, fewest_steps(folder, settings.steps) // 20))
    data = load_once(study.images)
    for _ in train(folder, data.pixels, settings, cpu=True, labels=data.labels):
        pass
    return {
        "gradient_steps": settings.steps,
        "training_macs": whole.steps * whole.batch * gradient_macs(net, net.full_arch, whole),
    }


def fewest_steps(folder: Path, steps: int) -> int:
    """Of the exported networks, of so many gradient steps that all take together."""
    plan = read_export(folder).training
    served = [sum(stop - start for start, stop in ranges) for ranges in plan["timesteps"].values()]
    return int(steps * min(served) // plan["scheduler"]["num_train_timesteps"])


def truth(setting: Setting, schedule: Schedule, seed: int, folder: Path) -> Row:
    """Trains and judges: a row that needs no weights any more."""
    trained = fine_tuned(setting, schedule, SETTINGS["training"]["steps"], seed, folder)
    return {**trained, **judged(setting, schedule, seed, folder)}


def judged(setting: Setting, schedule: Schedule, seed: int, folder: Path | None) -> Row:
    """The truth: of the networks in this folder that were trained, or of the supernet's, on noises and images that no arm has seen. Under the classifier, and
    of the same samples under what knows no labels."""
    torch.set_num_threads(1)
    net = setting.net()
    if folder is not None:
        adopt(net, folder)
    count = setting.samples[1]
    judges = [
        replace(judge, evaluator=replace(judge.evaluator, rungs=(count,))) for judge in judges_of(setting.study)[0][:2]
    ]
    # Both are there before the first looks, so that the second finds its samples kept.
    loaded = [judge.load(net, setting.run) for judge in judges]
    scores = [judge(schedule, count, derive_seed(0, seed, "truth's noise")) for judge in loaded]
    first, second = ({"fd": [score.values["fd"]], "replicates": [score.replicates["fd"]]} for score in scores)
    return {**first, PIXELS: second}


def adopt(net: LoadedElastic, folder: Path) -> None:
    for name, arch in read_export(folder / TRAINED).networks.items():
        net.adopt(arch, read_network(folder / TRAINED / name))


def scored(setting: Setting, genomes: Sequence[Genome], recovered: int, samples: int = 0, noise: str = "arms") -> Row:
    """FD of each, of the frozen supernet, or with the fifteen subnets that were trained for so many steps; of as many samples as the protocol of arms says, or
    of so many. `noise`: samples of one name share theirs."""
    torch.set_num_threads(1)
    net, study = setting.net(), setting.study
    evaluator = study.evaluator
    assert isinstance(evaluator, Frechet)
    for width in range(len(study.space.choices[0].options)) if recovered else ():
        adopt(net, specialists(setting, width, recovered))
    samples = samples or setting.samples[0]
    loaded = replace(evaluator, rungs=(samples,)).load(net, setting.run)
    seed, macs, found = derive_seed(0, f"{noise}' noise"), 0.0, []
    for genome in genomes:
        schedule = study.space.decode(genome)
        score = loaded(by_interval(schedule) if recovered else schedule, samples, seed)
        found.append(score.values["fd"])
        macs += score.spent["macs"] + score.spent.get("cached_macs", 0.0)
    return {"fd": found, "sampling_macs": macs / len(genomes)}


def specialists(setting: Setting, width: int, steps: int) -> Path:
    """Where the five subnets of this width lie that were trained for so many steps."""
    return setting.folder / "specialists" / f"{width}-{steps}"


def probes(study: Study) -> list[Genome]:
    """The full schedule, and those in which one interval alone is narrower."""
    whole = dearest(study.space)
    others = [
        (*whole[:place], option, *whole[place + 1 :])
        for place, choice in enumerate(study.space.choices)
        for option in range(len(choice.options) - 1)
    ]
    return [whole, *others]


def added_up(study: Study, row: Row, genomes: Sequence[Genome]) -> list[float]:
    """Of scored probes."""
    known = dict(zip(probes(study), row["fd"], strict=True))
    whole = dearest(study.space)

    def loss(place: int, option: int) -> float:
        return float(known[*whole[:place], option, *whole[place + 1 :]] - known[whole])

    return [known[whole] + sum(loss(place, option) for place, option in enumerate(genome)) for genome in genomes]


def agreement(mine: Sequence[float] | Array, truths: Sequence[Array], bands: npt.NDArray[np.int64]) -> list[Agreement]:
    return [Agreement(np.array(mine), truth, bands) for truth in truths]


def against(mine: Sequence[Agreement], theirs: Sequence[Agreement], count: int) -> tuple[float, float]:
    """95 % bootstrap interval of the difference of two arms' mean tau, over the same schedules."""
    weights = np.random.default_rng(0).multinomial(count, np.full(count, 1 / count), RESAMPLES).astype(np.float64)
    first, second = (np.mean([np.nan_to_num(one.tau(weights)) for one in each], axis=0) for each in (mine, theirs))
    low, high = np.quantile(first - second, (0.025, 0.975))
    return float(low), float(high)


def chosen(
    bench: Benchmark, setting: Setting, name: str, recovered: int, budget: float, sizes: Mapping[str, Any]
) -> Genome:
    """Of all schedules within the budget the one of the least FD, first on few samples, then the best of them on more. `sizes`: `screened`, `best` and
    `scored`, of samples, schedules and samples."""
    space = setting.study.space
    within = [g for g in genomes_of(setting.study) if space.cost(g)["macs_share"] <= budget]
    few, many = (16, 32) if setting.quick else (sizes["screened"], sizes["scored"])
    what = f"within {budget:g}, {name}"
    rough = bench.row(f"all {what}", lambda: scored(setting, within, recovered, few))["fd"]
    best = [within[place] for place in np.argsort(rough)[: sizes["best"]]]
    fine = bench.row(f"the best {what}", lambda: scored(setting, best, recovered, many, "others"))["fd"]
    return tuple(best[int(np.argmin(fine))])


def winners_of(bench: Benchmark, setting: Setting, rows: Mapping[str, Row]) -> dict[str, Genome]:
    """Of the whole space within the budget what each arm finds best, and the schedule by hand."""
    study = setting.study
    within = [g for g in genomes_of(study) if study.space.cost(g)["macs_share"] <= WINNERS["budget"]]
    frozen = bench.row("frozen, within the budget", lambda: scored(setting, within, 0))["fd"]
    recovered = bench.row("recovered 300, within the budget", lambda: scored(setting, within, 300))["fd"]
    found = {
        "frozen": within[int(np.argmin(frozen))],
        "recovered 300": within[int(np.argmin(recovered))],
        "additive 1000": within[int(np.argmin(added_up(study, rows["probes of 1000"], within)))],
        "by hand": confirm_pilot.by_hand(setting.confirmed, WINNERS["budget"]),
    }
    return {name: tuple(genome) for name, genome in found.items()}


def prepared(bench: Benchmark, setting: Setting) -> None:
    """The trained network, copied, and its judges; the rows rest on them."""
    latent.lend(setting.confirmed.trained, setting.run)
    with open_session(setting.study, setting.run) as session:
        for _ in session.prepare(threads=1):
            pass
    for judge in judges_of(setting.study)[0][:2]:
        for _ in judge.prepare(setting.run, 0, "cpu"):
            pass
    study = setting.study
    bench.rest_on(supernet=study.supernet.digest(setting.run / "supernet"), judge=study.evaluator.digest(setting.run))


def scored_by_each(
    bench: Benchmark, setting: Setting, genomes: Sequence[Genome]
) -> tuple[dict[str, Row], dict[str, Row]]:
    """The trainings of the subnets of all intervals, and what each arm says of these schedules."""
    study, budgets = setting.study, SETTINGS["recovered"]
    widths = range(len(study.space.choices[0].options))
    everywhere = {width: by_interval(study.space.decode((width,) * len(study.space.choices))) for width in widths}
    tables = bench.rows(
        {
            f"specialists of width {width}, {steps} steps": (
                fine_tuned,
                setting,
                everywhere[width],
                steps,
                -steps,
                specialists(setting, width, steps),
            )
            for steps in budgets
            for width in widths
        }
    )
    arms = bench.rows(
        {
            "frozen": (scored, setting, genomes, 0),
            "probes, frozen": (scored, setting, probes(study), 0),
            "probes of 1000": (scored, setting, probes(study), budgets[-1]),
            **{f"recovered {steps}": (scored, setting, genomes, steps) for steps in budgets},
        }
    )
    return tables, arms


def truths(
    bench: Benchmark, setting: Setting, schedules: Sequence[Schedule], seeds: Sequence[int]
) -> dict[tuple[str, int], Row]:
    """What each schedule is worth once it is trained with each seed, by its digest and the seed."""
    pairs = {(one.digest, seed): one for seed in seeds for one in schedules}
    keys = {pair: "truth of {}, seed {}".format(*pair) for pair in pairs}
    folders = {pair: bench.folder / "truth" / "{}-{}".format(*pair) for pair in pairs}
    rows = bench.rows({keys[pair]: (truth, setting, one, pair[1], folders[pair]) for pair, one in pairs.items()})
    return {pair: rows[key] for pair, key in keys.items()}


def agreements(
    bench: Benchmark, setting: Setting, genomes: Sequence[Genome], tables: Mapping[str, Row], arms: Mapping[str, Row]
) -> dict[str, Row]:
    """Of each arm, how it ranks the schedules within their bands, over what two trainings of them agree."""
    study = setting.study
    digests = [study.space.decode(genome).digest for genome in genomes]
    rows = truths(bench, setting, [study.space.decode(genome) for genome in genomes], PROTOCOL.seeds)
    bands = np.repeat(np.arange(len(SETTINGS["bands"])), len(genomes) // len(SETTINGS["bands"]))
    known = [np.array([rows[digest, seed]["fd"][0] for digest in digests]) for seed in PROTOCOL.seeds]
    by_pixels = [np.array([rows[digest, seed][PIXELS]["fd"][0] for digest in digests]) for seed in PROTOCOL.seeds]
    predicted = {
        "macs": [-study.space.cost(genome)["macs"] for genome in genomes],
        "frozen": arms["frozen"]["fd"],
        "frozen, additive": added_up(study, arms["probes, frozen"], genomes),
        **{f"recovered {steps}": arms[f"recovered {steps}"]["fd"] for steps in SETTINGS["recovered"]},
        "additive 1000": added_up(study, arms["probes of 1000"], genomes),
    }
    each = {name: agreement(values, known, bands) for name, values in predicted.items()}
    ceiling = with_interval(agreement(known[0], known[1:], bands), len(genomes), RESAMPLES)
    bench.reckon("ceiling", {"tau": ceiling[0], "interval": ceiling[1]})
    training = float(np.mean([row["training_macs"] for row in rows.values()]))
    costs = costs_of(arms, tables, len(genomes_of(study)), training)
    found = {}
    for name, mine in each.items():
        tau, interval = with_interval(mine, len(genomes), RESAMPLES)
        pixels = agreement(predicted[name], by_pixels, bands)
        found[name] = bench.reckon(
            f"tau of {name}",
            {
                "tau": tau,
                "interval": interval,
                "over_ceiling": tau / ceiling[0] if ceiling[0] > 0 else None,
                "less_macs": against(mine, each["macs"], len(genomes)),
                "macs_share_of_training": costs[name],
                "tau_by_pixels": with_interval(pixels, len(genomes), RESAMPLES)[0],
            },
        )
    return found


def main() -> None:
    bench = Benchmark("recover", __doc__ or "", ("nas/evidence", "search_spaces/shipped/train_diffusers.py"), PROTOCOL)
    setting = Setting(bench.folder, bench.quick)
    prepared(bench, setting)
    genomes = drawn(setting)
    tables, arms = scored_by_each(bench, setting, genomes)
    winners = winners_of(bench, setting, arms)
    found = agreements(bench, setting, genomes, tables, arms)
    compare_winners(bench, setting, winners)
    claimed = found[CLAIMED] if found[CLAIMED]["macs_share_of_training"] <= 0.5 else {}
    bench.finish(
        [
            Target(
                "tau_over_ceiling",
                f"Kendall's tau within bands of {CLAIMED}, named beforehand, over that between two trainings' scores; None where it costs over half of training",
                0.7,
                claimed.get("over_ceiling"),
                at_most=False,
            ),
            Target(
                "tau_over_macs",
                "lower end of the 95 % interval of its tau less that of multiply-adds alone",
                0.0,
                claimed["less_macs"][0] if claimed else None,
                at_most=False,
            ),
        ]
    )


def costs_of(arms: Mapping[str, Row], tables: Mapping[str, Row], ranked: int, training: float) -> dict[str, float]:
    """MACs of an arm for each schedule that it can rank, the space's, as a share of training one. Probes and trainings are shared by all."""

    def table(steps: int) -> float:
        return sum(float(row["training_macs"]) for name, row in tables.items() if name.endswith(f", {steps} steps"))

    def probing(name: str) -> float:
        return float(arms[name]["sampling_macs"] * len(arms[name]["fd"]))

    last = SETTINGS["recovered"][-1]
    spent = {
        "macs": 0.0,
        "frozen": arms["frozen"]["sampling_macs"],
        "frozen, additive": probing("probes, frozen") / ranked,
        **{
            f"recovered {steps}": table(steps) / ranked + arms[f"recovered {steps}"]["sampling_macs"]
            for steps in SETTINGS["recovered"]
        },
        "additive 1000": (table(last) + probing("probes of 1000")) / ranked,
    }
    return {name: macs / training for name, macs in spent.items()}


def compare_winners(bench: Benchmark, setting: Setting, winners: Mapping[str, Genome]) -> None:
    """Each against the frozen supernet's, once trained."""
    study, seeds = setting.study, WINNERS["seeds"]
    schedules = {name: study.space.decode(genome) for name, genome in winners.items()}
    rows = truths(bench, setting, [*schedules.values()], seeds)

    def of(name: str) -> list[Row]:
        return [rows[schedules[name].digest, seed] for seed in seeds]

    for name, genome in winners.items():
        share = study.space.cost(genome)["macs_share"]
        for rival in ("frozen", "by hand"):
            words = f"winner of {name} against that of {rival}"
            bench.reckon(words, {"genome": genome, "macs_share": share, **compared(of(name), of(rival))})


if __name__ == "__main__":
    main()
