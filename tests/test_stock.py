"""Pipelines as diffusers has them: taken in with network, autoencoder and noise process, and handed out where one network runs all steps."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMPipeline,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DiffusionPipeline,
    LDMPipeline,
    PixArtTransformer2DModel,
    PNDMScheduler,
    UNet2DModel,
)

from evaluators.sampling import DDIM, DDPM, DPMSolver, in_space, sample
from nas.contracts import Schedule, Step, UserError
from nas.handover.stock import _of_text, export_stock
from search_spaces.codec import Autoencoder, Pixels
from search_spaces.intervals import leading, linspace, uniform
from search_spaces.noise import NoiseSchedule
from search_spaces.supernet import Elastic
from tests.conftest import TINY
from tests.pipelines import pixart, stable_diffusion_xl
from tests.test_codec import CONFIG, KINDS, made

LDM_MODULE = LDMPipeline.__module__.removeprefix("diffusers.pipelines.")


def drawing(monkeypatch: pytest.MonkeyPatch, module: str, shape: tuple[int, ...]) -> None:
    """The pipeline's noises are those of our samples of seed 0: the first for the start, one for each step then."""
    purpose = iter(range(10_000))

    def drawn(*given: Any, **named: Any) -> torch.Tensor:
        number = next(purpose)
        rows = [np.random.default_rng((0, i, number)).standard_normal(shape, np.float32) for i in range(4)]
        return torch.from_numpy(np.stack(rows))

    monkeypatch.setattr(f"diffusers.pipelines.{module}.randn_tensor", drawn)
    monkeypatch.setattr("diffusers.schedulers.scheduling_ddpm.randn_tensor", drawn)


def shown(images: Any) -> torch.Tensor:
    return torch.from_numpy(images).permute(0, 3, 1, 2) * 2 - 1


@pytest.mark.parametrize("kind", ["KL", "VQ"])
@pytest.mark.parametrize("factor", [1.0, 0.5])
def test_a_latent_pipeline_is_taken_in_whole(
    kind: str, factor: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """LDMPipeline itself, at the same noise: the scaling factor applied exactly once, the process of its scheduler."""
    vae = made(kind, tmp_path / "vae")
    vae.register_to_config(scaling_factor=factor)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        unet = UNet2DModel(**CONFIG).eval()
    scheduler = DDIMScheduler(
        beta_start=0.0015,
        beta_end=0.0195,
        beta_schedule="scaled_linear",
        clip_sample=False,
        timestep_spacing="trailing",
    )
    LDMPipeline(vqvae=vae, unet=unet, scheduler=scheduler).save_pretrained(tmp_path / "ldm")
    recipe = Elastic.from_pretrained(tmp_path / "ldm", widths=(0.5, 1.0))
    assert recipe.noise == NoiseSchedule(beta_start=0.0015, beta_end=0.0195, beta_schedule="scaled_linear")
    assert recipe.image_shape == (1, 16, 16)
    net = recipe.initial(0)
    schedule = Schedule(tuple(Step(t, net.full_arch) for t in uniform(5)))
    ours = sample(net, schedule, DDIM(), 0, 0, 4)
    theirs = LDMPipeline.from_pretrained(tmp_path / "ldm")
    drawing(monkeypatch, LDM_MODULE, (2, 8, 8))
    images = theirs(batch_size=4, num_inference_steps=5, output_type="np").images
    assert torch.allclose(ours, shown(images), atol=1e-5)


@pytest.mark.parametrize("kind", [DDIMPipeline, DDPMPipeline])
def test_a_pixel_pipeline_has_no_autoencoder(kind: Any, tmp_path: Path) -> None:
    network = Elastic(TINY, (1.0,)).initial(0).full
    scheduler = (DDIMScheduler if kind is DDIMPipeline else DDPMScheduler)(beta_schedule="squaredcos_cap_v2")
    kind(unet=network, scheduler=scheduler).save_pretrained(tmp_path / "model")
    recipe = Elastic.from_pretrained(tmp_path / "model", widths=(0.5, 1.0))
    assert recipe.codec == Pixels()
    assert recipe.noise.beta_schedule == "squaredcos_cap_v2"


def test_another_autoencoder_or_its_scale_can_be_given(tmp_path: Path) -> None:
    vae = KINDS["VQ"]()
    vae.register_to_config(scaling_factor=0.18215)
    network = Elastic(CONFIG, (1.0,), codec=Autoencoder(_saved(tmp_path))).initial(0).full
    LDMPipeline(vqvae=vae, unet=network, scheduler=PNDMScheduler()).save_pretrained(tmp_path / "ldm")
    with pytest.raises(UserError, match=r"scaling_factor is 0\.18215, .*scale="):
        Elastic.from_pretrained(tmp_path / "ldm")
    codec = Autoencoder(str(tmp_path / "ldm" / "vqvae"), scale=1.0)
    assert Elastic.from_pretrained(tmp_path / "ldm", codec=codec).codec == codec


def _saved(tmp_path: Path) -> str:
    made("KL", tmp_path / "kl")
    return str(tmp_path / "kl")


@pytest.mark.parametrize(
    ("kind", "words"),
    [("LDMSuperResolutionPipeline", "given the small image too"), ("LDMTextToImagePipeline", "a BERT of its own")],
)
def test_pipelines_that_ask_for_more_are_refused_in_words(kind: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": kind, "unet": ["diffusers", "UNet2DModel"]}))
    with pytest.raises(UserError, match=words):
        Elastic.from_pretrained(tmp_path)


# ---------------------------------------------------------------------------------------------------------------- handed out


def single(net: Any, timesteps: tuple[int, ...], width: float = 0.5) -> Schedule:
    return Schedule(tuple(Step(t, net.recipe.uniform(width)) for t in timesteps))


@pytest.mark.parametrize("kind", ["pixels, DDIM", "pixels, DDPM", "pixels, DDPM, its end at timestep 0", "latents"])
def test_a_schedule_of_one_network_is_diffusers_own_pipeline(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which samples as ours at the same noise."""
    if kind == "latents":
        made("KL", tmp_path / "vae")
        net = Elastic(CONFIG, (0.5, 1.0), codec=Autoencoder(str(tmp_path / "vae"))).initial(0)
    else:
        net = Elastic(TINY, (0.5, 1.0), noise=NoiseSchedule(final_alpha="first" if "end" in kind else "one")).initial(0)
    ancestral = "DDPM" in kind
    recipe: Any = DDPM() if ancestral else DDIM()
    sampler = in_space(recipe, net.in_pixels)
    # Ancestral steps of diffusers are those between neighbours of its own grid.
    schedule = single(net, tuple(range(900, -1, -100)) if ancestral else uniform(10))
    facts = export_stock(net, schedule, sampler.describe(), {"study": "x"}, tmp_path / "stock")
    assert facts == {
        "pipeline": "DDPMPipeline" if ancestral else "LDMPipeline" if kind == "latents" else "DDIMPipeline",
        "steps": 10,
        "timesteps": True,
    }
    pipeline = DiffusionPipeline.from_pretrained(str(tmp_path / "stock"))
    module = type(pipeline).__module__.removeprefix("diffusers.pipelines.")
    drawing(monkeypatch, module, net.state_shape)
    images = pipeline(batch_size=4, num_inference_steps=10, output_type="np").images
    assert torch.allclose(sample(net, schedule, sampler, 0, 0, 4), shown(images), atol=1e-4)
    again = Elastic.from_pretrained(tmp_path / "stock", widths=(1.0,))
    assert again.noise == (net.recipe.noise if not ancestral else NoiseSchedule())  # DDPM's scheduler knows no end
    assert json.loads((tmp_path / "stock" / "provenance.json").read_text())["study"] == "x"


def test_a_side_that_is_given_as_a_pair_is_a_side(tmp_path: Path) -> None:
    made("KL", tmp_path / "vae")
    net = Elastic({**CONFIG, "sample_size": (8, 8)}, (1.0,), codec=Autoencoder(str(tmp_path / "vae"))).initial(0)
    export_stock(net, single(net, uniform(2), 1.0), DDIM(clip=False).describe(), {}, tmp_path / "stock")
    pipeline = DiffusionPipeline.from_pretrained(str(tmp_path / "stock"))
    assert pipeline(batch_size=1, num_inference_steps=2, output_type="np").images.shape == (1, 16, 16, 1)


@pytest.mark.parametrize(("side", "name"), [(128, "PixArtAlphaPipeline"), (8, "PixArtSigmaPipeline")])
def test_a_pixart_that_is_told_sizes_is_no_sigma(side: int, name: str, tmp_path: Path) -> None:
    """Whose pipeline tells none, however long its texts are."""
    stock = pixart(tmp_path / "pixart")
    network = PixArtTransformer2DModel(**{**stock.transformer.config, "sample_size": side})
    texts = {"tokenizer": stock.tokenizer, "text_encoder": stock.text_encoder}
    made = _of_text("PixArtTransformer2DModel", texts, stock.vae, network, stock.scheduler, False, 300)
    assert type(made).__name__ == name


@pytest.mark.parametrize(
    ("timesteps", "own"),
    [
        ((980, 333, 7), False),
        (uniform(15), False),
        (uniform(30), False),
        (linspace(10, 999, 0), False),
        (uniform(5), True),
        (leading(15), True),
    ],
    ids=["of no grid", "15", "30", "from end to end", "5", "15, leading"],
)
def test_it_is_said_whether_a_stock_scheduler_takes_the_schedules_own_steps(
    timesteps: tuple[int, ...], own: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against the samples: diffusers' DDIM goes a fixed stride down, whatever its list of timesteps says."""
    net = Elastic(TINY, (0.5, 1.0)).initial(0)
    facts = export_stock(net, single(net, timesteps), DDIM().describe(), {}, tmp_path / "stock")
    assert facts["timesteps"] is own
    pipeline = DiffusionPipeline.from_pretrained(str(tmp_path / "stock"))
    drawing(monkeypatch, type(pipeline).__module__.removeprefix("diffusers.pipelines."), net.state_shape)
    images = shown(pipeline(batch_size=4, num_inference_steps=len(timesteps), output_type="np").images)
    ours = sample(net, single(net, timesteps), DDIM(), 0, 0, 4)
    assert torch.allclose(images, ours, atol=1e-3) is own


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("two networks", "it runs 2 networks"),
        ("reuse", "it reuses blocks"),
        ("labels", "its network takes labels"),
        ("solver", "DPMSolver is not DDIM or DDPM"),
        ("noise", r"DDIM with eta=0\.5 adds noise"),
        ("shift", "LDMPipeline knows no latents_mean, latents_std"),
        ("oblong", "LDMPipeline makes square latents alone"),
        ("oblong XL", "StableDiffusionXLPipeline makes square images where nobody says a size"),
        ("depth", "its network is a UNet2DConditionModel"),
        ("variance", "its network says where the variance lies, and DDIM does not ask"),
        ("last", "DDPM's last step adds noise to the image where it stands above timestep 0"),
        ("full", "is not empty"),
    ],
)
def test_what_no_stock_pipeline_does_is_refused_in_words(change: str, words: str, tmp_path: Path) -> None:
    config = {**TINY, "num_class_embeds": 11} if change == "labels" else {**TINY, "layers_per_block": 2}
    recipe = Elastic(config, (0.5, 1.0), depths=(1, 2) if change == "depth" else (), per_level=("depth",))
    sampler: Any = DDIM()
    if change == "variance":
        recipe = Elastic({**TINY, "out_channels": 2}, (0.5, 1.0))
    elif change == "shift":
        made("KL, by channel", tmp_path / "vae")
        recipe = Elastic(CONFIG, (0.5, 1.0), codec=Autoencoder(str(tmp_path / "vae")))
    elif change == "oblong":
        made("KL", tmp_path / "vae")
        recipe = Elastic({**CONFIG, "sample_size": (8, 16)}, (0.5, 1.0), codec=Autoencoder(str(tmp_path / "vae")))
    elif change == "oblong XL":
        stable_diffusion_xl(tmp_path / "xl")
        config = json.loads((tmp_path / "xl" / "unet" / "config.json").read_text())
        (tmp_path / "xl" / "unet" / "config.json").write_text(json.dumps({**config, "sample_size": [8, 16]}))
        recipe = Elastic.from_pretrained(tmp_path / "xl", widths=(0.5, 1.0))
    net = recipe.initial(0)
    schedule = single(net, (900, 100))
    first, last = schedule.steps
    if change == "two networks":
        schedule = Schedule((first, replace(last, arch=recipe.uniform(1.0))))
    elif change == "reuse":
        schedule = Schedule((first, replace(last, reuse=("d0",))))
    elif change == "depth":
        schedule = single(net, (900, 100), 1.0)
        schedule = Schedule(tuple(replace(step, arch=step.arch.replace(depths=(1, 2))) for step in schedule.steps))
    elif change == "last":
        sampler = DDPM("fixed_large")
    elif change in ("solver", "noise"):
        sampler = DPMSolver() if change == "solver" else DDIM(eta=0.5)
    elif change == "full":
        (tmp_path / "stock").mkdir()
        (tmp_path / "stock" / "x").write_text("")
    with pytest.raises(UserError, match=words):
        export_stock(net, schedule, in_space(sampler, net.in_pixels).describe(), {}, tmp_path / "stock")
    assert not list(tmp_path.glob(".stock*"))
