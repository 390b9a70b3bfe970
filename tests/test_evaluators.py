"""Sampling against diffusers' schedulers, the distance against scipy, features from files."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.linalg
import torch
from diffusers import DDIMScheduler, DDPMScheduler, UNet2DModel
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics.pairwise import polynomial_kernel
from torchmetrics.functional.image import structural_similarity_index_measure as ssim

from evaluators.features import ExternalFeatures, SmallClassifier, _Extractor
from evaluators.frechet import (
    Frechet,
    Gaussian,
    KernelDistance,
    Moments,
    frechet_with_replicates,
    kernel_with_replicates,
    mean_kernel,
    paired_frechet_with_replicates,
    read_statistics,
)
from evaluators.images import Digits, ImageArray
from evaluators.proxies import (
    Additive,
    DenoisingLoss,
    LoadedAdditive,
    TeacherDistance,
    TeacherFrechet,
    TeacherSimilarity,
    TrajectoryDistance,
    whole,
)
from evaluators.sampling import DDIM, DDPM, initial_noise, sample, step_noise, trajectory
from evaluators.scoring import BLOCKS, mean_with_replicates
from evaluators.teacher import NetworkAgreement, NetworkFrechet, TeacherPerceptual
from nas.contracts import Evaluator, Schedule, Score, Step, UserError, jackknife_error
from nas.testing import check_evaluator
from search_spaces.intervals import leading, quadratic, uniform
from search_spaces.stepwise import Stepwise
from search_spaces.supernet import Elastic

# ------------------------------------------------------------------------------------------------------------- sampling


def full_schedule(net: Elastic, timesteps: tuple[int, ...]) -> Schedule:
    return Schedule(tuple(Step(t, net.uniform(1.0)) for t in timesteps))


@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize(("spacing", "timesteps"), [("trailing", uniform(10)), ("leading", leading(10))])
def test_ddim_equals_diffusers_on_its_grids(tiny_net: Elastic, clip: bool, spacing: str, timesteps: Any) -> None:
    net = tiny_net.initial(0)
    scheduler = DDIMScheduler(**net.scheduler, clip_sample=clip, timestep_spacing=spacing)
    scheduler.set_timesteps(10)
    assert scheduler.timesteps.tolist() == list(timesteps)
    model: UNet2DModel = net.extract(tiny_net.uniform(1.0))
    states = list(trajectory(net, full_schedule(tiny_net, timesteps), DDIM(clip=clip), 3, 0, 4))
    for t, x, ours in zip(scheduler.timesteps, states, states[1:], strict=False):
        with torch.inference_mode():
            theirs = scheduler.step(model(x, t).sample, t, x).prev_sample
        assert torch.allclose(ours, theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
@pytest.mark.parametrize("timesteps", [uniform(1000)[-20:], quadratic(10)], ids=["every timestep", "quadratic"])
def test_ddpm_equals_diffusers_given_the_same_noise(
    tiny_net: Elastic, variance: Any, timesteps: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    net = tiny_net.initial(0)
    scheduler = DDPMScheduler(**net.scheduler, variance_type=variance, clip_sample=True)
    scheduler.set_timesteps(timesteps=list(timesteps))
    model: UNet2DModel = net.extract(tiny_net.uniform(1.0))
    states = list(trajectory(net, full_schedule(tiny_net, timesteps), DDPM(variance), 3, 0, 4))
    for number, (t, x, ours) in enumerate(zip(scheduler.timesteps, states, states[1:], strict=False)):
        noise = step_noise(3, 0, 4, net.state_shape, number)
        monkeypatch.setattr("diffusers.schedulers.scheduling_ddpm.randn_tensor", lambda *a, n=noise, **k: n)
        with torch.inference_mode():
            theirs = scheduler.step(model(x, t).sample, int(t), x).prev_sample
        # diffusers takes 1 - a_t / a_s in float32, which cancels where neighbouring timesteps are close.
        assert torch.allclose(ours, theirs, atol=1e-4, rtol=1e-5)


@given(st.integers(0, 2**32 - 1), st.integers(0, 1000), st.integers(1, 20))
def test_noise_of_a_sample_depends_on_seed_and_index_alone(seed: int, start: int, count: int) -> None:
    block = initial_noise(seed, start, start + count, (1, 2, 2))
    assert torch.equal(block[-1:], initial_noise(seed, start + count - 1, start + count, (1, 2, 2)))
    first, second = (step_noise(seed, start, start + count, (1, 2, 2), step) for step in (0, 1))
    assert not torch.equal(first, second)
    assert not torch.equal(first, block)


def test_noise_is_standard_normal() -> None:
    noise = initial_noise(0, 0, 2000, (1, 4, 4))
    assert abs(float(noise.mean())) < 0.02
    assert abs(float(noise.std()) - 1) < 0.02
    assert abs(float((noise[:-1] * noise[1:]).mean())) < 0.02


@pytest.mark.parametrize("sampler", [DDIM(), DDPM()])
def test_the_batch_size_changes_no_sample(tiny_net: Elastic, sampler: Any) -> None:
    """Up to the rounding of convolutions, which batch sizes order differently and a chain of steps amplifies."""
    net = tiny_net.initial(0)
    schedule = full_schedule(tiny_net, uniform(3))
    whole = sample(net, schedule, sampler, 0, 0, 12)
    parts = torch.cat([sample(net, schedule, sampler, 0, i, i + 3) for i in range(0, 12, 3)])
    assert torch.allclose(whole, parts, atol=1e-4)


def test_a_trajectory_shows_every_state(tiny_net: Elastic) -> None:
    states = list(trajectory(tiny_net.initial(0), full_schedule(tiny_net, uniform(3)), DDIM(), 0, 0, 2))
    assert len(states) == 4
    assert torch.equal(states[0], initial_noise(0, 0, 2, (1, 8, 8)))


# ------------------------------------------------------------------------------------------------------------- distance


@given(st.integers(0, 1000), st.integers(1, 12), st.integers(2, 40))
def test_distance_equals_scipys_matrix_root(seed: int, dimensions: int, count: int) -> None:
    rng = np.random.default_rng(seed)
    a, b = (
        Moments.of(
            rng.standard_normal((count + dimensions, dimensions)) @ rng.standard_normal((dimensions,) * 2)
        ).gaussian()
        for _ in range(2)
    )
    root = scipy.linalg.sqrtm(a.covariance @ b.covariance)
    expected = ((a.mean - b.mean) ** 2).sum() + np.trace(a.covariance + b.covariance - 2 * np.real(root))
    assert a.distance(b) == pytest.approx(expected, rel=1e-6, abs=1e-6)
    assert a.distance(a) == pytest.approx(0, abs=1e-6)


def test_moments_add_and_subtract() -> None:
    rows = np.random.default_rng(0).standard_normal((50, 3))
    whole, part = Moments.of(rows), Moments.of(rows[:20])
    rest = (whole - part).gaussian()
    assert rest.mean == pytest.approx(rows[20:].mean(0))
    assert rest.covariance == pytest.approx(np.cov(rows[20:].T))
    with pytest.raises(UserError, match="at least 2 samples"):
        Moments.of(rows[:1]).gaussian()


def test_the_standard_error_is_the_spread_over_fresh_samples() -> None:
    rng = np.random.default_rng(0)
    reference = Gaussian(np.zeros(4), np.eye(4))
    runs = [frechet_with_replicates(rng.standard_normal((400, 4)) + 0.5, reference) for _ in range(200)]
    spread = np.std([value for value, _ in runs])
    estimated = np.mean([jackknife_error(replicates) for _, replicates in runs])
    assert estimated == pytest.approx(spread, rel=0.2)


def test_replicates_of_first_order_agree_with_exact_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    reference = Moments.of(rng.standard_normal((3000, 12))).gaussian()
    rows = rng.standard_normal((1500, 12)) @ np.diag(np.linspace(0.5, 1.5, 12)) + 0.2
    exact = frechet_with_replicates(rows, reference)
    monkeypatch.setattr("evaluators.frechet.EXACT_DIMENSIONS", 1)
    expanded = frechet_with_replicates(rows, reference)
    assert expanded[0] == pytest.approx(exact[0], rel=1e-9)
    assert expanded[1] == pytest.approx(exact[1], abs=2e-3 * exact[0])
    assert jackknife_error(expanded[1]) == pytest.approx(jackknife_error(exact[1]), rel=0.03)


@pytest.mark.parametrize("exact", [True, False])
def test_a_paired_distance_knows_that_the_noise_is_shared(exact: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not exact:
        monkeypatch.setattr("evaluators.frechet.EXACT_DIMENSIONS", 1)
    rng = np.random.default_rng(0)
    noise = rng.standard_normal((400, 3))
    value, replicates = paired_frechet_with_replicates(noise + 0.5, noise)
    assert value == pytest.approx(0.75, abs=1e-6)
    assert jackknife_error(replicates) < 1e-6
    assert jackknife_error(frechet_with_replicates(noise + 0.5, Moments.of(noise).gaussian())[1]) > 0.01
    scaled = noise * [0.5, 1.0, 1.5] + 0.3 * rng.standard_normal((400, 3))
    found = paired_frechet_with_replicates(scaled, noise)
    monkeypatch.setattr("evaluators.frechet.EXACT_DIMENSIONS", 256)
    expected = paired_frechet_with_replicates(scaled, noise)
    assert jackknife_error(found[1]) == pytest.approx(jackknife_error(expected[1]), rel=0.05)


def test_a_loss_looks_at_images_of_every_class_however_they_lie(
    tiny_net: Elastic, tiny_run: Path, tmp_path: Path
) -> None:
    """Folders come class by class: where the first images alone are looked at, what the others are changes nothing."""
    pixels = np.random.default_rng(0).integers(0, 256, (200, 8, 8), dtype=np.uint8)
    net = tiny_net.load(tiny_run / "supernet", "cpu")
    schedule = Schedule((Step(500, net.smallest_arch),))
    found = []
    for name, others in (("one", pixels[64:]), ("other", 255 - pixels[64:])):
        np.savez(tmp_path / f"{name}.npz", images=np.concatenate([pixels[:64], others]))
        score = DenoisingLoss(ImageArray(str(tmp_path / f"{name}.npz")), rungs=(32,)).load(net, tiny_run)
        found.append(score(schedule, 32, 0).values["loss_gap"])
    assert found[0] != found[1]


def test_kernel_distance_is_the_unbiased_squared_mmd() -> None:
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((9, 2)).astype(np.float32), rng.standard_normal((7, 2)).astype(np.float32) + 0.3

    def expected(x: Any) -> float:
        k = polynomial_kernel(np.concatenate([x, y]), degree=3, gamma=0.5, coef0=1)
        n, m = len(x), len(y)
        xx, yy, xy = k[:n, :n], k[n:, n:], k[:n, n:]
        return float(
            (xx.sum() - np.trace(xx)) / (n * (n - 1)) + (yy.sum() - np.trace(yy)) / (m * (m - 1)) - 2 * xy.mean()
        )

    value, replicates = kernel_with_replicates(x, y, mean_kernel(y))
    assert value == pytest.approx(expected(x), rel=1e-5)
    assert replicates == pytest.approx([expected(np.delete(x, i, axis=0)) for i in range(9)], rel=1e-5)
    draws = [(rng.standard_normal((30, 2)), rng.standard_normal((40, 2))) for _ in range(400)]
    means = [kernel_with_replicates(x, y, mean_kernel(y))[0] for x, y in draws]
    assert abs(np.mean(means)) < 4 * np.std(means) / 20


def test_standard_statistics_files_are_read(tmp_path: Path) -> None:
    np.savez(tmp_path / "stats.npz", mu=np.zeros(3), sigma=np.eye(3))
    assert read_statistics(tmp_path / "stats.npz").distance(Gaussian(np.ones(3), np.eye(3))) == pytest.approx(3)
    np.savez(tmp_path / "odd.npz", mu=np.zeros(3), sigma=np.eye(4))
    with pytest.raises(UserError, match="do not fit together"):
        read_statistics(tmp_path / "odd.npz")
    with pytest.raises(UserError, match="cannot be read"):
        read_statistics(tmp_path / "missing.npz")


def statistics(**changes: Any) -> dict[str, Any]:
    rows = np.random.default_rng(0).standard_normal((500, 8))
    return {"mu": rows.mean(0), "sigma": np.cov(rows.T), **changes}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"sigma": np.eye(8) + np.triu(np.ones((8, 8)), 1)},
            r"sigma is not symmetric, sigma\[0, 1\] is 1 and sigma\[1, 0\] 0",
        ),
        ({"sigma": -np.eye(8)}, "negative eigenvalue -1"),
        ({"mu": np.full(8, np.nan)}, r"mu\[0\] is nan"),
        ({"sigma": np.diag([1.0, np.inf, *[1.0] * 6])}, r"sigma\[1, 1\] is inf"),
        ({"mu": np.zeros(4), "sigma": np.eye(4)}, "are of 4 dimensions, the features of 8"),
        ({"mu": np.zeros(0), "sigma": np.zeros((0, 0))}, "do not fit together"),
        ({"sigma": np.ones(8)}, "do not fit together"),
        ({"mu": np.array(["a"] * 8)}, "cannot be read as FID statistics"),
    ],
)
def test_what_is_no_covariance_is_refused_before_training(changes: dict[str, Any], words: str, tmp_path: Path) -> None:
    np.savez(tmp_path / "stats.npz", **statistics(**changes))
    recipe = Frechet(Digits(), features=SmallClassifier(dimensions=8), reference=str(tmp_path / "stats.npz"))
    with pytest.raises(UserError, match=words):
        recipe.check()


def test_statistics_are_symmetric_up_to_the_rounding_that_files_have(tmp_path: Path) -> None:
    rounded = statistics()["sigma"].astype(np.float32)
    rounded[0, 1] = np.nextafter(rounded[0, 1], np.float32(9))
    np.savez(tmp_path / "stats.npz", **statistics(sigma=rounded))
    found = read_statistics(tmp_path / "stats.npz", 8)
    assert np.array_equal(found.covariance, found.covariance.T)
    flat = np.outer(np.arange(8.0), np.arange(8.0))  # of rank 1: eigenvalues of zero come out below zero
    np.savez(tmp_path / "stats.npz", **statistics(sigma=flat))
    assert read_statistics(tmp_path / "stats.npz").distance(found) > 0


# ------------------------------------------------------------------------------------------------- features and scores


def space_of(net: Elastic) -> Stepwise:
    return Stepwise(net, uniform(3), (1, 1, 1))


SMALL: dict[str, Any] = {"rungs": (40, 80), "batch": 16}
EVALUATORS: list[Evaluator] = [
    Frechet(Digits(), **SMALL),
    Frechet(Digits(), **SMALL, sampler=DDPM()),
    KernelDistance(Digits(), **SMALL),
    TeacherFrechet(Digits(), **SMALL),
    TeacherFrechet(Digits(), **SMALL, timesteps=uniform(5)),
    TeacherDistance(Digits(), **SMALL),
    TeacherSimilarity(Digits(), **SMALL),
    NetworkAgreement(images=Digits(), **SMALL),
    NetworkFrechet(images=Digits(), **SMALL),
    NetworkFrechet(images=Digits(), **SMALL, timesteps=uniform(5), dimensions=4),
    TrajectoryDistance(Digits(), **SMALL),
    TrajectoryDistance(Digits(), **SMALL, sampler=DDPM()),
    DenoisingLoss(Digits(), **SMALL),
    Additive(Frechet(Digits(), **SMALL), (1, 2)),
    Additive(TeacherDistance(Digits(), **SMALL), (2, 1), around="both"),
]


@pytest.mark.parametrize("evaluator", EVALUATORS, ids=lambda evaluator: evaluator.metrics[0])
def test_every_evaluator_keeps_the_laws(evaluator: Evaluator, tiny_net: Elastic, tiny_run: Path) -> None:
    check_evaluator(evaluator, tiny_net, space_of(tiny_net), tiny_run)


def test_real_digits_are_nearer_to_digits_than_noise_is(tiny_run: Path) -> None:
    digits = Digits().load()
    features = SmallClassifier().load(tiny_run, torch.device("cpu"))
    rows = features(torch.from_numpy(digits.pixels)).numpy()
    reference = Moments.of(rows[::2]).gaussian()
    real, _ = frechet_with_replicates(rows[1::2], reference)
    noise, _ = frechet_with_replicates(features(torch.randn(500, 1, 8, 8).clamp(-1, 1)).numpy(), reference)
    assert real < 0.05 * noise


def test_features_without_labels_learn_rotations(tmp_path: Path) -> None:
    digits = Digits().load()
    features = SmallClassifier(steps=150)
    ticks = list(features.prepare(replace(digits, labels=None), tmp_path, 0, "cpu"))
    accuracy = np.mean([tick.values["accuracy"] for tick in ticks[-10:]])
    assert accuracy > 0.7  # chance is 0.25
    assert features.load(tmp_path, torch.device("cpu"))(torch.zeros(3, 1, 8, 8)).shape == (3, 64)


def test_an_extractor_of_other_images_or_settings_is_not_used(tmp_path: Path) -> None:
    digits, features, other = Digits().load(), SmallClassifier(steps=2), SmallClassifier(steps=3, dimensions=16)
    list(features.prepare(digits, tmp_path, 0, "cpu"))
    before = features.digest(tmp_path)
    with pytest.raises(UserError, match=r"classifier-\w{8}\.safetensors does not exist"):
        other.load(tmp_path, torch.device("cpu"))
    list(other.prepare(digits, tmp_path, 0, "cpu"))  # beside it, as two scores of a study may have one each
    assert list(other.prepare(digits, tmp_path, 0, "cpu")) == list(features.prepare(digits, tmp_path, 0, "cpu")) == []
    assert features.digest(tmp_path) == before != other.digest(tmp_path)
    assert other.load(tmp_path, torch.device("cpu"))(torch.zeros(2, 1, 8, 8)).shape == (2, 16)
    for one in (features, other):
        with pytest.raises(UserError, match="trained on other images or with other settings"):
            list(one.prepare(replace(digits, digest="other"), tmp_path, 0, "cpu"))


def test_scores_are_identified_by_the_content_of_what_judges(tmp_path: Path) -> None:
    list(SmallClassifier(steps=2).prepare(Digits().load(), tmp_path, 0, "cpu"))
    np.savez(tmp_path / "stats.npz", mu=np.zeros(64), sigma=np.eye(64))
    evaluator = Frechet(Digits(), features=SmallClassifier(steps=2), reference=str(tmp_path / "stats.npz"))
    before = evaluator.digest(tmp_path)
    assert evaluator.digest(tmp_path) == before
    np.savez(tmp_path / "stats.npz", mu=np.ones(64), sigma=np.eye(64))
    changed = evaluator.digest(tmp_path)
    assert changed != before
    (tmp_path / "features" / "classifier.safetensors").unlink()
    list(SmallClassifier(steps=2).prepare(Digits().load(), tmp_path, 1, "cpu"))
    assert evaluator.digest(tmp_path) != changed


class Tiny(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.float().mean((2, 3)) * 2


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("kind", [".pt", ".pt2"])
def test_extractors_come_from_local_files(tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"extractor{kind}"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if kind == ".pt":
            torch.jit.save(torch.jit.trace(Tiny(), torch.zeros(2, 3, 8, 8)), path)
        else:
            batch = torch.export.Dim("batch", min=1)
            torch.export.save(
                torch.export.export(Tiny(), (torch.zeros(2, 3, 8, 8),), dynamic_shapes=({0: batch},)), path
            )
        features = ExternalFeatures(str(path), "mean colour", value_range="unit")
        loaded = features.load(tmp_path, torch.device("cpu"))
    assert loaded.distance == "FD"
    assert loaded.label.startswith("mean colour ")
    assert torch.allclose(loaded(torch.ones(5, 1, 8, 8)), torch.full((5, 3), 2.0))
    assert replace(features, name="inception-v3").load(tmp_path, torch.device("cpu")).distance == "FID"
    # Not repeated are grey images alone; its own are of three channels.
    assert replace(features, rgb=False, size=8).width() == 3


def test_pixels_reach_an_extractor_as_it_expects_them(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.trace(Tiny(), torch.zeros(2, 1, 4, 4)), path)
        image = torch.full((1, 1, 8, 8), 0.5)
        expected = {"signed": 1.0, "unit": 1.5, "bytes": 382.0}
        for value_range, value in expected.items():
            features = ExternalFeatures(str(path), "x", value_range=value_range, rgb=False, size=4)  # type: ignore[arg-type]
            assert float(features.load(tmp_path, torch.device("cpu"))(image)) == pytest.approx(value)


def test_a_program_of_one_image_at_a_time_is_refused_with_its_remedy(tmp_path: Path) -> None:
    path = tmp_path / "one.pt2"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.export.save(torch.export.export(Tiny(), (torch.zeros(1, 3, 8, 8),)), path)
        with pytest.raises(UserError, match="batch of any number"):
            ExternalFeatures(str(path), "x", size=8).width()
        assert ExternalFeatures(str(path), "x").width() is None


def test_bad_extractors_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        ExternalFeatures(str(tmp_path / "none.pt"), "x").load(tmp_path, torch.device("cpu"))
    for suffix in (".pt", ".pt2"):
        path = tmp_path / f"bad{suffix}"
        path.write_bytes(b"nothing")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with pytest.raises(UserError, match="neither a TorchScript nor an exported program"):
                ExternalFeatures(str(path), "x").load(tmp_path, torch.device("cpu"))
    (tmp_path / "features").mkdir()
    (tmp_path / "features" / "classifier.safetensors").write_bytes(b"broken")
    with pytest.raises(UserError, match="is damaged"):
        SmallClassifier().load(tmp_path, torch.device("cpu"))


def test_images_of_another_shape_are_refused_before_sampling(tiny_net: Elastic, tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", images=np.zeros((20, 4, 4), np.uint8))
    evaluator = Frechet(ImageArray(str(tmp_path / "x.npz")))
    with pytest.raises(UserError, match="change one of them"):
        evaluator.load(tiny_net.initial(0), tmp_path)


def test_rungs_must_increase() -> None:
    with pytest.raises(UserError, match="increasing"):
        Frechet(Digits(), rungs=(512, 256))


# -------------------------------------------------------------------------------------------------------------- proxies


def test_the_full_model_is_its_own_teacher(tiny_net: Elastic, tiny_run: Path) -> None:
    net = tiny_net.load(tiny_run / "supernet", "cpu")
    full = full_schedule(tiny_net, uniform(3))
    for recipe in (TeacherFrechet, TeacherDistance, TeacherSimilarity, TrajectoryDistance, DenoisingLoss):
        evaluator = recipe(Digits(), **SMALL)
        assert evaluator.load(net, tiny_run)(full, 40, 0).values[evaluator.metrics[0]] == pytest.approx(0, abs=1e-5)


def test_teacher_distance_is_that_of_the_images(tiny_net: Elastic, tiny_run: Path) -> None:
    net = tiny_net.load(tiny_run / "supernet", "cpu")
    schedule = Schedule(tuple(Step(t, tiny_net.uniform(w)) for t, w in zip(uniform(3), (1.0, 0.5, 0.25), strict=True)))
    score = TeacherDistance(Digits(), **SMALL, timesteps=uniform(6)).load(net, tiny_run)(schedule, 40, 5)
    mine = sample(net, schedule, DDIM(), 5, 0, 40)
    theirs = sample(net, whole(net.full_arch, schedule, uniform(6)), DDIM(), 5, 0, 40)
    assert score.values["teacher_mse"] == pytest.approx(float(((mine - theirs) ** 2).mean()), rel=1e-4)


@pytest.mark.filterwarnings("default")
def test_scores_by_features_are_zero_for_the_full_model_alone(
    tiny_net: Elastic, tiny_run: Path, tmp_path: Path
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.trace(Tiny(), torch.zeros(2, 3, 8, 8)), tmp_path / "mean.pt")
    net = tiny_net.load(tiny_run / "supernet", "cpu")
    full, other = (
        Schedule(tuple(Step(t, tiny_net.uniform(width)) for t in uniform(steps)))
        for width, steps in ((1.0, 6), (0.25, 3))
    )
    features = ExternalFeatures(str(tmp_path / "mean.pt"), "mean colour", value_range="unit")
    perceptual = TeacherPerceptual(images=Digits(), features=features, **SMALL, timesteps=uniform(6))
    given: dict[str, Any] = {"images": Digits(), **SMALL, "timesteps": uniform(6)}
    for recipe in (perceptual, NetworkFrechet(**given), NetworkAgreement(**given)):
        score = recipe.load(net, tiny_run)
        assert score(full, 40, 0).values[recipe.metrics[0]] == pytest.approx(0, abs=1e-6)
        assert score(other, 40, 0).values[recipe.metrics[0]] > 1e-3
    # Half the mean squared distance of features, over their variance.
    mine, theirs = (sample(net, one, DDIM(), 0, 0, 40) for one in (other, full))
    rows = [features.load(tmp_path, torch.device("cpu"))(images).double() for images in (mine, theirs)]
    expected = ((rows[0] - rows[1]) ** 2).sum(1).mean() / (2 * rows[1].var(0).sum())
    value = perceptual.load(net, tiny_run)(other, 40, 0).values["teacher_perceptual"]
    assert value == pytest.approx(float(expected), rel=1e-4)


def test_the_additive_table_is_exact_where_one_interval_differs(tiny_net: Elastic, tiny_run: Path) -> None:
    net = tiny_net.load(tiny_run / "supernet", "cpu")
    steps = full_schedule(tiny_net, uniform(3)).steps
    schedule = Schedule((steps[0], Step(steps[1].timestep, tiny_net.uniform(0.25)), steps[2]))
    base = Frechet(Digits(), **SMALL)
    additive = Additive(base, (1, 1, 1)).load(net, tiny_run)
    predicted, measured = additive(schedule, 40, 0), base.load(net, tiny_run)(schedule, 40, 0)
    assert predicted.values["additive_fd"] == pytest.approx(measured.values["fd"])
    assert predicted.error("additive_fd") == pytest.approx(measured.error("fd"))
    assert additive(schedule, 40, 0).spent == {}
    with pytest.raises(UserError, match="hold 2 steps, the schedule has 3"):
        Additive(base, (1, 1)).load(net, tiny_run)(schedule, 40, 0)


def test_scores_without_labels_or_errors_are_added_up(tiny_net: Elastic, tiny_run: Path) -> None:
    """As evaluators of a third party give them."""

    class Bare:
        supernet = tiny_net.load(tiny_run / "supernet", "cpu")

        def sampler_of(self, schedule: Schedule) -> Any: ...

        def __call__(self, schedule: Schedule, rung: int, seed: int) -> Score:
            return Score({"fd": 0.25})

    found = LoadedAdditive(Additive(Frechet(Digits(), **SMALL), (1, 1, 1)), Bare())  # type: ignore[arg-type]
    assert found(full_schedule(tiny_net, uniform(3)), 40, 0).values == {"additive_fd": 0.25}


def test_what_reuses_is_added_up_where_it_can_be(tiny_run: Path, tiny_net: Elastic) -> None:
    """Behind an anchor of another width there is nothing of its own to take."""
    net, half = tiny_net.load(tiny_run / "supernet", "cpu"), tiny_net.uniform(0.5)
    schedule = Schedule(tuple(Step(t, half, ("mid",) if n else ()) for n, t in enumerate(uniform(3))))
    base = TeacherDistance(Digits(), **SMALL)
    found = Additive(base, (1, 1, 1)).load(net, tiny_run)(schedule, 40, 0).values["additive_teacher_mse"]
    whole = Additive(base, (1, 1, 1)).load(net, tiny_run)
    computed = Schedule(tuple(Step(t, half) for t in uniform(3)))
    assert found == pytest.approx(whole(computed, 40, 0).values["additive_teacher_mse"])


@pytest.mark.parametrize("contrast", [0.0, 0.2])
def test_a_slight_shift_of_brightness_is_a_slight_dissimilarity(contrast: float) -> None:
    """Between images of one grey only the means differ: 1 - (2 a b + C) / (a^2 + b^2 + C), of intensities from 0 to 1."""
    noise = contrast * torch.randn((2, 1, 16, 16), generator=torch.Generator().manual_seed(0)).clamp(-3, 3)
    found = TeacherSimilarity(Digits()).between(noise, noise + 0.1)
    if not contrast:
        a, b, c = 0.5, 0.55, 0.01**2
        # Rounding of float32 leaves a variance of 1e-7, beside a constant of 9e-4.
        assert found == pytest.approx([1 - (2 * a * b + c) / (a * a + b * b + c)] * 2, abs=2e-4)
    assert max(found) < 0.02


def test_two_samples_have_a_covariance_and_one_has_none() -> None:
    rows = np.random.default_rng(0).standard_normal((2, 3))
    assert np.allclose(Moments.of(rows).gaussian().covariance, np.cov(rows, rowvar=False))
    with pytest.raises(UserError, match="at least 2 samples, got 1"):
        Moments.of(rows[:1]).gaussian()


def test_replicates_are_exact_up_to_the_dimensions_that_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = np.random.default_rng(0).standard_normal((40, 6)) * np.arange(1, 7)
    reference = Moments.of(rows[::-1] ** 2).gaussian()
    monkeypatch.setattr("evaluators.frechet.EXACT_DIMENSIONS", 6)
    replicates = frechet_with_replicates(rows, reference)[1]
    blocks = np.array_split(np.arange(40), BLOCKS)
    exact = [reference.distance(Moments.of(np.delete(rows, block, axis=0)).gaussian()) for block in blocks]
    assert replicates == pytest.approx(exact, rel=1e-9)
    monkeypatch.setattr("evaluators.frechet.EXACT_DIMENSIONS", 5)
    assert frechet_with_replicates(rows, reference)[1] != pytest.approx(exact, rel=1e-9)


def test_samplers_name_what_an_exported_scheduler_is_set_to() -> None:
    assert DDIM(clip=False).describe() == {"class": "DDIM", "eta": 0.0, "clip": False}
    assert not DDIM().stochastic
    assert DDPM().stochastic


def test_a_mean_has_a_replicate_for_each_block_left_out() -> None:
    rows = np.random.default_rng(0).standard_normal(64)
    value, replicates = mean_with_replicates(rows)
    assert value == pytest.approx(rows.mean())
    assert replicates == pytest.approx([np.delete(rows, block).mean() for block in np.array_split(np.arange(64), 20)])
    assert mean_with_replicates(rows[:2])[1] == pytest.approx(rows[:2][::-1])


@pytest.mark.parametrize("kind", [Frechet, KernelDistance, TeacherFrechet])
def test_settings_of_scores_are_checked(kind: Any) -> None:
    with pytest.raises(UserError, match="rungs"):
        kind(Digits(), rungs=("many",))


def test_a_score_names_no_folder_of_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert str(tmp_path) not in repr(Frechet(Digits(), reference="stats.npz"))


def test_an_extractor_sees_no_more_images_at_once_than_real_ones_come() -> None:
    """Whatever the batch that was chosen for the network alone; with the same rows."""
    torch.manual_seed(0)
    net, images, seen = torch.nn.Conv2d(1, 4, 3), torch.randn(600, 1, 8, 8), []

    def noted(part: torch.Tensor) -> Any:
        seen.append(len(part))
        return net(part)

    rows = _Extractor(noted, "noted", "FD")(images)
    assert seen == [256, 256, 88]
    assert torch.allclose(rows, net(images).flatten(1), atol=1e-5)
    seen.clear()
    _Extractor(noted, "noted", "FD")(torch.zeros(5, 1, 1024, 2048))
    assert seen == [2, 2, 1], "of large ones as many as there is memory for"


def test_real_images_are_looked_at_once_for_all_searches(tiny_net: Elastic, tmp_path: Path) -> None:
    """Each search loads its evaluator anew; with Inception's features that is hours."""
    seen = 0

    class Counted(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.float().mean((2, 3))

    torch.jit.save(torch.jit.trace(Counted(), torch.zeros(2, 3, 8, 8)), tmp_path / "colour.pt")
    features = ExternalFeatures(str(tmp_path / "colour.pt"), "colour")
    of = ExternalFeatures._preprocessed

    def counted(self: Any, images: torch.Tensor) -> torch.Tensor:
        nonlocal seen
        seen += len(images)
        return of(self, images)

    net = tiny_net.initial(0)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(ExternalFeatures, "_preprocessed", counted)
        for kind in (Frechet, KernelDistance):
            seen = 0
            for _ in range(3):
                kind(Digits(), features, rungs=(32, 64)).load(net, tmp_path)
            assert seen == 1797
            kind(Digits(holdout=0.2), features, rungs=(32, 64)).load(net, tmp_path)
            assert seen == 1797 + 359, "and others anew"


def test_no_score_sees_a_whole_batch_of_the_network_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU it is of thousands, chosen for small states."""
    images = torch.rand(600, 1, 16, 16)
    found = ssim(images / 2 + 0.5, images.flip(3) / 2 + 0.5, reduction="none", data_range=1.0)
    assert isinstance(found, torch.Tensor)
    seen = []

    def noted(mine: torch.Tensor, theirs: torch.Tensor, **settings: Any) -> Any:
        seen.append(len(mine))
        return ssim(mine, theirs, **settings)

    monkeypatch.setattr("torchmetrics.functional.image.structural_similarity_index_measure", noted)
    assert np.allclose(
        TeacherSimilarity(Digits()).between(images, images.flip(3)), 1 - found.double().numpy(), atol=1e-6
    )
    assert seen == [256, 256, 88]
    judge = SmallClassifier(steps=2)
    list(judge.prepare(Digits().load(), tmp_path, 0, "cpu"))
    digits = torch.rand(600, 1, 8, 8)
    net = judge._network(tmp_path, torch.device("cpu"))
    net.register_forward_hook(lambda module, given, found: seen.append(len(found)))
    monkeypatch.setattr(SmallClassifier, "_network", lambda *_: net)
    assert judge.classifier(tmp_path, torch.device("cpu"))(digits).shape == (600, 10)
    assert seen[3:] == [256, 256, 88]
