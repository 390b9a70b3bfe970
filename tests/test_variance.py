"""Networks that also say where a step's variance lies: twice as many output as input channels (Nichol & Dhariwal 2021)."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler

from evaluators.conditions import Labels
from evaluators.images import Digits
from evaluators.sampling import DDIM, DDPM, sample, trajectory
from nas.contracts import Guidance, ImageSet, Schedule, Step, UserError
from nas.handover.export import export
from nas.study import Study
from nas.testing import check_supernet
from search_spaces.intervals import uniform
from search_spaces.loaded import LoadedElastic
from search_spaces.noise import NoiseSchedule
from search_spaces.patterns import Every
from search_spaces.shipped.train_diffusers import Settings, train
from search_spaces.stepwise import Stepwise
from search_spaces.supernet import Elastic
from search_spaces.training import FineTune, Sandwich
from search_spaces.training.optimiser import Batches
from tests.arithmetic import SAMPLES
from tests.conftest import TINY
from tests.test_export import standing_alone
from tests.test_supernet import randomised

CONFIG = {**TINY, "out_channels": 2}
PROCESSES = {
    "epsilon": NoiseSchedule(timesteps=50),
    "v": NoiseSchedule(timesteps=50, prediction="v_prediction"),
    "image": NoiseSchedule(timesteps=50, prediction="sample"),
}


def loaded(noise: NoiseSchedule = NoiseSchedule(), **config: Any) -> LoadedElastic:
    made: LoadedElastic = randomised(Elastic({**CONFIG, **config}, (0.5, 1.0), noise=noise))
    return made


def whole(net: LoadedElastic, timesteps: tuple[int, ...], guidance: Guidance | None = None) -> Schedule:
    return Schedule(tuple(Step(t, net.full_arch, (), guidance) for t in timesteps))


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@pytest.mark.parametrize("name", PROCESSES)
def test_ancestral_sampling_with_a_learned_variance_equals_diffusers(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    net = loaded(PROCESSES[name])
    scheduler = DDPMScheduler(**net.scheduler, variance_type="learned_range", clip_sample=False)
    timesteps = tuple(range(49, -1, -1))  # diffusers' variance is that of neighbouring timesteps
    states = list(trajectory(net, whole(net, timesteps), DDPM("learned_range", clip=False), 3, 0, 4))
    model = net.extract(net.full_arch)
    for number, t in enumerate(timesteps):
        with torch.inference_mode():
            output = model(states[number], t).sample
        assert output.shape[1] == 2
        noise = np.stack(
            [np.random.default_rng((3, i, number + 1)).standard_normal((1, 8, 8), np.float32) for i in range(4)]
        )
        monkeypatch.setattr(
            "diffusers.schedulers.scheduling_ddpm.randn_tensor", lambda *_, noise=noise, **__: torch.from_numpy(noise)
        )
        theirs = scheduler.step(output, t, states[number]).prev_sample
        assert torch.allclose(states[number + 1], theirs, atol=1e-4, rtol=1e-4), t


def test_what_lies_behind_the_noise_changes_nothing_that_does_not_ask_for_it() -> None:
    net = loaded()
    small = Elastic(TINY, (0.5, 1.0)).initial(0)
    weights = {k: v[:1] if k.startswith("conv_out") else v for k, v in net.full.state_dict().items()}
    small.full.load_state_dict(weights)
    for sampler in (DDIM(), DDPM()):
        images = [sample(one, whole(net, uniform(5)), sampler, 0, 0, 4) for one in (net, small)]
        assert torch.allclose(images[0], images[1], atol=SAMPLES)
    with pytest.raises(UserError, match="needs a network of twice as many output"):
        sample(small, whole(net, uniform(5)), DDPM("learned_range"), 0, 0, 4)


@pytest.mark.parametrize("name", PROCESSES)
def test_the_loss_is_the_bound_between_the_two_normal_distributions(name: str) -> None:
    """Against torch's divergence of the posterior (Ho et al. 2020, eq. 7) and the model's step, mean by its predicted image."""
    net = loaded(PROCESSES[name])
    generator = torch.Generator().manual_seed(0)
    x0, noise, said = (torch.randn(6, 1, 8, 8, generator=generator, dtype=torch.float64) for _ in range(3))
    t = torch.tensor([1, 2, 10, 20, 40, 49])
    batches = Batches(net, ImageSet(x0.float().numpy(), None, ""), 6, flip=False)
    x = batches.at(x0, t, noise)
    target = batches.target(x0, t, noise)
    wrong = target + 0.1 * torch.randn(target.shape, generator=generator, dtype=torch.float64)
    output = torch.cat([wrong, said.clamp(-1, 1)], dim=1).requires_grad_()
    loss = batches.loss(output, target, x0, x, t)
    abar = torch.from_numpy(net.alphas_cumprod)
    bits = []
    for row, step in enumerate(t.tolist()):
        a, b = abar[step], abar[step - 1]
        beta = 1 - a / b
        small = (1 - b) / (1 - a) * beta
        predicted = net.noise_in(wrong[row : row + 1], x[row : row + 1], step)[0]
        image = (x[row] - (1 - a).sqrt() * predicted) / a.sqrt()
        means = [b.sqrt() * beta / (1 - a) * z + (a / b).sqrt() * (1 - b) / (1 - a) * x[row] for z in (x0[row], image)]
        share = (said[row].clamp(-1, 1) + 1) / 2
        theirs = torch.exp((share * beta.log() + (1 - share) * small.log()) / 2)
        one, other = (torch.distributions.Normal(m, s) for m, s in zip(means, (small.sqrt(), theirs), strict=True))
        bits.append(torch.distributions.kl_divergence(one, other).mean() / math.log(2))
    expected = (wrong - target).square().mean() + torch.stack(bits).mean() * 50 / 1000
    assert loss.item() == pytest.approx(float(expected), rel=1e-4)
    [gradient] = torch.autograd.grad(loss, output)
    of_error = 2 * (wrong - target) / wrong.numel()
    assert torch.allclose(gradient[:, :1], of_error)  # the bound teaches the variance alone
    assert gradient[:, 1:].abs().max() > 0


def test_training_learns_where_the_variance_lies() -> None:
    net = loaded(NoiseSchedule(timesteps=50))
    before = {name: tensor.clone() for name, tensor in net.full.state_dict().items()}
    images = Digits().load()
    losses = []
    for tick in Sandwich(steps=40, batch=16).fit(net, images, 0):
        losses.append(tick.values["1"])
    assert np.mean(losses[-5:]) < np.mean(losses[:5])
    moved = (net.full.conv_out.weight - before["conv_out.weight"]).abs().amax((1, 2, 3))
    assert (moved > 1e-4).all()
    schedule = Schedule((Step(40, net.full_arch), Step(10, net.recipe.uniform(0.5))))
    assert [tick.done for tick in FineTune(steps=2, batch=16).fit(net, schedule, images, 0)] == [1, 2]


def test_the_supernet_keeps_its_laws(tiny_study: Study) -> None:
    net = loaded()
    assert isinstance(tiny_study.space, Stepwise)
    check_supernet(net, replace(tiny_study.space, net=net.recipe), samples=3)
    with pytest.raises(UserError, match=r"out_channels=3 must equal in_channels=1.*or be twice as many"):
        Sandwich(steps=2).check(Elastic({**CONFIG, "out_channels": 3}, (1.0,)), Digits().load())


@pytest.mark.parametrize("name", PROCESSES)
def test_guidance_leaves_the_variance_as_the_condition_has_it(name: str) -> None:
    net = loaded(PROCESSES[name], num_class_embeds=11)
    x = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    labels = {"class_labels": torch.tensor([1, 2, 3])}
    with torch.inference_mode():
        told, plain = (
            net.denoiser(Step(20, net.full_arch))(x, 20, None, one)[0] for one in (labels, net.null_condition(labels))
        )
        for guidance in (Guidance(2.0), Guidance(2.0, net.recipe.uniform(0.5))):
            made, _ = net.denoiser(Step(20, net.full_arch, (), guidance))(x, 20, None, labels)
            assert torch.allclose(made[:, 1:], told[:, 1:], atol=1e-5)
            if not guidance.arch:
                assert torch.allclose(made[:, :1], (2 * told - plain)[:, :1], atol=1e-4)


@pytest.mark.parametrize("name", PROCESSES)
def test_an_exported_folder_samples_with_the_learned_variance(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    net = Elastic(CONFIG, (0.5, 1.0), noise=PROCESSES[name]).initial(0)
    half = net.recipe.uniform(0.5)
    held = tuple(net.blocks(net.full_arch))
    steps = (Step(49, half), Step(30, net.full_arch), Step(20, net.full_arch, held), Step(5, half))
    sampler = DDPM("learned_range")
    export(net, Schedule(steps), sampler.describe(), {}, tmp_path / "model")
    images = standing_alone(tmp_path / "model", monkeypatch)
    assert torch.allclose(images, sample(net, Schedule(steps), sampler, 0, 0, 16), atol=SAMPLES)
    ticks = list(train(tmp_path / "model", Digits().load().pixels[:64], Settings(steps=4, batch=8), cpu=True))
    assert all(math.isfinite(tick["loss"]) for tick in ticks)


def test_a_space_with_reuse_may_hold_predictions_of_both() -> None:
    net = Elastic(CONFIG, (0.5, 1.0))
    space = Stepwise(net, uniform(4), (2, 2), patterns=(Every(1), Every(2)), deterministic=False)
    one = randomised(net)
    genome = tuple(0 for _ in space.choices)
    assert sample(one, space.decode(genome), DDPM("learned_range"), 0, 0, 2).shape == (2, 1, 8, 8)


def test_labels_and_a_learned_variance_train_together() -> None:
    net = loaded(num_class_embeds=11)
    labels = Labels(Digits())
    for _ in Sandwich(steps=2, batch=8).fit(net, Digits().load(), 0):
        pass
    images = sample(net, whole(net, uniform(3), Guidance(1.5)), DDPM("learned_range"), 0, 0, 4, labels.load())
    assert torch.isfinite(images).all()
