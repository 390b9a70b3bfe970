"""What stock text encoders make of a text, as Stable Diffusion's pipelines ask them. Needs torch and the encoders alone: an exported folder
holds a copy of this file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

PARTS = (("tokenizer", "text_encoder"), ("tokenizer_2", "text_encoder_2"))
"""Components of a stock pipeline: Stable Diffusion has the first pair, XL both."""


@torch.no_grad()
def encoded(
    parts: Mapping[str, Any], texts: Sequence[str], size: Sequence[int], device: Any
) -> dict[str, torch.Tensor]:
    """A row for each text, by the names of the network's arguments. Texts are padded to the tokenizer's length, and cut where longer.

    XL takes both encoders' last but one hidden states side by side, the second's pooled output, and the `size`, height and width in pixels, of an
    image that was not cropped; of an empty text zeros.
    """
    pairs = [pair for pair in PARTS if pair[1] in parts]
    states, pooled = [], torch.empty(0)
    for name, encoder in pairs:
        tokenizer = parts[name]
        tokens = tokenizer(
            list(texts),
            padding="max_length",
            max_length=tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        ).input_ids.to(device)
        if len(pairs) == 1:
            return {"encoder_hidden_states": parts[encoder](tokens)[0]}
        made = parts[encoder](tokens, output_hidden_states=True)
        states.append(made.hidden_states[-2])
        pooled = made[0]
    said = torch.tensor([bool(text) for text in texts], device=pooled.device)
    sizes = torch.tensor([*size, 0, 0, *size], dtype=torch.float32, device=pooled.device)
    return {
        "encoder_hidden_states": torch.cat(states, dim=-1) * said[:, None, None],
        "text_embeds": pooled * said[:, None],
        "time_ids": sizes.expand(len(texts), -1),
    }
