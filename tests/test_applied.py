"""What people do with a pipeline once a schedule is applied to it, and with its parts: followed, or refused in words."""

from __future__ import annotations

import copy
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, StableDiffusionImg2ImgPipeline

from nas.handover.portable import portable
from tests.test_portable import DDIM, DPM_SOLVER, KINDS, called, loaded, made, schedule_for


def ready(kind: str, tool: Any, folder: Path) -> tuple[Any, dict[str, Any]]:
    """A pipeline that runs a schedule, and the schedule."""
    pipeline, net = made(kind, folder)
    plan = portable(net, schedule_for(net, KINDS[kind][2]), DDIM, {})
    tool.apply_schedule(pipeline, plan)
    return pipeline, plan


def test_another_network_or_scheduler_asks_for_the_schedule_again(tool: Any, tmp_path: Path) -> None:
    pipeline, plan = ready("stable diffusion", tool, tmp_path)
    images, unet, scheduler = called(pipeline, "stable diffusion"), pipeline.unet, pipeline.scheduler
    pipeline.unet = copy.deepcopy(made("stable diffusion", tmp_path / "other")[0].unet)
    with pytest.raises(tool.ScheduleError, match=r"pipeline\.unet is another than the schedule was applied to"):
        called(pipeline, "stable diffusion")
    other = type(pipeline).from_pipe(pipeline, unet=pipeline.unet)  # shares the scheduler, and is not looked at
    pipeline.unet = unet
    other.set_progress_bar_config(disable=True)
    with pytest.raises(tool.ScheduleError, match="of another network than the schedule was applied to"):
        called(other, "stable diffusion")
    pipeline.unet = torch.compile(unet, backend="eager")
    with pytest.raises(tool.ScheduleError, match=r"is compiled as a whole; .*compiled=True"):
        called(pipeline, "stable diffusion")
    pipeline.unet = unet
    pipeline.scheduler = DDIMScheduler.from_config(scheduler.config)
    with pytest.raises(tool.ScheduleError, match="another scheduler than when the schedule was applied"):
        called(pipeline, "stable diffusion")
    tool.apply_schedule(pipeline, plan)
    assert np.array_equal(called(pipeline, "stable diffusion"), images)
    assert not {"step", "set_timesteps", "_step_aware"} & scheduler.__dict__.keys()
    pipeline.unet = other.unet  # the schedule is removed from the scheduler, whatever the network is now
    tool.remove_schedule(pipeline)
    assert not {"step", "set_timesteps", "add_noise", "_step_aware"} & pipeline.scheduler.__dict__.keys()
    assert "forward" not in unet.__dict__


def test_a_schedule_that_does_not_fit_leaves_the_one_that_is_applied(tool: Any, tmp_path: Path) -> None:
    pipeline, plan = ready("ddim", tool, tmp_path)
    images = called(pipeline, "ddim")
    with pytest.raises(tool.ScheduleError, match="version 2"):
        tool.apply_schedule(pipeline, {**plan, "version": 2})
    assert np.array_equal(called(pipeline, "ddim"), images)


def test_states_that_are_no_numbers_are_no_other_guidance(tool: Any, tmp_path: Path) -> None:
    """Half precision brings them; stock pipelines draw a black image."""
    pipeline, _ = ready("stable diffusion", tool, tmp_path)
    broken = torch.full((3, 4, 8, 8), torch.nan)
    assert called(pipeline, "stable diffusion", latents=broken, output_type="latent").isnan().all()


def test_calls_that_replaced_the_networks_are_not_left_out(tool: Any, tmp_path: Path) -> None:
    pipeline, net = made("ddim", tmp_path)
    plan = portable(net, schedule_for(net, None), DDIM, {})
    pipeline.unet.forward = torch.compile(pipeline.unet.forward, backend="eager")
    with pytest.raises(tool.ScheduleError, match=r"pipeline\.unet\.forward was replaced"):
        tool.apply_schedule(pipeline, plan)
    assert not {"step", "set_timesteps"} & pipeline.scheduler.__dict__.keys()
    del pipeline.unet.forward
    tool.apply_schedule(pipeline, plan)
    images, ours = called(pipeline, "ddim"), pipeline.unet.forward
    pipeline.unet.forward = torch.compile(ours, backend="eager")
    with pytest.raises(tool.ScheduleError, match=r"pipeline\.unet\.forward was replaced"):
        tool.apply_schedule(pipeline, plan)
    pipeline.unet.forward = ours
    assert np.array_equal(called(pipeline, "ddim"), images), "what is refused leaves what is applied"


def test_a_network_that_accelerate_gives_back_is_the_stock_one(tool: Any, tmp_path: Path) -> None:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    pipeline, net = made("stable diffusion", tmp_path)
    plan = portable(net, schedule_for(net, 3.0), DDIM, {})
    AcceleratorState._reset_state(reset_partial_state=True)  # of other tests' trainings in this process
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    wrapped = accelerator.prepare_model(pipeline.unet, evaluation_mode=True)
    AcceleratorState._reset_state(reset_partial_state=True)
    with pytest.raises(tool.ScheduleError, match=r"accelerate's mixed precision.*keep_fp32_wrapper=False"):
        tool.apply_schedule(pipeline, plan)
    pipeline.unet = accelerator.unwrap_model(wrapped, keep_fp32_wrapper=False)
    tool.apply_schedule(pipeline, plan)
    called(pipeline, "stable diffusion")


def test_weights_that_blocks_own_calls_would_bring_are_missed_in_words(tool: Any, tmp_path: Path) -> None:
    from accelerate import cpu_offload
    from accelerate.hooks import remove_hook_from_submodules

    pipeline, plan = ready("pixart", tool, tmp_path)
    images = called(pipeline, "pixart")
    cpu_offload(pipeline.transformer, torch.device("cpu"))
    with pytest.raises(tool.ScheduleError, match=r"transformer_blocks\.0 is offloaded by itself.*enable_model_cpu"):
        called(pipeline, "pixart")
    remove_hook_from_submodules(pipeline.transformer)
    tool.remove_schedule(pipeline)
    tool.apply_schedule(pipeline, plan)
    assert np.array_equal(called(pipeline, "pixart"), images)
    where = {"onload_device": torch.device("cpu"), "offload_device": torch.device("cpu")}
    pipeline.transformer.enable_group_offload(**where, offload_type="block_level", num_blocks_per_group=1)
    with pytest.raises(tool.ScheduleError, match="is offloaded by itself"):
        called(pipeline, "pixart")
    tool.remove_schedule(pipeline)
    for part in pipeline.transformer.modules():
        if hasattr(part, "_diffusers_hook"):
            part._diffusers_hook.remove_hook("group_offloading", recurse=False)
    tool.apply_schedule(pipeline, plan)  # although a hook has put back what it was around
    assert np.array_equal(called(pipeline, "pixart"), images)


def test_offloading_by_leaves_follows(tool: Any, tmp_path: Path) -> None:
    from diffusers.hooks import apply_group_offloading

    pipeline, _ = ready("dit", tool, tmp_path)
    images = called(pipeline, "dit")
    where = {"onload_device": torch.device("cpu"), "offload_device": torch.device("cpu")}
    apply_group_offloading(pipeline.transformer, **where, offload_type="leaf_level")
    assert np.array_equal(called(pipeline, "dit"), images)


def test_a_pipeline_that_shares_the_network_says_itself_whether_it_guides(tool: Any, tmp_path: Path) -> None:
    pipeline, _ = ready("stable diffusion", tool, tmp_path)
    other = type(pipeline).from_pipe(pipeline)
    other.set_progress_bar_config(disable=True)
    images = called(pipeline, "stable diffusion")
    assert np.array_equal(called(other, "stable diffusion"), images)
    with pytest.warns(UserWarning, match="guides at 1"):
        called(pipeline, "stable diffusion", guidance_scale=1.0)
    with (
        pytest.warns(UserWarning, match="guides at 1"),
        pytest.raises(tool.ScheduleError, match="apply_schedule to the pipeline that is called"),
    ):
        called(other, "stable diffusion")


def test_trajectories_that_end_or_step_otherwise_are_refused(tool: Any, tmp_path: Path) -> None:
    pipeline, _ = ready("xl", tool, tmp_path / "xl")
    with pytest.raises(tool.ScheduleError, match=r"stops at denoising_end=0\.8"):
        called(pipeline, "xl", denoising_end=0.8)
    called(pipeline, "xl")
    plain, _ = ready("ddim", tool, tmp_path / "ddim")
    with pytest.raises(tool.ScheduleError, match="without use_clipped_model_output"):
        called(plain, "ddim", use_clipped_model_output=True)
    solver, _ = made("stable diffusion", tmp_path / "solver")
    solver.scheduler = DPMSolverMultistepScheduler.from_config(solver.scheduler.config)
    tool.apply_schedule(solver, portable_of_solver(tmp_path / "solver"))
    with pytest.raises(tool.ScheduleError, match="asks for timesteps of its own"):
        called(solver, "stable diffusion", timesteps=[999, 500, 300, 100, 0], num_inference_steps=None)


def portable_of_solver(folder: Path) -> dict[str, Any]:
    net = loaded(folder / "stock", folder / "kept")
    return portable(net, schedule_for(net, 3.0), DPM_SOLVER, {})


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
def test_images_are_noised_as_the_process_has_it(tool: Any, tmp_path: Path) -> None:
    """A multistep scheduler looks for the timestep among its own steps, which are not those of the schedule."""
    pipeline, _ = made("stable diffusion", tmp_path)
    plain = DDIMScheduler.from_config(pipeline.scheduler.config)
    pipeline.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config)
    called(pipeline, "stable diffusion")  # which leaves it at its last step
    tool.apply_schedule(pipeline, portable_of_solver(tmp_path))
    x, noise, t = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8), torch.tensor([999, 300])
    assert torch.allclose(pipeline.scheduler.add_noise(x, noise, t), plain.add_noise(x, noise, t), atol=1e-6)
    again = StableDiffusionImg2ImgPipeline(**pipeline.components, requires_safety_checker=False)
    again.set_progress_bar_config(disable=True)
    arguments = {"prompt": ["a bag"], "guidance_scale": 3.0, "num_inference_steps": 5, "output_type": "np"}
    images = again(image=torch.rand(1, 3, 16, 16), strength=1.0, **arguments).images
    assert images.shape == (1, 16, 16, 3)
    with pytest.raises(tool.ScheduleError, match="made for whole trajectories from noise"):
        again(image=torch.rand(1, 3, 16, 16), strength=0.5, **arguments)


def test_one_call_at_a_time(tool: Any, tmp_path: Path) -> None:
    pipeline, _ = ready("ddim", tool, tmp_path)
    x = torch.randn(1, 1, 8, 8)
    pipeline.scheduler.set_timesteps(5)
    other = threading.Thread(target=pipeline.scheduler.set_timesteps, args=(5,))
    other.start()
    other.join()
    with pytest.raises(tool.ScheduleError, match="another thread has begun a call"):
        pipeline.unet(x, 999)
    called(pipeline, "ddim")
