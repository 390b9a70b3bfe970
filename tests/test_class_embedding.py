"""Networks that read a learned vector of each class in a text's place: handed out, opened, trained, and taken in again."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file

from evaluators.conditions import Captions
from evaluators.frechet import Frechet
from evaluators.images import Digits
from evaluators.sampling import DDIM, sample
from nas.base.exported import ExportError, read_export
from nas.contracts import Guidance, Schedule, Step, UserError
from nas.evidence.recovered import Recovered
from nas.handover.export import export
from nas.handover.stock import export_stock
from search_spaces.loaded import LoadedElastic
from search_spaces.shipped.train_data import conditions
from search_spaces.shipped.train_diffusers import TRAINED, Settings, train
from search_spaces.supernet import Elastic
from search_spaces.text import ClassTable
from tests.arithmetic import SAMPLES
from tests.pipelines import UNET

CLASSES, CHANNELS = 10, 6
SETTINGS = Settings(steps=6, batch=8, warmup=2, checkpoint_every=3)
WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> LoadedElastic:
    file = tmp_path_factory.mktemp("table") / "classes.safetensors"
    save_file({"weight": torch.randn((CLASSES + 1, CHANNELS), generator=torch.Generator().manual_seed(0))}, file)
    config = {"_class_name": "UNet2DConditionModel", **UNET, "cross_attention_dim": CHANNELS}
    config |= {"in_channels": 1, "out_channels": 1}
    return Elastic(config, widths=(0.5, 1.0), text=ClassTable(str(file)), tokens=1).initial(0)


@pytest.fixture(scope="module")
def schedule(loaded: LoadedElastic) -> Schedule:
    half = loaded.recipe.uniform(0.5)
    return Schedule(
        (Step(900, loaded.full_arch, (), Guidance(2.5)), Step(500, half, (), Guidance(2.5)), Step(100, half))
    )


@pytest.fixture
def folder(loaded: LoadedElastic, schedule: Schedule, tmp_path: Path) -> Path:
    export(loaded, schedule, DDIM().describe(), {}, tmp_path / "model")
    return tmp_path / "model"


def opened(folder: Path) -> Any:
    pipeline = DiffusionPipeline.from_pretrained(str(folder), custom_pipeline=str(folder), trust_remote_code=True)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def test_an_exported_folder_samples_the_classes_asked_for_as_ours(
    loaded: LoadedElastic, schedule: Schedule, folder: Path
) -> None:
    told = Captions(Digits(), loaded.recipe.text).load(folder)  # type: ignore[arg-type]
    labels = told.classes(0, 0, 6)
    export_ = read_export(folder)
    assert (export_.plan["null_label"], export_.plan["class_channels"], export_.texts) == (CLASSES, CHANNELS, ())
    images = opened(folder)(class_labels=labels, seed=0, output_type="pt").images * 2 - 1
    assert torch.allclose(images, sample(loaded, schedule, DDIM(), 0, 0, 6, told), atol=SAMPLES)
    others = opened(folder)(class_labels=[0] * 6, seed=0, output_type="pt").images * 2 - 1
    assert not torch.allclose(images, others, atol=1e-2)
    with pytest.raises(ValueError, match="need class_labels, one from 0 to 9"):
        opened(folder)(batch_size=2)
    with pytest.raises(ValueError, match="read no text"):
        opened(folder)("a seven")


SHOW = """
from diffusers import DiffusionPipeline
from numpy import save
pipeline = DiffusionPipeline.from_pretrained(".", custom_pipeline=".", trust_remote_code=True)
save("shown.npy", pipeline(class_labels=[3, 7], seed=0, output_type="np").images)
"""


@pytest.mark.long
def test_it_and_a_copy_that_diffusers_saved_are_opened_in_a_process_of_their_own(folder: Path, tmp_path: Path) -> None:
    """Elsewhere, and without what this process keeps of their code."""
    pipeline = opened(folder)
    pipeline.save_pretrained(tmp_path / "copy")
    read_index = json.loads((tmp_path / "copy" / "model_index.json").read_text())
    assert read_index["class_embedding"] == json.loads((folder / "model_index.json").read_text())["class_embedding"]
    images = pipeline(class_labels=[3, 7], seed=0, output_type="np").images
    for name in ("model", "copy"):
        (tmp_path / name).rename(tmp_path / f"moved {name}")
    run(tmp_path / "cache of the copy", tmp_path / "moved copy", "-c", SHOW)
    assert np.allclose(np.load(tmp_path / "moved copy" / "shown.npy"), images, atol=SAMPLES)
    said = run(tmp_path / "cache of model", tmp_path / "moved model", "sample.py", "--count", "4", "--labels", "3", "7")
    assert "4 samples are in samples.png" in said


def run(cache: Path, folder: Path, *command: str) -> str:
    told = {**os.environ, "HF_HOME": str(cache), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *command], cwd=folder, env=told, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_its_networks_are_trained_on_what_the_classes_say(folder: Path) -> None:
    data = Digits().load()
    assert data.labels is not None
    table = load_file(folder / "class_embedding" / WEIGHTS)["weight"]
    told = conditions(read_export(folder), data.labels, None, len(data.pixels), "cpu")
    chosen, dropped = torch.tensor([5, 6, 7]), torch.tensor([False, True, False])
    rows = told.of(chosen, dropped)
    assert set(rows) == {"encoder_hidden_states"}
    wanted = [int(data.labels[5]), CLASSES, int(data.labels[7])]
    assert torch.equal(rows["encoder_hidden_states"], table[wanted][:, None])
    list(train(folder, data.pixels, SETTINGS, cpu=True, labels=data.labels))
    for name in ("unet_0", "unet_1"):
        before, after = (load_file(place / name / WEIGHTS) for place in (folder, folder / TRAINED))
        assert any(not torch.equal(before[key], after[key]) for key in before)
    images = opened(folder / TRAINED)(class_labels=[1, 2], seed=0, output_type="pt").images
    assert images.shape == (2, 1, 8, 8)
    with pytest.raises(ExportError, match="need a label from 0 to 9 for each image"):
        next(train(folder, data.pixels, Settings(), cpu=True, labels=None))


@pytest.mark.long
def test_subnets_are_fine_tuned_before_they_are_scored(
    loaded: LoadedElastic, schedule: Schedule, tmp_path: Path
) -> None:
    conditions = Captions(Digits(), loaded.recipe.text)  # type: ignore[arg-type]
    frozen = Frechet(Digits(), conditions=conditions, rungs=(16, 32))
    recipe = Recovered(frozen, Digits(), above=16, steps=2, intervals=1, batch=8)
    for _ in frozen.prepare(tmp_path, 0, "cpu"):
        pass
    plain, trained = (one.load(loaded.recipe.initial(0), tmp_path)(schedule, 32, 0) for one in (frozen, recipe))
    assert plain.values != trained.values


def test_a_network_is_taken_in_with_its_vectors(loaded: LoadedElastic, tmp_path: Path) -> None:
    export(loaded, Schedule((Step(500, loaded.full_arch),)), DDIM().describe(), {}, tmp_path / "model")
    again = Elastic.from_pretrained(tmp_path / "model", widths=(0.5, 1.0))
    assert (again.tokens, type(again.text)) == (1, ClassTable)
    ours, theirs = (
        net.conditions_of(Digits().load())(torch.arange(5))  # type: ignore[misc]
        for net in (loaded, again.initial(0))
    )
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("schedule.json", {"class_channels": "6"}, "is no int"),
        ("schedule.json", {"class_channels": 0}, "class_channels=0 is out of range"),
        ("schedule.json", {"class_channels": None}, "class_channels"),
        ("train.json", {"null_label": None}, "does not say how many classes"),
        ("model_index.json", {"class_embedding": ["os", "ClassEmbedding"]}, "no part of an exported pipeline"),
        ("class_embedding/config.json", {"_class_name": "AutoencoderKL"}, "no class that is exported"),
    ],
)
def test_what_a_folder_says_of_them_is_not_trusted(file: str, change: Any, message: str, folder: Path) -> None:
    told = json.loads((folder / file).read_text()) | change
    (folder / file).write_text(json.dumps({name: value for name, value in told.items() if value is not None}))
    with pytest.raises(ExportError, match=message):
        read_export(folder)


def test_an_index_without_them_is_refused(folder: Path) -> None:
    index = json.loads((folder / "model_index.json").read_text())
    del index["class_embedding"]
    (folder / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(ExportError, match="names no class_embedding, which the networks read"):
        read_export(folder)


def test_damaged_vectors_are_refused(folder: Path) -> None:
    data, file = Digits().load(), folder / "class_embedding" / WEIGHTS
    save_file({"weight": torch.zeros(3, CHANNELS)}, file)
    with pytest.raises(ExportError, match="was changed or damaged"):
        next(train(folder, data.pixels, SETTINGS, cpu=True, labels=data.labels))
    with pytest.raises(ExportError, match="no vector of 6 channels for each of 10 classes and none"):
        next(train(folder, data.pixels, SETTINGS, cpu=True, changed_weights=True, labels=data.labels))
    file.write_bytes(b"nothing")
    with pytest.raises(ExportError, match="cannot be read"):
        next(train(folder, data.pixels, SETTINGS, cpu=True, changed_weights=True, labels=data.labels))


def test_no_plain_pipeline_takes_them(loaded: LoadedElastic, tmp_path: Path) -> None:
    alone = Schedule((Step(500, loaded.full_arch),))
    with pytest.raises(UserError, match="no pipeline of diffusers samples as this schedule does"):
        export_stock(loaded, alone, DDIM(clip=False).describe(), {}, tmp_path / "plain")
