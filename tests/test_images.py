from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from evaluators.images import Digits, ImageArray, ImageFolder, PhotoPatches, check_shape
from nas.contracts import UserError
from nas.plots import to_uint8


def folder_of(path: Path, count: int = 16, size: int = 8, classes: int = 1) -> Path:
    pixels = np.random.default_rng(0).integers(0, 256, (count, size, size, 3), dtype=np.uint8)
    for i, image in enumerate(pixels):
        where = path / (f"class{i % classes}" if classes > 1 else "")
        where.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(where / f"{i:03d}.png")
    return path


def test_digits_are_the_real_ones() -> None:
    digits = Digits().load()
    assert digits.pixels.shape == (1797, 1, 8, 8)
    assert digits.pixels.min() == -1
    assert digits.pixels.max() == 1
    assert digits.labels is not None
    assert sorted(set(digits.labels.tolist())) == list(range(10))
    assert Digits().load().digest == digits.digest


def test_photo_patches_are_rgb_and_repeatable() -> None:
    patches = PhotoPatches(count=64)
    loaded = patches.load()
    assert loaded.pixels.shape == (64, 3, 32, 32)
    assert loaded.pixels.std() > 0.2
    assert loaded.labels is not None
    assert set(loaded.labels.tolist()) == {0, 1}
    assert patches.load().digest == loaded.digest
    assert PhotoPatches(count=64, seed=1).load().digest != loaded.digest
    with pytest.raises(UserError, match="do not fit into photographs of 213"):
        PhotoPatches(size=300).load()


def test_a_folder_and_an_array_hold_the_same_images(tmp_path: Path) -> None:
    folder = ImageFolder(str(folder_of(tmp_path / "images")), (8, 8)).load()
    assert folder.labels is None
    np.savez(tmp_path / "images.npz", images=to_uint8(folder.pixels))
    assert ImageArray(str(tmp_path / "images.npz")).load().digest == folder.digest
    grey = ImageFolder(str(tmp_path / "images"), (8, 8), channels=1).load()
    assert grey.pixels.shape == (16, 1, 8, 8)


def test_sub_folders_are_labels_where_asked_for(tmp_path: Path) -> None:
    folder = str(folder_of(tmp_path, classes=2))
    assert ImageFolder(folder, (8, 8)).load().labels is None
    loaded = ImageFolder(folder, (8, 8), labels="folders").load()
    assert loaded.labels is not None
    assert loaded.labels.tolist() == [0] * 8 + [1] * 8


def corrupt(path: Path) -> None:
    (path / "003.png").write_bytes(b"not an image")


def truncated(path: Path) -> None:
    file = path / "003.png"
    file.write_bytes(file.read_bytes()[:60])


def wrong_size(path: Path) -> None:
    Image.new("RGB", (9, 8)).save(path / "003.png")


def too_few(path: Path) -> None:
    for file in sorted(path.iterdir())[4:]:
        file.unlink()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (corrupt, r"003\.png cannot be read as an image"),
        (truncated, r"003\.png cannot be read as an image"),
        (wrong_size, r"003\.png is 8x9 pixels, not 8x8"),
        (too_few, "has 4 images; at least 16"),
    ],
)
def test_bad_folders_are_named(tmp_path: Path, damage: Any, message: str) -> None:
    damage(folder_of(tmp_path))
    with pytest.raises(UserError, match=message):
        ImageFolder(str(tmp_path), (8, 8)).load()


def test_bad_arrays_are_named(tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    with pytest.raises(UserError, match="does not exist"):
        ImageArray(str(path)).load()
    path.write_bytes(b"nothing")
    with pytest.raises(UserError, match=r"cannot be read as an \.npz"):
        ImageArray(str(path)).load()
    np.savez(path, pictures=np.zeros(3))
    with pytest.raises(UserError, match="not an array named 'images'"):
        ImageArray(str(path)).load()
    np.savez(path, images=np.zeros((20, 8, 8)))
    with pytest.raises(UserError, match="must be uint8"):
        ImageArray(str(path)).load()
    np.savez(path, images=np.zeros((20, 8, 8), np.uint8), labels=np.zeros(3))
    with pytest.raises(UserError, match="one per image"):
        ImageArray(str(path)).load()
    np.savez(path, images=np.array([{"a": 1}] * 20, dtype=object))
    with pytest.raises(UserError, match="cannot be read"):
        ImageArray(str(path)).load()


def test_images_that_do_not_fit_the_network_are_refused() -> None:
    with pytest.raises(UserError, match=r"images are 1x8x8 .* takes 3x8x8"):
        check_shape(Digits().load(), (3, 8, 8))
