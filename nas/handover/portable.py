"""A schedule as one JSON file and one module that runs it on the pipeline that somebody has already, without this project.

The file, version 1 (docs/tune.md says more): "network", its class and branches; "sampler" with its settings; "prediction", what the network predicts;
"guidance_scale", by which the pipeline is to be called, null for none; "final_alpha", abar that the last step arrives at; "steps", noisy to clean, each with its "timestep", its "alpha"
(abar there), the blocks whose outputs it takes from the step before ("reuse"), and whether it is "guided"; "measured", what is known of it, on which model.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from nas.base.files import write_text
from nas.contracts import Guidance, LoadedSupernet, Schedule, Step, UserError

FORMAT, VERSION = "step-aware schedule", 1
SAMPLERS = ("DDIM", "DPMSolver")
"""Those that need no noise on the way."""


def portable(
    net: LoadedSupernet, schedule: Schedule, sampler: Mapping[str, Any], measured: Mapping[str, Any]
) -> dict[str, Any]:
    """The file's content. Raises UserError for a schedule that a single stock network cannot run, or whose sampler adds noise."""
    scales = {step.guidance.scale for step in schedule.steps if step.guidance}
    reasons = {
        "it runs other subnets than the full network": schedule.archs != (net.full_arch,),
        "it is guided by another subnet": any(step.guidance and step.guidance.arch for step in schedule.steps),
        f"it is guided by different scales, {', '.join(f'{scale:g}' for scale in sorted(scales))}": len(scales) > 1,
        f"{sampler['class']} adds noise on the way": sampler["class"] not in SAMPLERS or bool(sampler.get("eta")),
        "its network guides some channels alone": bool(getattr(net, "guided_channels", None)),
    }
    if wrong := [words for words, applies in reasons.items() if applies]:
        raise UserError(
            f"the schedule cannot be one file: {'; '.join(wrong)}; export the whole folder with `nas export`"
        )
    return {
        "format": FORMAT,
        "version": VERSION,
        "network": {
            "class": type(net.extract(net.full_arch)).__name__,
            "branches": list(net.blocks(net.full_arch, True)),
        },
        "sampler": dict(sampler),
        "prediction": net.scheduler["prediction_type"],
        "num_inference_steps": len(schedule.steps),
        "guidance_scale": next(iter(scales), None),
        "final_alpha": 1.0 if sampler["class"] == "DPMSolver" else getattr(net, "final_alpha", 1.0),
        "steps": [
            {
                "timestep": step.timestep,
                "alpha": float(net.alphas_cumprod[step.timestep]),
                "reuse": list(step.reuse),
                "guided": step.guidance is not None,
            }
            for step in schedule.steps
        ],
        "measured": dict(measured),
    }


def schedule_of(plan: Mapping[str, Any], arch: Any) -> Schedule:
    """The schedule that a file describes, of this full network."""
    scale = plan["guidance_scale"]
    return Schedule(
        tuple(
            Step(step["timestep"], arch, tuple(step["reuse"]), Guidance(float(scale)) if step["guided"] else None)
            for step in plan["steps"]
        )
    )


def resampled(schedule: Schedule, grid: Sequence[int], timesteps: Sequence[int]) -> Schedule:
    """The schedule, found on the steps of one grid, on those of another. A step stands for the timesteps from its own down to the next one's. Of the grid's
    steps that run, and of those that compute everything, as many fall into each new step's span, in proportion to the numbers of steps; their sum decides
    which new steps run, and which of these compute everything, each as soon as a half of one is due. What the others take from the step before, and how they
    are guided, is as at the nearest step that does.

    On its own grid a schedule is itself. The first step computes everything, and so does the first that is guided. This is a rule, and no search: what it
    loses is to be measured.
    """
    old = {step.timestep: step for step in schedule.steps}
    share = _overlaps(grid, timesteps) * len(timesteps) / len(grid)
    runs = share @ np.array([float(t in old) for t in grid])
    whole = share @ np.array([float(t in old and not old[t].reuse) for t in grid])
    steps: list[Step] = []
    due_run = due_whole = 0.0
    for timestep, run, compute in zip(timesteps, runs, whole, strict=True):
        due_run, due_whole = due_run + run, due_whole + compute
        if steps and due_run < HALF:
            continue
        due_run -= 1
        like = min(schedule.steps, key=lambda step: abs(step.timestep - timestep))
        reusing = [step for step in schedule.steps if step.reuse]
        # What a step kept that was not guided is not enough for one that is.
        begins = bool(steps) and steps[-1].guidance is None and like.guidance is not None
        if not steps or due_whole >= HALF or not reusing or begins:
            due_whole -= 1
            steps.append(Step(timestep, like.arch, (), like.guidance))
        else:
            near = min(reusing, key=lambda step: abs(step.timestep - timestep))
            steps.append(Step(timestep, like.arch, near.reuse, like.guidance))
    return Schedule(tuple(steps), schedule.sampler)


HALF = 0.5 - 1e-9


def _overlaps(grid: Sequence[int], timesteps: Sequence[int]) -> npt.NDArray[np.float64]:
    """For each new step, which share of each old one's span lies in its own."""
    top = max(grid[0], timesteps[0])
    old, new = ([(below, above) for above, below in pairwise([top, *steps[1:], -1])] for steps in (grid, timesteps))
    return np.array([[max(0, min(b, d) - max(a, c)) / (b - a) for a, b in old] for c, d in new])


def module(files: Sequence[Path], last: Path) -> str:
    """One stand-alone module of several files, in order, and the last one; what they import of each other stands in it."""
    parts, imports = (
        [f'"""{ast.get_docstring(ast.parse(last.read_text()))}\n"""'],
        ["from __future__ import annotations"],
    )
    for file in (*files, last):
        text = file.read_text()
        tree = ast.parse(text)
        lines = text.splitlines(keepends=True)
        for node in tree.body:
            first = min([node.lineno, *(one.lineno for one in getattr(node, "decorator_list", []))])
            source = "".join(lines[first - 1 : node.end_lineno])
            if isinstance(node, ast.ImportFrom) and node.level:
                continue
            if isinstance(node, ast.Import | ast.ImportFrom):
                imports.append(source.strip())
            elif isinstance(node, ast.If):
                continue  # imports for type checkers alone
            elif not (isinstance(node, ast.Expr) and node is tree.body[0]):
                parts.append(source.rstrip())
    ordered = dict.fromkeys(imports)
    return "\n\n\n".join([parts[0], "\n".join(ordered), *parts[1:]]) + "\n"


def write_portable(plan: Mapping[str, Any], code: str, folder: Path) -> None:
    """Writes schedule.json and apply_schedule.py."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in (("schedule.json", json.dumps(plan, indent=1) + "\n"), ("apply_schedule.py", code)):
        write_text(folder / name, text)
