from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
import pytest
from scipy.stats import kendalltau
from sklearn.linear_model import Ridge
from sklearn.model_selection import LeaveOneOut, cross_val_predict

from nas.contracts import Problem, Score, UserError
from nas.searchers import ranking
from nas.searchers.evolution import Evolution
from nas.searchers.ranking import Ranking
from nas.testing import check_searcher, table_problem, toy_score
from tests.test_searchers import drive, run_to, scored


def sample(count: int, sizes: tuple[int, ...], seed: int = 0) -> list[tuple[int, ...]]:
    rng = np.random.default_rng(seed)
    return [tuple(int(rng.integers(size)) for size in sizes) for _ in range(count)]


def test_it_is_a_ridge_regression_and_its_tau_is_that_of_leaving_one_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranking, "PENALTIES", (0.5,))
    sizes = (3, 2, 4)
    genomes = sample(25, sizes)
    scores = [toy_score(genome).values["fd"] + 0.3 * np.sin(7 * i) for i, genome in enumerate(genomes)]
    model = Ranking(genomes, scores, sizes)
    codes = np.array(
        [[float(g >= j) for g, size in zip(x, sizes, strict=True) for j in range(1, size)] for x in genomes]
    )
    centred = codes - codes.mean(0)
    penalty = 0.5 * np.linalg.eigvalsh(centred @ centred.T).clip(0).mean()
    reference = Ridge(alpha=penalty, fit_intercept=False)
    predicted = cross_val_predict(reference, centred, model.ranks, cv=LeaveOneOut())
    assert model.tau == pytest.approx(kendalltau(predicted, model.ranks).statistic)
    assert model.predict(genomes) == pytest.approx(reference.fit(centred, model.ranks).predict(centred))


def test_effects_add_up_to_predictions() -> None:
    sizes = (3, 4, 2)
    genomes = sample(20, sizes)
    model = Ranking(genomes, [toy_score(genome).values["fd"] for genome in genomes], sizes)
    effects = model.effects()
    assert [len(effect) for effect in effects] == list(sizes)
    [base] = model.predict([(0, 0, 0)])
    for genome in product(range(3), range(4), range(2)):
        [predicted] = model.predict([genome])
        assert predicted == pytest.approx(base + sum(e[g] for e, g in zip(effects, genome, strict=True)))


def test_it_knows_what_it_does_not_know() -> None:
    sizes = (4,) * 8
    genomes = sample(60, sizes)
    rng = np.random.default_rng(3)
    assert Ranking(genomes, [toy_score(genome).values["fd"] for genome in genomes], sizes).tau > 0.7
    assert Ranking(genomes, rng.random(60).tolist(), sizes).tau < 0.25
    assert Ranking(genomes, [1.0] * 60, sizes).tau == 0.0


@pytest.mark.parametrize(
    "searcher", [Evolution(population=6, screened=8), Evolution(population=6, screened=8, least_tau=1.0)], ids=repr
)
def test_screened_evolution_keeps_the_laws(searcher: Evolution) -> None:
    check_searcher(searcher)


def test_screening_pays_where_scores_can_be_predicted() -> None:
    plain, screened = (
        np.mean([run_to(Evolution(screened=screened), seed, 80) for seed in range(5)]) for screened in (1, 16)
    )
    assert screened > plain


def test_screening_stops_where_the_model_is_poor_and_says_so() -> None:
    problem = table_problem(genes=8)
    rng = np.random.default_rng(0)
    told = drive(Evolution(population=8, screened=12), problem, lambda genome: scored(float(rng.random())), 60)
    offspring = [trial.origin for trial in told if trial.origin["operator"] == "offspring"]
    assert all((origin["screened"] == 12) == (origin["tau"] >= 0.3) for origin in offspring)
    assert sum(origin["screened"] == 1 for origin in offspring) > len(offspring) / 2

    def smooth(genome: Any) -> Any:
        return toy_score(genome)

    told = drive(Evolution(population=8, screened=12), problem, smooth, 40)
    assert all(trial.origin["screened"] == 12 for trial in told if trial.origin["operator"] == "offspring")


def test_what_cannot_be_screened_for_is_not() -> None:
    """Two measured objectives: the model knows the first alone."""
    table = table_problem(genes=8)
    problem = Problem(table.space, ("fd", "colour"), table.limits)

    def score(genome: Any) -> Score:
        return Score({"fd": toy_score(genome).values["fd"], "colour": float(sum(genome))})

    told = drive(Evolution(population=6), problem, score, 20)
    assert all("screened" not in trial.origin for trial in told)


def test_screening_nothing_is_said_so() -> None:
    with pytest.raises(UserError, match="screened=0"):
        Evolution(screened=0)
