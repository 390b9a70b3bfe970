"""Images that a data set hands out: the same ones as from a folder, kept once, and refused in words."""

from __future__ import annotations

import os
import random
import tracemalloc
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import evaluators.kept
from evaluators.datasets import DatasetFolder, TorchDataset
from evaluators.images import HeldOutHalf, ImageFolder, load_once
from evaluators.kept import KeptImages, Source, checked
from nas.base.files import partial_of
from nas.contracts import ImageSet, UserError
from tests.test_images import folder_of

datasets = pytest.importorskip("datasets")

COUNT = 20


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return folder_of(tmp_path / "pictures", COUNT)


def table(folder: Path) -> Any:
    """The folder's pictures, three classes and a caption each."""
    files = [str(file) for file in sorted(folder.glob("*.png"))]
    columns = {"image": files, "kind": [n % 3 for n in range(COUNT)], "words": [f"picture {n}" for n in range(COUNT)]}
    names = datasets.ClassLabel(names=["bag", "boot", "coat"])
    features = datasets.Features({"image": datasets.Image(), "kind": names, "words": datasets.Value("string")})
    return datasets.Dataset.from_dict(columns, features)


@pytest.mark.parametrize("form", ["saved", "parquet", "pictures"])
def test_a_local_data_set_holds_the_folders_images(form: str, folder: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    expected = ImageFolder(str(folder), 8).load()
    kept = tmp_path / "data"
    if form == "saved":
        datasets.DatasetDict({"train": table(folder)}).save_to_disk(str(kept))
    elif form == "parquet":
        (kept / "data").mkdir(parents=True)
        table(folder).to_parquet(str(kept / "data" / "train-00000.parquet"))
    loaded = DatasetFolder(path=str(folder if form == "pictures" else kept), size=8).load()
    assert np.array_equal(loaded.pixels, expected.pixels)
    if form != "pictures":
        loaded = DatasetFolder(path=str(kept), size=8, label="kind", caption="words").load()
        assert loaded.labels is not None
        assert loaded.labels.tolist() == [n % 3 for n in range(COUNT)]
        assert loaded.texts is not None
        assert loaded.texts[4] == "picture 4"


def test_what_is_held_out_is_a_split_or_a_share(folder: Path, tmp_path: Path) -> None:
    whole = table(folder)
    parts = {"train": whole.select(range(16)), "test": whole.select(range(4, COUNT))}
    datasets.DatasetDict(parts).save_to_disk(str(tmp_path / "data"))
    given: dict[str, Any] = {"path": str(tmp_path / "data"), "size": 8, "label": "kind"}
    told = DatasetFolder(**given, held_out="test").load()
    assert len(told) == len(told.reference) == 16
    assert np.array_equal(told.reference.pixels[:12], told.pixels[4:])
    datasets.DatasetDict({"train": datasets.concatenate_datasets([whole] * 3)}).save_to_disk(str(tmp_path / "more"))
    share = DatasetFolder(**{**given, "path": str(tmp_path / "more")}, holdout=0.3, caption="words").load()
    assert share.held_out is not None
    assert len(share.held_out) == 17
    assert share.held_out.labels is not None
    assert np.bincount(share.held_out.labels).tolist() == [6, 6, 5]
    assert share.captions is not None
    assert share.labels is not None
    for caption, label in zip(share.captions, share.labels, strict=True):
        assert int(caption.split()[-1]) % 3 == label


def test_one_table_has_no_splits_to_choose_from(folder: Path, tmp_path: Path) -> None:
    """What is held out would be what is trained on."""
    table(folder).save_to_disk(str(tmp_path / "data"))
    given: dict[str, Any] = {"path": str(tmp_path / "data"), "size": 8}
    assert len(DatasetFolder(**given).load()) == COUNT
    with pytest.raises(UserError, match=r"one table without splits, and has no held_out='test'; use holdout="):
        DatasetFolder(**given, held_out="test").load()
    with pytest.raises(UserError, match="has no split 'validation'"):
        DatasetFolder(**given, split="validation").load()


class Pairs(torch.utils.data.Dataset[Any]):
    """Pictures of a folder in one of the forms that data sets hand out."""

    def __init__(self, folder: Path, form: str) -> None:
        self.files = sorted(folder.glob("*.png"))
        self.form = form

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, place: int) -> Any:
        picture = Image.open(self.files[place])
        channels_last = np.asarray(picture)
        image: Any = {
            "picture": picture,
            "bytes": channels_last,
            "channels first": torch.from_numpy(channels_last.transpose(2, 0, 1).copy()),
            "floats": torch.from_numpy(channels_last.transpose(2, 0, 1) / 255.0),
        }[self.form]
        return image, place % 4


def test_labels_are_those_of_the_items(folder: Path) -> None:
    """torchvision's `targets` are what they were before `target_transform`."""
    pairs: Any = Pairs(folder, "picture")
    recipe = TorchDataset(dataset=pairs, name="pairs", size=8, labels=True)
    pairs.targets = [1] * COUNT
    assert set(recipe.items().labels.tolist()) == {1}  # type: ignore[union-attr]
    pairs.target_transform = lambda label: label
    assert recipe.items().labels.tolist() == [n % 4 for n in range(COUNT)]  # type: ignore[union-attr]


def test_other_labels_are_another_data_set(tmp_path: Path) -> None:
    """Which images are held out follows from them: kept images would stand beside others' labels."""
    pixels = np.random.default_rng(0).integers(0, 256, (80, 8, 8, 3), dtype=np.uint8)

    def recipe(name: str, moved: int) -> TorchDataset:
        labelled = [(image, (n + moved * (n >= 40)) % 4) for n, image in enumerate(pixels)]
        return TorchDataset(dataset=labelled, name=name, size=8, labels=True, holdout=0.25)

    list(recipe("pairs", 0).prepare(tmp_path / "run"))
    before = recipe("pairs", 0).load()
    evaluators.kept._LOADED.clear()
    list(recipe("pairs", 1).prepare(tmp_path / "run"))
    after, alone = recipe("pairs", 1).load(), recipe("alone", 1).load()
    assert after.digest != before.digest
    assert np.array_equal(after.pixels, alone.pixels)
    assert after.labels is not None
    assert alone.labels is not None
    assert after.labels.tolist() == alone.labels.tolist()


def test_of_two_data_sets_of_one_name_each_is_itself(tmp_path: Path) -> None:
    """In one process, as in a notebook, where what was read last is at hand."""
    pixels = np.random.default_rng(0).integers(0, 256, (40, 8, 8, 3), dtype=np.uint8)
    small, whole = (TorchDataset(dataset=list(pixels[:count]), name="mine", size=8) for count in (20, 40))
    for recipe, count in ((small, 20), (whole, 40)):
        list(recipe.prepare(tmp_path / f"{count}"))
        assert len(recipe.load()) == len(load_once(recipe)) == count


def test_a_source_of_somebodys_own_may_hold_its_images_as_it_likes() -> None:
    class Own:
        images = np.zeros((20, 1, 8, 8), np.float32)

        def load(self) -> ImageSet:
            return checked(self.images, None, "mine")

    assert len(load_once(Own())) == 20


def test_what_is_read_anew_for_another_run_is_what_scores_look_at(folder: Path, tmp_path: Path) -> None:
    for number in range(48):
        Image.fromarray(np.full((8, 8, 3), number, np.uint8)).save(folder / f"further {number}.png")
    recipe = ImageFolder(str(folder), size=8)
    halves = HeldOutHalf(replace(recipe, holdout=0.5), "first")
    for part in ("one", "two"):
        for images in (recipe, halves):
            list(images.prepare(tmp_path / part))
            assert load_once(images).digest == images.load().digest
        Image.fromarray(np.full((8, 8, 3), 7, np.uint8)).save(folder / "one more.png")


@pytest.mark.parametrize("form", ["picture", "bytes", "channels first", "floats"])
def test_a_torch_data_set_holds_the_folders_images(form: str, folder: Path, tmp_path: Path) -> None:
    expected = ImageFolder(str(folder), 8).load()
    recipe = TorchDataset(dataset=Pairs(folder, form), name="pairs", size=8, labels=True)
    list(recipe.prepare(tmp_path / "run"))
    loaded = recipe.load()
    assert np.abs(loaded.pixels - expected.pixels).max() <= np.finfo(np.float32).eps  # of one division or two
    assert loaded.labels is not None
    assert loaded.labels.tolist() == [n % 4 for n in range(COUNT)]
    evaluators.kept._LOADED.clear()
    assert isinstance(recipe.load().pixels, np.memmap)
    grey = TorchDataset(dataset=Pairs(folder, form), name="grey", size=8, channels=1)
    if form == "floats":
        with pytest.raises(UserError, match=r"item 0 has the shape \(3, 8, 8\), wanted is \(1, 8, 8\)"):
            grey.load()
    else:
        assert np.array_equal(grey.load().pixels, ImageFolder(str(folder), 8, channels=1).load().pixels)


def test_a_study_looks_at_a_few_images_before_all_are_read(folder: Path) -> None:
    class Counted(torch.utils.data.Dataset[Any]):
        def __init__(self) -> None:
            self.files, self.read = sorted(folder.glob("*.png")) * 4, 0

        def __len__(self) -> int:
            return len(self.files)

        def __getitem__(self, place: int) -> Any:
            self.read += 1
            return Image.open(self.files[place])

    items = Counted()
    images = TorchDataset(dataset=items, name="counted", size=8)
    before = items.read
    found = images.peek()
    assert len(found.pixels) < items.read - before + 1 < 4 * COUNT / 2
    assert np.array_equal(found.pixels, images.load().pixels[: len(found.pixels)])


def test_what_is_no_data_set_of_images_is_refused(folder: Path, tmp_path: Path) -> None:
    datasets.DatasetDict({"train": table(folder)}).save_to_disk(str(tmp_path / "data"))
    (tmp_path / "empty").mkdir()

    def saved(**given: Any) -> Any:
        return lambda: DatasetFolder(**{"path": str(tmp_path / "data"), "size": 8, **given}).load()

    def listed(items: Any, **given: Any) -> Any:
        return lambda: TorchDataset(**{"dataset": items, "name": "mine", "size": 8, **given}).load()

    floats = [np.full((3, 8, 8), 2.0)] * COUNT
    for make, words in (
        (saved(path=str(tmp_path / "none")), "does not exist"),
        (saved(path=str(tmp_path / "empty")), "cannot be read as a data set"),
        (saved(split="validation"), "has the splits train, not 'validation'"),
        (saved(label="class"), "has the columns image, kind, words, not 'class'"),
        (saved(image="kind"), "holds no images"),
        (saved(label="words"), "labels must be whole numbers"),
        (saved(size=9), "is 8x8 pixels, not 9x9"),
        (saved(held_out="train", holdout=0.2), "both hold images out"),
        (listed(iter(floats)), "has no length"),
        (listed(floats), "goes from 2 to 2"),
        (listed([np.zeros((8, 8, 2), np.uint8)] * COUNT), "one axis must be of 1 or 3"),
        (listed([np.zeros((8, 8), np.int64)] * COUNT), "is int64 of shape"),
        (listed(floats, labels=True), "has no label"),
        (listed([(np.zeros((3, 8, 8)), -1)] * COUNT, labels=True), "has the label -1"),
    ):
        with pytest.raises(UserError, match=words):
            make()


class Many(KeptImages):
    """32 MiB of images, a MiB at a time."""

    def source(self) -> Source:
        return Source("many", (32, 4, 256, 256), None, 16, self._parts, "many", "many images")

    def _parts(self, places: Sequence[int]) -> Any:
        for place in places:
            yield np.full((1, 4, 256, 256), place / 32, np.float32)


def test_more_images_than_memory_holds_are_read(tmp_path: Path) -> None:
    images = Many()
    tracemalloc.start()
    list(images.prepare(tmp_path))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 8 * 2**20
    loaded = images.load()
    assert loaded.pixels[5, 0, 0, 0] == np.float32(5 / 32)
    assert loaded.reference.pixels[15, 3, 255, 255] == np.float32(31 / 32)
    assert not list((tmp_path / "images").glob("*.partial"))


def test_a_look_from_all_over_reads_what_it_shows_alone() -> None:
    tracemalloc.start()
    found = Many().some(3)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 16 * 2**20
    assert found.held_out is not None
    assert (found.pixels[:, 0, 0, 0] * 32).tolist() == [0, 8, 15]
    assert (found.held_out.pixels[:, 0, 0, 0] * 32).tolist() == [16, 24, 31]


def test_the_last_class_is_among_the_few(folder: Path) -> None:
    found = TorchDataset(dataset=Pairs(folder, "picture"), name="pairs", size=8, labels=True).some(2)
    assert found.labels is not None
    assert found.labels.tolist() == [0, 3]


def test_what_another_process_writes_at_the_moment_stays(tmp_path: Path) -> None:
    mine = tmp_path / "images.npy"
    alive, killed = (tmp_path / f"images.{process}.partial" for process in (os.getppid(), 2**22 + 1))
    for path in (alive, killed):
        path.touch()
    with partial_of(mine) as partial:
        partial.touch()
        assert {*tmp_path.iterdir()} == {alive, partial}
    assert [*tmp_path.iterdir()] == [alive]


def test_images_that_are_never_read_alike_are_kept_as_they_come_first(folder: Path, tmp_path: Path) -> None:
    class Flipped(Pairs):
        def __getitem__(self, place: int) -> Any:
            image, label = super().__getitem__(place)
            return (image[:, ::-1].copy() if random.random() < 0.5 else image), label

    recipe = TorchDataset(dataset=Flipped(folder, "bytes"), name="flipped", size=8)
    list(recipe.prepare(tmp_path))
    first = recipe.load()
    for _ in range(3):
        evaluators.kept._LOADED.clear()
        again = recipe.load()
        assert again.digest == first.digest
        assert np.array_equal(again.pixels, first.pixels)
    [kept] = (tmp_path / "images").glob("*.npy")
    kept.unlink()  # by hand, and what is known of it is left
    evaluators.kept._LOADED.clear()
    assert len(recipe.load()) == COUNT


def test_a_share_of_less_than_an_image_of_any_class_is_refused(folder: Path) -> None:
    recipe = TorchDataset(dataset=Pairs(folder, "picture"), name="pairs", size=8, labels=True, holdout=0.05)
    with pytest.raises(UserError, match=r"holdout=0\.05 rounds to no image of any class, of 20 images in all"):
        recipe.load()


@pytest.mark.parametrize("odd", [None, "", ["a bag", "a boot"]])
def test_a_caption_is_a_text_for_each_image(odd: Any, folder: Path, tmp_path: Path) -> None:
    words = [["a coat"] if isinstance(odd, list) else "a coat"] * (COUNT - 1) + [odd]
    table(folder).remove_columns("words").add_column("words", words).save_to_disk(str(tmp_path / "data"))
    with pytest.raises(UserError, match=r"column 'words' of .* holds .*; a caption is a text"):
        DatasetFolder(path=str(tmp_path / "data"), size=8, caption="words").load()


@pytest.mark.parametrize("error", [OSError("image file is truncated"), EOFError(), KeyError("pixels")])
def test_an_item_that_cannot_be_read_is_named(error: Exception) -> None:
    class Damaged(torch.utils.data.Dataset[Any]):
        def __len__(self) -> int:
            return 4

        def __getitem__(self, place: int) -> Any:
            if place == 2:
                raise error
            return np.zeros((8, 8, 3), np.uint8), 0

    for labels in (False, True):
        with pytest.raises(UserError, match=rf"item 2 of mine cannot be read \({type(error).__name__}"):
            TorchDataset(dataset=Damaged(), name="mine", size=8, labels=labels).load()


@pytest.mark.parametrize(
    "item", [{"image": np.zeros((8, 8, 3), np.uint8), "label": 1}, (np.zeros((8, 8, 3), np.uint8), torch.ones(3))]
)
def test_an_item_without_the_number_of_its_class_is_named(item: Any) -> None:
    with pytest.raises(UserError, match="item 0 of mine has no label"):
        TorchDataset(dataset=[item] * 20, name="mine", size=8, labels=True).load()


def test_tensors_of_every_kind_are_images() -> None:
    """Half of the usual precision, and with a gradient."""
    of = lambda tensor: TorchDataset(dataset=[tensor] * 20, name="mine", size=8).load().pixels  # noqa: E731
    plain = torch.linspace(0, 1, 3 * 64).reshape(3, 8, 8).bfloat16()
    assert np.array_equal(of(plain), of(plain.float()))
    assert np.array_equal(of(plain.float().requires_grad_()), of(plain.float()))
