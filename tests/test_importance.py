"""Channel importance: the criterion against autograd, the reordering against the network that it must not change."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from benchmarks.cost import DDPM_CIFAR10
from evaluators.images import Digits
from nas.contracts import UserError
from search_spaces.supernet import Elastic
from search_spaces.training.importance import Order, channel_scores, permutations, permute, pruned
from tests.arithmetic import CALL
from tests.test_options import CONFIGS, inputs
from tests.test_supernet import randomised


@pytest.mark.parametrize("groups", ["count", "size"])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_reordered_network_computes_what_it_did(name: str, groups: Any) -> None:
    config = {**CONFIGS[name], "norm_num_groups": 4, "attention_head_dim": 4}
    net = Elastic(config, widths=(1.0,), groups=groups)
    loaded = randomised(net)
    x, t = inputs(net)
    before = loaded.full(x, t).sample
    weights = {name: p.clone() for name, p in loaded.full.named_parameters()}
    scores = channel_scores(net.anatomy, weights, {name: torch.randn_like(w) for name, w in weights.items()})
    order = permutations(net.anatomy, scores)
    permute(loaded, order)
    moved = [name for name, p in loaded.full.named_parameters() if not torch.equal(p, weights[name])]
    assert len(moved) > len(weights) / 3
    assert torch.allclose(loaded.full(x, t).sample, before, atol=CALL * float(before.abs().max().clamp(min=1)))


@pytest.mark.parametrize("criterion", ["gradient", "magnitude", "random"])
def test_every_criterion_is_a_stage_that_keeps_the_function(criterion: Any, tiny_net: Elastic) -> None:
    loaded = randomised(tiny_net)
    x, t = inputs(tiny_net)
    before = loaded.full(x, t).sample
    first = loaded.full.conv_in.weight.clone()
    list(Order(criterion, batch=16, stride=100).fit(loaded, Digits().load(), 0))
    assert torch.allclose(loaded.full(x, t).sample, before, atol=CALL)
    assert not torch.equal(loaded.full.conv_in.weight, first)
    assert all(p.grad is None and not p.requires_grad for p in loaded.full.parameters())


def test_the_most_important_channel_of_each_group_comes_first(tiny_net: Elastic) -> None:
    """A channel whose weights are made large must be first in its norm group after the reordering by magnitude."""
    loaded = randomised(tiny_net)
    name = "down_blocks.0.resnets.0.conv1.weight"
    with torch.no_grad():
        dict(loaded.full.named_parameters())[name][[2, 7]] *= 100
    list(Order("magnitude").fit(loaded, Digits().load(), 0))
    largest = dict(loaded.full.named_parameters())[name].abs().sum((1, 2, 3))
    assert sorted(largest.argsort(descending=True)[:2].tolist()) == [0, 4]  # two groups of four channels


def test_the_scores_sum_gradients_before_the_product(tiny_net: Elastic) -> None:
    """Against one backward pass of the summed losses, and a threshold that stops the visit."""
    data = Digits().load()
    loaded = randomised(tiny_net)
    settings = Order(batch=8, stride=250, threshold=0.0)
    ticks = list(settings.accumulate(loaded, data, 0))
    summed = {name: p.grad.clone() for name, p in loaded.full.named_parameters()}
    assert [tick.done for tick in ticks] == [0, 250, 500, 750]
    again = randomised(tiny_net)
    again.full.requires_grad_(True)
    list(replace(settings, stride=1000).accumulate(again, data, 0))
    only_first = dict(again.full.named_parameters())["conv_in.weight"].grad
    assert not torch.allclose(summed["conv_in.weight"], only_first)
    weights = dict(loaded.full.named_parameters())
    scores = channel_scores(tiny_net.anatomy, weights, summed)
    inner = "down_blocks.0.resnets.0.inner"
    expected = sum(
        (weights[f"down_blocks.0.resnets.0.{part}"] * summed[f"down_blocks.0.resnets.0.{part}"])
        .double()
        .abs()
        .transpose(0, dim)
        .flatten(1)
        .sum(1)
        for part, dim in (("conv1.weight", 0), ("conv2.weight", 1), ("time_emb_proj.weight", 0))
    ) + sum(
        (weights[f"down_blocks.0.resnets.0.{part}"] * summed[f"down_blocks.0.resnets.0.{part}"]).double().abs()
        for part in ("conv1.bias", "norm2.weight", "norm2.bias", "time_emb_proj.bias")
    )
    assert torch.allclose(scores[inner], expected.detach())
    fewer = list(Order(batch=8, stride=250, threshold=0.995).accumulate(randomised(tiny_net), data, 0))
    assert len(fewer) < 4


def test_the_static_baseline_has_the_published_size() -> None:
    """Diff-Pruning at ratio 0.3 on the DDPM CIFAR-10 network: 19.85 M parameters, 3.39 GMACs."""
    net = Elastic(DDPM_CIFAR10, widths=(1.0,))
    cost = net.cost(pruned(net.anatomy, 0.3))
    assert cost.params == pytest.approx(19.85e6, rel=0.02)
    assert cost.macs - cost.attention_macs == pytest.approx(3.39e9, rel=0.02)
    with pytest.raises(UserError, match=r"ratio 1\.5"):
        pruned(net.anatomy, 1.5)


def test_settings_out_of_range_are_refused() -> None:
    with pytest.raises(UserError, match="criterion='luck'"):
        Order("luck")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="threshold=1"):
        Order(threshold=1.0)
