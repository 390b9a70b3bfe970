"""A schedule as a file, applied to pipelines as people have them: the same images as the exported folder's, to the last bit."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMPipeline,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    LDMPipeline,
    UNet2DModel,
)

from evaluators.captions import NoImages
from evaluators.sampling import DDIM as DDIM_SAMPLER
from evaluators.sampling import DPMSolver, sample
from nas.contracts import Guidance, LoadedSupernet, Schedule, Step, UserError
from nas.handover.export import export
from nas.handover.portable import module, portable, write_portable
from search_spaces import layouts, shipped
from search_spaces.patterns import ALL
from search_spaces.shipped.graph import graph_of
from search_spaces.supernet import Elastic
from search_spaces.training import Stages
from tests.pipelines import LINEAR, VAE, dit, pixart, stable_diffusion, stable_diffusion_xl

SHIPPED = Path(shipped.__file__).parent
FILES = [SHIPPED / f"{name}.py" for name in ("graph", "walks", "reuse", "stepping", "schedule_file")]
CODE = module(FILES, SHIPPED / "apply.py")
DDIM = {"class": "DDIM", "eta": 0.0, "clip": False}
DPM_SOLVER = {"class": "DPMSolver", "clip": False}
UNET: dict[str, Any] = {
    "sample_size": 8,
    "in_channels": 1,
    "out_channels": 1,
    "block_out_channels": (16, 32),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 1,
    "norm_num_groups": 4,
}


def pixels(folder: Path, seed: int = 0) -> DDIMPipeline:
    torch.manual_seed(seed)
    return saved(
        DDIMPipeline(unet=UNet2DModel(**UNET), scheduler=DDIMScheduler(**LINEAR, set_alpha_to_one=True)), folder
    )


def ancestral(folder: Path) -> DDPMPipeline:
    torch.manual_seed(0)
    return saved(DDPMPipeline(unet=UNet2DModel(**UNET), scheduler=DDPMScheduler(**LINEAR)), folder)


def latents(folder: Path) -> LDMPipeline:
    torch.manual_seed(0)
    vae = AutoencoderKL(**{**VAE, "in_channels": 1, "out_channels": 1, "latent_channels": 1})
    return saved(LDMPipeline(vqvae=vae, unet=UNet2DModel(**UNET), scheduler=DDIMScheduler(**LINEAR)), folder)


def saved(pipeline: Any, folder: Path) -> Any:
    pipeline.save_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


Make = Callable[[Path], Any]
KINDS: dict[str, tuple[Make, dict[str, Any], float | None]] = {
    "ddim": (pixels, {}, None),
    "ddpm": (ancestral, {}, None),
    "ldm": (latents, {}, None),
    "dit": (dit, {"class_labels": [0, 1, 1]}, 2.0),
    "stable diffusion": (
        stable_diffusion,
        {"prompt": ["a bag", "a boot", "a small coat"], "negative_prompt": ["dress"] * 3},
        3.0,
    ),
    "xl": (stable_diffusion_xl, {"prompt": ["a bag", "a boot", "a small coat"], "negative_prompt": ["dress"] * 3}, 3.0),
    "pixart": (pixart, {"prompt": ["a bag", "a boot", "a small coat"], "use_resolution_binning": False}, 3.0),
}
"""How each is called by people who have it, and guided."""


def loaded(folder: Path, kept: Path) -> Any:
    net = Elastic.from_pretrained(folder, widths=(1.0,))
    size = net.image_shape[1:]
    for _ in Stages(()).run(net, NoImages(size, 3 if net.image_shape[0] == 3 else 1, (0, 1)), kept, 0, "cpu"):
        pass
    return net.load(kept, "cpu")


def made(kind: str, folder: Path) -> tuple[Any, Any]:
    """A stock pipeline, in evaluation mode as one that is read from a folder, and its network as this project has it."""
    pipeline = KINDS[kind][0](folder / "stock")
    for part in pipeline.components.values():
        if isinstance(part, torch.nn.Module):
            part.eval()
    return pipeline, loaded(folder / "stock", folder / "kept")


def schedule_for(net: LoadedSupernet, scale: float | None) -> Schedule:
    """Some steps reuse, some further ones too, one is not guided, and one reuses all that a network may."""
    blocks = net.blocks(net.full_arch)
    by = None if scale is None else Guidance(scale)
    some: tuple[str, ...]
    most: tuple[str, ...]
    if blocks[0] == "b0":
        some, most = ("b0", "b1.attn"), ("b0", "b1", "b2")
    else:
        some, most = ("d1", "mid", "u0"), ("d0", "d1", "mid", "u0")
    reuses = ((), some, most, (), some)
    guides = (by, by, None, by, by)
    timesteps = (999, 800, 500, 300, 100)
    return Schedule(
        tuple(Step(t, net.full_arch, reuse, guide) for t, reuse, guide in zip(timesteps, reuses, guides, strict=True))
    )


def called(pipeline: Any, kind: str, seed: int = 0, count: int | None = None, **more: Any) -> Any:
    _, told, scale = KINDS[kind]
    arguments = {name: value[:count] if isinstance(value, list) else value for name, value in told.items()}
    if not told:
        arguments["batch_size"] = count or 3
    if scale is not None:
        arguments["guidance_scale"] = scale
    generator = torch.Generator().manual_seed(seed)
    return pipeline(
        **{**arguments, "generator": generator, "num_inference_steps": 5, "output_type": "np", **more}
    ).images


def exported(net: Any, schedule: Schedule, folder: Path, sampler: dict[str, Any]) -> Any:
    export(net, schedule, sampler, {}, folder)
    pipeline = DiffusionPipeline.from_pretrained(str(folder), custom_pipeline=str(folder), trust_remote_code=True)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@pytest.mark.parametrize(("kind", "sampler"), [*((kind, DDIM) for kind in KINDS), ("pixart", DPM_SOLVER)])
def test_a_stock_pipeline_makes_the_exported_ones_images_bit_for_bit(
    kind: str, sampler: dict[str, Any], tool: Any, tmp_path: Path
) -> None:
    pipeline, net = made(kind, tmp_path)
    before = called(pipeline, kind)
    schedule = schedule_for(net, KINDS[kind][2])
    plan = portable(net, schedule, sampler, {})
    write_portable(plan, CODE, tmp_path / "told")
    told = tool.apply_schedule(pipeline, tmp_path / "told" / "schedule.json")
    assert told == json.loads(json.dumps(plan))
    mine = called(pipeline, kind)
    theirs = exported(net, schedule, tmp_path / "exported", sampler)
    arguments = {name: value for name, value in KINDS[kind][1].items() if name != "use_resolution_binning"}
    generator = torch.Generator().manual_seed(0)
    images = theirs(**(arguments or {"batch_size": 3}), generator=generator, output_type="np").images
    assert np.array_equal(mine, images)
    assert not np.array_equal(mine, before)
    tool.remove_schedule(pipeline)
    assert np.array_equal(called(pipeline, kind), before)


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_left_over_from_a_call(kind: str, tool: Any, tmp_path: Path) -> None:
    """Three samples, one, three, with an interruption in between, as in a fresh process."""
    pipeline, net = made(kind, tmp_path)
    plan = portable(net, schedule_for(net, KINDS[kind][2]), DDIM, {})
    tool.apply_schedule(pipeline, plan)
    fresh = {count: called(pipeline, kind, seed=count, count=count) for count in (1, 3)}
    network = getattr(pipeline, "unet", None) or pipeline.transformer
    part = network.mid_block if hasattr(network, "mid_block") else network.transformer_blocks[-1].ff

    def stop(*_: Any) -> None:
        if scheduler_steps[-1] >= 2:
            raise KeyboardInterrupt

    scheduler_steps = [0]
    own = pipeline.scheduler.step

    def counted(*given: Any, **named: Any) -> Any:
        scheduler_steps.append(scheduler_steps[-1] + 1)
        return own(*given, **named)

    pipeline.scheduler.step = counted
    for count in (3, 1, 3):
        hook = part.register_forward_pre_hook(stop)
        scheduler_steps[:] = [0]
        with pytest.raises(KeyboardInterrupt):
            called(pipeline, kind, seed=5, count=4 - count)
        hook.remove()
        assert np.array_equal(called(pipeline, kind, seed=count, count=count), fresh[count])


def test_layers_of_low_rank_stay_in_use(tool: Any, tmp_path: Path) -> None:
    """Loaded before or after; the images are those of the network with the change fused into its weights."""
    from peft import LoraConfig

    pipeline, net = made("stable diffusion", tmp_path)
    plan = portable(net, schedule_for(net, 3.0), DDIM, {})
    tool.apply_schedule(pipeline, plan)
    without = called(pipeline, "stable diffusion")
    pipeline.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    after = called(pipeline, "stable diffusion")
    assert np.abs(after - without).max() > 1e-3
    tool.apply_schedule(pipeline, plan)
    assert np.array_equal(called(pipeline, "stable diffusion"), after)
    pipeline.unet.fuse_lora()
    fused = called(pipeline, "stable diffusion")
    assert np.abs(fused - after).max() < 1e-4


def test_what_the_walks_do_not_follow_is_refused_and_not_left_out(tool: Any, tmp_path: Path) -> None:
    """FreeU and an IP-Adapter change what a stock network computes."""
    pipeline, net = made("stable diffusion", tmp_path)
    plan = portable(net, schedule_for(net, KINDS["stable diffusion"][2]), DDIM, {})
    tool.apply_schedule(pipeline, plan)
    before = called(pipeline, "stable diffusion")
    pipeline.enable_freeu(0.9, 0.2, 1.5, 1.6)
    with pytest.raises(tool.ScheduleError, match="FreeU"):
        called(pipeline, "stable diffusion")
    pipeline.disable_freeu()
    assert np.array_equal(called(pipeline, "stable diffusion"), before)
    pipeline.unet.encoder_hid_proj = torch.nn.Identity()
    with pytest.raises(tool.ScheduleError, match="IP-Adapter"):
        called(pipeline, "stable diffusion")
    pipeline.unet.encoder_hid_proj = None
    more = {"added_cond_kwargs": {"image_embeds": [torch.zeros(2, 4)]}, "encoder_attention_mask": torch.ones(2, 8)}
    for name, value in more.items():
        pipeline.scheduler.set_timesteps(5)
        with pytest.raises(tool.ScheduleError, match=r"image_embeds|encoder_attention_mask"):
            pipeline.unet(
                torch.zeros(2, 4, 8, 8),
                torch.tensor(999),
                **{"encoder_hidden_states": torch.zeros(2, 8, 32), name: value},
            )


NINE = 9


@pytest.mark.long
def test_nine_sets_of_blocks_are_nine_compiled_graphs(tool: Any, tmp_path: Path) -> None:
    """One more than torch compiles of one piece of code; none falls back."""
    pipeline, net = made("dit", tmp_path)
    full, by = net.full_arch, Guidance(2.0)
    names = net.blocks(full, True)
    reuses = [(), *(names[: n + 1] for n in range(5)), (), *((name,) for name in names[:3])]
    schedule = Schedule(tuple(Step(999 - 90 * n, full, tuple(reuse), by) for n, reuse in enumerate(reuses)))
    plan = portable(net, schedule, DDIM, {})
    tool.apply_schedule(pipeline, plan)
    plain = called(pipeline, "dit", num_inference_steps=len(reuses))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    tool.apply_schedule(pipeline, plan, compiled="aot_eager")
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        images = called(pipeline, "dit", num_inference_steps=len(reuses))
        graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        assert np.array_equal(called(pipeline, "dit", num_inference_steps=len(reuses)), images)
    pairs = {(tuple(a), tuple(b)) for a, b in zip(reuses, [*reuses[1:], ()], strict=True)}
    assert len(pairs) >= NINE
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs == len(pairs)
    assert not torch._dynamo.utils.counters["graph_break"]
    # Each step's rounding, of float32 through ten of them.
    assert np.abs(images - plain).max() < 1e-4


def test_what_cannot_be_is_said(tool: Any, tmp_path: Path) -> None:
    pipeline, net = made("stable diffusion", tmp_path)
    schedule = schedule_for(net, 3.0)
    plan = portable(net, schedule, DDIM, {})
    refused, more = tool.ScheduleError, [*plan["network"]["branches"], "u9.0"]
    for wrong, words in (
        ({**plan, "version": 2}, "version 2"),
        ({**plan, "format": "other"}, "is no step-aware schedule"),
        ({**plan, "network": {**plan["network"], "class": "UNet2DModel"}}, "found for a UNet2DModel"),
        ({**plan, "network": {**plan["network"], "branches": more}}, f"network of {len(more)} branches"),
        (
            {**plan, "steps": [{**step, "alpha": step["alpha"] * 1.01} for step in plan["steps"]]},
            "another noise process",
        ),
        (tmp_path / "missing.json", "cannot be read"),
    ):
        with pytest.raises(refused, match=words):
            tool.apply_schedule(pipeline, wrong)
    assert "forward" not in pipeline.unet.__dict__
    tool.apply_schedule(pipeline, plan)
    for arguments, words in (
        ({"num_inference_steps": 7}, "call it with num_inference_steps=5"),
        ({"eta": 0.5}, "adds some"),
        ({"cross_attention_kwargs": {"scale": 0.5}}, "cross_attention_kwargs"),
    ):
        with pytest.raises(refused, match=words):
            called(pipeline, "stable diffusion", **arguments)
    with pytest.raises(refused, match="the pipeline is at timestep 3, the schedule at 999"):
        pipeline.unet(torch.zeros(1, 4, 8, 8), 3, torch.zeros(1, 12, 16))
    pipeline.scheduler.set_timesteps(5)
    pipeline.unet(torch.zeros(1, 4, 8, 8), 999, torch.zeros(1, 12, 16))
    with pytest.raises(refused, match="calls the network twice at timestep 999"):
        pipeline.unet(torch.zeros(1, 4, 8, 8), 999, torch.zeros(1, 12, 16))
    for scale in (9, 1):
        with pytest.warns(UserWarning, match=f"found guided at 3, the pipeline guides at {scale}"):
            called(pipeline, "stable diffusion", guidance_scale=float(scale))
    tool.remove_schedule(pipeline)
    pipeline.scheduler = EulerDiscreteScheduler.from_config(pipeline.scheduler.config)
    with pytest.raises(refused, match=r"DDIMScheduler\.from_config"):
        tool.apply_schedule(pipeline, plan)
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    pipeline.unet = torch.compile(pipeline.unet)
    with pytest.raises(refused, match="compiled as a whole"):
        tool.apply_schedule(pipeline, plan)
    other = Step(50, net.smallest_arch, (), Guidance(2.0))
    for steps, sampler, words in (
        ((*schedule.steps, other), DDIM, "different scales"),
        (schedule.steps, {**DDIM, "eta": 1.0}, "adds noise"),
        (schedule.steps, {"class": "DDPM"}, "adds noise"),
    ):
        with pytest.raises(UserError, match=words):
            portable(net, Schedule(steps), sampler, {})


def test_offloaded_networks_follow_it_too(tool: Any, tmp_path: Path) -> None:
    from accelerate.hooks import ModelHook, add_hook_to_module

    pipeline, net = made("ddim", tmp_path)
    plan = portable(net, schedule_for(net, None), DDIM, {})
    tool.apply_schedule(pipeline, plan)
    images = called(pipeline, "ddim")
    tool.remove_schedule(pipeline)
    add_hook_to_module(pipeline.unet, ModelHook())
    tool.apply_schedule(pipeline, plan)
    assert np.array_equal(called(pipeline, "ddim"), images)
    tool.remove_schedule(pipeline)
    assert not np.array_equal(called(pipeline, "ddim"), images)


def test_what_offloads_a_network_stays_on_it(tool: Any, tmp_path: Path) -> None:
    """Put on or taken off while a schedule is applied."""
    from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module

    class Counted(ModelHook):
        calls = 0

        def pre_forward(self, module: Any, *given: Any, **named: Any) -> Any:
            self.calls += 1
            return given, named

    pipeline, net = made("ddim", tmp_path)
    plan = portable(net, schedule_for(net, None), DDIM, {})
    before, hook = called(pipeline, "ddim"), Counted()
    tool.apply_schedule(pipeline, plan)
    images = called(pipeline, "ddim")
    add_hook_to_module(pipeline.unet, hook)
    assert np.array_equal(called(pipeline, "ddim"), images)
    applied = hook.calls
    tool.remove_schedule(pipeline)
    assert np.array_equal(called(pipeline, "ddim"), before)
    assert hook.calls == applied + 5
    tool.apply_schedule(pipeline, plan)
    remove_hook_from_module(pipeline.unet)
    assert np.array_equal(called(pipeline, "ddim"), images)
    tool.remove_schedule(pipeline)
    assert np.array_equal(called(pipeline, "ddim"), before)
    tool.apply_schedule(pipeline, plan)
    wrapped, ours = [], pipeline.unet.forward

    def around(*given: Any, **named: Any) -> Any:
        wrapped.append(1)
        return ours(*given, **named)

    pipeline.unet.forward = around  # as diffusers' own offloading by groups, which says nothing of ours
    tool.remove_schedule(pipeline)
    assert np.array_equal(called(pipeline, "ddim"), before)
    assert len(wrapped) == 5


@pytest.mark.parametrize("kind", ["dit", "pixart"])
def test_samples_of_equal_noise_are_not_taken_for_guidance(kind: str, tool: Any, tmp_path: Path) -> None:
    """Two conditions of one latent, which both halves of a guided call look like."""
    pipeline, net = made(kind, tmp_path)
    steps = schedule_for(net, None).steps
    told: dict[str, Any] = (
        {"class_labels": [1, 7]}
        if kind == "dit"
        else {"prompt": ["a bag", "a boot"], "latents": torch.randn(1, 4, 8, 8).repeat(2, 1, 1, 1)}
    )

    def call(which: slice = slice(None)) -> Any:
        arguments = {name: value[which] for name, value in told.items()}
        each = [torch.Generator().manual_seed(0) for _ in range(len(next(iter(arguments.values()))))]
        noises: dict[str, Any] = {"generator": each} if kind == "dit" else {}
        return called(pipeline, kind, guidance_scale=1.0, **arguments, **noises)

    tool.apply_schedule(pipeline, portable(net, Schedule(steps), DDIM, {}))
    both = call()
    alone = np.concatenate([call(slice(0, 1)), call(slice(1, 2))])
    # The rounding of five float32 steps of another batch.
    assert np.abs(both - alone).max() < 1e-4
    assert np.abs(both[0] - both[1]).max() > 1e-3
    if kind == "pixart":
        with pytest.warns(UserWarning, match="found without guidance, the pipeline guides"):
            called(pipeline, kind, guidance_scale=2.0)
    later = (*steps[:3], *schedule_for(net, 3.0).steps[3:])  # guided at the end alone
    tool.apply_schedule(pipeline, portable(net, Schedule(later), DDIM, {}))
    if kind == "pixart":
        with pytest.raises(tool.ScheduleError, match=r"call it with guidance_scale=3, or give each sample a noise"):
            call()
    else:
        assert np.abs(call() - both).max() < 1e-4


def test_predictions_of_other_guidance_are_refused(tool: Any, tmp_path: Path) -> None:
    """Perturbed-attention guidance asks for three of each sample."""
    pipeline, net = made("stable diffusion", tmp_path)
    steps = schedule_for(net, 3.0).steps
    tool.apply_schedule(pipeline, portable(net, Schedule(steps), DDIM, {}))
    pipeline.scheduler.set_timesteps(5)
    pipeline._guidance_scale, pipeline._interrupt = 3.0, False
    x, text = torch.randn(2, 4, 8, 8), torch.zeros(6, 12, 16)
    for step in steps[:2]:
        pipeline.unet(torch.cat([x] * 3), step.timestep, text)
        pipeline.scheduler.step(x, step.timestep, x)
    with pytest.raises(tool.ScheduleError, match="6 predictions that are not two of each sample"):
        pipeline.unet(torch.cat([x] * 3), steps[2].timestep, text)


@pytest.mark.parametrize(("height", "width"), [(24, 16), (40, 24), (72, 56)])
def test_any_size_that_the_stock_pipeline_takes(height: int, width: int, tool: Any, tmp_path: Path) -> None:
    """Sides that halve to odd ones on the way down."""
    deep: dict[str, Any] = {
        "block_out_channels": (8, 8, 16, 16),
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D", "DownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "UpBlock2D", "UpBlock2D", "CrossAttnUpBlock2D"),
    }
    pipeline = stable_diffusion(tmp_path / "stock", **deep)
    pipeline.unet.eval()
    net = loaded(tmp_path / "stock", tmp_path / "kept")
    by = Guidance(3.0)
    whole = tuple(Step(t, net.full_arch, (), by) for t in (999, 799, 599, 399, 199))
    tool.apply_schedule(pipeline, portable(net, Schedule(whole), DDIM, {}))
    given = {"height": height, "width": width}
    mine = called(pipeline, "stable diffusion", **given)
    tool.remove_schedule(pipeline)
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, timestep_spacing="trailing")
    assert np.abs(called(pipeline, "stable diffusion", **given) - mine).max() < 1e-4
    some = (whole[0], Step(799, net.full_arch, ("d2", "d3", "mid", "u0"), by), *whole[2:])
    tool.apply_schedule(pipeline, portable(net, Schedule(some), DDIM, {}))
    assert np.isfinite(called(pipeline, "stable diffusion", **given)).all()


def test_schedules_of_another_prediction_are_refused(tool: Any, tmp_path: Path) -> None:
    pipeline, net = made("stable diffusion", tmp_path)
    plan = portable(net, schedule_for(net, 3.0), DDIM, {})
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, prediction_type="v_prediction")
    with pytest.raises(
        tool.ScheduleError, match="predicts epsilon, the pipeline's scheduler says that it predicts v_prediction"
    ):
        tool.apply_schedule(pipeline, plan)
    assert "forward" not in pipeline.unet.__dict__


def test_a_trajectory_of_one_step(tool: Any, tmp_path: Path) -> None:
    """PixArt's pipeline takes another part of what the scheduler answers then."""
    pipeline, net = made("pixart", tmp_path)
    schedule = Schedule((Step(999, net.full_arch),))
    tool.apply_schedule(pipeline, portable(net, schedule, DDIM, {}))
    images = called(pipeline, "pixart", num_inference_steps=1, guidance_scale=1.0)
    assert images.shape[0] == 3
    assert np.isfinite(images).all()


def test_layers_that_a_network_lacks_are_refused(tool: Any, tmp_path: Path) -> None:
    """They would be computed while the file says that they are reused."""
    pipeline, net = made("dit", tmp_path)
    plan = portable(net, schedule_for(net, 2.0), DDIM, {})
    steps = [*plan["steps"][:1], {**plan["steps"][1], "reuse": ["b0.attn.resnet"]}, *plan["steps"][2:]]
    with pytest.raises(tool.ScheduleError, match=r"reuses b0\.attn\.resnet, which is no layer"):
        tool.apply_schedule(pipeline, {**plan, "steps": steps})


def test_guidance_that_rescales_a_velocity_is_refused(tool: Any, tmp_path: Path) -> None:
    """Stock pipelines rescale what the network predicts; a schedule's steps see its noise, which has another spread."""
    pipeline = stable_diffusion(tmp_path / "stock")
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, prediction_type="v_prediction")
    pipeline.save_pretrained(tmp_path / "stock")
    net = loaded(tmp_path / "stock", tmp_path / "kept")
    tool.apply_schedule(pipeline, portable(net, schedule_for(net, 3.0), DDIM, {}))
    assert np.isfinite(called(pipeline, "stable diffusion")).all()
    with pytest.raises(tool.ScheduleError, match=r"guidance_rescale=0\.7.* v_prediction"):
        called(pipeline, "stable diffusion", guidance_rescale=0.7)


@pytest.mark.parametrize("kind", ["v_prediction", "sample"])
def test_the_noise_in_half_precision_loses_no_more_than_it_was_given(kind: str) -> None:
    """As pipelines in bfloat16 call it: the image that follows is as near as a half-precision prediction lets it be."""
    from search_spaces.shipped.reuse import as_noise

    drawn = torch.Generator().manual_seed(0)
    alpha = 0.0047
    image, noise = torch.randn(2, 4096, generator=drawn)[:, None, :, None]
    x = (alpha**0.5 * image + (1 - alpha) ** 0.5 * noise).bfloat16()
    # The state that was rounded is the network's input; what it predicts of this one is exact but for its own rounding.
    noise = (x.float() - alpha**0.5 * image) / (1 - alpha) ** 0.5
    exact = image if kind == "sample" else alpha**0.5 * noise - (1 - alpha) ** 0.5 * image
    found = as_noise(exact.bfloat16(), x, alpha, kind)
    again = (x.float() - (1 - alpha) ** 0.5 * found.float()) / alpha**0.5
    # 2^-9 of the prediction by rounding, and float32's 2^-24 of the state, over what is left of the signal.
    assert float((again - image).abs().max()) < 2**-8 * float(exact.abs().max()) + 1e-5


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@pytest.mark.parametrize("kind", [DDIMScheduler, DPMSolverMultistepScheduler])
def test_a_process_that_leaves_no_signal_is_the_schedulers_own(kind: Any, tool: Any, tmp_path: Path) -> None:
    """diffusers' schedulers have numbers of their own for it; the images are theirs."""
    torch.manual_seed(0)
    given = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    ddim = {} if kind is DPMSolverMultistepScheduler else {"clip_sample": False}
    scheduler = kind(
        **{**LINEAR, **given, **ddim} if ddim else {**{n: v for n, v in LINEAR.items() if n != "clip_sample"}, **given}
    )
    pipeline = saved(
        DDIMPipeline(unet=UNet2DModel(**UNET).eval(), scheduler=DDIMScheduler(**LINEAR)), tmp_path / "stock"
    )
    pipeline.scheduler = scheduler
    scheduler.save_pretrained(tmp_path / "stock" / "scheduler")
    net = loaded(tmp_path / "stock", tmp_path / "kept")
    scheduler.set_timesteps(8)
    steps = tuple(Step(int(t), net.full_arch) for t in scheduler.timesteps)
    plan = portable(net, Schedule(steps), DDIM if ddim else DPM_SOLVER, {})
    x = noise = torch.randn(2, 1, 8, 8)
    with torch.no_grad():
        for t in scheduler.timesteps:
            x = scheduler.step(pipeline.unet(x, t).sample, t, x).prev_sample
        tool.apply_schedule(pipeline, plan)
        pipeline.scheduler.set_timesteps(8)
        mine = noise
        for t in pipeline.scheduler.timesteps:
            mine = pipeline.scheduler.step(pipeline.unet(mine, t).sample, t, mine).prev_sample
    ours = sample(net, Schedule(steps), DDIM_SAMPLER(clip=False) if ddim else DPMSolver(clip=False), 0, 0, 2)
    theirs = exported(net, Schedule(steps), tmp_path / "exported", DDIM if ddim else DPM_SOLVER)
    images = theirs(2, seed=0, output_type="pt").images * 2 - 1
    # The rounding of eight steps of float32, of images that were cut to their range.
    assert float((images - ours.clamp(-1, 1)).abs().max()) < 1e-4
    # The least abar of one is 1e-12 and of the other 2^-24: 2^-12 of what no signal weighs, besides rounding.
    assert float((mine - x).abs().max()) < 2e-3 * float(x.abs().max())


@pytest.mark.parametrize("branch", range(6))
def test_deepcache_computes_the_same(branch: int, tool: Any, tmp_path: Path) -> None:
    """Images of its own helper on the same pipeline, at each of its branches; two residual blocks a level, which its numbers count."""
    helper = pytest.importorskip("DeepCache").DeepCacheSDHelper
    pipeline = stable_diffusion(tmp_path / "sd", layers_per_block=2)
    net = loaded(tmp_path / "sd", tmp_path / "kept")
    graph, full = graph_of(pipeline.unet), net.full_arch
    steps: Any = layouts.deepcache(2, branch, graph).steps(5)
    reuses = [
        graph.collapse(graph.expand(graph.blocks) - graph.expand(one), True) if one != ALL else () for one in steps
    ]
    schedule = Schedule(tuple(Step(801 - 200 * n, full, reuse, Guidance(3.0)) for n, reuse in enumerate(reuses)))
    tool.apply_schedule(pipeline, portable(net, schedule, DDIM, {}))
    mine = called(pipeline, "stable diffusion")
    tool.remove_schedule(pipeline)
    theirs = helper(pipe=pipeline)
    theirs.set_params(cache_interval=2, cache_branch_id=branch)
    theirs.enable()
    # Sums of the same numbers, taken in the order of one batch or two.
    assert np.abs(called(pipeline, "stable diffusion") - mine).max() < 1e-5
