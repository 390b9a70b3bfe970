"""Which anatomy a config has."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nas.contracts import UserError
from search_spaces.networks.anatomy import Anatomy
from search_spaces.networks.slices import Groups
from search_spaces.networks.text_unet import Heads, TextUNet
from search_spaces.networks.transformer import DiT, PixArt
from search_spaces.networks.unet import ImageUNet

FAMILIES: dict[str, type[Anatomy]] = {kind.stock.__name__: kind for kind in (ImageUNet, TextUNet, DiT, PixArt)}
"""By the name of the stock class."""

TOKENS = {"TextUNet": 77, "PixArt": 120}
"""Of a text, where nothing else is said: as CLIP has them, and as PixArt-alpha was trained."""


def anatomy_of(
    config: Mapping[str, Any], groups: Groups, heads: Heads, tokens: int | None, order: tuple[int, ...]
) -> Anatomy:
    """Of whichever stock network the config is; where it does not say itself, by its settings. Raises UserError where no anatomy covers it, or an
    option is not for it."""
    settings = {name: value for name, value in config.items() if not name.startswith("_")}
    name = config.get("_class_name") or _guessed(settings).stock.__name__
    if name not in FAMILIES:
        raise UserError(f"a {name} is not elastic; give the config of a {' or '.join(FAMILIES)}")
    kind = FAMILIES[name]
    foreign = {
        f"groups={groups!r}: a {name} has no norm groups": groups != "count" and kind in (DiT, PixArt),
        f"heads={heads!r}: a {name} has heads of one size at every width": heads != "whole" and kind is not TextUNet,
        f"block_order: a {name} is no transformer": bool(order) and kind not in (DiT, PixArt),
        f"tokens={tokens!r}: a {name} reads no text": tokens is not None and kind in (DiT, ImageUNet),
    }
    for words, applies in foreign.items():
        if applies:
            raise UserError(f"{words}; leave it out")
    if kind is DiT:
        return DiT(settings, order)
    if kind is PixArt:
        return PixArt(settings, order, tokens or TOKENS["PixArt"])
    if kind is TextUNet:
        return TextUNet(settings, groups, heads, tokens or TOKENS["TextUNet"])
    return ImageUNet(settings, groups)


def _guessed(settings: Mapping[str, Any]) -> type[Anatomy]:
    if "patch_size" in settings or ("num_layers" in settings and "block_out_channels" not in settings):
        return PixArt if {"caption_channels", "cross_attention_dim"} & settings.keys() else DiT
    return TextUNet if "cross_attention_dim" in settings else ImageUNet
