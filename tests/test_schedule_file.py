"""The file of a schedule and the module that reads it: what stands in it is read back, what is wrong in it is named."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from nas.handover.portable import portable, schedule_of, write_portable
from search_spaces.shipped.schedule_file import ScheduleError, read_schedule
from tests.test_portable import CODE, DDIM, made, schedule_for


def test_the_module_stands_alone() -> None:
    """It knows no name of this project, defines each name once, and imports torch beside the standard library."""
    tree = ast.parse(CODE)
    names = [node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)]
    names += [
        t.id for node in tree.body if isinstance(node, ast.Assign) for t in node.targets if isinstance(t, ast.Name)
    ]
    assert len(names) == len(set(names))
    imported = {
        (node.module or "" if isinstance(node, ast.ImportFrom) else node.names[0].name).partition(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
    }
    assert imported - set(sys.stdlib_module_names) == {"torch"}
    said = subprocess.run(
        [sys.executable, "-I", "-c", CODE + "\nprint(FORMAT, VERSION)"], capture_output=True, text=True, check=True
    )
    assert said.stdout == "step-aware schedule 1\n"


def test_a_file_is_read_back(tmp_path: Path) -> None:
    _, net = made("dit", tmp_path)
    schedule = schedule_for(net, 2.0)
    write_portable(portable(net, schedule, DDIM, {"loss": 0.5}), CODE, tmp_path / "told")
    plan = read_schedule(tmp_path / "told" / "schedule.json")
    assert schedule_of(plan, net.full_arch) == schedule
    assert plan["measured"] == {"loss": 0.5}
    unmeasured = {name: value for name, value in plan.items() if name != "measured"}
    assert read_schedule(unmeasured)["measured"] == {}
    for wrong in ("{", "[]", "{}", json.dumps({**plan, "version": 3})):
        (tmp_path / "wrong.json").write_text(wrong)
        with pytest.raises(ScheduleError, match=r"wrong\.json"):
            read_schedule(tmp_path / "wrong.json")


WRONG: dict[str, Any] = {
    "steps": (None, [], [{}], "steps", [1]),
    "network": (None, {}, "UNet2DModel", {"class": "UNet2DModel"}, {"class": "UNet2DModel", "branches": [1]}),
    "sampler": (
        None,
        "DDIM",
        {"class": "DDPM", "clip": True},
        {"class": "DDIM"},
        {"class": "DDIM", "clip": False, "eta": 1},
    ),
    "prediction": (None, "noise"),
    "guidance_scale": ("2", 0, float("nan")),
    "final_alpha": (None, 0, 2),
    "num_inference_steps": (1,),
    "measured": (None, [], {"grid": []}, {"grid": [1, 2]}, {"grid": "all"}, {"loss": "small"}),
}


WRONG_STEPS: dict[str, Any] = {
    "timestep": (None, "a", -1, 2.5, 0),
    "alpha": (None, "a", 2, float("inf")),
    "reuse": (None, "b0", [1], ["b9"], ["b0.nothing.else"], ["b0.attn.else"]),
    "guided": (None, 1),
}


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    _, net = made("dit", tmp_path_factory.mktemp("dit"))
    return portable(net, schedule_for(net, 2.0), DDIM, {})


@pytest.mark.parametrize(
    ("field", "value"),
    [(field, value) for field, values in (WRONG | WRONG_STEPS).items() for value in values],
    ids=str,
)
def test_a_file_that_somebody_wrote_wrongly_is_refused_by_name(field: str, value: Any, plan: dict[str, Any]) -> None:
    assert read_schedule(plan)["steps"] == plan["steps"]
    steps = [dict(step) for step in plan["steps"]]
    if field in WRONG_STEPS:
        steps[1][field] = value
        plan = {**plan, "steps": steps}
        field = field if value != 0 else "timesteps"
    else:
        plan = {**plan, field: value}
    with pytest.raises(ScheduleError, match=rf"the schedule: .*{field}.* must "):
        read_schedule(plan)


def test_a_step_without_any_signal_divides_by_something(plan: dict[str, Any]) -> None:
    """abar of exactly 0 is what diffusers' own schedulers have there, and what the format allows."""
    first, *rest = plan["steps"]
    found = read_schedule({**plan, "steps": [{**first, "alpha": 0}, *rest]})["steps"]
    assert 0 < found[0]["alpha"] < 1e-10
    assert found[1:] == rest


def test_steps_reuse_only_what_was_computed_and_none_is_guided_without_a_scale(plan: dict[str, Any]) -> None:
    first = [{**plan["steps"][0], "reuse": ["b0"]}, *plan["steps"][1:]]
    with pytest.raises(ScheduleError, match="step 0's reuse"):
        read_schedule({**plan, "steps": first})
    with pytest.raises(ScheduleError, match="guided"):
        read_schedule({**plan, "guidance_scale": None})
    unguided = [*plan["steps"][:3], {**plan["steps"][3], "reuse": ["b0"]}, *plan["steps"][4:]]
    with pytest.raises(ScheduleError, match=r"step 3's reuse .* as the step before kept nothing guided"):
        read_schedule({**plan, "steps": unguided})
    network = {"class": "UNet2DConditionModel", "branches": ["d0.0", "u0.0", "u0.1"]}
    whole = [{**step, "reuse": ["d0", "u0"] if number == 3 else []} for number, step in enumerate(plan["steps"])]
    assert read_schedule({**plan, "network": network, "steps": whole})["steps"] == whole
    whole[4] = {**whole[4], "reuse": ["u0"]}
    with pytest.raises(ScheduleError, match="step 4's reuse"):
        read_schedule({**plan, "network": network, "steps": whole})
