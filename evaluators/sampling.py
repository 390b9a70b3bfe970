"""Runs a schedule: images from noise, one subnet call per step.

The initial noise of sample i depends on (seed, i) alone and its step noise on (seed, i, step), so neither the batch size
nor the number of samples changes what sample i looks like, and schedules that begin alike share their first states.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from math import expm1, log, log1p, sqrt
from typing import Any, Literal, Protocol

import numpy as np
import torch

from evaluators.conditions import ConditionSet
from nas.contracts import Condition, LoadedSupernet, Schedule, Step, UserError
from nas.recipes import Share, recipe

Precision = Literal["float32", "bfloat16"]


class Sampler(Protocol):
    """One update x_t -> x_s for neighbouring timesteps t > s of any subset; s = -1 stands for the image itself."""

    @property
    def stochastic(self) -> bool:
        """Whether it adds noise on the way."""

    @property
    def name(self) -> str:
        """What a schedule calls it, where a study offers several."""

    @property
    def multistep(self) -> bool:
        """Whether an update depends on the predictions before it: its `memory`."""

    @property
    def to_image(self) -> bool:
        """Whether the last step arrives at the image itself, as diffusers' ancestral and multistep schedulers do, even where the process ends short of it."""

    def describe(self) -> dict[str, Any]:
        """`class` and settings, as an exported folder names them."""

    def update(
        self,
        x: torch.Tensor,
        prediction: torch.Tensor,
        alpha: float,
        alpha_next: float,
        noise: torch.Tensor | None,
        memory: Any = None,
        learned: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, Any]:
        """x_s, and what the next update needs to know of this one, tensors in (nested) tuples.

        `prediction`: of the noise in x. `alpha`, `alpha_next`: abar at t and at s. `noise`: standard normal, where stochastic, and None in
        the last step. `memory`: what the update before returned, None in the first. `learned`: what the network says of the variance, given
        where it says anything."""


class _Named:
    """What a search calls a sampler: its class, and the settings that are not the usual ones."""

    @property
    def name(self) -> str:
        usual = {one.name: one.default for one in fields(self)}  # type: ignore[arg-type]
        own = [f"{name}={getattr(self, name)!r}" for name in usual if getattr(self, name) != usual[name]]
        return type(self).__name__ + (f"({', '.join(own)})" if own else "")


def name_of(sampler: Sampler) -> str:
    return getattr(sampler, "name", type(sampler).__name__)


def in_space(sampler: Sampler, in_pixels: bool) -> Sampler:
    """The sampler, decided whether it clips, where it leaves that to the space."""
    return replace(sampler, clip=in_pixels) if getattr(sampler, "clip", True) is None else sampler  # type: ignore[type-var]


@recipe
class DDIM(_Named):
    """DDIM (Song et al. 2021, eq. 12), deterministic with `eta` 0, as noisy as ancestral sampling with 1.

    `clip`: the predicted image is clipped to [-1, 1] (as `clip_sample` of diffusers); None for clipping in pixel space alone. Euler's method
    without churn is this with eta 0, in other words for the state. Behind the last step no noise is added, also where the process ends short of the image, where
    diffusers' adds some.
    """

    clip: bool | None = None
    eta: Share = 0.0
    multistep = False
    to_image = False

    @property
    def stochastic(self) -> bool:
        return self.eta > 0

    def describe(self) -> dict[str, Any]:
        return {"class": "DDIM", "eta": self.eta, "clip": self.clip is not False}

    def update(
        self,
        x: torch.Tensor,
        prediction: torch.Tensor,
        alpha: float,
        alpha_next: float,
        noise: torch.Tensor | None,
        memory: Any = None,
        learned: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, Any]:
        x0 = _predicted_image(x, prediction, alpha, self.clip)
        if noise is None:
            return sqrt(alpha_next) * x0 + sqrt(1 - alpha_next) * prediction, None
        variance = self.eta**2 * (1 - alpha_next) / (1 - alpha) * (1 - alpha / alpha_next)
        return sqrt(alpha_next) * x0 + sqrt(1 - alpha_next - variance) * prediction + sqrt(variance) * noise, None


@recipe
class DDPM(_Named):
    """Ancestral sampling (Ho et al. 2020, eq. 6-7) over any timestep subset, noise prediction.

    `variance`: "fixed_small" is the posterior's, "fixed_large" is beta_t, "learned_range" lies between the two where a network that has
    learned it says (Nichol & Dhariwal 2021, eq. 15). No noise is added in the last step.
    """

    variance: Literal["fixed_small", "fixed_large", "learned_range"] = "fixed_small"
    clip: bool | None = None
    stochastic = True
    multistep = False
    to_image = True

    def describe(self) -> dict[str, Any]:
        return {"class": "DDPM", "variance": self.variance, "clip": self.clip is not False}

    def update(
        self,
        x: torch.Tensor,
        prediction: torch.Tensor,
        alpha: float,
        alpha_next: float,
        noise: torch.Tensor | None,
        memory: Any = None,
        learned: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, Any]:
        x0 = _predicted_image(x, prediction, alpha, self.clip)
        beta = 1 - alpha / alpha_next
        of_image = sqrt(alpha_next) * beta / (1 - alpha)
        of_state = sqrt(alpha / alpha_next) * (1 - alpha_next) / (1 - alpha)
        mean = of_image * x0 + of_state * x
        if noise is None:  # the last step
            return mean, None
        small = (1 - alpha_next) / (1 - alpha) * beta
        if self.variance == "learned_range":
            if learned is None:
                raise UserError(
                    "DDPM(variance='learned_range') needs a network of twice as many output as input channels, which says where the variance lies"
                )
            share = (learned + 1) / 2
            return mean + torch.exp((share * log(beta) + (1 - share) * log(small)) / 2) * noise, None
        return mean + sqrt(beta if self.variance == "fixed_large" else small) * noise, None


@recipe
class DPMSolver(_Named):
    """DPM-Solver++(2M) (Lu et al. 2022, alg. 2), the multistep solver of second order in the predicted image, over any timestep subset.

    The first step is of first order, and so is one that arrives at the image itself, where no noise is left to compare with. `clip` as for
    DDIM.
    """

    clip: bool | None = None
    stochastic = False
    multistep = True
    to_image = True

    def describe(self) -> dict[str, Any]:
        return {"class": "DPMSolver", "clip": self.clip is not False}

    def update(
        self,
        x: torch.Tensor,
        prediction: torch.Tensor,
        alpha: float,
        alpha_next: float,
        noise: torch.Tensor | None,
        memory: Any = None,
        learned: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, Any]:
        x0 = _predicted_image(x, prediction, alpha, self.clip)
        if alpha_next >= 1:
            return x0, None
        step = _half_log_snr(alpha_next) - _half_log_snr(alpha)
        image = x0
        if memory is not None:
            before, alpha_before = memory
            ratio = (_half_log_snr(alpha) - _half_log_snr(alpha_before)) / step
            image = x0 + (x0 - before) / (2 * ratio)
        after = sqrt((1 - alpha_next) / (1 - alpha)) * x - sqrt(alpha_next) * expm1(-step) * image
        return after, (x0, alpha)


FAINTEST, LEAST = 1e-11, 2**-24
"""Below the first, abar means that no signal is left; the second stands for it."""


def _half_log_snr(alpha: float) -> float:
    """lambda = log(sqrt(abar) / sqrt(1 - abar)); where no signal is left, that of diffusers' multistep solvers."""
    alpha = alpha if alpha > FAINTEST else LEAST
    return 0.5 * (log(alpha) - log1p(-alpha))


def _predicted_image(x: torch.Tensor, prediction: torch.Tensor, alpha: float, clip: bool | None) -> torch.Tensor:
    x0 = (x - sqrt(1 - alpha) * prediction) / sqrt(alpha)
    return x0 if clip is False else x0.clamp(-1, 1)


def initial_noise(seed: int, start: int, stop: int, shape: tuple[int, ...]) -> torch.Tensor:
    """Standard normal states of samples start..stop-1, `(stop - start, *shape)`."""
    return _noise(seed, start, stop, shape, 0)


def step_noise(seed: int, start: int, stop: int, shape: tuple[int, ...], step: int) -> torch.Tensor:
    """Noise that samples start..stop-1 receive at the sampler's step number `step`, counted from 0."""
    return _noise(seed, start, stop, shape, step + 1)


@dataclass(frozen=True, slots=True)
class State:
    """A batch between two steps: x (n, channels, height, width), what blocks reuse from the step before, and what the sampler knows of it."""

    x: torch.Tensor
    cache: Any = None
    memory: Any = None


def predict(
    net: LoadedSupernet,
    step: Step,
    x: torch.Tensor,
    cache: Any,
    precision: Precision,
    keep: Sequence[str] = (),
    condition: Condition | None = None,
) -> tuple[torch.Tensor, Any]:
    """The network's call at a step: its prediction of the noise, float32 at least whatever the precision of the call, and the outputs of
    the blocks in `keep`. `condition`: of the samples."""
    prediction, cache = _call(net, step, x, cache, precision, keep, condition)
    return prediction[:, : x.shape[1]], cache


def _call(
    net: LoadedSupernet,
    step: Step,
    x: torch.Tensor,
    cache: Any,
    precision: Precision,
    keep: Sequence[str],
    condition: Condition | None,
) -> tuple[torch.Tensor, Any]:
    """`predict`, with what the network says of the variance."""
    if condition is not None:
        condition = {name: rows.to(net.device) for name, rows in condition.items()}
    with torch.inference_mode(), torch.autocast(net.device.type, torch.bfloat16, enabled=precision == "bfloat16"):
        prediction, cache = net.denoiser(step, keep)(x, step.timestep, cache, condition)
    return prediction.to(torch.promote_types(prediction.dtype, torch.float32)), cache


def advance(
    net: LoadedSupernet,
    sampler: Sampler,
    schedule: Schedule,
    number: int,
    state: State,
    seed: int,
    start: int,
    precision: Precision = "float32",
    conditions: ConditionSet | None = None,
) -> State:
    """The state of samples start, start + 1, ... after the schedule's step `number`, counted from 0."""
    step = schedule.steps[number]
    following = schedule.steps[number + 1] if number + 1 < len(schedule.steps) else None
    abar = net.alphas_cumprod
    noise = None
    if sampler.stochastic and following is not None:
        noise = step_noise(seed, start, start + len(state.x), net.state_shape, number).to(net.device)
    keep = following.reuse if following else ()
    condition = conditions.of(seed, start, start + len(state.x)) if conditions is not None else None
    prediction, cache = _call(net, step, state.x, state.cache, precision, keep, condition)
    with torch.inference_mode():
        # Who wrote a sampler before this was asked arrives at the image if it is a multistep one.
        to_image = getattr(sampler, "to_image", getattr(sampler, "multistep", False))
        end = 1.0 if to_image else getattr(net, "final_alpha", 1.0)
        after = end if following is None else float(abar[following.timestep])
        channels = state.x.shape[1]
        said = {"learned": prediction[:, channels:]} if prediction.shape[1] > channels else {}
        x, memory = in_space(sampler, getattr(net, "in_pixels", True)).update(
            state.x, prediction[:, :channels], float(abar[step.timestep]), after, noise, state.memory, **said
        )
        return State(x.to(state.x.dtype), cache, memory)


def trajectory(
    net: LoadedSupernet,
    schedule: Schedule,
    sampler: Sampler,
    seed: int,
    start: int,
    stop: int,
    conditions: ConditionSet | None = None,
) -> Iterator[torch.Tensor]:
    """Yields the state before the first step and after each, for samples start..stop-1. Runs under inference mode."""
    state = State(initial_noise(seed, start, stop, net.state_shape).to(net.device))
    yield state.x
    for number in range(len(schedule.steps)):
        state = advance(net, sampler, schedule, number, state, seed, start, conditions=conditions)
        yield state.x


def sample(
    net: LoadedSupernet,
    schedule: Schedule,
    sampler: Sampler,
    seed: int,
    start: int,
    stop: int,
    conditions: ConditionSet | None = None,
) -> torch.Tensor:
    """Final images of samples start..stop-1 in [-1, 1], (stop - start, channels, height, width), on the net's device."""
    *_, x = trajectory(net, schedule, sampler, seed, start, stop, conditions)
    with torch.inference_mode():
        return net.to_images(x).clamp(-1, 1)


def _noise(seed: int, start: int, stop: int, shape: tuple[int, ...], purpose: int) -> torch.Tensor:
    rows = [
        np.random.default_rng((seed, i, purpose)).standard_normal(shape, dtype=np.float32) for i in range(start, stop)
    ]
    return torch.from_numpy(np.stack(rows)) if rows else torch.empty((0, *shape))
