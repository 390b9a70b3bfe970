"""A bit for each branch and step of a transformer, and how others' schedules and routers become one."""

from __future__ import annotations

import json
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from evaluators.agreement import Agreement
from evaluators.conditions import Labels
from evaluators.features import SmallClassifier
from evaluators.frechet import Frechet
from evaluators.images import Digits
from evaluators.latency import Latency, Timed
from evaluators.sampling import DDIM, State, initial_noise
from evaluators.scoring import Scores
from evaluators.trajectories import Reuse, Trajectories
from nas.contracts import Guidance, Problem, Progress, Snapshot, Step, UserError
from nas.searchers.choosers import BitChooser, Chooser, meanings
from nas.searchers.gates import Gates
from nas.searchers.pruner import Pruner
from nas.searchers.random import Random
from nas.searchers.router import Router
from nas.study import Study
from nas.testing import check_searcher, check_space, check_supernet
from search_spaces.branches import Branches
from search_spaces.intervals import equal, uniform
from search_spaces.layouts import learning_to_cache, smoothcache
from search_spaces.noise import NoiseSchedule
from search_spaces.options import Options
from search_spaces.patterns import ALL, Every, Listed, Only, legal
from search_spaces.shipped.graph import AROUND, TransformerGraph
from search_spaces.shipped.reuse import run
from search_spaces.stepwise import Stepwise
from search_spaces.supernet import Elastic
from search_spaces.training import Stages
from tests.conftest import TINY
from tests.test_transformer import DIT, PIXART, drawn, elastic, inputs, xl

PIXEL_DIT = {**DIT, "num_layers": 3, "in_channels": 1, "out_channels": 1}


def net() -> Elastic:
    return Elastic(PIXEL_DIT, (0.5, 1.0))


@pytest.mark.parametrize(
    "settings_", [{}, {"whole": 2}, {"guidance": 1.5}, {"guidance": Guidance(2.0, (((0.5,), (), (), "")))}]
)
def test_the_space_keeps_its_laws(settings_: dict[str, Any]) -> None:
    space = Branches(net(), uniform(4), **settings_)
    check_space(space)
    check_supernet(space.net.initial(0), space)


@given(st.data())
@settings(deadline=None, max_examples=30)
def test_costs_of_bits_add_up(data: st.DataObject) -> None:
    space = Branches(net(), uniform(4), guidance=1.5)
    genome = tuple(data.draw(st.lists(st.integers(0, 1), min_size=18, max_size=18)))
    tables = space.interval_costs()
    assert space.cost(genome)["macs"] == sum(int(table[bit]) for table, bit in zip(tables, genome, strict=True))
    assert space.cost(genome)["macs"] == sum(space.net.macs(step) for step in space.decode(genome).steps)


def test_what_it_cannot_be_made_of_is_refused() -> None:
    with pytest.raises(UserError, match="branches of a UNet read each other"):
        Branches(Elastic(TINY, (0.5, 1.0)), uniform(4))
    with pytest.raises(UserError, match="all of the 1 steps run whole"):
        Branches(net(), uniform(1))
    with pytest.raises(UserError, match="known in multiply-adds alone"):
        Branches(net(), uniform(4)).interval_costs(lambda step: 1)


def test_a_step_may_run_what_stands_around_the_blocks_alone() -> None:
    """As FORA (Selvaraju et al. 2024) does: everything is reused and gated anew, which is not the prediction of the step before."""
    space = Stepwise(net(), uniform(4), (4,), Options((1.0,)), patterns=(Every(2, (AROUND,)), Only(ALL)), finer=True)
    check_space(space)
    cheap, whole = space.decode((0,)), space.decode((1,))
    assert len(cheap.steps) == len(whole.steps) == 4
    full = space.net.anatomy.full
    around = space.net.macs(Step(0, full, ("b0", "b1", "b2")))
    assert 0 < around < 0.1 * space.net.macs(Step(0, full))
    assert space.cost((0,))["macs"] == 2 * around + 2 * space.net.macs(Step(0, full))
    stock = drawn(elastic(DIT)).extract(elastic(DIT).anatomy.full)
    x, _, told = inputs(elastic(DIT))
    with torch.inference_mode():
        before, cache = run(stock, x, 500, keep=("b0", "b1", "b2", "b3", "b4"), condition=told)
        anew, _ = run(stock, x + 0.1, 400, ("b0", "b1", "b2", "b3", "b4"), (), cache, told)
    assert not torch.allclose(before, anew, atol=1e-3)
    with pytest.raises(UserError, match="names around"):
        check_space(Stepwise(Elastic(TINY, (0.5, 1.0)), uniform(4), (4,), patterns=(Every(2, (AROUND,)), Only(ALL))))


def test_a_router_of_learning_to_cache_is_read_as_its_code_runs_it(tmp_path: Path) -> None:
    """Scores above 0.1, from the cleanest step on; each second step runs whole, among them the first that is sampled."""
    rng = np.random.default_rng(0)
    logits = {f"{i}.prob": rng.normal(-2, 1, 6).astype(np.float32) for i in range(4)}
    save_file(logits, tmp_path / "router.safetensors")
    listed = learning_to_cache(tmp_path / "router.safetensors", 4)
    space = Branches(net(), uniform(4), whole=2)
    schedule = space.decode(space.genome(listed))
    for place, step in enumerate(schedule.steps):
        index = 3 - place
        runs = [
            f"b{i // 2}.{('attn', 'mlp')[i % 2]}"
            for i in range(6)
            if 1 / (1 + np.exp(-float(logits[f"{index}.prob"][i]))) > 0.1
        ]
        graph = space.net.cost.graph(space.net.anatomy.full)
        running = set(graph.names(True)) - graph.expand(step.reuse)
        assert running == (set(graph.names(True)) if place % 2 == 0 else set(runs))
    interval = Stepwise(net(), uniform(4), (4,), Options((1.0,)), patterns=(listed, Only(ALL)), finer=True)
    assert schedule.digest in {interval.decode((option,)).digest for option in (0, 1)}
    with pytest.raises(UserError, match="is a schedule for 6 branches, the network has 10"):
        Branches(elastic(DIT), uniform(4)).genome(listed)
    with pytest.raises(UserError, match=r"names b9\.attn, typo"):
        space.genome(Listed("odd", (ALL, ("b9.attn", "typo"), ALL, ALL)))
    with pytest.raises(UserError, match="a schedule of 4 steps, and here are 6; give as many timesteps"):
        Branches(net(), uniform(6)).genome(listed)
    for name, row in (("odd", np.zeros(7)), ("nan", np.full(6, np.nan))):
        save_file({f"{i}.prob": row.astype(np.float32) for i in range(4)}, tmp_path / f"{name}.safetensors")
        with pytest.raises(UserError, match="must be finite numbers, two for each block"):
            learning_to_cache(tmp_path / f"{name}.safetensors", 4)
    for wrong, steps in ((tmp_path / "none.safetensors", 4), (tmp_path / "router.safetensors", 5)):
        with pytest.raises(UserError, match=str(wrong.name)):
            learning_to_cache(wrong, steps)
    (tmp_path / "pickled.pt").write_bytes(b"\x80\x02}q\x00.")
    with pytest.raises(UserError, match="cannot be read as safetensors"):
        learning_to_cache(tmp_path / "pickled.pt", 4)


def test_a_schedule_of_smoothcache_is_read(tmp_path: Path) -> None:
    path = tmp_path / "fora.json"
    path.write_text(json.dumps({"attn": [1, 0, 1, 0], "mlp": [1, 1, 0, 0]}))
    listed = smoothcache(path, 3)
    assert listed.computed == (ALL, ("b0.mlp", "b1.mlp", "b2.mlp"), ("b0.attn", "b1.attn", "b2.attn"), (AROUND,))
    assert listed.branches == 6
    with pytest.raises(UserError, match="a schedule for 6 branches, the network has 15"):
        Branches(Elastic(PIXART, (1.0,)), uniform(4)).genome(listed)
    path.write_text(json.dumps({"attn": [1, 0], "text": [1, 1], "mlp": [1, 0]}))
    assert smoothcache(path, 2, ("attn", "text", "mlp")).computed == (ALL, ("b0.text", "b1.text"))
    path.write_text(json.dumps({"attn1": [1, 0]}))  # as released for diffusers' blocks
    assert smoothcache(path, 2).computed == (ALL, ("b0.mlp", "b1.mlp"))
    assert smoothcache(path, 1, ("attn", "text", "mlp")).computed == (ALL, ("b0.text", "b0.mlp"))
    for wrong in (
        json.dumps({"attn1": [1, 0], "attn2": [1, 0]}),
        json.dumps({"attn1": [1, 0], "ff": [1]}),
        json.dumps({"attn1": 3}),
        "[]",
        "{",
        json.dumps({"attn": [0, 1], "mlp": [1, 1]}),
        json.dumps({"attn": [1, 1], "text": [1, 1], "mlp": [1, 1]}),
        json.dumps({"attn": [1]}),
        json.dumps({"attn": [1, 2], "mlp": [1, 0]}),
        json.dumps({"attn": [1], "mlp": []}),
    ):
        path.write_text(wrong)
        with pytest.raises(UserError, match=r"fora\.json"):
            smoothcache(path, 3)
    with pytest.raises(UserError, match="a schedule of 4 steps"):
        Listed("four", listed.computed).steps(5)


# ------------------------------------------------------------------------------------------------------------ router


def problem(space: Branches, share: float) -> Problem:
    return Problem(space, ("fd", "macs"), {"macs_share": share})


def learned(settings_: Router, seed: int = 0, so_far: Snapshot | None = None) -> tuple[Any, list[Any]]:
    space = Branches(net(), uniform(6), guidance=1.5)
    data = Digits().load()
    learning = Gates(settings_, ("threshold",)).learn(problem(space, 0.6), drawn(net()), data, seed, so_far)
    ticks = []
    while True:
        try:
            ticks.append(next(learning))
        except StopIteration as end:
            return end.value, ticks


def test_the_router_learns_what_can_be_reused() -> None:
    """The pressure alone shuts all; without any, errors open them; at steps that run whole there is nothing to learn."""
    (shut, spent), ticks = learned(Router(steps=60, batch=4, learning_rate=0.3, sparsity=100.0))
    keep = shut["keep"]
    assert keep.shape == (5, 6)
    assert torch.equal(keep[1::2], torch.ones(2, 6))
    assert keep[::2].mean() < 0.05
    assert spent == 60 * 5 * 4 * net().macs(Step(0, net().anatomy.full))
    assert isinstance(ticks[-1], Progress)
    (opened, _), _ = learned(Router(steps=60, batch=4, learning_rate=0.3, sparsity=0.0))
    assert opened["keep"][::2].mean() > 0.6


def test_a_router_learns_of_what_predicts_the_image() -> None:
    """Where hardly any signal is left the noise follows in float64."""
    other = replace(net(), noise=NoiseSchedule(prediction="v_prediction"))
    space = Branches(other, uniform(2), guidance=1.5)  # of which the first is nearly noise alone
    learning = Gates(Router(steps=2, batch=2), ("threshold",)).learn(
        problem(space, 0.6), drawn(other), Digits().load(), 0, None
    )
    ticks = [*learning]
    assert isinstance(ticks[-1], Progress)


def test_a_router_that_was_interrupted_goes_on_as_if_it_was_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nas.searchers.router.EVERY", 5)
    settings_ = Router(steps=12, batch=2, learning_rate=0.1)
    (whole, spent), ticks = learned(settings_)
    snapshot = next(tick for tick in ticks if isinstance(tick, Snapshot))
    (again, also), rest = learned(settings_, so_far=snapshot)
    assert torch.equal(whole["keep"], again["keep"])
    assert spent == also
    assert len(rest) < len(ticks)


def test_its_threshold_is_the_published_one_where_that_keeps_the_budget() -> None:
    (tensors, _), _ = learned(Router(steps=2, batch=2))
    space = Branches(net(), uniform(6), guidance=1.5)
    keep = torch.ones(5, 6)
    keep[0, :3], keep[2, 1:] = 0.05, 0.2
    tensors["keep"] = keep
    loose = BitChooser(problem(space, 1.0), tensors, 0.1).genome("threshold", 1e18)
    runs = np.array(loose).reshape(5, 6).astype(bool)
    assert (runs == (keep.numpy() > 0.1)).all()
    tight = space.cost(loose)["macs_share"] - 0.05
    chooser = BitChooser(problem(space, tight), tensors, 0.1)
    found = chooser.genome("threshold", chooser.budgets[1])
    assert space.cost(found)["macs_share"] <= tight
    assert not np.array(found).reshape(5, 6)[2, 1:].any(), "the least threshold that keeps it is above 0.2"


def test_learning_to_cache_as_a_searcher_keeps_its_laws() -> None:
    check_searcher(Gates(Router(steps=2, batch=2), ("threshold",)))


def test_it_says_that_it_needs_images() -> None:
    space = Branches(net(), uniform(4), guidance=1.5)
    empty = Digits().load()
    empty = type(empty)(empty.pixels[:0], None, empty.digest)
    with pytest.raises(UserError, match="learns from noised images"):
        next(Gates(Router(), ("threshold",)).learn(problem(space, 0.6), drawn(net()), empty, 0))


def test_patterns_may_still_say_it_for_intervals() -> None:
    attention = tuple(f"b{i}.attn" for i in range(3))
    space = Stepwise(
        net(),
        uniform(6),
        equal(uniform(6), 3),
        Options((1.0,)),
        patterns=(Only(ALL), Every(2, attention)),
        finer=True,
        guidance=(None, 1.5),
    )
    check_space(space)
    with pytest.raises(UserError, match="names branches, and blocks run whole here; give finer=True"):
        check_space(replace(space, finer=False))
    with pytest.raises(UserError, match="would hold a prediction, which a transformer does not"):
        check_space(replace(space, patterns=(Only(ALL), Every(2)), deterministic=False))
    with pytest.raises(UserError, match=r"6 branches, the network has 10"):
        check_space(
            Stepwise(
                elastic(DIT), uniform(2), (2,), patterns=(Listed("small", (ALL, (AROUND,)), 6), Only(ALL)), finer=True
            )
        )


def test_all_sets_of_few_branches_are_listed_and_of_many_not() -> None:
    assert len(legal(1, TransformerGraph(3))) == 2**6
    with pytest.raises(UserError, match="56 branches have 2\\^56 legal sets, too many to list; use Branches"):
        legal(1, TransformerGraph(28))


def test_who_guides_is_checked_where_the_space_is_made() -> None:
    for arch in (((0.3,), (), (), ""), ((0.5,), (99,), (), ""), ((0.5, 0.5), (), (), "")):
        for make in (
            lambda guide: Branches(net(), uniform(4), guidance=guide),
            lambda guide: Stepwise(net(), uniform(4), (4,), guidance=(guide, None)),
        ):
            with pytest.raises(UserError):
                make(Guidance(1.5, arch))
    full = ((1.0,), (), (), "")
    assert Branches(net(), uniform(4), guidance=Guidance(1.5, full)).decode((0,) * 18) == Branches(
        net(), uniform(4), guidance=1.5
    ).decode((0,) * 18)
    with pytest.raises(UserError, match="guided_channels=9 must be at most the 1 of a state"):
        Elastic(PIXEL_DIT, (1.0,), guided_channels=9)


# ------------------------------------------------------------------------------------------------------------ memory


def test_what_is_kept_to_be_reused_is_counted() -> None:
    """56 branches of DiT-XL/2 are 63 MiB an image, 3.9 GiB of a batch of 64."""
    large = Elastic(xl("dit"), (1.0,))
    kept = large.kept_numbers(large.anatomy.full)
    names = large.cost.graph(large.anatomy.full).names(True)
    assert sum(kept[name] for name in names) == 56 * 256 * 1152
    loaded = drawn(elastic(DIT))
    x, _, told = inputs(elastic(DIT))
    _, cache = loaded.denoiser(Step(500, loaded.full_arch), keep=("b1.attn", "b3"))(x, 500, None, told)
    assert loaded.kept_numbers(loaded.full_arch, ("b1.attn", "b3")) == sum(
        value[0].numel() for name, value in cache.items() if name != "prediction"
    )


def test_a_batch_keeps_no_more_than_it_may() -> None:
    loaded = drawn(net())
    # Batches of another size may take other kernels, and 1 / sqrt(abar) multiplies by how much these differ: no steps where that is much.
    space = Branches(net(), (400, 300, 200, 100), guidance=1.5)
    schedule = space.decode((0,) * 18)
    each = Reuse().bytes_of(loaded, schedule)
    assert each == 2 * 4 * loaded.kept_numbers(loaded.full_arch, ("b0", "b1", "b2"))
    assert Reuse("float16").bytes_of(loaded, schedule) == each // 2
    assert Reuse().bytes_of(loaded, space.decode((1,) * 18)) == 0
    labels = Labels(Digits())
    told = labels.load(Path())
    bounded = Trajectories(loaded, DDIM(), batch=8, conditions=told, reuse=Reuse(most=3 * each))
    assert bounded.batches(8, (), schedule) == [(0, 3), (3, 6), (6, 8)]
    assert bounded.batches(8, (), space.decode((1,) * 18)) == [(0, 8)]
    free = Trajectories(loaded, DDIM(), batch=8, conditions=told)
    common: dict[str, Any] = {"conditions": labels, "rungs": (32, 64)}
    judge = SmallClassifier(steps=10)
    with pytest.raises(UserError, match="have the reuse_precision"):
        Scores((Frechet(Digits(), judge, **common), Agreement(Digits(), judge, reuse_precision="bfloat16", **common)))
    whole = free.images(schedule, 0, 0, 8)
    parts = torch.cat([bounded.images(schedule, 0, *ends) for ends in bounded.batches(8, (), schedule)])
    assert torch.allclose(whole, parts, atol=1e-5)


def test_no_more_states_are_held_at_once_than_may_be_kept() -> None:
    """Each carries what the next step reuses; they are counted as they come."""
    loaded = drawn(net())
    schedule = Branches(net(), uniform(30)).decode(tuple(i % 2 for i in range(29 * 6)))
    most = 40 * loaded.kept_numbers(loaded.full_arch, ("b0", "b1", "b2"))
    walk = Trajectories(loaded, DDIM(), batch=4, cache_bytes=most, conditions=Labels(Digits()).load(Path()))
    held: list[weakref.ref[torch.Tensor]] = []
    peak = 0
    step = walk.advance

    def counted(*given: Any) -> State:
        nonlocal peak
        state = step(*given)
        held.extend(weakref.ref(value) for value in (state.cache or {}).values())
        alive = {id(value): value.nbytes for ref in held if (value := ref()) is not None}
        peak = max(peak, sum(alive.values()))
        return state

    walk.advance = counted  # type: ignore[assignment, method-assign]
    walk.images(schedule, 0, 0, 4)
    one = 4 * 4 * loaded.kept_numbers(loaded.full_arch, ("b0", "b1", "b2"))
    assert peak <= most + 3 * one  # and what the step at hand and the one before it have
    assert walk.bytes_kept <= most


def test_what_is_kept_in_half_precision_differs_by_its_rounding() -> None:
    loaded = drawn(net())
    schedule = Branches(net(), uniform(4), guidance=1.5).decode((0,) * 18)
    told = Labels(Digits()).load(Path())
    images = {}
    for precision in ("float32", "float16"):
        walk = Trajectories(loaded, DDIM(), batch=4, conditions=told, reuse=Reuse(precision))
        first = walk.advance(schedule, 0, State(initial_noise(0, 0, 4, loaded.state_shape)), 0, 0)
        kept = {value.dtype for name, value in first.cache.items() if name != "prediction"}
        assert kept == {torch.float16 if precision == "float16" else torch.float32}
        images[precision] = walk.images(schedule, 0, 0, 4)
    large = Reuse("float16").halved({"b0.mlp": torch.tensor([7e4, -7e4, 1.0])})["b0.mlp"]
    assert large.tolist() == [65504, -65504, 1]
    difference = (images["float32"] - images["float16"]).abs().max()
    assert 0 < difference < 0.02
    common: dict[str, Any] = {"conditions": Labels(Digits()), "rungs": (32, 64)}
    half = Frechet(Digits(), SmallClassifier(steps=10), reuse_precision="float16", **common)
    assert half.describe() != Frechet(Digits(), SmallClassifier(steps=10), **common).describe()


@pytest.mark.parametrize("way", ["bisection", "greedy", "knapsack", "threshold"])
def test_gates_of_a_bit_each_are_chosen_as_of_options(way: Any) -> None:
    """As by the tables that any space has, without making them."""
    space = Branches(net(), uniform(4), guidance=1.5)
    loaded = drawn(net())
    gates = Gates(Pruner(steps=1, batch=1, finer=True), (way,))
    limited = problem(space, 0.7)
    names = loaded.blocks(loaded.full_arch, True)
    rng = np.random.default_rng(3)
    for _ in range(5):
        keep = torch.from_numpy(rng.uniform(0.02, 0.98, (3, len(names))).round(2))
        bits = {"keep": keep, "bits": torch.tensor(space.gates(names))}
        whole = space.decode((1,) * 18)
        tables = {"keep": keep, **meanings(limited, loaded, whole, True)}
        one, other = BitChooser(limited, bits, 0.3), Chooser(limited, tables, 0.3)
        assert one.budgets == other.budgets
        for share in (0.0, 0.3, 0.6, 1.0):
            least, most = one.budgets
            budget = least + share * (most - least)
            mine, theirs = one.genome(way, budget), other.genome(way, budget)
            assert space.cost(mine)["macs"] <= budget
            regret = [-np.log(1 - keep.numpy().ravel())[np.array(genome) == 0].sum() for genome in (mine, theirs)]
            assert mine == theirs or (way == "knapsack" and regret[0] == pytest.approx(regret[1]))
    assert gates.choosing == (way,)


def test_gates_of_a_bit_each_are_for_branches() -> None:
    space = Branches(net(), uniform(4), guidance=1.5)
    with pytest.raises(UserError, match="give gates for them, Pruner\\(finer=True\\)"):
        next(Gates(Pruner()).learn(problem(space, 0.6), drawn(net()), Digits().load(), 0))


def test_a_limit_on_time_is_refused_where_the_study_is_made() -> None:
    labels = Labels(Digits())
    evaluator = Timed(Frechet(Digits(), SmallClassifier(steps=10), conditions=labels, rungs=(32, 64)), Latency(batch=4))
    with pytest.raises(UserError, match="known in multiply-adds alone"):
        Study(
            name="timed",
            space=Branches(net(), uniform(4), guidance=1.5),
            supernet=net(),
            images=Digits(),
            training=Stages(()),
            evaluator=evaluator,
            searchers={"random": Random()},
            objectives=("fd", "latency_ms"),
            limits={"latency_ms": 5.0},
        )


def test_a_schedule_has_its_genome_again() -> None:
    """Of both kinds of space; one of another space is refused."""
    rng = np.random.default_rng(0)
    bits = Branches(net(), uniform(4), guidance=1.5)
    attention = tuple(f"b{i}.attn" for i in range(3))
    patterns = (Only(ALL), Every(2, (AROUND,)), Every(2, attention), Every(2))
    several = Stepwise(net(), uniform(6), (2, 2, 2), patterns=patterns, guidance=(None, 1.5), finer=True)
    spaces: tuple[Any, ...] = (bits, several)
    for space in spaces:
        for _ in range(10):
            genome = tuple(int(rng.integers(len(choice.options))) for choice in space.choices)
            schedule = space.decode(genome)
            assert space.decode(space.genome(schedule)) == schedule
    with pytest.raises(UserError, match="is none of this space"):
        bits.genome(several.decode((0,) * len(several.choices)))
    with pytest.raises(UserError, match="is none of this space: no options of interval"):
        several.genome(bits.decode((1,) * 18))
