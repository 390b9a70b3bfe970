from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from dataclasses import replace
from itertools import combinations, islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from safetensors.torch import load_file

from evaluators.images import Digits
from nas.contracts import Guidance, Progress, Schedule, Step, UserError, derive_seed
from nas.testing import check_supernet
from search_spaces.stepwise import Stepwise
from search_spaces.supernet import Elastic
from search_spaces.training import Experts, FineTune, Order, Sandwich, Stages
from search_spaces.training.optimiser import Batches, Optimiser, Teacher
from tests.arithmetic import CALL
from tests.conftest import TINY

SHORT = Sandwich(steps=12, batch=8, warmup=2, checkpoint_every=4)


def train(net: Elastic, folder: Path, training: Sandwich = SHORT, seed: int = 0) -> Iterator[Progress]:
    return training.run(net, Digits(), folder, seed, "cpu")


def test_a_resumed_training_is_bit_identical(tiny_net: Elastic, tmp_path: Path) -> None:
    list(train(tiny_net, tmp_path / "whole"))
    assert len(list(islice(train(tiny_net, tmp_path / "parts"), 7))) == 7  # killed between checkpoints 4 and 8
    resumed = list(train(tiny_net, tmp_path / "parts"))
    assert [tick.done for tick in resumed] == list(range(8, 13)), "whoever is closed keeps what it has"
    whole, parts = (load_file(tmp_path / name / "weights.safetensors") for name in ("whole", "parts"))
    assert whole.keys() == parts.keys()
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    assert not (tmp_path / "parts" / "checkpoint.safetensors").exists()
    assert list(train(tiny_net, tmp_path / "parts")) == []


def test_every_step_trains_the_largest_the_smallest_and_one_between(tmp_path: Path) -> None:
    net = Elastic({**TINY, "block_out_channels": (16, 32)}, widths=(0.25, 0.5, 0.75, 1.0))
    ticks = list(train(net, tmp_path))
    assert all(set(tick.values) in ({"1", "0.25", "0.5"}, {"1", "0.25", "0.75"}) for tick in ticks)
    assert {len(tick.values) for tick in ticks} == {3}
    assert len({frozenset(tick.values) for tick in ticks}) == 2


def test_training_learns_at_every_width(tiny_net: Elastic) -> None:
    ticks = list(replace(SHORT, steps=100, batch=32).fit(tiny_net.initial(0), Digits().load(), 0))
    for width in ("0.25", "0.5", "1"):
        assert np.mean([t.values[width] for t in ticks[-20:]]) < 0.7 * np.mean([t.values[width] for t in ticks[:5]])


def test_fine_tuning_a_schedule_trains_each_net_where_it_serves(tiny_net: Elastic) -> None:
    """Weights that only the full net has must move although it serves the clean steps alone."""
    loaded = tiny_net.initial(0)
    schedule = Schedule((Step(900, tiny_net.uniform(0.5)), Step(300, tiny_net.uniform(1.0))))
    before = loaded.full.conv_in.weight.detach().clone()
    stale, _ = loaded.denoiser(schedule.steps[0])(torch.zeros(1, 1, 8, 8), 900)
    ticks = list(FineTune(steps=40, batch=32, warmup=2, learning_rate=5e-3).fit(loaded, schedule, Digits().load(), 0))
    moved = (loaded.full.conv_in.weight - before).abs()
    assert moved[:4].max() > 0
    assert moved[4:].max() > 0
    assert np.mean([t.values["loss"] for t in ticks[-5:]]) < np.mean([t.values["loss"] for t in ticks[:5]])
    fresh, _ = loaded.denoiser(schedule.steps[0])(torch.zeros(1, 1, 8, 8), 900)
    assert not torch.equal(stale, fresh)


def test_fine_tuning_trains_a_subnet_that_guides_too() -> None:
    """On the timesteps where it does, as an exported folder has it."""
    net = Elastic({**TINY, "num_class_embeds": 11}, (0.5, 1.0))
    whole, half = net.uniform(1.0), net.uniform(0.5)
    images = Digits().load()
    losses = []
    for guidance in (None, Guidance(2.0, half)):
        schedule = Schedule((Step(900, whole, (), guidance), Step(100, whole)))
        [tick] = FineTune(steps=1, batch=64, warmup=1).fit(net.initial(0), schedule, images, 0)
        losses.append(tick.values["loss"])
    assert losses[1] > 1.5 * losses[0]  # of an untrained network, once more on the noisy half of the timesteps and more


def test_fine_tuning_leaves_alone_what_the_schedule_does_not_use(tiny_net: Elastic) -> None:
    loaded = tiny_net.initial(0)
    before = loaded.full.conv_in.weight.detach().clone()
    schedule = Schedule((Step(900, tiny_net.uniform(0.5)),))
    list(FineTune(steps=3, batch=8).fit(loaded, schedule, Digits().load(), 0))
    kept = [
        c for a, b in tiny_net.anatomy.segments(tiny_net.uniform(0.5))["conv_in.weight"].axes[0] for c in range(a, b)
    ]
    unused = [c for c in range(len(before)) if c not in kept]
    assert torch.equal(loaded.full.conv_in.weight[unused], before[unused])
    assert not torch.equal(loaded.full.conv_in.weight[kept], before[kept])


def test_what_cannot_be_trained_is_refused_before_the_first_step(tmp_path: Path) -> None:
    for change, message in (
        ({"sample_size": 16}, r"images are 1x8x8 .* takes 1x16x16"),
        ({"in_channels": 3}, r"takes 3x8x8"),
        ({"out_channels": 3}, "out_channels=3 must equal in_channels=1"),
        ({"num_class_embeds": 10}, "set num_class_embeds to 11 or more"),
        ({"dropout": 0.1}, r"dropout=0\.1"),
    ):
        with pytest.raises(UserError, match=message):
            next(train(Elastic({**TINY, **change}, widths=(0.5, 1.0)), tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_fine_tuning_a_single_step_works(tiny_net: Elastic) -> None:
    schedule = Schedule((Step(900, tiny_net.uniform(0.5)),))
    assert len(list(FineTune(steps=2, batch=4).fit(tiny_net.initial(0), schedule, Digits().load(), 0))) == 2


def test_a_truncated_checkpoint_is_named_and_kept(tiny_net: Elastic, tmp_path: Path) -> None:
    list(islice(train(tiny_net, tmp_path), 5))
    checkpoint = tmp_path / "checkpoint.safetensors"
    checkpoint.write_bytes(checkpoint.read_bytes()[:1000])
    with pytest.raises(UserError, match=r"checkpoint\.safetensors is damaged .* delete it"):
        list(train(tiny_net, tmp_path))
    assert checkpoint.exists()


def test_truncated_or_foreign_weights_are_named(tiny_net: Elastic, tmp_path: Path) -> None:
    list(train(tiny_net, tmp_path))
    with pytest.raises(UserError, match="trained with another network, training, seed or images"):
        list(train(tiny_net, tmp_path, seed=1))
    with pytest.raises(UserError, match="trained with another"):
        list(train(tiny_net, tmp_path, replace(SHORT, batch=9)))
    other = Elastic({**tiny_net.config, "block_out_channels": (16, 16)}, widths=(0.5, 1.0))
    with pytest.raises(UserError, match="of another supernet"):
        other.load(tmp_path, "cpu")
    weights = tmp_path / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(UserError, match="is damaged"):
        tiny_net.load(tmp_path, "cpu")
    with pytest.raises(UserError, match="does not exist"):
        tiny_net.load(tmp_path / "elsewhere", "cpu")


STAGES = Stages(
    (
        replace(SHORT, steps=6, full_only=True),
        Order("magnitude"),
        replace(SHORT, steps=6, distillation=0.5),
        Experts(replace(SHORT, steps=5, distillation=0.5), order=Order(batch=8, stride=250)),
    ),
    checkpoint_every=4,
)


def run_stages(net: Elastic, folder: Path) -> Iterator[Progress]:
    return STAGES.run(net, Digits(), folder, 0, "cpu")


def with_experts(net: Elastic) -> Elastic:
    return replace(net, experts=(300, 700))


def test_stages_killed_anywhere_resume_bit_identically(tiny_net: Elastic, tmp_path: Path) -> None:
    net = with_experts(tiny_net)
    whole = [tick.what for tick in run_stages(net, tmp_path / "whole")]
    assert list(dict.fromkeys(whole)) == [
        *("full network", "order", "supernet"),
        *(f"{what}expert {name}" for name in ("0-299", "300-699", "700-999") for what in ("order of ", "")),
    ]
    for _ in range(80):
        if (tmp_path / "parts" / "weights.safetensors").exists():
            break
        list(islice(run_stages(net, tmp_path / "parts"), 5))  # killed after at most five ticks
    expected, found = (load_file(tmp_path / name / "weights.safetensors") for name in ("whole", "parts"))
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert list(run_stages(net, tmp_path / "parts")) == []


@pytest.mark.long
def test_a_run_that_is_killed_between_two_stages_goes_on(
    tiny_net: Elastic, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When a stage's weights are written, and its checkpoint is still there."""
    net, unlink = with_experts(tiny_net), Path.unlink

    def killed(path: Path, missing_ok: bool = False) -> None:
        raise SystemExit(path)

    list(run_stages(net, tmp_path / "whole"))
    for _ in range(20):
        monkeypatch.setattr(Path, "unlink", killed)
        with contextlib.suppress(SystemExit):
            list(run_stages(net, tmp_path / "parts"))
        monkeypatch.setattr(Path, "unlink", unlink)
        if (tmp_path / "parts" / "weights.safetensors").exists():
            break
        next(run_stages(net, tmp_path / "parts"), None)
    expected, found = (load_file(tmp_path / name / "weights.safetensors") for name in ("whole", "parts"))
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_training_says_what_each_stage_took(tiny_net: Elastic, tmp_path: Path) -> None:
    net = with_experts(tiny_net)
    list(run_stages(net, tmp_path))
    spent = json.loads((tmp_path / "training.json").read_text())
    assert [stage["class"] for stage in spent] == ["Sandwich", "Order", "Sandwich", *["Order", "Sandwich"] * 3]
    full = net.cost(net.anatomy.full).macs
    assert spent[0]["macs"] == 3 * 6 * 8 * full
    assert spent[1]["macs"] == 0
    assert spent[2]["macs"] > 6 * 8 * 3 * full  # the full net, smaller ones, and the teacher for each of them


def test_every_subnet_of_a_step_tells_its_own_loss(tmp_path: Path) -> None:
    """Though two that lack one attention each, at different places, are called the same."""
    net = Elastic({**TINY, "layers_per_block": 2}, (1.0,), attention=True)
    ticks = list(Sandwich(2, 4, between=2).fit(net.initial(0), Digits().load(), 0))
    assert [len(tick.values) for tick in ticks] == [4, 4]
    assert {"1 less 1 attention", "1 less 1 attention (2)"} < ticks[0].values.keys()


def test_experts_train_their_own_weights_on_their_own_timesteps(tiny_net: Elastic, tmp_path: Path) -> None:
    net = with_experts(tiny_net)
    list(run_stages(net, tmp_path))
    loaded = net.load(tmp_path, "cpu")
    assert tuple(loaded.experts) == ("0-299", "300-699", "700-999")
    x = torch.randn(2, 1, 8, 8)
    space = Stepwise(net, (900, 500, 100), (1, 1, 1))
    steps = space.decode((2, 2, 2)).steps
    assert [step.arch.expert for step in steps] == ["700-999", "300-699", "0-299"]
    shared = loaded.denoiser(replace(steps[0], arch=net.uniform(1.0)))(x, 900)[0]
    predictions = [loaded.denoiser(step)(x, 900)[0] for step in steps]
    assert all(not torch.allclose(a, b) for a, b in pairwise([shared, *predictions]))
    assert torch.equal(loaded.extract(steps[0].arch)(x, 900).sample, predictions[0])
    one = Stepwise(tiny_net, (900, 500, 100), (1, 1, 1))
    assert space.cost((2, 2, 2))["params"] == 3 * one.cost((2, 2, 2))["params"]
    check_supernet(loaded, space, samples=2)


def test_an_expert_is_taught_by_itself_as_it_was(tiny_net: Elastic) -> None:
    """With all of the target the teacher's, a first step finds nothing to learn; by the shared network, which is another, it would."""
    net = with_experts(tiny_net)
    loaded = net.initial(0)
    for name in net.expert_names:
        loaded.begin_expert(name)
        with torch.no_grad():
            for parameter in loaded.weights(name).parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
    steps = Stepwise(net, (900, 500, 100), (1, 1, 1)).decode((2, 2, 2)).steps
    [tick] = FineTune(steps=1, batch=32, distillation=1.0).fit(loaded, Schedule(steps), Digits().load(), 0)
    assert tick.values["loss"] < 1e-9  # squares of what float32 rounds
    stage = Sandwich(steps=1, batch=32, distillation=1.0, full_only=True, expert=net.expert_names[1])
    [tick] = stage.fit(loaded, Digits().load(), 0)
    assert max(tick.values.values()) < 1e-9


def test_a_stage_keeps_as_often_as_it_says(tiny_net: Elastic, tmp_path: Path) -> None:
    """Whether it is a training by itself or one of several."""
    for training in (
        Stages((Sandwich(steps=9, batch=8, checkpoint_every=3),)),
        Experts(Sandwich(9, 8, checkpoint_every=3)),
    ):
        net = with_experts(tiny_net) if isinstance(training, Experts) else tiny_net
        folder = tmp_path / type(training).__name__
        ticks = training.run(net, Digits(), folder, 0, "cpu")
        list(islice(ticks, 4))
        assert (folder / "checkpoint.safetensors").exists()
        ticks.close()  # type: ignore[attr-defined]


def test_each_expert_has_an_order_of_its_own(tiny_net: Elastic) -> None:
    """It computes what the shared network does, its channels in an order that is not that of the others."""
    net = with_experts(tiny_net)
    loaded = net.initial(0)
    order = Order(batch=8, stride=100)
    for name in net.expert_names:
        list(order.of(name).fit(loaded, Digits().load(), 0))
    x, t = torch.randn(2, 1, 8, 8), torch.tensor([3, 700])
    with torch.no_grad():
        expected = loaded.full(x, t).sample
        for expert in loaded.experts.values():
            assert torch.allclose(expert(x, t).sample, expected, atol=CALL)
    weights = [net.conv_in.weight for net in (loaded.full, *loaded.experts.values())]
    assert all(not torch.equal(a, b) for a, b in combinations(weights, 2))
    assert sum(order.of(name).macs(net) for name in net.expert_names) == order.macs(net)


@pytest.mark.parametrize(("held", "depths", "widths"), [(("depth",), {2}, {0.5, 1.0}), (("width",), {1, 2}, {1.0})])
def test_what_a_stage_holds_is_as_in_the_full_network(held: Any, depths: set[int], widths: set[float]) -> None:
    config = {**TINY, "block_out_channels": (16, 32), "layers_per_block": 2}
    net = Elastic(config, widths=(0.5, 1.0), depths=(1, 2), per_level=("width", "depth"))
    every = net.subnets(net.options)
    known = {every.flat(i) for i in range(len(every))}
    held_options = net.options.holding(held)
    assert held_options.within(net.options)
    some = net.subnets(held_options)
    subnets = [some.flat(i) for i in range(len(some))]
    assert {*subnets} < known
    assert subnets[-1] == net.anatomy.full
    assert {depth for arch in subnets for depth in net.anatomy.depths(arch)} == depths
    assert {share for arch in subnets for share in arch.widths} == widths
    stage = replace(SHORT, steps=8, held=held)
    ticks = list(stage.fit(net.initial(0), Digits().load(), 0))
    labels = {label for tick in ticks for label in tick.values}
    assert {"depth" not in label for label in labels} == ({True} if held == ("depth",) else {True, False})
    assert {label.startswith("1") for label in labels} == ({True} if held == ("width",) else {True, False})


@pytest.mark.parametrize(
    ("given", "steps"),
    [
        pytest.param({"between": 1}, 150, marks=pytest.mark.long),
        pytest.param({"between": 3}, 50, marks=pytest.mark.long),
        ({"drawn": "by macs"}, 75),
        pytest.param({"distillation": 0.5}, 75, marks=pytest.mark.long),
        ({"full_only": True, "distillation": 0.5}, 5),
    ],
)
def test_a_training_takes_what_it_is_expected_to(given: dict[str, Any], steps: int) -> None:
    """Of 75 subnets drawn or more, whose sizes average out; the full network alone always costs the same."""
    config = {**TINY, "block_out_channels": (16, 32)}
    net = Elastic(config, widths=(0.25, 0.5, 0.75, 1.0), per_level=("width",))
    stage = replace(SHORT, steps=steps, batch=1, **given)
    loaded = net.initial(0)
    list(stage.fit(loaded, Digits().load(), 0))
    assert loaded.trained_macs == pytest.approx(stage.macs(net), rel=0.1)


def test_weights_without_experts_are_refused_where_some_are_wanted(tiny_net: Elastic, tmp_path: Path) -> None:
    list(train(tiny_net, tmp_path))
    with pytest.raises(UserError, match="holds the experts"):
        with_experts(tiny_net).load(tmp_path, "cpu")
    with pytest.raises(UserError, match="needs a supernet with experts"):
        next(Experts(SHORT).run(tiny_net, Digits(), tmp_path / "new", 0, "cpu"))
    for stage in (replace(SHORT, expert="0-300"), Order("magnitude", expert="0-300")):
        with pytest.raises(UserError, match="no expert '0-300'; it has 0-299, 300-699, 700-999"):
            list(stage.fit(with_experts(tiny_net).initial(0), Digits().load(), 0))
    for wrong, words in (
        (replace(SHORT, held=("depth",)), "all subnets have that"),
        (Order(expert="noisy"), "no expert 'noisy'"),
        (replace(SHORT, expert="noisy"), "no expert 'noisy'"),
    ):
        with pytest.raises(UserError, match=words):  # before the first one is trained
            Stages((SHORT, wrong)).check(tiny_net, Digits().load())
    with pytest.raises(UserError, match=r"held=\('depth',\): all subnets have that"):
        replace(SHORT, held=("depth",)).macs(tiny_net)
    with pytest.raises(UserError, match=r"experts \(700, 300\) must be increasing"):
        replace(tiny_net, experts=(700, 300))


def test_a_teacher_is_the_full_net_before_the_stage(tiny_net: Elastic) -> None:
    loaded = tiny_net.initial(0)
    x, t = torch.randn(2, 1, 8, 8), torch.tensor([3, 700])
    noise = torch.randn_like(x)
    with torch.no_grad():
        before = loaded.full(x, t).sample
    teacher = Teacher(loaded, 0.25)
    list(SHORT.fit(loaded, Digits().load(), 0))
    assert torch.allclose(teacher.target(x, t, noise), 0.75 * noise + 0.25 * before, atol=CALL)
    assert torch.equal(Teacher(loaded, 0.0).target(x, t, noise), noise)


def test_the_full_network_that_is_called_is_the_one_that_is_held(tiny_net: Elastic) -> None:
    """Of a large one no second copy would have room; what is handed out is a copy."""
    loaded = tiny_net.initial(0)
    held = dict(loaded.full.named_parameters())
    called = loaded._materialised(loaded.full_arch)
    assert all(p.data_ptr() == held[name].data_ptr() for name, p in called.named_parameters())
    assert not any(p.requires_grad for p in called.parameters())
    out = dict(loaded.extract(loaded.full_arch).named_parameters())
    half = dict(loaded._materialised(tiny_net.uniform(0.5)).named_parameters())
    for name, parameter in held.items():
        assert out[name].data_ptr() != parameter.data_ptr()
        assert half[name].shape == parameter.shape or half[name].is_contiguous()


def test_a_pretrained_folder_becomes_elastic(tiny_net: Elastic, tmp_path: Path) -> None:
    """The full net starts as the saved model, also after the reordering; the shortest elastic training then keeps near it."""
    stock = tiny_net.initial(3).full.eval()
    stock.save_pretrained(tmp_path / "model")
    net = Elastic.from_pretrained(tmp_path / "model", widths=(0.5, 1.0))
    assert net.describe() != tiny_net.describe()
    x = torch.randn(2, 1, 8, 8)
    training = Stages((Order(batch=8, stride=200), replace(SHORT, steps=2, learning_rate=1e-5, distillation=1.0)))
    list(training.run(net, Digits(), tmp_path / "supernet", 0, "cpu"))
    with torch.no_grad():
        expected = stock(x, 5).sample
        found, _ = net.load(tmp_path / "supernet", "cpu").denoiser(Step(5, net.uniform(1.0)))(x, 5)
    assert torch.allclose(found, expected, atol=1e-2)
    assert not torch.equal(
        load_file(tmp_path / "supernet" / "weights.safetensors")["conv_in.weight"], stock.conv_in.weight
    )


def test_folders_without_a_unet_are_refused(tiny_net: Elastic, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"config\.json does not exist; give a folder of a UNet2DModel"):
        Elastic.from_pretrained(tmp_path)
    tiny_net.initial(0).extract(tiny_net.uniform(0.5)).save_pretrained(tmp_path / "pickled", safe_serialization=False)
    with pytest.raises(UserError, match="save the model with safetensors"):
        Elastic.from_pretrained(tmp_path / "pickled", widths=(1.0,))
    DDIMScheduler().save_pretrained(tmp_path / "scheduler")
    with pytest.raises(UserError, match=r"config\.json does not exist"):
        Elastic.from_pretrained(tmp_path / "scheduler")


def test_a_net_that_was_sampled_from_can_be_trained(tiny_net: Elastic) -> None:
    """What slicing keeps must not remember that it was first made without gradients."""
    net = replace(tiny_net, widths=(0.25, 0.75, 1.0), config={**tiny_net.config, "block_out_channels": (16, 32)})
    loaded = net.initial(0)
    with torch.inference_mode():
        loaded.denoiser(Step(5, net.uniform(0.75)))(torch.zeros(1, 1, 8, 8), 5)
    schedule = Schedule((Step(900, net.uniform(0.75)),))
    assert len(list(FineTune(steps=2, batch=4).fit(loaded, schedule, Digits().load(), 0))) == 2


def test_a_training_without_stages_keeps_the_weights_that_it_finds(tiny_net: Elastic, tmp_path: Path) -> None:
    for _ in Stages(()).run(tiny_net, Digits(), tmp_path, 3, "cpu"):
        raise AssertionError("there is nothing to train")
    loaded, drawn = tiny_net.load(tmp_path, "cpu"), tiny_net.initial(derive_seed(3, "supernet", "weights"))
    assert torch.equal(loaded.full.conv_in.weight, drawn.full.conv_in.weight)


def test_every_subnet_of_a_step_has_timesteps_and_noise_of_its_own(
    tiny_net: Elastic, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[tuple[torch.Tensor, torch.Tensor]] = []
    original = Batches.noised

    def noted(self: Batches, *given: Any) -> Any:
        found = original(self, *given)
        drawn.append((found[0], found[2]))
        return found

    monkeypatch.setattr(Batches, "noised", noted)
    list(Sandwich(steps=1, batch=32).fit(tiny_net.initial(0), Digits().load(), 0))
    assert len(drawn) == 3
    for (t, noise), (other_t, other_noise) in combinations(drawn, 2):
        assert not torch.equal(t, other_t)
        assert not torch.equal(noise, other_noise)


def test_gradients_are_clipped_together(tiny_net: Elastic, tmp_path: Path) -> None:
    """After one step Adam's first moment is a tenth of the gradient."""
    net = tiny_net.initial(0)
    optimiser = Optimiser(Sandwich(steps=9, clip=0.25), net, "x")
    for parameter in net.full.parameters():
        parameter.grad = torch.full_like(parameter, 3.0)
    optimiser.update()
    optimiser.save(tmp_path / "state.safetensors")
    moments = [
        tensor for name, tensor in load_file(tmp_path / "state.safetensors").items() if name.startswith("first:")
    ]
    assert float(torch.cat([m.flatten() for m in moments]).norm()) == pytest.approx(0.1 * 0.25, rel=1e-4)


def test_the_share_of_distillation_goes_from_the_noise_to_the_teacher(tiny_net: Elastic) -> None:
    net = tiny_net.initial(0)
    x, t, noise = torch.randn(2, 1, 8, 8), torch.tensor([10, 900]), torch.randn(2, 1, 8, 8)
    with torch.inference_mode():
        taught = net.full.eval()(x, t).sample
    for share in (0.0, 0.25, 1.0):
        assert torch.allclose(Teacher(net, share).target(x, t, noise), (1 - share) * noise + share * taught, atol=CALL)
