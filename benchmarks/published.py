"""Networks of published systems as configs of stock classes, and what they cost: parameters and multiply-adds of one call on one image, with
and without the two products of every attention. Most papers name the latter, those on transformers the former.

Head sizes that no stock class has are left at one head, which changes neither number.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from studies import dit_xl2_dip_go, ldm_imagenet256, pixart_ecad, sd15_dip_go

DOWN, UP = "DownBlock2D", "UpBlock2D"
ATTENTION_DOWN, ATTENTION_UP = "AttnDownBlock2D", "AttnUpBlock2D"
RESNET_DOWN, RESNET_UP = "ResnetDownsampleBlock2D", "ResnetUpsampleBlock2D"


class Published(NamedTuple):
    """`params` in millions, `macs` and `without_attention` in 1e9, pinned as they were counted apart from this project; papers print their first
    two or three digits. `config`: the arguments of a stock class, of one that reads a text of so many `tokens`. `distinct`: parameters as papers count
    them, one embedder for all blocks of a DiT and its table of positions, printed to a tenth."""

    params: float
    macs: float
    without_attention: float
    config: dict[str, Any]
    tokens: int | None = None
    distinct: float | None = None


def unet(
    size: int,
    channels: tuple[int, ...],
    attends: tuple[bool, ...],
    depth: int = 2,
    by_resnets: bool = False,
    **others: Any,
) -> dict[str, Any]:
    """`attends`: whether each level, outermost first, has attention. `by_resnets`: residual blocks change the resolution."""
    plain_down, plain_up = (RESNET_DOWN, RESNET_UP) if by_resnets else (DOWN, UP)
    last = len(channels) - 1
    down = [ATTENTION_DOWN if at else DOWN if level == last else plain_down for level, at in enumerate(attends)]
    up = [ATTENTION_UP if at else UP if level == 0 else plain_up for level, at in enumerate(attends)]
    kind = "resnet" if by_resnets else "conv"
    settings = {"in_channels": 3, "out_channels": 3, "attention_head_dim": None, "norm_num_groups": 32}
    return {
        "sample_size": size,
        "block_out_channels": channels,
        "layers_per_block": depth,
        "down_block_types": tuple(down),
        "up_block_types": tuple(reversed(up)),
        "downsample_type": kind,
        "upsample_type": kind,
        **settings,
        **others,
    }


SCALED: dict[str, Any] = {"resnet_time_scale_shift": "scale_shift", "attn_norm_num_groups": 32}
LDM_8: dict[str, Any] = {"size": 32, "channels": (192, 384, 384, 768, 768), "attends": (True, True, True, True, False)}
LDM_8 |= {"in_channels": 4, "out_channels": 4, **SCALED}

STABLE_DIFFUSION_2: dict[str, Any] = {
    **sd15_dip_go.UNET,
    "cross_attention_dim": 1024,
    "attention_head_dim": (5, 10, 20, 20),
    "use_linear_projection": True,
}


def dit(**others: int) -> dict[str, Any]:
    """DiT-XL/2 of 256 pixels (Peebles & Xie 2023), or another of its kind."""
    return {**dit_xl2_dip_go.DIT, **others}


NETWORKS = {
    "LDM-4 bedrooms, FFHQ, CelebA-HQ": Published(
        274.06, 101.200, 96.018, unet(64, (224, 448, 672, 896), (False, True, True, True), attention_head_dim=32)
    ),
    "LDM-8 churches": Published(
        294.97,
        20.924,
        18.641,
        unet(**LDM_8, by_resnets=True),
    ),
    "LDM-8 churches, plain convolutions": Published(267.18, 18.582, 16.299, unet(**LDM_8)),
    "IDDPM ImageNet-64, class-conditional, 192 channels": Published(
        273.05,
        89.086,
        88.507,
        unet(
            64,
            (192, 384, 576, 768),
            (False, False, True, True),
            depth=3,
            out_channels=6,
            num_class_embeds=1000,
            **SCALED,
        ),
    ),
    "IDDPM ImageNet-64, 128 channels": Published(
        121.06,
        39.736,
        39.350,
        unet(64, (128, 256, 384, 512), (False, False, True, True), depth=3, out_channels=6, **SCALED),
    ),
    "ADM ImageNet-64": Published(
        295.90,
        109.678,
        103.462,
        unet(
            64,
            (192, 384, 576, 768),
            (False, True, True, True),
            depth=3,
            by_resnets=True,
            out_channels=6,
            num_class_embeds=1000,
            attention_head_dim=64,
            **SCALED,
        ),
    ),
    "IDDPM CIFAR-10": Published(
        52.55,
        8.387,
        8.137,
        unet(32, (128, 256, 256, 256), (False, True, True, False), depth=3, out_channels=6, **SCALED),
    ),
    "DDIM CelebA-64": Published(
        78.70, 24.051, 23.883, unet(64, (128, 256, 256, 256, 512), (False, False, True, False, False))
    ),
    "LDM-4 ImageNet, by class": Published(400.92, 104.227, 99.770, ldm_imagenet256.UNET, tokens=1),
    "LDM-8 ImageNet, by class": Published(
        394.98,
        57.039,
        53.964,
        {
            **ldm_imagenet256.UNET,
            "sample_size": 32,
            "in_channels": 4,
            "out_channels": 4,
            "block_out_channels": (256, 512, 1024),
            "down_block_types": ("CrossAttnDownBlock2D",) * 3,
            "up_block_types": ("CrossAttnUpBlock2D",) * 3,
            "attention_head_dim": (8, 16, 32),
        },
        tokens=1,
    ),
    "Stable Diffusion 1.x, 512 pixels": Published(859.52, 401.637, 338.611, sd15_dip_go.UNET),
    "Stable Diffusion 2.1 base, 512 pixels": Published(865.91, 402.129, 339.103, STABLE_DIFFUSION_2),
    "Stable Diffusion 2.1, 768 pixels": Published(
        865.91, 1074.553, 760.486, {**STABLE_DIFFUSION_2, "sample_size": 96, "upcast_attention": True}
    ),
    "DiT-XL/2, 256 pixels": Published(749.83, 118.667, 114.439, dit(), distinct=675.1),
    "DiT-XL/2, 512 pixels": Published(749.83, 524.584, 456.938, dit(sample_size=64)),
    "DiT-XL/2 of 14 blocks": Published(376.27, 59.343, 57.229, dit(num_layers=14)),
    "DiT-XL/2 of 7 blocks": Published(189.49, 29.681, 28.624, dit(num_layers=7)),
    "DiT-B/2, 256 pixels": Published(
        147.44, 23.015, 21.807, dit(num_layers=12, num_attention_heads=12, attention_head_dim=64), distinct=130.5
    ),
    "PixArt-alpha, 256 pixels": Published(610.86, 149.055, 142.845, pixart_ecad.PIXART),
    "PixArt-alpha, 512 pixels": Published(610.86, 617.993, 542.420, {**pixart_ecad.PIXART, "sample_size": 64}),
}


class Decoder(NamedTuple):
    """`params` of the whole autoencoder in millions; `macs`, of decoding one image from latents of this shape, in 1e9. `config`: arguments of its
    stock class."""

    params: float
    macs: float
    latents: tuple[int, int, int]
    config: dict[str, Any]


def autoencoder(kind: str, channels: tuple[int, ...], latents: int, **others: Any) -> dict[str, Any]:
    return {
        "_class_name": kind,
        "in_channels": 3,
        "out_channels": 3,
        "block_out_channels": channels,
        "down_block_types": ("DownEncoderBlock2D",) * len(channels),
        "up_block_types": ("UpDecoderBlock2D",) * len(channels),
        "layers_per_block": 2,
        "latent_channels": latents,
        **others,
    }


KL_F8 = autoencoder("AutoencoderKL", (128, 256, 512, 512), 4)

DECODERS = {
    "VQ-f4 decoder, 256 pixels": Decoder(
        55.3, 335.3, (3, 64, 64), autoencoder("VQModel", (128, 256, 512), 3, num_vq_embeddings=8192)
    ),
    "KL-f8 decoder, 256 pixels": Decoder(83.7, 311.1, (4, 32, 32), KL_F8),
    "KL-f8 decoder, 512 pixels": Decoder(83.7, 1257.3, (4, 64, 64), KL_F8),
}
"""As they are printed, to a tenth."""
