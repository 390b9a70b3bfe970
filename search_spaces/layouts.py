"""Schedules of reuse for diffusion transformers as other projects release them, as patterns of one interval that is the whole trajectory.

Pickled files are not read: `router.pt` of Learning-to-Cache becomes safetensors, once, where its code runs:
`save_file({name: value for name, value in torch.load("router.pt")["routers"].items()}, "router.safetensors")`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file

from nas.base.files import first_line
from nas.contracts import UserError
from search_spaces.patterns import ALL, Listed
from search_spaces.shipped.graph import AROUND

PARTS = ("attn", "mlp")
"""Of a block of DiT."""


def learning_to_cache(path: str | Path, steps: int, threshold: float = 0.1) -> Listed:
    """The router of Learning-to-Cache (Ma et al. 2024) for so many steps: a tensor "I.prob" of logits for each, step 0 the cleanest one, of attention
    and feed-forward layers of each block in turn. At steps of even I those run whose sigmoid is above the threshold; all run at the others.

    Raises UserError where the file is not that.
    """
    path = Path(path)
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"{path} cannot be read as safetensors ({first_line(error)}); save the router's tensors as such"
        ) from error
    if {*tensors} != {f"{number}.prob" for number in range(steps)} or len({row.shape for row in tensors.values()}) != 1:
        raise UserError(
            f"{path} holds {len(tensors)} tensors, not 0.prob to {steps - 1}.prob of one size; give the steps that it was learned for"
        )
    rows = [tensors[f"{number}.prob"].double().ravel() for number in range(steps)]
    if len(rows[0]) % 2 or not all(row.isfinite().all() for row in rows):
        raise UserError(
            f"{path}: {len(rows[0])} logits of a step must be finite numbers, two for each block; save the router anew"
        )
    found = [ALL if number % 2 else _running((row.sigmoid() > threshold).tolist()) for number, row in enumerate(rows)]
    # The file begins at the cleanest step, a trajectory at the noisiest.
    return Listed(f"Learning-to-Cache at {threshold:g}", tuple(found[::-1]), len(rows[0]))


def smoothcache(path: str | Path, blocks: int, parts: Sequence[str] = PARTS) -> Listed:
    """A schedule of SmoothCache: {"attn": [1, 0, ...], "mlp": [...]}, for each step, noisy to clean, whether these run in all of so many blocks. `parts`: of
    a block, in their order; ("attn", "text", "mlp") of a PixArt. Raises UserError where the file is not that."""
    path = Path(path)
    try:
        told = json.loads(path.read_text())
        rows = [[int(value) for value in told[part]] for part in parts]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path} is no schedule with lists {' and '.join(parts)} ({first_line(error)}); check the file"
        ) from error
    if {*told} != {*parts} or len({len(row) for row in rows}) != 1 or not rows[0]:
        raise UserError(f"{path} must hold the lists {' and '.join(parts)} alone, of one number for each step")
    if any(value not in (0, 1) for row in rows for value in row) or not all(row[0] for row in rows):
        raise UserError(f"{path}: the lists {' and '.join(parts)} must be of zeros and ones, and begin with ones")
    each = [_running([*bits] * blocks, parts) for bits in zip(*rows, strict=True)]
    return Listed(f"SmoothCache {path.stem}", tuple(each), blocks * len(parts))


def _running(bits: Sequence[int], parts: Sequence[str] = PARTS) -> tuple[str, ...]:
    """Branches of the blocks in turn that run."""
    found = tuple(f"b{n // len(parts)}.{parts[n % len(parts)]}" for n, runs in enumerate(bits) if runs)
    return (ALL if len(found) == len(bits) else found) or (AROUND,)
