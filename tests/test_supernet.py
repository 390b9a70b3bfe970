"""The elastic UNet against stock diffusers models and fvcore."""

from __future__ import annotations

import copy
import subprocess
import sys
from typing import Any

import pytest
import torch
from diffusers import UNet2DModel
from torch.func import functional_call

from benchmarks.cost import count_with_fvcore
from nas.base.memory import keep_freed_memory
from nas.contracts import Step, UserError
from nas.testing import check_space, check_supernet
from search_spaces.intervals import equal, leading, linspace, per_step, quadratic, uniform
from search_spaces.networks.anatomy import skeleton
from search_spaces.networks.slices import Arch
from search_spaces.stepwise import Stepwise
from search_spaces.supernet import Elastic
from tests.arithmetic import CALL
from tests.conftest import TINY

RICH: dict[str, Any] = {
    **TINY,
    "sample_size": (8, 16),
    "in_channels": 3,
    "out_channels": 3,
    "block_out_channels": (8, 16, 16),
    "layers_per_block": 2,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    "resnet_time_scale_shift": "scale_shift",
    "downsample_type": "resnet",
    "upsample_type": "resnet",
    "downsample_padding": 0,
    "attention_head_dim": None,
    "num_class_embeds": 10,
    "time_embedding_dim": 48,
    "freq_shift": 1,
    "flip_sin_to_cos": False,
    "attn_norm_num_groups": 2,
}
PLAIN = {**TINY, "mid_block_type": None, "down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
NO_ATTENTION = {**TINY, "add_attention": False, "norm_num_groups": 4}
NO_MIDDLE_NORM = {**TINY, "resnet_time_scale_shift": "scale_shift"}
SAMPLED_BY_RESNETS = {
    **TINY,
    "block_out_channels": (8, 16, 16),
    "down_block_types": ("ResnetDownsampleBlock2D", "AttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("ResnetUpsampleBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    "downsample_type": "resnet",
    "upsample_type": "resnet",
    "resnet_time_scale_shift": "scale_shift",
}
CONFIGS = {
    "sampled by resnets": SAMPLED_BY_RESNETS,
    "tiny": TINY,
    "rich": RICH,
    "no middle norm": NO_MIDDLE_NORM,
    "plain": PLAIN,
    "no attention": NO_ATTENTION,
}


def randomised(net: Elastic) -> Any:
    """Initial weights with every bias and norm made random, so that a misplaced slice shows."""
    loaded = net.initial(0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in loaded.full.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    loaded.full.eval().requires_grad_(False)
    return loaded


def inputs(net: Elastic) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(2)
    shape = (3, net.anatomy.config["in_channels"], *net.anatomy.sample_size)
    classes = {"class_labels": torch.tensor([1, 5, 9])} if net.anatomy.config["num_class_embeds"] else {}
    return torch.randn(shape, generator=generator), torch.tensor([0, 400, 999]), classes


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_full_width_is_the_stock_model(config: dict[str, Any]) -> None:
    net = Elastic(config, widths=(0.5, 1.0))
    loaded = randomised(net)
    stock = UNet2DModel(**config).eval()
    stock.load_state_dict(loaded.full.state_dict())
    x, t, classes = inputs(net)
    with torch.no_grad():
        assert torch.equal(loaded.forward(net.uniform(1.0), x, t, classes), stock(x, t, **classes).sample)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_training_slices_and_materialised_copies_agree(config: dict[str, Any]) -> None:
    net = Elastic(config, widths=(0.5, 1.0))
    loaded = randomised(net)
    x, t, classes = inputs(net)
    extracted = loaded.extract(net.uniform(0.5))
    assert isinstance(extracted, UNet2DModel)
    with torch.no_grad():
        expected = loaded.forward(net.uniform(0.5), x, t, classes)
        assert torch.allclose(extracted(x, t, **classes).sample, expected, atol=CALL)


def test_after_a_concatenation_trunk_and_skip_are_sliced_apart() -> None:
    net = Elastic(TINY, widths=(0.5, 1.0))
    segments = net.anatomy.segments(net.uniform(0.5))
    trunk_and_skip = segments["up_blocks.0.resnets.1.conv1.weight"]
    assert trunk_and_skip.axes[1] == (
        (0, 4),
        (8, 10),
        (12, 14),
        (16, 18),
        (20, 22),
    )  # half of every norm group, here and elsewhere
    assert segments["up_blocks.0.resnets.1.norm1.bias"].axes == trunk_and_skip.axes[1:2]
    leading = Elastic(TINY, widths=(0.5, 1.0), groups="size").anatomy.segments(net.uniform(0.5))
    assert leading["up_blocks.0.resnets.1.conv1.weight"].axes[1] == ((0, 8), (16, 20))


def test_a_subnet_with_dead_weights_outside_equals_the_full_net() -> None:
    """With every weight beyond the slice zeroed, and whole norm groups kept, the full net computes what the subnet
    computes; this holds only if each kept channel, and each time frequency, meets its own weights."""
    config = {**PLAIN, "norm_num_groups": 4, "block_out_channels": (8, 8)}  # no group crosses a concatenation
    net = Elastic(config, widths=(0.5, 1.0), groups="size")
    loaded = randomised(net)
    arch = net.uniform(0.5)
    segments = net.anatomy.segments(arch)
    masked = {}
    for name, tensor in loaded.full.named_parameters():
        keep = torch.zeros_like(tensor)
        index = [torch.cat([torch.arange(a, b) for a, b in runs]) for runs in segments[name].axes]
        keep[torch.meshgrid(*index, indexing="ij")] = 1.0
        masked[name] = tensor * keep
    x, t, _ = inputs(net)
    with torch.no_grad():
        wide = functional_call(loaded.full, masked, (x, t)).sample
        narrow = loaded.forward(arch, x, t)
    assert torch.allclose(wide, narrow, atol=1e-4)


def test_time_frequencies_are_gathered_not_truncated() -> None:
    net = Elastic({**PLAIN, "block_out_channels": (16, 16)}, widths=(0.5, 1.0))
    columns = net.anatomy.segments(net.uniform(0.5))["time_embedding.linear_1.weight"].axes[1]
    assert [start for start, _ in columns] == [0, 2, 4, 6, 8, 10, 12, 14]


def test_gradients_reach_the_shared_weights_and_only_the_slice() -> None:
    net = Elastic(TINY, widths=(0.5, 1.0))
    loaded = net.initial(0)
    loaded.full.requires_grad_(True)
    x, t, _ = inputs(net)
    loaded.forward(net.uniform(0.5), x, t).square().mean().backward()
    gradient = loaded.full.conv_in.weight.grad
    assert gradient is not None
    reached = gradient.abs().sum((1, 2, 3)) > 0
    assert reached.tolist() == [True, True, False, False] * 2  # the leading half of each of two norm groups


@pytest.mark.parametrize("groups", ["count", "size"])
def test_supernets_and_spaces_keep_the_laws(groups: Any) -> None:
    net = Elastic(TINY, widths=(0.5, 1.0), groups=groups)
    steps = uniform(4)
    for intervals in (per_step(steps), equal(steps, 3)):
        check_space(Stepwise(net, steps, intervals))
    check_supernet(randomised(net), Stepwise(net, steps, per_step(steps)))


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
@pytest.mark.parametrize("width", [0.5, 1.0])
def test_costs_equal_fvcore_to_the_mac(config: dict[str, Any], width: float) -> None:
    net = Elastic(config, widths=(0.5, 1.0))
    counted = count_with_fvcore(net, net.uniform(width))
    cost = net.cost(net.uniform(width))
    assert (cost.macs, cost.attention_macs, cost.params) == counted


def test_one_share_per_level_is_understood() -> None:
    """The study's genes hold one share for the net; the network below takes one per level."""
    config = {**PLAIN, "block_out_channels": (8, 32), "norm_num_groups": 2}
    net = Elastic(config, widths=(0.5, 1.0))
    loaded = randomised(net)
    x, t, _ = inputs(net)
    for widths in ((0.5, 1.0), (1.0, 0.5), (0.25, 0.75)):
        arch = Arch(widths)
        stock = skeleton(net.anatomy, arch)
        assert sum(p.numel() for p in stock.parameters()) == net.cost(arch).params
        assert loaded.extract(arch)(x, t).sample.shape == x.shape


def test_the_cache_of_subnets_is_bounded() -> None:
    net = Elastic(TINY, widths=(0.25, 0.5, 1.0))
    loaded = net.initial(0)
    loaded._cache_size = 2
    for width in (0.25, 0.5, 1.0, 0.25):
        loaded.denoiser(Step(5, net.uniform(width)))
    assert len(loaded._subnets) == 2


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"down_block_types": ("DownBlock2D", "SkipDownBlock2D")}, "SkipDownBlock2D"),
        ({"time_embedding_type": "fourier"}, "time_embedding_type='fourier'"),
        ({"sample_size": 9}, "cannot be halved"),
        ({"sample_size": None}, "needs sample_size"),
        ({"norm_num_groups": 4}, "leaves 2 channels in level 0, not a multiple of norm_num_groups=4"),
        ({"block_out_channels": (8, 10)}, "10 channels in level 1, not a multiple of attention_head_dim=4"),
        ({"block_out_channels": (8, 16), "time_embedding_dim": 30}, "the time embedding is 7.5, not a whole number"),
    ],
)
def test_configs_that_are_not_elastic_are_refused_by_name(change: dict[str, Any], named: str) -> None:
    with pytest.raises(UserError, match=named):
        Elastic({**copy.deepcopy(TINY), **change}, widths=(0.25, 1.0))


def test_attention_heads_must_stay_whole() -> None:
    with pytest.raises(UserError, match="attention_head_dim=4"):
        Elastic({**TINY, "block_out_channels": (8, 8)}, widths=(0.25, 1.0))


def test_the_full_net_is_among_the_widths() -> None:
    with pytest.raises(UserError, match=r"include 1\.0"):
        Elastic(TINY, widths=(0.25, 0.5))


def test_a_middle_that_its_attention_cannot_norm_is_refused() -> None:
    config = {**TINY, "block_out_channels": (32, 64), "norm_num_groups": 8, "attn_norm_num_groups": 32}
    with pytest.raises(
        UserError, match=r"16 channels in the middle, not a multiple of attn_norm_num_groups=32; .* 0\.5, 1"
    ):
        Elastic(config, widths=(0.25, 0.5, 1.0), groups="count").outline()
    assert Elastic(config, widths=(0.5, 1.0), groups="count").outline()


def test_a_shortcut_vanishes_whatever_floats_make_of_the_shares() -> None:
    """448 x (232 / 448) is not 232."""
    config = {**TINY, "block_out_channels": (256, 448), "norm_num_groups": 8}
    anatomy = Elastic(config, groups="count").anatomy
    assert anatomy.shortcut_vanishes((232 / 256, 232 / 448), 1)
    assert not anatomy.shortcut_vanishes((1.0, 1.0), 1)
    assert not anatomy.shortcut_vanishes((232 / 256, 240 / 448), 1)


def test_a_vanishing_shortcut_is_refused() -> None:
    net = Elastic({**PLAIN, "block_out_channels": (8, 16)}, widths=(0.5, 1.0))
    with pytest.raises(UserError, match="shortcut"):
        net.initial(0).extract(Arch((1.0, 0.5)))


@pytest.mark.parametrize("timesteps", [(0, 500, 999), (999, 999), (), (1000, 3)])
def test_a_space_refuses_timesteps_that_no_sampler_can_follow(tiny_net: Elastic, timesteps: Any) -> None:
    with pytest.raises(UserError, match=r"must decrease strictly|past the supernet's last, 999|at least 1 item"):
        Stepwise(tiny_net, timesteps, (1,) * len(timesteps))


def test_timestep_makers_match_diffusers_where_it_has_them() -> None:
    from diffusers import DDIMScheduler

    for steps in (3, 10, 50):
        for spacing, ours in (("trailing", uniform(steps)), ("leading", leading(steps))):
            scheduler = DDIMScheduler(timestep_spacing=spacing)
            scheduler.set_timesteps(steps)
            assert list(ours) == scheduler.timesteps.tolist()
    assert quadratic(5)[-1] == 0
    assert quadratic(5)[0] == 800
    assert quadratic(50)[:-5:-1] == (0, 1, 2, 3)  # of which the squares name 0 twice
    assert quadratic(1000) == tuple(range(999, -1, -1))
    assert linspace(10, 999, 20)[:2] == (999, 890)
    assert equal(uniform(10), 4) == (3, 3, 2, 2)
    with pytest.raises(UserError, match="11 intervals"):
        equal(uniform(10), 11)


def test_cost_of_a_schedule_is_exact_and_params_count_each_net_once(tiny_net: Elastic) -> None:
    steps = uniform(6)
    space = Stepwise(tiny_net, steps, equal(steps, 3))
    small, middle = (tiny_net.cost(tiny_net.uniform(w)) for w in (0.25, 0.5))
    cost = space.cost((0, 1, 0))
    assert cost["macs"] == 4 * small.macs + 2 * middle.macs
    assert cost["params"] == small.params + middle.params
    assert space.cost((2, 2, 2))["macs_share"] == 1.0
    assert len({step.arch for step in space.decode((0, 1, 0)).steps}) == 2


def test_a_space_of_a_single_step_is_one(tiny_net: Elastic) -> None:
    space = Stepwise(tiny_net, (500,), (1,))
    assert space.decode((0,)).timesteps == (500,)


FAULTS = """
import resource, torch
import search_spaces.loaded as loaded
from nas.contracts import Step
from search_spaces.supernet import Elastic

torch.set_num_threads(1)
net, x = Elastic({config!r}, widths=(1.0,)), torch.zeros(256, 1, 8, 8)

def faults():
    call = net.initial(0).denoiser(Step(5, net.anatomy.full))
    with torch.inference_mode():
        call(x, 5)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for _ in range(5):
            call(x, 5)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

keep, loaded.keep_freed_memory = loaded.keep_freed_memory, lambda: None
given_back = faults()
loaded.keep_freed_memory = keep
print(given_back, faults())
"""


@pytest.mark.long
def test_the_memory_of_a_call_is_kept_for_the_next() -> None:
    """A call of 256 samples makes tensors of 4 MiB: without it, many of their pages are asked for again."""
    if not keep_freed_memory():
        pytest.skip("the C library is not glibc")
    code = FAULTS.format(config={**TINY, "block_out_channels": (64, 64)})
    told = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    given_back, kept = map(int, told.split())
    assert kept < given_back / 4
