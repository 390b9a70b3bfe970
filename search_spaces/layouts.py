"""Schedules of reuse for diffusion transformers as other projects release them, as patterns of one interval that is the whole trajectory.

Pickled files are not read: `router.pt` of Learning-to-Cache becomes safetensors, once, where its code runs:
`save_file({name: value for name, value in torch.load("router.pt")["routers"].items()}, "router.safetensors")`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import load_file

from nas.base.files import first_line
from nas.contracts import UserError
from search_spaces.patterns import ALL, Listed
from search_spaces.shipped.graph import AROUND

PARTS = ("attn", "mlp")


def learning_to_cache(path: str | Path, steps: int, threshold: float = 0.1) -> Listed:
    """The router of Learning-to-Cache (Ma et al. 2024) for so many steps: a tensor "I.prob" of logits for each, step 0 the cleanest one, of attention
    and feed-forward layers of each block in turn. At steps of even I those run whose sigmoid is above the threshold; all run at the others.

    Raises UserError where the file is not that.
    """
    path = Path(path)
    try:
        tensors: dict[str, npt.NDArray[np.float32]] = load_file(path)
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"{path} cannot be read as safetensors ({first_line(error)}); save the router's tensors as such"
        ) from error
    rows = [tensors.get(f"{number}.prob") for number in range(steps)]
    sizes = {row.shape for row in rows if row is not None}
    if any(row is None for row in rows) or len(tensors) != steps or len(sizes) != 1:
        raise UserError(
            f"{path} holds {len(tensors)} tensors, not 0.prob to {steps - 1}.prob of one size; give the steps that it was learned for"
        )
    scores = [1 / (1 + np.exp(-row.astype(np.float64).ravel())) for row in rows if row is not None]
    found = [ALL if number % 2 else _running(scores[number] > threshold) for number in range(steps)]
    return Listed(f"Learning-to-Cache at {threshold:g}", tuple(found[::-1]))


def smoothcache(path: str | Path, blocks: int) -> Listed:
    """A schedule of SmoothCache: {"attn": [1, 0, ...], "mlp": [...]}, for each step, noisy to clean, whether these run in all of so many blocks.
    Raises UserError where the file is not that."""
    path = Path(path)
    try:
        told = json.loads(path.read_text())
        rows = [[int(value) for value in told[part]] for part in PARTS]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path} is no schedule with lists {' and '.join(PARTS)} ({first_line(error)}); check the file"
        ) from error
    if len({len(row) for row in rows}) != 1 or not rows[0] or any(value not in (0, 1) for row in rows for value in row):
        raise UserError(f"{path}: the lists {' and '.join(PARTS)} must be of zeros and ones, one for each step")
    each = [_running(np.array([*pair] * blocks, dtype=bool)) for pair in zip(*rows, strict=True)]
    return Listed(f"SmoothCache {path.stem}", (ALL, *each[1:]))


def _running(bits: Sequence[bool] | npt.NDArray[np.bool_]) -> tuple[str, ...]:
    """Branches of the blocks in turn that run."""
    found = tuple(f"b{place // 2}.{PARTS[place % 2]}" for place, runs in enumerate(bits) if runs)
    return (ALL if len(found) == len(bits) else found) or (AROUND,)
