"""Runs a stock diffusers network with some blocks' outputs taken from the step before (DeepCache, Ma et al. 2024; DiP-GO, Zhu et al.
2024). Needs torch alone: an exported folder holds a copy of this file, of `graph`, which says what blocks are called, and of `walks`.

What stands before, between and behind the blocks, such as input, output and the time embedding, always runs, unless no block of a UNet does: then
the prediction itself is the one before.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from .graph import graph_of, is_whole
from .walks import Condition, walk_of

PREDICTION = "prediction"
"""What a cache calls the network's output."""

Cache = Mapping[str, torch.Tensor]
"""Outputs by branch, and by layer within a branch."""


def as_noise(prediction: torch.Tensor, x: torch.Tensor, alpha: float, kind: str) -> torch.Tensor:
    """The noise in x = sqrt(alpha) image + sqrt(1 - alpha) noise by a prediction of this `prediction_type`. Further channels than x has, which
    say where the variance lies, stay behind it.

    In float32 at least, and in float64 where hardly any signal is left: the image follows from it as a small difference. Apple's GPUs have no float64.
    """
    if kind == "epsilon":
        return prediction
    if prediction.shape[1] > x.shape[1]:
        noise, said = as_noise(prediction[:, : x.shape[1]], x, alpha, kind), prediction[:, x.shape[1] :]
        return torch.cat([noise, said.to(noise)], dim=1)
    finer = torch.float64 if alpha < 1e-4 and x.device.type != "mps" else torch.float32
    x = x.to(torch.promote_types(x.dtype, finer))
    prediction = prediction.to(x)
    signal, rest = alpha**0.5, (1 - alpha) ** 0.5
    made: torch.Tensor = signal * prediction + rest * x if kind == "v_prediction" else (x - signal * prediction) / rest
    return made


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
    g * its own + (1 - g) * the cached one, here and in the returned cache, which holds all. A transformer's branch hands out what it would add
    before the timestep's gate, which is always that of the present step (Ma et al. 2024, Learning-to-Cache).

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
        # It may have been kept in half precision; a held prediction is in its own.
        return kept[name] if name == PREDICTION else kept[name].to(x.dtype)

    if len(reused) == len(graph.layers) and not graph.predicts_anew:
        prediction = output(PREDICTION)
    else:
        walk, weights = walk_of(net, x, t, condition, is_whole(net)), gates or {}
        for layer in graph.layers:
            if layer.name not in reused:
                outputs[layer.output] = walk.run(layer, output)
            for name, settled in graph.settled(layer) if weights else ():
                for mixed in settled if name in weights else ():
                    outputs[mixed] = _mix(outputs[mixed], kept, mixed, weights[name])
            walk.take(layer, output)
        prediction = answer(walk.predict(graph.layers[-1], output))
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
    channels: int | None = None,
) -> tuple[torch.Tensor, Cache | None]:
    """u + scale (c - u): the noise by classifier-free guidance (Ho & Salimans 2022), and what the next step may reuse.

    `condition` and `null`: a row for each of x. `call(x, cache, condition)`: the step's network, which predicts both at once, and so keeps
    outputs of twice as many rows; or c alone where `other` predicts u. `channels`: how many of x are guided, all by default; the others, and
    where the variance lies, are as c says.
    """
    if other is None:
        both = {name: torch.cat([condition[name], rows]) for name, rows in null.items()}
        noises, kept = call(torch.cat([x, x]), cache, both)
        told, plain = noises.chunk(2)
    else:
        told, kept = call(x, first_rows(cache, len(x)), condition)
        plain = other(x, null)
    own = channels or x.shape[1]
    noise = plain[:, :own] + scale * (told[:, :own] - plain[:, :own])
    if told.shape[1] > own:
        noise = torch.cat([noise, told[:, own:]], dim=1)
    return noise, {**kept, PREDICTION: noise} if kept and PREDICTION in kept else kept


def first_rows(cache: Cache | None, count: int) -> Cache | None:
    """Of what a guided step kept, that of the samples' own conditions."""
    return None if cache is None else {name: rows[:count] for name, rows in cache.items()}


def _mix(own: torch.Tensor, kept: Cache, name: str, gate: torch.Tensor) -> torch.Tensor:
    if name not in kept:
        raise ValueError(f"the output of {name} is gated, but none is kept from the step before")
    return gate * own + (1 - gate) * kept[name]
