"""What a schedule's file holds, read with distrust, since others write it too. Stands alone."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NoReturn

FORMAT, VERSION = "step-aware schedule", 1
SAMPLERS = ("DDIM", "DPMSolver")
"""Those that need no noise on the way."""

LEAST_ALPHA = 1e-12

LAYERS = ("resnet", "attention", "up")
"""Of a UNet's branch of several."""

PREDICTIONS = ("epsilon", "sample", "v_prediction")


class ScheduleError(ValueError):
    """A schedule that cannot be run, or not by this pipeline, or a call that it was not made for; the message says what to do."""


def read_schedule(schedule: str | Path | Mapping[str, Any]) -> Mapping[str, Any]:
    """A file, or what it holds. Raises ScheduleError where it is no schedule of this version, naming the first thing that is wrong."""
    where = "the schedule"
    if isinstance(schedule, str | Path):
        where = str(schedule)
        try:
            schedule = json.loads(Path(schedule).read_text())
        except (OSError, ValueError) as error:
            raise ScheduleError(f"{where} cannot be read ({error}); give a schedule.json") from error
    if not isinstance(schedule, Mapping) or schedule.get("format") != FORMAT:
        raise ScheduleError(
            f"{where} is no {FORMAT}; give one that `nas tune` wrote, which that of an exported folder is not"
        )
    if schedule.get("version") != VERSION:
        raise ScheduleError(
            f"{where} is of version {schedule.get('version')}, this file reads {VERSION}; take the module that came with it"
        )
    _check_model(where, schedule)
    _check_steps(where, schedule)
    # Where no signal is left at all, what is divided by must not be zero.
    steps = [{**step, "alpha": max(step["alpha"], LEAST_ALPHA)} for step in schedule["steps"]]
    return {**schedule, "steps": steps, "measured": _measured(where, schedule)}


def _check_model(where: str, plan: Mapping[str, Any]) -> None:
    """The network, the sampler, and what is the same at all steps."""
    network, sampler = plan.get("network"), plan.get("sampler")
    if not (isinstance(network, Mapping) and isinstance(network.get("class"), str) and _names(network.get("branches"))):
        _wrong(where, "network", network, "a class and the names of its branches")
    if not (isinstance(sampler, Mapping) and sampler.get("class") in SAMPLERS and type(sampler.get("clip")) is bool):
        _wrong(where, "sampler", sampler, f"a class, {' or '.join(SAMPLERS)}, and whether it clips")
    if sampler.get("eta"):
        _wrong(where, "the sampler's eta", sampler["eta"], "0: steps here add no noise")
    if plan.get("prediction") not in PREDICTIONS:
        _wrong(where, "prediction", plan.get("prediction"), f"one of {', '.join(PREDICTIONS)}")
    if not _between(plan.get("final_alpha"), 0, 1):
        _wrong(where, "final_alpha", plan.get("final_alpha"), "a number above 0 and up to 1")
    if "guidance_scale" not in plan or not (plan["guidance_scale"] is None or _between(plan["guidance_scale"], 0, 1e6)):
        _wrong(where, "guidance_scale", plan.get("guidance_scale"), "a number above 0, or null")


def _check_steps(where: str, plan: Mapping[str, Any]) -> None:
    steps = plan.get("steps")
    if not isinstance(steps, list | tuple) or not steps or not all(isinstance(step, Mapping) for step in steps):
        _wrong(where, "steps", steps, "a list of one or more")
    if plan.get("num_inference_steps", len(steps)) != len(steps):
        _wrong(where, "num_inference_steps", plan["num_inference_steps"], f"that of its steps, {len(steps)}")
    branches = set(plan["network"]["branches"])
    known = branches | {name.partition(".")[0] for name in branches}
    for number, step in enumerate(steps):
        here = f"step {number}'s"
        if type(step.get("timestep")) is not int or step["timestep"] < 0:
            _wrong(where, f"{here} timestep", step.get("timestep"), "a whole number from 0 on")
        if not _between(step.get("alpha"), -1e-9, 1):
            _wrong(where, f"{here} alpha", step.get("alpha"), "a number from 0 to 1")
        if not _names(step.get("reuse")):
            _wrong(where, f"{here} reuse", step.get("reuse"), "a list of names")
        for name in step["reuse"]:
            branch, _, layer = name.rpartition(".")
            if name not in known and not (branch in branches and layer in LAYERS):
                _wrong(where, f"{here} reuse", name, "of blocks or branches that the network has")
        if type(step.get("guided")) is not bool or (step["guided"] and plan["guidance_scale"] is None):
            _wrong(where, f"{here} guided", step.get("guided"), "true or false, and false where guidance_scale is null")
    if steps[0]["reuse"]:
        _wrong(where, "step 0's reuse", steps[0]["reuse"], "empty: nothing was computed before")
    kept_guided = steps[0]["guided"]
    for number, step in enumerate(steps):
        if _holds(plan, step["reuse"]):
            continue
        if step["reuse"] and step["guided"] and not kept_guided:
            _wrong(where, f"step {number}'s reuse", step["reuse"], "empty, as the step before kept nothing guided")
        kept_guided = step["guided"]
    timesteps = [step["timestep"] for step in steps]
    if any(after >= before for before, after in pairwise(timesteps)):
        _wrong(where, "steps' timesteps", timesteps, "falling, from noisy to clean")


def _holds(plan: Mapping[str, Any], reuse: Sequence[str]) -> bool:
    """Whether a step that reuses these hands out the prediction of the step before, whoever guided it."""
    whole = all({name, name.partition(".")[0]} & {*reuse} for name in plan["network"]["branches"])
    return whole and not plan["network"]["class"].endswith("Transformer2DModel")


def _measured(where: str, plan: Mapping[str, Any]) -> Mapping[str, Any]:
    """What is known of it; nothing where nothing is said."""
    told = plan.get("measured", {})
    if not isinstance(told, Mapping):
        _wrong(where, "measured", told, "an object, or left out")
    grid = told.get("grid", [0])
    whole = isinstance(grid, list | tuple) and grid and all(type(t) is int and t >= 0 for t in grid)
    if not whole or any(after >= before for before, after in pairwise(grid)):
        _wrong(where, "measured's grid", grid, "falling timesteps, or left out")
    if not all(told.get(name) is None or _number(told[name]) for name in ("loss", "apart")):
        _wrong(where, "measured's loss or apart", [told.get("loss"), told.get("apart")], "numbers, or left out")
    return told


def _names(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(isinstance(name, str) for name in value)


def _number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < float("inf")


def _between(value: Any, above: float, most: float) -> bool:
    return _number(value) and above < value <= most


def _wrong(where: str, field: str, value: Any, wanted: str) -> NoReturn:
    shown = json.dumps(value, default=str)
    shown = shown if len(shown) <= 80 else f"{shown[:77]}..."
    raise ScheduleError(f"{where}: {field} is {shown} and must be {wanted}; mend it, or write it anew with `nas tune`")
