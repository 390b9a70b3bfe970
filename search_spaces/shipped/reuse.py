"""Runs a stock diffusers UNet with some blocks' outputs taken from the step before (DeepCache, Ma et al. 2024; DiP-GO, Zhu et al.
2024). Needs torch alone: an exported folder holds a copy of this file.

Blocks are d0, d1, ... going down (an output is the hidden state and all skips), mid, and u0, u1, ... going up. A block consists of
branches: d0.0 is its first residual block with its attention, d0.down its downsampling; upsampling belongs to the last branch of its
block. A name of a block stands for all its branches. The input and output convolutions and the time embedding always run, unless
nothing does: then the prediction itself is the one before.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain, combinations
from typing import Any

import torch

PREDICTION = "prediction"
"""What a cache calls the network's output."""

Cache = Mapping[str, torch.Tensor]
"""Outputs by branch."""

Condition = Mapping[str, torch.Tensor]
"""The network's own keyword arguments, one row for each sample."""


@dataclass(frozen=True)
class Branch:
    """`reads`: the branches, or the input convolution "in", whose outputs it takes: the trunk first, then a skip."""

    name: str
    reads: tuple[str, ...]

    @property
    def block(self) -> str:
        return self.name.partition(".")[0]


@dataclass(frozen=True)
class Graph:
    """Who reads whose output, in the order of the forward pass. `depths`: residual blocks of each level going down, outermost
    first; one more going up. `middle`: whether there is a middle block."""

    depths: tuple[int, ...]
    middle: bool = True

    @property
    def branches(self) -> tuple[Branch, ...]:
        return _branches(self.depths, self.middle)

    @property
    def blocks(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(branch.block for branch in self.branches))

    def names(self, finer: bool = False) -> tuple[str, ...]:
        """Of the blocks, or of their branches."""
        return tuple(branch.name for branch in self.branches) if finer else self.blocks

    def expand(self, names: Collection[str]) -> frozenset[str]:
        """The branches that these names of blocks and branches stand for; those that the network lacks are left out."""
        return frozenset(branch.name for branch in self.branches if branch.name in names or branch.block in names)

    def collapse(self, branches: Collection[str]) -> tuple[str, ...]:
        """The shortest names for these branches, in order: a block where all of it is meant."""
        whole = {branch.block for branch in self.branches}
        whole -= {branch.block for branch in self.branches if branch.name not in branches}
        named = (b.block if b.block in whole else b.name for b in self.branches if b.name in branches)
        return tuple(dict.fromkeys(named))

    def live(self, wanted: Collection[str], finer: bool = False) -> frozenset[str]:
        """Branches that run where these blocks (or, where `finer`, these branches) are wanted: those of them whose output somebody
        reads who runs. Blocks run whole."""
        asked = self.expand(wanted)
        last = self.branches[-1].name
        running: set[str] = set()
        read: set[str] = {last}
        units: list[list[Branch]] = [[branch] for branch in self.branches] if finer else self._by_block()
        for unit in reversed(units):
            names = {branch.name for branch in unit}
            if names <= asked and names & read:
                running |= names
                read |= {name for branch in unit for name in branch.reads}
        return frozenset(running)

    def legal_sets(self, finer: bool = False) -> Iterator[tuple[str, ...]]:
        """Every set of blocks (or branches) that may run while the others are reused: each is read by one that runs. The empty set
        and the whole network are among them; n levels have 3 * 2^n - 1 sets of blocks, 47 for four."""
        readers = self._readers(finer)
        up = [name for name in self.names(finer) if name.startswith("u")]
        rest = [name for name in self.names(finer) if not name.startswith("u")]
        for start in range(len(up), -1, -1):
            running = set(up[start:])
            # An up block is read by the next one alone, so those that run are the last ones. A block going down that one of them
            # reads is free to run or not; the others only feed deeper ones, which only the middle's reader makes live.
            free = [name for name in rest if readers[name] & running]
            if start == 0 and "mid" in rest:
                free = rest
            for chosen in chain.from_iterable(combinations(free, size) for size in range(len(free) + 1)):
                if all(readers[name] & (running | {*chosen}) for name in chosen):
                    yield (*chosen, *up[start:])

    def _by_block(self) -> list[list[Branch]]:
        found: dict[str, list[Branch]] = {}
        for branch in self.branches:
            found.setdefault(branch.block, []).append(branch)
        return list(found.values())

    def _readers(self, finer: bool) -> dict[str, set[str]]:
        found: dict[str, set[str]] = {name: set() for name in (*self.names(finer), "in")}
        for branch in self.branches:
            name = branch.name if finer else branch.block
            for source in branch.reads:
                producer = source if finer else source.partition(".")[0]
                if producer != name:
                    found[producer].add(name)
        return found


@lru_cache(maxsize=256)
def _branches(depths: tuple[int, ...], middle: bool) -> tuple[Branch, ...]:
    found: list[Branch] = []
    trunk = "in"
    skips = [trunk]
    for level, depth in enumerate(depths):
        names = [f"d{level}.{j}" for j in range(depth)]
        if level + 1 < len(depths):
            names.append(f"d{level}.down")
        for name in names:
            found.append(Branch(name, (trunk,)))
            trunk = name
            skips.append(trunk)
    if middle:
        found.append(Branch("mid", (trunk,)))
        trunk = "mid"
    for i, depth in enumerate(reversed(depths)):
        for j in range(depth + 1):
            name = f"u{i}.{j}"
            found.append(Branch(name, (trunk, skips.pop())))
            trunk = name
    return tuple(found)


def as_noise(prediction: torch.Tensor, x: torch.Tensor, alpha: float, kind: str) -> torch.Tensor:
    """The noise in x = sqrt(alpha) image + sqrt(1 - alpha) noise by a prediction of this `prediction_type`. Further channels than x has, which
    say where the variance lies, stay behind it.

    In float64 where hardly any signal is left: the image follows from it as a small difference.
    """
    if kind == "epsilon":
        return prediction
    if prediction.shape[1] > x.shape[1]:
        noise, said = as_noise(prediction[:, : x.shape[1]], x, alpha, kind), prediction[:, x.shape[1] :]
        return torch.cat([noise, said.to(noise)], dim=1)
    x = x.double() if alpha < 1e-4 else x
    prediction = prediction.to(x)
    signal, rest = alpha**0.5, (1 - alpha) ** 0.5
    made: torch.Tensor = signal * prediction + rest * x if kind == "v_prediction" else (x - signal * prediction) / rest
    return made


def graph_of(net: Any) -> Graph:
    """Of a stock UNet2DModel or UNet2DConditionModel."""
    return Graph(tuple(len(block.resnets) for block in net.down_blocks), net.mid_block is not None)


def run(
    net: Any,
    x: torch.Tensor,
    t: torch.Tensor | int,
    reuse: Sequence[str] = (),
    keep: Sequence[str] = (),
    cache: Cache | None = None,
    condition: Condition | None = None,
    gates: Mapping[str, torch.Tensor] | None = None,
    answer: Callable[[torch.Tensor], torch.Tensor] = lambda output: output,
) -> tuple[torch.Tensor, Cache]:
    """The prediction at one step, and what the next one may reuse.

    x: (batch, channels, height, width). `reuse`: blocks or branches that do not run; their outputs are those of `cache`, which the step
    before returned. `keep`: whose outputs the returned cache holds, run now or handed on. `condition`: such as `class_labels`. `answer`: what the
    network's output becomes before it is returned, or kept to be held at another step, where it would mean something else.

    `gates`: for learning which blocks to reuse. Everything runs, and the output of a block (or branch) of weight g counts as
    g * its own + (1 - g) * the cached one, here and in the returned cache, which holds all.

    Raises ValueError where an output is reused of which nothing is kept.
    """
    graph = graph_of(net)
    kept = dict(cache or {})
    reused = graph.expand(reuse)
    last = graph.branches[-1].name
    wanted = {*graph.expand(keep)} if gates is None else {branch.name for branch in graph.branches}
    outputs: dict[str, torch.Tensor] = {}

    def output(name: str) -> torch.Tensor:
        if name in outputs:
            return outputs[name]
        if name not in kept:
            raise ValueError(f"the output of {name} is to be reused, but none is kept from the step before")
        return kept[name]

    if len(reused) == len(graph.branches):
        prediction = output(PREDICTION)
    else:
        embedding = _time_embedding(net, x, t, condition)
        outputs["in"] = net.conv_in(2 * x - 1.0 if net.config.center_input_sample else x)
        for branch in graph.branches:
            if branch.name not in reused:
                own = _run_branch(net, branch, [output(name) for name in branch.reads], embedding)
                outputs[branch.name] = _mixed(own, kept, branch.name, gates)
            if gates is not None and branch.block in gates and _ends_block(graph, branch):
                for name in graph.expand([branch.block]):
                    outputs[name] = _mix(outputs[name], kept, name, gates[branch.block])
        prediction = answer(_predict(net, output(last)))
    held = {name: outputs.get(name, kept.get(name)) for name in wanted}
    if last in wanted:
        held[PREDICTION] = prediction
    return prediction, {name: value for name, value in held.items() if value is not None}


def guided(
    call: Callable[[torch.Tensor, Cache | None, Condition], tuple[torch.Tensor, Cache | None]],
    other: Callable[[torch.Tensor, Condition], torch.Tensor] | None,
    x: torch.Tensor,
    scale: float,
    cache: Cache | None,
    condition: Condition,
    null: Condition,
) -> tuple[torch.Tensor, Cache | None]:
    """u + scale (c - u): the noise by classifier-free guidance (Ho & Salimans 2022), and what the next step may reuse.

    `condition` and `null`: a row for each of x. `call(x, cache, condition)`: the step's network, which predicts both at once, and so keeps
    outputs of twice as many rows; or c alone where `other` predicts u. Where the variance lies is as c says.
    """
    if other is None:
        both = {name: torch.cat([rows, null[name]]) for name, rows in condition.items()}
        noises, kept = call(torch.cat([x, x]), cache, both)
        told, plain = noises.chunk(2)
    else:
        told, kept = call(x, first_rows(cache, len(x)), condition)
        plain = other(x, null)
    own = x.shape[1]
    noise = plain[:, :own] + scale * (told[:, :own] - plain[:, :own])
    if told.shape[1] > own:
        noise = torch.cat([noise, told[:, own:]], dim=1)
    return noise, {**kept, PREDICTION: noise} if kept and PREDICTION in kept else kept


def holds(net: Any, reuse: Collection[str]) -> bool:
    """Whether a call with these blocks reused runs nothing, and hands out the prediction of the step before."""
    graph = graph_of(net)
    return len(graph.expand(reuse)) == len(graph.branches)


def first_rows(cache: Cache | None, count: int) -> Cache | None:
    """Of what a guided step kept, that of the samples' own conditions."""
    return None if cache is None else {name: rows[:count] for name, rows in cache.items()}


def _run_branch(net: Any, branch: Branch, inputs: Sequence[torch.Tensor], embedding: torch.Tensor) -> torch.Tensor:
    hidden = inputs[0]
    if branch.name == "mid":
        return net.mid_block(hidden, embedding)  # type: ignore[no-any-return]
    side, level, place = branch.name[0], int(branch.block[1:]), branch.name.partition(".")[2]
    block = (net.down_blocks if side == "d" else net.up_blocks)[level]
    if place == "down":
        return _resample(block.downsamplers, hidden, embedding)
    if side == "u":
        hidden = torch.cat([hidden, inputs[1]], dim=1)
    hidden = block.resnets[int(place)](hidden, embedding)
    if getattr(block, "attentions", None) is not None:
        hidden = block.attentions[int(place)](hidden)
    if side == "u" and int(place) + 1 == len(block.resnets) and block.upsamplers is not None:
        hidden = _resample(block.upsamplers, hidden, embedding)
    return hidden


def _resample(modules: Any, hidden: torch.Tensor, embedding: torch.Tensor) -> torch.Tensor:
    for module in modules:
        # A residual block that samples takes the timestep in, a convolution does not.
        hidden = module(hidden, temb=embedding) if hasattr(module, "time_emb_proj") else module(hidden)
    return hidden


def _time_embedding(net: Any, x: torch.Tensor, t: torch.Tensor | int, condition: Condition | None) -> torch.Tensor:
    t = torch.as_tensor(t, device=x.device).reshape(-1)
    t = t * torch.ones(len(x), dtype=t.dtype, device=t.device)
    embedding: torch.Tensor = net.time_embedding(net.time_proj(t).to(dtype=net.dtype))
    if net.class_embedding is not None:
        if condition is None:
            raise ValueError("the network needs class_labels as its condition")
        labels = condition["class_labels"]
        labels = net.time_proj(labels).to(dtype=net.dtype) if net.config.class_embed_type == "timestep" else labels
        embedding = embedding + net.class_embedding(labels).to(dtype=net.dtype)
    return embedding


def _predict(net: Any, hidden: torch.Tensor) -> torch.Tensor:
    prediction: torch.Tensor = net.conv_out(net.conv_act(net.conv_norm_out(hidden)))
    return prediction


def _ends_block(graph: Graph, branch: Branch) -> bool:
    following = graph.branches[graph.branches.index(branch) + 1 :]
    return not following or following[0].block != branch.block


def _mixed(own: torch.Tensor, kept: Cache, name: str, gates: Mapping[str, torch.Tensor] | None) -> torch.Tensor:
    """Gates of branches mix at once; a block's own mix when all of it has run."""
    if gates is None or "." not in name or name not in gates:
        return own
    return _mix(own, kept, name, gates[name])


def _mix(own: torch.Tensor, kept: Cache, name: str, gate: torch.Tensor) -> torch.Tensor:
    if name not in kept:
        raise ValueError(f"the output of {name} is gated, but none is kept from the step before")
    return gate * own + (1 - gate) * kept[name]
