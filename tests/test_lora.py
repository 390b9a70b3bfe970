"""Low-rank changes of a pipeline's network, added to its weights."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from nas.contracts import UserError
from search_spaces.supernet import Elastic

NAMES = {
    "peft": ("unet.{}.lora_A.weight", "unet.{}.lora_B.weight", "{}"),
    "diffusers": ("unet.{}.lora.down.weight", "unet.{}.lora.up.weight", "{}"),
    "kohya": ("lora_unet_{}.lora_down.weight", "lora_unet_{}.lora_up.weight", "lora_unet_{}"),
}


@pytest.mark.parametrize("style", NAMES)
def test_low_rank_changes_are_added_before_anything_is_sliced(style: str, text_pipelines: Path, tmp_path: Path) -> None:
    """Against layers that answer with what they did, plus what goes through the two factors."""
    generator = torch.Generator().manual_seed(3)
    base = Elastic.from_pretrained(text_pipelines / "sd", widths=(0.5, 1.0))
    net = base.initial(0)
    layers = ["down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q", "up_blocks.1.resnets.0.conv1"]
    layers += ["down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_out.0"]
    tensors: dict[str, torch.Tensor] = {}
    factors: dict[str, tuple[torch.Tensor, torch.Tensor, float]] = {}
    for layer in layers:
        weight = net.full.get_submodule(layer).weight
        down = torch.randn((2, *weight.shape[1:]), generator=generator)
        up = torch.randn((weight.shape[0], 2, *(1,) * (weight.ndim - 2)), generator=generator)
        name = layer.replace(".", "_") if style == "kohya" else layer
        first, second, stem = (pattern.format(name) for pattern in NAMES[style])
        tensors |= {first: down, second: up}
        if style == "kohya":
            tensors[f"{stem}.alpha"] = torch.tensor(1.0)
        factors[layer] = (down, up, 0.5 if style == "kohya" else 1.0)
    save_file(tensors, tmp_path / "lora.safetensors")
    changed = replace(base, loras=(str(tmp_path / "lora.safetensors"),)).initial(0)
    x, t = torch.randn((2, *net.state_shape), generator=generator), torch.tensor([10, 900])
    told = net.recipe.anatomy.some_condition(2)
    told["encoder_hidden_states"] = torch.randn(told["encoder_hidden_states"].shape, generator=generator)

    def beside(down: torch.Tensor, up: torch.Tensor, scale: float) -> Any:
        def hook(module: Any, given: Any, answer: torch.Tensor) -> torch.Tensor:
            if down.ndim == 2:
                return answer + scale * torch.nn.functional.linear(torch.nn.functional.linear(given[0], down), up)
            inner = torch.nn.functional.conv2d(given[0], down, padding=module.padding)
            return answer + scale * torch.nn.functional.conv2d(inner, up)

        return hook

    for layer, parts in factors.items():
        net.full.get_submodule(layer).register_forward_hook(beside(*parts))
    with torch.no_grad():
        expected = net.full(x, t, **told).sample
        found = changed.full(x, t, **told).sample
    assert torch.allclose(found, expected, atol=1e-4 * float(expected.abs().max()))
    assert base.describe() != changed.recipe.describe()


@pytest.mark.parametrize("where", ["header", "beside"])
def test_how_much_a_lora_counts_is_read_where_it_stands(where: str, text_pipelines: Path, tmp_path: Path) -> None:
    """In the header that diffusers writes, or in peft's settings; else alpha is the rank, as diffusers takes it."""
    tensors = {
        "unet.conv_in.lora_A.weight": torch.randn(2, 4, 3, 3),
        "unet.conv_in.lora_B.weight": torch.randn(16, 2, 1, 1),
    }
    header = {"lora_adapter_metadata": json.dumps({"unet.lora_alpha": 8, "unet.r": 2})} if where == "header" else None
    base = Elastic.from_pretrained(text_pipelines / "sd", widths=(1.0,))
    before = base.initial(0).full.conv_in.weight

    def change(metadata: Any) -> torch.Tensor:
        save_file(tensors, tmp_path / "lora.safetensors", metadata)
        return replace(base, loras=(str(tmp_path / "lora.safetensors"),)).initial(0).full.conv_in.weight - before

    plain = change(None)
    if where == "beside":
        (tmp_path / "adapter_config.json").write_text(json.dumps({"lora_alpha": 8, "r": 2}))
    assert torch.allclose(change(header), 4 * plain, atol=1e-4)
    odd = json.dumps({"use_rslora": True, "lora_alpha": 8})
    (tmp_path / "adapter_config.json").write_text(odd)
    with pytest.raises(UserError, match="use_rslora=True is not known here"):
        change({"lora_adapter_metadata": odd} if where == "header" else None)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("text_encoder.layers.0.q_proj.lora_A.weight", "changes the text encoder too"),
        ("unet.nowhere.lora_A.weight", "belongs to no weight of the network"),
        ("unet.conv_in.something", "is no part of a LoRA that is known here"),
        ("unet.conv_in.lora_A.weight", "is missing"),
    ],
)
def test_what_cannot_be_added_is_never_left_out(name: str, words: str, text_pipelines: Path, tmp_path: Path) -> None:
    save_file({name: torch.zeros(2, 4)}, tmp_path / "lora.safetensors")
    net = Elastic.from_pretrained(text_pipelines / "sd", widths=(1.0,), loras=(str(tmp_path / "lora.safetensors"),))
    with pytest.raises(UserError, match=words):
        net.initial(0)
