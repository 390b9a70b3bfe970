"""Samplers and prediction types against diffusers' schedulers, and what they mean for held predictions and exported folders."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler
from hypothesis import given
from hypothesis import strategies as st

from evaluators.sampling import DDIM, DDPM, DPMSolver, Sampler, sample, trajectory
from evaluators.trajectories import Trajectories
from nas.contracts import ImageSet, Schedule, Step, UserError
from nas.genomes.genetics import uniform_genomes
from nas.handover.export import export
from nas.study import Study
from nas.testing import check_space
from search_spaces.intervals import uniform
from search_spaces.noise import NoiseSchedule
from search_spaces.patterns import Every
from search_spaces.shipped.graph import graph_of
from search_spaces.shipped.reuse import as_noise
from search_spaces.shipped.stepping import update
from search_spaces.stepwise import Stepwise
from search_spaces.supernet import Elastic
from search_spaces.training.optimiser import Batches
from tests.arithmetic import SAMPLES
from tests.conftest import TINY
from tests.test_export import standing_alone

PROCESSES = {
    "epsilon": NoiseSchedule(),
    "v": NoiseSchedule(prediction="v_prediction", beta_schedule="scaled_linear"),
    "v, no signal left": NoiseSchedule(prediction="v_prediction", rescale_betas_zero_snr=True),
    "image": NoiseSchedule(prediction="sample"),
    "image, its end at timestep 0": NoiseSchedule(prediction="sample", final_alpha="first"),
}
FREE = (980, 700, 650, 300, 120, 119, 40, 3)
"""Timesteps of no grid."""


def noise_of(x: torch.Tensor, t: int) -> torch.Tensor:
    """Stands for a network: smooth, and never quite right."""
    return torch.sin(x * 1.3 + t / 300) * 0.8


def run(
    sampler: Sampler, abar: np.ndarray, timesteps: tuple[int, ...], drawn: Callable[[int], Any]
) -> list[torch.Tensor]:
    """States in float64, from noise to image."""
    x = torch.randn(3, 1, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    states, memory = [x], None
    for number, t in enumerate(timesteps):
        last = number + 1 == len(timesteps)
        after = 1.0 if last else float(abar[timesteps[number + 1]])
        noise = drawn(number) if sampler.stochastic and not last else None
        x, memory = sampler.update(x, noise_of(x, t), float(abar[t]), after, noise, memory)
        states.append(x)
    return states


def drawn(number: int) -> torch.Tensor:
    return torch.randn(3, 1, 4, 4, generator=torch.Generator().manual_seed(7 + number), dtype=torch.float64)


@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
def test_ddim_with_noise_equals_diffusers(eta: float, clip: bool) -> None:
    """To the rounding of diffusers, which keeps abar, and with noise takes the difference 1 - abar - variance under a root, in float32."""
    tolerance = 1e-4 if eta else 1e-5
    scheduler = DDIMScheduler(clip_sample=clip, timestep_spacing="trailing")
    scheduler.set_timesteps(10)
    states = run(DDIM(clip, eta), NoiseSchedule().alphas_cumprod, uniform(10), drawn)
    x = states[0]
    for number, t in enumerate(scheduler.timesteps.tolist()):
        last = number == 9
        x = scheduler.step(
            noise_of(x, t), t, x, eta=0.0 if last else eta, variance_noise=None if last else drawn(number)
        ).prev_sample
        assert torch.allclose(states[number + 1], x, atol=tolerance, rtol=tolerance)


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@pytest.mark.parametrize("timesteps", [uniform(8), uniform(20), FREE], ids=["8", "20", "of no grid"])
@pytest.mark.parametrize(
    "process", [NoiseSchedule(), NoiseSchedule(beta_schedule="squaredcos_cap_v2")], ids=["linear", "cosine"]
)
def test_the_multistep_solver_equals_diffusers(process: NoiseSchedule, timesteps: tuple[int, ...]) -> None:
    settings = {name: value for name, value in process.scheduler.items() if name != "set_alpha_to_one"}
    scheduler = DPMSolverMultistepScheduler(
        **settings, algorithm_type="dpmsolver++", solver_order=2, final_sigmas_type="zero"
    )
    scheduler.set_timesteps(timesteps=list(timesteps))
    states = run(DPMSolver(clip=False), process.alphas_cumprod, timesteps, drawn)
    x = states[0]
    for number, t in enumerate(scheduler.timesteps.tolist()):
        x = scheduler.step(noise_of(x, t), t, x).prev_sample
        assert torch.allclose(states[number + 1].float(), x.float(), atol=1e-5, rtol=1e-4), number


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
def test_eulers_method_is_ddim_without_noise() -> None:
    """Its state is x / sqrt(abar), its sigma sqrt(1 - abar) / sqrt(abar)."""
    scheduler = EulerDiscreteScheduler(timestep_spacing="trailing")
    scheduler.set_timesteps(10)
    abar = NoiseSchedule().alphas_cumprod
    timesteps = tuple(int(t) for t in scheduler.timesteps)
    states = run(DDIM(clip=False), abar, timesteps, drawn)
    x = states[0] / math.sqrt(abar[timesteps[0]])
    for number, t in enumerate(scheduler.timesteps):
        scaled = scheduler.scale_model_input(x, t)
        x = scheduler.step(noise_of(scaled, int(t)), t, x).prev_sample
        after = 1.0 if number == 9 else abar[timesteps[number + 1]]
        assert torch.allclose(states[number + 1].float(), (x * math.sqrt(after)).float(), atol=1e-4, rtol=1e-4)


@given(st.floats(1e-6, 1 - 1e-6), st.sampled_from(["v_prediction", "sample"]), st.integers(0, 99))
def test_predictions_are_one_linear_map_apart(alpha: float, kind: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    image, noise = (torch.from_numpy(rng.standard_normal((2, 1, 3, 3))) for _ in range(2))
    x = alpha**0.5 * image + (1 - alpha) ** 0.5 * noise
    prediction = image if kind == "sample" else alpha**0.5 * noise - (1 - alpha) ** 0.5 * image
    assert torch.allclose(as_noise(prediction, x, alpha, kind), noise, atol=1e-9)
    assert as_noise(noise, x, alpha, "epsilon") is noise


@pytest.mark.parametrize("name", PROCESSES)
def test_trajectories_of_every_prediction_equal_diffusers(name: str) -> None:
    net = Elastic(TINY, (1.0,), noise=PROCESSES[name])
    loaded = net.initial(0)
    scheduler = DDIMScheduler(**loaded.scheduler, clip_sample=False, timestep_spacing="trailing")
    scheduler.set_timesteps(10)
    assert scheduler.timesteps.tolist() == list(uniform(10))
    model = loaded.extract(loaded.full_arch)
    states = list(trajectory(loaded, _whole(net, uniform(10)), DDIM(clip=False), 3, 0, 4))
    for t, x, ours in zip(scheduler.timesteps, states, states[1:], strict=False):
        with torch.inference_mode():
            theirs = scheduler.step(model(x, t).sample, t, x).prev_sample
        assert torch.allclose(ours, theirs, atol=2e-5, rtol=2e-5)
        assert ours.dtype == torch.float32


@pytest.mark.parametrize("name", PROCESSES)
def test_training_targets_are_what_the_network_predicts(name: str) -> None:
    loaded = Elastic(TINY, (1.0,), noise=PROCESSES[name]).initial(0)
    generator = torch.Generator().manual_seed(0)
    x0, noise = (torch.randn(6, 1, 8, 8, generator=generator) for _ in range(2))
    t = torch.tensor([0, 5, 300, 600, 998, 999])
    batches = Batches(loaded, _images(x0), 6, flip=False)
    target, x = batches.target(x0, t, noise), batches.at(x0, t, noise)
    scheduler = DDIMScheduler(**loaded.scheduler)
    kind = loaded.recipe.noise.prediction
    theirs = {"epsilon": noise, "sample": x0, "v_prediction": scheduler.get_velocity(x0, noise, t)}[kind]
    assert torch.allclose(target, theirs, atol=1e-5)
    for row, timestep in enumerate(t.tolist()):
        told = as_noise(target[row], x[row], float(loaded.alphas_cumprod[timestep]), kind)
        # float32 images, of which the noise at timestep 0 is a hundredth
        assert torch.allclose(told.float(), noise[row], atol=1e-4)


@pytest.mark.parametrize("name", PROCESSES)
def test_a_held_prediction_is_a_longer_step_whatever_the_network_predicts(name: str) -> None:
    net = Elastic(TINY, (1.0,), noise=PROCESSES[name])
    loaded = net.initial(0)
    arch = loaded.full_arch
    held = graph_of(loaded.full).blocks
    longer = Schedule((Step(900, arch), Step(300, arch), Step(100, arch)))
    with_held = Schedule((Step(900, arch), Step(600, arch, held), Step(300, arch), Step(100, arch)))
    images = sample(loaded, longer, DDIM(clip=False), 0, 0, 4)
    assert torch.allclose(sample(loaded, with_held, DDIM(clip=False), 0, 0, 4), images, atol=1e-4)
    assert not torch.allclose(
        sample(loaded, with_held, DPMSolver(clip=False), 0, 0, 4),
        sample(loaded, longer, DPMSolver(clip=False), 0, 0, 4),
        atol=1e-4,
    )


@pytest.mark.parametrize("sampler", [DDPM(), DDIM(eta=0.5), DPMSolver()], ids=repr)
def test_a_sampler_that_notices_a_held_step_is_refused_where_idle_steps_are_left_out(
    tiny_study: Study, sampler: Any
) -> None:
    space = tiny_study.space
    assert isinstance(space, Stepwise)
    reusing = replace(space, patterns=(Every(1), Every(2)))
    evaluator = replace(tiny_study.evaluator, sampler=sampler)  # type: ignore[type-var]
    with pytest.raises(UserError, match="only a deterministic sampler without memory does not notice"):
        replace(tiny_study, space=reusing, evaluator=evaluator)
    replace(tiny_study, space=replace(reusing, deterministic=False), evaluator=evaluator)


@pytest.mark.parametrize("name", PROCESSES)
@pytest.mark.parametrize("sampler", [DDIM(eta=0.7), DPMSolver(), DDPM()], ids=lambda sampler: type(sampler).__name__)
def test_an_exported_folder_samples_as_ours(
    name: str, sampler: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    net = Elastic(TINY, (0.5, 1.0), noise=PROCESSES[name])
    loaded = net.initial(0)
    timesteps = (999, 700, 400, 50)
    schedule = Schedule(tuple(Step(t, net.uniform(w)) for t, w in zip(timesteps, (0.5, 1.0, 1.0, 0.5), strict=True)))
    export(loaded, schedule, sampler.describe(), {}, tmp_path / "model")
    images = standing_alone(tmp_path / "model", monkeypatch)
    assert torch.allclose(images, sample(loaded, schedule, sampler, 0, 0, 16), atol=SAMPLES)


CHOICE = (DDIM(), DPMSolver(), DDIM(eta=0.5))


def searching_samplers(study: Study) -> Study:
    assert isinstance(study.space, Stepwise)
    return replace(
        study,
        space=replace(study.space, samplers=CHOICE),
        evaluator=replace(study.evaluator, sampler=CHOICE),  # type: ignore[type-var]
    )


def test_the_sampler_is_one_gene_of_the_trajectory(tiny_study: Study) -> None:
    space = searching_samplers(tiny_study).space
    assert isinstance(space, Stepwise)
    check_space(space)
    assert isinstance(tiny_study.space, Stepwise)
    [gene] = [choice for choice in space.choices if choice.name == "sampler"]
    assert gene.options == ("DDIM", "DPMSolver", "DDIM(eta=0.5)")
    plain = tuple(0 for _ in tiny_study.space.choices)
    schedules = [space.decode((option, *plain)) for option in range(3)]
    assert [schedule.sampler for schedule in schedules] == list(gene.options)
    assert {schedule.steps for schedule in schedules} == {tiny_study.space.decode(plain).steps}
    assert len({schedule.digest for schedule in schedules}) == 3
    assert len({space.cost((option, *plain))["macs"] for option in range(3)}) == 1
    # The baseline: every width by every sampler.
    uniform_ones = uniform_genomes(tiny_study.space)
    assert sorted(uniform_genomes(space)) == sorted((option, *genome) for option in range(3) for genome in uniform_ones)
    for schedule in (*schedules, tiny_study.space.decode(plain)):
        assert Schedule.from_json(schedule.to_json()) == schedule


def test_each_schedule_is_scored_sampled_and_exported_by_its_own_sampler(
    tiny_study: Study, tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = searching_samplers(tiny_study)
    evaluate = study.evaluator.load(study.supernet.load(tiny_run / "supernet", "cpu"), tiny_run)
    plain = tuple(0 for _ in tiny_study.space.choices)
    rung = study.evaluator.rungs[0]
    for option, sampler in enumerate(CHOICE):
        schedule = study.space.decode((option, *plain))
        one = replace(tiny_study.evaluator, sampler=sampler).load(evaluate.supernet, tiny_run)  # type: ignore[type-var]
        assert evaluate(schedule, rung, 0).values == one(replace(schedule, sampler=""), rung, 0).values
        assert evaluate.sampler_of(schedule) == sampler.describe()  # type: ignore[attr-defined]
        folder = tmp_path / str(option)
        export(evaluate.supernet, schedule, evaluate.sampler_of(schedule), {}, folder)
        images = standing_alone(folder, monkeypatch)
        assert torch.allclose(images, evaluate.sample(schedule, 16, 0), atol=SAMPLES)


def test_samplers_that_do_not_fit_are_refused(tiny_study: Study) -> None:
    space = tiny_study.space
    assert isinstance(space, Stepwise)
    with pytest.raises(UserError, match="samplers that the evaluator lacks: DPMSolver"):
        replace(tiny_study, space=replace(space, samplers=(DDIM(), DPMSolver())))
    with pytest.raises(UserError, match="DDIM, DDIM must be distinct"):
        replace(space, samplers=(DDIM(), DDIM()))
    with pytest.raises(
        UserError,
        match=r"Stepwise: samplers=\(nan,\): it is no NamedSampler, for it has no name, stochastic, multistep, describe",
    ):
        replace(space, samplers=[math.nan])  # type: ignore[arg-type]
    with pytest.raises(UserError, match="steps that compute nothing are left out"):
        replace(space, samplers=CHOICE, patterns=(Every(1), Every(2)))


def test_only_images_are_clipped_where_the_space_decides() -> None:
    loaded = Elastic(TINY, (1.0,)).initial(0)
    schedule = _whole(loaded.recipe, uniform(5))
    clipped, free = (sample(loaded, schedule, DDIM(clip), 0, 0, 4) for clip in (True, False))
    assert not torch.allclose(clipped, free, atol=1e-2)
    assert torch.equal(sample(loaded, schedule, DDIM(), 0, 0, 4), clipped)
    loaded.in_pixels = False
    assert torch.equal(sample(loaded, schedule, DDIM(), 0, 0, 4), free)
    trajectories = Trajectories(loaded, DDIM())
    assert trajectories.sampler_of(schedule).describe()["clip"] is False
    assert torch.equal(trajectories.images(schedule, 0, 0, 4), free)


def _whole(net: Elastic, timesteps: tuple[int, ...]) -> Schedule:
    return Schedule(tuple(Step(t, net.uniform(1.0)) for t in timesteps))


def _images(pixels: torch.Tensor) -> Any:
    return ImageSet(pixels.numpy(), None, "")


def test_what_an_exported_folder_steps_in_half_precision_is_reckoned_in_whole() -> None:
    """As diffusers' multistep solvers do, whose second order takes differences of images that are nearly alike."""
    abar = NoiseSchedule().alphas_cumprod
    sampler, memory, states = {"class": "DPMSolver", "clip": False}, [None, None], []
    x = torch.randn(2, 1, 4, 4, generator=torch.Generator().manual_seed(0)).half()
    for t, following in ((900, 880), (880, 860)):
        said, nothing = noise_of(x.float(), t).half(), torch.empty(2, 0, 4, 4)
        a, b = float(abar[t]), float(abar[following])
        half, memory[0] = update(sampler, x, said, a, b, None, memory[0], nothing)
        whole, memory[1] = update(sampler, x.float(), said.float(), a, b, None, memory[1], nothing)
        assert half.dtype == torch.float32
        assert torch.equal(half, whole)
        x = half.half()
        states.append(x)
    assert not torch.equal(*states)
