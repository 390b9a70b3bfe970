"""Nothing in an exported folder is trusted: names, classes, numbers, weights."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nas.base.exported import ExportError, check_hashes, read_export, read_network
from nas.contracts import Schedule, Step
from nas.handover.export import export
from search_spaces.shipped.train_diffusers import settings_of
from search_spaces.supernet import Elastic
from tests.test_cli import nas, refused

FILES = ("schedule.json", "train.json", "model_index.json", "provenance.json")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, tiny_net: Elastic) -> Path:
    folder = tmp_path_factory.mktemp("exported") / "model"
    schedule = Schedule(tuple(Step(t, tiny_net.uniform(width)) for t, width in ((900, 0.5), (400, 1.0), (50, 0.25))))
    export(tiny_net.initial(0), schedule, {"class": "DDIM", "clip": True}, {"images": "digits"}, folder)
    return folder


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    """A copy, beside somebody else's folder."""
    shutil.copytree(made, tmp_path / "model")
    (tmp_path / "victim").mkdir()
    (tmp_path / "victim" / "letter.txt").write_text("dear")
    return tmp_path / "model"


def edited(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


NAMES = (
    "./../victim",
    "../victim",
    "/etc",
    ".",
    "",
    "unet_0/..",
    "unet_0/../../victim",
    "unet_00000000",
    "UNET_0",
    "teacher/",
    "unet_0\n",
    "con",
    "unet_9",
)


@pytest.mark.parametrize("name", NAMES)
def test_a_name_is_never_a_path(folder: Path, name: str) -> None:
    def in_training(data: dict[str, Any]) -> None:
        data["timesteps"] = {name: [[0, 1000]]}

    def as_teacher(data: dict[str, Any]) -> None:
        data["teacher"] = name

    def in_schedule(data: dict[str, Any]) -> None:
        data["steps"][0]["model"] = name

    def in_index(data: dict[str, Any]) -> None:
        data[name] = ["diffusers", "UNet2DModel"]

    for file, change in (
        ("train.json", in_training),
        ("train.json", as_teacher),
        ("schedule.json", in_schedule),
        ("model_index.json", in_index),
    ):
        before = (folder / file).read_text()
        edited(folder / file, change)
        with pytest.raises(ExportError, match=file):
            read_export(folder)
        refused(nas("train", folder, "--images", "digits", "--steps", 1), file.replace(".", r"\."))
        (folder / file).write_text(before)
    assert (folder.parent / "victim" / "letter.txt").read_text() == "dear"
    assert not (folder / "trained").exists()


def test_a_link_is_no_network_of_ours(folder: Path) -> None:
    shutil.move(folder / "unet_0", folder.parent / "victim" / "net")
    (folder / "unet_0").symlink_to(folder.parent / "victim" / "net")
    with pytest.raises(ExportError, match="has no such folder"):
        read_export(folder)


@pytest.mark.parametrize("kind", ["AutoencoderKL", "os.system", "DiffusionPipeline", None, 3, ["UNet2DModel"]])
def test_only_classes_that_are_exported_are_made(folder: Path, kind: Any) -> None:
    edited(folder / "unet_0" / "config.json", lambda data: data.update(_class_name=kind))
    with pytest.raises(ExportError, match=r"is no class that is exported"):
        read_export(folder)
    with pytest.raises(ExportError, match=r"is no class that is exported"):
        read_network(folder / "unet_0")


def test_changed_weights_are_refused_unless_that_is_meant(folder: Path) -> None:
    path = folder / "unet_1" / "diffusion_pytorch_model.safetensors"
    content = bytearray(path.read_bytes())
    content[-3] ^= 4
    path.write_bytes(bytes(content))
    words = r"unet_1.diffusion_pytorch_model\.safetensors was changed or damaged since .*--changed-weights"
    refused(nas("train", folder, "--images", "digits", "--steps", 1), words)
    assert not (folder / "trained").exists()
    done = nas("train", folder, "--images", "digits", "--steps", 3, "--changed-weights", "-q")
    assert done.returncode == 0, done.stderr
    trained = read_export(folder / "trained")
    check_hashes(folder / "trained", trained.networks, trained.provenance, "")
    with pytest.raises(ExportError, match="notes no hash of"):
        check_hashes(folder, ["unet_0"], {"files": {}}, "--changed-weights")


SETTINGS = (
    {"steps": 0},
    {"steps": "10"},
    {"batch": True},
    {"learning_rate": float("nan")},
    {"learning_rate": -1.0},
    {"precision": "int3"},
    {"flips": True},
    {"checkpoint_every": 0},
)


@pytest.mark.parametrize("changed", SETTINGS, ids=str)
def test_settings_that_no_training_has_are_refused(folder: Path, changed: dict[str, Any]) -> None:
    with pytest.raises(ExportError, match=r"train\.json"):
        settings_of(changed)
    edited(folder / "train.json", lambda data: data["settings"].update(changed))
    refused(nas("train", folder, "--images", "digits"), r"train\.json")


def wrong_values(draw: random.Random) -> Any:
    return draw.choice([None, -1, 10**30, 1.5, "x", [], {}, [[1, 2]], True, {"a": {}}, "../x", float("inf")])


def changed_somewhere(data: Any, draw: random.Random) -> None:
    """One value, at any depth, becomes something else or is gone."""
    keys = list(data) if isinstance(data, dict) else list(range(len(data)))
    key = draw.choice(keys)
    inner = data[key]
    if isinstance(inner, dict | list) and inner and draw.random() < 0.7:
        changed_somewhere(inner, draw)
    elif draw.random() < 0.3:
        del data[key]
    else:
        data[key] = wrong_values(draw)


@pytest.mark.parametrize("seed", range(10))
def test_a_damaged_folder_is_told_by_its_file_or_still_serves(made: Path, tmp_path: Path, seed: int) -> None:
    draw = random.Random(seed)
    folder = tmp_path / "model"
    shutil.copytree(made, folder)
    path = draw.choice(
        [
            *(folder / name for name in FILES),
            folder / "unet_0" / "config.json",
            folder / "unet_0" / "diffusion_pytorch_model.safetensors",
        ]
    )
    kind = draw.choice(["cut", "gone", "flipped", "edited", "empty", "nested"])
    content = path.read_bytes()
    if kind == "gone":
        path.unlink()
    elif kind == "edited" and path.suffix == ".json":
        data = json.loads(content)
        changed_somewhere(data, draw)
        path.write_text(json.dumps(data))
    elif kind == "nested":
        path.write_bytes(b'{"a":' * 100_000)
    else:
        place = draw.randrange(len(content))
        flipped = bytearray(content)
        flipped[place] ^= 1 << draw.randrange(8)
        path.write_bytes({"cut": content[:place], "empty": b""}.get(kind, bytes(flipped)))
    result = nas("train", folder, "--images", "digits", "--steps", 3, "--batch", 2, "-q")
    if result.returncode:
        refused(result, "model|train|exported")
        assert "fault of the program" not in result.stderr
    else:
        trained = read_export(folder / "trained")
        for name in trained.networks:
            read_network(folder / "trained" / name)


def test_a_seed_may_be_any_of_32_bits() -> None:
    assert settings_of({"seed": 2**32 - 1}).seed == 2**32 - 1
    with pytest.raises(ExportError, match="seed=4294967296"):
        settings_of({"seed": 2**32})
