"""Schedules of other numbers of steps, and in the formats of other tools."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nas.contracts import Guidance, Schedule, Step, UserError
from nas.handover.portable import resampled
from search_spaces import layouts
from search_spaces.branches import Branches
from search_spaces.intervals import uniform
from search_spaces.options import Options
from search_spaces.patterns import ALL, Every, LeftOut, Only, Subset, legal
from search_spaces.shipped.graph import AROUND, TransformerGraph, UNetGraph
from search_spaces.stepwise import Stepwise
from search_spaces.supernet import Elastic
from tests.conftest import TINY
from tests.test_transformer import DIT

GRAPH = TransformerGraph(3)
REST = ("b1", "b2")


@given(st.integers(1, 30), st.integers(1, 60), st.data())
@settings(deadline=None, max_examples=150)
def test_other_numbers_of_steps_keep_the_shares(old: int, new: int, data: st.DataObject) -> None:
    """On its own grid a schedule is itself; on another, as many of its steps run, and compute everything, in proportion."""
    grid = [round(1000 * (old - n) / old) - 1 for n in range(old)]
    kinds = data.draw(st.lists(st.sampled_from(["whole", "reused", "absent"]), min_size=old, max_size=old))
    kinds[0] = "whole"
    steps = [
        Step(t, ("a",), ("b0",) if kind == "reused" else ())
        for t, kind in zip(grid, kinds, strict=True)
        if kind != "absent"
    ]
    schedule = Schedule(tuple(steps))
    assert resampled(schedule, grid, grid) == schedule
    other = [round(1000 * (new - n) / new) - 1 for n in range(new)]
    found = resampled(schedule, grid, other)
    assert set(found.timesteps) <= set(other)
    assert not found.steps[0].reuse
    for count, before in (
        (len(found.steps), len(steps)),
        (sum(not s.reuse for s in found.steps), kinds.count("whole")),
    ):
        assert abs(count - before * new / old) <= 1.5


def test_a_step_does_what_was_done_near_it() -> None:
    schedule = Schedule(
        (
            Step(999, ("a",), (), Guidance(2.0)),
            Step(749, ("a",), ("b0",), Guidance(2.0)),
            Step(499, ("a",)),
            Step(249, ("a",), ("b1",)),
        )
    )
    found = resampled(schedule, schedule.timesteps, [999, 874, 749, 624, 499, 374, 249, 124])
    assert [step.reuse for step in found.steps] == [(), (), ("b0",), ("b0",), (), (), ("b1",), ("b1",)]
    assert [step.guidance is None for step in found.steps] == [False, False, False, False, True, True, True, True]


def of_reuse(*reuses: tuple[str, ...]) -> Schedule:
    """Steps as a scheduler spaces them evenly, the last at timestep 0."""
    return Schedule(tuple(Step(100 * (len(reuses) - 1 - n), ("a",), reuse) for n, reuse in enumerate(reuses)))


@pytest.mark.parametrize(("between", "first"), [(("b0", "b1", "b2"), 1), (REST, 1), (("b2",), 2)])
def test_cache_dit_reads_the_same_steps(between: tuple[str, ...], first: int, tmp_path: Path) -> None:
    cache_dit = pytest.importorskip("cache_dit")
    schedule = of_reuse((), between, between, (), between)
    path = tmp_path / "cache_dit.yaml"
    path.write_text(layouts.cache_dit_yaml(schedule, GRAPH, schedule.timesteps))
    config = cache_dit.load_configs(str(path))["cache_config"]
    assert config.steps_computation_mask == [1, 0, 0, 1, 0]
    assert config.steps_computation_policy == "static"
    assert config.Fn_compute_blocks == first
    listed = layouts.cache_dit(path, 3)
    assert [one == ALL for one in listed.computed] == [True, False, False, True, False]
    runs = GRAPH.expand(listed.computed[1])
    assert runs == GRAPH.expand(("b0", "b1", "b2")[:first])


def test_smoothcache_lists_go_back_and_forth(tmp_path: Path) -> None:
    attention, everything = ("b0.attn", "b1.attn", "b2.attn"), ("b0", "b1", "b2")
    path = tmp_path / "smoothcache.json"
    schedule = of_reuse((), attention, everything, ())
    path.write_text(layouts.smoothcache_json(schedule, GRAPH, schedule.timesteps))
    assert json.loads(path.read_text()) == {"attn1": [1, 0, 0, 1], "ff": [1, 1, 0, 1]}
    listed = layouts.smoothcache(path, 3)
    assert [GRAPH.expand(GRAPH.blocks) - GRAPH.expand(one) for one in listed.computed[1:3]] == [
        GRAPH.expand(attention),
        GRAPH.expand(everything),
    ]


def test_smoothcache_has_lists_of_each_block_too(tmp_path: Path) -> None:
    """As its own schedules have them that Learning-to-Cache learned."""
    path = tmp_path / "blocks.json"
    schedule = of_reuse((), ("b0", "b2.mlp"), ("b1.attn",))
    path.write_text(layouts.smoothcache_json(schedule, GRAPH, schedule.timesteps))
    told = json.loads(path.read_text())
    assert told["attn1-0"] == [1, 0, 1]
    assert told["attn1-1"] == [1, 1, 0]
    assert told["ff-2"] == [1, 0, 1]
    every = GRAPH.expand(GRAPH.blocks)
    assert [every - GRAPH.expand(one) for one in layouts.smoothcache(path, 3).computed[1:]] == [
        GRAPH.expand(step.reuse) for step in schedule.steps[1:]
    ]
    told = {f"{part}-{block}": [1, block % 2] for part in ("attn", "mlp") for block in range(3)}
    path.write_text(json.dumps(told))
    assert layouts.smoothcache(path, 3).computed[1] == ("b1.attn", "b1.mlp")
    for missing, words in (({"mlp-2"}, "must hold"), ({"attn-0", "attn-1", "attn-2"}, "must hold")):
        path.write_text(json.dumps({key: row for key, row in told.items() if key not in missing}))
        with pytest.raises(UserError, match=words):
            layouts.smoothcache(path, 3)
    path.write_text(json.dumps(told))
    with pytest.raises(UserError, match="attn-2, and 2 blocks have"):
        layouts.smoothcache(path, 2)


def test_what_a_format_cannot_say_is_refused() -> None:
    unet = UNetGraph((1, 1))
    guided = Schedule((Step(100, ("a",), (), Guidance(2.0)), Step(0, ("a",), REST)))
    for schedule, graph, words in (
        (of_reuse((), REST, ("b2",)), GRAPH, "the schedule has 2"),
        (of_reuse((), ("b0",)), GRAPH, "between whole steps"),
        (of_reuse((), ("u0",)), unet, "the network is a UNet"),
        (guided, GRAPH, "comes and goes"),
    ):
        with pytest.raises(UserError, match=words):
            layouts.cache_dit_yaml(schedule, graph, schedule.timesteps)
    left_out = Schedule(tuple(Step(t, ("a",)) for t in (999, 949, 599, 49)))
    for write in (layouts.cache_dit_yaml, layouts.smoothcache_json):
        with pytest.raises(UserError, match="at the timesteps 750, 500, 250, 0, and the schedule's are at 999, 949"):
            write(left_out, GRAPH, (750, 500, 250, 0))


def test_branches_of_deepcache_that_a_network_lacks_are_refused() -> None:
    unet = UNetGraph((2, 2))
    assert layouts.deepcache(3, 0, unet).steps(4) == (ALL, ("u1.2",), ("u1.2",), ALL)
    assert layouts.deepcache(1, 5, unet).steps(2) == (ALL, ALL)
    for graph, branch, words in ((unet, 6, "from 0 to 5"), (unet, -1, "branch -1"), (GRAPH, 0, "is a transformer")):
        with pytest.raises(UserError, match=words):
            layouts.deepcache(2, branch, graph)


def test_masks_and_tables_of_gates_are_read(tmp_path: Path) -> None:
    path = tmp_path / "mask.yaml"
    for wrong in (
        "[",
        "cache_config: {}",
        "steps_computation_mask: [1, 0]",
        "{steps_computation_mask: [0, 1], steps_computation_policy: static}",
    ):
        path.write_text(wrong)
        with pytest.raises(UserError, match=r"mask\.yaml"):
            layouts.cache_dit(path, 3)
    path = tmp_path / "gates.json"
    path.write_text(json.dumps([[1, 1, 1], [0, 0, 1], [0, 0, 0]]))
    assert layouts.gate_table(path, GRAPH).computed == (ALL, ("b2",), ("around",))
    unet = UNetGraph((1, 1))
    path.write_text(json.dumps([[1] * 5, [0, 0, 0, 0, 1], [0] * 5]))
    assert layouts.gate_table(path, unet).computed == (ALL, ("u1",), ())
    for rows in ([[1, 1]], [[2] * 5], "x", [[1] * 5, [1] * 4], [[1.0] * 5, [0.97, 0.02, 1.0, 1.0, 0.91]]):
        path.write_text(json.dumps(rows))
        with pytest.raises(UserError, match=r"gates\.json"):
            layouts.gate_table(path, unet)


@pytest.mark.parametrize("guidance", [(), (None, 2.0)])
def test_a_pattern_that_was_made_elsewhere_has_a_genome(tmp_path: Path, guidance: tuple[float | None, ...]) -> None:
    """In a space of patterns for each step, it runs as it does alone over the whole trajectory."""
    unet = {**TINY, "num_class_embeds": 11}
    net, grid = Elastic(unet, (0.5, 1.0)), uniform(6)
    graph = net.cost.graph(net.anatomy.full)
    (tmp_path / "gates.json").write_text(json.dumps([[1] * 5, [0, 0, 0, 0, 1], [0, 0, 1, 1, 1]] * 2))
    space = Stepwise(
        net, grid, (1,) * 6, patterns=(*legal(2, graph), Every(1), LeftOut()), guidance=guidance, finer=True
    )
    made = (
        layouts.deepcache(3, 0, graph),
        layouts.deepcache(2, 3, graph),
        layouts.gate_table(tmp_path / "gates.json", graph),
        Subset(3, "quadratic"),
    )
    for pattern in made:
        alone = Stepwise(net, grid, (6,), Options((1.0,)), patterns=(pattern,), guidance=guidance[-1:], finer=True)
        assert space.decode(space.genome(pattern)) == alone.decode((0,))
    first = space.running(made[0], guided=2)
    assert [step.guidance is not None for step in first.steps] == [bool(guidance) and place < 2 for place in range(6)]
    with pytest.raises(UserError, match="no options of interval 1"):
        Stepwise(net, grid, (1,) * 6, patterns=(Every(1), Only(("u1",))), finer=True).genome(made[1])
    with pytest.raises(UserError, match="is a schedule of 6 steps, and here are 4"):
        Stepwise(net, uniform(4), (1,) * 4, patterns=(Every(1), LeftOut())).genome(made[2])


def test_a_rule_has_a_genome_of_branches() -> None:
    space = Branches(Elastic({**DIT, "in_channels": 1, "out_channels": 1}, (1.0,)), uniform(4))
    schedule = space.decode(space.genome(Every(2, (AROUND,))))
    assert [bool(step.reuse) for step in schedule.steps] == [False, True] * 2
    with pytest.raises(UserError, match="every 2 leaves out step 1, or holds"):
        space.genome(Every(2))
