"""Blocks reused from the step before: against stock models, fvcore and longer DDIM steps; patterns as genes; exported folders."""

from __future__ import annotations

import itertools
import runpy
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import UNet2DModel
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.cost import macs_of
from evaluators.frechet import Frechet
from evaluators.images import Digits
from evaluators.proxies import DenoisingLoss, TrajectoryDistance
from evaluators.sampling import DDIM, DDPM, sample
from evaluators.trajectories import Trajectories
from nas.contracts import Finer, Genome, Problem, Schedule, Step, UserError
from nas.genomes.genetics import IntervalCosts, check_reachable
from nas.genomes.timed import TimedSpace, calls, key
from nas.handover.export import export
from nas.study import Study
from nas.testing import check_space
from search_spaces.intervals import per_step, uniform
from search_spaces.networks.anatomy import predict
from search_spaces.networks.slices import Arch
from search_spaces.options import Options
from search_spaces.patterns import Every, Only, Subset, legal
from search_spaces.shipped.graph import UNetGraph, graph_of
from search_spaces.shipped.reuse import run
from search_spaces.stepwise import Stepwise
from search_spaces.supernet import Elastic
from tests.arithmetic import CALL, SAMPLES
from tests.conftest import TINY
from tests.test_supernet import CONFIGS, NO_ATTENTION, RICH, inputs, randomised

DEEP = {
    **TINY,
    "block_out_channels": (8, 8, 16, 16),
    "down_block_types": ("DownBlock2D", "DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
    "layers_per_block": 2,
}


class Partly(torch.nn.Module):
    """A call with reuse as a module, for fvcore; it returns all that it computes, or tracing would leave out what nobody reads."""

    def __init__(self, net: Any, reuse: tuple[str, ...], cache: Any) -> None:
        super().__init__()
        self.net, self.reuse, self.cache = net, reuse, cache

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> tuple[torch.Tensor, ...]:
        graph = graph_of(self.net)
        running = graph.collapse(graph.expand(graph.blocks) - graph.expand(self.reuse))
        prediction, kept = run(self.net, x, t, self.reuse, running, self.cache)
        return prediction, *kept.values()


# ------------------------------------------------------------------------------------------------------------- one step


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_with_nothing_reused_it_is_the_stock_model_bit_for_bit(config: dict[str, Any]) -> None:
    net = Elastic(config, widths=(0.5, 1.0))
    model = randomised(net).full
    x, t, classes = inputs(net)
    with torch.no_grad():
        expected = model(x, t, **classes).sample
        prediction, kept = run(model, x, t, keep=graph_of(model).blocks, condition=classes)
    assert torch.equal(prediction, expected)
    assert set(kept) == {*graph_of(model).names(finer=True), "prediction"}


def test_with_levels_of_different_depth_too() -> None:
    config = {
        **RICH,
        "num_class_embeds": None,
        "downsample_type": "conv",
        "upsample_type": "conv",
        "attention_head_dim": 4,
    }
    net = Elastic(config, (0.5, 1.0), depths=(1, 2), per_level=("width", "depth"))
    loaded = randomised(net)
    model = loaded.extract(Arch((0.5, 1.0, 0.5), (1, 2, 1)))
    x, t, _ = inputs(net)
    with torch.no_grad():
        assert torch.equal(run(model, x, t)[0], predict(model, x, t))


@pytest.mark.parametrize("finer", [False, True])
def test_reused_blocks_hand_out_what_they_did_the_step_before(finer: bool) -> None:
    """The reference is the stock model, whose reused modules are made to return their old outputs."""
    net = Elastic(DEEP, widths=(0.5, 1.0))
    model = randomised(net).full
    graph = graph_of(model)
    before, now = torch.randn((2, 3, 1, 8, 8), generator=torch.Generator().manual_seed(5)).unbind()
    old: dict[str, Any] = {}
    hooks = [module.register_forward_hook(_keep(old, name)) for name, module in _modules(model, finer).items()]
    with torch.no_grad():
        first, cache = run(model, before, 900, keep=graph.blocks)
        model(before, 900)
        for hook in hooks:
            hook.remove()
        assert torch.equal(first, model(before, 900).sample)
        rng = np.random.default_rng(0)
        sets = list(graph.legal_sets(finer))
        for running in [sets[i] for i in rng.choice(len(sets), 20)]:
            if not running:
                continue
            reuse = graph.collapse(graph.expand(graph.blocks) - graph.expand(running))
            stubs = [
                module.register_forward_hook(_answer(old[name]))
                for name, module in _modules(model, finer).items()
                if not graph.expand([name]) & graph.expand(running)
            ]
            expected = model(now, 500).sample
            for hook in stubs:
                hook.remove()
            assert torch.equal(run(model, now, 500, reuse, cache=cache)[0], expected), running


def _modules(model: UNet2DModel, finer: bool) -> dict[str, torch.nn.Module]:
    """Whose outputs are those of the blocks, or of the branches."""
    if not finer:
        found = {f"d{i}": block for i, block in enumerate(model.down_blocks)}
        return {**found, "mid": model.mid_block, **{f"u{i}": block for i, block in enumerate(model.up_blocks)}}
    found = {"mid": model.mid_block}
    for side, blocks in (("d", model.down_blocks), ("u", model.up_blocks)):
        for i, block in enumerate(blocks):
            last = getattr(block, "attentions", None) or block.resnets
            found |= {f"{side}{i}.{j}": module for j, module in enumerate(last)}
            if side == "u" and block.upsamplers is not None:
                found[f"u{i}.{len(block.resnets) - 1}"] = block.upsamplers[0]
            if side == "d" and block.downsamplers is not None:
                found[f"d{i}.down"] = block.downsamplers[0]
    return found


def _keep(outputs: dict[str, Any], name: str) -> Any:
    def hook(module: Any, arguments: Any, output: Any) -> None:
        outputs[name] = output

    return hook


def _answer(output: Any) -> Any:
    return lambda module, arguments, computed: output


def test_macs_equal_what_fvcore_counts_of_what_is_executed() -> None:
    net = Elastic(DEEP, widths=(0.5, 1.0))
    arch = Arch((0.5, 1.0, 1.0, 0.5))
    model = randomised(net).extract(arch)
    graph = net.cost.graph(arch)
    x = torch.zeros(1, 1, 8, 8)
    with torch.no_grad():
        _, cache = run(model, x, 900, keep=graph.blocks)
    for finer in (False, True):
        sets = list(graph.legal_sets(finer))
        chosen = np.random.default_rng(1).choice(len(sets), 20, replace=len(sets) < 20)
        for running in [sets[i] for i in chosen]:
            reuse = graph.collapse(graph.expand(graph.blocks) - graph.expand(running))
            counted, _ = macs_of(Partly(model, reuse, cache), (x, torch.tensor([500]))) if running else (0, 0)
            assert net.cost.macs(arch, reuse) == counted, running


@pytest.mark.parametrize("config", [DEEP, RICH, NO_ATTENTION])
def test_branches_cost_together_what_the_subnet_costs(config: dict[str, Any]) -> None:
    net = Elastic(config, widths=(0.5, 1.0))
    for arch in (net.uniform(0.5), net.uniform(1.0)):
        assert sum(cost.macs for cost in net.cost.branches(arch).values()) == net.cost(arch).macs
        assert set(net.cost.branches(arch)) == {*net.cost.graph(arch).names(finer=True), ""}


@pytest.mark.parametrize(("levels", "count"), [(1, 5), (2, 11), (3, 23), (4, 47)])
def test_legal_sets_are_those_in_which_every_block_is_read(levels: int, count: int) -> None:
    graph = UNetGraph((1,) * levels)
    listed = [frozenset(names) for names in graph.legal_sets()]
    assert len(listed) == len(set(listed)) == count
    every = itertools.chain.from_iterable(itertools.combinations(graph.blocks, n) for n in range(len(graph.blocks) + 1))
    live = {frozenset(names) for names in every if graph.live(names) == graph.expand(names)}
    assert live == set(listed)


@pytest.mark.parametrize(
    ("graph", "finer"), [(UNetGraph((1, 1)), True), (UNetGraph((1,), attends=((True,), (True,))), "layers")]
)
def test_legal_sets_of_what_is_finer_are_those_in_which_each_is_read(graph: UNetGraph, finer: Finer) -> None:
    names = graph.names(finer)
    every = itertools.chain.from_iterable(itertools.combinations(names, n) for n in range(len(names) + 1))
    live = {frozenset(chosen) for chosen in every if graph.live(chosen, finer) == graph.expand(chosen)}
    listed = [frozenset(chosen) for chosen in graph.legal_sets(finer)]
    assert live == set(listed)
    assert len(listed) == len(live)


def test_stable_diffusion_has_the_parts_that_dip_go_gates() -> None:
    """DiP-GO's three layouts for Stable Diffusion 1.5."""
    attends = (True, True, True, False)
    graph = UNetGraph((2,) * 4, attends=(attends, attends[::-1]))
    assert [len(graph.names(finer)) for finer in (False, True, "layers")] == [9, 24, 42]


def test_what_is_not_kept_cannot_be_reused(tiny_net: Elastic) -> None:
    model = tiny_net.initial(0).full
    with pytest.raises(ValueError, match=r"output of d0\.down is to be reused, but none is kept"):
        run(model, torch.zeros(1, 1, 8, 8), 5, reuse=("d0",))


@pytest.mark.parametrize("finer", [False, True])
def test_gates_of_one_run_and_gates_of_zero_reuse(finer: bool) -> None:
    net = Elastic(DEEP, widths=(0.5, 1.0))
    loaded = randomised(net)
    arch = net.uniform(1.0)
    gated, names = loaded.gated(arch), loaded.blocks(arch, finer)
    before, now = torch.randn((2, 3, 1, 8, 8), generator=torch.Generator().manual_seed(5)).unbind()
    with torch.no_grad():
        first, cache = gated(before, 900, {}, None)
        plain = loaded.denoiser(Step(500, arch))
        assert torch.equal(first, plain(before, 900)[0])
        ones = {name: torch.ones(()) for name in names}
        assert torch.allclose(gated(now, 500, ones, cache)[0], plain(now, 500)[0], atol=CALL)
        graph = net.cost.graph(arch)
        for running in list(graph.legal_sets(finer))[1 :: 97 if finer else 7]:
            gates = {name: torch.tensor(float(name in running)) for name in names}
            reuse = graph.collapse(graph.expand(graph.blocks) - graph.expand(running))
            expected, _ = run(loaded.full, now, 500, reuse, cache=cache)
            assert torch.allclose(gated(now, 500, gates, cache)[0], expected, atol=CALL), running


# ----------------------------------------------------------------------------------------------------------- schedules


@pytest.mark.parametrize("clip", [False, True])
def test_a_step_that_computes_nothing_equals_the_longer_ddim_step(tiny_net: Elastic, clip: bool) -> None:
    loaded = randomised(tiny_net)
    model, sampler = loaded.full.double(), DDIM(clip)
    blocks = graph_of(model).blocks
    held = [(900, ()), (800, blocks), (650, blocks), (400, ()), (100, blocks)]
    x = torch.randn((4, 1, 8, 8), generator=torch.Generator().manual_seed(3), dtype=torch.float64)

    def final(steps: list[tuple[int, Any]]) -> torch.Tensor:
        state, cache = x, None
        for number, (t, reuse) in enumerate(steps):
            after = steps[number + 1] if number + 1 < len(steps) else (-1, ())
            with torch.no_grad():
                prediction, cache = run(model, state, t, reuse, after[1], cache)
            abar = [*loaded.alphas_cumprod, 1.0]
            state, _ = sampler.update(state, prediction, float(abar[t]), float(abar[after[0]]), None)
        return state

    longer = [step for step in held if not step[1]]
    assert torch.allclose(final(held), final(longer), atol=1e-12, rtol=0)


def space_of(net: Elastic, **settings: Any) -> Stepwise:
    steps = uniform(6)
    return Stepwise(net, steps, **({"intervals": per_step(steps), "patterns": legal(net.anatomy.levels)} | settings))


DEEP_NET = Elastic(DEEP, widths=(0.5, 1.0))
PATTERNS = (
    Every(1),
    Every(2),
    Every(2, ("d0", "u3")),
    Every(3, ("d0", "d1", "u2", "u3")),
    Subset(1),
    Subset(2, "quadratic"),
)
SPACES = {
    "a legal set for each step": space_of(DEEP_NET, options=Options((1.0,))),
    "sets and widths": space_of(DEEP_NET),
    "patterns and widths": space_of(DEEP_NET, intervals=(3, 3), patterns=PATTERNS),
    "held": space_of(DEEP_NET, options=Options((1.0,)), deterministic=False),
    "experts": space_of(Elastic(DEEP, (0.5, 1.0), experts=(400,)), intervals=(2, 4), patterns=PATTERNS[:4]),
    "branches": space_of(
        Elastic({**DEEP, "layers_per_block": 1}, (0.5, 1.0), depths=(1,)),
        finer=True,
        patterns=tuple(Only(names) for names in (("all",), (), ("u3.1",), ("d0.0", "u3.0", "u3.1"))),
    ),
}
ADDITIVE = ("a legal set for each step", "patterns and widths", "held")


@pytest.mark.parametrize("name", SPACES)
def test_spaces_with_reuse_keep_the_laws(name: str) -> None:
    check_space(SPACES[name], samples=60)


@pytest.mark.parametrize("name", SPACES)
@given(data=st.data())
def test_every_genome_is_a_schedule_that_runs(name: str, data: st.DataObject) -> None:
    space = SPACES[name]
    genome = tuple(data.draw(st.integers(0, len(choice.options) - 1)) for choice in space.choices)
    schedule = space.decode(genome)
    assert (schedule.timesteps[0], schedule.steps[0].reuse) == (space.timesteps[0], ())
    before = None
    for step in schedule.steps:
        graph = space.net.cost.graph(Arch(*step.arch))
        running = graph.expand(graph.blocks) - graph.expand(step.reuse)
        assert graph.live(running, space.finer) == running
        assert running or not space.deterministic
        assert not step.reuse or before == step.arch
        before = step.arch
    macs = sum(space.net.cost.macs(Arch(*step.arch), step.reuse) for step in schedule.steps)
    assert space.cost(genome)["macs"] == macs
    added = IntervalCosts(space).total(genome)
    assert added == macs if name in ADDITIVE else added >= macs


@pytest.mark.parametrize("name", SPACES)
@given(data=st.data())
def test_times_of_calls_add_up_to_at_most_what_intervals_take(name: str, data: st.DataObject) -> None:
    space = SPACES[name]
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    blocks = {arch: space.net.cost.graph(Arch(*arch)).blocks for arch in {step.arch for step in calls(space)}}
    held = {key(step) for step in calls(space) if set(step.reuse) == set(blocks[step.arch])}
    times = {key(step): 0.0 if key(step) in held else float(rng.random()) for step in calls(space)}
    timed = TimedSpace(space, times)
    genome = tuple(data.draw(st.integers(0, len(choice.options) - 1)) for choice in space.choices)
    running = [s for s in space.decode(genome).steps if space.net.cost.macs(Arch(*s.arch), s.reuse)]
    total = sum(min(times[key(step)], times[key(Step(0, step.arch))]) for step in running)
    assert timed.cost(genome)["latency_ms"] == pytest.approx(total, abs=1e-5)
    added = IntervalCosts(timed).total(genome) / 1e6
    assert added == pytest.approx(total, abs=1e-5) if name in ADDITIVE[:1] else added >= total - 1e-5


def test_genomes_that_come_to_the_same_share_a_digest() -> None:
    space = SPACES["sets and widths"]
    sets = [frozenset(str(label).split()) for label in space.choices[1].options]
    nothing, outer = sets.index(frozenset({"nothing"})), sets.index(frozenset({"u3"}))
    whole = len(sets) - 1

    def digest(*genes: tuple[int, int]) -> str:
        rest = ((1, whole),) * (6 - len(genes))
        return space.decode(tuple(itertools.chain.from_iterable((*genes, *rest)))).digest

    assert digest((1, nothing)) == digest((1, whole))  # the first step computes everything
    assert digest((1, whole), (0, outer)) == digest((1, whole), (0, whole))  # nothing to reuse of another width
    assert digest((1, whole), (0, nothing)) == digest((1, whole), (1, nothing))  # a step left out has no width
    assert digest((1, whole), (1, outer)) != digest((1, whole), (1, whole))


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        ((Every(2, ("d0", "u3")),), "names u3; the network's blocks are d0, d1, mid, u0, u1"),
        (legal(4), "the network's blocks are"),
        ((Only(("d0",)),), "would run nothing, since nobody reads d0; name u1"),
        ((Only(("u1.1",)),), "branches with finer=True"),
    ],
)
def test_patterns_that_the_network_cannot_have_are_refused(
    tiny_net: Elastic, patterns: tuple[Any, ...], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        assert space_of(tiny_net, intervals=(3, 3), patterns=(*patterns, Every(1))).choices


def test_a_limit_below_what_intervals_surely_cost_is_refused(tiny_net: Elastic) -> None:
    """Where each interval may have another subnet, reuse across them is not counted on, and a search would find nothing."""
    space = space_of(tiny_net, patterns=(Only(("d0", "u1")), Every(1)))
    assert space.cost((0,) * 12)["macs_share"] < 0.1
    with pytest.raises(UserError, match="searches keep to what intervals cost whatever the one before them runs"):
        check_reachable(Problem(space, ("fd", "macs"), {"macs_share": 0.06}))


def test_subsets_of_steps_are_uniform_or_denser_at_the_clean_end() -> None:
    def kept(pattern: Subset, count: int) -> list[int]:
        return [place for place, computed in enumerate(pattern.steps(count)) if computed]

    assert kept(Subset(5), 10) == [0, 2, 4, 6, 8]
    for wanted in (1, 3, 7, 10):
        places = kept(Subset(wanted, "quadratic"), 10)
        gaps = np.diff(places)
        assert (len(places), places[0]) == (wanted, 0)
        assert (np.diff(gaps) <= 0).all()
    with pytest.raises(UserError, match="11 steps asks for more than the interval's 10"):
        Subset(11).steps(10)


@pytest.mark.parametrize("sampler", [DDIM(), DDPM()])
def test_shared_beginnings_with_reuse_change_no_bit(sampler: Any) -> None:
    space = SPACES["held" if sampler.stochastic else "a legal set for each step"]
    loaded = randomised(DEEP_NET)
    trajectories = Trajectories(loaded, sampler)
    rng = np.random.default_rng(2)
    genomes: list[Genome] = [tuple(int(rng.integers(len(c.options))) for c in space.choices) for _ in range(4)]
    genomes += [(*genome[:-2], *genomes[0][-2:]) for genome in genomes[1:]]
    for genome in genomes:
        schedule, before = space.decode(genome), replace(trajectories.meter)
        assert torch.equal(trajectories.images(schedule, 7, 0, 4), sample(loaded, schedule, sampler, 7, 0, 4))
        spent = trajectories.meter.spent_since(before)
        assert spent["macs"] + spent["cached_macs"] == 4 * space.cost(genome)["macs"]
    assert trajectories.meter.cached_macs > 0


def test_scores_of_single_steps_refuse_reuse(tiny_study: Study, tiny_run: Path, tiny_net: Elastic) -> None:
    full = tiny_net.uniform(1.0)
    schedule = Schedule((Step(900, full), Step(400, full, ("d0",))))
    loaded = tiny_net.load(tiny_run / "supernet", "cpu")
    for proxy in (DenoisingLoss(Digits(), rungs=(8,)), TrajectoryDistance(Digits(), rungs=(8,))):
        with pytest.raises(UserError, match="cannot score blocks reused"):
            proxy.load(loaded, tiny_run)(schedule, 8, 0)


def test_a_study_with_a_noisy_sampler_must_hold_idle_steps(tiny_study: Study, tiny_net: Elastic) -> None:
    noisy = Frechet(Digits(), rungs=(32, 64), sampler=DDPM())
    with pytest.raises(UserError, match="deterministic=False"):
        replace(tiny_study, space=space_of(tiny_net), evaluator=noisy)
    replace(tiny_study, space=space_of(tiny_net, deterministic=False), evaluator=noisy)


# ------------------------------------------------------------------------------------------------------------ exported


@pytest.mark.parametrize("name", ["a legal set for each step", "held", "patterns and widths"])
def test_an_exported_schedule_with_reuse_samples_as_ours(name: str, tmp_path: Path) -> None:
    from diffusers import DiffusionPipeline

    space, loaded = SPACES[name], DEEP_NET.initial(0)
    rng = np.random.default_rng(4)
    schedule = space.decode(tuple(int(rng.integers(len(choice.options))) for choice in space.choices))
    assert any(step.reuse for step in schedule.steps)
    sampler = DDPM() if name == "held" else DDIM()
    folder = tmp_path / "model"
    export(loaded, schedule, sampler.describe(), {}, folder)
    pipeline = DiffusionPipeline.from_pretrained(str(folder), custom_pipeline=str(folder), trust_remote_code=True)
    pipeline.set_progress_bar_config(disable=True)
    ours = sample(loaded, schedule, sampler, 3, 0, 5)
    assert torch.allclose(pipeline(5, seed=3, output_type="pt").images * 2 - 1, ours, atol=SAMPLES)
    one = [torch.Generator().manual_seed(seed) for seed in range(3)]
    alone = torch.Generator().manual_seed(2)
    assert torch.allclose(
        pipeline(3, generator=one, output_type="pt").images[2:],
        pipeline(1, generator=[alone], output_type="pt").images,
        atol=SAMPLES,
    )
    with pytest.raises(ValueError, match="leaves out steps whose blocks later ones reuse"):
        pipeline(num_inference_steps=2)
    with pytest.raises(ValueError, match="read no text"):
        pipeline(5, negative_prompt="a bag")
    with pytest.warns(UserWarning, match="guidance_scale=7.5 is of no effect"):
        pipeline(1, guidance_scale=7.5)
    for index in range(len(schedule.archs)):
        getattr(pipeline, f"unet_{index}").enable_group_offload(
            onload_device=torch.device("cpu"),
            offload_device=torch.device("cpu"),
            offload_type="block_level",
            num_blocks_per_group=1,
        )
    with pytest.raises(ValueError, match=r"of unet_\d is offloaded by itself.*enable_model_cpu_offload"):
        pipeline(1)


@pytest.mark.long
def test_the_exported_script_runs_by_itself(tmp_path: Path) -> None:
    schedule = SPACES["a legal set for each step"].decode((46, 20, 5, 0, 30, 46))
    export(randomised(DEEP_NET), schedule, DDIM().describe(), {}, tmp_path / "model")
    script, picture = tmp_path / "model" / "sample.py", tmp_path / "samples.png"
    subprocess.run([sys.executable, script, "--count", "3", "--to", picture], check=True, cwd=tmp_path)
    assert picture.stat().st_size > 0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--count", "0"), "--count 0 must be at least 1"),
        (("--seed", "-1"), "--seed -1 at least 0"),
        (("--prompt",), "--prompt has one text or more"),
        (("--to", "nowhere/x.png"), "--to nowhere/x.png must be a picture's name"),
        (("--to", "x.txt"), "--to x.txt must be a picture's name"),
        (("--device", "meteor"), "--device meteor cannot be used"),
        (("--labels", "3"), "--labels is of no use: the networks read no such thing"),
        (("--prompt", "a bag"), "--prompt is of no use"),
        (("--negative-prompt", "a bag"), "--negative-prompt is of no use"),
        (("--guidance-scale", "2"), "--guidance-scale is of no use: no step of the schedule is guided"),
    ],
)
def test_the_exported_script_says_what_it_cannot_do(
    options: tuple[str, ...], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    net = randomised(DEEP_NET)
    export(net, SPACES["a legal set for each step"].decode((46,) * 6), DDIM().describe(), {}, tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path / "model"))
    monkeypatch.setattr(sys, "argv", ["sample.py", *options])
    try:
        with pytest.raises(SystemExit, match=words):
            runpy.run_path(str(tmp_path / "model" / "sample.py"), run_name="__main__")
    finally:
        sys.modules.pop("exported", None)


def test_given_noise_says_how_many_images_there_are(tmp_path: Path) -> None:
    """Each with noise of its own on the way."""
    sampler = {"class": "DDPM", "variance": "fixed_small", "clip": False}
    export(randomised(DEEP_NET), SPACES["a legal set for each step"].decode((46,) * 6), sampler, {}, tmp_path / "model")
    from diffusers import DiffusionPipeline

    model = str(tmp_path / "model")
    pipeline = DiffusionPipeline.from_pretrained(model, custom_pipeline=model, trust_remote_code=True)
    drawn = torch.randn(1, *pipeline.config.schedule["shape"]).expand(3, -1, -1, -1)
    images = pipeline(latents=drawn, seed=0, output_type="pt").images
    assert torch.equal(images, pipeline(latents=drawn, batch_size=3, seed=0, output_type="pt").images)
    assert not torch.equal(images[0], images[1])
    with pytest.raises(ValueError, match="latents are of shape"):
        pipeline(latents=drawn, batch_size=2, seed=0)
