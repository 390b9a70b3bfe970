"""UNets that read a text: their subnets against the stock class and against the whole network with everything else at zero."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.published import NETWORKS
from nas.contracts import Condition, Guidance, Step, UserError
from nas.testing import check_space, check_supernet
from search_spaces.intervals import uniform
from search_spaces.networks.anatomy import predict
from search_spaces.networks.slices import Arch, Run
from search_spaces.options import Options
from search_spaces.patterns import Every, Only
from search_spaces.shipped.graph import graph_of
from search_spaces.shipped.reuse import run
from search_spaces.shipped.walks import arguments
from search_spaces.stepwise import Stepwise
from search_spaces.supernet import Elastic
from search_spaces.training.importance import channel_scores, permutations, permute
from studies import sd15_dip_go, sd15_width, sdxl_reuse
from tests.arithmetic import CALL

DOUBLE = 1e-9
"""How far apart two ways may be in float64 that are the same in real numbers."""

TEXT: dict[str, Any] = {
    "sample_size": 8,
    "in_channels": 3,
    "out_channels": 3,
    "block_out_channels": (16, 32),
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "cross_attention_dim": 12,
    "attention_head_dim": 4,
}
DEEP = {
    **TEXT,
    "block_out_channels": (16, 32, 32),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 2,
    "transformer_layers_per_block": (1, 2, 3),
    "attention_head_dim": (4, 4, 8),
    "use_linear_projection": True,
}
LIKE_SD15 = {
    **TEXT,
    "block_out_channels": (16, 32, 32, 32),
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    "layers_per_block": 2,
}
LIKE_SDXL = {
    **TEXT,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 4,
    "projection_class_embeddings_input_dim": 32,
    "upcast_attention": True,
}
WITH_LABELS = {
    **TEXT,
    "num_class_embeds": 5,
    "layers_per_block": (1, 2),
    "resnet_time_scale_shift": "scale_shift",
    "mid_block_type": "UNetMidBlock2D",
    "conv_in_kernel": 1,
}
PLAIN_MIDDLE = {
    **TEXT,
    "mid_block_type": None,
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "time_embedding_dim": 48,
    "freq_shift": 1,
}
CONFIGS = {
    "at all levels": TEXT,
    "deep": DEEP,
    "like Stable Diffusion 1.5": LIKE_SD15,
    "like Stable Diffusion XL": LIKE_SDXL,
    "with labels": WITH_LABELS,
    "without a middle": PLAIN_MIDDLE,
}
ARCHS = 34
"""Of each of the six."""


def elastic(config: Mapping[str, Any], **settings: Any) -> Elastic:
    """All that a config leaves open."""
    net = Elastic(config, widths=(1.0,), tokens=5)
    most = max(net.anatomy.layers(net.anatomy.full))
    choices: dict[str, Any] = {
        "widths": (0.5, 0.75, 1.0),
        "per_level": ("width", "depth"),
        "depths": tuple(range(1, net.anatomy.depth + 1)),
        "layers": tuple(range(1, most + 1)),
        "attention": True,
        "middle": config.get("mid_block_type", "") is not None,
        "tokens": 5,
    }
    if config.get("attention_head_dim") != 4 or settings.get("heads") == "slim":
        choices["widths"] = (0.5, 1.0)
    return Elastic(config, **{**choices, **settings})


def randomised(net: Elastic) -> Any:
    """Initial weights with every bias and norm made random, in float64."""
    loaded = net.initial(0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in loaded.full.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    loaded.full.double().eval().requires_grad_(False)
    return loaded


def inputs(net: Elastic, count: int = 3, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, Any, Any]:
    generator = torch.Generator().manual_seed(2)
    condition = {
        name: torch.arange(count) % 4
        if name == "class_labels"
        else torch.randn(rows.shape, generator=generator).to(dtype)
        for name, rows in net.anatomy.some_condition(count).items()
    }
    x = torch.randn((count, *net.state_shape), generator=generator).to(dtype)
    return x, torch.tensor([0, 400, 999])[:count], condition


def some_archs(net: Elastic, count: int, seed: int = 0) -> list[Arch]:
    subnets = net.subnets(net.options)
    chosen = np.random.default_rng(seed).choice(len(subnets), min(count, len(subnets)), replace=False)
    return [subnets.flat(int(place)) for place in chosen]


# ------------------------------------------------------------------------------------------------------------- slices


@pytest.mark.parametrize("heads", [pytest.param("whole", marks=pytest.mark.long), "slim"])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_subnets_equal_the_full_network_with_all_else_at_zero(config: dict[str, Any], heads: Any) -> None:
    net = elastic(config, heads=heads)
    loaded = randomised(net)
    x, t, condition = inputs(net)
    for arch in some_archs(net, ARCHS // 2):
        with torch.no_grad():
            expected = predict(masked(loaded, arch), x, t, condition)
            functional = loaded.forward(arch, x, t, condition)
            extracted = predict(loaded.extract(arch).double(), x, t, condition)
        assert torch.allclose(functional, expected, atol=DOUBLE), arch
        assert torch.allclose(extracted, functional, atol=DOUBLE), arch


def masked(loaded: Any, arch: Arch) -> UNet2DConditionModel:
    """The whole stock network, as wide as it is: weights outside the subnet at zero, what it lacks handing on its input, and what is
    normalised together, and in how many heads, as the subnet has it."""
    anatomy = loaded.recipe.anatomy
    small = anatomy.stock_class(arch)(**anatomy.subconfig(arch)).double()
    full = copy.deepcopy(loaded.full)
    sources = {source.name: source.axes for source in anatomy.segments(arch).values()}
    places = {source.name: name for name, source in anatomy.segments(arch).items()}
    for name, parameter in full.named_parameters():
        mask = torch.zeros_like(parameter)
        if name in sources:
            mask[torch.meshgrid(*map(index, sources[name]), indexing="ij")] = 1.0
        parameter.mul_(mask)
    kept = {name.removesuffix(".weight"): axes for name, axes in sources.items() if name and name.endswith(".weight")}
    for name, module in list(full.named_modules()):
        if isinstance(module, torch.nn.GroupNorm | torch.nn.LayerNorm) and name in kept:
            smaller = small.get_submodule(places[f"{name}.weight"].removesuffix(".weight"))
            parent, _, last = name.rpartition(".")
            setattr(full.get_submodule(parent), last, Normalised(module, smaller, index(kept[name][0])))
        if type(module).__name__ == "Attention" and f"{name}.to_q" in kept:
            module.set_processor(AttnProcessor())
            size = len(index(kept[f"{name}.to_q"][0])) // anatomy_heads(small, places, name)
            module.scale = size**-0.5
            module.upcast_attention = False  # to float32
    gone: list[str] = []
    for name, module in list(full.named_modules()):
        if any(name.startswith(f"{other}.") for other in gone):
            continue
        parent, _, last = name.rpartition(".")
        holder: Any = full.get_submodule(parent)
        if type(module).__name__ == "ResnetBlock2D":
            if f"{name}.conv1" in kept:
                channels = index(kept[f"{name}.conv2"][0])
                module.register_forward_hook(lambda _, __, out, channels=channels: only(out, channels))
            else:
                holder[int(last)] = Dropped(module.out_channels)
                gone.append(name)
        elif type(module).__name__ == "Transformer2DModel" and f"{name}.norm" not in kept:
            holder[int(last)] = Dropped()
            gone.append(name)
        elif type(module).__name__ == "BasicTransformerBlock" and f"{name}.norm1" not in kept:
            holder[int(last)] = Dropped(whole=True)
            gone.append(name)
    if small.mid_block is None:
        full.mid_block = None
    elif full.mid_block is not None and len(small.mid_block.resnets) == 1 and len(full.mid_block.resnets) == 2:
        full.mid_block.resnets[1] = Dropped(full.mid_block.resnets[0].out_channels)
    frequencies = index(sources["time_embedding.linear_1.weight"][1])
    full.time_proj = Scattered(small.time_proj, frequencies, anatomy.channels[0])
    return full


def anatomy_heads(small: Any, places: Mapping[Any, str], name: str) -> int:
    return int(small.get_submodule(places[f"{name}.to_q.weight"].removesuffix(".to_q.weight")).heads)


def index(runs: Sequence[Run]) -> torch.Tensor:
    return torch.cat([torch.arange(start, stop) for start, stop in runs])


def only(hidden: torch.Tensor, channels: torch.Tensor) -> torch.Tensor:
    found = torch.zeros_like(hidden)
    found[:, channels] = hidden[:, channels]
    return found


class Normalised(torch.nn.Module):
    """A norm over the kept channels alone, in the subnet's groups, with the full network's gains and offsets."""

    def __init__(self, norm: Any, smaller: Any, channels: torch.Tensor) -> None:
        super().__init__()
        self.smaller, self.channels, self.dim = smaller, channels, 1 if isinstance(norm, torch.nn.GroupNorm) else -1
        self.smaller.weight.data, self.smaller.bias.data = norm.weight[channels], norm.bias[channels]

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        normalised = self.smaller(hidden.index_select(self.dim, self.channels))
        return torch.zeros_like(hidden).index_copy(self.dim, self.channels, normalised)


class Dropped(torch.nn.Module):
    """Hands on the trunk, whatever is beside or behind it."""

    def __init__(self, channels: int | None = None, whole: bool = False) -> None:
        super().__init__()
        self.channels, self.whole = channels, whole
        self.out_channels = channels

    def forward(self, hidden: torch.Tensor, *told: Any, **further: Any) -> Any:
        if self.channels is not None:
            return hidden[:, : self.channels]
        return hidden if self.whole else (hidden,)


class Scattered(torch.nn.Module):
    """The subnet's sines and cosines where the full network's next frequencies stand."""

    def __init__(self, frequencies: Any, places: torch.Tensor, size: int) -> None:
        super().__init__()
        self.frequencies, self.places, self.size = frequencies, places, size

    def forward(self, t: torch.Tensor) -> torch.Tensor:
        values = self.frequencies(t)
        return torch.zeros((len(values), self.size)).index_add(1, self.places, values)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_extracted_subnets_are_stock_models_that_reload(config: dict[str, Any], tmp_path: Path) -> None:
    net = elastic(config)
    loaded = net.initial(0)
    x, t, condition = inputs(net, dtype=torch.float32)
    for number, arch in enumerate(some_archs(net, 5, seed=1)):
        model = loaded.extract(arch)
        model.save_pretrained(tmp_path / str(number))
        again = UNet2DConditionModel.from_pretrained(tmp_path / str(number), low_cpu_mem_usage=False)
        with torch.no_grad():
            assert torch.allclose(predict(again, x, t, condition), predict(model, x, t, condition), atol=CALL)
        assert all(map(torch.equal, again.state_dict().values(), model.state_dict().values()))


@pytest.mark.parametrize("config", [DEEP, LIKE_SDXL], ids=["deep", "like Stable Diffusion XL"])
def test_the_supernet_is_one(config: dict[str, Any]) -> None:
    net = elastic(config, widths=(0.5, 1.0))
    space = Stepwise(net, uniform(2), (1, 1), guidance=(None, 2.0))
    check_space(space)
    check_supernet(net.initial(0), space, samples=3)


def test_a_number_of_heads_is_no_size_of_heads() -> None:
    """Parameters and costs are the same whichever number of heads it is; what comes out is not."""
    nets = [Elastic({**TEXT, "attention_head_dim": count}, widths=(1.0,), tokens=5) for count in (2, 8)]
    loaded = [randomised(net) for net in nets]
    assert nets[0].cost(nets[0].anatomy.full) == nets[1].cost(nets[1].anatomy.full)
    x, t, condition = inputs(nets[0])
    one, other = (predict(each.full, x, t, condition) for each in loaded)
    assert (one - other).abs().max() > 1e-3
    stock = loaded[0].full.down_blocks[0].attentions[0]
    assert stock.transformer_blocks[0].attn1.heads == 2


# -------------------------------------------------------------------------------------------------------------- costs


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_costs_equal_torchs_count(config: dict[str, Any]) -> None:
    net = elastic(config)
    for arch in some_archs(net, 8, seed=2):
        with torch.device("meta"):
            model = net.anatomy.stock_class(arch)(**net.anatomy.subconfig(arch))
        x = torch.zeros((1, *net.state_shape), device="meta")
        t = torch.zeros(1, dtype=torch.long, device="meta")
        cost = net.cost(arch)
        assert cost.macs == counted(model, x, t, net.anatomy.some_condition(1, "meta"))
        assert cost.params == sum(parameter.numel() for parameter in model.parameters())


def counted(model: Any, x: torch.Tensor, t: torch.Tensor, condition: Condition) -> int:
    with FlopCounterMode(display=False) as counter:
        model(*arguments(model, x, t, condition))
    return int(counter.get_total_flops()) // 2


@pytest.mark.parametrize("config", [DEEP, LIKE_SD15, LIKE_SDXL], ids=["deep", "SD 1.5", "SDXL"])
def test_macs_of_what_is_reused_equal_a_count_of_what_ran(config: dict[str, Any]) -> None:
    net = elastic(config)
    rng = np.random.default_rng(3)
    for finer in (False, True, "layers"):
        for arch in some_archs(net, 6, seed=4):
            graph = net.cost.graph(arch)
            names = graph.names(finer)
            wanted = [name for name in names if rng.random() < 0.7] + [names[-1]]
            running = graph.live(wanted, finer)
            if not running:
                continue
            reuse = graph.collapse(graph.expand(graph.blocks) - running, finer)
            with torch.device("meta"):
                model = net.anatomy.stock_class(arch)(**net.anatomy.subconfig(arch))
            x = torch.zeros((1, *net.state_shape), device="meta")
            condition = net.anatomy.some_condition(1, "meta")
            _, cache = run(model, x, 5, keep=graph.names("layers"), condition=condition)
            with FlopCounterMode(display=False) as counter:
                run(model, x, 5, reuse, (), cache, condition)
            assert net.cost.macs(arch, reuse) == counter.get_total_flops() // 2, (arch, reuse)


# -------------------------------------------------------------------------------------------------------------- reuse


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_with_nothing_reused_it_is_the_stock_model_bit_for_bit(config: dict[str, Any]) -> None:
    net = elastic(config)
    loaded = net.initial(0)
    x, t, condition = inputs(net, dtype=torch.float32)
    for arch in (net.anatomy.full, *some_archs(net, 4, seed=5)):
        model = loaded.extract(arch)
        with torch.no_grad():
            prediction, kept = run(model, x, t, keep=graph_of(model).blocks, condition=condition)
            assert torch.equal(prediction, predict(model, x, t, condition))
        assert set(kept) == {*graph_of(model).names(finer=True), "prediction"}
        assert graph_of(model) == net.cost.graph(arch)


@pytest.mark.parametrize("finer", [False, True, "layers"])
def test_reused_parts_hand_out_what_they_did_the_step_before(finer: Any) -> None:
    """The reference is the stock model, whose reused modules are made to return their old outputs."""
    net = elastic(DEEP)
    model = net.initial(0).full.eval()
    graph = graph_of(model)
    x, _, condition = inputs(net, dtype=torch.float32)
    before, now = x, x.flip(0)
    old: dict[str, Any] = {}
    modules = modules_of(model)
    hooks = [module.register_forward_hook(_keep(old, name)) for name, module in modules.items()]
    rng = np.random.default_rng(6)
    with torch.no_grad():
        _, cache = run(model, before, 900, keep=graph.names("layers"), condition=condition)
        predict(model, before, 900, condition)
        for hook in hooks:
            hook.remove()
        for _ in range(12):
            running = graph.live([name for name in graph.names(finer) if rng.random() < 0.8], finer)
            reused = graph.expand(graph.blocks) - running
            if not running:
                continue
            stubs = [modules[name].register_forward_hook(_answer(old[name])) for name in reused]
            expected = predict(model, now, 500, condition)
            for hook in stubs:
                hook.remove()
            found, _ = run(model, now, 500, graph.collapse(reused, finer), (), cache, condition)
            assert torch.equal(found, expected), running


def modules_of(model: Any) -> dict[str, torch.nn.Module]:
    found = {"mid": model.mid_block}
    for side, blocks in (("d", model.down_blocks), ("u", model.up_blocks)):
        for i, block in enumerate(blocks):
            for j, resnet in enumerate(block.resnets):
                parts = {"resnet": resnet}
                if getattr(block, "attentions", None):
                    parts["attention"] = block.attentions[j]
                if side == "u" and j + 1 == len(block.resnets) and block.upsamplers is not None:
                    parts["up"] = block.upsamplers[0]
                names = {part: f"{side}{i}.{j}.{part}" if len(parts) > 1 else f"{side}{i}.{j}" for part in parts}
                found |= {names[part]: module for part, module in parts.items()}
            if side == "d" and block.downsamplers is not None:
                found[f"d{i}.down"] = block.downsamplers[0]
    return found


def _keep(outputs: dict[str, Any], name: str) -> Any:
    return lambda module, arguments, output: outputs.__setitem__(name, output)


def _answer(output: Any) -> Any:
    return lambda module, arguments, computed: output


def test_what_is_kept_within_a_branch_is_handed_on() -> None:
    """A step that reuses a whole branch, and one after it that reuses only the residual block in it."""
    net = Elastic(TEXT, widths=(1.0,), tokens=5)
    space = Stepwise(net, uniform(4), (4,), patterns=(Every(1), Every(4, ("u1.1.attention",))), finer="layers")
    schedule = space.decode((0,))
    steps = (
        schedule.steps[0],
        Step(500, net.anatomy.full, ("d0.0.resnet", "d0.0.attention")),
        Step(250, net.anatomy.full, ("d0.0.resnet",)),
    )
    loaded = net.initial(0)
    x, _, condition = inputs(net, dtype=torch.float32)
    modules, old = modules_of(loaded.full), dict[str, Any]()
    first = modules["d0.0.resnet"].register_forward_hook(_keep(old, "d0.0.resnet"))
    with torch.no_grad():
        predict(loaded.full, x, steps[0].timestep, condition)
    first.remove()
    cache: Any = None
    for step, following in zip(steps, (*steps[1:], None), strict=True):
        before = x
        x, cache = loaded.denoiser(step, following.reuse if following else ())(x, step.timestep, cache, condition)
    with torch.no_grad():
        anew = predict(loaded.full, before, steps[-1].timestep, condition)
        modules["d0.0.resnet"].register_forward_hook(_answer(old["d0.0.resnet"]))
        expected = predict(loaded.full, before, steps[-1].timestep, condition)
    assert torch.allclose(x, expected, atol=CALL)
    assert not torch.allclose(x, anew, atol=CALL)


def test_what_is_kept_within_a_branch_survives_a_held_step() -> None:
    """With a sampler of which a step that computes nothing holds the prediction."""
    net = Elastic(DEEP, widths=(1.0,), tokens=5)
    layers = ("d0.0", "d1.0.resnet", "d1.0.attention", "u1.2.attention", "u1.2.up", "u2.2")
    space = Stepwise(net, uniform(4), (2, 2), patterns=(Every(2), Only(layers)), finer="layers", deterministic=False)
    loaded = net.initial(0)
    x, _, condition = inputs(net, dtype=torch.float32)
    for genome in ((0, 0), (0, 1), (1, 0), (1, 1)):
        steps, cache = space.decode(genome).steps, None
        for step, following in zip(steps, (*steps[1:], None), strict=True):
            call = loaded.denoiser(step, following.reuse if following else ())
            noise, cache = call(x, step.timestep, cache, condition)
            assert torch.isfinite(noise).all()


@pytest.mark.parametrize("heads", ["whole", "slim"])
def test_channels_by_importance_leave_the_full_network_as_it_was(heads: Any) -> None:
    net = elastic(DEEP, heads=heads)
    loaded = randomised(net)
    x, t, condition = inputs(net)
    weights = dict(loaded.full.named_parameters())
    scores = channel_scores(net.anatomy, weights, {name: tensor.sign() for name, tensor in weights.items()})
    with torch.no_grad():
        before = predict(loaded.full, x, t, condition)
        permute(loaded, permutations(net.anatomy, scores))
        after = predict(loaded.full, x, t, condition)
    assert torch.allclose(before, after, atol=DOUBLE)


def test_both_halves_of_a_guided_step_share_what_is_reused() -> None:
    """Guided in one batch, a reused part hands each half its own output of the step before."""
    net = Elastic(TEXT, widths=(1.0,), tokens=5)
    loaded = randomised(net)
    x, _, told = inputs(net)
    condition = {**told, "negative_encoder_hidden_states": torch.zeros_like(told["encoder_hidden_states"])}
    null = loaded.null_condition(condition)
    assert set(null) == set(told)
    assert not null["encoder_hidden_states"].any()
    first = Step(900, net.anatomy.full, (), Guidance(3.0))
    second = Step(500, net.anatomy.full, ("d1", "mid", "u0"), Guidance(3.0))
    with torch.inference_mode():
        loaded.adopt(net.anatomy.full, loaded.full)
        _, cache = loaded.denoiser(first, second.reuse)(x, 900, None, condition)
        found, _ = loaded.denoiser(second)(x.flip(0), 500, cache, condition)
        halves = []
        for half in (told, null):
            _, kept = run(loaded.full, x, 900, keep=second.reuse, condition=half)
            halves.append(run(loaded.full, x.flip(0), 500, second.reuse, (), kept, half)[0])
    expected = halves[1] + 3.0 * (halves[0] - halves[1])
    assert torch.allclose(found, expected, atol=DOUBLE)


SD15 = sd15_dip_go.UNET
ONE_BLOCK = {**SD15, "layers_per_block": 1}
IN_THE_WILD = {
    "Stable Diffusion 1.4, 1.5": (SD15, 77, 859.52, 401.637),
    "BK-SDM Base": (ONE_BLOCK, 77, 579.38, 261.5),
    "BK-SDM Small": ({**ONE_BLOCK, "mid_block_type": None}, 77, 482.35, 255.4),
    "BK-SDM Tiny": (
        {
            **ONE_BLOCK,
            "mid_block_type": None,
            "block_out_channels": (320, 640, 1280),
            "down_block_types": ("CrossAttnDownBlock2D",) * 3,
            "up_block_types": ("CrossAttnUpBlock2D",) * 3,
        },
        77,
        323.38,
        242.8,
    ),
    "Stable Diffusion XL": (sdxl_reuse.UNET, 77, 2567.46, None),
    **{
        name: (network.config, network.tokens, network.params, network.macs)
        for name, network in NETWORKS.items()
        if "cross_attention_dim" in network.config and "1.x" not in name
    },
}


@pytest.mark.parametrize(("config", "tokens", "params", "macs"), IN_THE_WILD.values(), ids=IN_THE_WILD.keys())
def test_configs_of_the_wild_open_from_the_config_alone(
    config: dict[str, Any], tokens: int, params: float, macs: float | None
) -> None:
    net = Elastic(
        {"_class_name": "UNet2DConditionModel", "_diffusers_version": "0.6.0", **config}, (1.0,), tokens=tokens
    )
    cost = net.cost(net.anatomy.full)
    assert cost.params / 1e6 == pytest.approx(params, rel=1e-4)
    if macs is not None:
        assert cost.macs / 1e9 == pytest.approx(macs, rel=1e-3)


def test_bk_sdms_networks_are_subnets_of_stable_diffusion() -> None:
    net = sd15_width.net
    for arch, other in ((Arch((1.0,) * 4, (1,) * 4), ONE_BLOCK), (Arch((1.0,) * 4, (1,) * 4, (), "", (), False), None)):
        params = net.cost(arch).params / 1e6
        assert params == pytest.approx(579.38 if other else 482.35, rel=1e-4)


# ----------------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"attention_head_dim": 3}, "is a number of heads"),
        ({"transformer_layers_per_block": ((1, 0), (1, 1))}, "transformer_layers_per_block"),
        (
            {"reverse_transformer_layers_per_block": ((1, 1, 1), (1, 1, 1))},
            "other depths on the way up",
        ),
        ({"only_cross_attention": True}, "only_cross_attention=True is not elastic"),
        ({"encoder_hid_dim": 8, "encoder_hid_dim_type": "text_proj"}, "encoder_hid_dim"),
        ({"class_embed_type": "projection", "projection_class_embeddings_input_dim": 8}, "class_embed_type"),
        ({"class_embed_type": "timestep"}, "class_embed_type='timestep' is not elastic"),
        ({"down_block_types": ("SimpleCrossAttnDownBlock2D",) * 2}, "not elastic"),
        ({"mid_block_type": "UNetMidBlock2DSimpleCrossAttn"}, "mid_block_type"),
        ({"sample_size": None}, "sample_size"),
        ({"num_attention_heads": 4}, "num_attention_heads"),
    ],
)
def test_what_is_not_elastic_is_refused_in_words(change: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        Elastic({**TEXT, **change}, widths=(1.0,))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"widths": (0.3, 1.0)}, "legal for all levels"),
        ({"layers": (2,)}, "layers"),
        ({"heads": "slim", "widths": (0.5, 1.0), "groups": "count", "depths": (3,)}, "depths"),
    ],
)
def test_options_that_no_stock_model_has_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        Elastic(TEXT, **settings)


def test_heads_and_norm_groups_leave_stable_diffusion_its_widths() -> None:
    """Whole heads of Stable Diffusion 1.5's outermost level, 8 of 40 channels in 32 norm groups, leave the half and the whole; as many thinner
    ones leave fifths and tenths."""
    config = {
        **LIKE_SD15,
        "block_out_channels": (320, 640, 1280, 1280),
        "norm_num_groups": 32,
        "attention_head_dim": 8,
        "cross_attention_dim": 768,
        "sample_size": 64,
        "in_channels": 4,
        "out_channels": 4,
    }
    for heads, said in (("whole", "legal for level 0: 0.5, 1"), ("slim", "legal for level 0: 0.1, 0.2, 0.3")):
        with pytest.raises(UserError, match=said):
            Elastic(config, widths=(0.35, 1.0), per_level=("width",), heads=heads)  # type: ignore[arg-type]
    Elastic(config, widths=(0.5, 1.0), per_level=("width",))
    Elastic(config, widths=(0.2, 0.7, 1.0), heads="slim")


def test_options_price_what_they_are() -> None:
    """Genes run from the cheapest option to the dearest, whichever subnet they are of."""
    net = elastic(DEEP, widths=(0.5, 1.0))
    subnets = net.subnets(Options((0.5, 1.0), (1, 2), ("depth",), True, (), (1, 2, 3), True))
    names = [gene.name for gene in subnets.genes]
    assert {"layers", "middle", "attention_middle", "attention_level1", "width", "depth0"} <= set(names)
    full = tuple(len(gene.options) - 1 for gene in subnets.genes)
    for place in range(len(full)):
        costs = [subnets.cost((*full[:place], option, *full[place + 1 :])).macs for option in range(full[place] + 1)]
        assert costs == sorted(costs)
        assert costs[0] < costs[-1]
    assert subnets.arch(full) == net.anatomy.full
