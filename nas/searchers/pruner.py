"""Which blocks to reuse at which step, learned by gradients through the unrolled sampler with frozen weights: the form of DiP-GO's pruner
(Zhu et al., NeurIPS 2024, sections 3.2-3.4). Its published training has one fixed noise, and steps and weights of its own (`Pruner`).

Every block has a gate at every step but the first. A gate is open where its keep logit is the larger one; gradients pass as if it
were the softmax (straight-through). All blocks run, and an open gate's block counts with its own output, a shut one's with that of the
step before. The loss is 1 - SSIM of the final samples and the full network's from the same noise, plus the sparsity loss: the mean
over gates of gate * gamma, gamma being the share of a step's MACs that vanish with the block, those that only it reads included. The
sparsity loss is left out while the kept share of MACs is below a floor.

`scope="step"` learns each step by itself, from the full network's own state and blocks: memory does not grow with the number of steps,
and what a reused block does to later steps is not seen.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch.utils.checkpoint import checkpoint

from nas.contracts import (
    Condition,
    Finer,
    Gated,
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

EVERY = 25
"""Gradient steps between two snapshots."""


@recipe
class Pruner:
    """`scores`: logits made by the published network, queries through an encoder layer and a branch of two layers for each gate, or
    "plain" logits of their own. `scope`: the whole "trajectory", or each "step". `finer`: gates for branches, or for "layers", instead of blocks.

    `steps`: gradient steps; `batch`: noises in each, new ones every time (`noises` many in all, where given: the published code uses
    one). SGD on a cosine from `learning_rate`. `sparsity`: weight of the sparsity loss; `floor`: kept share of MACs below which it is
    left out. `dimension`: of the queries. `checkpointing`: states between steps are kept and what is in between is run again, so
    that memory grows by one state a step. `clip`: as the sampler's.
    """

    scores: Literal["network", "plain"] = "network"
    scope: Literal["trajectory", "step"] = "trajectory"
    finer: Finer = False
    steps: Count = 200
    batch: Batch = 4
    noises: Count | None = None
    learning_rate: Positive = 0.5
    weight_decay: Weight = 1e-4
    sparsity: Weight = 2.0
    floor: Share = 0.2
    dimension: Annotated[int, Field(ge=4, le=4096, multiple_of=4)] = 64
    checkpointing: bool = True
    clip: bool = True
    threshold = 0.5  # of keep probabilities: an open gate is one that is rather kept than skipped

    def learn(
        self,
        net: LoadedSupernet,
        full: Schedule,
        images: ImageSet,
        seed: int,
        so_far: Snapshot | None = None,
    ) -> Generator[Progress | Snapshot, None, tuple[torch.Tensor, int]]:
        """Keep probabilities, (steps - 1, blocks), and the MACs that took."""
        conditions = conditions_of(net, images)
        return learn_gates(self, net, full, seed, so_far, conditions, len(images.texts or images))


class Scorer(torch.nn.Module):
    """Skip and keep logits of each gate, (steps, blocks, 2). At the start every gate is kept with probability e / (1 + e) = 0.73."""

    def __init__(self, settings: Pruner, steps: int, blocks: int, seed: int) -> None:
        super().__init__()
        self.shape = (steps, blocks, 2)
        width, gates = settings.dimension, steps * blocks
        generator = torch.Generator().manual_seed(seed)
        start = torch.tensor([0.0, 1.0])
        self.network = settings.scores == "network"
        if not self.network:
            self.logits = torch.nn.Parameter(start.repeat(gates, 1))
            return
        self.queries = torch.nn.Parameter(torch.randn(gates, width, generator=generator))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.encoder = torch.nn.TransformerEncoderLayer(width, 4, 2 * width, dropout=0.0, batch_first=True)
        self.inner = torch.nn.Parameter(torch.randn(gates, width, width, generator=generator) / width**0.5)
        self.inner_bias = torch.nn.Parameter(torch.zeros(gates, width))
        self.outer = torch.nn.Parameter(torch.zeros(gates, width, 2))
        self.outer_bias = torch.nn.Parameter(start.repeat(gates, 1))

    def forward(self) -> torch.Tensor:
        if not self.network:
            return self.logits.view(self.shape)
        encoded = self.encoder(self.queries[None])[0]
        hidden = torch.relu(torch.einsum("gi,gij->gj", encoded, self.inner) + self.inner_bias)
        logits: torch.Tensor = torch.einsum("gi,gij->gj", hidden, self.outer) + self.outer_bias
        return logits.view(self.shape)


def straight_through(logits: torch.Tensor) -> torch.Tensor:
    """Gates of 0 or 1, (steps, blocks), with the gradient of the keep probability; open where both logits are alike."""
    keep = logits.softmax(-1)[..., 1]
    hard = (logits[..., 1] >= logits[..., 0]).to(keep)
    return hard + keep - keep.detach()


def gammas(net: LoadedSupernet, arch: Any, finer: Finer) -> torch.Tensor:
    """For each block, the share of a step's MACs that vanish with it: its own, and those of blocks that only it reads."""
    names = net.blocks(arch, finer)
    full = net.macs(Step(0, arch))
    without = [net.reused(arch, [other for other in names if other != name], finer) for name in names]
    return torch.tensor([1 - net.macs(Step(0, arch, tuple(reuse))) / full for reuse in without])


def learn_gates(
    settings: Pruner,
    net: LoadedSupernet,
    full: Schedule,
    seed: int,
    so_far: Snapshot | None = None,
    conditions: Callable[[torch.Tensor], Condition] | None = None,
    images: int = 0,
) -> Generator[Progress | Snapshot, None, tuple[torch.Tensor, int]]:
    """Keep probabilities of the schedule's blocks, (steps - 1, blocks), for all steps but the first, and the MACs that took. Each noise
    costs the full network's trajectory, and three or, with checkpointing, four times as much for the gated one. `conditions`: of so
    many `images`, where the network takes any; each noise has those of one."""
    arch = arch_of(full)
    names = net.blocks(arch, settings.finer)
    scorer = Scorer(settings, len(full.steps) - 1, len(names), derive_seed(seed, "pruner")).to(net.device)
    optimiser = torch.optim.SGD(scorer.parameters(), settings.learning_rate, weight_decay=settings.weight_decay)
    first, spent = 0, 0
    if so_far is not None:
        tensors = dict(so_far.tensors)
        first, spent = int(tensors.pop("step")), so_far.macs
        scorer.load_state_dict(tensors)
    gamma = gammas(net, arch, settings.finer).to(net.device)
    for number in range(first, settings.steps):
        optimiser.param_groups[0]["lr"] = settings.learning_rate * (1 + math.cos(math.pi * number / settings.steps)) / 2
        noise, condition = _noise(settings, net, number, seed), None
        if conditions is not None:
            drawn = [derive_seed(seed, i, "label of the gates") % images for i in _places(settings, number)]
            condition = conditions(torch.tensor(drawn))
        gates = straight_through(scorer())
        kept = kept_share(net, full, names, gates, settings.finer)
        distances = _distances(settings, net, full, names, gates, noise, condition)
        optimiser.zero_grad()
        dissimilarity = 0.0
        if kept >= settings.floor:
            torch.autograd.backward(settings.sparsity * (gates * gamma).mean(), retain_graph=True)
        for distance in distances:
            # The local scope gives one for each step, whose graph is left at once; the gates' own graph stays.
            torch.autograd.backward(distance, retain_graph=True)
            dissimilarity += float(distance.detach())
        optimiser.step()
        runs = 3 if settings.scope == "step" or not settings.checkpointing else 4
        spent += len(noise) * sum(net.macs(Step(0, arch, (), step.guidance)) for step in full.steps) * (1 + runs)
        yield Progress("gates", number + 1, settings.steps, {"1 - SSIM": dissimilarity, "kept MACs": kept})
        if (number + 1) % EVERY == 0 and number + 1 < settings.steps:
            state = {name: tensor.detach().cpu().clone() for name, tensor in scorer.state_dict().items()}
            yield Snapshot({**state, "step": torch.tensor(number + 1)}, spent)
    with torch.no_grad():
        return scorer().softmax(-1)[..., 1].cpu().contiguous(), spent


def arch_of(full: Schedule) -> Any:
    """The one subnet of all its steps. Raises UserError where there are several."""
    found = {step.arch for step in full.steps}
    if len(found) > 1:
        raise UserError("gates are learned for one subnet on all steps; a space of experts has several")
    return found.pop()


def kept_share(net: LoadedSupernet, full: Schedule, names: Sequence[str], gates: torch.Tensor, finer: Finer) -> float:
    """Of the full trajectory's MACs, when blocks that nobody reads do not run either."""
    arch = arch_of(full)
    whole = [net.macs(Step(0, arch, (), step.guidance)) for step in full.steps]
    kept = whole[0]
    for step, row in zip(full.steps[1:], (gates.detach() > 0.5).tolist(), strict=True):
        wanted = [name for name, is_open in zip(names, row, strict=True) if is_open]
        kept += net.macs(Step(0, arch, tuple(net.reused(arch, wanted, finer)), step.guidance))
    return kept / sum(whole)


def _places(settings: Pruner, number: int) -> list[int]:
    """Which noises a gradient step has."""
    here = range(number * settings.batch, (number + 1) * settings.batch)
    return [i if settings.noises is None else i % settings.noises for i in here]


def _noise(settings: Pruner, net: LoadedSupernet, number: int, seed: int) -> torch.Tensor:
    """(batch, channels, height, width)."""
    rows = []
    for which in _places(settings, number):
        generator = torch.Generator().manual_seed(derive_seed(seed, which, "noise of the gates"))
        rows.append(torch.randn(net.state_shape, generator=generator))
    return torch.stack(rows).to(net.device)


def _distances(
    settings: Pruner,
    net: LoadedSupernet,
    full: Schedule,
    names: Sequence[str],
    gates: torch.Tensor,
    noise: torch.Tensor,
    condition: Condition | None = None,
) -> Iterator[torch.Tensor]:
    """1 - SSIM with the full network: of the final samples; or of each step's predicted images, one after another."""
    walk = _Walk(net, full, settings, condition)
    if settings.scope == "trajectory":
        with torch.no_grad():
            teacher = noise
            for number in range(len(full.steps)):
                teacher = walk.update(number, teacher, walk.call(number, teacher, {}, None)[0])
        x, cache = noise, None
        for number in range(len(full.steps)):
            opened = walk.opened(number, names, gates)
            x, cache = walk.gated(number, x, opened, cache)
        yield dissimilarity(x, teacher)
        return
    x, before = noise, None
    for number in range(len(full.steps)):
        with torch.no_grad():
            prediction, cache = walk.call(number, x, {}, None)
            image = walk.image(number, x, prediction)
        if opened := walk.opened(number, names, gates):
            mine, _ = walk.call(number, x, opened, before)
            yield dissimilarity(walk.image(number, x, mine), image) / (len(full.steps) - 1)
        x, before = walk.update(number, x, prediction), cache


class _Walk:
    """Deterministic DDIM (Song et al. 2021, eq. 12) over a schedule's timesteps with gated blocks."""

    def __init__(
        self, net: LoadedSupernet, full: Schedule, settings: Pruner, condition: Condition | None = None
    ) -> None:
        self._condition = condition
        self._gated: Gated = net.gated(arch_of(full))
        self._steps = full.steps
        self._clip = settings.clip and getattr(net, "in_pixels", True)
        abar = net.alphas_cumprod
        self._alphas = [*(float(abar[t]) for t in full.timesteps), float(getattr(net, "final_alpha", 1.0))]
        self._settings = settings

    def call(
        self, number: int, x: torch.Tensor, gates: Mapping[str, torch.Tensor], cache: Any
    ) -> tuple[torch.Tensor, Any]:
        step = self._steps[number]
        return self._gated(x, step.timestep, gates, cache, self._condition, step.guidance)

    def opened(self, number: int, names: Sequence[str], gates: torch.Tensor) -> dict[str, torch.Tensor]:
        """The gates of a step by name. None for one of which nothing can be reused: the first, and one that guides itself after one that
        does not, which kept outputs of half as many rows."""
        if not number:
            return {}
        before, here = (step.guidance for step in self._steps[number - 1 : number + 1])
        itself = here is not None and not here.arch
        return {} if itself and (before is None or before.arch) else _named(names, gates[number - 1])

    def image(self, number: int, x: torch.Tensor, prediction: torch.Tensor) -> torch.Tensor:
        alpha = self._alphas[number]
        image = (x - math.sqrt(1 - alpha) * prediction) / math.sqrt(alpha)
        return image.clamp(-1, 1) if self._clip else image

    def update(self, number: int, x: torch.Tensor, prediction: torch.Tensor) -> torch.Tensor:
        after = self._alphas[number + 1]
        made = math.sqrt(after) * self.image(number, x, prediction) + math.sqrt(1 - after) * prediction
        return made.to(x.dtype)  # the noise in what is nearly noise alone comes in float64

    def gated(
        self, number: int, x: torch.Tensor, gates: Mapping[str, torch.Tensor], cache: Any
    ) -> tuple[torch.Tensor, Any]:
        """The next state and cache."""

        def step(x: torch.Tensor, cache: Any) -> tuple[torch.Tensor, Any]:
            prediction, kept = self.call(number, x, gates, cache)
            return self.update(number, x, prediction), kept

        if not self._settings.checkpointing:
            return step(x, cache)
        found: tuple[torch.Tensor, Any] = checkpoint(step, x, cache, use_reentrant=False)
        return found


def dissimilarity(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """1 - SSIM (Wang et al. 2004) of states in [-1, 1], mean over the batch, on intensities from 0 to 1; its Gaussian window of at most 11 pixels covers no more
    than half an image."""
    from torchmetrics.functional.image import structural_similarity_index_measure as ssim  # which takes a second

    side = min(one.shape[-2:])
    sigma = min(1.5, max((side // 2 - 1) // 2, 1) / 3.5)
    similarity = ssim(one / 2 + 0.5, other / 2 + 0.5, sigma=sigma, data_range=1.0)
    assert isinstance(similarity, torch.Tensor)
    return 1 - similarity


def _named(names: Sequence[str], gates: torch.Tensor) -> dict[str, torch.Tensor]:
    return dict(zip(names, gates.unbind(), strict=True))
