"""Small stock pipelines that read a text or take labels, with random weights, as people have them in a folder, and what they are asked for."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    DPMSolverMultistepScheduler,
    PixArtAlphaPipeline,
    PixArtTransformer2DModel,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from safetensors.torch import load_file, save_file
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from benchmarks.small_text import text_config, tokenizer
from evaluators.conditions import Prompts
from evaluators.sampling import DDIM
from nas.contracts import Guidance, ImageSet, Schedule, Step
from nas.handover.export import export
from search_spaces.supernet import Elastic

TOKENS, TEXT_WIDTH = 12, 16
TEXTS = ["a photo of a bag", "a small dress", "", "a drawing of a coat"]
WORDS = ("a", "photo", "of", "drawing", "small", "bag", "boot", "coat", "dress", "shirt")

UNET: dict[str, Any] = {
    "sample_size": 8,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": (16, 32),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "cross_attention_dim": TEXT_WIDTH,
    "attention_head_dim": 2,
}
XL_UNET = {
    **UNET,
    "cross_attention_dim": 2 * TEXT_WIDTH,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 4,
    "projection_class_embeddings_input_dim": 6 * 4 + TEXT_WIDTH,
}
VAE: dict[str, Any] = {
    "in_channels": 3,
    "out_channels": 3,
    "block_out_channels": (8, 8),
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "norm_num_groups": 4,
    "latent_channels": 4,
    "sample_size": 16,
    "scaling_factor": 0.5,
}
SCHEDULER: dict[str, Any] = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}


def stable_diffusion(folder: Path, seed: int = 0, **unet: Any) -> StableDiffusionPipeline:
    """Saved in the folder too."""
    torch.manual_seed(seed)
    words = tokenizer(folder.parent / "words", WORDS, TOKENS)
    pipeline = StableDiffusionPipeline(
        vae=AutoencoderKL(**VAE),
        text_encoder=CLIPTextModel(text_config(len(words), TOKENS, TEXT_WIDTH)).eval(),
        tokenizer=words,
        unet=UNet2DConditionModel(**{**UNET, **unet}),
        scheduler=DDIMScheduler(**SCHEDULER),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def stable_diffusion_xl(folder: Path, seed: int = 0) -> StableDiffusionXLPipeline:
    """Saved in the folder too."""
    torch.manual_seed(seed)
    words = tokenizer(folder.parent / "words", WORDS, TOKENS)
    pipeline = StableDiffusionXLPipeline(
        vae=AutoencoderKL(**VAE),
        text_encoder=CLIPTextModel(text_config(len(words), TOKENS, TEXT_WIDTH)).eval(),
        text_encoder_2=CLIPTextModelWithProjection(text_config(len(words), TOKENS, TEXT_WIDTH)).eval(),
        tokenizer=words,
        tokenizer_2=words,
        unet=UNet2DConditionModel(**XL_UNET),
        scheduler=DDIMScheduler(**SCHEDULER),
        add_watermarker=False,
    )
    pipeline.save_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


TRANSFORMER: dict[str, Any] = {
    "sample_size": 8,
    "in_channels": 4,
    "out_channels": 8,
    "patch_size": 2,
    "num_attention_heads": 4,
    "attention_head_dim": 8,
    "num_layers": 3,
}
LINEAR: dict[str, Any] = {"beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "linear", "clip_sample": False}


def dit(folder: Path, classes: int = 1000, seed: int = 0, **transformer: Any) -> DiTPipeline:
    """Saved in the folder too. Its blocks have one embedder, as those of the published ones."""
    torch.manual_seed(seed)
    network = DiTTransformer2DModel(**{**TRANSFORMER, **transformer}, num_embeds_ada_norm=classes)
    for block in network.transformer_blocks[1:]:
        block.norm1.emb.load_state_dict(network.transformer_blocks[0].norm1.emb.state_dict())
    pipeline = DiTPipeline(
        transformer=network,
        vae=AutoencoderKL(**VAE),
        scheduler=DDIMScheduler(**LINEAR, set_alpha_to_one=True),
        id2label={0: "bag", 1: "boot"},
    )
    pipeline.save_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def pixart(folder: Path, seed: int = 0) -> PixArtAlphaPipeline:
    """Saved in the folder too."""
    torch.manual_seed(seed)
    words = T5Tokenizer(vocab=[("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((f"\u2581{w}", -1.0) for w in WORDS)])
    text = T5Config(vocab_size=16, d_model=TEXT_WIDTH, d_kv=4, d_ff=32, num_layers=2, num_heads=2)
    width = TRANSFORMER["num_attention_heads"] * TRANSFORMER["attention_head_dim"]
    network = PixArtTransformer2DModel(**TRANSFORMER, caption_channels=TEXT_WIDTH, cross_attention_dim=width)
    pipeline = PixArtAlphaPipeline(
        tokenizer=words,
        text_encoder=T5EncoderModel(text).eval(),
        vae=AutoencoderKL(**VAE),
        transformer=network,
        scheduler=DPMSolverMultistepScheduler(
            beta_start=0.0001, beta_end=0.02, beta_schedule="linear", final_sigmas_type="zero"
        ),
    )
    pipeline.save_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def as_released_in_2022(folder: Path) -> None:
    """The network in the folder, its attention called as it was then, without settings that there were none of."""
    path = folder / "diffusion_pytorch_model.safetensors"
    now = {"to_q": "query", "to_k": "key", "to_v": "value", r"to_out\.0": "proj_attn"}
    tensors = load_file(path)
    for present, former in now.items():
        tensors = {
            re.sub(rf"(attentions\.\d+\.){present}\.", rf"\1{former}.", name): tensor
            for name, tensor in tensors.items()
        }
    assert any(".proj_attn." in name for name in tensors)
    save_file(tensors, path, {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({n: v for n, v in config.items() if n != "scaling_factor"}))


def prompts(folder: Path, encoder: Any, **settings: Any) -> Prompts:
    (folder / "prompts.txt").write_text("\n".join(text for text in TEXTS if text))
    return Prompts(str(folder / "prompts.txt"), encoder, **settings)


def captioned_images() -> ImageSet:
    pixels = np.random.default_rng(0).standard_normal((8, 3, 16, 16)).astype(np.float32).clip(-1, 1)
    return ImageSet(pixels, None, "eight", captions=tuple(TEXTS * 2))


def small_clip(folder: Path) -> tuple[CLIPModel, Any]:
    """Saved there, with its tokenizer."""
    words = tokenizer(folder, WORDS, TOKENS)
    words.save_pretrained(folder)
    torch.manual_seed(0)
    vision = {"image_size": 16, "patch_size": 8, "hidden_size": 16, "intermediate_size": 32}
    vision |= {"num_hidden_layers": 2, "num_attention_heads": 2, "projection_dim": TEXT_WIDTH}
    config = CLIPConfig(
        text_config=text_config(len(words), TOKENS, TEXT_WIDTH).to_dict(),
        vision_config=vision,
        projection_dim=TEXT_WIDTH,
    )
    clip = CLIPModel(config).eval()
    clip.save_pretrained(folder)
    return clip, words


def exported(
    folder: Path, to: Path, kind: str = "sd", reuse: tuple[str, ...] = ("d1", "mid", "u0")
) -> tuple[Any, Schedule]:
    """A network of a folder that holds these pipelines, and the schedule by which it was handed out."""
    recipe = Elastic.from_pretrained(folder / kind, widths=(0.5, 1.0))
    net = recipe.initial(0)
    half = recipe.uniform(0.5)
    steps = (
        Step(801, net.full_arch, (), Guidance(3.0)),
        Step(601, net.full_arch, reuse, Guidance(3.0)),
        Step(401, half, (), Guidance(2.0)),
        Step(201, half),
    )
    schedule = Schedule(steps)
    export(net, schedule, DDIM(clip=False).describe(), {}, to)
    return net, schedule
