"""What stock text encoders make of a text, as the pipelines of Stable Diffusion and PixArt ask them. Needs torch and the encoders alone: an exported folder
holds a copy of this file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

PARTS = (("tokenizer", "text_encoder"), ("tokenizer_2", "text_encoder_2"))
"""Components of a stock pipeline: Stable Diffusion and PixArt have the first pair, XL both."""


@torch.no_grad()
def encoded(
    parts: Mapping[str, Any], texts: Sequence[str], size: Sequence[int], device: Any, length: int | None = None
) -> dict[str, torch.Tensor]:
    """A row for each text, by the names of the network's arguments. Texts are padded to the `length`, or else to the tokenizer's, and cut where
    longer. A T5 encoder's have a mask, 1 for tokens of the text, and the `size` as PixArt at 1024 pixels is told it.

    XL takes both encoders' last but one hidden states side by side, the second's pooled output, and the `size`, height and width in pixels, of an
    image that was not cropped.
    """
    pairs = [pair for pair in PARTS if pair[1] in parts]
    if type(parts[pairs[0][1]]).__name__ == "T5EncoderModel":
        return _by_t5(parts[pairs[0][0]], parts[pairs[0][1]], list(texts), size, device, length)
    states, pooled = [], torch.empty(0)
    for name, encoder in pairs:
        tokenizer = parts[name]
        tokens = tokenizer(
            list(texts),
            padding="max_length",
            max_length=length or tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        ).input_ids.to(device)
        if len(pairs) == 1:
            return {"encoder_hidden_states": parts[encoder](tokens)[0]}
        made = parts[encoder](tokens, output_hidden_states=True)
        states.append(made.hidden_states[-2])
        pooled = made[0]
    sizes = torch.tensor([*size, 0, 0, *size], dtype=torch.float32, device=pooled.device)
    return {
        "encoder_hidden_states": torch.cat(states, dim=-1),
        "text_embeds": pooled,
        "time_ids": sizes.expand(len(texts), -1),
    }


def _by_t5(
    tokenizer: Any, encoder: Any, texts: list[str], size: Sequence[int], device: Any, length: int | None
) -> dict[str, torch.Tensor]:
    longest = length or tokenizer.model_max_length
    # PixArt's pipelines write all in small letters.
    plain = [text.lower().strip() for text in texts]
    made = tokenizer(plain, padding="max_length", max_length=longest, truncation=True, return_tensors="pt")
    mask = made.attention_mask.to(device)
    height, width = size
    return {
        "encoder_hidden_states": encoder(made.input_ids.to(device), attention_mask=mask)[0],
        "encoder_attention_mask": mask.float(),
        "resolution": torch.tensor([height, width], dtype=torch.float32, device=device).expand(len(texts), -1),
        "aspect_ratio": torch.tensor([height / width], dtype=torch.float32, device=device).expand(len(texts), -1),
    }


def nothing_said(rows: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Zeros where a text would speak: what XL takes for no negative prompt, where its pipeline has `force_zeros_for_empty_prompt`."""
    return {name: values if name == "time_ids" else torch.zeros_like(values) for name, values in rows.items()}


def rows_read_by(net: Any) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """What a network reads that reads a text: the rows that a text says, of which a negative one says others, and those that say how large the image is."""
    if net.config.get("addition_embed_type") == "text_time":
        return ("encoder_hidden_states", "text_embeds"), ("time_ids",)
    if type(net).__name__ == "PixArtTransformer2DModel":
        sized = ("resolution", "aspect_ratio") if net.use_additional_conditions else ()
        return ("encoder_hidden_states", "encoder_attention_mask"), sized
    return ("encoder_hidden_states",), ()
