"""Diffusion transformers: what a subnet computes, what it costs, and what runs of it at a step."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from diffusers import DiTTransformer2DModel
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from evaluators.images import Digits
from nas.contracts import UserError
from search_spaces.networks.anatomy import predict, skeleton, unset
from search_spaces.networks.slices import Arch
from search_spaces.networks.transformer import DiT, PixArt, Transformer
from search_spaces.shipped.graph import TransformerGraph, graph_of
from search_spaces.shipped.reuse import run
from search_spaces.supernet import Elastic
from search_spaces.training import ZeroInit
from tests.arithmetic import CALL

HEADS, BLOCKS = 4, 5
COMMON = {
    "num_attention_heads": HEADS,
    "attention_head_dim": 8,
    "num_layers": BLOCKS,
    "in_channels": 3,
    "out_channels": 6,
    "sample_size": 8,
    "patch_size": 2,
}
DIT = {"_class_name": "DiTTransformer2DModel", **COMMON, "num_embeds_ada_norm": 10}
PIXART = {
    "_class_name": "PixArtTransformer2DModel",
    **COMMON,
    "caption_channels": 12,
    "cross_attention_dim": HEADS * 8,
    "use_additional_conditions": False,
}
SIZED = {**PIXART, "num_attention_heads": 6, "cross_attention_dim": 48, "use_additional_conditions": True}
CONFIGS = {"dit": DIT, "pixart": PIXART}


def xl(kind: str, layers: int = 28, size: int = 32, heads: int = 16, head: int = 72) -> dict[str, Any]:
    """DiT-XL/2 and PixArt-alpha, or others of their kinds."""
    common = {
        "num_attention_heads": heads,
        "attention_head_dim": head,
        "num_layers": layers,
        "in_channels": 4,
        "out_channels": 8,
        "sample_size": size,
        "patch_size": 2,
    }
    if kind == "dit":
        return {"_class_name": "DiTTransformer2DModel", **common, "num_embeds_ada_norm": 1000}
    return {
        "_class_name": "PixArtTransformer2DModel",
        **common,
        "caption_channels": 4096,
        "cross_attention_dim": heads * head,
        "use_additional_conditions": False,
    }


def elastic(config: Mapping[str, Any], **options: Any) -> Elastic:
    return Elastic(config, **{"widths": (0.25, 0.5, 0.75, 1.0), "depths": tuple(range(1, BLOCKS + 1)), **options})


def drawn(net: Elastic, seed: int = 0) -> Any:
    """With weights that all say something, unlike those that a training begins with."""
    loaded = net.initial(seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in loaded.full.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / math.sqrt(parameter.shape[-1]))
    return loaded


def inputs(net: Elastic, rows: int = 3) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    x = torch.randn(rows, *net.state_shape, generator=torch.Generator().manual_seed(1))
    told = net.anatomy.some_condition(rows)
    if "encoder_attention_mask" in told:
        told["encoder_attention_mask"][0, 5:] = 0
    return x, torch.tensor([5, 500, 990])[:rows], told


# ------------------------------------------------------------------------------------------------------------ slices


def masked(loaded: Any, arch: Arch) -> torch.nn.Module:
    """The full network with all that the subnet lacks made nothing, by rules of its own: hidden channels that it lacks are zero, norms
    are over those that it has, its table of positions stands in their places, blocks that it lacks are taken out, and the embeddings stay block 0's."""
    anatomy: Transformer = loaded.recipe.anatomy
    net = unset(skeleton(anatomy, anatomy.full), "cpu").double()
    own = dict(loaded.full.named_parameters())
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            held = name if name in own else name.replace(f".{name.split('.')[1]}.", ".0.", 1)
            parameter.copy_(own[held])
    hidden, share = anatomy.channels[0], arch.widths[0]
    quarter, few = hidden // 4, round(hidden * share) // 4
    kept = [q * quarter + _nearest(k, few, quarter) for q in range(4) for k in range(few)]
    heads = round(HEADS * share) * anatomy.head
    mask = torch.zeros(hidden)
    mask[kept] = 1.0
    small = torch.zeros(1, anatomy.positions, hidden)
    stock = skeleton(anatomy, arch)
    small[:, :, kept] = stock.pos_embed.pos_embed
    net.pos_embed.pos_embed = small

    class Norm(torch.nn.Module):
        def __init__(self, eps: float) -> None:
            super().__init__()
            self.eps = eps

        def forward(self, value: torch.Tensor) -> torch.Tensor:
            here = value[..., kept]
            mean, variance = here.mean(-1, keepdim=True), here.var(-1, correction=0, keepdim=True)
            return (value - mean) / (variance + self.eps).sqrt() * mask

    def cut(weight: torch.Tensor, rows: torch.Tensor | None = None, columns: torch.Tensor | None = None) -> None:
        with torch.no_grad():
            if rows is not None:
                weight.mul_(rows.reshape(-1, *[1] * (weight.ndim - 1)))
            if columns is not None:
                weight.mul_(columns)

    leading = (torch.arange(hidden) < heads).float()
    ff = (torch.arange(4 * hidden) < 4 * heads).float()
    cut(net.pos_embed.proj.weight, mask)
    cut(net.pos_embed.proj.bias, mask)
    net.norm_out = Norm(1e-6)
    for block in net.transformer_blocks:
        for attention in (block.attn1, block.attn2):
            if attention is None:
                continue
            for projection in (attention.to_q, attention.to_k, attention.to_v):
                cut(projection.weight, leading)
                cut(projection.bias, leading)
            cut(attention.to_out[0].weight, mask, leading)
            cut(attention.to_out[0].bias, mask)
        cut(block.ff.net[0].proj.weight, ff)
        cut(block.ff.net[0].proj.bias, ff)
        cut(block.ff.net[2].weight, mask, ff)
        cut(block.ff.net[2].bias, mask)
        if isinstance(anatomy, DiT):
            emb = block.norm1.emb
            for linear in (emb.timestep_embedder.linear_1, emb.timestep_embedder.linear_2):
                cut(linear.weight, leading)
                cut(linear.bias, leading)
            cut(emb.class_embedder.embedding_table.weight, None, leading)
            cut(block.norm1.linear.weight, mask.repeat(6))
            cut(block.norm1.linear.bias, mask.repeat(6))
            cut(net.proj_out_2.weight, None, mask)
            block.norm1.norm, block.norm3 = Norm(1e-6), Norm(1e-5)
        else:
            cut(block.scale_shift_table, None, mask)
            block.norm1, block.norm2 = Norm(1e-6), Norm(1e-6)
    if isinstance(anatomy, PixArt):
        emb = net.adaln_single.emb.timestep_embedder
        cut(emb.linear_1.weight, leading)
        cut(emb.linear_1.bias, leading)
        cut(emb.linear_2.weight, mask)
        cut(emb.linear_2.bias, mask)
        cut(net.adaln_single.linear.weight, mask.repeat(6))
        cut(net.adaln_single.linear.bias, mask.repeat(6))
        cut(net.proj_out.weight, None, mask)
        for linear in (net.caption_projection.linear_1, net.caption_projection.linear_2):
            cut(linear.weight, leading)
            cut(linear.bias, leading)
    first = net.transformer_blocks[0]
    net.transformer_blocks = torch.nn.ModuleList([net.transformer_blocks[i] for i in anatomy.blocks(arch)])
    if isinstance(anatomy, DiT):
        net.transformer_blocks[0].norm1.emb = first.norm1.emb
    return net


def _nearest(k: int, few: int, many: int) -> int:
    """The frequency, of so many, that is nearest to the k-th of fewer."""
    return min(range(many), key=lambda j: (abs(j / many - k / few), abs(j - round(k * many / few))))


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=() if kind == "dit" else pytest.mark.long) for kind in CONFIGS]
)
def test_a_subnet_is_the_full_network_with_the_rest_masked(kind: str) -> None:
    """In float64, functional, extracted and masked, for 50 random widths, depths and orders of blocks."""
    generator = torch.Generator().manual_seed(2)
    for seed in range(50):
        order = tuple(torch.randperm(BLOCKS, generator=generator).tolist())
        net = elastic(CONFIGS[kind], block_order=order)
        loaded = drawn(net, seed)
        share = (0.25, 0.5, 0.75, 1.0)[int(torch.randint(4, (), generator=generator))]
        depth = int(torch.randint(1, BLOCKS + 1, (), generator=generator))
        arch = net.anatomy.canonical(Arch((share,), (depth,)))
        assert net.anatomy.blocks(arch) == tuple(sorted(order[:depth]))  # type: ignore[attr-defined]
        loaded.full.double()
        x, t, told = inputs(net)
        x = x.double()
        told = {name: rows.double() if rows.is_floating_point() else rows for name, rows in told.items()}
        with torch.inference_mode():
            extracted, slices = loaded.extract(arch).double(), loaded._slices(arch)
            held, sources = dict(loaded.full.named_parameters()), net.anatomy.segments(arch)
            for name, parameter in extracted.named_parameters():
                parameter.copy_(slices[name])
                assert sources[name].name in held
            told_by = predict(extracted, x, t, told)
            functional = loaded.forward(arch, x, t, told)
            expected = predict(masked(loaded, arch), x, t, told)
        assert (functional - told_by).abs().max() < 1e-9
        assert (told_by - expected).abs().max() < 1e-8 * max(1.0, float(expected.abs().max()))


@pytest.mark.parametrize("kind", CONFIGS)
def test_gradients_reach_every_weight_of_the_full_network_once(kind: str) -> None:
    """The copies that the stock class keeps are one parameter: its gradient is the sum of theirs."""
    net = elastic(CONFIGS[kind])
    loaded = drawn(net)
    x, t, told = inputs(net)
    loaded.full.requires_grad_(True)
    loaded.forward(net.anatomy.full, x, t, told).square().sum().backward()
    held = dict(loaded.full.named_parameters())
    assert all(parameter.grad is not None for parameter in held.values())
    stock = loaded.extract(net.anatomy.full).requires_grad_(True)
    predict(stock, x, t, told).square().sum().backward()
    sums: dict[str, torch.Tensor] = {}
    for name, parameter in stock.named_parameters():
        source = net.anatomy.segments(net.anatomy.full)[name].name
        assert source is not None
        sums[source] = sums.get(source, torch.zeros_like(parameter)) + parameter.grad
    assert sums.keys() == held.keys()
    for name, total in sums.items():
        scale = float(total.abs().max())
        assert torch.allclose(held[name].grad, total, rtol=1e-4, atol=1e-5 * scale), name


def test_a_stock_network_whose_copies_differ_is_refused(tmp_path: Any) -> None:
    settings = {name: value for name, value in DIT.items() if not name.startswith("_")}
    torch.manual_seed(0)
    DiTTransformer2DModel(**settings).save_pretrained(tmp_path / "untied")
    with pytest.raises(UserError, match="is not that of block 0"):
        elastic(DIT, pretrained=str(tmp_path / "untied")).initial(0)


# --------------------------------------------------------------------------------------------------------------- run


@pytest.mark.parametrize("config", [DIT, PIXART, SIZED], ids=["dit", "pixart", "sized"])
def test_branch_by_branch_is_the_stock_forward_to_the_bit(config: dict[str, Any]) -> None:
    net = elastic(config, **({"widths": (1.0,)} if config is SIZED else {}))
    stock = drawn(net).extract(net.anatomy.full)
    x, t, told = inputs(net)
    with torch.inference_mode():
        for at in (t, 500):
            assert torch.equal(run(stock, x, at, condition=told)[0], predict(stock, x, at, told))


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_reused_branch_adds_what_it_added_gated_anew(kind: str) -> None:
    """Against the stock modules called by hand."""
    net = elastic(CONFIGS[kind])
    stock = drawn(net).extract(net.anatomy.full)
    x, _, told = inputs(net)
    reused = ("b1.attn", "b3.mlp", "b4")
    with torch.inference_mode():
        _, cache = run(stock, x, 500, keep=reused, condition=told)
        expected_keys = {"b1.attn", "b3.mlp", "b4.attn", "b4.mlp"} | ({"b4.text"} if kind == "pixart" else set())
        assert cache.keys() - {"prediction"} == expected_keys
        raw: dict[str, torch.Tensor] = {}
        hooks = []
        for index, block in enumerate(stock.transformer_blocks):
            for name, module in (("attn", block.attn1), ("text", block.attn2), ("mlp", block.ff)):
                if module is not None:
                    hooks.append(
                        module.register_forward_hook(
                            lambda _, __, out, key=f"b{index}.{name}": raw.__setitem__(key, out)
                        )
                    )
        predict(stock, x, 500, told)
        for hook in hooks:
            hook.remove()
        for key in expected_keys:
            assert torch.equal(cache[key], raw[key])
        # At the next step, those modules hand out what they did: the stock forward then gates it as that step says.
        for index, block in enumerate(stock.transformer_blocks):
            for name, module in (("attn", block.attn1), ("text", block.attn2), ("mlp", block.ff)):
                if f"b{index}.{name}" in expected_keys:
                    module.register_forward_hook(lambda _, __, out, key=f"b{index}.{name}": raw[key])
        kept = dict(cache)
        expected = predict(stock, x + 0.1, 400, told)
        for module in stock.modules():
            module._forward_hooks.clear()
        found, _ = run(stock, x + 0.1, 400, reuse=reused, cache=kept, condition=told)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("kind", CONFIGS)
def test_gates_of_one_and_zero_are_running_and_reusing(kind: str) -> None:
    net = elastic(CONFIGS[kind])
    stock = drawn(net).extract(net.anatomy.full)
    x, _, told = inputs(net)
    graph = graph_of(stock)
    with torch.inference_mode():
        for finer, reused in ((True, ("b0.attn", "b2.mlp")), (False, ("b1", "b4"))):
            _, cache = run(stock, x, 500, keep=graph.names(True), condition=told)
            gates = {name: torch.tensor(float(name not in reused)) for name in graph.names(finer)}
            mixed, handed = run(stock, x + 0.1, 400, cache=cache, condition=told, gates=gates)
            plain, _ = run(stock, x + 0.1, 400, reuse=reused, cache=cache, condition=told)
            assert torch.allclose(mixed, plain, atol=1e-5)
            for name in reused:
                for output in graph.outputs([name]):
                    assert torch.equal(handed[output], cache[output])


def test_every_set_of_branches_is_legal_and_runs_as_asked() -> None:
    graph = TransformerGraph(3, text=True)
    sets = list(graph.legal_sets(finer=True))
    assert len(sets) == len(set(sets)) == 2**9
    for wanted in sets:
        assert graph.live(wanted, finer=True) == set(wanted)
        assert graph.expand(graph.collapse(set(wanted))) == set(wanted)
    assert graph.live(["b0.attn"]) == frozenset()
    assert graph.live(["b0"]) == {"b0.attn", "b0.text", "b0.mlp"}


# -------------------------------------------------------------------------------------------------------------- cost


def counted(net: Any, reuse: tuple[str, ...] = ()) -> int:
    """Multiply-adds of a call, by torch's own counter."""
    x = torch.empty(1, net.config.in_channels, net.config.sample_size, net.config.sample_size, device="meta")
    told: dict[str, torch.Tensor] = {"class_labels": torch.zeros(1, dtype=torch.long, device="meta")}
    if not isinstance(net, DiTTransformer2DModel):
        told = {"encoder_hidden_states": torch.empty(1, 120, net.config.caption_channels, device="meta")}
    net, t = net.to("meta"), torch.zeros(1, dtype=torch.long, device="meta")
    with torch.inference_mode():
        _, cache = run(net, x, t, keep=reuse, condition=told)
        with FlopCounterMode(display=False) as counter:
            run(net, x, t, reuse=reuse, cache=cache, condition=told)
    return counter.get_total_flops() // 2


@pytest.mark.parametrize(
    ("config", "whole", "without", "stored", "published"),
    [
        (xl("dit"), 118.667, 114.439, 749.83, 675.1),
        (xl("dit", size=64), 524.584, 456.938, 749.83, None),
        (xl("dit", layers=14), 59.343, 57.229, 376.27, None),
        (xl("dit", layers=7), 29.681, 28.624, 189.49, None),
        (xl("dit", layers=12, heads=12, head=64), 23.015, 21.807, 147.44, 130.5),
        (xl("pixart"), 149.055, 142.845, 610.86, None),
        (xl("pixart", size=64), 617.993, 542.420, 610.86, None),
    ],
)
def test_costs_of_published_transformers(
    config: dict[str, Any], whole: float, without: float, stored: float, published: float | None
) -> None:
    net = Elastic(config, (0.5, 1.0))
    full = net.anatomy.full
    cost = net.cost(full)
    assert cost.macs / 1e9 == pytest.approx(whole, abs=6e-4)
    assert (cost.macs - cost.attention_macs) / 1e9 == pytest.approx(without, abs=6e-4)
    assert cost.params / 1e6 == pytest.approx(stored, abs=6e-3)
    if published:
        assert net.cost.distinct_params(full) / 1e6 == pytest.approx(published, abs=6e-2)


@given(
    kind=st.sampled_from(sorted(CONFIGS)),
    share=st.sampled_from([0.25, 0.5, 0.75, 1.0]),
    depth=st.integers(1, BLOCKS),
    data=st.data(),
)
@settings(deadline=None, max_examples=40)
def test_costs_are_what_torch_counts(kind: str, share: float, depth: int, data: st.DataObject) -> None:
    net = elastic(CONFIGS[kind])
    arch = net.anatomy.canonical(Arch((share,), (depth,)))
    stock = skeleton(net.anatomy, arch)
    assert net.cost(arch).params == sum(parameter.numel() for parameter in stock.parameters())
    names = net.cost.graph(arch).names(True)
    reuse = tuple(data.draw(st.sets(st.sampled_from(names), max_size=len(names) - 1)))
    assert net.cost.macs(arch, reuse) == counted(stock, reuse)


def test_deep_transformers_begin_as_their_shallowest_and_can_learn() -> None:
    net = elastic(PIXART)
    loaded = drawn(net)
    shallow = net.anatomy.canonical(Arch((1.0,), (1,)))
    x, t, told = inputs(net)
    with torch.no_grad():
        expected = loaded.forward(shallow, x, t, told)
        list(ZeroInit().fit(loaded, Digits().load(), 0))
        found = predict(loaded.full.eval(), x, t, told)
        assert torch.allclose(found, expected, atol=CALL * float(expected.abs().max().clamp(min=1)))
    begun = net.initial(0)
    list(ZeroInit().fit(begun, Digits().load(), 0))
    ends = {
        name: p for name, p in begun.full.named_parameters() if name.endswith(("to_out.0.weight", "ff.net.2.weight"))
    }
    zero = [name for name, p in ends.items() if not p.any()]
    assert zero
    begun.full.requires_grad_(True)
    for _ in range(3):
        (predict(begun.full, x, t, told) - 1).square().mean().backward()
        with torch.no_grad():
            for parameter in begun.full.parameters():
                if parameter.grad is not None:
                    parameter.sub_(0.1 * parameter.grad)
                    parameter.grad = None
    assert all(ends[name].any() for name in zero)


def test_what_could_never_learn_is_refused() -> None:
    """A DiT's gates are zero: with what they let through at zero too, neither has a gradient."""
    with pytest.raises(UserError, match="none would ever learn"):
        list(ZeroInit().fit(elastic(DIT).initial(0), Digits().load(), 0))
