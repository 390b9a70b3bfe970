"""Networks that read a text are trained on captions: supernets by parts of a batch, and what was exported by its own script."""

from __future__ import annotations

import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from nas.base.exported import read_export, read_network
from nas.contracts import ImageSet, UserError
from search_spaces.noise import NoiseSchedule
from search_spaces.shipped.train_diffusers import Settings, train
from search_spaces.supernet import Elastic
from search_spaces.text import TextEncoder
from search_spaces.training import Sandwich, Stages
from search_spaces.training.optimiser import Batches, Optimiser
from tests.conftest import TINY
from tests.pipelines import TEXTS, captioned_images, exported


def test_trained_on_captions_some_are_dropped_whole(text_pipelines: Path) -> None:
    net = Elastic.from_pretrained(text_pipelines / "sd", widths=(1.0,)).initial(0)
    pixels = np.zeros((4, 3, 16, 16), np.float32)
    data = ImageSet(pixels, None, "four", captions=tuple(TEXTS))
    _, condition = Batches(net, data, 64, flip=False, drop=0.5).images(torch.Generator().manual_seed(0))
    assert condition is not None
    assert set(condition) == {"encoder_hidden_states"}
    known = (
        TextEncoder(str(text_pipelines / "sd")).load(None, "cpu").rows(TEXTS)(torch.arange(4))["encoder_hidden_states"]
    )
    which = [int((row == known).flatten(1).all(1).nonzero()[0]) for row in condition["encoder_hidden_states"]]
    assert 30 < which.count(2) < 50  # half of all, and a quarter of the rest
    with pytest.raises(UserError, match="captions, but the images have none"):
        net.conditions_of(ImageSet(pixels, None, "four"))


def gradients(stage: Sandwich, net: Any, data: ImageSet) -> dict[str, torch.Tensor]:
    """Of the first step, as they stand before Adam sees them."""
    seen: dict[str, torch.Tensor] = {}
    update = Optimiser.update

    def noted(self: Optimiser, *_: Any) -> None:
        seen.update(
            {name: parameter.grad.clone() for name, parameter in self._named.items() if parameter.grad is not None}
        )
        update(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Optimiser, "update", noted)
        for _ in stage.fit(net, data, 0):
            pass
    return seen


@pytest.mark.parametrize(
    "change", [{"accumulate": 3}, {"checkpointing": True}, {"accumulate": 2, "checkpointing": True}]
)
def test_how_a_batch_is_run_changes_no_gradient(text_pipelines: Path, change: dict[str, Any]) -> None:
    recipe = Elastic.from_pretrained(text_pipelines / "sd", widths=(0.5, 1.0))
    stage = Sandwich(steps=1, batch=8, warmup=0, distillation=0.5)
    expected = gradients(stage, recipe.initial(0), captioned_images())
    found = gradients(replace(stage, **change), recipe.initial(0), captioned_images())
    assert found.keys() == expected.keys()
    largest = max(float(gradient.abs().max()) for gradient in expected.values())
    for name, gradient in expected.items():
        assert torch.allclose(found[name], gradient, atol=1e-4 * largest), name
    assert stage.describe() == replace(stage, **change).describe()


def test_half_precision_changes_a_gradient_by_its_rounding(text_pipelines: Path) -> None:
    recipe = Elastic.from_pretrained(text_pipelines / "sd", widths=(1.0,))
    stage = Sandwich(steps=1, batch=8, warmup=0, full_only=True, distillation=0.5)
    expected = gradients(stage, recipe.initial(0), captioned_images())
    found = gradients(replace(stage, precision="bfloat16"), recipe.initial(0), captioned_images())
    name = "conv_out.weight"
    assert 0 < (found[name] - expected[name]).norm() < 0.1 * expected[name].norm()
    assert found[name].dtype == torch.float32


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_min_snr_weighs_all_predictions_as_errors_of_the_image(prediction: Any) -> None:
    """The same wrong image, told in each of three ways, costs the same: min(SNR, cap) of its squared error."""
    noise = NoiseSchedule(prediction=prediction)
    net = Elastic(TINY, (1.0,), noise=noise).initial(0)
    data = ImageSet(np.zeros((4, 1, 8, 8), np.float32), None, "four")
    batches = Batches(net, data, 4, flip=False, snr_cap=5.0)
    generator = torch.Generator().manual_seed(0)
    x0, wrong, drawn = torch.randn((3, 4, 1, 8, 8), generator=generator).unbind()
    t = torch.tensor([20, 300, 600, 900])
    x = batches.at(x0, t, drawn)
    abar = torch.from_numpy(net.alphas_cumprod).float()[t, None, None, None]
    said = (x - abar.sqrt() * wrong) / (1 - abar).sqrt()
    told = {"sample": wrong, "epsilon": said, "v_prediction": abar.sqrt() * said - (1 - abar).sqrt() * wrong}
    loss = batches.loss(told[prediction], batches.target(x0, t, drawn), x0, x, t)
    snr = (abar / (1 - abar)).flatten().clamp(max=5.0)
    assert float(loss) == pytest.approx(float((snr * (wrong - x0).square().mean((1, 2, 3))).mean()), rel=1e-3)


def test_a_batch_has_no_more_parts_than_images(text_pipelines: Path) -> None:
    recipe = Elastic.from_pretrained(text_pipelines / "sd", widths=(1.0,))
    with pytest.raises(UserError, match="accumulate=9 parts of a batch of 8"):
        Sandwich(steps=1, batch=8, accumulate=9)
    nothing = ImageSet(np.empty((0, 3, 16, 16), np.float32), None, "none", captions=("a",))
    with pytest.raises(UserError, match="there are no images to train on"):
        Sandwich(steps=1).check(recipe, nothing)
    Stages(()).check(recipe, nothing)
    with pytest.raises(UserError, match="reads captions, but the images have none"):
        Sandwich(steps=1).check(recipe, ImageSet(captioned_images().pixels, None, "eight"))
    with pytest.raises(UserError, match="nothing makes them of captions"):
        Sandwich(steps=1).check(replace(recipe, text=None), captioned_images())


def with_pictures(folder: Path) -> Path:
    images = folder / "pictures"
    images.mkdir()
    for number in range(12):
        colour = (20 * number, 120, 255 - 20 * number)
        Image.new("RGB", (16, 16), colour).save(images / f"{number:02}.png")
        (images / f"{number:02}.txt").write_text(TEXTS[number % 4] or "a")
    return images


@pytest.mark.long
@pytest.mark.parametrize("kind", ["sd", "xl"])
def test_an_exported_folder_is_trained_on_captions_without_this_project(
    kind: str, text_pipelines: Path, tmp_path: Path
) -> None:
    exported(text_pipelines, tmp_path / "model", kind)
    images = with_pictures(tmp_path)
    program = """
import runpy, sys
for name in ("nas", "search_spaces", "evaluators", "optuna", "pydantic"):
    sys.modules[name] = None
sys.path.insert(0, "model")
sys.argv = ["train_diffusers.py", *sys.argv[1:]]
runpy.run_path("model/train_diffusers.py", run_name="__main__")
"""
    options = ["--images", str(images), "--captions", "txt", "--cpu", "--steps", "6", "--batch", "6", "--warmup", "0"]
    options += ["--accumulate", "2", "--checkpointing", "--snr-cap", "5", "--features", "0.1"]
    done = subprocess.run(
        [sys.executable, "-c", program, *options], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "unet_1: step" in done.stdout
    trained = read_export(tmp_path / "model" / "trained")
    assert trained.texts
    before = read_network(tmp_path / "model" / "unet_0").state_dict()
    after = read_network(tmp_path / "model" / "trained" / "unet_0").state_dict()
    text = next(name for name in before if name.endswith("attn2.to_k.weight"))
    assert not torch.equal(before[text], after[text])  # what reads the text has learned too
    missing = subprocess.run(
        [sys.executable, "-c", program, *options[:2], *options[4:], "--cpu"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert missing.returncode != 0
    assert "the networks need a caption for each image: give --captions txt" in missing.stderr


@pytest.mark.long
def test_parts_and_checkpoints_change_no_gradient_of_the_script(text_pipelines: Path, tmp_path: Path) -> None:
    exported(text_pipelines, tmp_path / "model")
    pixels = captioned_images().pixels
    losses = {}
    for name, change in (("plain", {}), ("parts", {"accumulate": 3, "checkpointing": True})):
        settings = Settings(steps=4, batch=6, warmup=0, **change)  # type: ignore[arg-type]
        where = tmp_path / name
        shutil.copytree(tmp_path / "model", where)
        ticks = train(where, pixels, settings, cpu=True, captions=list(captioned_images().captions or ()))
        losses[name] = [tick["loss"] for tick in ticks]
    assert losses["parts"] == pytest.approx(losses["plain"], rel=1e-3)
