"""Shared prefixes: nothing run twice, nothing changed by a bit, memory bounded."""

from __future__ import annotations

import json
import math
import time
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from evaluators import device
from evaluators.device import Execution, settle
from evaluators.features import ExternalFeatures
from evaluators.frechet import Frechet
from evaluators.images import Digits, ImageArray
from evaluators.proxies import DenoisingLoss
from evaluators.sampling import DDIM, DDPM, sample
from evaluators.trajectories import HEAVY, Meter, Trajectories, _splits, batches
from nas.contracts import Schedule, Step, UserError
from search_spaces.codec import Autoencoder
from search_spaces.intervals import uniform
from search_spaces.supernet import Elastic
from tests.test_codec import CONFIG as LATENT
from tests.test_codec import made
from tests.test_reuse import DEEP_NET


def schedule_of(net: Elastic, *widths: float, timesteps: tuple[int, ...] = ()) -> Schedule:
    return Schedule(
        tuple(Step(t, net.uniform(w)) for t, w in zip(timesteps or uniform(len(widths)), widths, strict=True))
    )


@pytest.mark.parametrize("sampler", [DDIM(), DDPM()])
def test_a_shared_beginning_is_run_once_and_changes_no_bit(tiny_net: Elastic, sampler: Any) -> None:
    net = tiny_net.initial(0)
    trajectories = Trajectories(net, sampler)
    for widths, expected in (((1, 0.5, 0.25, 1), 4), ((1, 0.5, 1, 1), 2), ((1, 0.5, 1, 0.25), 1), ((0.5,) * 4, 4)):
        schedule, before = schedule_of(tiny_net, *widths), replace(trajectories.meter)
        images = trajectories.images(schedule, 7, 0, 8)
        assert torch.equal(images, sample(net, schedule, sampler, 7, 0, 8))
        spent = trajectories.meter.spent_since(before)
        assert spent["calls"] == 8 * expected
        assert spent["cache_hits"] == (1 if expected < 4 else 0)
        assert spent["calls"] + spent["cached_calls"] == 8 * 4
        assert spent["macs"] + spent["cached_macs"] == 8 * sum(net.macs(step) for step in schedule.steps)


def test_what_differs_is_not_shared(tiny_net: Elastic) -> None:
    net = tiny_net.initial(0)
    trajectories = Trajectories(net, DDIM())
    first = schedule_of(tiny_net, 1, 1, timesteps=(900, 500))
    trajectories.images(first, 0, 0, 8)
    others = [
        (schedule_of(tiny_net, 1, 1, timesteps=(900, 400)), 0, 0, 8),
        (first, 1, 0, 8),
        (first, 0, 8, 16),
        (first, 0, 0, 4),
    ]
    for schedule, seed, start, stop in others:
        before = replace(trajectories.meter)
        images = trajectories.images(schedule, seed, start, stop)
        assert trajectories.meter.spent_since(before)["cache_hits"] == 0
        assert torch.equal(images, sample(net, schedule, DDIM(), seed, start, stop))


def test_changed_weights_are_not_mixed_with_kept_states(tiny_net: Elastic) -> None:
    net = tiny_net.initial(0)
    trajectories = Trajectories(net, DDIM())
    schedule = schedule_of(tiny_net, 1, 0.5)
    trajectories.images(schedule, 0, 0, 4)
    with torch.no_grad():
        net.full.conv_in.weight.add_(1.0)
    net.forget()
    assert torch.equal(trajectories.images(schedule, 0, 0, 4), sample(net, schedule, DDIM(), 0, 0, 4))


@pytest.mark.parametrize("states", [0, 1, 3])
def test_memory_is_bounded_and_the_noisy_end_stays_longest(tiny_net: Elastic, states: int) -> None:
    net = tiny_net.initial(0)
    one = 4 * 8 * 8 * 4
    trajectories = Trajectories(net, DDIM(), cache_bytes=states * one)
    schedule = schedule_of(tiny_net, 1, 0.5, 0.25, 1)
    trajectories.images(schedule, 0, 0, 4)
    assert trajectories.bytes_kept == states * one
    before = replace(trajectories.meter)
    images = trajectories.images(schedule_of(tiny_net, 1, 0.5, 0.25, 0.5), 0, 0, 4)
    assert trajectories.meter.spent_since(before)["cached_calls"] == 4 * min(states, 3)
    assert torch.equal(images, sample(net, schedule_of(tiny_net, 1, 0.5, 0.25, 0.5), DDIM(), 0, 0, 4))


def test_what_steps_carry_to_be_reused_goes_first_where_memory_is_short() -> None:
    """Several scores of one schedule sample it once, and the full network, whatever its steps keep; where there is room, that is kept too."""
    net = DEEP_NET.initial(0)
    full = Schedule(tuple(Step(t, net.full_arch) for t in (900, 700, 500, 300)))
    first, *others = full.steps
    reused = net.blocks(net.full_arch)[:-1]
    reusing = Schedule((first, *(replace(step, reuse=reused) for step in others)))
    alike = Schedule((*reusing.steps[:-1], replace(reusing.steps[-1], timestep=200)))
    state = Trajectories(net, DDIM()).states(reusing, 1, 0, 1)[1]
    carried = sum(rows.nbytes for rows in state.cache.values())
    assert carried > HEAVY * state.x.nbytes
    for room, found in ((2 * carried + 3 * state.x.nbytes, 0), (8 * carried, 2)):
        walk = Trajectories(net, DDIM(), cache_bytes=room)
        theirs = walk.kept("the full network's", lambda walk=walk: walk.images(full, 0, 0, 1), 0, 0)  # type: ignore[misc]
        mine = walk.images(reusing, 0, 0, 1)
        assert walk.bytes_kept <= room
        before = replace(walk.meter)
        assert walk.kept("the full network's", lambda: pytest.fail("it was sampled before"), 0, 0) is theirs
        assert torch.equal(walk.images(reusing, 0, 0, 1), mine)
        assert walk.meter.spent_since(before)["calls"] == 0
        before = replace(walk.meter)
        assert torch.equal(walk.images(alike, 0, 0, 1), sample(net, alike, DDIM(), 0, 0, 1))
        assert walk.meter.spent_since(before)["cached_calls"] >= found
        assert walk.bytes_kept <= room
    net.forget()
    walk.images(full, 0, 0, 1)
    assert walk.bytes_kept < carried  # nothing of what the former weights carried


def test_images_are_decoded_once_for_several_scores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made("KL", tmp_path / "vae")
    net = Elastic(LATENT, (1.0,), codec=Autoencoder(str(tmp_path / "vae"))).initial(0)
    schedule = Schedule((Step(900, net.full_arch), Step(400, net.full_arch)))
    walk, decode = Trajectories(net, DDIM()), net.to_images
    seen: list[int] = []

    def noted(x: torch.Tensor) -> torch.Tensor:
        seen.append(len(x))
        return decode(x)

    monkeypatch.setattr(net, "to_images", noted)
    images = [walk.images(schedule, 0, start, stop) for _ in range(2) for start, stop in ((0, 3), (3, 5))]
    assert seen == [3, 2]
    assert torch.equal(images[0], images[2])
    assert torch.equal(images[1], images[3])
    assert walk.meter.cached_calls == 2 * 5
    walk.images(Schedule(schedule.steps[:1]), 0, 0, 3, again=False)  # of the full network, which another keeps
    walk.images(schedule, 0, 0, 3)
    assert seen.pop() == 3
    assert seen == [3, 2]
    net.forget()  # as other weights do
    walk.images(schedule, 0, 0, 3)
    assert seen == [3, 2, 3]


@given(st.integers(1, 300), st.integers(1, 64), st.lists(st.integers(1, 300), max_size=3))
def test_batches_cover_every_sample_once_and_extend(count: int, size: int, edges: list[int]) -> None:
    ranges = batches(count, size, edges)
    assert [i for start, stop in ranges for i in range(start, stop)] == list(range(count))
    assert max(stop - start for start, stop in ranges) <= size
    for edge in edges:
        if edge < count:
            assert set(batches(edge, size, edges)) <= set(ranges)


def test_a_larger_rung_runs_only_what_the_smaller_one_lacks(tiny_net: Elastic, tiny_run: Path) -> None:
    net = tiny_net.load(tiny_run / "supernet", "cpu")
    evaluate = Frechet(Digits(), rungs=(30, 80), batch=16).load(net, tiny_run)
    schedule = schedule_of(tiny_net, 1, 0.5, 0.25)
    evaluate(schedule, 30, 3)
    larger = evaluate(schedule, 80, 3)
    assert larger.spent["calls"] == 50 * 3
    assert larger.charged_in_full().spent["calls"] == 80 * 3
    fresh = Frechet(Digits(), rungs=(30, 80), batch=16).load(tiny_net.load(tiny_run / "supernet", "cpu"), tiny_run)
    assert fresh(schedule, 80, 3).values == larger.values


def test_scores_of_one_supernet_share_their_samples(tiny_net: Elastic, tiny_run: Path) -> None:
    from evaluators.frechet import KernelDistance

    net = tiny_net.load(tiny_run / "supernet", "cpu")
    frechet, kernel = (recipe(Digits(), rungs=(40,)).load(net, tiny_run) for recipe in (Frechet, KernelDistance))
    schedule = schedule_of(tiny_net, 1, 0.5, 0.25)
    assert frechet(schedule, 40, 3).spent["calls"] == 40 * 3
    second = kernel(schedule, 40, 3)
    assert second.spent["calls"] == 0
    assert second.spent["cached_calls"] == 40 * 3


def test_what_judges_otherwise_shares_nothing(tiny_net: Elastic, tiny_run: Path, tmp_path: Path) -> None:
    """The same extractor file under other settings, and other images, give other rows."""
    import numpy as np

    np.savez(tmp_path / "images.npz", images=np.random.default_rng(0).integers(0, 255, (60, 8, 8), dtype=np.uint8))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.trace(torch.nn.Flatten(), torch.zeros(2, 1, 8, 8)), tmp_path / "pixels.pt")
        external = ExternalFeatures(str(tmp_path / "pixels.pt"), "pixels", rgb=False)
        pairs: list[list[Any]] = [
            [Frechet(Digits(), rungs=(40,), features=replace(external, value_range=r)) for r in ("signed", "unit")],
            [DenoisingLoss(images, rungs=(40,)) for images in (Digits(), ImageArray(str(tmp_path / "images.npz")))],
            [DenoisingLoss(Digits(), rungs=(40,), precision=p) for p in ("float32", "bfloat16")],
        ]
        schedule = schedule_of(tiny_net, 1, 0.5, 0.25)
        for pair in pairs:
            net = tiny_net.load(tiny_run / "supernet", "cpu")
            together = [recipe.load(net, tiny_run)(schedule, 40, 0).values for recipe in pair]
            fresh = tiny_net.load(tiny_run / "supernet", "cpu")
            assert together[1] == pair[1].load(fresh, tiny_run)(schedule, 40, 0).values
            assert together[0] != together[1]


# --------------------------------------------------------------------------------------------------------------- device


def test_the_fastest_setting_is_measured_once_and_kept(tiny_net: Elastic, tmp_path: Path) -> None:
    net = tiny_net.initial(0)
    settings = [Execution(1), Execution(64), Execution(64, channels_last=True)]
    chosen = settle(net, tmp_path, "float32", settings)
    assert chosen.batch == 64, "64 samples in one call are faster than 64 calls"
    [measured] = json.loads((tmp_path / "execution.json").read_text()).values()
    assert len(measured["measured"]) == 3
    assert settle(net, tmp_path, "float32", [Execution(2), Execution(3)]) == chosen
    assert settle(net, tmp_path, "bfloat16", [Execution(2), Execution(3)]).batch in (2, 3)
    assert settle(net, tmp_path / "other") == Execution()


def test_no_larger_batch_is_tried_behind_one_that_fails_or_gains_nothing(
    tiny_net: Elastic, monkeypatch: pytest.MonkeyPatch
) -> None:
    seconds = {1: 1.0, 4: 3.0, 16: 11.9, 64: 40.0, 256: math.nan}
    tried = []

    def timed(net: Any, batch: int, *_: Any) -> float:
        tried.append(batch)
        if math.isnan(seconds[batch]):
            raise torch.OutOfMemoryError("no room")
        return seconds[batch]

    monkeypatch.setattr(device, "_seconds", timed)
    plain, last = ([Execution(batch, form) for batch in (1, 4, 16, 64, 256)] for form in (False, True))
    told = dict(device.measure(tiny_net.initial(0), [*plain, *last]))
    assert tried == [1, 4, 16] * 2, "16 at once take as long for each as 4"
    assert {one.batch for one in told} == {1, 4, 16}
    tried.clear()
    assert [one.batch for one, _ in device.measure(tiny_net.initial(0), [plain[1], plain[4], plain[3]])] == [4]
    assert tried == [4, 256]
    on_gpu = device.candidates(torch.device("cuda"), (4, 64, 64))
    assert not [one for one in on_gpu if one.compiled], "a search meets too many subnets to compile each"


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.long)])
@pytest.mark.filterwarnings("default")
def test_no_form_changes_what_is_computed(
    tiny_net: Elastic, compiled: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # What torch keeps of earlier compilations may be of other instructions than this run is told to use, which gives no numbers or a crash.
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    net = tiny_net.initial(0)
    schedule = schedule_of(tiny_net, 1, 0.5)
    plain = sample(net, schedule, DDIM(), 0, 0, 8)
    net.run_as(not compiled, compiled)
    try:
        formed = sample(net, schedule, DDIM(), 0, 0, 8)
    except torch._dynamo.exc.BackendCompilerFailed as error:
        if "CppCompileError" not in str(error):
            raise
        pytest.skip("torch writes C++ that this compiler does not take")
    assert torch.allclose(formed, plain, atol=1e-4)


def test_lower_precision_is_a_score_of_its_own(tiny_net: Elastic, tiny_run: Path) -> None:
    net = tiny_net.load(tiny_run / "supernet", "cpu")
    schedule = schedule_of(tiny_net, 1, 0.5, 0.25)
    recipes = [Frechet(Digits(), rungs=(40,), precision=precision) for precision in ("float32", "bfloat16")]
    exact, rough = (recipe.load(net, tiny_run)(schedule, 40, 0).values["fd"] for recipe in recipes)
    assert exact != rough
    assert rough == pytest.approx(exact, rel=0.2)
    assert recipes[0].digest(tiny_run) != recipes[1].digest(tiny_run)
    with pytest.raises(UserError, match="float16"):
        Frechet(Digits(), precision="float16")  # type: ignore[arg-type]


def test_a_score_made_twice_is_charged_in_full_and_its_seconds_are_those_that_passed(
    tiny_run: Path, tiny_net: Elastic
) -> None:
    evaluator = Frechet(Digits(), rungs=(32, 64)).load(tiny_net.load(tiny_run / "supernet", "cpu"), tiny_run)
    schedule = schedule_of(tiny_net, 1, 0.5, 0.25)
    started = time.perf_counter()
    first, again = evaluator(schedule, 64, 0), evaluator(schedule, 64, 0)
    passed = time.perf_counter() - started
    macs = 64 * sum(evaluator.supernet.macs(step) for step in schedule.steps)
    assert (first.spent["calls"], first.spent["macs"]) == (64 * 3, macs)
    assert (again.spent["cached_calls"], again.spent["cached_macs"]) == (64 * 3, macs)
    assert (again.spent["calls"], again.spent["macs"]) == (0, 0)
    assert (first.spent["cache_hits"], again.spent["cache_hits"]) == (0, 2)  # two batches
    assert 0 < first.spent["seconds"] + again.spent["seconds"] <= passed


def test_of_a_long_trajectory_few_states_are_kept(tiny_net: Elastic) -> None:
    """Where the subnet changes, and else at most 32 evenly, the last among them."""
    wide, narrow = tiny_net.uniform(1.0), tiny_net.uniform(0.5)
    same = Schedule(tuple(Step(t, wide) for t in range(99, -1, -1)))
    assert _splits(same) == set(range(4, 101, 4))
    changed = Schedule(tuple(Step(t, narrow if 41 <= t < 58 else wide) for t in range(99, -1, -1)))
    assert _splits(changed) == {*range(4, 101, 4), 42, 59}
    assert Trajectories(tiny_net.initial(0), DDIM()).meter == Meter(0, 0, 0, 0, 0)
