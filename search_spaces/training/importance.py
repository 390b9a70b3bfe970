"""Which channels matter, and the reordering that puts them first.

Scores are Diff-Pruning's (Fang, Ma & Wang, NeurIPS 2023, eq. 5): gradients of the denoising loss are summed over the informative
timesteps first, |weight x summed gradient| is summed over every slice of every tensor that belongs to a channel. Channels that
additions and products join are one channel. Sorting them inside each norm group, and heads inside each attention, leaves the
full network's function as it is, and makes the leading share of each group the one worth keeping.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from itertools import pairwise
from typing import Annotated, Any, Literal

import torch
from pydantic import Field

from nas.contracts import ImageSet, Progress, UserError, derive_seed
from nas.recipes import Batch, Count, recipe
from search_spaces.loaded import LoadedElastic
from search_spaces.networks.anatomy import Anatomy
from search_spaces.networks.slices import Arch
from search_spaces.networks.transformer import Transformer
from search_spaces.supernet import Elastic
from search_spaces.training.optimiser import Batches
from search_spaces.training.stages import Checkpoints, OneStage

Criterion = Literal["gradient", "magnitude", "random"]
Scores = dict[str, torch.Tensor]
"""One number per channel, by the channels' name in the `Anatomy`."""


@recipe
class Order(OneStage):
    """A stage that reorders the channels by importance; the full network computes what it did.

    `criterion`: "gradient" (Diff-Pruning), "magnitude" of the weights, or "random". `threshold`: the visit of timesteps, from the
    clean end, stops where the loss falls below this share of the largest so far; noisier ones say little. `stride`: of the visit.
    `squared`: sums (weight x gradient)^2 instead of the absolute value, norms and biases included. The code released for DDPM squares too,
    but leaves biases out and norms unsquared. `expert`: orders that copy of the weights, by the timesteps that it serves; `Experts(..., order=Order())`
    does it for each.
    """

    criterion: Criterion = "gradient"
    threshold: Annotated[float, Field(ge=0, lt=1)] = 0.05
    batch: Batch = 128
    stride: Count = 1
    squared: bool = False
    expert: str = ""

    def describe(self) -> dict[str, Any]:
        settings = asdict(self)
        return {"class": "Order", **{k: v for k, v in settings.items() if k != "expert" or v}}

    def of(self, expert: str) -> Order:
        return replace(self, expert=expert)

    @property
    def _name(self) -> str:
        return f"order of expert {self.expert}" if self.expert else "order"

    def macs(self, supernet: Elastic) -> float:
        """At most: of the whole visit."""
        visited = len(range(*supernet.served_by(self.expert), self.stride)) if self.criterion == "gradient" else 0
        full = supernet.cost(supernet.anatomy.full).macs
        return 3.0 * visited * self.batch * full

    def check_supernet(self, supernet: Elastic) -> None:
        super().check_supernet(supernet)
        if supernet.network is not None:
            raise UserError(
                "Order: which channels of a network of your own are joined is not known, so that none can be moved; leave it out of the training"
            )

    def fit(
        self, net: LoadedElastic, data: ImageSet, seed: int, files: Checkpoints | None = None
    ) -> Iterator[Progress]:
        """Short enough to start again after a stop, so that it keeps no checkpoint."""
        anatomy = net.recipe.anatomy
        self.check_supernet(net.recipe)
        net.begin_expert(self.expert)
        full = net.weights(self.expert)
        if self.criterion == "gradient":
            yield from self.accumulate(net, data, seed)
            gradients = {name: p.grad for name, p in full.named_parameters() if p.grad is not None}
            scores = channel_scores(anatomy, dict(full.named_parameters()), gradients, self.squared)
        elif self.criterion == "magnitude":
            weights = dict(full.named_parameters())
            scores = channel_scores(anatomy, weights, {name: w.sign() for name, w in weights.items()}, self.squared)
        else:
            generator = torch.Generator().manual_seed(derive_seed(seed, "random order"))
            sizes = {
                s.channels: s.size for t in anatomy.tensors.values() for axis in t.axes for s in axis if s.channels
            }
            scores = {name: torch.rand(size, generator=generator) for name, size in sizes.items()}
        full.zero_grad(set_to_none=True)
        permute(net, permutations(anatomy, scores), self.expert)
        yield Progress(self._name, 1, 1)

    def accumulate(self, net: LoadedElastic, data: ImageSet, seed: int) -> Iterator[Progress]:
        """Sums the gradients of the prediction error of one batch with one noise over the timesteps, into `.grad`."""
        generator = torch.Generator().manual_seed(derive_seed(seed, "importance"))
        batches = Batches(net, data, self.batch, flip=False)
        x0, condition = batches.images(generator)
        noise = torch.randn(x0.shape, generator=generator).to(net.device)
        full, arch = net.weights(self.expert), net.full_arch.replace(expert=self.expert)
        full.requires_grad_(True).eval()
        first, last = net.recipe.served_by(self.expert)
        largest = 0.0
        for timestep in range(first, last, self.stride):
            t = torch.full((len(x0),), timestep, device=net.device)
            loss = torch.nn.functional.mse_loss(
                net.forward(arch, batches.at(x0, t, noise), t, condition)[:, : x0.shape[1]],
                batches.target(x0, t, noise),
            )
            largest = max(largest, loss.item())
            if loss.item() < self.threshold * largest:
                break
            torch.autograd.backward(loss)
            yield Progress(self._name, timestep - first, last - first, {"loss": loss.item()})
        full.requires_grad_(False)


def channel_scores(
    anatomy: Anatomy, weights: Mapping[str, torch.Tensor], gradients: Mapping[str, torch.Tensor], squared: bool = False
) -> Scores:
    """Sum of |weight x gradient|, or its square, over all slices that belong to each channel."""
    scores: Scores = {}
    for name, tensor in anatomy.tensors.items():
        if name not in gradients:
            continue
        product = weights[name].detach() * gradients[name].detach()
        product = (product.cpu() if product.device.type == "mps" else product).double()  # which has no float64
        value = product.square() if squared else product.abs()
        for dim, axis in enumerate(tensor.axes):
            along = value.movedim(dim, 0).reshape(value.shape[dim], -1).sum(1)
            start = 0
            for stretch in axis:
                if stretch.channels:
                    part = along[start : start + stretch.size].cpu()
                    scores[stretch.channels] = scores.get(stretch.channels, torch.zeros(stretch.size).double()) + part
                start += stretch.size
    return scores


def permutations(anatomy: Anatomy, scores: Scores) -> dict[str, torch.Tensor]:
    """New order of the channels of each name: what stands at place i is what stood at `order[i]`.

    With a constant group count, channels by falling score inside each cell that no norm splits, since subnets keep the leading share
    of each. With a constant group size subnets keep the leading groups: whole groups by falling score, where all norms agree on
    them. Whole heads of an attention by falling score, and where heads are made thinner the channels of each head among themselves.
    """
    return {name: _order(anatomy, name, values) for name, values in scores.items()}


def _order(anatomy: Anatomy, name: str, values: torch.Tensor) -> torch.Tensor:
    places = torch.arange(len(values))
    unit = anatomy.head_sizes.get(name)
    if unit is None and anatomy.groups == "size" and name in anatomy.cells:
        unit = anatomy.group_size(name, len(values))
        if unit is None:
            return places
    if unit is not None:
        blocks = values.reshape(-1, unit).sum(1).argsort(descending=True, stable=True)
        return places.reshape(-1, unit)[blocks].reshape(-1)
    cells = anatomy.cells.get(name, ()) if anatomy.groups == "count" else ()
    bounds = sorted({0, *cells, *anatomy.divided.get(name, ()), len(values)})
    return torch.cat(
        [start + values[start:stop].argsort(descending=True, stable=True) for start, stop in pairwise(bounds)]
    )


def permute(net: LoadedElastic, order: Mapping[str, torch.Tensor], expert: str = "") -> None:
    """Reorders the full network's channels in place, those of every tensor alike; or those of an expert's."""
    with torch.no_grad():
        for name, parameter in net.weights(expert).named_parameters():
            for dim, axis in enumerate(net.recipe.anatomy.tensors[name].axes):
                index: list[torch.Tensor] = []
                start = 0
                for stretch in axis:
                    index.append(start + order.get(stretch.channels, torch.arange(stretch.size)))
                    start += stretch.size
                parameter.copy_(parameter.index_select(dim, torch.cat(index).to(parameter.device)))
    net.forget()


def block_order(net: LoadedElastic, data: ImageSet, seed: int, batch: int = 64) -> tuple[int, ...]:
    """A transformer's blocks, the one to keep longest first, for `Elastic(..., block_order=)`: by the denoising loss of the full network without each,
    on one batch of uniform timesteps. Depths are then the beginnings of this order. `net` is a loaded network, `Elastic(...).load(run / "supernet", "cpu")`
    or `.initial(0)` of a pretrained one. Raises UserError for a network that is no transformer."""
    recipe = net.recipe
    if not isinstance(recipe.anatomy, Transformer):
        raise UserError("blocks are ordered of a transformer alone; a UNet's levels lose their last ones")
    [count] = recipe.anatomy.full_depths
    batches = Batches(net, data, batch, flip=False)
    generator = torch.Generator().manual_seed(derive_seed(seed, "order of the blocks"))
    x0, condition = batches.images(generator)
    t, x, truth = batches.noised(x0, generator)
    losses = []
    for block in range(count):
        others = tuple(other for other in range(count) if other != block)
        without = replace(recipe, block_order=(*others, block), depths=())
        lacking = LoadedElastic(without, net.full, net.codec, text=net.text)
        arch = without.anatomy.canonical(Arch((1.0,), (max(count - 1, 1),)))
        with torch.inference_mode():
            losses.append(float(batches.loss(lacking.forward(arch, x, t, condition), truth, x0, x, t)))
    return tuple(sorted(range(count), key=lambda block: -losses[block]))


def pruned(anatomy: Anatomy, ratio: float) -> Arch:
    """The subnet that Diff-Pruning's rule leaves at this ratio (its section 4.3): of int(C (1 - ratio)) channels wanted, as many whole
    ones leave every norm group as fit, floor((C - int(C (1 - ratio))) / groups).

    Raises UserError where nothing would be left.
    """
    groups = anatomy.config["norm_num_groups"]
    kept = [c - groups * ((c - int(c * (1 - ratio))) // groups) for c in anatomy.channels]
    if not 0 <= ratio < 1 or min(kept) < 1:
        raise UserError(f"ratio {ratio} must be at least 0 and leave a channel of {min(anatomy.channels)}")
    return Arch(tuple(k / c for k, c in zip(kept, anatomy.channels, strict=True)))
