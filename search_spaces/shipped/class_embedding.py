"""A learned vector for each class, which networks read in a text's place. An exported folder whose networks do so holds a copy of this file."""

from __future__ import annotations

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config


class ClassEmbedding(ModelMixin, ConfigMixin):  # type: ignore[misc]
    """`classes`, and one vector more, of no class, the last."""

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(self, classes: int, channels: int) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(classes + 1, channels))

    def forward(self, labels: torch.Tensor) -> torch.Tensor:
        """Of each label, (n,), a text of one token, (n, 1, channels)."""
        return self.weight[labels][:, None]
