"""Pretrained models as people have them: pipelines with any scheduler, shards, averages, other names, damage."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DDPMPipeline, DDPMScheduler, UNet2DConditionModel, UNet2DModel
from safetensors.torch import load_file, save_file

from evaluators.sampling import DDIM, DDPM, sample
from nas.contracts import Schedule, Step, UserError
from nas.handover.export import export
from nas.tuning.study import Wanted
from search_spaces.codec import Autoencoder
from search_spaces.intervals import leading
from search_spaces.noise import NoiseSchedule
from search_spaces.supernet import Elastic
from tests.conftest import TINY
from tests.pipelines import as_released_in_2022, pixart, stable_diffusion

BASE = {"num_train_timesteps": 1000, "beta_start": 1e-4, "beta_end": 0.02, "prediction_type": "epsilon"}

READ: dict[str, tuple[str, dict[str, Any]]] = {
    "linear": ("DDPMScheduler", {"beta_schedule": "linear"}),
    "cosine": ("DDPMScheduler", {"beta_schedule": "squaredcos_cap_v2"}),
    "scaled linear": ("DDIMScheduler", {"beta_schedule": "scaled_linear", "beta_start": 0.0015, "beta_end": 0.0195}),
    "sigmoid": ("DDPMScheduler", {"beta_schedule": "sigmoid"}),
    "trained": ("DDPMScheduler", {"num_train_timesteps": 50, "trained_betas": [0.001 * (i + 1) for i in range(50)]}),
    "four thousand": (
        "DDPMScheduler",
        {"num_train_timesteps": 4000, "beta_schedule": "squaredcos_cap_v2", "variance_type": "learned_range"},
    ),
    "pndm": (
        "PNDMScheduler",
        {"beta_schedule": "scaled_linear", "set_alpha_to_one": False, "steps_offset": 1, "skip_prk_steps": True},
    ),
    "stable diffusion's ddim": (
        "DDIMScheduler",
        {"beta_schedule": "scaled_linear", "set_alpha_to_one": False, "clip_sample": False},
    ),
    "euler": ("EulerDiscreteScheduler", {"beta_schedule": "linear", "timestep_spacing": "leading"}),
    "dpm": ("DPMSolverMultistepScheduler", {"beta_schedule": "scaled_linear", "final_sigmas_type": "zero"}),
    "v": ("DDIMScheduler", {"prediction_type": "v_prediction", "beta_schedule": "scaled_linear"}),
    "the image": ("DDPMScheduler", {"prediction_type": "sample"}),
    "no signal left": ("DDIMScheduler", {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}),
    "no signal left for euler": (
        "EulerDiscreteScheduler",
        {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"},
    ),
    "no signal left of betas that have no name here": (
        "DDPMScheduler",
        {"beta_schedule": "sigmoid", "prediction_type": "v_prediction", "rescale_betas_zero_snr": True},
    ),
    "no signal left of betas of one's own": (
        "DDPMScheduler",
        {
            "num_train_timesteps": 50,
            "trained_betas": [0.001 * (i + 1) for i in range(50)],
            "prediction_type": "sample",
            "rescale_betas_zero_snr": True,
        },
    ),
    "unipc, a newer key": ("UniPCMultistepScheduler", {"beta_schedule": "linear", "from_the_future": 3}),
}

REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "flow's velocity": (
        "DPMSolverMultistepScheduler",
        {"prediction_type": "flow_prediction"},
        "predicts 'flow_prediction'",
    ),
    "zero terminal SNR": ("DDIMScheduler", {"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr leaves no signal"),
    "flow": ("FlowMatchEulerDiscreteScheduler", {}, "no process of discrete timesteps"),
    "edm": ("EDMEulerScheduler", {}, "no process of discrete timesteps"),
    "an object of another library": ("os.system", {}, "no process of discrete timesteps"),
    "an unknown curve": ("DDIMScheduler", {"beta_schedule": "wavy"}, "diffusers cannot make this DDIMScheduler"),
    "betas that are none": ("DDPMScheduler", {"trained_betas": ["a"]}, "diffusers cannot make this DDPMScheduler"),
}


def scheduler_file(folder: Path, kind: str, settings: dict[str, Any]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "scheduler_config.json").write_text(json.dumps({"_class_name": kind, **BASE, **settings}))
    return folder


@pytest.mark.parametrize("name", READ)
def test_the_noise_process_is_the_schedulers(name: str, tmp_path: Path) -> None:
    kind, settings = READ[name]
    found = NoiseSchedule.from_scheduler(scheduler_file(tmp_path, kind, settings))
    stock = getattr(diffusers, kind).from_config(
        {**BASE, **{k: v for k, v in settings.items() if k != "from_the_future"}}
    )
    left = slice(None, -1 if settings.get("rescale_betas_zero_snr") else None)
    assert np.array_equal(found.alphas_cumprod[left], stock.alphas_cumprod.double().numpy()[left])
    assert 0 < found.alphas_cumprod[-1] <= max(float(stock.alphas_cumprod[-1]), 1e-12)
    assert found.prediction == stock.config.prediction_type
    assert found.end == pytest.approx(float(getattr(stock, "final_alpha_cumprod", 1.0)), abs=0)
    again = DDIMScheduler(**found.scheduler)
    assert torch.equal(again.alphas_cumprod[left], stock.alphas_cumprod[left])
    assert again.config.prediction_type == found.prediction
    assert float(again.final_alpha_cumprod) == found.end


@pytest.mark.parametrize("name", REFUSED)
def test_a_process_that_cannot_be_sampled_is_refused(name: str, tmp_path: Path) -> None:
    kind, settings, words = REFUSED[name]
    with pytest.raises(UserError, match=words) as told:
        NoiseSchedule.from_scheduler(scheduler_file(tmp_path, kind, settings))
    assert "scheduler_config.json" in str(told.value)


def test_the_stepping_rule_is_replaced_and_that_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", "nas"):
        NoiseSchedule.from_scheduler(scheduler_file(tmp_path, *READ["pndm"]))
    assert "the study's sampler replaces the stepping rule of PNDMScheduler" in caplog.text


@pytest.fixture
def pipeline(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    scheduler = DDPMScheduler(beta_schedule="squaredcos_cap_v2", num_train_timesteps=400)
    DDPMPipeline(UNet2DModel(**TINY), scheduler).save_pretrained(tmp_path / "pipeline")
    return tmp_path / "pipeline"


def test_a_pipeline_is_taken_with_its_scheduler(pipeline: Path, caplog: pytest.LogCaptureFixture) -> None:
    whole = Elastic.from_pretrained(pipeline, widths=(0.5, 1.0))
    assert whole.noise == NoiseSchedule(400, beta_schedule="squaredcos_cap_v2")
    assert Elastic.from_pretrained(pipeline / "unet", widths=(0.5, 1.0)) == whole
    alone = pipeline.parent / "alone"
    shutil.copytree(pipeline / "unet", alone)
    with caplog.at_level("WARNING", "nas"):
        assumed = Elastic.from_pretrained(alone, widths=(0.5, 1.0))
    assert assumed.noise == NoiseSchedule()
    assert "nothing says which noise process it was trained on" in caplog.text
    caplog.clear()
    given = Elastic.from_pretrained(alone, widths=(0.5, 1.0), noise=whole.noise)
    assert given.noise == whole.noise
    assert not caplog.text
    stock = UNet2DModel.from_pretrained(alone)
    weights = dict(given.initial(0).full.named_parameters())
    assert all(torch.equal(weights[name], tensor) for name, tensor in stock.named_parameters())


def test_shards_and_averages_and_newer_settings_are_read(pipeline: Path) -> None:
    net = UNet2DModel.from_pretrained(pipeline / "unet")
    folder = pipeline.parent / "unet_ema"
    net.save_pretrained(folder, max_shard_size="60KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "decay": 0.9999, "optimization_step": 7}))
    found = Elastic.from_pretrained(folder, widths=(1.0,), noise=NoiseSchedule())
    weights = dict(found.initial(0).full.named_parameters())
    assert all(torch.equal(weights[name], tensor) for name, tensor in net.named_parameters())
    assert "decay" not in found.config
    next(iter(sorted(folder.glob("*.safetensors")))).unlink()
    with pytest.raises(
        UserError, match=r"does not exist, though diffusion_pytorch_model\.safetensors\.index\.json names it"
    ):
        Elastic.from_pretrained(folder, noise=NoiseSchedule())


def test_files_of_2022_are_read_as_diffusers_reads_them(pipeline: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Their attention has other names, and their autoencoders say no scale: Stable Diffusion 1 and 2 are such."""
    as_released_in_2022(pipeline / "unet")
    weights = dict(Elastic.from_pretrained(pipeline, widths=(1.0,)).initial(0).full.named_parameters())
    stock = UNet2DModel.from_pretrained(pipeline / "unet")
    assert all(torch.equal(weights[name], tensor) for name, tensor in stock.named_parameters())
    stable_diffusion(pipeline.parent / "sd")
    as_released_in_2022(pipeline.parent / "sd" / "vae")
    with caplog.at_level("INFO", "nas"):
        codec = Elastic.from_pretrained(pipeline.parent / "sd", widths=(1.0,)).codec.load(None, "cpu")
    assert "has no scaling_factor; diffusers takes 0.18215" in caplog.text
    vae = AutoencoderKL.from_pretrained(pipeline.parent / "sd" / "vae")
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    # diffusers leaves weights where the file has them, at any address, and by that some processors' kernels choose the order in which they sum.
    with torch.no_grad():
        difference = codec.decode(latents) - vae.decode(latents / vae.config.scaling_factor).sample
    assert float(difference.abs().max()) < 1e-5


def test_the_first_pipelines_lie_in_one_folder(pipeline: Path) -> None:
    """google/ddpm-cifar10-32 and its like: network, scheduler and index side by side."""
    whole = Elastic.from_pretrained(pipeline, widths=(0.5, 1.0))
    flat = pipeline.parent / "flat"
    shutil.copytree(pipeline / "unet", flat)
    shutil.copy(pipeline / "model_index.json", flat)
    shutil.copy(pipeline / "scheduler" / "scheduler_config.json", flat)
    found = Elastic.from_pretrained(flat, widths=(0.5, 1.0))
    assert (found.config, found.noise) == (whole.config, whole.noise)
    stock = dict(DDPMPipeline.from_pretrained(flat).unet.named_parameters())
    mine = dict(found.initial(0).full.named_parameters())
    assert all(torch.equal(mine[name], tensor) for name, tensor in stock.items())
    wanted, same = (Wanted(folder, "macs", 0.5) for folder in (flat, pipeline))
    assert (wanted.kind, wanted.scheduler, wanted.grid(10)) == (same.kind, same.scheduler, same.grid(10))
    assert wanted.scheduler


def test_a_caption_for_none_that_pixart_was_released_with_is_left_out(tmp_path: Path) -> None:
    pixart(tmp_path / "pixart")
    path = tmp_path / "pixart" / "transformer" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    save_file({**tensors, "caption_projection.y_embedding": torch.zeros(120, 16)}, path, {"format": "pt"})
    found = Elastic.from_pretrained(tmp_path / "pixart", widths=(1.0,)).initial(0).full.state_dict()
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())


def test_weights_that_are_no_safetensors_are_named_with_the_way_to_make_them(pipeline: Path) -> None:
    path = pipeline / "unet" / "diffusion_pytorch_model.safetensors"
    path.rename(path.with_suffix(".bin"))
    by_pipeline = rf"has its weights as \.bin.* DiffusionPipeline\.from_pretrained\('{pipeline}'\)"
    with pytest.raises(UserError, match=by_pipeline):
        Elastic.from_pretrained(pipeline)
    shutil.move(pipeline / "unet", pipeline.parent / "alone")
    with pytest.raises(UserError, match=r"the network's own class\.from_pretrained\('.*alone'\)"):
        Elastic.from_pretrained(pipeline.parent / "alone", noise=NoiseSchedule())
    with pytest.raises(UserError, match=r"unet.config\.json does not exist"):
        Elastic.from_pretrained(pipeline)


def prefixed(folder: Path) -> str:
    path = folder / "diffusion_pytorch_model.safetensors"
    save_file({f"module.{name}": tensor for name, tensor in load_file(path).items()}, path)
    return "missing conv_in.bias .* unexpected module.conv_in.bias"


def one_missing(folder: Path) -> str:
    path = folder / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    del tensors["conv_out.weight"]
    save_file(tensors, path)
    return r"missing conv_out.weight \(1 in all\)"


def another_width(folder: Path) -> str:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "block_out_channels": [8, 32]}))
    return "another network than its config.json says"


def cut_off(folder: Path) -> str:
    path = folder / "diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    return "cut off or damaged"


def a_broken_config(folder: Path) -> str:
    (folder / "config.json").write_text('{"_class_name": "UNet2DModel", ')
    return r"config\.json is damaged"


def another_class(folder: Path) -> str:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "_class_name": "AutoencoderKL"}))
    return "holds a AutoencoderKL, not a UNet2DModel"


def an_odd_config(folder: Path) -> str:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "down_block_types": ["NoBlock", "DownBlock2D"]}))
    return "cannot make"


@pytest.mark.parametrize(
    "damage", [prefixed, one_missing, another_width, cut_off, a_broken_config, another_class, an_odd_config]
)
def test_what_is_not_the_networks_is_refused_before_anything_runs(pipeline: Path, damage: Any) -> None:
    words = damage(pipeline / "unet")
    with pytest.raises(UserError, match=words):
        Elastic.from_pretrained(pipeline)


def test_names_of_a_hub_and_of_nothing_are_answered_as_such(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="looks like a name on a hub, and nothing is downloaded"):
        Elastic.from_pretrained("google/ddpm-cifar10-32")
    with pytest.raises(UserError, match="is no folder; give a folder of a UNet2DModel"):
        Elastic.from_pretrained(tmp_path / "nowhere")
    monkeypatch.setenv("HOME", str(tmp_path))
    UNet2DModel(**TINY).save_pretrained(tmp_path / "mine")
    assert Elastic.from_pretrained("~/mine", noise=NoiseSchedule()).pretrained == str(tmp_path / "mine")


@pytest.mark.parametrize("final", ["one", "first"])
def test_sampling_ends_where_the_scheduler_ends(final: str, tmp_path: Path) -> None:
    """DDIM of ten leading steps against diffusers' own, whose last step goes to abar 1 or to that of timestep 0; and the export's."""
    noise = NoiseSchedule(beta_schedule="scaled_linear", final_alpha=final)  # type: ignore[arg-type]
    net = Elastic(TINY, widths=(0.5, 1.0), noise=noise).initial(0)
    schedule = Schedule(tuple(Step(t, net.full_arch) for t in leading(10)))
    ours = sample(net, schedule, DDIM(clip=False), 0, 0, 4)
    scheduler = DDIMScheduler(**noise.scheduler, clip_sample=False, timestep_spacing="leading")
    scheduler.set_timesteps(10)
    from evaluators.sampling import initial_noise

    x = initial_noise(0, 0, 4, net.state_shape)
    with torch.inference_mode():
        for t in scheduler.timesteps:
            x = scheduler.step(net.full.eval()(x, t).sample, t, x).prev_sample
    # Ten steps of float32, whose sizes are of the state's.
    assert float((ours - x.clamp(-1, 1)).abs().max()) < 1e-4 * max(1.0, float(x.abs().max()))
    assert sample(net, schedule, DDPM(clip=False), 0, 0, 2).isfinite().all()
    export(net, schedule, DDIM(clip=False).describe(), {}, tmp_path / "model")
    from diffusers import DiffusionPipeline

    folder = str(tmp_path / "model")
    exported = DiffusionPipeline.from_pretrained(folder, custom_pipeline=folder, trust_remote_code=True)
    images = exported(4, seed=0, output_type="pt").images * 2 - 1
    assert float((images - ours).abs().max()) < 1e-4


def test_a_text_unet_that_attends_nowhere_is_given_no_text(tmp_path: Path) -> None:
    """As exported networks of a UNet2DModel are whose levels differ in depth."""
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
    stock = UNet2DConditionModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=2,
        mid_block_type=None,
        **blocks,
    ).eval()
    stock.save_pretrained(tmp_path)
    net = Elastic.from_pretrained(tmp_path, widths=(0.5, 1.0), groups="count", noise=NoiseSchedule())
    assert not net.conditional
    loaded, x = net.initial(0), torch.randn(2, 1, 8, 8)
    with torch.no_grad():
        assert torch.allclose(
            loaded.forward(loaded.full_arch, x, torch.tensor([500, 500])), stock(x, 500, None).sample, atol=1e-5
        )


def test_an_autoencoder_that_is_not_known_is_not_taken_for_none(tmp_path: Path) -> None:
    """Its latents would be taken for pixels."""
    stable_diffusion(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    index["vae"] = ["diffusers", "AutoencoderTiny"]
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="of the class AutoencoderTiny, and known are AutoencoderKL, VQModel"):
        Elastic.from_pretrained(tmp_path, widths=(1.0,))
    given = Elastic.from_pretrained(tmp_path, widths=(1.0,), codec=Autoencoder(str(tmp_path / "vae")))
    assert not given.in_pixels
