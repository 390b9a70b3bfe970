"""Low-rank changes of a network's weights (Hu et al. 2022), as people have them in a file: added to the weights before anything is sliced.

Known are the names of diffusers and peft, and kohya's. What a file changes and cannot be added is refused, never left out.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from nas.base.files import file_digest, first_line, read_json
from nas.contracts import UserError

PAIRS = (
    (".lora_A.weight", ".lora_B.weight"),
    (".lora.down.weight", ".lora.up.weight"),
    ("_lora.down.weight", "_lora.up.weight"),
    (".lora_down.weight", ".lora_up.weight"),
)
"""How the names of the two factors end."""

TEXT = ("text_encoder", "lora_te")


def lora_digest(path: Path) -> str:
    """16 hexadecimal digits. Raises UserError where there is no such file."""
    if not path.is_file():
        raise UserError(f"{path} does not exist; give a safetensors file of a LoRA")
    return file_digest(path)[:16]


def fused(weights: Mapping[str, torch.Tensor], path: Path, scale: float = 1.0) -> dict[str, torch.Tensor]:
    """The weights with scale * alpha / rank * (up @ down) added to each that the file changes. Where alpha stands beside no factor, it is what the
    file's header or `adapter_config.json` beside it says, and else the rank, as diffusers takes it.

    Raises UserError, naming the tensor, for one that belongs to no weight of the network, and for changes of text encoders.
    """
    try:
        changes = load_file(path)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is damaged or no safetensors file ({first_line(error)}); copy it anew") from error
    told = _told_alpha(path)
    found = dict(weights)
    flat = {name.removesuffix(".weight").replace(".", "_"): name for name in weights if name.endswith(".weight")}
    used: set[str] = set()
    for name, down in changes.items():
        pair = next((pair for pair in PAIRS if name.endswith(pair[0])), None)
        if pair is None:
            continue
        if name.startswith(TEXT):
            raise UserError(
                f"{path} changes the text encoder too ({name}); fuse it with diffusers first: load_lora_weights, fuse_lora, unload_lora_weights, save_pretrained"
            )
        stem = name.removesuffix(pair[0])
        target = _target(stem, weights, flat)
        if target is None or stem + pair[1] not in changes:
            missing = (
                f"{stem + pair[1]} is missing" if target is not None else f"{name} belongs to no weight of the network"
            )
            hint = " (LDM's names of blocks are not known; convert it with diffusers)" if "put_blocks" in name else ""
            raise UserError(f"{path}: {missing}{hint}; use a LoRA of this very network")
        up = changes[stem + pair[1]].float()
        alphas = [key for key in (f"{stem}.alpha", f"{stem}.network_alpha") if key in changes]
        alpha = float(changes[alphas[0]]) if alphas else float(told or down.shape[0])
        change = torch.einsum("or,r...->o...", up.flatten(1), down.float()) * (scale * alpha / down.shape[0])
        if change.numel() != weights[target].numel():
            raise UserError(
                f"{path}: {name} changes a weight of {tuple(change.shape)}, {target} is {tuple(weights[target].shape)}; use a LoRA of this very network"
            )
        found[target] = found[target] + change.reshape(weights[target].shape).to(weights[target])
        used |= {name, stem + pair[1], *alphas}
    left = sorted(changes.keys() - used)
    if left or not used:
        raise UserError(
            f"{path}: {left[0] if left else 'it'} is no part of a LoRA that is known here ({len(left)} such tensors); fuse it with diffusers first"
        )
    return found


def _told_alpha(path: Path) -> float | None:
    """Of all factors, by the header that diffusers writes or by peft's settings. Raises UserError for settings that mean another sum."""
    with safe_open(path, "pt") as file:
        header = (file.metadata() or {}).get("lora_adapter_metadata")
    beside = path.with_name("adapter_config.json")
    try:
        said: Any = json.loads(header) if header else read_json(beside, "mend it") if beside.is_file() else {}
    except ValueError as error:
        raise UserError(f"{path}: its header cannot be read ({first_line(error)}); save it anew") from error
    settings = {name.rpartition(".")[2]: value for name, value in said.items() if not name.startswith(TEXT)}
    odd = [name for name in ("alpha_pattern", "rank_pattern", "use_rslora", "use_dora") if settings.get(name)]
    if odd:
        raise UserError(f"{path}: {odd[0]}={settings[odd[0]]!r} is not known here; fuse it with diffusers first")
    alpha = settings.get("lora_alpha")
    return float(alpha) if alpha is not None else None


def _target(stem: str, weights: Mapping[str, torch.Tensor], flat: Mapping[str, str]) -> str | None:
    """The weight that a name of a factor means."""
    if stem.startswith("lora_unet_"):
        return flat.get(stem.removeprefix("lora_unet_"))
    plain = re.sub(r"^(base_model\.model\.)?(unet\.|transformer\.)?", "", stem).replace(".processor.", ".")
    for name in (f"{plain}.weight", f"{plain}.0.weight"):  # what projects out is the first of two modules
        if name in weights:
            return name
    return None
