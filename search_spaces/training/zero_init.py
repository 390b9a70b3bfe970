"""Units that not every subnet has begin as if they were not there."""

from __future__ import annotations

from collections.abc import Container, Iterator
from typing import Any

import torch

from nas.contracts import ImageSet, Progress, UserError
from nas.recipes import recipe
from search_spaces.loaded import LoadedElastic
from search_spaces.networks.transformer import DiT
from search_spaces.supernet import Elastic
from search_spaces.training.stages import Checkpoints, OneStage

LAST = ("conv2", "to_out.0", "ff.net.2", "proj_out")
"""Layers of stock networks that end a residual branch."""


@recipe
class ZeroInit(OneStage):
    """A first stage, for weights that are not trained yet and elastic depths: in each unit that the smallest depth goes without, the last layers of residual
    branches are set to zero (Zhang, Dauphin & Ma 2019), and the shortcut of a concatenation hands on the trunk. The deep network then starts as the shallow one,
    and nothing relies on a unit before that has learned something."""

    begins = True
    """Stands first in a training alone."""

    def describe(self) -> dict[str, Any]:
        return {"class": "ZeroInit"}

    def macs(self, supernet: Elastic) -> float:
        return 0.0

    def fit(
        self, net: LoadedElastic, data: ImageSet, seed: int, files: Checkpoints | None = None
    ) -> Iterator[Progress]:
        """Raises UserError where all subnets are as deep, where the weights are pretrained, or for a network whose residual branches are not known."""
        recipe, anatomy = net.recipe, net.recipe.anatomy
        if recipe.pretrained is not None:
            raise UserError("ZeroInit: it would undo what the pretrained layers have learned; leave it out")
        if recipe.network is not None:
            raise UserError(
                f"ZeroInit: which layers of {type(net.full).__name__} end a residual branch is not known; leave it out"
            )
        if isinstance(anatomy, DiT):
            raise UserError(
                "ZeroInit: the blocks of a DiT begin by adding nothing, by gates that learn; with their last layers at zero too none would ever learn. Leave it out"
            )
        if len(recipe.depths) < 2:
            raise UserError(
                f"ZeroInit: all subnets are as deep, depths={recipe.depths}; give the supernet depths=, or leave it out"
            )
        shallow = anatomy.canonical(anatomy.full.replace(depths=(recipe.depths[0],) * anatomy.levels))
        weights = dict(net.full.named_parameters())
        lacking = [name for name in weights if anatomy.placed(name, anatomy.tensors[name].unit, shallow) is None]
        last = [name for name in lacking if _ends_a_branch(name, weights)]
        if not last:
            raise UserError(
                f"ZeroInit: no layer of {type(net.full).__name__} is known to end a residual branch; leave it out"
            )
        with torch.no_grad():
            for name in lacking:
                if name in last or ".conv_shortcut." in name:
                    weights[name].zero_()
                if name.endswith(".conv_shortcut.weight"):
                    trunk = weights[name][:, : len(weights[name])]
                    torch.nn.init.dirac_(trunk)
        net.forget()
        yield Progress("zero-init", 1, 1)


def _ends_a_branch(name: str, weights: Container[str]) -> bool:
    around, inside, _ = name.partition(".transformer_blocks.")
    # What reads a text is one branch, ended by a layer of its own.
    if inside and f"{around}.proj_out.weight" in weights:
        return False
    return name.rpartition(".")[0].endswith(LAST)
