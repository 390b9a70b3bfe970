"""Who reads whose output in a stock diffusers network: its blocks, their branches, and the layers of these. Stands alone: an exported folder
holds a copy of this file.

A UNet's blocks are d0, d1, ... going down (an output is the hidden state and all skips), mid, and u0, u1, ... going up. A block consists of
branches: d0.0 is its first residual block with its attention, d0.down its downsampling; upsampling belongs to the last branch of its
block. A branch of several layers has them as d0.0.resnet, d0.0.attention and u0.2.up. A transformer's blocks are b0, b1, ..., their branches b0.attn,
b0.text where it reads a text, and b0.mlp: what each adds to the hidden state, before the gate of the timestep. A name of a block stands for
all its branches, that of a branch for all its layers.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain, combinations
from typing import Any, ClassVar, Literal

Finer = bool | Literal["layers"]
"""How fine: blocks (False), their branches (True), or the layers of these."""

AROUND = "around"
"""What stands before, between and behind the layers, as a name among those that run: a transformer may run it alone."""


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


class Graph(ABC):
    """Layers in the order of the forward pass."""

    predicts_anew: ClassVar[bool] = False
    """Whether a call that reuses all layers predicts anew, by what stands around them; else its prediction is that of the step before."""

    @property
    @abstractmethod
    def layers(self) -> tuple[Layer, ...]: ...

    @abstractmethod
    def live(self, wanted: Collection[str], finer: Finer = False) -> frozenset[str]:
        """Layers that run where these blocks (or branches, or layers) are wanted: those of them whose output somebody reads who runs.
        Blocks, and branches where these are meant, run whole."""

    @abstractmethod
    def legal_sets(self, finer: Finer = False) -> Iterator[tuple[str, ...]]:
        """Every set of blocks (or branches, or layers) that may run while the others are reused: each is read by one that runs. The empty
        set and the whole network are among them."""

    @abstractmethod
    def settled(self, layer: Layer) -> tuple[tuple[str, frozenset[str]], ...]:
        """What may be mixed with what was kept once this layer has run, by the names that mean it, each once: itself, its branch, its block."""

    @property
    def blocks(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(layer.block for layer in self.layers))

    def names(self, finer: Finer = False) -> tuple[str, ...]:
        """Of the blocks, of their branches, or of the layers."""
        return tuple(dict.fromkeys(_name(layer, finer) for layer in self.layers))

    def expand(self, names: Collection[str]) -> frozenset[str]:
        """The layers that these names of blocks, branches and layers stand for; those that the network lacks are left out."""
        return _expanded(self, frozenset(names))

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

    def _grouped(self, finer: Finer) -> dict[str, list[Layer]]:
        found: dict[str, list[Layer]] = {}
        for layer in self.layers:
            found.setdefault(_name(layer, finer), []).append(layer)
        return found


@dataclass(frozen=True)
class UNetGraph(Graph):
    """`depths`: residual blocks of each level going down, outermost first; one more going up. `middle`: whether there is a middle block.
    `attends`: which blocks going down, and which going up, in their own order, have attention behind each residual block; empty for none."""

    depths: tuple[int, ...]
    middle: bool = True
    attends: tuple[tuple[bool, ...], tuple[bool, ...]] = ((), ())

    @property
    def layers(self) -> tuple[Layer, ...]:
        return _layers(self.depths, self.middle, self.attends)

    def live(self, wanted: Collection[str], finer: Finer = False) -> frozenset[str]:
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
        """n levels have 3 * 2^n - 1 sets of blocks, 47 for four."""
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

    def settled(self, layer: Layer) -> tuple[tuple[str, frozenset[str]], ...]:
        """A branch with its last layer, a block with its last branch."""
        place = self.layers.index(layer)
        following = self.layers[place + 1] if place + 1 < len(self.layers) else None
        over = [layer.name]
        if following is None or following.branch != layer.branch:
            over.append(layer.branch)
        if following is None or following.block != layer.block:
            over.append(layer.block)
        return tuple((name, self.outputs([name])) for name in dict.fromkeys(over))

    def _readers(self, finer: Finer) -> dict[str, set[str]]:
        producers = {layer.output: _name(layer, finer) for layer in self.layers} | {"in": "in"}
        found: dict[str, set[str]] = {name: set() for name in (*self.names(finer), "in")}
        for layer in self.layers:
            name = _name(layer, finer)
            for source in layer.reads:
                if producers[source] != name:
                    found[producers[source]].add(name)
        return found


@dataclass(frozen=True)
class TransformerGraph(Graph):
    """`blocks_in_all`: of the transformer. `text`: whether each reads one. What a branch adds stands beside what the others add, so that every
    set of branches is legal and nothing that runs is run in vain."""

    predicts_anew: ClassVar[bool] = True
    blocks_in_all: int
    text: bool = False

    @property
    def layers(self) -> tuple[Layer, ...]:
        return _branches(self.blocks_in_all, self.text)

    def live(self, wanted: Collection[str], finer: Finer = False) -> frozenset[str]:
        asked = self.expand(wanted)
        groups = self._grouped(finer).values()
        return frozenset(
            layer.name for members in groups for layer in members if {one.name for one in members} <= asked
        )

    def legal_sets(self, finer: Finer = False) -> Iterator[tuple[str, ...]]:
        """2^n of n blocks or branches."""
        names = self.names(finer)
        return chain.from_iterable(combinations(names, size) for size in range(len(names) + 1))

    def settled(self, layer: Layer) -> tuple[tuple[str, frozenset[str]], ...]:
        """Each branch by itself, whatever it belongs to: what it adds is added once."""
        return tuple((name, frozenset([layer.output])) for name in (layer.name, layer.block))


@dataclass(frozen=True)
class WholeGraph(Graph):
    """A network of which nothing is known but that it predicts: it runs, or the prediction of the step before is held."""

    @property
    def layers(self) -> tuple[Layer, ...]:
        return (Layer("net", ("in",), "net"),)

    def live(self, wanted: Collection[str], finer: Finer = False) -> frozenset[str]:
        return self.expand(wanted)

    def legal_sets(self, finer: Finer = False) -> Iterator[tuple[str, ...]]:
        yield from ((), ("net",))

    def settled(self, layer: Layer) -> tuple[tuple[str, frozenset[str]], ...]:
        return ((layer.name, frozenset([layer.output])),)


@lru_cache(maxsize=64)
def _branches(blocks: int, text: bool) -> tuple[Layer, ...]:
    parts = ("attn", "text", "mlp") if text else ("attn", "mlp")
    names = [f"b{block}.{part}" for block in range(blocks) for part in parts]
    return tuple(Layer(name, ("in", *names[:place]), name) for place, name in enumerate(names))


@lru_cache(maxsize=4096)
def _expanded(graph: Graph, names: frozenset[str]) -> frozenset[str]:
    return frozenset(layer.name for layer in graph.layers if layer.among(names))


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


STOCK = ("UNet2DModel", "UNet2DConditionModel", "DiTTransformer2DModel", "PixArtTransformer2DModel")
"""Classes whose layers are known."""


def is_whole(net: Any) -> bool:
    """Whether nothing is known of what the network consists of."""
    return not any(one.__name__ in STOCK for one in type(net).__mro__)


def graph_of(net: Any) -> Graph:
    """Of a stock UNet2DModel, UNet2DConditionModel, DiTTransformer2DModel or PixArtTransformer2DModel; of another network as a whole."""
    if is_whole(net):
        return WholeGraph()
    if hasattr(net, "transformer_blocks"):
        return TransformerGraph(len(net.transformer_blocks), net.transformer_blocks[0].attn2 is not None)
    attends = [
        tuple(bool(getattr(b, "attentions", None)) for b in blocks) for blocks in (net.down_blocks, net.up_blocks)
    ]
    depths = tuple(len(block.resnets) for block in net.down_blocks)
    return UNetGraph(depths, net.mid_block is not None, (attends[0], attends[1]))


def holds(net: Any, reuse: Collection[str]) -> bool:
    """Whether a call with these blocks reused runs nothing, and hands out the prediction of the step before."""
    graph = graph_of(net)
    return not graph.predicts_anew and len(graph.expand(reuse)) == len(graph.layers)
