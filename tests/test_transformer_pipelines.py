"""Diffusion transformers from a pipeline's folder, through training and export, to a pipeline again."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline, DPMSolverMultistepScheduler, PixArtSigmaPipeline
from safetensors.torch import load_file

from evaluators.conditions import Labels, Prompts
from evaluators.images import Digits
from evaluators.sampling import DDIM, DPMSolver, sample
from evaluators.trajectories import Reuse, Trajectories
from nas.base.exported import read_export, read_network
from nas.contracts import Guidance, ImageSet, Schedule, Step, UserError
from nas.handover.export import export
from nas.handover.stock import export_stock
from nas.testing import check_space, check_supernet
from search_spaces.intervals import free, leading, uniform
from search_spaces.loaded import LoadedElastic
from search_spaces.networks.anatomy import predict
from search_spaces.networks.slices import Arch
from search_spaces.noise import NoiseSchedule
from search_spaces.patterns import Every
from search_spaces.shipped.graph import AROUND
from search_spaces.shipped.train_diffusers import Settings, train
from search_spaces.stepwise import Stepwise
from search_spaces.supernet import Elastic
from search_spaces.text import TextEncoder
from search_spaces.training import Experts, Order, Sandwich, Stages
from search_spaces.training.importance import block_order
from search_spaces.training.optimiser import Optimiser
from tests.conftest import TINY
from tests.pipelines import TEXT_WIDTH, dit, pixart
from tests.pipelines import UNET as TEXT_UNET
from tests.test_transformer import DIT, PIXART

KINDS = ["dit", "pixart"]
TEXTS = ["a photo of a bag", "a small dress", "a boot"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    where = tmp_path_factory.mktemp("transformers")
    dit(where / "dit")
    pixart(where / "pixart")
    return where


def opened(folder: Path, kind: str, **settings: Any) -> Elastic:
    return Elastic.from_pretrained(folder / kind, widths=(0.5, 1.0), depths=(2, 3), **settings)


def conditions_of(kind: str, recipe: Elastic, where: Path) -> Any:
    """Of samples, as an evaluator has them."""
    if kind == "dit":
        return Labels(Digits()).load(where)
    (where / "prompts.txt").write_text("\n".join(TEXTS))
    return Prompts(str(where / "prompts.txt"), recipe.text).load(where)  # type: ignore[arg-type]


def noise(net: Any, count: int, seed: int = 0) -> torch.Tensor:
    rows = [np.random.default_rng((seed, i, 0)).standard_normal(net.state_shape, np.float32) for i in range(count)]
    return torch.from_numpy(np.stack(rows))


def stock_images(
    kind: str, stock: Any, told: Any, drawn: torch.Tensor, monkeypatch: pytest.MonkeyPatch, steps: int, scale: float
) -> torch.Tensor:
    """What the stock pipeline makes of this noise, in [0, 1]."""
    stock.set_progress_bar_config(disable=True)
    common = {"num_inference_steps": steps, "guidance_scale": scale, "output_type": "np"}
    if kind == "dit":
        monkeypatch.setattr("diffusers.pipelines.dit.pipeline_dit.randn_tensor", lambda *_, **__: drawn)
        labels = told.of(0, 0, len(drawn))["class_labels"].tolist()
        images = stock(class_labels=labels, **common).images
    else:
        images = stock(told.texts(0, 0, len(drawn)), latents=drawn, use_resolution_binning=False, **common).images
    return torch.from_numpy(images).permute(0, 3, 1, 2)


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@pytest.mark.parametrize("scale", [1.0, 4.0])
@pytest.mark.parametrize("sampler", [DDIM(), DPMSolver()], ids=["DDIM", "DPM-Solver++"])
@pytest.mark.parametrize("kind", KINDS)
def test_samples_are_those_of_the_stock_pipeline(
    kind: str, sampler: Any, scale: float, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stock: Any = DiffusionPipeline.from_pretrained(folder / kind)
    if isinstance(sampler, DDIM):
        config = stock.scheduler.config
        stock.scheduler = DDIMScheduler.from_config(config, clip_sample=False, timestep_spacing="leading")
    else:
        stock.scheduler = DPMSolverMultistepScheduler.from_config(stock.scheduler.config, final_sigmas_type="zero")
    stock.scheduler.set_timesteps(5)
    timesteps = free(*stock.scheduler.timesteps.tolist())
    recipe = opened(folder, kind, noise=NoiseSchedule(final_alpha="one"))
    net = recipe.initial(0)
    schedule = Schedule(tuple(Step(t, net.full_arch, (), Guidance(scale) if scale != 1 else None) for t in timesteps))
    told = conditions_of(kind, recipe, tmp_path)
    ours = sample(net, schedule, sampler, 0, 0, 3, told)
    theirs = stock_images(kind, stock, told, noise(net, 3), monkeypatch, 5, scale)
    assert torch.allclose((ours / 2 + 0.5).clamp(0, 1), theirs, atol=1e-4)


def test_a_folder_says_what_a_text_is(folder: Path) -> None:
    recipe = opened(folder, "pixart")
    assert recipe.anatomy.tokens == 120
    assert recipe.anatomy.text_channels == (TEXT_WIDTH,)
    assert recipe.condition_kind == "texts"
    assert opened(folder, "dit").condition_kind == "labels"
    assert opened(folder, "dit").anatomy.null_label == 1000


def test_three_channels_are_guided_where_that_is_said(folder: Path) -> None:
    """As DiT's own sampler does it; diffusers guides all."""
    net = opened(folder, "dit", guided_channels=3).initial(0)
    x, told = noise(net, 2), {"class_labels": torch.tensor([3, 7])}
    with torch.inference_mode():
        found, _ = net.denoiser(Step(500, net.full_arch, (), Guidance(4.0)))(x, 500, None, told)
        own = net.noise_by(net.extract(net.full_arch), x, 500, told)
        plain = net.noise_by(net.extract(net.full_arch), x, 500, {"class_labels": torch.full((2,), 1000)})
    guided = plain + 4 * (own - plain)
    assert torch.allclose(found[:, :3], guided[:, :3], atol=1e-5)
    assert torch.allclose(found[:, 3:4], own[:, 3:4], atol=1e-5)


# ----------------------------------------------------------------------------------------------------------- handover


def exported(folder: Path, to: Path, kind: str, **settings: Any) -> tuple[Any, Schedule]:
    recipe = opened(folder, kind, **settings)
    net = recipe.initial(0)
    half = recipe.subnets(recipe.options).flat(0)
    branches = ("b0.attn", "b1") if kind == "dit" else ("b0.text", "b1.mlp")
    steps = (
        Step(801, net.full_arch, (), Guidance(3.0)),
        Step(601, net.full_arch, branches, Guidance(3.0)),
        Step(501, net.full_arch, ("b0", "b1", "b2"), Guidance(3.0)),
        Step(401, half, (), Guidance(2.0, net.full_arch)),
        Step(201, half),
    )
    schedule = Schedule(steps)
    export(net, schedule, DDIM(clip=False).describe(), {}, to)
    return net, schedule


LONG = pytest.mark.long


@pytest.mark.parametrize(
    ("kind", "settings"),
    [("dit", {}), pytest.param("dit", {"guided_channels": 3}, marks=LONG), pytest.param("pixart", {}, marks=LONG)],
)
def test_an_exported_folder_samples_without_this_project(
    kind: str, settings: dict[str, Any], folder: Path, tmp_path: Path
) -> None:
    """In a process that cannot import it."""
    net, schedule = exported(folder, tmp_path / "model", kind, **settings)
    assert {*read_export(tmp_path / "model").networks} == {"transformer_0", "transformer_1"}
    told = conditions_of(kind, net.recipe, tmp_path)
    ours = sample(net, schedule, DDIM(clip=False), 7, 0, 2, told)
    asked = (
        f"class_labels={told.of(7, 0, 2)['class_labels'].tolist()!r}" if kind == "dit" else repr(told.texts(7, 0, 2))
    )
    program = f"""
import sys
for name in ("nas", "search_spaces", "evaluators", "optuna", "pydantic"):
    sys.modules[name] = None
from diffusers import DiffusionPipeline
from safetensors.torch import save_file
pipeline = DiffusionPipeline.from_pretrained("model", custom_pipeline="model", trust_remote_code=True)
made = pipeline({asked}, seed=7, output_type="pt")
save_file({{"images": made.images.contiguous()}}, "images.safetensors")
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert torch.allclose(load_file(tmp_path / "images.safetensors")["images"], (ours / 2 + 0.5).clamp(0, 1), atol=1e-5)


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@pytest.mark.parametrize("scale", [None, 5.0])
@pytest.mark.parametrize("kind", KINDS)
def test_one_network_for_all_steps_is_the_plain_pipeline(
    kind: str, scale: float | None, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = opened(folder, kind, noise=NoiseSchedule(final_alpha="one"))
    net, half = recipe.initial(0), recipe.subnets(recipe.options).flat(0)
    guidance = None if scale is None else Guidance(scale)
    schedule = Schedule(tuple(Step(t, half, (), guidance) for t in leading(4)))
    facts = export_stock(net, schedule, DDIM(clip=False).describe(), {}, tmp_path / "stock")
    assert facts["pipeline"] == {"dit": "DiTPipeline", "pixart": "PixArtAlphaPipeline"}[kind]
    assert facts.get("max_sequence_length") == {"dit": None, "pixart": 120}[kind]
    stock: Any = DiffusionPipeline.from_pretrained(tmp_path / "stock")
    told = conditions_of(kind, recipe, tmp_path)
    ours = sample(net, schedule, DDIM(clip=False), 0, 0, 2, told)
    theirs = stock_images(kind, stock, told, noise(net, 2), monkeypatch, 4, facts["guidance_scale"])
    assert torch.allclose((ours / 2 + 0.5).clamp(0, 1), theirs, atol=1e-4)


def test_what_the_plain_pipeline_cannot_do_is_refused(folder: Path, tmp_path: Path) -> None:
    dit(tmp_path / "ten", classes=10)
    for where, settings, scale, words in (
        (tmp_path / "ten", {}, 2.0, "DiTPipeline knows 1000 classes, its network 10"),
        (folder / "dit", {"guided_channels": 3}, 2.0, "it guides 3 channels alone"),
        (folder / "dit", {}, 0.5, "it guides by 0.5, and pipelines guide by more than 1 alone"),
    ):
        net = Elastic.from_pretrained(where, widths=(1.0,), **settings).initial(0)
        schedule = Schedule(tuple(Step(t, net.full_arch, (), Guidance(scale)) for t in leading(4)))
        with pytest.raises(UserError, match=words):
            export_stock(net, schedule, DDIM(clip=False).describe(), {}, tmp_path / "stock")


def test_blocks_that_run_again_in_the_backward_pass_change_no_loss(folder: Path, tmp_path: Path) -> None:
    """Though one of them makes the map that is compared with the full network's."""
    data, losses = Digits().load(), []
    pixels = np.repeat(np.repeat(np.repeat(data.pixels[:24], 2, axis=2), 2, axis=3), 3, axis=1)
    for checkpointing in (False, True):
        where = tmp_path / f"model-{checkpointing}"
        exported(folder, where, "dit")
        settings = Settings(steps=6, batch=4, warmup=0, features=0.1, checkpointing=checkpointing)
        with closing(train(where, pixels, settings, cpu=True, labels=data.labels[:24])) as ticks:  # type: ignore[index]
            losses.append([next(ticks)["loss"] for _ in range(2)])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


@pytest.mark.long
def test_an_exported_transformer_is_trained_with_one_embedder(folder: Path, tmp_path: Path) -> None:
    """So that what was trained can be opened again; stopped and gone on with, it is what it would have been."""
    exported(folder, tmp_path / "model", "dit")
    data = Digits().load()
    pixels = np.repeat(np.repeat(np.repeat(data.pixels[:24], 2, axis=2), 2, axis=3), 3, axis=1)
    labels = data.labels[:24]  # type: ignore[index]
    settings = Settings(steps=6, batch=4, warmup=0, features=0.1, checkpoint_every=2)
    ticks = train(tmp_path / "model", pixels, settings, cpu=True, labels=labels)
    for tick in ticks:
        if tick["model"] == "transformer_0" and tick["step"] == 3:
            break
    ticks.close()
    for _ in train(tmp_path / "model", pixels, settings, cpu=True, labels=labels):
        pass
    trained = read_network(tmp_path / "model" / "trained" / "transformer_0")
    before = read_network(tmp_path / "model" / "transformer_0")
    first, *others = trained.transformer_blocks
    table = "class_embedder.embedding_table.weight"
    assert not torch.equal(
        first.norm1.emb.state_dict()[table], before.transformer_blocks[0].norm1.emb.state_dict()[table]
    )
    for other in others:
        for name, tensor in other.norm1.emb.state_dict().items():
            assert torch.equal(tensor, first.norm1.emb.state_dict()[name])
    again = Elastic.from_pretrained(tmp_path / "model" / "trained" / "transformer_0", widths=(0.5, 1.0)).initial(0)
    x = noise(again, 2)
    told = {"class_labels": torch.tensor([1, 2])}
    with torch.inference_mode():
        assert torch.equal(predict(again.extract(again.full_arch), x, 500, told), predict(trained, x, 500, told))
    exported(folder, tmp_path / "whole", "dit")
    for _ in train(tmp_path / "whole", pixels, settings, cpu=True, labels=labels):
        pass
    whole = read_network(tmp_path / "whole" / "trained" / "transformer_0").state_dict()
    for name, tensor in trained.state_dict().items():
        assert torch.equal(tensor, whole[name]), name


# ----------------------------------------------------------------------------------------------------------- training


@pytest.fixture
def garments() -> ImageSet:
    data = Digits().load()
    return replace(data, pixels=data.pixels[:64], labels=data.labels[:64])  # type: ignore[index]


@pytest.mark.parametrize("config", [DIT, PIXART], ids=KINDS)
def test_fresh_weights_begin_at_nothing(config: dict[str, Any]) -> None:
    """adaLN-Zero: the prediction is zero, and a DiT's blocks add nothing."""
    net = Elastic(config, (0.5, 1.0)).initial(0)
    x, told = noise(net, 2), net.recipe.anatomy.some_condition(2)
    stock = net.extract(net.full_arch)
    with torch.inference_mode():
        assert torch.equal(predict(stock, x, 500, told), torch.zeros(2, 6, 8, 8))
        if config is DIT:
            hidden = torch.randn(2, 16, 32)
            block = stock.transformer_blocks[1]
            handed = block(hidden, timestep=torch.tensor([3, 4]), class_labels=torch.tensor([1, 2]))
            assert torch.equal(handed, hidden)


PIXELS = {**DIT, "in_channels": 1, "out_channels": 1}


def test_labels_are_dropped_once_for_all_blocks(garments: ImageSet, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the step's own generator: the stock class in training mode would drop others in each block, from torch's global one."""
    gradients: list[dict[str, torch.Tensor]] = []

    def noted(self: Optimiser, *_: Any) -> None:
        gradients.append({name: p.grad.clone() for name, p in self._named.items() if p.grad is not None})

    monkeypatch.setattr(Optimiser, "update", noted)
    stage = Sandwich(steps=1, batch=8, full_only=True, drop=0.5)
    for seed in (1, 2):
        net = Elastic(PIXELS, (0.5, 1.0)).initial(0)
        with torch.no_grad():
            for number, parameter in enumerate(net.full.parameters()):
                generator = torch.Generator().manual_seed(number)
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
        torch.manual_seed(seed)
        ticks = stage.fit(net, garments, 0)
        next(ticks)
        del ticks
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        assert torch.equal(gradient, gradients[1][name]), name


def test_a_training_that_was_interrupted_ends_as_one_that_was_not(garments: ImageSet, tmp_path: Path) -> None:
    recipe = Elastic(PIXELS, (0.5, 1.0), depths=(2, 5))

    class Source:
        def load(self) -> ImageSet:
            return garments

    stage = Sandwich(steps=6, batch=4, warmup=0, checkpoint_every=2)
    for _ in stage.run(recipe, Source(), tmp_path / "whole", 0, "cpu"):
        pass
    ticks = stage.run(recipe, Source(), tmp_path / "stopped", 0, "cpu")
    for tick in ticks:
        if tick.done == 3:
            break
    ticks.close()  # type: ignore[attr-defined]
    for _ in stage.run(recipe, Source(), tmp_path / "stopped", 0, "cpu"):
        pass
    one, other = (load_file(tmp_path / name / "weights.safetensors") for name in ("whole", "stopped"))
    assert one.keys() == other.keys()
    assert not any("transformer_blocks.1.norm1.emb" in name for name in one), "copies are not kept"
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name
    loaded = recipe.load(tmp_path / "whole", "cpu")
    assert loaded.recipe.digest(tmp_path / "whole") == recipe.digest(tmp_path / "stopped")


def test_a_network_that_takes_labels_and_says_variance_is_trained(garments: ImageSet) -> None:
    net = Elastic({**PIXELS, "out_channels": 2}, (0.5, 1.0)).initial(0)
    losses = [tick.values["1"] for tick in Sandwich(steps=3, batch=4, warmup=0).fit(net, garments, 0)]
    assert all(np.isfinite(losses))
    with pytest.raises(UserError, match="knows 5 classes and one of none"):
        Sandwich(steps=1).check(Elastic({**PIXELS, "num_embeds_ada_norm": 5}, (1.0,)), garments)


def test_each_interval_may_have_an_expert_of_its_own(garments: ImageSet, tmp_path: Path) -> None:
    """Another copy of the weights, with one embedder too, kept and read back."""
    recipe = Elastic(PIXELS, (0.5, 1.0), experts=(500,))
    stages = Stages((Sandwich(steps=2, batch=4, warmup=0), Experts(Sandwich(steps=2, batch=4, warmup=0))))

    class Source:
        def load(self) -> ImageSet:
            return garments

    for _ in stages.run(recipe, Source(), tmp_path, 0, "cpu"):
        pass
    loaded = recipe.load(tmp_path, "cpu")
    assert [*loaded.experts] == ["0-499", "500-999"]
    for net in (loaded.full, *loaded.experts.values()):
        assert len({id(block.norm1.emb) for block in net.transformer_blocks}) == 1
    x, told = noise(loaded, 2), {"class_labels": torch.tensor([1, 2])}
    archs = [Arch((0.5,), expert=name) for name in ("", *loaded.experts)]
    with torch.inference_mode():
        made = [predict(loaded.extract(arch), x, 500, told) for arch in archs]
    assert not torch.equal(made[0], made[1])
    assert not torch.equal(made[1], made[2])
    space = Stepwise(recipe, uniform(4), (2, 2), patterns=(Every(1), Every(2, (AROUND,))), finer=True)
    check_space(space)
    check_supernet(loaded, space)


@pytest.mark.parametrize("criterion", ["gradient", "magnitude", "random"])
def test_heads_and_hidden_channels_are_reordered_and_the_stream_is_not(criterion: Any, garments: ImageSet) -> None:
    """Its channels carry positions; the full network computes what it did, and narrower ones something else."""
    recipe = Elastic(PIXELS, (0.5, 1.0))
    net = recipe.initial(0)
    for _ in Sandwich(steps=3, batch=8, warmup=0, learning_rate=1e-2).fit(net, garments, 0):
        pass
    x, t, told = noise(net, 2), torch.tensor([100, 900]), {"class_labels": torch.tensor([1, 2])}
    with torch.inference_mode():
        before = [net.forward(Arch((share,)), x, t, told) for share in (1.0, 0.5)]
    patches = net.full.pos_embed.proj.weight.clone()
    for _ in Order(criterion, batch=8, stride=100).fit(net, garments, 0):
        pass
    with torch.inference_mode():
        after = [net.forward(Arch((share,)), x, t, told) for share in (1.0, 0.5)]
    assert torch.equal(net.full.pos_embed.proj.weight, patches)
    assert torch.allclose(before[0], after[0], atol=1e-4)
    assert not torch.allclose(before[1], after[1], atol=1e-4)


def test_widths_may_be_numbers_of_channels() -> None:
    net = Elastic(PIXELS, channels=((16, 32),), depths=(2, 5))
    assert net.subnets(net.options).flat(0) == Arch((0.5,), (2,))
    with pytest.raises(UserError, match=r"channels 12: .* legal: level 0: 8, 16, 24, 32"):
        Elastic(PIXELS, channels=((12, 32),))


def test_blocks_that_run_again_in_the_backward_pass_give_the_same_gradients(
    garments: ImageSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: dict[str, dict[str, torch.Tensor]] = {}
    for name, change in (("plain", {}), ("again", {"checkpointing": True, "accumulate": 2})):
        gradients: dict[str, torch.Tensor] = {}

        def noted(self: Optimiser, *_: Any, into: dict[str, torch.Tensor] = gradients) -> None:
            into.update({name: p.grad.clone() for name, p in self._named.items() if p.grad is not None})

        monkeypatch.setattr(Optimiser, "update", noted)
        net = Elastic(PIXELS, (0.5, 1.0)).initial(0)
        with torch.no_grad():
            for number, parameter in enumerate(net.full.parameters()):
                generator = torch.Generator().manual_seed(number)
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
        next(Sandwich(steps=1, batch=8, **change).fit(net, garments, 0))  # type: ignore[arg-type]
        found[name] = gradients
    assert found["plain"].keys() == found["again"].keys()
    # Of all: a bias of keys has none but rounding, since what it adds is the same for all of them.
    scale = max(float(gradient.abs().max()) for gradient in found["plain"].values())
    for name, gradient in found["plain"].items():
        assert torch.allclose(gradient, found["again"][name], rtol=1e-4, atol=1e-5 * scale), name


def test_blocks_are_ordered_by_what_their_loss_costs(garments: ImageSet) -> None:
    """One that adds nothing goes first, one that adds much last; its subnets then compute what the full network does."""
    recipe = Elastic(PIXELS, (1.0,), depths=(4, 5))
    net = recipe.initial(0)
    for _ in Sandwich(steps=5, batch=16, warmup=0, learning_rate=1e-2, full_only=True).fit(net, garments, 0):
        pass
    with torch.no_grad():
        for part in (
            net.full.transformer_blocks[2].norm1.linear.weight,
            net.full.transformer_blocks[2].norm1.linear.bias,
        ):
            part.zero_()
    order = block_order(net, garments, 0)
    assert sorted(order) == [0, 1, 2, 3, 4]
    arch = Arch((1.0,), (4,))
    x, t = noise(net, 2), torch.tensor([100, 900])
    told = {"class_labels": torch.tensor([1, 2])}

    def lacking(last: int) -> torch.Tensor:
        """What the network predicts without this block."""
        others = replace(recipe, block_order=(*(block for block in range(5) if block != last), last))
        with torch.inference_mode():
            return LoadedElastic(others, net.full, net.codec).forward(arch, x, t, told)

    with torch.inference_mode():
        whole = net.forward(net.full_arch, x, t, told)
    assert torch.allclose(lacking(2), whole, atol=1e-5), "a block whose gates are shut adds nothing"
    changes = {block: float((lacking(block) - whole).square().mean()) for block in range(5)}
    assert changes[order[0]] > changes[order[-1]]
    with pytest.raises(UserError, match="of a transformer alone"):
        block_order(Elastic(TINY, (1.0,)).initial(0), garments, 0)


# ----------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("change", "options", "words"),
    [
        ({"mlp_ratio": 2}, {}, "unexpected keyword argument 'mlp_ratio'"),
        ({}, {"attention": True}, "no stock transformer lacks the attention, or the feed-forward layers"),
        ({}, {"middle": True}, "a transformer is made of blocks alone"),
        ({}, {"widths": (0.3, 1.0)}, "legal for all levels: 0.25, 0.5, 0.75, 1"),
        ({}, {"groups": "size"}, "has no norm groups"),
        ({}, {"heads": "slim"}, "has heads of one size at every width"),
        ({}, {"block_order": (0, 1)}, "must name each of the 5 blocks once"),
        ({}, {"depths": (2, 9)}, "must include 5, the full network"),
        ({"sample_size": 9}, {}, "must be a multiple of patch_size=2"),
        ({"attention_head_dim": 7, "num_attention_heads": 4}, {"widths": (0.5, 1.0)}, "cannot carry positions"),
        ({"sample_size": (8, 8)}, {}, "sample_size=.8, 8. must be a whole number"),
        ({"patch_size": 0}, {}, "patch_size=0 must be a whole number"),
        ({"num_attention_heads": 0}, {}, "num_attention_heads=0 must be a whole number"),
        ({"num_embeds_ada_norm": 0}, {}, "num_embeds_ada_norm=0 must be a whole number"),
        ({}, {"layers": (1, 2)}, "a transformer is made of blocks alone"),
        ({}, {"tokens": 12}, "a DiTTransformer2DModel reads no text"),
        ({"norm_elementwise_affine": True}, {}, "norm_elementwise_affine=True is not elastic"),
    ],
)
def test_what_no_stock_transformer_can_be_is_refused(
    change: dict[str, Any], options: dict[str, Any], words: str
) -> None:
    with pytest.raises(UserError, match=words):
        Elastic({**DIT, **change}, **{"widths": (0.5, 1.0), **options})


def test_a_pixart_that_is_told_sizes_has_its_own_width(folder: Path) -> None:
    sized = {**PIXART, "num_attention_heads": 6, "cross_attention_dim": 48, "use_additional_conditions": True}
    with pytest.raises(UserError, match="let its depth alone differ"):
        Elastic(sized, (0.5, 1.0))
    assert Elastic(sized, (1.0,), depths=(2, 5)).initial(0).full_arch
    with pytest.raises(UserError, match="so wide is the projected text"):
        Elastic({**PIXART, "cross_attention_dim": 24}, (1.0,))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bare", [False, True])
def test_folders_of_the_transformers_former_name_are_opened(
    bare: bool, kind: str, folder: Path, tmp_path: Path
) -> None:
    """As those that are released: diffusers tells the two by their norms."""
    shutil.copytree(folder / kind, tmp_path / kind)
    config = tmp_path / kind / "transformer" / "config.json"
    told = json.loads(config.read_text())
    config.write_text(json.dumps({**told, "_class_name": "Transformer2DModel", "num_vector_embeds": None}))
    index = tmp_path / kind / "model_index.json"
    parts = json.loads(index.read_text())
    index.write_text(json.dumps({**parts, "transformer": ["diffusers", "Transformer2DModel"]}))
    net = Elastic.from_pretrained(tmp_path / kind / ("transformer" if bare else ""), widths=(0.5, 1.0))
    ours, theirs = net.initial(0).full.state_dict(), opened(folder, kind).initial(0).full.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_configs_of_all_families_are_told_apart(folder: Path) -> None:
    """As the stock models have them, every setting named."""
    text = Elastic({**TEXT_UNET, "sample_size": 8}, (1.0,))
    nets = [text, Elastic(TINY, (1.0,)), Elastic(DIT, (1.0,)), Elastic(PIXART, (1.0,))]
    for net in nets:
        config = dict(net.initial(0).full.config)
        again = Elastic({name: value for name, value in config.items() if not name.startswith("_")}, (1.0,))
        assert type(again.anatomy) is type(net.anatomy)


def test_a_tokenizer_that_is_a_sentencepiece_model_and_a_sharded_encoder_are_read(folder: Path, tmp_path: Path) -> None:
    """As PixArt's folders have them."""
    import sentencepiece
    from transformers import T5EncoderModel

    shutil.copytree(folder / "pixart", tmp_path / "pixart")
    where = tmp_path / "pixart" / "tokenizer"
    (where / "tokenizer.json").unlink()
    (tmp_path / "texts.txt").write_text("\n".join(TEXTS * 50))
    settings: dict[str, Any] = {"vocab_size": 20, "pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1, "minloglevel": 2}
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "texts.txt"), model_prefix=str(where / "spiece"), **settings
    )
    encoder = T5EncoderModel.from_pretrained(folder / "pixart" / "text_encoder")
    encoder.resize_token_embeddings(20)
    shutil.rmtree(tmp_path / "pixart" / "text_encoder")
    encoder.save_pretrained(tmp_path / "pixart" / "text_encoder", max_shard_size="4KB", variant="fp16")
    assert len(list((tmp_path / "pixart" / "text_encoder").glob("*.safetensors"))) > 1
    net = opened(tmp_path, "pixart").initial(0)
    rows = net.text.rows(TEXTS)(torch.arange(3))  # type: ignore[union-attr]
    assert rows["encoder_hidden_states"].shape == (3, 120, TEXT_WIDTH)
    assert 0 < int(rows["encoder_attention_mask"][0].sum()) < 120
    (where / "spiece.model").write_bytes(b"damaged")
    with pytest.raises(UserError, match="tokenizer cannot be read"):
        dict(opened(tmp_path, "pixart").initial(0).text.components)  # type: ignore[union-attr]


def test_texts_of_another_image_size_are_kept_by_themselves(folder: Path, tmp_path: Path) -> None:
    """A T5 encoder's rows say the size, whether a length is given or the tokenizer says one."""
    with pytest.raises(UserError, match="does not say how many tokens a text has; give length=120"):
        TextEncoder(str(folder / "pixart")).load(tmp_path, "cpu").rows(TEXTS)
    shutil.copytree(folder / "pixart", tmp_path / "pixart")
    config = tmp_path / "pixart" / "tokenizer" / "tokenizer_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "model_max_length": 9}))
    for length in (None, 7):
        for size in ((16, 16), (24, 16)):
            recipe = TextEncoder(str(tmp_path / "pixart"), size=size, length=length)
            rows = recipe.load(tmp_path, "cpu").rows(TEXTS)(torch.arange(3))
            assert rows["encoder_attention_mask"].shape == (3, length or 9)
            assert rows["resolution"].tolist() == [list(size)] * 3
    small, large = (TextEncoder(str(tmp_path / "pixart"), size=size).describe() for size in ((16, 16), (24, 16)))
    assert small != large


def test_half_precision_of_what_is_reused_goes_along_with_the_schedule(folder: Path, tmp_path: Path) -> None:
    recipe = opened(folder, "dit")
    net = recipe.initial(0)
    branches = ("b0", "b1.mlp")
    steps = tuple(
        Step(t, net.full_arch, branches if number % 2 else (), Guidance(3.0)) for number, t in enumerate(leading(4))
    )
    told = conditions_of("dit", recipe, tmp_path)
    walk = Trajectories(net, DDIM(clip=False), conditions=told, reuse=Reuse("bfloat16"))
    ours = walk.images(Schedule(steps), 7, 0, 2) / 2 + 0.5
    export(net, Schedule(steps), {**DDIM(clip=False).describe(), "reuse_precision": "bfloat16"}, {}, tmp_path / "model")
    read_export(tmp_path / "model")
    pipeline: Any = DiffusionPipeline.from_pretrained(
        tmp_path / "model", custom_pipeline=str(tmp_path / "model"), trust_remote_code=True
    )
    pipeline.set_progress_bar_config(disable=True)
    labels = told.of(7, 0, 2)["class_labels"].tolist()
    half = pipeline(class_labels=labels, seed=7, output_type="pt").images
    assert torch.allclose(half, ours.clamp(0, 1), atol=1e-5)
    exact = pipeline(class_labels=labels, seed=7, output_type="pt", reuse_dtype=torch.float32).images
    assert (exact - half).abs().max() > 1e-6


def test_an_exported_pixart_is_opened_again_with_texts_of_its_own_length(folder: Path, tmp_path: Path) -> None:
    """Its tokenizer's would be another one."""
    recipe = opened(folder, "pixart")
    net = recipe.initial(0)
    steps = tuple(Step(t, net.full_arch, (), Guidance(3.0)) for t in leading(2))
    export(net, Schedule(steps), DDIM(clip=False).describe(), {}, tmp_path / "model")
    again = Elastic.from_pretrained(tmp_path / "model", widths=(1.0,))
    assert isinstance(recipe.text, TextEncoder)
    assert isinstance(again.text, TextEncoder)
    assert again.tokens == recipe.tokens == again.text.length == recipe.text.length == 120


def test_block_order_is_for_transformers() -> None:
    with pytest.raises(UserError, match="block_order: a UNet2DModel is no transformer"):
        Elastic(TINY, (1.0,), block_order=(1, 0))


def test_pixart_sigma_is_handed_out_as_what_it_is(tmp_path: Path) -> None:
    """Its pipeline says how long a text is, and another would read it shorter."""
    PixArtSigmaPipeline(**pixart(tmp_path / "alpha").components).save_pretrained(tmp_path / "sigma")
    recipe = Elastic.from_pretrained(tmp_path / "sigma", widths=(1.0,), noise=NoiseSchedule(final_alpha="one"))
    assert recipe.tokens == 300
    net = recipe.initial(0)
    schedule = Schedule(tuple(Step(t, net.full_arch, (), Guidance(5.0)) for t in leading(4)))
    facts = export_stock(net, schedule, DDIM(clip=False).describe(), {}, tmp_path / "stock")
    assert (facts["pipeline"], facts["max_sequence_length"]) == ("PixArtSigmaPipeline", 300)
    assert Elastic.from_pretrained(tmp_path / "stock", widths=(1.0,)).tokens == 300
