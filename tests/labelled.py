"""A small network that takes labels, and what guides it."""

from __future__ import annotations

import torch

from evaluators.sampling import DDIM, DDPM
from nas.contracts import Guidance, Schedule, Step
from search_spaces.intervals import uniform
from search_spaces.patterns import Every
from search_spaces.stepwise import Stepwise
from search_spaces.supernet import Elastic
from tests.conftest import TINY

CLASSES = 10
NET = Elastic({**TINY, "num_class_embeds": CLASSES + 1}, (0.5, 1.0))
WHOLE, HALF = NET.uniform(1.0), NET.uniform(0.5)
BY_HALF = Guidance(2.5, HALF)
GUIDES = (None, 1.5, Guidance(3.0, HALF))
SCHEDULES = {
    "unguided": Schedule((Step(900, WHOLE), Step(500, HALF), Step(100, WHOLE))),
    "guided in the middle": Schedule((Step(900, WHOLE), Step(500, WHOLE, (), Guidance(3.0)), Step(100, HALF))),
    "guided by the half": Schedule((Step(900, WHOLE, (), BY_HALF), Step(500, WHOLE, (), BY_HALF))),
    "reused": Schedule(
        (
            Step(900, WHOLE, (), Guidance(3.0)),
            Step(700, WHOLE, ("mid", "u0"), Guidance(2.0)),
            Step(500, WHOLE, ("d0", "d1", "mid", "u0", "u1"), Guidance(2.0)),
            Step(300, WHOLE, ("mid",), Guidance(2.0)),
            Step(100, WHOLE, ("mid",)),
        )
    ),
}
SPACES = {
    "guidance alone": Stepwise(Elastic(dict(NET.config), (1.0,)), uniform(6), (2, 2, 2), guidance=(None, 1.5, 3.0)),
    "guidance and width": Stepwise(NET, uniform(6), (2, 2, 2), guidance=GUIDES),
    "always guided": Stepwise(NET, uniform(6), (2, 2, 2), guidance=(2.0,)),
    "and reuse": Stepwise(NET, uniform(6), (2, 2, 2), guidance=GUIDES, patterns=(Every(1), Every(2))),
    "and reuse, held": Stepwise(
        NET,
        uniform(6),
        (3, 3),
        guidance=GUIDES,
        patterns=(Every(1), Every(2), Every(3, ("d0", "u1"))),
        deterministic=False,
    ),
    "by the last of two samplers": Stepwise(NET, uniform(6), (2, 2, 2), guidance=GUIDES, samplers=(DDPM(), DDIM())),
    "of experts": Stepwise(Elastic(dict(NET.config), (0.5, 1.0), experts=(500,)), uniform(6), (3, 3), guidance=GUIDES),
}


def batch(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x, labels, and the null label as often."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(5, 1, 8, 8, generator=generator), torch.tensor([0, 3, 9, 3, 1]), torch.full((5,), CLASSES)
