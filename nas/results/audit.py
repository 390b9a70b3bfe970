"""Are the cheap scores to be trusted? Proxies against the reference score on schedules spread over the budgets.

The reference is the study's evaluator at its last rung, on two seeds that no search uses: its agreement with itself bounds what
any proxy can show. Across budgets every proxy looks good, because more MACs give better images; so agreement is reported inside
bands of equal MACs too.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from nas.contracts import (
    Genome,
    Problem,
    Progress,
    Schedule,
    Score,
    SearchSpace,
    UserError,
    derive_seed,
    digest_of,
)
from nas.genomes.genetics import IntervalCosts, cheapest, dearest, feasible_genomes, repair

if TYPE_CHECKING:
    from nas.engine.cluster import Workers
    from nas.study import Study

Array = npt.NDArray[np.float64]

TABLE = "scores.jsonl"
REFERENCES = ("reference", "reference again")
RESAMPLES = 1000
FEWEST = 10


def schedules_to_audit(space: SearchSpace, count: int, seed: int) -> list[Genome]:
    """The whole space where it has no more than `count` genomes; else `count` random ones, spread evenly over the MACs.

    In lexicographic order, so that neighbours share the beginnings of their trajectories.
    """
    free = Problem(space, ("macs",))
    sizes = [len(choice.options) for choice in space.choices]
    if math.prod(sizes) <= count:
        return sorted(feasible_genomes(free))
    least, most = (space.cost(end(space))["macs"] for end in (cheapest, dearest))
    found: set[Genome] = set()
    number = 0
    while len(found) < count and number < 20 * count:
        rng = np.random.default_rng(derive_seed(seed, number, "audit"))
        found.add(_near(space, least + (most - least) * ((number + 0.5) / count % 1.0), rng))
        number += 1
    return sorted(found)


def _near(space: SearchSpace, target: float, rng: np.random.Generator) -> Genome:
    """A random genome of at most, and about, so many MACs."""
    costs = IntervalCosts(space)
    genome = [int(rng.integers(len(choice.options))) for choice in space.choices]
    macs = costs.total(tuple(genome))
    for i in rng.permutation(len(genome)).tolist():
        row = costs.by_option(genome, i)
        dearer = [option for option, price in enumerate(row) if price > row[genome[i]]]
        if macs < target and dearer:
            option = int(rng.choice(dearer))
            macs += row[option] - row[genome[i]]
            genome[i] = option
    least = space.cost(cheapest(space))["macs"]
    return repair(Problem(space, ("macs",), {"macs": max(target, least)}), tuple(genome), rng)


def measure(study: Study, folder: Path, count: int, device: str, workers: Workers | None = None) -> Iterator[Progress]:
    """Scores the schedules by every proxy and twice by the reference, into `<folder>/audit/scores.jsonl`, in this process or on
    Ray workers; goes on where an earlier call stopped. A file of another supernet, space or evaluator is refused."""
    path = folder / "audit" / TABLE
    recipes = {"reference": study.evaluator, **study.proxies}
    header = {
        "supernet": study.supernet.digest(folder / "supernet"),
        "space": digest_of(study.space.describe()),
        "evaluators": {name: recipe.digest(folder) for name, recipe in recipes.items()},
        "seed": study.seed,
    }
    done = _resume(path, header)
    genomes = schedules_to_audit(study.space, count, study.seed)
    check_enough(genomes)
    left = [genome for genome in genomes if genome not in done]
    score = partial(Scorer, study, folder.resolve())
    if workers is None:
        rows: Iterator[dict[str, Any]] = map(score(device), left) if left else iter(())
    else:
        from nas.engine.ray_runner import map_on_ray

        rows = map_on_ray(score, left, study, workers)
    with path.open("a") as file:
        for number, row in enumerate(rows, len(genomes) - len(left) + 1):
            file.write(json.dumps(row) + "\n")
            file.flush()
            yield Progress("audit", number, len(genomes))


def check_enough(genomes: Sequence[Genome]) -> None:
    """Raises UserError where orders cannot be compared."""
    if len(genomes) < FEWEST:
        raise UserError(f"{len(genomes)} schedules are too few to compare orders; at least {FEWEST} are needed")


class Scorer:
    """Every proxy and the reference, loaded; called with a genome it gives a row of the table. A schedule that cannot be scored
    has no scores in it, but the reason."""

    def __init__(self, study: Study, folder: Path, device: str) -> None:
        supernet = study.supernet.load(folder / "supernet", device)
        self._study = study
        self._proxies = {name: recipe.load(supernet, folder) for name, recipe in study.proxies.items()}
        self._reference = study.evaluator.load(supernet, folder)

    def __call__(self, genome: Genome) -> dict[str, Any]:
        schedule = self._study.space.decode(genome)
        row = {"genome": genome, "digest": schedule.digest, "cost": dict(self._study.space.cost(genome))}
        try:
            scores = self._scores(schedule)
            if odd := [name for name, score in scores.items() if not _finite(score)]:
                raise ArithmeticError(f"{odd[0]} is not finite: {scores[odd[0]]['values']}")
            return {**row, "scores": scores}
        except UserError:
            raise
        except Exception as error:  # whatever a user's evaluator raises is the reason
            return {**row, "scores": {}, "failure": f"{type(error).__name__}: {error}"}

    def _scores(self, schedule: Schedule) -> dict[str, Any]:
        study = self._study
        scores: dict[str, Any] = {}
        for name, proxy in self._proxies.items():
            samples, seed = study.proxies[name].rungs[0], derive_seed(study.seed, "search noise")
            scores[name] = Score.plain(proxy(schedule, samples, seed)).charged_in_full().to_json()
        for number, name in enumerate(REFERENCES):
            seed = derive_seed(study.seed, number, "audit reference")
            score = Score.plain(self._reference(schedule, study.evaluator.rungs[-1], seed))
            scores[name] = score.charged_in_full().to_json()
        return scores


def _resume(path: Path, header: Mapping[str, Any]) -> set[Genome]:
    """Genomes that are scored already; what failed is tried again. Writes the header of a new file; drops a torn last line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        unfinished = path.with_suffix(".partial")
        unfinished.write_text(json.dumps(header) + "\n")
        os.replace(unfinished, path)
        return set()
    content = path.read_bytes()
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        with path.open("rb+") as file:
            file.truncate(whole)
    stored, *rows = _lines(path)
    if stored != header:
        raise UserError(
            f"{path} was written for another supernet, space, evaluator or seed; move it away, or use another --out"
        )
    return {tuple(row["genome"]) for row in rows if row["scores"] and all(map(_finite, row["scores"].values()))}


def _finite(score: Mapping[str, Any]) -> bool:
    return all(map(math.isfinite, score["values"].values()))


def _lines(path: Path) -> list[dict[str, Any]]:
    """The header and the rows. Raises UserError where there is no such file, or it is damaged."""
    if not path.is_file():
        raise UserError(f"{path} does not exist; `nas audit` writes it")
    try:
        parsed = [json.loads(line) for line in path.read_text().splitlines()]
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}); delete it, and `nas audit` writes it again") from error
    if not parsed:
        raise UserError(f"{path} is empty; delete it, and `nas audit` writes it again")
    return parsed


def read_table(
    path: Path, genomes: Collection[Genome] | None = None, objective: str | None = None
) -> list[dict[str, Any]]:
    """The rows of an audit, by genome; of these genomes alone, where given. Of scores that measure several things the `objective` comes first, which is what is
    compared. Raises UserError where the file is missing or damaged."""
    rows = _lines(path)[1:]
    for score in (score for row in rows for score in row["scores"].values() if objective in score["values"]):
        for part in ("values", "labels"):
            if objective in score[part]:
                score[part] = {objective: score[part][objective], **score[part]}
    last = {tuple(row["genome"]): row for row in rows}  # what failed may have been tried again
    return [row for genome, row in sorted(last.items()) if genomes is None or genome in genomes]


# ------------------------------------------------------------------------------------------------------------- agreement


class Agreement:
    """Kendall's tau-b of one score with another, over all pairs or those inside a band; under weights, so that schedules can
    be resampled. `bands`: the band of each schedule, (n,), or None for one band."""

    def __init__(self, mine: Array, theirs: Array, bands: npt.NDArray[np.int64] | None = None) -> None:
        a, b = (np.sign(values[:, None] - values[None]) for values in (mine, theirs))
        mask = 1.0 if bands is None else (bands[:, None] == bands[None])
        self._terms = [term * mask for term in (a * b, a * a, b * b)]

    def tau(self, weights: Array) -> Array:
        """weights (r, n), how often each schedule counts; tau (r,), NaN where there is nothing to order."""
        both, mine, theirs = (((weights @ term) * weights).sum(1) for term in self._terms)
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.where(mine * theirs > 0, both / np.sqrt(mine * theirs), np.nan)


def bands_of(macs: Array, count: int = 5) -> npt.NDArray[np.int64]:
    """Bands of equal width in MACs, 0 the cheapest, (n,)."""
    edges = np.linspace(macs.min(), macs.max(), count + 1)[1:-1]
    return np.searchsorted(edges, macs, side="right").astype(np.int64)


def with_interval(agreements: Sequence[Agreement], count: int, resamples: int) -> tuple[float, tuple[float, float]]:
    """Mean tau of some agreements on the same `count` schedules, and its 95 % bootstrap interval over schedules."""
    draws = np.random.default_rng(derive_seed(0, "bootstrap")).multinomial(count, np.full(count, 1 / count), resamples)
    weights = np.concatenate([np.ones((1, count)), draws.astype(np.float64)])
    values = np.mean([agreement.tau(weights) for agreement in agreements], axis=0)
    low, high = np.nanquantile(values[1:], (0.025, 0.975)) if np.isfinite(values[1:]).any() else (math.nan, math.nan)
    return float(values[0]), (float(low), float(high))


def summary(rows: Sequence[Mapping[str, Any]], resamples: int = RESAMPLES) -> dict[str, Any]:
    """What the audit found: for each proxy, and for the reference against itself, its agreement with the reference.

    `tau`, `tau_in_band`: mean over the two reference seeds, with 95 % bootstrap intervals. `relative`: tau_in_band over the
    reference's own. `recall`: share of the reference's best tenth that is in the proxy's. `regret`: inside each band, how much
    worse than the band's best the proxy's pick is, judged by the mean of both references, as a share of that best; mean
    over bands. `macs_share`: MACs for each schedule as a share of the reference's.
    """
    failed = [row["failure"] for row in rows if not row["scores"]]
    rows = [row for row in rows if row["scores"]]
    if len(rows) < FEWEST:
        reason = (
            f"; {len(failed)} failed, one with {failed[-1]}, and the same command tries them again" if failed else ""
        )
        raise UserError(
            f"{len(rows)} scored schedules are too few to compare orders; at least {FEWEST} are needed{reason}"
        )
    names = [name for name in rows[0]["scores"] if name not in REFERENCES]
    macs = np.array([row["cost"]["macs"] for row in rows], dtype=np.float64)
    bands = bands_of(macs)
    first, second = (_column(rows, name) for name in REFERENCES)
    retest, retest_interval = with_interval([Agreement(first, second, bands)], len(rows), resamples)
    spent = {name: float(np.mean([_macs(row, name) for row in rows])) for name in (*names, REFERENCES[0])}
    found = []
    for name in names:
        values = _column(rows, name)
        tau, tau_interval = with_interval([Agreement(values, r) for r in (first, second)], len(rows), resamples)
        inside = [Agreement(values, reference, bands) for reference in (first, second)]
        in_band, in_band_interval = with_interval(inside, len(rows), resamples)
        found.append(
            {
                "proxy": name,
                "label": _label(rows[0], name),
                "tau": tau,
                "tau_interval": tau_interval,
                "tau_in_band": in_band,
                "tau_in_band_interval": in_band_interval,
                "relative": in_band / retest if retest else math.nan,
                "recall": (_recall(values, first) + _recall(values, second)) / 2,
                "regret": _regret(values, (first + second) / 2, bands),
                "macs_share": spent[name] / spent[REFERENCES[0]] if spent[REFERENCES[0]] else math.nan,
            }
        )
    return {
        "schedules": len(rows),
        "failed": len(failed),
        "failure": failed[-1] if failed else None,
        "bands": [int((bands == band).sum()) for band in np.unique(bands)],
        "reference": _label(rows[0], REFERENCES[0]),
        "test_retest": {
            "tau": with_interval([Agreement(first, second)], len(rows), resamples)[0],
            "tau_in_band": retest,
            "tau_in_band_interval": retest_interval,
        },
        "proxies": sorted(found, key=lambda row: (math.isnan(row["tau_in_band"]), -row["tau_in_band"])),
    }


def _label(row: Mapping[str, Any], name: str) -> str:
    """What a score is called; a third party's may have no label."""
    score = row["scores"][name]
    return str(next(iter(score["labels"].values()), next(iter(score["values"]))))


def _column(rows: Sequence[Mapping[str, Any]], name: str) -> Array:
    return np.array([next(iter(row["scores"][name]["values"].values())) for row in rows], dtype=np.float64)


def _macs(row: Mapping[str, Any], name: str) -> float:
    return float(row["scores"][name]["spent"].get("macs", 0.0))


def _recall(mine: Array, theirs: Array) -> float:
    count = max(1, len(mine) // 10)
    return len({*np.argsort(mine)[:count]} & {*np.argsort(theirs)[:count]}) / count


def _regret(mine: Array, judge: Array, bands: npt.NDArray[np.int64]) -> float | None:
    lost = []
    for band in np.unique(bands):
        inside = np.flatnonzero(bands == band)
        best = judge[inside].min()
        if best > 0:  # of a loss of nothing, and of an unbiased estimate below it, there is no share
            lost.append((judge[inside[np.argmin(mine[inside])]] - best) / best)
    return float(np.mean(lost)) if lost else None


# --------------------------------------------------------------------------------------------------------------- tabular


@dataclass(frozen=True)
class Tabular:
    """An evaluator that looks scores up in the table of an audit: searchers run against it without any network.

    `path`: a `scores.jsonl`, relative to where the study was read. `columns`: which of its scores stands for each rung, the cheapest first.
    """

    path: str
    columns: tuple[str, ...] = REFERENCES
    base: str = field(default_factory=os.getcwd, repr=False, compare=False, kw_only=True)

    @property
    def file(self) -> Path:
        return Path(self.base) / Path(self.path).expanduser()

    @property
    def rungs(self) -> tuple[int, ...]:
        return tuple(range(1, len(self.columns) + 1))

    @property
    def metrics(self) -> tuple[str, ...]:
        return ("fd",)

    def describe(self) -> Mapping[str, Any]:
        return {"class": "Tabular", "columns": self.columns}

    def digest(self, folder: Path) -> str:
        return digest_of({**self.describe(), "table": hashlib.sha256(self.file.read_bytes()).hexdigest()})

    def prepare(self, folder: Path, seed: int, device: str) -> Iterator[Progress]:
        yield from ()

    def load(self, supernet: Any, folder: Path) -> Any:
        return _LoadedTabular(self, supernet)


class _LoadedTabular:
    def __init__(self, recipe: Tabular, supernet: Any) -> None:
        self.supernet = supernet
        self._recipe = recipe
        self._rows = {row["digest"]: row for row in read_table(recipe.file) if row["scores"]}

    def __call__(self, schedule: Schedule, rung: int, seed: int) -> Score:
        """Raises UserError for a schedule that the table does not hold."""
        row = self._rows.get(schedule.digest)
        if row is None:
            raise UserError(
                f"schedule {schedule.digest} is not among the {len(self._rows)} of {self._recipe.file}; audit the whole space"
            )
        score = Score.from_json(row["scores"][self._recipe.columns[rung - 1]])
        name = "fd" if "fd" in score.values else next(iter(score.values))
        value, replicates = score.values[name], score.replicates.get(name, ())
        return replace(score, values={"fd": value}, replicates={"fd": replicates}, labels={"fd": f"table@{rung}"})

    def sampler_of(self, schedule: Schedule) -> Mapping[str, Any]:
        return {}

    def sample(self, schedule: Schedule, count: int, seed: int) -> Any:
        raise UserError("a table of scores holds no images")
