"""Depth, width of each level and attention: the subnets of every combination against stock models and against the full net."""

from __future__ import annotations

import itertools
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel, UNet2DModel
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from benchmarks import published
from benchmarks.cost import count_with_fvcore
from evaluators.images import Digits
from evaluators.sampling import DDIM, DPMSolver
from nas.contracts import SAMPLER, WITHOUT_ATTENTION, UserError
from nas.genomes.genetics import IntervalCosts, cheapest, dearest
from nas.testing import check_space, check_supernet
from search_spaces.intervals import equal, linear_budgets, uniform
from search_spaces.networks.anatomy import predict
from search_spaces.networks.slices import Arch
from search_spaces.options import Options, Subnets
from search_spaces.patterns import Every
from search_spaces.stepwise import Stepwise
from search_spaces.supernet import Elastic
from search_spaces.training import Sandwich, Stages, ZeroInit
from tests.arithmetic import CALL
from tests.conftest import TINY
from tests.test_supernet import randomised

DOWN, UP, ATTENTION_DOWN, ATTENTION_UP = "DownBlock2D", "UpBlock2D", "AttnDownBlock2D", "AttnUpBlock2D"
CONFIGS: dict[str, dict[str, Any]] = {
    "two levels, attention": {
        **TINY,
        "layers_per_block": 2,
        "down_block_types": (DOWN, ATTENTION_DOWN),
        "up_block_types": (ATTENTION_UP, UP),
    },
    "three levels, three blocks, no attention": {
        **TINY,
        "block_out_channels": (8, 8, 16),
        "layers_per_block": 3,
        "down_block_types": (DOWN,) * 3,
        "up_block_types": (UP,) * 3,
        "add_attention": False,
    },
    "four levels, equal ones, scale shift": {
        **TINY,
        "sample_size": 16,
        "block_out_channels": (8, 16, 16, 16),
        "layers_per_block": 2,
        "down_block_types": (DOWN, ATTENTION_DOWN, DOWN, DOWN),
        "up_block_types": (UP, UP, ATTENTION_UP, UP),
        "resnet_time_scale_shift": "scale_shift",
    },
    "sampled by residual blocks": {
        **TINY,
        "block_out_channels": (8, 16, 16),
        "layers_per_block": 1,
        "down_block_types": (ATTENTION_DOWN, "ResnetDownsampleBlock2D", ATTENTION_DOWN),
        "up_block_types": (ATTENTION_UP, "ResnetUpsampleBlock2D", ATTENTION_UP),
        "downsample_type": "resnet",
        "upsample_type": "resnet",
    },
    "one block, no middle": {
        **TINY,
        "layers_per_block": 1,
        "mid_block_type": None,
        "down_block_types": (ATTENTION_DOWN, ATTENTION_DOWN),
        "up_block_types": (ATTENTION_UP, ATTENTION_UP),
    },
}


def elastic(config: dict[str, Any]) -> Elastic:
    """Everything elastic that this config allows."""
    depth = config["layers_per_block"]
    attends = any(block.startswith("Attn") for block in config["down_block_types"])
    return Elastic(
        {**config, "norm_num_groups": 2, "attention_head_dim": 4},
        widths=(0.5, 1.0),
        depths=tuple(range(1, depth + 1)),
        per_level=("width", "depth"),
        attention=attends,
    )


NETS = {name: elastic(config) for name, config in CONFIGS.items()}
LOADED = {name: randomised(net) for name, net in NETS.items()}


def inputs(net: Elastic) -> tuple[torch.Tensor, torch.Tensor]:
    shape = (2, net.anatomy.config["in_channels"], *net.anatomy.sample_size)
    return torch.randn(shape, generator=torch.Generator().manual_seed(2)), torch.tensor([3, 700])


@pytest.mark.parametrize("name", NETS)
@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_arch_is_a_stock_model_that_equals_the_supernet(name: str, data: st.DataObject, tmp_path: Path) -> None:
    net, loaded = NETS[name], LOADED[name]
    subnets = net.subnets(net.options)
    arch = subnets.flat(data.draw(st.integers(0, len(subnets) - 1)))
    x, t = inputs(net)
    expected = loaded.forward(arch, x, t)
    extracted = loaded.extract(arch)
    assert type(extracted) is (UNet2DConditionModel if len(set(arch.depths)) > 1 else UNet2DModel)
    extracted.save_pretrained(tmp_path)
    reloaded = type(extracted).from_pretrained(tmp_path, low_cpu_mem_usage=False).eval()
    assert torch.allclose(reloaded(x, t, None).sample, expected, atol=CALL)
    assert sum(p.numel() for p in reloaded.parameters()) == net.cost(arch).params


@pytest.mark.parametrize("name", NETS)
def test_costs_of_random_archs_equal_fvcore(name: str) -> None:
    net = NETS[name]
    subnets = net.subnets(net.options)
    for index in torch.randperm(len(subnets), generator=torch.Generator().manual_seed(0))[:6].tolist():
        arch = subnets.flat(index)
        cost = net.cost(arch)
        assert (cost.macs, cost.attention_macs, cost.params) == count_with_fvcore(net, arch)


@pytest.mark.parametrize("name", ["two levels, attention", "three levels, three blocks, no attention"])
def test_a_shallow_subnet_equals_the_full_net_with_its_other_blocks_made_identities(name: str) -> None:
    """A residual block whose branch is zero hands on its input; going up, whose shortcut hands on the trunk."""
    net = NETS[name]
    anatomy = net.anatomy
    for depths in {(1, 2, 3)[: anatomy.levels], (2, 1, 1)[: anatomy.levels], (1,) * anatomy.levels}:
        arch = Arch(anatomy.full.widths, depths)
        loaded = randomised(net)
        with torch.no_grad():
            for key, tensor in loaded.full.named_parameters():
                unit = anatomy.tensors[key].unit
                if unit is None or anatomy.place(unit, arch) is not None:
                    continue
                if ".conv2." in key or ".to_out." in key:
                    tensor.zero_()
                elif ".conv_shortcut." in key:
                    tensor.zero_()
                    if key.endswith("weight"):
                        tensor[:, : len(tensor), 0, 0] = torch.eye(len(tensor))
        x, t = inputs(net)
        assert torch.allclose(loaded.full(x, t).sample, loaded.forward(arch, x, t), atol=1e-4)


@pytest.mark.parametrize("name", ["two levels, attention", "three levels, three blocks, no attention"])
def test_a_deep_network_begins_as_the_shallow_one(name: str) -> None:
    net = NETS[name]
    loaded = net.initial(0)
    before = {key: tensor.clone() for key, tensor in loaded.full.named_parameters()}
    shallow = Arch(net.anatomy.full.widths, (1,) * net.anatomy.levels)
    x, t = inputs(net)
    expected = loaded.forward(shallow, x, t)
    list(ZeroInit().fit(loaded, Digits().load(), 0))
    assert torch.equal(loaded.forward(shallow, x, t), expected)
    assert torch.allclose(loaded.full(x, t).sample, expected, atol=CALL)
    changed = {key for key, tensor in loaded.full.named_parameters() if not torch.equal(tensor, before[key])}
    loaded.full.requires_grad_(True)
    loaded.full(x, t).sample.square().sum().backward()
    weights = dict(loaded.full.named_parameters())
    assert all(weights[key].grad.abs().max() > 0 for key in changed if key.endswith("weight")), "and can learn"


def test_where_there_is_nothing_to_begin_with_it_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"all subnets are as deep, depths=\(\)"):
        list(ZeroInit().fit(Elastic(TINY, widths=(0.5, 1.0)).initial(0), Digits().load(), 0))
    with pytest.raises(UserError, match="let it be the first"):
        Stages((Sandwich(steps=1), ZeroInit()))
    deep = {**TINY, "layers_per_block": 2}
    Elastic(deep, widths=(1.0,)).initial(0).full.save_pretrained(tmp_path)
    pretrained = Elastic.from_pretrained(tmp_path, widths=(1.0,), depths=(1, 2))
    with pytest.raises(UserError, match="have learned; leave it out"):
        list(ZeroInit().fit(pretrained.initial(0), Digits().load(), 0))


@settings(max_examples=100, deadline=None)
@given(costs=st.lists(st.integers(1, 50), min_size=3, max_size=20))
def test_subnets_spread_over_multiply_adds(costs: list[int]) -> None:
    """Against numbers of multiply-adds all over the range, each of which takes the nearest."""
    subnets = Subnets.__new__(Subnets)
    subnets.__dict__["macs"] = np.array([1, *costs, 50])
    chances = subnets.spread_over_macs
    assert chances.sum() == pytest.approx(1)
    least, most = min(costs), max(costs)
    taken = np.zeros(len(costs))
    for target in np.linspace(least, most, 2001) if most > least else [least]:
        away = np.abs(np.array(costs) - target)
        nearest = away == away.min()
        taken += nearest / nearest.sum()
    # Of each distinct cost two ends of its reach, each off by a point of the grid at most.
    assert np.abs(taken / taken.sum() - chances).max() <= 2 / 2000 + 1e-9


def test_a_subnet_without_attention_equals_the_full_net_with_silent_attention() -> None:
    net = NETS["two levels, attention"]
    loaded = randomised(net)
    arch = Arch((1.0, 1.0), attention=(True, False, False))
    with torch.no_grad():
        for key, tensor in loaded.full.named_parameters():
            if ".to_out." in key:
                tensor.zero_()
    x, t = inputs(net)
    assert torch.allclose(loaded.full(x, t).sample, predict(loaded.extract(arch), x, t), atol=CALL)
    assert not any("attentions" in key for key, _ in loaded.extract(arch).named_parameters())


def test_between_levels_made_different_an_identity_stands() -> None:
    net = NETS["four levels, equal ones, scale shift"]
    extracted = LOADED["four levels, equal ones, scale shift"].extract(Arch((1.0, 1.0, 0.5, 1.0)))
    weight = extracted.down_blocks[2].resnets[0].conv_shortcut.weight[:, :, 0, 0]
    assert weight.shape == (8, 16)
    assert weight.sum(1).tolist() == [1.0] * 8
    wider = extracted.down_blocks[3].resnets[0].conv_shortcut.weight[:, :, 0, 0]
    assert torch.equal(wider, weight.T)
    assert net.cost(Arch((1.0, 1.0, 0.5, 1.0))).params == sum(p.numel() for p in extracted.parameters())


@pytest.mark.parametrize("name", NETS)
def test_spaces_and_supernets_of_every_option_keep_the_laws(name: str) -> None:
    steps = uniform(4)
    space = Stepwise(NETS[name], steps, equal(steps, 2))
    check_space(space)
    check_supernet(LOADED[name], space, samples=3)


def test_two_intervals_may_choose_among_different_subnets() -> None:
    net = NETS["two levels, attention"]
    steps = uniform(4)
    narrow = Options(widths=(0.5,), depths=(1, 2))
    space = Stepwise(net, steps, (1, 3), (narrow, net.options))
    check_space(space)
    assert [c.name for c in space.choices if c.interval == 0] == ["interval00.width", "interval00.depth"]
    assert [c.name for c in space.choices if c.interval == 1] == [
        *("interval01.width0", "interval01.width1", "interval01.depth0", "interval01.depth1"),
        *("interval01.attention_level1", "interval01.attention_middle"),
    ]
    assert space.decode((0, 1, 1, 1, 1, 1, 1, 1)).archs == (Arch((0.5, 0.5)), Arch((1.0, 1.0)))


def test_levels_that_a_subnet_would_make_equal_are_kept_apart() -> None:
    net = Elastic(
        {**CONFIGS["three levels, three blocks, no attention"], "norm_num_groups": 2},
        widths=(0.25, 0.5, 1.0),
        per_level=("width",),
    )
    subnets = net.subnets(net.options)
    assert subnets.arch((2, 2, 1)).widths == (1.0, 1.0, 1.0)
    assert subnets.arch((1, 1, 0)).widths == (0.5, 0.5, 0.5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"widths": (0.3, 1.0)}, r"width 0\.3 of 8 channels of level 0 .* legal for level 0: 0\.25, 0\.5, 0\.75, 1"),
        ({"widths": (0.125, 1.0)}, r"legal for level 0"),
        ({"depths": (0, 2)}, r"depths=\(0, 2\): it should be greater than or equal to 1"),
        ({"depths": (1,)}, r"must include 2, the full network"),
        ({"groups": "size"}, r"needs groups='count'"),
        ({"attention": True, "config": {"add_attention": False}}, r"no attention to leave out"),
        (
            {"depths": (1, 2), "config": {"down_block_types": (DOWN, ATTENTION_DOWN), "downsample_type": "resnet"}},
            r"levels of different depth need downsample_type='conv'",
        ),
        ({"depths": (1, 2), "config": {"act_fn": "gelu"}}, r"levels of different depth need act_fn='silu' or 'swish'"),
        ({"widths": (0.5, 0.5, 1.0)}, "must be distinct"),
    ],
)
def test_illegal_options_are_refused_by_level_and_legal_values(settings: dict[str, Any], message: str) -> None:
    config = {
        **CONFIGS["two levels, attention"],
        "down_block_types": (DOWN,) * 2,
        "up_block_types": (UP,) * 2,
        **settings.pop("config", {}),
    }
    with pytest.raises(UserError, match=message):
        Elastic(config, **{"widths": (0.5, 1.0), "per_level": ("width", "depth"), **settings})


def test_an_interval_may_not_ask_for_what_the_supernet_lacks() -> None:
    net = Elastic(TINY, widths=(0.5, 1.0))
    with pytest.raises(UserError, match="interval 1 asks for"):
        Stepwise(net, uniform(2), (1, 1), (Options((0.5, 1.0)), Options((0.25, 1.0))))
    with pytest.raises(UserError, match="1 options for 2 intervals"):
        Stepwise(net, uniform(2), (1, 1), (Options((0.5, 1.0)),))


def test_budgets_of_intervals_are_kept_by_every_genome() -> None:
    net = NETS["two levels, attention"]
    steps = uniform(4)
    space = Stepwise(net, steps, equal(steps, 2), budgets=linear_budgets(2, 0.4))
    check_space(space)
    full = net.cost(net.anatomy.full).macs
    for costs, share in zip(space.interval_costs(), (0.7, 1.0), strict=True):
        assert costs.max() <= 2 * share * full
        assert costs.max() > 2 * (share - 0.2) * full
    with pytest.raises(UserError, match="cannot be met: the smallest subnet"):
        Stepwise(net, steps, equal(steps, 2), budgets=(0.01, 1.0))


THIRDS = {
    **TINY,
    "block_out_channels": (24, 48),
    "norm_num_groups": 8,
    "attention_head_dim": 8,
    "down_block_types": (DOWN, ATTENTION_DOWN),
    "up_block_types": (ATTENTION_UP, UP),
}


@pytest.mark.parametrize("together", [True, False])
def test_widths_can_be_numbers_of_channels_that_are_no_common_share(together: bool, tmp_path: Path) -> None:
    channels = ((8, 16, 24), (32, 16, 48)) if together else ((16, 24), (16, 32, 48))
    net = Elastic(THIRDS, channels=channels, per_level=() if together else ("width",))
    subnets = net.subnets(net.options)
    assert len(subnets) == (3 if together else 6)
    loaded = randomised(net)
    x, t = inputs(net)
    seen = set()
    for index in range(len(subnets)):
        arch = subnets.flat(index)
        stock = loaded.extract(arch)
        stock.save_pretrained(tmp_path / str(index))
        reloaded = UNet2DModel.from_pretrained(tmp_path / str(index), low_cpu_mem_usage=False).eval()
        seen.add(tuple(reloaded.config.block_out_channels))
        assert torch.allclose(reloaded(x, t).sample, loaded.forward(arch, x, t), atol=CALL)
        cost = net.cost(arch)
        assert (cost.macs, cost.attention_macs, cost.params) == count_with_fvcore(net, arch)
    every = {(8, 16), (16, 32), (24, 48)} if together else {(a, b) for a in (16, 24) for b in (16, 32, 48)}
    # Levels that the full net has at different widths are never made equal: their shortcut would vanish.
    assert seen == {(a, b) for a, b in every if a != b}
    names = {choice.name: choice.options for choice in Stepwise(net, uniform(2), (2,)).choices}
    assert names == (
        {"interval00.width": ("8/16", "16/32", "24/48")}
        if together
        else {"interval00.width0": (16, 24), "interval00.width1": (16, 32, 48)}
    )
    check_space(Stepwise(net, uniform(4), (2, 2)))
    check_supernet(loaded, Stepwise(net, uniform(4), (2, 2)), samples=3)


def test_a_published_latent_network_has_widths_in_sevenths() -> None:
    """LDM-4: 224, 448, 672, 896 channels, heads of 32, 32 norm groups."""
    config = published.NETWORKS["LDM-4 bedrooms, FFHQ, CelebA-HQ"].config
    with pytest.raises(UserError, match=r"legal for all levels: 0\.142857"):
        Elastic(config, widths=(0.5, 1.0))
    net = Elastic(config, channels=tuple((4 * c // 7, 5 * c // 7, c) for c in (224, 448, 672, 896)))
    shares = [net.cost(net.subnets(net.options).flat(i)).macs / net.cost(net.anatomy.full).macs for i in range(3)]
    assert shares == pytest.approx([0.339, 0.521, 1.0], abs=1e-3)


def test_impossible_channels_are_named() -> None:
    for channels, words in (
        (((8, 24),), "channels for 1 levels; the network has 2"),
        (((8, 16), (16, 48)), r"channels \(8, 16\) of level 0 must include 24"),
        (((8, 24), (16, 48, 64)), "are chosen together, so every level needs as many"),
        (
            ((8, 24), (20, 48)),
            "channels 8/20: .*not a multiple of norm_num_groups=8; legal: level 0: 8, 16, 24; level 1: 8, 16, 24, 32, 40, 48",
        ),
        (((8, 8, 24), (16, 32, 48)), "must be distinct"),
    ):
        with pytest.raises(UserError, match=words):
            Elastic(THIRDS, channels=channels)
    with pytest.raises(UserError, match="say the same thing"):
        Elastic(THIRDS, widths=(0.5, 1.0), channels=((8, 24), (16, 48)))
    net = Elastic(THIRDS, channels=((8, 24), (16, 48)))
    with pytest.raises(UserError, match="the supernet is trained for"):
        Stepwise(net, uniform(2), (2,), Options(channels=((16, 24), (32, 48))))
    Stepwise(net, uniform(2), (2,), Options(channels=((8, 24), (16, 48))))
    alike = Elastic({**THIRDS, "block_out_channels": (32, 64)}, channels=((16, 32), (32, 64)), per_level=("width",))
    with pytest.raises(UserError, match="where level 0 has 1 of its width all options of level 1 are as wide as it"):
        Stepwise(alike, uniform(2), (2,), Options(channels=((16, 32), (32,)), per_level=("width",)))
    Stepwise(alike, uniform(2), (2,), Options(channels=((16,), (32,)), per_level=("width",)))
    several = Elastic(THIRDS, channels=((8, 16, 24), (16, 32, 48)))
    with pytest.raises(UserError, match="the supernet is trained for"):  # 16 and 48 are never trained together
        Stepwise(several, uniform(2), (2,), Options(channels=((8, 16), (16, 48))))
    Stepwise(net, uniform(2), (2,), Options(widths=(1.0,)))
    with pytest.raises(UserError, match="level 0 has 24 channels, so it cannot have 32"):
        net.subnets(Options(channels=((24, 32), (16, 48))))


def test_a_schedules_cost_is_told_with_and_without_attention_products() -> None:
    """By tables and by steps, against fvcore's counts of its networks."""
    net = NETS["two levels, attention"]
    steps, counted = uniform(4), cache(lambda arch: count_with_fvcore(net, arch))
    for space in (
        Stepwise(net, steps, (2, 2)),
        Stepwise(net, steps, (2, 2), patterns=(Every(1), Every(2)), deterministic=False),
    ):
        for genome in (cheapest(space), dearest(space)):
            schedule = space.decode(genome)
            macs = without = 0
            for step in schedule.steps:
                if net.macs(step):
                    whole, products, _ = counted(Arch(*step.arch))
                    macs, without = macs + whole, without + whole - products
            full, products, _ = counted(net.anatomy.full)
            cost = space.cost(genome)
            assert cost["macs"] == macs
            assert cost[WITHOUT_ATTENTION] == pytest.approx(without / (4 * (full - products)), rel=1e-12)
            assert space.cost(dearest(space))[WITHOUT_ATTENTION] == 1.0
    assert WITHOUT_ATTENTION not in Stepwise(NETS["three levels, three blocks, no attention"], steps, (4,)).cost(
        (0,) * 6
    )


def test_what_is_kept_to_price_subnets_does_not_grow_with_their_widths() -> None:
    """Neighbouring levels of equal width have shortcuts that stand only where they are cut unequally."""
    config = {**TINY, "block_out_channels": (16, 16, 16), "down_block_types": ("DownBlock2D",) * 3}
    net = Elastic(
        {**config, "up_block_types": ("UpBlock2D",) * 3},
        (0.25, 0.5, 0.75, 1.0),
        per_level=("width",),
    )
    archs = [Arch(widths) for widths in itertools.product((0.25, 0.5, 0.75, 1.0), repeat=3)]
    costs = {net.cost(arch).macs for arch in archs}
    assert len(costs) > 30
    assert len(net.cost._known) <= 4


def test_intervals_of_one_subnet_have_a_gene_though_samplers_are_chosen_in_the_first() -> None:
    net = Elastic(TINY, widths=(0.5, 1.0))
    samplers = (DDIM(), DPMSolver())
    two, one = Options((0.5, 1.0)), Options((1.0,))
    # In the first there is the sampler to choose, and in that alone.
    assert [choice.name for choice in Stepwise(net, uniform(6), (6,), one, samplers=samplers).choices] == [SAMPLER]
    for options in (one, (two, one, two)):
        space = Stepwise(net, uniform(6), (2, 2, 2), options, samplers=samplers)
        check_space(space)
        assert len(IntervalCosts(space).genes) == len(space.interval_costs()) == 3
