from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import evaluators.kept
from evaluators.conditions import lines_of
from evaluators.images import Digits, ImageArray, ImageFolder, PhotoPatches, check_shape, load_once
from nas.base.files import check_new, new_folder
from nas.base.pictures import PictureError, read_caption, read_picture
from nas.contracts import UserError
from nas.results.samples import to_uint8
from nas.study import load_study
from search_spaces.shipped.train_data import read_images


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


def test_a_class_that_cannot_be_read_is_not_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, scan = str(folder_of(tmp_path, classes=2)), os.scandir

    def refusing(path: Any) -> Any:
        if str(path).endswith("class1"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", refusing)
    with pytest.raises(UserError, match=r"class1 cannot be read \(Permission denied\); change its permissions"):
        ImageFolder(folder, (8, 8), labels="folders").load()


def test_the_mark_at_the_beginning_of_a_text_is_no_part_of_it(tmp_path: Path) -> None:
    folder_of(tmp_path, 1)
    (tmp_path / "000.txt").write_bytes("\ufeffa bag\r\n".encode())
    assert read_caption(tmp_path / "000.png") == "a bag"
    (tmp_path / "prompts.txt").write_bytes("\ufeffa bag\r\nof two\u2028lines\n\n".encode())
    assert lines_of(tmp_path / "prompts.txt") == ["a bag", "of two\u2028lines"]


def test_a_new_folder_may_be_an_empty_one_that_is_there(tmp_path: Path) -> None:
    """Such as one where something is mounted, which cannot be replaced; whole or not at all, also behind a process that was killed."""
    to, gone = tmp_path / "to", 2**22 + 1  # a number that no process has
    to.mkdir()
    number = to.stat().st_ino
    for number_of in (gone, os.getpid()):  # a container's processes have the same one each time
        (to / f".to.{number_of}.partial").mkdir()
    with pytest.raises(OSError, match="File name too long"), new_folder(to) as partial:
        (partial / "part").write_text("of it") and (partial / (300 * "x")).write_text("of it")
    assert list(to.iterdir()) == []
    with new_folder(to) as partial:
        (partial / "part").write_text("of it")
        (partial / "within").mkdir()
        assert [one for one in to.iterdir() if not one.name.startswith(".")] == []
    assert sorted(one.name for one in to.iterdir()) == ["part", "within"]
    assert to.stat().st_ino == number
    with pytest.raises(UserError, match="is not empty"):
        check_new(to)


def test_labels_are_part_of_what_is_kept(tmp_path: Path) -> None:
    folder, run = str(folder_of(tmp_path / "pictures", classes=2)), tmp_path / "run"
    bare, told = ImageFolder(folder, 8), ImageFolder(folder, 8, labels="folders")
    for recipe in (bare, told):
        list(recipe.prepare(run))
    assert bare.load().digest != told.load().digest
    fresh = tmp_path / "other"
    list(told.prepare(fresh))
    assert told.load().labels is not None


def test_a_relative_path_is_one_in_the_studys_folder_for_each_study(tmp_path: Path) -> None:
    for name, value in (("one", 0), ("two", 255)):
        (tmp_path / name).mkdir()
        np.savez(tmp_path / name / "x.npz", images=np.full((20, 8, 8), value, np.uint8))
        folder_of(tmp_path / name / "pictures", count=18 if value else 20)
    one, two = (ImageArray("x.npz", base=str(tmp_path / name)) for name in ("one", "two"))
    assert (load_once(one).pixels.max(), load_once(two).pixels.min()) == (-1, 1)
    first, second = (ImageFolder("pictures", 8, base=str(tmp_path / name)) for name in ("one", "two"))
    assert (len(first.load()), len(second.load())) == (20, 18)


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


def folder_with(path: Path, name: str, make: Any) -> np.ndarray:
    """The picture of this name as it is read, among fifteen others."""
    folder_of(path, count=15)
    make(path / name)
    found = ImageFolder(str(path), 8).load()
    names = sorted(file.name for file in path.iterdir())
    return found.pixels[names.index(name)]


def test_sixteen_bits_are_sixteen_bits(tmp_path: Path) -> None:
    ramp = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    for suffix in (".png", ".tif"):
        read = folder_with(tmp_path / suffix[1:], f"a{suffix}", lambda path: Image.fromarray(ramp).save(path))
        assert read[0] == pytest.approx(ramp / 32767.5 - 1, abs=1 / 127)
        grey = read_picture(tmp_path / suffix[1:] / f"a{suffix}", (8, 8), 1)
        assert grey[0] == pytest.approx(ramp / 32767.5 - 1, abs=1e-4)


ORIENTED = {1: "lt", 2: "rt", 3: "rb", 4: "lb", 5: "lt", 6: "rt", 7: "rb", 8: "lb"}
"""Where the stored first pixel is seen: left or right, top or bottom."""


@pytest.mark.parametrize("orientation", ORIENTED)
def test_a_cameras_orientation_is_applied(orientation: int, tmp_path: Path) -> None:
    stored = np.zeros((8, 8), np.uint8)
    stored[0, 0] = 255
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(stored).save(tmp_path / "a.png", exif=exif)
    seen = read_picture(tmp_path / "a.png", (8, 8), 1)[0]
    row, column = (int(i) for i in np.argwhere(seen == 1)[0])
    assert ("l" if column == 0 else "r") + ("t" if row == 0 else "b") == ORIENTED[orientation]


def test_hidden_colours_stay_hidden(tmp_path: Path) -> None:
    red = np.zeros((8, 8, 4), np.uint8)
    red[..., 0] = 255
    red[2:6, 2:6] = (0, 0, 255, 255)
    half = red.copy()
    half[..., 3] = 128
    for name, mode in (("rgba.png", "RGBA"), ("palette.png", "P"), ("grey.png", "LA")):
        made = Image.fromarray(red)
        if mode == "P":
            made = made.convert("RGB").quantize()
            made.info["transparency"] = made.getpixel((0, 0))
            made.save(tmp_path / name, transparency=made.getpixel((0, 0)))
        else:
            made.convert(mode).save(tmp_path / name)
        white = read_picture(tmp_path / name, (8, 8), 3)
        assert white[:, 0, 0].tolist() == [1, 1, 1], name
        black = read_picture(tmp_path / name, (8, 8), 3, background=(0, 0, 0))
        assert black[:, 0, 0].tolist() == [-1, -1, -1], name
    Image.fromarray(half).save(tmp_path / "half.png")
    assert read_picture(tmp_path / "half.png", (8, 8), 3)[:, 0, 0] == pytest.approx([1, 0, 0], abs=0.01)


def test_what_a_folder_holds_is_said_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder_of(tmp_path / "all" / "cats", count=16)
    folder_of(tmp_path / "elsewhere", count=9)
    (tmp_path / "all" / "dogs").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "all" / "around").symlink_to(tmp_path / "all")
    shutil.copytree(tmp_path / "elsewhere", tmp_path / "all" / ".ipynb_checkpoints")
    (tmp_path / "all" / "cats" / "notes.txt").write_text("x")
    (tmp_path / "all" / "cats" / ".hidden.png").write_bytes(b"x")
    Image.new("RGB", (8, 8)).save(tmp_path / "all" / "cats" / "x.tif")
    Image.new("RGB", (8, 8)).save(tmp_path / "all" / "cats" / "x.gif")
    recipe = ImageFolder(str(tmp_path / "all"), [8, 8], labels="folders")  # type: ignore[arg-type]
    with caplog.at_level("INFO", "nas"):
        loaded = recipe.load()
        recipe.load()
    assert len(loaded) == 27
    [said] = [record.getMessage() for record in caplog.records]
    for words in (
        "27 pictures",
        "1 hidden folders (.ipynb_checkpoints)",
        "1 hidden files",
        "1 files of another kind (.txt)",
        "found before",
        "2 classes: cats (18), dogs (9)",
    ):
        assert words in said
    with pytest.raises(UserError, match="lies in no class's folder"):
        ImageFolder(str(tmp_path / "all" / "cats"), 8, labels="folders").peek()


def test_sizes_and_resizing(tmp_path: Path) -> None:
    folder_of(tmp_path, size=8)
    wide = np.zeros((16, 32, 3), np.uint8)
    wide[:, 8:24] = 255  # the middle square is white
    Image.fromarray(wide).save(tmp_path / "zz.png")
    with pytest.raises(UserError, match=r"zz\.png is 16x32 pixels, not 8x8; .*resize='bicubic'"):
        ImageFolder(str(tmp_path), 8).load()
    loaded = ImageFolder(str(tmp_path), 8, resize="bicubic").load()
    assert loaded.pixels[-1].min() > 0.5, "a central crop, not a squeeze"
    Image.fromarray(np.tile([0, 255], (64, 32)).astype(np.uint8)).save(tmp_path / "stripes.png")
    assert np.abs(read_picture(tmp_path / "stripes.png", (8, 8), 1, "bicubic")).max() < 0.1, "antialiased"


def test_pictures_that_are_no_single_picture_are_named(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (8, 8), (40 * i, 0, 0)) for i in range(3)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    with pytest.raises(PictureError, match=r"a\.gif holds 3 pictures"):
        read_picture(tmp_path / "a.gif", (8, 8), 3)
    Image.new("RGB", (8, 8), "white").save(  # as telephones write them, with a preview behind
        tmp_path / "a.jpg", "MPO", save_all=True, append_images=[Image.new("RGB", (4, 4))]
    )
    assert read_picture(tmp_path / "a.jpg", (8, 8), 3).min() > 0.99
    Image.fromarray(np.zeros((8, 8), np.int32)).save(tmp_path / "a.tif")
    with pytest.raises(PictureError, match="32 bits for each pixel"):
        read_picture(tmp_path / "a.tif", (8, 8), 1)
    Image.new("1", (20_001, 20_001)).save(tmp_path / "huge.png")
    with pytest.raises(PictureError, match="has more than 100 million pixels"):
        read_picture(tmp_path / "huge.png", (8, 8), 1)


def test_what_was_read_is_kept_in_the_run_folder_until_a_file_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = folder_of(tmp_path / "source", count=250)
    recipe = ImageFolder(str(source), 8)
    ticks = list(recipe.prepare(tmp_path / "run"))
    assert [(tick.done, tick.total) for tick in ticks] == [(100, 250), (200, 250), (250, 250)]
    loaded = recipe.load()
    evaluators.kept._LOADED.clear()
    monkeypatch.setattr(evaluators.images, "read_picture", lambda *given: pytest.fail("it was read before"))
    again = recipe.load()
    assert again.digest == loaded.digest
    assert np.array_equal(again.pixels, loaded.pixels)
    monkeypatch.undo()
    Image.new("RGB", (8, 8)).save(source / "000.png")
    evaluators.kept._LOADED.clear()
    assert recipe.load().digest != loaded.digest


def test_relative_paths_mean_the_studys_folder_and_neighbours_can_be_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder_of(tmp_path / "mine" / "data")
    (tmp_path / "mine" / "neighbour_of_a_study.py").write_text("SIZE = 8\n")
    (tmp_path / "mine" / "study.py").write_text(
        "from neighbour_of_a_study import SIZE\nfrom dataclasses import replace\nfrom evaluators.images import ImageFolder\n"
        "from tests.toy import toy_study\nstudy = toy_study(images=ImageFolder('data', SIZE))\n"
    )
    monkeypatch.chdir(tmp_path)
    study = load_study("mine/study.py")
    assert Path.cwd() == tmp_path
    assert len(study.images.load()) == 16
    with pytest.raises(UserError, match=r"image array .*/nowhere\.npz does not exist"):
        ImageArray("nowhere.npz").load()


def test_labels_and_channels_of_arrays_are_what_they_should_be(tmp_path: Path) -> None:
    images = np.zeros((20, 8, 8, 3), np.uint8)
    for changes, words in (
        ({"labels": np.zeros(20)}, "'labels' of .* is float64"),
        ({"labels": np.full(20, -1)}, "goes down to -1"),
        ({"images": np.zeros((20, 8, 8, 4), np.uint8)}, "has 4 channels"),
        ({"images": np.zeros((20, 3, 8, 8), np.uint8)}, "has 8 channels"),
    ):
        np.savez(tmp_path / "x.npz", **{"images": images, **changes})  # type: ignore[arg-type]
        with pytest.raises(UserError, match=words):
            ImageArray(str(tmp_path / "x.npz")).load()


def test_pictures_for_a_network_of_other_channels_are_refused(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, 2)
    with pytest.raises(PictureError, match="the networks take 4 channels, and pictures have 1 or 3"):
        next(read_images(folder, 4, (8, 8)))
