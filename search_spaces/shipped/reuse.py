"""Runs a stock diffusers UNet with some blocks' outputs taken from the step before (DeepCache, Ma et al. 2024; DiP-GO, Zhu et al.
2024). Needs torch alone: an exported folder holds a copy of this file.

Blocks are d0, d1, ... going down (an output is the hidden state and all skips), mid, and u0, u1, ... going up. A block consists of
branches: d0.0 is its first residual block with its attention, d0.down its downsampling; upsampling belongs to the last branch of its
block. A branch of several layers has them as d0.0.resnet, d0.0.attention and u0.2.up. A name of a block stands for all its branches, that of
a branch for all its layers. The input and output convolutions and the time embedding always run, unless nothing does: then the prediction
itself is the one before.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain, combinations
from typing import Any, Literal

import torch

PREDICTION = "prediction"
"""What a cache calls the network's output."""

Cache = Mapping[str, torch.Tensor]
"""Outputs by branch, and by layer within a branch."""

Condition = Mapping[str, torch.Tensor]
"""The network's own keyword arguments, one row for each sample. Those whose names begin with "negative_" are what takes their place where a
guided step predicts without them."""

Finer = bool | Literal["layers"]
"""How fine: blocks (False), their branches (True), or the layers of these."""


@dataclass(frozen=True)
class Layer:
    """`reads`: the outputs, or that of the input convolution "in", that it takes: the trunk first, then a skip. `output`: what its own is called,
    as its branch where it is the last one of it."""

    name: str
    reads: tuple[str, ...]
    output: str

    @property
    def block(self) -> str:
        return self.name.partition(".")[0]

    @property
    def branch(self) -> str:
        return ".".join(self.name.split(".")[:2])

    def among(self, names: Collection[str]) -> bool:
        """Whether one of the names means it, or all of what it belongs to."""
        return self.name in names or self.branch in names or self.block in names


@dataclass(frozen=True)
class Graph:
    """Who reads whose output, in the order of the forward pass. `depths`: residual blocks of each level going down, outermost
    first; one more going up. `middle`: whether there is a middle block. `attends`: which blocks going down, and which going up, in their own
    order, have attention behind each residual block; empty for none."""

    depths: tuple[int, ...]
    middle: bool = True
    attends: tuple[tuple[bool, ...], tuple[bool, ...]] = ((), ())

    @property
    def layers(self) -> tuple[Layer, ...]:
        return _layers(self.depths, self.middle, self.attends)

    @property
    def blocks(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(layer.block for layer in self.layers))

    def names(self, finer: Finer = False) -> tuple[str, ...]:
        """Of the blocks, of their branches, or of the layers."""
        return tuple(dict.fromkeys(_name(layer, finer) for layer in self.layers))

    def expand(self, names: Collection[str]) -> frozenset[str]:
        """The layers that these names of blocks, branches and layers stand for; those that the network lacks are left out."""
        return frozenset(layer.name for layer in self.layers if layer.among(names))

    def outputs(self, names: Collection[str]) -> frozenset[str]:
        """What is kept of blocks, branches and layers of these names: of whole branches their outputs alone."""
        return frozenset(
            layer.output
            for layer in self.layers
            if layer.name in names or (layer.output == layer.branch and layer.among(names))
        )

    def collapse(self, layers: Collection[str], finer: Finer = False) -> tuple[str, ...]:
        """The shortest names for these layers, in order: a block or a branch where all of it is meant. With `finer="layers"` their own, so
        that the outputs within a branch are kept too."""
        if finer == "layers":
            return tuple(layer.name for layer in self.layers if layer.name in layers)
        cut = {name for one in self.layers if one.name not in layers for name in (one.block, one.branch)}
        named = (
            next(name for name in (one.block, one.branch, one.name) if name not in cut or name == one.name)
            for one in self.layers
            if one.name in layers
        )
        return tuple(dict.fromkeys(named))

    def live(self, wanted: Collection[str], finer: Finer = False) -> frozenset[str]:
        """Layers that run where these blocks (or branches, or layers) are wanted: those of them whose output somebody reads who runs.
        Blocks, and branches where these are meant, run whole."""
        asked = self.expand(wanted)
        running: set[str] = set()
        read: set[str] = {self.layers[-1].output}
        for members in reversed(self._grouped(finer).values()):
            names = {layer.name for layer in members}
            if names <= asked and {layer.output for layer in members} & read:
                running |= names
                read |= {name for layer in members for name in layer.reads}
        return frozenset(running)

    def legal_sets(self, finer: Finer = False) -> Iterator[tuple[str, ...]]:
        """Every set of blocks (or branches, or layers) that may run while the others are reused: each is read by one that runs. The empty
        set and the whole network are among them; n levels have 3 * 2^n - 1 sets of blocks, 47 for four."""
        readers = self._readers(finer)
        up = [name for name in self.names(finer) if name.startswith("u")]
        rest = [name for name in self.names(finer) if not name.startswith("u")]
        for start in range(len(up), -1, -1):
            running = set(up[start:])
            # What goes up is read by the next alone, so those that run are the last ones. What goes down and is read by one of them, or by
            # one that is free itself, is free to run or not; the others only feed deeper ones, which only the middle's reader makes live.
            free = rest if start == 0 and "mid" in rest else self._fed(rest, running, readers)
            for chosen in chain.from_iterable(combinations(free, size) for size in range(len(free) + 1)):
                if all(readers[name] & (running | {*chosen}) for name in chosen):
                    yield (*chosen, *up[start:])

    def _fed(self, names: Iterable[str], running: Collection[str], readers: Mapping[str, set[str]]) -> list[str]:
        found: list[str] = []
        for name in reversed([*names]):
            if readers[name] & {*running, *found}:
                found.append(name)
        return found[::-1]

    def _grouped(self, finer: Finer) -> dict[str, list[Layer]]:
        found: dict[str, list[Layer]] = {}
        for layer in self.layers:
            found.setdefault(_name(layer, finer), []).append(layer)
        return found

    def _readers(self, finer: Finer) -> dict[str, set[str]]:
        producers = {layer.output: _name(layer, finer) for layer in self.layers} | {"in": "in"}
        found: dict[str, set[str]] = {name: set() for name in (*self.names(finer), "in")}
        for layer in self.layers:
            name = _name(layer, finer)
            for source in layer.reads:
                if producers[source] != name:
                    found[producers[source]].add(name)
        return found


def _name(layer: Layer, finer: Finer) -> str:
    if finer == "layers":
        return layer.name
    return layer.branch if finer else layer.block


@lru_cache(maxsize=256)
def _layers(
    depths: tuple[int, ...], middle: bool, attends: tuple[tuple[bool, ...], tuple[bool, ...]]
) -> tuple[Layer, ...]:
    found: list[Layer] = []
    trunk = "in"
    skips = [trunk]

    def add(branch: str, parts: Sequence[str], reads: tuple[str, ...]) -> None:
        for number, part in enumerate(parts):
            name = f"{branch}.{part}" if len(parts) > 1 else branch
            output = branch if number + 1 == len(parts) else name
            found.append(Layer(name, reads, output))
            reads = (output,)

    for level, depth in enumerate(depths):
        for j in range(depth):
            add(f"d{level}.{j}", ("resnet", "attention") if any(attends[0][level : level + 1]) else ("",), (trunk,))
            trunk = f"d{level}.{j}"
            skips.append(trunk)
        if level + 1 < len(depths):
            add(f"d{level}.down", ("",), (trunk,))
            trunk = f"d{level}.down"
            skips.append(trunk)
    if middle:
        add("mid", ("",), (trunk,))
        trunk = "mid"
    for i, depth in enumerate(reversed(depths)):
        for j in range(depth + 1):
            parts = ["resnet", *(["attention"] if any(attends[1][i : i + 1]) else [])]
            parts += ["up"] if j == depth and i + 1 < len(depths) else []
            add(f"u{i}.{j}", parts, (trunk, skips.pop()))
            trunk = f"u{i}.{j}"
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


ADDED = ("text_embeds", "time_ids")
"""Conditions that Stable Diffusion XL adds to the timestep's embedding."""


def arguments(net: Any, x: torch.Tensor, t: torch.Tensor | int, condition: Condition | None) -> tuple[Any, ...]:
    """Positional arguments of a call of a stock UNet2DModel or UNet2DConditionModel."""
    told = condition or {}
    if "encoder_hid_dim" not in net.config:
        return x, t, told.get("class_labels")
    added = {name: told[name] for name in ADDED if name in told} or None
    return x, t, told.get("encoder_hidden_states"), told.get("class_labels"), None, None, None, added


def graph_of(net: Any) -> Graph:
    """Of a stock UNet2DModel or UNet2DConditionModel."""
    attends = [
        tuple(bool(getattr(b, "attentions", None)) for b in blocks) for blocks in (net.down_blocks, net.up_blocks)
    ]
    depths = tuple(len(block.resnets) for block in net.down_blocks)
    return Graph(depths, net.mid_block is not None, (attends[0], attends[1]))


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

    x: (batch, channels, height, width). `reuse`: blocks, branches or layers that do not run; their outputs are those of `cache`, which the step
    before returned. `keep`: whose outputs the returned cache holds, run now or handed on. `condition`: such as `class_labels`. `answer`: what the
    network's output becomes before it is returned, or kept to be held at another step, where it would mean something else.

    `gates`: for learning which blocks to reuse. Everything runs, and the output of a block (or branch, or layer) of weight g counts as
    g * its own + (1 - g) * the cached one, here and in the returned cache, which holds all.

    Raises ValueError where an output is reused of which nothing is kept.
    """
    graph = graph_of(net)
    kept = dict(cache or {})
    reused = graph.expand(reuse)
    last = graph.layers[-1].output
    # What the first step of a gated trajectory keeps may be asked for by any gate.
    inside = not gates or any(name.count(".") > 1 for name in gates)
    wanted = graph.outputs(keep if gates is None else graph.names("layers" if inside else True))
    outputs: dict[str, torch.Tensor] = {}

    def output(name: str) -> torch.Tensor:
        if name in outputs:
            return outputs[name]
        if name not in kept:
            raise ValueError(f"the output of {name} is to be reused, but none is kept from the step before")
        return kept[name]

    if len(reused) == len(graph.layers):
        prediction = output(PREDICTION)
    else:
        embedding = _embedding(net, x, t, condition)
        outputs["in"] = net.conv_in(2 * x - 1.0 if net.config.center_input_sample else x)
        for place, layer in enumerate(graph.layers):
            if layer.name not in reused:
                outputs[layer.output] = _run(net, layer, [output(name) for name in layer.reads], embedding, condition)
            if gates is not None:
                following = graph.layers[place + 1] if place + 1 < len(graph.layers) else None
                for name in _ended(layer, following):
                    for mixed in graph.outputs([name]) if name in gates else ():
                        outputs[mixed] = _mix(outputs[mixed], kept, mixed, gates[name])
        prediction = answer(_predict(net, output(last)))
    held = {name: outputs.get(name, kept.get(name)) for name in wanted}
    if last in wanted:
        held[PREDICTION] = prediction
    return prediction, {name: value for name, value in held.items() if value is not None}


NEGATIVE = "negative_"


def null_of(condition: Condition, null_label: int | None) -> Condition:
    """What takes a condition's place where a guided step predicts without it, in as many rows: what stands in it as negative, for labels that
    of no class, and all else as it is."""
    found = {}
    for name, rows in condition.items():
        if name == "class_labels" and null_label is not None:
            found[name] = torch.full_like(rows, null_label)
        elif not name.startswith(NEGATIVE):
            found[name] = condition.get(NEGATIVE + name, rows)
    return found


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
        both = {name: torch.cat([condition[name], rows]) for name, rows in null.items()}
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
    return len(graph.expand(reuse)) == len(graph.layers)


def first_rows(cache: Cache | None, count: int) -> Cache | None:
    """Of what a guided step kept, that of the samples' own conditions."""
    return None if cache is None else {name: rows[:count] for name, rows in cache.items()}


def _run(
    net: Any, layer: Layer, inputs: Sequence[torch.Tensor], embedding: torch.Tensor, condition: Condition | None
) -> torch.Tensor:
    hidden = inputs[0]
    if layer.name == "mid":
        told = _text(net.mid_block, condition) if getattr(net.mid_block, "has_cross_attention", False) else {}
        return net.mid_block(hidden, embedding, **told)  # type: ignore[no-any-return]
    level, place, *part = layer.name[1:].split(".")
    up = layer.name.startswith("u")
    block = (net.up_blocks if up else net.down_blocks)[int(level)]
    if place == "down":
        return _resample(block.downsamplers, hidden, embedding)
    if part == ["up"]:
        return _resample(block.upsamplers, hidden, embedding)
    if part == ["attention"]:
        attention = block.attentions[int(place)]
        if getattr(block, "has_cross_attention", False):
            return attention(hidden, **_text(attention, condition), return_dict=False)[0]  # type: ignore[no-any-return]
        return attention(hidden)  # type: ignore[no-any-return]
    if up:
        hidden = torch.cat([hidden, inputs[1]], dim=1)
    return block.resnets[int(place)](hidden, embedding)  # type: ignore[no-any-return]


def _text(module: Any, condition: Condition | None) -> dict[str, Any]:
    if condition is None or "encoder_hidden_states" not in condition:
        raise ValueError("the network needs encoder_hidden_states as its condition")
    return {"encoder_hidden_states": condition["encoder_hidden_states"].to(next(module.parameters()).dtype)}


def _resample(modules: Any, hidden: torch.Tensor, embedding: torch.Tensor) -> torch.Tensor:
    for module in modules:
        # A residual block that samples takes the timestep in, a convolution does not.
        hidden = module(hidden, temb=embedding) if hasattr(module, "time_emb_proj") else module(hidden)
    return hidden


def _embedding(net: Any, x: torch.Tensor, t: torch.Tensor | int, condition: Condition | None) -> torch.Tensor:
    """Of the timestep, and of whatever else is added to it."""
    t = torch.as_tensor(t, device=x.device).reshape(-1)
    t = t * torch.ones(len(x), dtype=t.dtype, device=t.device)
    embedding: torch.Tensor = net.time_embedding(net.time_proj(t).to(dtype=net.dtype))
    if net.class_embedding is not None:
        if condition is None or "class_labels" not in condition:
            raise ValueError("the network needs class_labels as its condition")
        labels = condition["class_labels"]
        labels = net.time_proj(labels).to(dtype=net.dtype) if net.config.class_embed_type == "timestep" else labels
        embedding = embedding + net.class_embedding(labels).to(dtype=net.dtype)
    if getattr(net.config, "addition_embed_type", None) == "text_time":
        if condition is None or not {"text_embeds", "time_ids"} <= condition.keys():
            raise ValueError("the network needs text_embeds and time_ids as its condition")
        sizes = net.add_time_proj(condition["time_ids"].flatten()).reshape(len(x), -1)
        added = torch.cat([condition["text_embeds"], sizes.to(condition["text_embeds"])], dim=-1)
        embedding = embedding + net.add_embedding(added.to(embedding.dtype))
    return embedding


def _predict(net: Any, hidden: torch.Tensor) -> torch.Tensor:
    prediction: torch.Tensor = net.conv_out(net.conv_act(net.conv_norm_out(hidden)))
    return prediction


def _ended(layer: Layer, following: Layer | None) -> tuple[str, ...]:
    """What is over with this layer: itself, its branch, its block; each once."""
    over = [layer.name]
    if following is None or following.branch != layer.branch:
        over.append(layer.branch)
    if following is None or following.block != layer.block:
        over.append(layer.block)
    return tuple(dict.fromkeys(over))


def _mix(own: torch.Tensor, kept: Cache, name: str, gate: torch.Tensor) -> torch.Tensor:
    if name not in kept:
        raise ValueError(f"the output of {name} is gated, but none is kept from the step before")
    return gate * own + (1 - gate) * kept[name]
