"""One network for all steps as the plain pipeline that diffusers has for it: DDIMPipeline, DDPMPipeline, LDMPipeline, DiTPipeline,
StableDiffusionPipeline, StableDiffusionXLPipeline, PixArtAlphaPipeline or PixArtSigmaPipeline."""

from __future__ import annotations

import json
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import diffusers
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler

from nas.base.exported import TEXTS
from nas.base.files import check_new, new_folder
from nas.base.quiet import quiet_transformers
from nas.contracts import LoadedSupernet, Schedule, UserError, some_condition

GRIDS = tuple((spacing, offset) for spacing in ("trailing", "leading", "linspace") for offset in (0, 1))
"""How diffusers spaces timesteps, and what it adds to them."""

DIT, PIXART = "DiTTransformer2DModel", "PixArtTransformer2DModel"
SIGMA_TOKENS = 300
"""Of a text, as PixArt-Sigma's pipeline has it."""
NULL = 1000
"""The label of no class that DiTPipeline knows."""


def export_stock(
    net: LoadedSupernet, schedule: Schedule, sampler: Mapping[str, Any], provenance: Mapping[str, Any], folder: Path
) -> dict[str, Any]:
    """Writes the folder, whole or not at all. Returned are the `pipeline`, its `steps`, whether they are the schedule's own `timesteps`, which
    no setting of a stock scheduler may lead to, and where it reads a text or takes labels the `guidance_scale` that it is to be called with.

    Raises UserError where no stock pipeline does what the schedule does, and where `folder` is not empty.
    """
    check_new(folder)
    _check(net, schedule, sampler)
    count = len(schedule.steps)
    grids = [_scheduler(net, sampler, spacing, offset) for spacing, offset in GRIDS]
    scheduler = next((grid for grid in grids if _same_steps(grid, schedule.timesteps)), grids[0])
    network: Any = net.extract(schedule.archs[0])
    autoencoder = getattr(net, "autoencoder", None)
    texts = _texts(net)
    kind = type(network).__name__
    size = network.config.sample_size
    if isinstance(size, list | tuple) and size[0] == size[1]:  # some pipelines reckon with a side
        network.register_to_config(sample_size=size[0])
    tokens = (getattr(net, "text_shape", None) or {}).get("tokens")
    if texts:
        with quiet_transformers():
            zeros = bool((getattr(net, "text_shape", None) or {}).get("zeros"))
            pipeline = _of_text(kind, texts, autoencoder, network, scheduler, zeros, tokens)
    elif kind == DIT:
        pipeline = diffusers.DiTPipeline(transformer=network, vae=autoencoder, scheduler=scheduler)
    elif autoencoder is not None:
        pipeline = diffusers.LDMPipeline(vqvae=autoencoder, unet=network, scheduler=scheduler)
    else:
        pipeline = getattr(diffusers, f"{sampler['class']}Pipeline")(unet=network, scheduler=scheduler)
    facts = {
        "pipeline": type(pipeline).__name__,
        "steps": count,
        "timesteps": _same_steps(scheduler, schedule.timesteps),
        **({"guidance_scale": next(iter(_scales(schedule)))} if texts or kind == DIT else {}),
        **({"use_resolution_binning": False, "max_sequence_length": tokens} if kind == PIXART else {}),
    }
    with new_folder(folder) as partial, quiet_transformers():
        pipeline.save_pretrained(partial)
        (partial / "provenance.json").write_text(json.dumps({**provenance, "stock": facts}, indent=2) + "\n")
    return facts


def _scheduler(net: LoadedSupernet, sampler: Mapping[str, Any], spacing: str, offset: int) -> Any:
    common = {**net.scheduler, "timestep_spacing": spacing, "steps_offset": offset}
    if sampler["class"] == "DDIM":
        return DDIMScheduler(**common, clip_sample=sampler["clip"])
    common.pop("set_alpha_to_one", None)
    if sampler["class"] == "DDPM":
        return DDPMScheduler(**common, clip_sample=sampler["clip"], variance_type=sampler["variance"])
    return DPMSolverMultistepScheduler(**common, algorithm_type="dpmsolver++", solver_order=2, final_sigmas_type="zero")


def _texts(net: LoadedSupernet) -> dict[str, Any]:
    """The text encoders and tokenizers."""
    return {name: part for name, part in getattr(net, "text_components", {}).items() if name in TEXTS}


def _of_text(
    kind: str, texts: Mapping[str, Any], autoencoder: Any, network: Any, scheduler: Any, zeros: bool, tokens: Any
) -> Any:
    """`zeros`: whether these stand for no negative prompt, of XL. `tokens`: of a text, by which PixArt-Sigma is told from alpha."""
    if kind == PIXART:
        # Sigma tells its network no sizes.
        sigma = tokens == SIGMA_TOKENS and not network.use_additional_conditions
        known = diffusers.PixArtSigmaPipeline if sigma else diffusers.PixArtAlphaPipeline
        return known(**texts, vae=autoencoder, transformer=network, scheduler=scheduler)
    parts = {"vae": autoencoder, "unet": network, "scheduler": scheduler, **texts}
    if "text_encoder_2" in texts:
        return diffusers.StableDiffusionXLPipeline(**parts, add_watermarker=False, force_zeros_for_empty_prompt=zeros)
    return diffusers.StableDiffusionPipeline(
        **parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False
    )


PLAIN, XL = "StableDiffusionPipeline", "StableDiffusionXLPipeline"


def _named(kind: str, texts: Mapping[str, Any]) -> str:
    """Which pipeline of latents it would be, for messages."""
    if kind == DIT:
        return "DiTPipeline"
    if kind == PIXART:
        return "PixArt's pipeline"
    return "LDMPipeline" if not texts else XL if "text_encoder_2" in texts else PLAIN


def _scales(schedule: Schedule) -> set[float]:
    """Of its steps, 1 for those that are not guided."""
    return {1.0 if step.guidance is None else step.guidance.scale for step in schedule.steps}


def _check(net: LoadedSupernet, schedule: Schedule, sampler: Mapping[str, Any]) -> None:
    latent = getattr(net, "autoencoder", None)
    texts, condition = _texts(net), some_condition(net, 1) or {}
    kind = type(net.extract(schedule.archs[0])).__name__
    labelled, reads = "class_labels" in condition, "encoder_hidden_states" in condition
    dit = kind == DIT
    several = reads or dit
    known = ("DDIM", "DPMSolver") if several else ("DDIM",) if latent is not None else ("DDIM", "DDPM")
    config: Any = {} if latent is None else latent.config
    pipeline = _named(kind, texts)
    known_shifts = ("latents_mean", "latents_std") if pipeline == XL and net.state_shape[0] == 4 else ()
    shifts = [
        name
        for name in ("shift_factor", "latents_mean", "latents_std")
        if config.get(name) and name not in known_shifts
    ]
    null = int(net.null_condition(condition)["class_labels"][0]) if labelled else None
    # Stable Diffusion's pipelines pad to what the tokenizer says.
    tokens, padded = (getattr(net, "text_shape", None) or {}).get("tokens"), None
    if pipeline in (PLAIN, XL):
        padded = texts["tokenizer"].model_max_length
    varies = getattr(net, "learned_variance", False) and sampler.get("variance") != "learned_range" and not several
    reasons = {
        f"it runs {len(schedule.archs)} networks": len(schedule.archs) > 1,
        "it reuses blocks": any(step.reuse for step in schedule.steps),
        "its network takes labels": labelled and not dit,
        f"DiTPipeline knows {NULL} classes, its network {null}": dit and null != NULL,
        "its network reads a text, and its text encoder is not here": reads and not texts,
        "its network reads a text or takes labels, and works on pixels": several and latent is None,
        "its steps are not all guided alike": several and len(_scales(schedule)) > 1,
        f"it guides by {min(_scales(schedule))}, and pipelines guide by more than 1 alone": several
        and min(_scales(schedule)) < 1,
        "LDMPipeline makes square latents alone, and its network's are not": latent is not None
        and not several
        and net.state_shape[1] != net.state_shape[2],
        "StableDiffusionXLPipeline makes square images where nobody says a size, and its network's are not": texts
        is not None
        and getattr(net.extract(schedule.archs[0]).config, "addition_embed_type", None) == "text_time"
        and net.state_shape[1] != net.state_shape[2],
        "its network is told sizes that the pipeline tells at 1024 pixels alone": "resolution" in condition
        and net.state_shape[-1] != 128,
        f"it guides {getattr(net, 'guided_channels', None)} channels alone": bool(
            getattr(net, "guided_channels", None)
        ),
        f"{sampler['class']} is not {' or '.join(known)}": sampler["class"] not in known,
        f"DDIM with eta={sampler.get('eta')} adds noise": bool(sampler.get("eta")),
        f"its network says where the variance lies, and {sampler['class']} does not ask": varies,
        "DDPM's last step adds noise to the image where it stands above timestep 0": sampler["class"] == "DDPM"
        and sampler.get("variance") != "fixed_small"
        and schedule.timesteps[-1] > 0,
        f"{pipeline} knows no {', '.join(shifts)} of an autoencoder": bool(shifts),
        f"its texts have {tokens} tokens, and {pipeline} pads them to {padded}": padded not in (None, tokens),
        f"{pipeline} cannot call a VQModel": pipeline == PLAIN and type(latent).__name__ == "VQModel",
        f"{pipeline} does not clip with {sampler['class']}": bool(sampler.get("clip"))
        and (sampler["class"] == "DPMSolver" or pipeline == PLAIN),
        f"its network is a {kind}": kind not in ("UNet2DModel", DIT) and not texts,
    }
    wrong = [words for words, applies in reasons.items() if applies]
    if wrong:
        raise UserError(
            f"no pipeline of diffusers samples as this schedule does: {'; '.join(wrong)}; export it without --stock"
        )


def _same_steps(scheduler: Any, timesteps: tuple[int, ...]) -> bool:
    """Whether it steps from each of these to the next. DDIMScheduler always goes a fixed stride down, whatever the list of its timesteps says."""
    try:
        scheduler.set_timesteps(len(timesteps))
    except ValueError:
        return False
    if tuple(int(t) for t in scheduler.timesteps) != timesteps:
        return False
    if not isinstance(scheduler, DDIMScheduler):
        return True
    stride = scheduler.config.num_train_timesteps // len(timesteps)
    return all(t - stride == after for t, after in pairwise(timesteps)) and timesteps[-1] - stride < 0
