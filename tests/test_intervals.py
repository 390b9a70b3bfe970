"""Partitions of the timesteps: exact segmentation against brute force, published formulas, measured similarity."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations, pairwise, product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from evaluators.images import Digits
from nas.cli.measure import study_share
from nas.contracts import UserError
from nas.testing import TableSpace
from search_spaces.intervals import (
    bounded,
    dissimilarity,
    elbow,
    equal,
    equal_snr,
    even,
    free,
    linear_budgets,
    linspace,
    merged,
    scatter,
    segments,
    starts,
    uniform,
)
from search_spaces.noise import NoiseSchedule
from search_spaces.partitions import Partitions, best_schedule
from search_spaces.stepwise import Stepwise
from search_spaces.supernet import Elastic
from search_spaces.training import Sandwich
from search_spaces.training.optimiser import Batches
from search_spaces.training.similarity import GradientSimilarity
from tests.conftest import TINY
from tests.toy import toy_study

VALUES = arrays(np.float64, st.tuples(st.integers(2, 7), st.just(2)), elements=st.integers(-9, 9).map(float))


@given(VALUES)
def test_segmentation_equals_brute_force(effects: np.ndarray) -> None:
    size, cost = len(effects), scatter(effects)
    for count, (places, found) in enumerate(segments(cost, size), 1):
        every = []
        for inner in combinations(range(1, size), count - 1):
            ends = (0, *inner, size)
            every.append(sum(cost[start, stop - 1] for start, stop in pairwise(ends)))
        assert found == pytest.approx(min(every), abs=1e-9)
        assert len(places) == count - 1
        ends = (0, *places, size)
        assert sum(cost[start, stop - 1] for start, stop in pairwise(ends)) == pytest.approx(found, abs=1e-9)


def test_a_partitions_budget_is_the_studys() -> None:
    study = toy_study(limits={})
    whole = study.full["macs"]
    for limits, share in (({}, 0.5), ({"macs": 0.3 * whole}, 0.3), ({"macs": 0.3 * whole, "macs_share": 0.2}, 0.2)):
        assert study_share(replace(study, limits=limits)) == pytest.approx(share)


def test_blocks_of_similar_timesteps_are_found_and_counted() -> None:
    affinity: npt.NDArray[np.float64] = np.kron(np.eye(3), np.ones((4, 4))).astype(np.float64)
    found = segments(dissimilarity(affinity), 8)
    places, error = found[2]
    assert places == (4, 8)
    assert error == pytest.approx(0.0)
    assert elbow([cost for _, cost in found]) == 3
    assert dissimilarity(affinity)[2, 5] == pytest.approx(8 / 4)  # two pairs of halves differ, both ways


def test_levels_of_other_numbers_of_channels_have_no_one_width(tmp_path: Path) -> None:
    net = Elastic(TINY, channels=((4, 8), (4, 8, 16)), per_level=("width",))
    space, study = Stepwise(net, uniform(4), (2, 2)), toy_study()
    loaded = SimpleNamespace(supernet=net.initial(0))
    partitions = Partitions(space, loaded, Digits(), study.evaluator, tmp_path, 0, 4, None, 0.9, "fd")
    with pytest.raises(UserError, match="its levels have different numbers of channels to choose from"):
        next(partitions.measure())


def test_intervals_and_boundaries_are_each_others_inverse() -> None:
    for steps, count in product((uniform(10), linspace(10, 999, 20), uniform(7)), (1, 3, 5)):
        intervals = equal(steps, count)
        assert bounded(steps, starts(steps, intervals)) == intervals
    assert bounded((900, 500, 100), (200, 700)) == (1, 1, 1)
    assert bounded((900, 500, 100), (501,)) == (1, 2)
    with pytest.raises(UserError, match="leave a step"):
        bounded((900, 500, 100), (20, 200))
    assert merged((900, 500, 100), (20, 200, 210, 700)) == (210, 700)
    assert bounded((900, 500, 100), merged((900, 500, 100), (20, 200, 210, 700))) == (1, 1, 1)


def test_equal_snr_is_equal_in_decibels() -> None:
    abar = NoiseSchedule().alphas_cumprod
    decibels = 10 * np.log10(abar / (1 - abar))
    levels = [decibels[0], *(decibels[t] for t in equal_snr(5, abar)), decibels[-1]]
    assert -np.diff(levels) == pytest.approx(np.full(5, (decibels[0] - decibels[-1]) / 5), abs=0.6)
    assert even(4) == (250, 500, 750)
    cosine = NoiseSchedule(beta_schedule="squaredcos_cap_v2").alphas_cumprod
    assert cosine[-1] < 1e-8, "it ends where hardly a signal is left, but as one step after another"
    decibels = 10 * np.log10(cosine / (1 - cosine))
    inner = np.linspace(decibels[0], decibels[-1], 5)[1:-1]
    assert equal_snr(4, cosine) == tuple(int(np.argmax(decibels <= level)) for level in inner)


def test_equal_snr_of_a_process_that_ends_without_signal_has_as_many_intervals() -> None:
    """Where nothing is left there are no decibels to divide."""
    abar = NoiseSchedule(prediction="v_prediction", rescale_betas_zero_snr=True).alphas_cumprod
    for count in (3, 5, 10):
        found = equal_snr(count, abar)
        assert len(found) == count - 1
        assert all(a < b for a, b in pairwise((0, *found, len(abar) - 1)))


def test_the_linear_budgets_are_tdcs() -> None:
    """Mean k + (1 - k)(N + 1) / (2 N): 0.80 for k = 0.5 and N = 5."""
    budgets = linear_budgets(5, 0.5)
    assert budgets == pytest.approx((0.6, 0.7, 0.8, 0.9, 1.0))
    assert np.mean(budgets) == pytest.approx(0.8)
    assert linear_budgets(5, 0.5, "noisy") == budgets[::-1]
    with pytest.raises(UserError, match="least=0"):
        linear_budgets(5, 0.0)


def test_the_best_schedule_of_a_partition_is_the_best_of_all_that_it_allows() -> None:
    rng = np.random.default_rng(0)
    space = TableSpace(((1, 4, 9),) * 6)
    effects = -np.sort(-rng.random((6, 3)), axis=1)
    for intervals in ((6,), (2, 4), (1, 2, 3), (1,) * 6):
        for budget in (12.0, 30.0):
            found = best_schedule(space, effects, intervals, budget)
            allowed = [
                tuple(np.repeat(options, intervals).tolist()) for options in product(range(3), repeat=len(intervals))
            ]
            fits = [genome for genome in allowed if space.cost(genome)["macs"] <= budget]
            best = min(sum(effects[i, gene] for i, gene in enumerate(genome)) for genome in fits)
            assert found in fits
            assert sum(effects[i, gene] for i, gene in enumerate(found)) == pytest.approx(best)


@pytest.fixture(scope="module")
def similarity(tiny_net: Elastic) -> GradientSimilarity:
    loaded = tiny_net.initial(0)
    list(Sandwich(steps=60, batch=32, warmup=5).fit(loaded, Digits().load(), 0))
    measured = GradientSimilarity(loaded, Digits().load(), 0, batch=64, dimensions=1024)
    list(measured.measure([50, 60, 400, 900]))
    return measured


def test_gradients_of_neighbours_are_more_alike_than_of_strangers(similarity: GradientSimilarity) -> None:
    affinity = similarity.affinity
    assert np.allclose(affinity, affinity.T)
    assert np.diag(affinity) == pytest.approx(np.ones(4))
    assert affinity[0, 1] > affinity[0, 2] > affinity[0, 3]
    assert all(p.grad is None and not p.requires_grad for p in similarity.net.full.parameters())


def test_the_projection_keeps_the_cosine_of_whole_gradients(similarity: GradientSimilarity) -> None:
    """Against the same two half-batches without a projection: one bucket for each weight."""
    count = sum(p.numel() for p in similarity.net.full.parameters())
    whole = GradientSimilarity(similarity.net, similarity.data, 0, batch=64, dimensions=count)
    batches = Batches(similarity.net, similarity.data, 64, flip=False)

    class Place:
        def __init__(self, start: int) -> None:
            self.start = start

        def add(self, gradient: torch.Tensor, to: torch.Tensor) -> None:
            to[self.start : self.start + gradient.numel()] += gradient.flatten()

    starts = np.cumsum([0, *(p.numel() for p in similarity.net.full.parameters())]).tolist()[:-1]
    similarity.net.full.requires_grad_(True)
    places: Any = [*map(Place, starts)]
    halves = [whole._two_halves(timestep, batches, places) for timestep in (50, 60)]
    similarity.net.full.requires_grad_(False)
    (a, b), (c, d) = halves
    exact = (a @ d + c @ b) / 2 / np.sqrt((a @ b) * (c @ d))
    assert similarity.affinity[0, 1] == pytest.approx(exact, abs=0.1)


def test_gradients_of_parts_are_those_of_the_whole(
    similarity: GradientSimilarity, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of large images a network has no room for all at once."""
    found = []
    for at_once in (1, 64 * 10):  # images of 8 x 8: one by one, and in tens
        monkeypatch.setattr("search_spaces.training.similarity.AT_ONCE", at_once)
        parts = GradientSimilarity(similarity.net, similarity.data, 0, batch=64, dimensions=1024)
        list(parts.measure([50, 400]))
        found.append(parts.affinity)
    assert np.allclose(found[0], found[1], atol=1e-4)
    assert found[0][0, 1] == pytest.approx(similarity.affinity[0, 2], abs=1e-4)


@pytest.mark.long
def test_similarity_is_that_of_the_gradients_and_not_of_their_noise(tiny_net: Elastic) -> None:
    """The two half-batches' noises are independent, so that their product is unbiased: with few images the affinity is that of many, in the
    mean. The cosine of whole noisy gradients would be far smaller."""
    loaded = tiny_net.initial(0)
    list(Sandwich(steps=60, batch=32, warmup=5).fit(loaded, Digits().load(), 0))
    data = Digits().load()

    def affinity(batch: int, seed: int) -> float:
        measured = GradientSimilarity(loaded, data, seed, batch=batch, dimensions=4096)
        for _ in measured.measure([400, 440]):
            pass
        return float(measured.affinity[0, 1])

    many = np.mean([affinity(512, seed) for seed in range(2)])
    few = [affinity(16, seed) for seed in range(12)]
    assert abs(np.mean(few) - many) < 3 * np.std(few, ddof=1) / np.sqrt(12) + 0.05


@given(VALUES)
def test_scatter_is_the_sum_of_squared_distances_to_the_mean(effects: np.ndarray) -> None:
    cost = scatter(effects)
    for left, right in combinations(range(len(effects) + 1), 2):
        part = effects[left:right]
        assert cost[left, right - 1] == pytest.approx(part.var(axis=0).sum() * len(part), abs=1e-9)
    assert np.isinf(cost[np.tril_indices(len(effects), -1)]).all()


@pytest.mark.parametrize("timesteps", [(5, -1), (5, 5), (5, 6), ()])
def test_timesteps_that_no_sampler_can_follow_are_refused(timesteps: tuple[int, ...]) -> None:
    with pytest.raises(UserError, match="must decrease strictly to at least 0"):
        free(*timesteps)
    assert free(7, 1, 0) == (7, 1, 0)


def test_the_elbow_is_where_the_curve_is_farthest_below_the_line_between_its_ends() -> None:
    assert elbow([10.0, 4.0, 3.5, 3.2, 3.0]) == 2
    assert elbow([10.0, 9.0, 8.5, 1.0, 0.0]) == 4
    assert elbow([5.0, 5.0, 5.0]) == 1
    assert elbow([5.0]) == 1
    assert elbow([5.0, 2.0]) == 2


def test_equal_spacing_includes_both_ends() -> None:
    assert linspace(10) == (999, 888, 777, 666, 555, 444, 333, 222, 111, 0)
    assert linspace(3, first=500, last=100) == (500, 300, 100)
