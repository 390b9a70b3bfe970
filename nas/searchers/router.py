"""The router of Learning-to-Cache (Ma et al., NeurIPS 2024, section 3.3): which branches of a diffusion transformer a step may take from the one
before, learned by gradients on pairs of steps with frozen weights.

Each second step runs whole; at the step behind it every branch has a score, the sigmoid of a logit, and counts as score * its own output +
(1 - score) * that of the whole step. The loss is the mean squared difference to the whole network's prediction from the same state, plus
`sparsity` times the sum of the step's scores. States are noised images, as in the published code, brought one step of DDIM on by the whole network,
and neither guided nor seen by the sampler's later steps.
"""

from __future__ import annotations

import math
from collections.abc import Generator
from typing import Any

import torch

from nas.contracts import (
    Condition,
    ImageSet,
    LoadedSupernet,
    Progress,
    Schedule,
    Snapshot,
    Step,
    UserError,
    conditions_of,
    derive_seed,
)
from nas.recipes import Batch, Count, Positive, Share, Weight, recipe
from nas.searchers.pruner import arch_of

EVERY = 250
"""Gradient steps between two snapshots."""

MOST = 5.0
"""Logits are kept within this range of zero."""


@recipe
class Router:
    """`sparsity` and `learning_rate`: lambda and AdamW's rate, as published for 20 steps of DiT-XL/2; of 50 steps lambda is 1e-6. `steps`: gradient
    steps, each for one pair of steps, of `batch` images; the paper has up to 50,000 of 64. `drop`: share of conditions that say nothing. `threshold`: branches of a
    higher score run. The first of
    each pair runs whole, so that a space that has nothing to choose there fits it, `Branches(whole=2)`."""

    steps: Count = 4000
    batch: Batch = 64
    learning_rate: Positive = 1e-3
    sparsity: Weight = 5e-6
    drop: Share = 0.1
    threshold: Share = 0.1
    finer = True

    def learn(
        self,
        net: LoadedSupernet,
        full: Schedule,
        images: ImageSet,
        seed: int,
        so_far: Snapshot | None = None,
    ) -> Generator[Progress | Snapshot, None, tuple[torch.Tensor, int]]:
        """Scores, (steps - 1, branches), 1 at steps that run whole, and the MACs that took. Raises UserError without images to learn from."""
        if not len(images):
            raise UserError(
                "the router of Learning-to-Cache learns from noised images; give the study some, or use Gates(pruner=Pruner())"
            )
        return self._learn(net, full, images, seed, so_far)

    def _learn(
        self, net: LoadedSupernet, full: Schedule, images: ImageSet, seed: int, so_far: Snapshot | None
    ) -> Generator[Progress | Snapshot, None, tuple[torch.Tensor, int]]:
        arch = arch_of(full)
        names = net.blocks(arch, True)
        routed = range(1, len(full.steps), 2)
        generator = torch.Generator().manual_seed(derive_seed(seed, "router"))
        logits = {
            place: torch.nn.Parameter(torch.randn(len(names), generator=generator).to(net.device)) for place in routed
        }
        optimiser = torch.optim.AdamW(logits.values(), lr=self.learning_rate, weight_decay=0.0)
        first, spent = _restore(so_far, logits, optimiser)
        pairs = _Pairs(self, net, full, images, arch)
        for number in range(first, self.steps):
            draw = torch.Generator().manual_seed(derive_seed(seed, number, "pair of the router"))
            place = routed[int(torch.randint(len(routed), (), generator=draw))]
            scores = logits[place].sigmoid()
            error = pairs.error(place, dict(zip(names, scores.unbind(), strict=True)), draw)
            optimiser.zero_grad()
            torch.autograd.backward(error + self.sparsity * scores.sum())
            optimiser.step()
            with torch.no_grad():
                logits[place].clamp_(-MOST, MOST)
            spent += 5 * self.batch * net.macs(Step(0, arch))
            kept = float(torch.cat([one.detach().sigmoid() for one in logits.values()]).mean())
            yield Progress("router", number + 1, self.steps, {"error": error.item(), "mean score": kept})
            if (number + 1) % EVERY == 0 and number + 1 < self.steps:
                yield Snapshot(_state(number + 1, logits, optimiser), spent)
        keep = torch.ones(len(full.steps) - 1, len(names))
        for place, one in logits.items():
            keep[place - 1] = one.detach().sigmoid().cpu()
        return keep, spent


class _Pairs:
    """A whole step and the routed one behind it, on noised images."""

    def __init__(self, settings: Router, net: LoadedSupernet, full: Schedule, images: ImageSet, arch: Any) -> None:
        self._settings = settings
        self._net = net
        self._full = full
        self._images = images
        self._gated = net.gated(arch)
        self._conditions = conditions_of(net, images)

    def error(self, place: int, gates: dict[str, torch.Tensor], draw: torch.Generator) -> torch.Tensor:
        net, (before, here) = self._net, self._full.steps[place - 1 : place + 1]
        chosen = torch.randint(len(self._images), (self._settings.batch,), generator=draw)
        noise = torch.randn(len(chosen), *net.state_shape, generator=draw).to(net.device)
        condition = self._condition(chosen, draw)
        a, b = float(net.alphas_cumprod[before.timestep]), float(net.alphas_cumprod[here.timestep])
        with torch.no_grad():
            images = torch.from_numpy(self._images.pixels[chosen.numpy()]).to(net.device)
            x = math.sqrt(a) * net.to_states(images) + math.sqrt(1 - a) * noise
            predicted, cache = self._gated(x, before.timestep, {}, None, condition)
            image = (x - math.sqrt(1 - a) * predicted) / math.sqrt(a)
            x = (math.sqrt(b) * image + math.sqrt(1 - b) * predicted).to(noise.dtype)
            truth, _ = self._gated(x, here.timestep, {}, None, condition)
        mine, _ = self._gated(x, here.timestep, gates, cache, condition)
        return torch.nn.functional.mse_loss(mine, truth)

    def _condition(self, chosen: torch.Tensor, draw: torch.Generator) -> Condition | None:
        if self._conditions is None:
            return None
        told = self._conditions(chosen)
        dropped = torch.rand(len(chosen), generator=draw) < self._settings.drop
        null = self._net.null_condition(told)
        return {name: _where(dropped.to(rows.device), null[name], rows) for name, rows in told.items() if name in null}


def _where(chosen: torch.Tensor, one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Rows of one where chosen, else of the other."""
    return torch.where(chosen.reshape(-1, *[1] * (one.ndim - 1)), one, other)


def _state(step: int, logits: dict[int, torch.nn.Parameter], optimiser: torch.optim.AdamW) -> dict[str, torch.Tensor]:
    found = {"step": torch.tensor(step)}
    for place, one in logits.items():
        found[f"{place}.logits"] = one.detach().cpu().clone()
        for name, value in optimiser.state.get(one, {}).items():
            found[f"{place}.{name}"] = value.detach().cpu().clone()
    return found


def _restore(
    so_far: Snapshot | None, logits: dict[int, torch.nn.Parameter], optimiser: torch.optim.AdamW
) -> tuple[int, int]:
    """Step and MACs where an interrupted learning stopped."""
    if so_far is None:
        return 0, 0
    for place, one in logits.items():
        with torch.no_grad():
            one.copy_(so_far.tensors[f"{place}.logits"])
        if f"{place}.step" in so_far.tensors:
            optimiser.state[one] = {
                name: so_far.tensors[f"{place}.{name}"].to("cpu" if name == "step" else one.device)
                for name in ("step", "exp_avg", "exp_avg_sq")
            }
    return int(so_far.tensors["step"]), so_far.macs
