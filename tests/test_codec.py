"""Latents: of stock autoencoders, scaled once, encoded once; what is trained, sampled and compared through them."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, VQModel
from PIL import Image
from safetensors.torch import load_file, save_file

from evaluators.features import SmallClassifier
from evaluators.frechet import Frechet, Moments
from evaluators.images import Digits
from evaluators.latency import Latency, Timed
from evaluators.sampling import DDIM, DDPM, in_space, sample, trajectory
from nas.base.exported import ExportError, read_export
from nas.contracts import ImageSet, Schedule, Step, UserError
from nas.handover.export import export
from nas.study import Study
from nas.testing import check_supernet
from search_spaces.codec import Autoencoder, LoadedAutoencoder, Pixels
from search_spaces.intervals import uniform
from search_spaces.loaded import LoadedElastic
from search_spaces.shipped import train_data
from search_spaces.shipped.latents import decoded, moments
from search_spaces.stepwise import Stepwise
from search_spaces.supernet import Elastic
from search_spaces.training import Sandwich, TrainAutoencoder
from search_spaces.training.autoencoder import _evened_out, _moments
from tests.conftest import TINY
from tests.test_export import standing_alone
from tests.test_train import alone

IMAGES = Digits(size=16, holdout=0.2)
SHAPES: dict[str, Any] = {
    "in_channels": 1,
    "out_channels": 1,
    "block_out_channels": (8, 16),
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "norm_num_groups": 4,
}
KINDS: dict[str, Any] = {
    "KL": lambda: AutoencoderKL(**SHAPES, latent_channels=2, scaling_factor=0.7),
    "KL, shifted": lambda: AutoencoderKL(**SHAPES, latent_channels=2, scaling_factor=1.5, shift_factor=0.2),
    "KL, by channel": lambda: AutoencoderKL(
        **SHAPES, latent_channels=2, scaling_factor=0.9, latents_mean=(0.1, -0.2), latents_std=(0.5, 2.0)
    ),
    "VQ": lambda: VQModel(**SHAPES, latent_channels=2, num_vq_embeddings=64, scaling_factor=1.0),
}
CONFIG = {**TINY, "in_channels": 2, "out_channels": 2}


def made(kind: str, folder: Path) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = KINDS[kind]().eval()
    network.save_pretrained(folder)
    return network


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def scaled(network: Any, z: torch.Tensor) -> torch.Tensor:
    """As the text of diffusers' config has it."""
    config = network.config
    if config.get("latents_mean") is not None:
        mean, std = (torch.tensor(config[name]).view(1, -1, 1, 1) for name in ("latents_mean", "latents_std"))
        return (z - mean) * config.scaling_factor / std
    return (z - (config.get("shift_factor") or 0.0)) * config.scaling_factor


def test_states_are_the_stock_models_latents_scaled_once(kind: str, tmp_path: Path) -> None:
    network = made(kind, tmp_path)
    codec = Autoencoder(str(tmp_path)).load(None, "cpu")
    images = torch.from_numpy(IMAGES.load().pixels[:5])
    with torch.no_grad():
        encoded = network.encode(images)
        latents = encoded.latents if kind == "VQ" else encoded.latent_dist.mean
        assert torch.allclose(codec.encode(images), scaled(network, latents), atol=1e-5)
        assert torch.allclose(codec.decode(codec.encode(images)), network.decode(latents).sample, atol=1e-4)
    assert Autoencoder(str(tmp_path)).image_shape((2, 8, 8)) == (1, 16, 16)
    assert not codec.in_pixels


def test_what_a_network_is_trained_on_is_a_sample_of_the_posterior_or_its_mean(tmp_path: Path) -> None:
    network = made("KL", tmp_path / "vae")
    data = IMAGES.load()
    chosen, mirrored = torch.arange(6), torch.tensor([True, False] * 3)
    images = torch.from_numpy(data.pixels[:6])
    images = torch.where(mirrored[:, None, None, None], images.flip(-1), images)
    with torch.no_grad():
        posterior = network.encode(images).latent_dist
    for folder in (None, tmp_path / "run"):
        drawn = {}
        for name in ("mean", "sample"):
            codec = Autoencoder(str(tmp_path / "vae"), posterior=name).load(folder, "cpu")
            drawn[name] = codec.states(data).draw(chosen, mirrored, torch.Generator().manual_seed(1))
        assert torch.allclose(drawn["mean"], 0.7 * posterior.mean, atol=1e-5)
        noise = torch.randn(posterior.mean.shape, generator=torch.Generator().manual_seed(1))
        assert torch.allclose(drawn["sample"], 0.7 * (posterior.mean + posterior.std * noise), atol=1e-5)


def test_many_images_are_coded_a_few_at_a_time(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An autoencoder's maps are far larger than the network's that a batch was chosen for."""
    made(kind, tmp_path)
    images = torch.from_numpy(IMAGES.load().pixels[:7])
    codec = Autoencoder(str(tmp_path)).load(None, "cpu")
    states = codec.encode(images)
    expected = codec.decode(states)
    monkeypatch.setattr("search_spaces.shipped.latents.NUMBERS", 2 * 16 * 16 * 16)
    most: list[int] = []
    assert codec.network is not None
    for name in ("encoder", "decoder"):
        getattr(codec.network, name).register_forward_pre_hook(lambda module, given: most.append(len(given[0])))
    assert torch.allclose(codec.encode(images), states, atol=1e-5)
    assert torch.allclose(codec.decode(states), expected, atol=1e-4)
    assert most == [2, 2, 2, 1] * 2


def test_latents_are_encoded_once_and_known_by_images_and_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made("KL", tmp_path / "vae")
    run, data = tmp_path / "run", IMAGES.load()
    recipe = Autoencoder(str(tmp_path / "vae"))
    ticks = list(recipe.load(run, "cpu").keep(data, mirrored=True))
    assert [tick.what for tick in ticks].count("latents of mirrored images") == len(ticks) // 2
    assert ticks[-1].done == ticks[-1].total == len(data)
    files = sorted((run / "latents").iterdir())
    assert len(files) == 2
    again = recipe.load(run, "cpu")
    assert isinstance(again, LoadedAutoencoder)
    monkeypatch.setattr("search_spaces.codec.moments", lambda *given: pytest.fail("it was encoded before"))
    assert isinstance(again.kept(data, False), np.memmap)
    assert again.kept(data, True).shape == (len(data), 2, 2, 8, 8)
    monkeypatch.undo()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        KINDS["KL"]().save_pretrained(tmp_path / "other")
    for codec, images in ((Autoencoder(str(tmp_path / "other")), data), (recipe, Digits(size=16).load())):
        assert list(codec.load(run, "cpu").keep(images, mirrored=False))
    assert len(list((run / "latents").iterdir())) == 4


def test_what_is_half_encoded_or_damaged_is_encoded_again(tmp_path: Path) -> None:
    made("KL", tmp_path / "vae")
    codec: Any = Autoencoder(str(tmp_path / "vae")).load(tmp_path / "run", "cpu")
    images = IMAGES.load()
    ticks = codec.keep(images, False)
    next(ticks)
    ticks.close()
    (tmp_path / "run" / "latents").mkdir(parents=True, exist_ok=True)
    assert list((tmp_path / "run" / "latents").iterdir()) == []
    kept = codec.kept(images, False)
    [file] = (tmp_path / "run" / "latents").iterdir()
    assert len(kept) == len(images)
    del kept
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(UserError, match=r"is damaged .* delete it, it is made again"):
        codec.kept(images, False)


@pytest.mark.parametrize("sure", [True, False])
def test_a_scaling_factor_that_nobody_chose_is_not_trusted(sure: bool, tmp_path: Path) -> None:
    """diffusers' default stands in a VQModel's config whether it is meant or not; a KL model's config may lack it."""
    given: dict[str, Any] = {"scale": 1.0} if sure else {}
    VQModel(**SHAPES, latent_channels=2, num_vq_embeddings=64).save_pretrained(tmp_path / "vq")
    made("KL", tmp_path / "kl")
    path = tmp_path / "kl" / "config.json"
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "scaling_factor"}))
    for name, told in (("vq", "0.18215"), ("kl", "None")):
        if sure:
            codec = Autoencoder(str(tmp_path / name), **given).load(None, "cpu")
            assert codec.network is not None
            assert codec.network.config.scaling_factor == 1.0
        else:
            with pytest.raises(UserError, match=rf"scaling_factor is {told}, .*scale="):
                Autoencoder(str(tmp_path / name))


def test_what_is_no_autoencoder_is_named(tmp_path: Path) -> None:
    Elastic(TINY, (1.0,)).initial(0).full.save_pretrained(tmp_path / "unet")
    for path, words in (
        ("nowhere", r"config\.json does not exist"),
        ("unet", "holds a UNet2DModel, not an AutoencoderKL"),
    ):
        with pytest.raises(UserError, match=words):
            Autoencoder(str(tmp_path / path))
    made("KL", tmp_path / "vae")
    with pytest.raises(UserError, match="latents have 2 channels, the network takes 1"):
        Elastic(TINY, (1.0,), codec=Autoencoder(str(tmp_path / "vae")))
    weights = tmp_path / "vae" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:2000])
    with pytest.raises(UserError, match="cut off or damaged"):
        Elastic(CONFIG, (1.0,), codec=Autoencoder(str(tmp_path / "vae"))).initial(0)


def test_shapes_and_costs_follow_from_a_config_before_there_is_a_folder(tmp_path: Path) -> None:
    network = made("KL", tmp_path / "vae")
    config = {**SHAPES, "_class_name": "AutoencoderKL", "latent_channels": 2}
    early = Autoencoder(str(tmp_path / "nowhere"), scale=0.7, config=config)
    recipe = Elastic(CONFIG, (1.0,), codec=early)
    there = Elastic(CONFIG, (1.0,), codec=Autoencoder(str(tmp_path / "vae")))
    assert recipe.outline() == there.outline()
    with pytest.raises(UserError, match=r"nowhere/.* does not exist"):
        recipe.initial(0)
    with pytest.raises(UserError, match="scaling_factor is None"):
        Autoencoder(str(tmp_path / "nowhere"), config=config)
    with pytest.raises(UserError, match="config has no _class_name"):
        Autoencoder(str(tmp_path / "nowhere"), scale=1.0, config=SHAPES)
    Autoencoder(str(tmp_path / "vae"), scale=0.7, config=config).load(None, "cpu")
    other = {**config, "norm_num_groups": 8}
    with pytest.raises(UserError, match="norm_num_groups is 4, the study expects 8"):
        Autoencoder(str(tmp_path / "vae"), scale=0.7, config=other).load(None, "cpu")
    assert network.config.norm_num_groups == 4


def test_a_latent_network_is_trained_sampled_and_scored(kind: str, tmp_path: Path) -> None:
    network = made(kind, tmp_path / "vae")
    recipe = Elastic(CONFIG, (0.5, 1.0), codec=Autoencoder(str(tmp_path / "vae")))
    assert (recipe.state_shape, recipe.image_shape) == ((2, 8, 8), (1, 16, 16))
    ticks = list(Sandwich(steps=3, batch=8, flip=True).run(recipe, IMAGES, tmp_path / "run" / "supernet", 0, "cpu"))
    assert [tick.what for tick in ticks][-1] == "supernet"
    assert {tick.what for tick in ticks} == {"latents", "latents of mirrored images", "supernet"}
    net = recipe.load(tmp_path / "run" / "supernet", "cpu")
    steps = uniform(4)
    check_supernet(net, Stepwise(recipe, steps, (2, 2)), samples=3)
    schedule = Schedule(tuple(Step(t, net.full_arch) for t in steps))
    *_, last = trajectory(net, schedule, DDIM(clip=False), 0, 0, 4)
    images = sample(net, schedule, DDIM(), 0, 0, 4)
    with torch.no_grad():
        config = network.config
        if config.get("latents_mean") is not None:
            mean, std = (torch.tensor(config[name]).view(1, -1, 1, 1) for name in ("latents_mean", "latents_std"))
            last = last * std / config.scaling_factor + mean
        else:
            last = last / config.scaling_factor + (config.get("shift_factor") or 0.0)
        assert torch.allclose(images, network.decode(last).sample.clamp(-1, 1), atol=1e-4)
    score = Frechet(IMAGES, SmallClassifier(steps=20), rungs=(32,))
    list(score.prepare(tmp_path / "run", 0, "cpu"))
    loaded = score.load(net, tmp_path / "run")
    assert np.isfinite(loaded(schedule, 32, 0).values["fd"])
    told = loaded.grounds(schedule, 32, 0)  # type: ignore[attr-defined]
    held_out = torch.from_numpy(IMAGES.load().reference.pixels)
    with torch.no_grad():
        encoded = network.encode(held_out)
        latents = encoded.latents if kind == "VQ" else encoded.latent_dist.mean
        again = network.decode(latents).sample.clamp(-1, 1)
    features = score.features.load(tmp_path / "run", torch.device("cpu"))
    one, other = (Moments.of(features(x).numpy()).gaussian() for x in (held_out, again))
    assert told["fd_of_reconstructions"] == pytest.approx(one.distance(other), rel=1e-3)


def test_the_identity_of_a_latent_network_holds_its_autoencoder(tmp_path: Path) -> None:
    made("KL", tmp_path / "one")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        KINDS["KL"]().save_pretrained(tmp_path / "two")
    one, two = (Elastic(CONFIG, (1.0,), codec=Autoencoder(str(tmp_path / name))) for name in ("one", "two"))
    assert one.describe() != two.describe()
    list(Sandwich(steps=2, batch=4).run(one, IMAGES, tmp_path / "run", 0, "cpu"))
    assert one.digest(tmp_path / "run") != two.digest(tmp_path / "run")
    assert one.describe() != replace(one, codec=Autoencoder(str(tmp_path / "one"), posterior="mean")).describe()
    plain = Elastic(TINY, (1.0,))
    assert "codec" not in plain.describe()
    assert plain.codec == Pixels()


def test_decoding_is_counted_apart(kind: str, tmp_path: Path) -> None:
    from fvcore.nn import FlopCountAnalysis

    network = made(kind, tmp_path)
    recipe = Elastic(CONFIG, (1.0,), codec=Autoencoder(str(tmp_path)))
    outline = recipe.outline()
    assert outline["macs"] == Elastic(CONFIG, (1.0,)).outline()["macs"]

    class Decode(torch.nn.Module):
        def forward(self, z: torch.Tensor) -> torch.Tensor:
            return network.decode(z, force_not_quantize=True).sample if kind == "VQ" else network.decode(z).sample

    network.requires_grad_(False)
    counted = FlopCountAnalysis(Decode(), torch.zeros(1, 2, 8, 8)).unsupported_ops_warnings(False)
    by_kind = counted.by_operator()
    theirs = sum(by_kind[name] for name in ("conv", "linear", "addmm", "bmm", "matmul", "einsum", "baddbmm"))
    attention = 2 * 64 * 64 * 16  # fvcore does not know the fused products
    assert outline["decoder_macs"] == theirs + attention
    assert "decoder_macs" not in Elastic(TINY, (1.0,)).outline()


def test_latents_of_mirrored_images_are_not_mirrored_latents(tmp_path: Path) -> None:
    made("KL", tmp_path)
    codec = Autoencoder(str(tmp_path)).load(None, "cpu")
    data = ImageSet(IMAGES.load().pixels[:8], None, "eight")
    draw = codec.states(data).draw
    both = [draw(torch.arange(8), torch.full((8,), flip), torch.Generator().manual_seed(0)) for flip in (False, True)]
    assert not torch.allclose(both[0].flip(-1), both[1], atol=1e-3)


# --------------------------------------------------------------------------------------------- an autoencoder of one's own

OWN = TrainAutoencoder(
    in_channels=1, latent_channels=2, channels=(8, 8), norm_groups=4, steps=60, warmup=10, batch=16, checkpoint_every=20
)


def finished(recipe: TrainAutoencoder, folder: Path, seed: int = 0) -> list[Any]:
    return list(recipe.prepare(IMAGES, folder, seed, "cpu"))


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("own")
    finished(OWN, folder)
    return folder


def test_an_autoencoder_is_trained_once_and_says_what_came_of_it(own: Path) -> None:
    assert finished(OWN, own) == []
    told = json.loads((own / "autoencoder" / "training.json").read_text())
    assert told["of"] == "held-out images"
    network = AutoencoderKL.from_pretrained(own / "autoencoder", low_cpu_mem_usage=False).eval()
    assert network.config.scaling_factor == 1.0
    held_out = torch.from_numpy(IMAGES.load().reference.pixels)
    with torch.no_grad():
        error = (network(held_out).sample - held_out).square().mean()
    assert told["squared_error"] == pytest.approx(float(error), rel=1e-4)
    assert float(error) < float(held_out.var()) / 2
    with pytest.raises(UserError, match="was trained on other images or with other settings"):
        finished(replace(OWN, steps=61), own)
    with pytest.raises(UserError, match="takes 3 channels"):
        finished(replace(OWN, in_channels=3), own / "elsewhere")
    with pytest.raises(UserError, match="a run folder, and none is given"):
        OWN.load(None, "cpu")
    with pytest.raises(UserError, match="10 is no multiple of norm_groups=4"):
        replace(OWN, channels=(8, 10))


def test_its_latents_have_mean_0_and_deviation_1_by_weights_alone(own: Path) -> None:
    """What is encoded and decoded is as it was before they were evened out."""
    codec, data = OWN.load(own, "cpu"), IMAGES.load()
    drawn = codec.states(data).draw(torch.arange(len(data)), None, torch.Generator().manual_seed(0))
    assert torch.allclose(drawn.mean((0, 2, 3)), torch.zeros(2), atol=0.05)
    assert torch.allclose(drawn.std((0, 2, 3)), torch.ones(2), atol=0.05)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        network = AutoencoderKL(**{name: value for name, value in OWN.config.items() if name != "_class_name"}).eval()
    images = torch.from_numpy(data.pixels[:8])
    with torch.no_grad():
        before = network.encode(images).latent_dist
        expected = network.decode(before.mean).sample
        _evened_out(network, data)
        after = network.encode(images).latent_dist
        assert torch.allclose(network.decode(after.mean).sample, expected, atol=1e-4)
        assert not torch.allclose(after.mean, before.mean, atol=1e-2)
        assert torch.allclose(after.std / after.mean.std(), before.std / before.mean.std(), rtol=0.5)


def test_a_training_that_is_stopped_goes_on_bit_for_bit(own: Path, tmp_path: Path) -> None:
    for stop in (7, 25):
        ticks: Any = OWN.prepare(IMAGES, tmp_path, 0, "cpu")
        for _ in range(stop):
            next(ticks)
        ticks.close()
        assert (tmp_path / "autoencoder.safetensors").exists()
    assert finished(OWN, tmp_path)[0].done == 33
    name = "autoencoder/diffusion_pytorch_model.safetensors"
    one, other = (load_file(folder / name) for folder in (own, tmp_path))
    assert all(torch.equal(one[key], other[key]) for key in one)
    assert OWN.digest(own) == OWN.digest(tmp_path)
    assert not (tmp_path / "autoencoder.safetensors").exists()


def test_large_images_are_evened_out_a_few_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    networks = []
    for numbers in (2**26, 2 * 16 * 16 * 16):
        monkeypatch.setattr("search_spaces.shipped.latents.NUMBERS", numbers)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            network = KINDS["KL"]().eval()
        most: list[int] = []
        network.encoder.register_forward_pre_hook(lambda module, given, most=most: most.append(len(given[0])))
        facts = _evened_out(network, IMAGES.load())
        networks.append((network.quant_conv.weight.clone(), facts["squared_error"], max(most)))
    (weights, error, all_at_once), (others, same, few) = networks
    assert (all_at_once, few) == (256, 2)
    assert torch.allclose(weights, others, rtol=1e-4)
    assert error == pytest.approx(same, rel=1e-4)


def test_moments_are_those_of_all_posteriors_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("search_spaces.shipped.latents.NUMBERS", 2 * 16 * 16 * 16)
    data = IMAGES.load()
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        network = KINDS["KL"]().eval()
        found = _moments(network, data, torch.device("cpu"))
        whole = network.encode(torch.from_numpy(data.pixels)).latent_dist
    means, variances = whole.mean.double(), whole.var.double()
    expected = means.mean((0, 2, 3)), means.var((0, 2, 3)), variances.mean((0, 2, 3))
    for mine, theirs in zip(found, expected, strict=True):
        assert torch.allclose(mine, theirs, rtol=1e-4, atol=1e-6)


def test_weights_belong_to_their_autoencoder(own: Path, tmp_path: Path) -> None:
    """Of the same recipe too: one that is trained again is another, such as on another device. What is left of an unfinished one is no hindrance."""
    recipe = Elastic(CONFIG, (0.5, 1.0), codec=OWN)
    shutil.copytree(own, tmp_path / "run")
    training = Sandwich(steps=2, batch=4)
    list(training.run(recipe, IMAGES, tmp_path / "run", 0, "cpu"))
    weights = tmp_path / "run" / "autoencoder" / "diffusion_pytorch_model.safetensors"
    (tmp_path / "run" / "autoencoder" / "training.json").unlink()
    list(OWN.prepare(IMAGES, tmp_path / "run", 0, "cpu"))
    assert list(training.run(recipe, IMAGES, tmp_path / "run", 0, "cpu")) == []
    tensors = load_file(weights)
    tensors["decoder.conv_out.bias"] += 1
    save_file(tensors, weights)
    with pytest.raises(UserError, match="trained with another network, training, seed or images"):
        list(training.run(recipe, IMAGES, tmp_path / "run", 0, "cpu"))


def test_what_a_latent_study_lacks_is_said_before_training(tmp_path: Path, tiny_study: Study) -> None:
    config = {**SHAPES, "_class_name": "AutoencoderKL", "latent_channels": 2}
    codec = Autoencoder(str(tmp_path / "nowhere"), scale=0.7, config=config)
    recipe = Elastic(CONFIG, (0.5, 1.0), codec=codec)
    steps = uniform(4)
    study = replace(
        tiny_study,
        space=Stepwise(recipe, steps, (2, 2)),
        supernet=recipe,
        images=IMAGES,
        evaluator=Frechet(IMAGES, rungs=(32,)),
    )
    with pytest.raises(UserError, match=r"nowhere/config\.json does not exist"):
        study.check()
    made("KL", tmp_path / "nowhere")
    study.check()
    for sampler, words in (
        (DDIM(clip=True), "would clip latents as if they were images"),
        (DDPM("learned_range"), "needs a network that says where the variance lies"),
    ):
        with pytest.raises(UserError, match=words):
            replace(study, evaluator=Frechet(IMAGES, rungs=(32,), sampler=sampler))


def test_channels_of_noise_are_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    finished(replace(OWN, divergence=1.0, steps=100), tmp_path)
    assert "latent channel 0, 1 is nearly all noise" in caplog.text


def test_a_study_trains_its_own_autoencoder_and_then_its_network(tmp_path: Path) -> None:
    recipe = Elastic(CONFIG, (0.5, 1.0), codec=OWN)
    training = Sandwich(steps=3, batch=8)
    assert OWN.training_macs(recipe.state_shape) == recipe.outline()["codec_training_macs"] > 60 * 16 * 3 * 1e6
    ticks = list(training.run(recipe, IMAGES, tmp_path, 0, "cpu"))
    assert list(dict.fromkeys(tick.what for tick in ticks)) == ["autoencoder", "latents", "supernet"]
    assert list(training.run(recipe, IMAGES, tmp_path, 0, "cpu")) == []
    # What networks are trained on of it is nothing to the autoencoder.
    assert list(replace(OWN, posterior="mean").prepare(IMAGES, tmp_path, 0, "cpu")) == []
    net = recipe.load(tmp_path, "cpu")
    schedule = Schedule(tuple(Step(t, net.full_arch) for t in uniform(3)))
    assert sample(net, schedule, DDIM(), 0, 0, 2).shape == (2, 1, 16, 16)
    assert recipe.digest(tmp_path) == recipe.digest(tmp_path)


# ------------------------------------------------------------------------------------------------------ pipelines in and out


def exported(kind: str, tmp_path: Path) -> tuple[LoadedElastic, Schedule, Any]:
    made(kind, tmp_path / "vae")
    recipe = Elastic(CONFIG, (0.5, 1.0), codec=Autoencoder(str(tmp_path / "vae")))
    net, steps = recipe.initial(0), (980, 700, 300, 20)
    schedule = Schedule(tuple(Step(t, recipe.uniform(w)) for t, w in zip(steps, (1.0, 0.5, 0.5, 1.0), strict=True)))
    sampler = in_space(DDIM(), net.in_pixels)
    export(net, schedule, sampler.describe(), {}, tmp_path / "model")
    return net, schedule, sampler


def test_an_exported_folder_decodes_as_ours(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    net, schedule, sampler = exported(kind, tmp_path)
    plan = json.loads((tmp_path / "model" / "schedule.json").read_text())
    assert (plan["shape"], plan["image_shape"]) == ([2, 8, 8], [1, 16, 16])
    assert plan["sampler"]["clip"] is False
    images = standing_alone(tmp_path / "model", monkeypatch)
    assert torch.allclose(images, sample(net, schedule, sampler, 0, 0, 16), atol=1e-5)


@pytest.mark.long
def test_an_exported_folder_trains_on_latents_without_this_project(tmp_path: Path) -> None:
    """The same draws of posteriors as ours, hashes of the autoencoder kept, and a folder that samples."""
    exported("KL", tmp_path)
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for number, pixels in enumerate(IMAGES.load().pixels[:24, 0]):
        Image.fromarray(((pixels + 1) * 127.5).round().astype(np.uint8)).save(pictures / f"{number}.png")
    done = alone(
        tmp_path / "model" / "train_diffusers.py", "--images", pictures, "--steps", 4, "--batch", 4, "--flip", "--cpu"
    )
    assert done.returncode == 0, done.stderr
    trained = tmp_path / "model" / "trained"
    read_export(trained)
    assert "vae/config.json" in json.loads((trained / "provenance.json").read_text())["files"]
    assert alone(trained / "sample.py", "--count", 4, "--to", tmp_path / "samples.png").returncode == 0
    with Image.open(tmp_path / "samples.png") as grid:
        assert grid.size == (4 * 64, 64)  # enlarged to be looked at
    weights = tmp_path / "model" / "vae" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + b"\0\0\x80\x3f")
    refused = alone(tmp_path / "model" / "train_diffusers.py", "--images", pictures, "--steps", 8, "--cpu")
    assert refused.returncode != 0
    assert "vae/diffusion_pytorch_model.safetensors was changed or damaged" in refused.stderr


def test_latents_of_the_script_are_those_of_the_project(tmp_path: Path) -> None:
    net, *_ = exported("KL, by channel", tmp_path)
    pixels = IMAGES.load().pixels[:10]
    chosen, mirrored = torch.arange(10), torch.arange(10) % 2 == 0
    plan = json.loads((tmp_path / "model" / "train.json").read_text())
    theirs = train_data.prepared(tmp_path / "model", plan, pixels, train_data.Told(), True, "cpu")
    ours = net.codec.states(ImageSet(pixels, None, "ten"))
    one, other = (data.draw(chosen, mirrored, torch.Generator().manual_seed(0)) for data in (theirs, ours))
    assert torch.allclose(one, other, atol=1e-5)


def test_images_to_train_on_are_moved_batch_by_batch(tmp_path: Path) -> None:
    """There may be more than the device holds, which here holds none at all."""
    pixels, nothing = IMAGES.load().pixels, torch.device("meta")
    data = train_data.prepared(tmp_path, {"shape": pixels.shape[1:]}, pixels, train_data.Told(), True, nothing)
    assert data.pixels.data_ptr() == pixels.ctypes.data
    drawn = data.draw(torch.arange(4), torch.ones(4, dtype=torch.bool, device=nothing), torch.Generator())
    assert (drawn.device, drawn.shape) == (nothing, (4, *pixels.shape[1:]))


def test_the_next_training_of_the_same_images_finds_them_encoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = []
    for kind in ("KL", "VQ"):
        (tmp_path / kind).mkdir()
        exported(kind, tmp_path / kind)
        folders.append(tmp_path / kind / "model")
    calls: list[int] = []
    plain = moments

    def counted(network: Any, part: torch.Tensor) -> torch.Tensor:
        calls.append(len(part))
        return plain(network, part)

    monkeypatch.setattr(train_data, "moments", counted)

    def prepared(folder: Path, pixels: Any, flip: bool = False) -> torch.Tensor:
        plan = json.loads((folder / "train.json").read_text())
        return train_data.prepared(folder, plan, pixels, train_data.Told(), flip, "cpu").pixels

    pixels, other = IMAGES.load().pixels[:10], IMAGES.load().pixels[10:20]
    first = prepared(folders[0], pixels)
    assert torch.equal(prepared(folders[0], pixels.copy(), flip=True), first)
    assert calls == [10, 10]  # and the mirrored ones
    assert not torch.equal(prepared(folders[0], other), first)
    assert not torch.equal(prepared(folders[1], other), prepared(folders[0], other))
    assert torch.equal(prepared(folders[0], pixels), first)
    assert len(calls) == 6
    del pixels
    assert not train_data._ENCODED  # nobody has them any more


@pytest.mark.parametrize("change", ["class", "posterior", "shape", "agreement"])
def test_what_is_wrong_with_an_exported_autoencoder_is_named(change: str, tmp_path: Path) -> None:
    exported("KL", tmp_path)
    folder = tmp_path / "model"
    words = {
        "class": "'Consistency' is no class that is exported, AutoencoderKL or VQModel",
        "posterior": "posterior='median' is none of sample, mean",
        "shape": r"image_shape=\[1, 16\] is not \(channels, height, width\)",
        "agreement": "do not agree whether networks work on latents",
    }
    path = folder / ("vae/config.json" if change == "class" else "schedule.json")
    told = json.loads(path.read_text())
    told |= {
        "class": {"_class_name": "Consistency"},
        "posterior": {"posterior": "median"},
        "shape": {"image_shape": [1, 16]},
    }.get(change, {})
    if change == "agreement":
        del told["image_shape"]
    path.write_text(json.dumps(told))
    with pytest.raises(ExportError, match=words[change]):
        read_export(folder)


def test_decoding_is_timed_apart(tmp_path: Path) -> None:
    made("KL", tmp_path / "vae")
    recipe = Elastic(CONFIG, (0.5, 1.0), codec=Autoencoder(str(tmp_path / "vae")))
    list(Sandwich(steps=1, batch=4).run(recipe, IMAGES, tmp_path / "supernet", 0, "cpu"))
    timed = Timed(Frechet(IMAGES, SmallClassifier(steps=5), rungs=(16,)), Latency(batch=2, warmup=0, repeats=2))
    list(timed.prepare(tmp_path, 0, "cpu"))
    net = recipe.load(tmp_path / "supernet", "cpu")
    schedule = Schedule((Step(900, net.full_arch), Step(100, net.full_arch)))
    score = timed.load(net, tmp_path)(schedule, 16, 0)
    told = re.search(r"ms an image, and ([\d.]+) ms to decode it", score.labels["latency_ms"])
    kept = json.loads((tmp_path / "latency.json").read_text())
    [times] = kept.values()
    assert told is not None
    assert float(told.group(1)) == pytest.approx(float(np.median(times["decoding"])), rel=1e-2)
    assert score.values["latency_ms"] == pytest.approx(
        2 * float(np.median(next(v for k, v in times.items() if k != "decoding"))), rel=1e-6
    )


@pytest.mark.parametrize("upcast", [True, False])
def test_an_autoencoder_that_half_precision_is_too_small_for_decodes_in_whole(upcast: bool) -> None:
    """As Stable Diffusion XL's says of itself; another one keeps to its precision."""
    torch.manual_seed(0)
    half = AutoencoderKL(**SHAPES, latent_channels=3, force_upcast=upcast).eval().to(torch.float16)
    whole = AutoencoderKL(**SHAPES, latent_channels=3).eval()
    whole.load_state_dict({name: tensor.float() for name, tensor in half.state_dict().items()})
    states = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)).half()
    with torch.inference_mode():
        found, wanted = decoded(half, states), decoded(whole, states.float())
    assert half.dtype == torch.float16
    assert found.dtype == (torch.float32 if upcast else torch.float16)
    assert torch.allclose(found.float(), wanted, atol=1e-6) == upcast
