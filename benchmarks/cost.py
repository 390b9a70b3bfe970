"""Is the cost model exact, does it reproduce the published MACs of DDSM's network and of others, and how long does it take?"""

from __future__ import annotations

import itertools
import random
import time
import warnings
from functools import partial
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.common import Benchmark, Target, needs
from benchmarks.published import DECODERS, NETWORKS, Decoder, Published, dit
from search_spaces.codec import decoder_macs, empty_autoencoder
from search_spaces.intervals import per_step, uniform
from search_spaces.networks.anatomy import skeleton
from search_spaces.networks.slices import Arch
from search_spaces.shipped.reuse import run
from search_spaces.shipped.walks import arguments
from search_spaces.stepwise import Stepwise
from search_spaces.supernet import Elastic
from studies.digits import UNET

# The DDPM network of CIFAR-10 (Ho et al. 2020), which DDSM and Diff-Pruning slim.
DDPM_CIFAR10: dict[str, Any] = {
    "sample_size": 32,
    "in_channels": 3,
    "out_channels": 3,
    "block_out_channels": (128, 256, 256, 256),
    "layers_per_block": 2,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    "attention_head_dim": None,
    "norm_num_groups": 32,
    "downsample_padding": 0,
}
ATTENTIVE: dict[str, Any] = {
    "sample_size": (16, 32),
    "in_channels": 3,
    "out_channels": 6,
    "block_out_channels": (32, 64, 96),
    "layers_per_block": 2,
    "down_block_types": ("AttnDownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D", "AttnUpBlock2D"),
    "attention_head_dim": 8,
    "norm_num_groups": 4,
    "resnet_time_scale_shift": "scale_shift",
    "downsample_type": "resnet",
    "upsample_type": "resnet",
    "num_class_embeds": 10,
}
# Width -> MMACs of one call, as the released DDSM code has them, and with attention products and all layers counted.
PUBLISHED = {1.0: 6070.0, 0.75: 3420.0, 0.5: 1520.0, 0.25: 382.5}
WITH_ATTENTION = {1.0: 6222.0, 0.75: 3533.0, 0.5: 1599.0, 0.25: 422.0}
# The released CIFAR-10 schedule: how many of its 1,000 steps run at each width, and its published mean in MMACs.
RELEASED_SCHEDULE = {1.0: 274, 0.75: 181, 0.5: 534, 0.25: 11}
RELEASED_MEAN = 3098.1


TRANSFORMERS = {
    "DiT-S/2": dit(num_layers=12, num_attention_heads=6, attention_head_dim=64),
    "DiT-B/2": dit(num_layers=12, num_attention_heads=12, attention_head_dim=64),
    "DiT-L/2": dit(num_layers=24, num_attention_heads=16, attention_head_dim=64),
    "DiT-XL/2": dit(),
    "PixArt-alpha": NETWORKS["PixArt-alpha, 256 pixels"].config,
}


def count_with_fvcore(net: Elastic, arch: Arch) -> tuple[int, int, int]:
    """(MACs, MACs of attention products, parameters) of one call on one sample, by running the stock model."""
    model = net.initial(0).extract(arch)
    config = net.anatomy.config
    x = torch.zeros(1, config["in_channels"], *net.anatomy.sample_size)
    classes = {"class_labels": torch.tensor([1])} if config["num_class_embeds"] else None
    counted = macs_of(model, arguments(model, x, torch.tensor([5]), classes))
    return *counted, sum(p.numel() for p in model.parameters())


def macs_of(model: torch.nn.Module, inputs: tuple[Any, ...]) -> tuple[int, int]:
    """(MACs, MACs of attention products) of one call, as fvcore counts them.

    fvcore also counts norms and upsampling, which are no multiply-adds of weights or attention: they are left out. It
    skips attention, so it is handed MACs = batch x heads x L_q x L_k x (d_qk + d_v).
    """
    from fvcore.nn import FlopCountAnalysis

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        analysis = FlopCountAnalysis(model, inputs)
        analysis.unsupported_ops_warnings(False)
        analysis.uncalled_modules_warnings(False)
        analysis.set_op_handle("aten::scaled_dot_product_attention", _attention_macs)
        by_operator = analysis.by_operator()
    attention = int(by_operator["scaled_dot_product_attention"])
    counted = int(sum(by_operator[name] for name in ("conv", "linear", "addmm", "matmul", "bmm"))) + attention
    unknown = set(by_operator) - {
        *("conv", "linear", "addmm", "matmul", "bmm", "scaled_dot_product_attention"),
        *("group_norm", "upsample_nearest2d", "adaptive_avg_pool2d"),
    }
    if unknown:
        raise RuntimeError(f"fvcore counts operators that the comparison does not know: {unknown}")
    return counted, attention


def _attention_macs(inputs: Any, outputs: Any) -> int:
    query, key, value = (i.type().sizes() for i in inputs[:3])
    return int(query[0] * query[1] * query[2] * key[2] * (query[3] + value[3]))


def legal_archs(net: Elastic, count: int) -> list[Arch]:
    """Random shares per level that give a stock model with the full net's tensors."""
    from nas.contracts import UserError

    found = []
    for widths in itertools.product(net.widths, repeat=net.anatomy.levels):
        arch = Arch(widths)
        try:
            net.anatomy.subconfig(arch)
            net.anatomy.segments(arch)
        except UserError:
            continue
        found.append(arch)
    random.Random(0).shuffle(found)
    return found[:count]


def main() -> None:
    bench = Benchmark(
        "cost",
        __doc__ or "",
        tuple(f"search_spaces/networks/{name}.py" for name in ("cost", "parts", "unet_parts", "transformer")),
    )
    needs("fvcore", "dev")
    per_config, wanted = (2, 6) if bench.quick else (17, 50)
    nets = {
        "ddpm cifar10": Elastic(DDPM_CIFAR10),
        "digits": Elastic(UNET),
        "attentive": Elastic(ATTENTIVE),
    }
    worst = 0
    total = 0
    for name, net in nets.items():
        for arch in legal_archs(net, per_config if name != "attentive" else wanted - total):
            row = bench.row(f"{name} {arch}", partial(compare, net, arch))
            worst = max(worst, abs(row["macs"] - row["fvcore_macs"]), abs(row["params"] - row["model_params"]))
            total += 1

    ddpm = nets["ddpm cifar10"]
    without, within = [], []
    for width in PUBLISHED:
        cost = ddpm.cost(ddpm.uniform(width))
        plain, whole = (cost.macs - cost.attention_macs) / 1e6, cost.macs / 1e6
        without.append(abs(plain / PUBLISHED[width] - 1))
        within.append(abs(whole / WITH_ATTENTION[width] - 1))
        bench.row(f"ddpm cifar10 uniform {width:g}", partial(dict, mmacs=plain, mmacs_with_attention=whole))
    steps = sum(RELEASED_SCHEDULE.values())
    costs = {width: ddpm.cost(ddpm.uniform(width)) for width in PUBLISHED}
    mean = sum(n * (costs[w].macs - costs[w].attention_macs) for w, n in RELEASED_SCHEDULE.items()) / steps / 1e6

    published = {name: bench.row(name, partial(beside, network)) for name, network in NETWORKS.items()}
    published |= {name: bench.row(name, partial(beside_decoder, one)) for name, one in DECODERS.items()}
    counted = {name: bench.row(name, partial(beside_counter, config)) for name, config in TRANSFORMERS.items()}

    timesteps = uniform(1000)
    space = Stepwise(ddpm, timesteps, per_step(timesteps))
    genome = tuple(i % 4 for i in range(1000))
    bench.row(
        "seconds",
        lambda: {"cost_1000_genes_us": microseconds(lambda: space.cost(genome)), **small_cost(nets["digits"])},
    )
    bench.finish(
        [
            Target(
                "fvcore_difference",
                f"largest difference from fvcore over {total} archs of 3 configs, MACs or parameters",
                0,
                worst,
            ),
            Target(
                "published_without_attention",
                "worst relative difference from DDSM's constants, without attention",
                0.01,
                max(without),
            ),
            Target(
                "published_with_attention",
                "worst relative difference from the counts with attention",
                0.001,
                max(within),
            ),
            Target(
                "published_schedule",
                "relative difference of the released schedule's mean from 3098.1 MMACs",
                0.01,
                abs(mean / RELEASED_MEAN - 1),
            ),
            Target(
                "published_macs_difference",
                f"largest relative difference from the MACs, with and without attention products, and the parameters of {len(NETWORKS)} published networks and "
                f"{len(DECODERS)} decoders",
                0.001,
                max(row["difference"] for row in published.values()),
            ),
            Target(
                "counter_difference",
                f"largest difference from what torch counts on the meta device, MACs of {len(TRANSFORMERS)} transformers whole, and with every other branch reused",
                0,
                max(max(row["whole_off"], row["reused_off"]) for row in counted.values()),
            ),
        ]
    )


def compare(net: Elastic, arch: Arch) -> dict[str, Any]:
    cost = net.cost(arch)
    macs, attention, params = count_with_fvcore(net, arch)
    return {
        "macs": cost.macs,
        "fvcore_macs": macs,
        "attention_macs": cost.attention_macs,
        "fvcore_attention_macs": attention,
        "params": cost.params,
        "model_params": params,
    }


def beside(network: Published) -> dict[str, Any]:
    """What the config costs, in the units of the published figures, and how far that is from them."""
    net = Elastic(network.config, widths=(1.0,), tokens=network.tokens)
    cost = net.cost(net.uniform(1.0))
    ours = {
        "params_millions": cost.params / 1e6,
        "gmacs": cost.macs / 1e9,
        "gmacs_without_attention": (cost.macs - cost.attention_macs) / 1e9,
    }
    theirs = [network.params, network.macs, network.without_attention]
    if network.distinct is not None:
        ours["distinct_params_millions"] = net.cost.distinct_params(net.uniform(1.0)) / 1e6
        theirs.append(network.distinct)
    return {**ours, "difference": max(abs(mine / other - 1) for mine, other in zip(ours.values(), theirs, strict=True))}


def beside_counter(config: dict[str, Any]) -> dict[str, Any]:
    """Beside torch's own counter, on the meta device."""
    net = Elastic(config, widths=(1.0,))
    full = net.anatomy.full
    stock = skeleton(net.anatomy, full).to("meta")
    branches = net.cost.graph(full).names(True)[1::2]
    x, t = torch.empty((1, *net.state_shape), device="meta"), torch.zeros(1, dtype=torch.long, device="meta")
    told = net.anatomy.some_condition(1, "meta")
    found: dict[str, Any] = {}
    with torch.inference_mode():
        _, cache = run(stock, x, t, keep=branches, condition=told)
        for name, reuse in (("whole", ()), ("reused", branches)):
            with FlopCounterMode(display=False) as counter:
                run(stock, x, t, reuse, (), cache, told)
            macs = net.cost.macs(full, reuse)
            found |= {f"{name}_gmacs": macs / 1e9, f"{name}_off": abs(macs - counter.get_total_flops() // 2)}
    return found


def beside_decoder(one: Decoder) -> dict[str, Any]:
    """The same of an autoencoder's decoder, by the codec's own count."""
    ours = {
        "params_millions": sum(p.numel() for p in empty_autoencoder(one.config, "").parameters()) / 1e6,
        "gmacs": decoder_macs(one.config, one.latents) / 1e9,
    }
    return {
        **ours,
        "difference": max(
            abs(mine / other - 1) for mine, other in zip(ours.values(), (one.params, one.macs), strict=True)
        ),
    }


def small_cost(net: Elastic) -> dict[str, float]:
    timesteps = uniform(10)
    space = Stepwise(net, timesteps, per_step(timesteps))
    return {
        "cost_10_genes_us": microseconds(lambda: space.cost((0, 1, 2, 3, 0, 1, 2, 3, 0, 1))),
        "cost_of_an_arch_us": microseconds(lambda: net.cost(net.uniform(0.5))),
    }


def microseconds(call: Any) -> float:
    """Median of many calls."""
    call()
    times = []
    for _ in range(200):
        started = time.perf_counter()
        call()
        times.append(time.perf_counter() - started)
    return sorted(times)[100] * 1e6


if __name__ == "__main__":
    main()
