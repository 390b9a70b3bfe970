"""The forward process that a network was trained on, and how it is read from a diffusers scheduler's settings.

Of a scheduler only its noise process matters here: betas, number of timesteps, what the network predicts, and where sampling ends. Its
stepping rule (PNDM, UniPC, Euler, ...) is the study's to choose.
"""

from __future__ import annotations

import json
import logging
from dataclasses import field
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import diffusers
import numpy as np
import numpy.typing as npt
from diffusers import DDPMScheduler
from pydantic import Field

from nas.base.files import first_line, read_json
from nas.contracts import UserError
from nas.recipes import recipe

log = logging.getLogger("nas")

FILE = "scheduler_config.json"

SCHEDULERS = (
    "DDIMParallelScheduler",
    "DDIMScheduler",
    "DDPMParallelScheduler",
    "DDPMScheduler",
    "DEISMultistepScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "HeunDiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "LCMScheduler",
    "LMSDiscreteScheduler",
    "PNDMScheduler",
    "SASolverScheduler",
    "TCDScheduler",
    "UniPCMultistepScheduler",
)
"""Those of a process of discrete timesteps; flow matching, EDM and score SDEs have another one."""

OURS = ("DDIMScheduler", "DDPMScheduler", "DDIMParallelScheduler", "DDPMParallelScheduler")

Beta = Annotated[float, Field(gt=0, lt=1)]
Prediction = Literal["epsilon", "v_prediction", "sample"]

NO_SIGNAL = 1e-12
"""abar where a process leaves none at all: what a sampler divides by must not be zero, and this changes no image by more than 1e-6."""


@recipe
class NoiseSchedule:
    """The forward process q(x_t | x_0) = N(sqrt(abar_t) x_0, (1 - abar_t) I), and what the network predicts of it.

    Named as in diffusers, whose schedulers compute it. `trained_betas`: each timestep's beta instead of a `beta_schedule`. `final_alpha`:
    abar of the image that the last step arrives at, 1, or that of timestep 0 where a model was made so ("first", as in Stable Diffusion).
    `prediction`: the noise, the image itself, or v = sqrt(abar) noise - sqrt(1 - abar) image (Salimans & Ho 2022, app. D).
    `rescale_betas_zero_snr`: no signal is left at the noisiest timestep (Lin et al. 2024, alg. 1), of which a prediction of the noise would
    say nothing. Raises UserError where the fields do not fit together.
    """

    timesteps: Annotated[int, Field(ge=2, le=10**5)] = 1000
    beta_start: Beta = 1e-4
    beta_end: Beta = 0.02
    beta_schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2"] = "linear"
    trained_betas: tuple[Beta, ...] = field(default=(), repr=False)
    final_alpha: Literal["one", "first"] = "one"
    prediction: Prediction = "epsilon"
    rescale_betas_zero_snr: bool = False

    def __post_init__(self) -> None:
        if self.rescale_betas_zero_snr and self.prediction == "epsilon":
            raise UserError(
                "rescale_betas_zero_snr leaves no signal at the noisiest timestep, where a network that predicts the noise says nothing about "
                "the image; use prediction='v_prediction' or 'sample'"
            )
        if self.trained_betas and len(self.trained_betas) != self.timesteps:
            raise UserError(
                f"{len(self.trained_betas)} trained_betas for {self.timesteps} timesteps; give one for each"
            )

    @property
    def scheduler(self) -> dict[str, Any]:
        """Arguments of any diffusers scheduler for the same process; `set_alpha_to_one` is DDIM's alone."""
        return {
            "num_train_timesteps": self.timesteps,
            "beta_start": self.beta_start,
            "beta_end": self.beta_end,
            "beta_schedule": self.beta_schedule,
            "prediction_type": self.prediction,
            **({"trained_betas": self.trained_betas} if self.trained_betas else {}),
            **({"set_alpha_to_one": False} if self.final_alpha == "first" else {}),
            **({"rescale_betas_zero_snr": True} if self.rescale_betas_zero_snr else {}),
        }

    @property
    def alphas_cumprod(self) -> npt.NDArray[np.float64]:
        """abar_t for t = 0..timesteps-1."""
        settings = {name: value for name, value in self.scheduler.items() if name != "set_alpha_to_one"}
        return _alphas_cumprod(json.dumps(settings)).copy()

    @property
    def end(self) -> float:
        """abar that sampling arrives at."""
        return 1.0 if self.final_alpha == "one" else float(self.alphas_cumprod[0])

    @classmethod
    def from_scheduler(cls, path: str | Path) -> NoiseSchedule:
        """The process of a scheduler's settings: a file, its folder, or the folder of a pipeline that has one.

        Raises UserError for a process that these networks are not sampled from: no discrete timesteps, a prediction that has no name here, or
        one of the noise where none of the signal is left.
        """
        file = _settings_file(Path(path))
        config = read_json(file, "give the scheduler folder of a diffusers pipeline")
        name = config.get("_class_name")
        if name not in SCHEDULERS:
            raise UserError(
                f"{file}: {name!r} has no process of discrete timesteps and betas; known are {', '.join(SCHEDULERS)}"
            )
        kind = getattr(diffusers, name)
        taken = {key: value for key, value in config.items() if key in kind._get_init_keys(kind)}
        try:
            stock = kind(**taken)
            abar: npt.NDArray[np.float64] = stock.alphas_cumprod.double().numpy()
            # Those that are rescaled, and not what became of them.
            plain = kind(**{**taken, "rescale_betas_zero_snr": False}) if taken.get("rescale_betas_zero_snr") else stock
            betas = plain.betas.double().tolist()
        except Exception as error:  # a stock scheduler raises whatever its settings lead to
            raise UserError(
                f"{file}: diffusers cannot make this {name} ({first_line(error)}); mend the file"
            ) from error
        prediction = stock.config.prediction_type
        if prediction not in get_args(Prediction):
            raise UserError(f"{file}: the network predicts {prediction!r}; known are {', '.join(get_args(Prediction))}")
        rescaled = bool(taken.get("rescale_betas_zero_snr"))
        if rescaled and prediction == "epsilon":
            raise UserError(
                f"{file}: rescale_betas_zero_snr leaves no signal at the noisiest timestep, where a network that predicts the noise says nothing "
                "about the image; mend the file where the model predicts v"
            )
        # Where no signal is left, each stock scheduler has a small number of its own.
        left = abar[:-1] if rescaled else abar
        if not np.isfinite(left).all() or left.min() <= 0 or (np.diff(left) > 0).any():
            raise UserError(
                f"{file}: abar goes from {abar[0]:.3g} to {abar[-1]:.3g}, which is no falling process; mend the file"
            )
        end = float(getattr(stock, "final_alpha_cumprod", 1.0))
        if stock.config.get("final_sigmas_type") == "sigma_min":
            end = float(abar[0])
        if name not in OURS:
            log.info("%s: its noise process is taken; the study's sampler replaces the stepping rule of %s", file, name)
        return cls._of(taken, betas, abar, "one" if end == 1.0 else "first", prediction)

    @classmethod
    def _of(
        cls,
        settings: dict[str, Any],
        betas: list[float],
        abar: npt.NDArray[np.float64],
        final: Literal["one", "first"],
        prediction: Prediction,
    ) -> NoiseSchedule:
        """By its settings where they give this very process, else by its betas."""
        named = ("beta_start", "beta_end", "beta_schedule", "rescale_betas_zero_snr")
        known = {key: settings[key] for key in named if key in settings}
        if not settings.get("trained_betas"):
            try:
                found = cls(len(abar), **known, final_alpha=final, prediction=prediction)
            except UserError:
                pass
            else:
                compared = -1 if found.rescale_betas_zero_snr else None
                if np.array_equal(found.alphas_cumprod[:compared], abar[:compared]):
                    return found
        rescaled = bool(settings.get("rescale_betas_zero_snr"))
        return cls(
            len(abar),
            trained_betas=tuple(settings.get("trained_betas") or betas),
            final_alpha=final,
            prediction=prediction,
            rescale_betas_zero_snr=rescaled,
        )


@lru_cache(maxsize=64)
def _alphas_cumprod(settings: str) -> npt.NDArray[np.float64]:
    abar: npt.NDArray[np.float64] = DDPMScheduler(**json.loads(settings)).alphas_cumprod.double().numpy()
    return np.maximum(abar, NO_SIGNAL)


def _settings_file(path: Path) -> Path:
    for found in (path, path / "scheduler" / FILE, path / FILE):
        if found.is_file():
            return found
    raise UserError(f"{path} holds no {FILE}; give a scheduler's folder, or noise=NoiseSchedule(...)")
