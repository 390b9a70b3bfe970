"""Schedules of reuse as other projects release or name them, as patterns of one interval that is the whole trajectory, and written for them where they can say it.

Pickled files are not read: `router.pt` of Learning-to-Cache becomes safetensors, once, where its code runs:
`save_file({name: value for name, value in torch.load("router.pt")["routers"].items()}, "router.safetensors")`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file

from nas.base.files import first_line
from nas.contracts import Schedule, UserError
from search_spaces.patterns import ALL, Every, Listed
from search_spaces.shipped.graph import AROUND, Graph, UNetGraph

PARTS = ("attn", "mlp")
"""Of a block of DiT."""

DIFFUSERS = {"attn": "attn1", "text": "attn2", "mlp": "ff"}
"""What the parts of a block are called in diffusers' modules, which SmoothCache wraps there."""

LAYERS = 3
"""Of a level, as DeepCache numbers branches: two residual blocks and the downsampling."""


def deepcache(interval: int, branch: int, graph: Graph) -> Every:
    """What `DeepCacheSDHelper.set_params(cache_interval, cache_branch_id)` has a UNet compute (Ma et al. 2024): everything at each `interval`-th step, and
    between them the levels outside of number branch // 3 and, of that level, as many layers on the way down as the remainder says and one more on the way
    up. Raises UserError for a transformer, and for a branch that the network does not reach."""
    if not isinstance(graph, UNetGraph):
        raise UserError(
            "DeepCache's branches are those of a UNet, and the network is a transformer; use Every or Listed"
        )
    level, layer = divmod(branch, LAYERS)
    if interval < 1 or not 0 <= level < len(graph.depths):
        raise UserError(
            f"DeepCache's interval {interval} and branch {branch}: give an interval from 1 and a branch from 0 to {LAYERS * len(graph.depths) - 1}"
        )
    depth, last = graph.depths[level], len(graph.depths) - 1
    down = [*(f"d{level}.{n}" for n in range(depth)), f"d{level}.down"][:layer]
    up = [f"u{last - level}.{depth - n}" for n in range(min(layer, depth) + 1)]
    outside = [name for n in range(level) for name in (f"d{n}", f"u{last - n}")]
    return Every(interval, graph.collapse(graph.live([*outside, *down, *up], finer=True), finer=True))


def learning_to_cache(path: str | Path, steps: int, threshold: float = 0.1) -> Listed:
    """The router of Learning-to-Cache (Ma et al. 2024) for so many steps: a tensor "I.prob" of logits for each, step 0 the cleanest one, of attention
    and feed-forward layers of each block in turn. At steps of even I those run whose sigmoid is above the threshold; all run at the others.

    Raises UserError where the file is not that.
    """
    path = Path(path)
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"{path} cannot be read as safetensors ({first_line(error)}); save the router's tensors as such"
        ) from error
    if {*tensors} != {f"{number}.prob" for number in range(steps)} or len({row.shape for row in tensors.values()}) != 1:
        raise UserError(
            f"{path} holds {len(tensors)} tensors, not 0.prob to {steps - 1}.prob of one size; give the steps that it was learned for"
        )
    rows = [tensors[f"{number}.prob"].double().ravel() for number in range(steps)]
    if len(rows[0]) % 2 or not all(row.isfinite().all() for row in rows):
        raise UserError(
            f"{path}: {len(rows[0])} logits of a step must be finite numbers, two for each block; save the router anew"
        )
    found = [ALL if number % 2 else _running((row.sigmoid() > threshold).tolist()) for number, row in enumerate(rows)]
    # The file begins at the cleanest step, a trajectory at the noisiest.
    return Listed(f"Learning-to-Cache at {threshold:g}", tuple(found[::-1]), len(rows[0]))


def _whole(value: float) -> int:
    """Raises ValueError for a share, such as a gate that was learned and not rounded."""
    if value != int(value):
        raise ValueError(f"{value} is neither 0 nor 1; round what was learned by its own threshold")
    return int(value)


def smoothcache(path: str | Path, blocks: int, parts: Sequence[str] = PARTS) -> Listed:
    """A schedule of SmoothCache: {"attn": [1, 0, ...], "mlp": [...]}, for each step, noisy to clean, whether these run in all of so many blocks, or by "attn-0",
    "mlp-0" and so on in each; or named as in diffusers' blocks, "attn1", "attn2" and "ff", of which those that are not listed always run. `parts`: of a block,
    in their order; ("attn", "text", "mlp") of a PixArt. Raises UserError where the file is not that."""
    path = Path(path)
    try:
        told = {key: [_whole(value) for value in row] for key, row in json.loads(path.read_text()).items()}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is no schedule of lists ({first_line(error)}); check the file") from error
    steps = max(map(len, told.values()), default=0)
    theirs = bool({key.partition("-")[0] for key in told} & {*DIFFUSERS.values()})
    every = {DIFFUSERS[part]: [1] * steps for part in parts} if theirs else {}
    names = [DIFFUSERS[part] if theirs else part for part in parts]
    keys = [[f"{name}-{block}", name] for block in range(blocks) for name in names]
    if strange := {*told} - {key for pair in keys for key in pair}:
        raise UserError(
            f"{path} holds {min(strange)}, and {blocks} blocks have {', '.join(names)} each; give the network that it is for"
        )
    rows = [told.get(own) or told.get(name) or every.get(name, []) for own, name in keys]
    if not steps or any(len(row) != steps for row in rows):
        raise UserError(
            f"{path} must hold {' and '.join(names)}, or each with -0, -1 and so on, of one number for each step"
        )
    if any(value not in (0, 1) for row in rows for value in row) or not all(row[0] for row in rows):
        raise UserError(f"{path}: its lists must be of zeros and ones, and begin with ones")
    each = [_running(bits, parts) for bits in zip(*rows, strict=True)]
    return Listed(f"SmoothCache {path.stem}", tuple(each), blocks * len(parts))


def cache_dit(path: str | Path, blocks: int, parts: Sequence[str] = PARTS) -> Listed:
    """A configuration of cache-dit with a static `steps_computation_mask`: at steps of 1 all of so many blocks run, at the others the first
    `Fn_compute_blocks` and the last `Bn_compute_blocks`. Raises UserError where the file is not that, or decides as it runs."""
    path = Path(path)
    try:
        told = yaml.safe_load(path.read_text())
        told = told.get("cache_config", told)
        mask = [_whole(value) for value in told["steps_computation_mask"]]
        first, last = int(told.get("Fn_compute_blocks", 8)), int(told.get("Bn_compute_blocks", 0))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, yaml.YAMLError) as error:
        raise UserError(
            f"{path} is no configuration with a steps_computation_mask ({first_line(error)}); check the file"
        ) from error
    if told.get("steps_computation_policy", "dynamic") != "static":
        raise UserError(
            f"{path}: its policy is not static, so that what runs depends on the sample; say steps_computation_policy: static"
        )
    if not mask or any(value not in (0, 1) for value in mask) or not mask[0]:
        raise UserError(f"{path}: steps_computation_mask must be of zeros and ones, and begin with 1")
    outer = [int(block < first or block >= blocks - last) for block in range(blocks)]
    between = _running([bit for bit in outer for _ in parts], parts)
    return Listed(f"cache-dit {path.stem}", tuple(ALL if bit else between for bit in mask), blocks * len(parts))


def gate_table(path: str | Path, graph: Graph) -> Listed:
    """A table of gates, JSON [[1, 0, ...], ...]: for each step, noisy to clean, whether each of the network's blocks runs, in the order of the forward pass
    (DiP-GO); or each of its branches, where there are as many columns. Raises UserError where the file is not that."""
    path = Path(path)
    try:
        rows = [[_whole(value) for value in row] for row in json.loads(path.read_text())]
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{path} is no table of zeros and ones ({first_line(error)}); check the file") from error
    columns = {len(row) for row in rows}
    finer = columns == {len(graph.names(True))}
    names = graph.names(finer)
    if columns != {len(names)} or any(value not in (0, 1) for row in rows for value in row):
        raise UserError(
            f"{path}: each row must hold {len(graph.blocks)} zeros and ones, one for each of {', '.join(graph.blocks)}, or {len(graph.names(True))} for their branches"
        )
    nothing = (AROUND,) if graph.predicts_anew else ()
    each = [tuple(name for name, bit in zip(names, row, strict=True) if bit) for row in rows]
    return Listed(
        f"gates {path.stem}", tuple(ALL if all(row) else one or nothing for row, one in zip(rows, each, strict=True))
    )


def cache_dit_yaml(schedule: Schedule, graph: Graph, timesteps: Sequence[int]) -> str:
    """The schedule as a configuration of cache-dit, `cache_dit.load_configs(file)`. It knows steps that compute everything and steps that compute the first
    n blocks, at least one; where none run here, the first runs there. `timesteps`: where the scheduler puts as many. Raises
    UserError for a schedule of other steps or timesteps, of guidance that comes and goes, or of a UNet."""
    _check_transformer(schedule, graph, timesteps, "cache-dit's mask")
    running = [graph.expand(graph.blocks) - graph.expand(step.reuse) for step in schedule.steps]
    others = {one for one, step in zip(running, schedule.steps, strict=True) if step.reuse}
    if len(others) > 1:
        raise UserError(
            f"cache-dit's mask says one kind of step that does not compute everything, the schedule has {len(others)}; use schedule.json"
        )
    runs = others.pop() if others else graph.expand(graph.blocks[:1])
    first = next((n for n in range(len(graph.blocks)) if runs == graph.expand(graph.blocks[:n])), None)
    if first is None:
        raise UserError(
            f"cache-dit's mask lets the first blocks run, the schedule {', '.join(graph.collapse(runs))} between whole steps; use schedule.json"
        )
    mask = [0 if step.reuse else 1 for step in schedule.steps]
    told = {
        "Fn_compute_blocks": max(1, first),
        "Bn_compute_blocks": 0,
        "num_inference_steps": len(mask),
        "steps_computation_mask": mask,
        "steps_computation_policy": "static",
    }
    note = "" if first else ", but for the first block, which cache-dit always computes"
    head = f"# {sum(mask)} of {len(mask)} steps compute everything, the others the first {first} blocks{note}.\n"
    return head + str(yaml.safe_dump({"cache_config": told}, default_flow_style=None, sort_keys=False))


def smoothcache_json(schedule: Schedule, graph: Graph, timesteps: Sequence[int]) -> str:
    """The schedule as SmoothCache has it for diffusers' blocks, a list for each part of all blocks, or of each block where these differ. `timesteps`: where the
    scheduler puts as many. Raises UserError for a schedule of other timesteps, of guidance that comes and goes, or of a UNet."""
    _check_transformer(schedule, graph, timesteps, "SmoothCache's lists")
    reused = [graph.expand(step.reuse) for step in schedule.steps]
    lists: dict[str, list[int]] = {}
    for part in dict.fromkeys(name.partition(".")[2] for name in graph.names(True)):
        each = [[int(f"{block}.{part}" not in names) for names in reused] for block in graph.blocks]
        if all(row == each[0] for row in each):
            lists[DIFFUSERS[part]] = each[0]
        else:
            lists |= {f"{DIFFUSERS[part]}-{block}": row for block, row in enumerate(each)}
    return json.dumps(lists) + "\n"


def _check_transformer(schedule: Schedule, graph: Graph, timesteps: Sequence[int], what: str) -> None:
    if not graph.predicts_anew:
        raise UserError(f"{what} can say a transformer's schedule, and the network is a UNet; use schedule.json")
    if tuple(schedule.timesteps) != tuple(timesteps):
        mine, theirs = (", ".join(map(str, each)) for each in (schedule.timesteps, timesteps))
        raise UserError(
            f"{what} counts steps, which the pipeline's scheduler puts at the timesteps {theirs}, and the schedule's are at {mine}; use schedule.json"
        )
    if len({step.guidance for step in schedule.steps}) > 1:
        raise UserError(f"{what} cannot say guidance that comes and goes, as the schedule's does; use schedule.json")


def _running(bits: Sequence[int], parts: Sequence[str] = PARTS) -> tuple[str, ...]:
    """Branches of the blocks in turn that run."""
    found = tuple(f"b{n // len(parts)}.{parts[n % len(parts)]}" for n, runs in enumerate(bits) if runs)
    return (ALL if len(found) == len(bits) else found) or (AROUND,)
