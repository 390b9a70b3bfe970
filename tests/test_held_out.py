"""Images on which nothing is trained: every source has them, and samples are compared with them alone."""

from __future__ import annotations

import gzip
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import evaluators.kept
from evaluators.agreement import Agreement
from evaluators.conditions import Labels
from evaluators.fashion import FashionMNIST
from evaluators.features import SmallClassifier
from evaluators.frechet import Frechet, Gaussian, Moments
from evaluators.grounds import nearer_than_held_out, nearest
from evaluators.images import Digits, ImageArray, ImageFolder, PhotoPatches, load_once
from nas.contracts import ImageSet, Schedule, Step, UserError
from nas.library import open_run
from nas.results.trials import far_words
from nas.study import Study
from search_spaces.supernet import Elastic
from tests.test_images import folder_of


def array(path: Path) -> str:
    pixels = np.random.default_rng(0).integers(0, 256, (100, 8, 8), dtype=np.uint8)
    np.savez(path / "x.npz", images=pixels, labels=np.arange(100) % 5)
    return str(path / "x.npz")


def rows(images: ImageSet) -> set[bytes]:
    return {image.tobytes() for image in images.pixels}


@pytest.mark.parametrize("kind", ["digits", "folder", "array"])
def test_every_source_holds_out_a_share_of_each_class(kind: str, tmp_path: Path) -> None:
    make: Any = {
        "digits": lambda share: Digits(holdout=share),
        "folder": lambda share: ImageFolder(
            str(folder_of(tmp_path / "f", count=100, classes=4)), 8, labels="folders", holdout=share
        ),
        "array": lambda share: ImageArray(array(tmp_path), holdout=share),
    }[kind]
    whole, parted = make(0.0).load(), make(0.2).load()
    assert whole.held_out is None
    assert whole.reference is whole
    held_out = parted.held_out
    assert parted.reference is held_out
    assert not rows(parted) & rows(held_out)
    assert rows(parted) | rows(held_out) == rows(whole)
    by_class, all_of_it = np.bincount(held_out.labels), np.bincount(whole.labels)
    assert (by_class == np.round(0.2 * all_of_it)).all()
    assert make(0.2).load().digest == parted.digest
    assert len({parted.digest, whole.digest, make(0.3).load().digest}) == 3
    for images in (parted, held_out):
        where = {image.tobytes(): label for image, label in zip(whole.pixels, whole.labels, strict=True)}
        assert all(where[i.tobytes()] == label for i, label in zip(images.pixels, images.labels, strict=True))


def test_patches_to_train_on_and_held_out_ones_share_no_pixel() -> None:
    """Patches overlap, so a share of them would not do: a strip of each photograph is held out."""
    images = PhotoPatches(count=200, size=16, holdout=0.3).load()
    assert (len(images), len(images.reference)) == (140, 60)
    columns = [
        {column.tobytes() for patch in part.pixels for column in np.moveaxis(patch, 2, 0)}
        for part in (images, images.reference)
    ]
    assert not columns[0] & columns[1]
    with pytest.raises(UserError, match="narrower than patches of 100 pixels"):
        PhotoPatches(count=200, size=100, holdout=0.1).load()


def test_a_kept_folder_comes_back_with_the_same_images_held_out(tmp_path: Path) -> None:
    recipe = ImageFolder(str(folder_of(tmp_path / "f", count=100)), 8, holdout=0.3)
    list(recipe.prepare(tmp_path / "run"))
    made = recipe.load()
    evaluators.kept._LOADED.clear()
    again = recipe.load()
    assert again is not made
    assert isinstance(again.reference.pixels.base, np.memmap)
    assert (again.digest, again.reference.digest) == (made.digest, made.reference.digest)
    assert np.array_equal(again.reference.pixels, made.reference.pixels)


def test_images_that_were_looked_at_before_there_was_a_run_folder_are_kept_in_it(tmp_path: Path) -> None:
    recipe = FashionMNIST(folder=str(fashion_files(tmp_path / "fashion")))
    made = recipe.load()
    assert [tick.done for tick in recipe.prepare(tmp_path / "run")][-1] == 80
    assert len(list((tmp_path / "run" / "images").iterdir())) == 2
    assert list(recipe.prepare(tmp_path / "run")) == []
    evaluators.kept._LOADED.clear()
    again = recipe.load()
    assert isinstance(again.pixels.base, np.memmap)
    assert again.digest == made.digest


def test_samples_are_compared_with_held_out_images_and_the_label_says_so(tiny_net: Elastic, tmp_path: Path) -> None:
    images = Digits(holdout=0.2)
    frechet = Frechet(images, SmallClassifier(steps=20), rungs=(64,))
    list(frechet.prepare(tmp_path, 0, "cpu"))
    net = tiny_net.initial(seed=0)
    loaded = frechet.load(net, tmp_path)
    schedule = Schedule((Step(900, net.full_arch), Step(100, net.full_arch)))
    score = loaded(schedule, 64, 0)
    assert "@64 to 359 held-out images" in score.labels["fd"]
    features = frechet.features.load(tmp_path, torch.device("cpu"))
    held_out = images.load().reference
    expected = _gaussian(features(torch.from_numpy(held_out.pixels)).numpy())
    samples = _gaussian(features(loaded.sample(schedule, 64, 0)).numpy())
    assert score.values["fd"] == pytest.approx(expected.distance(samples), rel=1e-6)


def _gaussian(features: Any) -> Gaussian:
    return Moments.of(features).gaussian()


def test_a_judge_says_how_much_of_the_held_out_images_it_gets_right(tmp_path: Path) -> None:
    images = Digits(holdout=0.2)
    judge = Agreement(images, SmallClassifier(steps=150), rungs=(64,), conditions=Labels(images))
    ticks = list(judge.prepare(tmp_path, 0, "cpu"))
    told = judge.judge.held_out_accuracy(tmp_path)
    assert told is not None
    classify, held_out = judge.judge.classifier(tmp_path, torch.device("cpu")), load_once(images).reference
    assert held_out.labels is not None
    seen = classify(torch.from_numpy(held_out.pixels)).argmax(1).numpy()
    assert told == pytest.approx((seen == held_out.labels).mean(), abs=1e-4)
    assert ticks[-1].values["held_out_accuracy"] == pytest.approx(told, abs=1e-4)
    assert told > 0.8


# ---------------------------------------------------------------------------------------------------------- Fashion-MNIST


def write_idx(path: Path, values: Any, packed: bool = False) -> None:
    content = bytes([0, 0, 8, values.ndim]) + np.array(values.shape, ">u4").tobytes() + values.tobytes()
    path = path.with_name(path.name + ".gz") if packed else path
    path.write_bytes(gzip.compress(content) if packed else content)


def fashion_files(folder: Path, packed: bool = False) -> Path:
    folder.mkdir(exist_ok=True)
    rng = np.random.default_rng(0)
    for part, count in (("train", 60), ("t10k", 20)):
        write_idx(folder / f"{part}-images-idx3-ubyte", rng.integers(0, 256, (count, 28, 28), dtype=np.uint8), packed)
        write_idx(folder / f"{part}-labels-idx1-ubyte", (np.arange(count) % 10).astype(np.uint8), packed)
    return folder


@pytest.mark.parametrize("packed", [False, True])
def test_fashion_mnist_is_read_from_its_four_files(packed: bool, tmp_path: Path) -> None:
    folder = fashion_files(tmp_path / "fashion", packed)
    images = FashionMNIST(folder=str(folder)).load()
    plain = FashionMNIST(size=28, folder=str(folder)).load()
    assert images.pixels.shape == (60, 1, 32, 32)
    assert images.reference.pixels.shape == (20, 1, 32, 32)
    assert np.array_equal(images.pixels[..., 2:30, 2:30], plain.pixels)
    assert (images.pixels[..., :2, :] == -1).all()
    expected = np.random.default_rng(0).integers(0, 256, (60, 28, 28), dtype=np.uint8)
    assert np.allclose(plain.pixels[:, 0], expected / 127.5 - 1, atol=1e-6)
    assert images.labels is not None
    assert images.labels.tolist() == [i % 10 for i in range(60)]
    assert len(FashionMNIST(folder=str(folder), count=16).load().reference) == 16


def test_fashion_mnist_of_this_machine_is_the_real_one() -> None:
    try:
        images = FashionMNIST().load()
    except UserError as error:
        pytest.skip(str(error))
    assert images.pixels.shape == (60_000, 1, 32, 32)
    assert images.labels is not None
    assert np.bincount(images.labels).tolist() == [6000] * 10
    assert images.reference.pixels.shape == (10_000, 1, 32, 32)
    # Mean and deviation of the train images in [0, 1], as they are published: 0.2860 and 0.3530.
    inside = (images.pixels[..., 2:30, 2:30].astype(np.float64) + 1) / 2
    assert inside.mean() == pytest.approx(0.2860, abs=1e-4)
    assert inside.std() == pytest.approx(0.3530, abs=1e-4)


def test_what_is_not_fashion_mnist_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nowhere is no folder; `apt-get install dataset-fashion-mnist`"):
        FashionMNIST(folder=str(tmp_path / "nowhere")).load()
    folder = fashion_files(tmp_path / "fashion")
    labels = folder / "t10k-labels-idx1-ubyte"
    whole = labels.read_bytes()
    for content, words in (
        (whole[:-1], "is no IDX file of bytes in 1 dimensions, or not all of it"),
        (b"\0\0\x0b\x01" + whole[4:], "is no IDX file"),
        (b"", "is no IDX file"),
        (whole[:-1] + b"\x0b", "20 labels up to 11"),
    ):
        labels.write_bytes(content)
        with pytest.raises(UserError, match=words):
            FashionMNIST(folder=str(folder)).load()
    labels.unlink()
    with pytest.raises(UserError, match="lacks t10k-labels-idx1-ubyte"):
        FashionMNIST(folder=str(folder)).load()
    labels.with_name(labels.name + ".gz").write_bytes(b"\x1f\x8bnothing")
    with pytest.raises(UserError, match=r"\.gz cannot be read"):
        FashionMNIST(folder=str(folder)).load()


# ------------------------------------------------------------------------------------------------ what a distance stands on


def test_the_nearest_neighbour_is_scipys() -> None:
    from scipy.spatial import cKDTree

    rng = np.random.default_rng(0)
    rows, among = rng.normal(size=(300, 5)) + 100, rng.normal(size=(700, 5)) + 100
    rows[:50] = among[:50]
    expected, _ = cKDTree(among).query(rows)
    assert np.allclose(nearest(rows, among), expected, atol=1e-9)
    assert (nearest(rows, among)[:50] == 0).all()


def test_samples_learned_by_heart_are_nearer_to_train_images_than_new_ones_are() -> None:
    rng = np.random.default_rng(0)
    train, held_out, new = (rng.normal(size=(count, 4)) for count in (2000, 1000, 1000))
    fresh = nearer_than_held_out(new, train, held_out)
    assert fresh[0.5] == pytest.approx(0.5, abs=0.06)
    assert fresh[0.01] == pytest.approx(0.01, abs=0.015)
    # Of few held-out images too: the mean over draws, whose own spread is about 0.05 / sqrt(300).
    few = []
    for _ in range(300):
        some, known, apart = (rng.normal(size=(count, 4)) for count in (200, 100, 40))
        few.append(nearer_than_held_out(some, known, apart, (0.1, 0.01)))
    assert np.mean([shares[0.1] for shares in few]) == pytest.approx(0.1, abs=0.01)
    assert all(0.01 not in shares for shares in few), "one in 41 is the least that 40 can tell"
    copied = np.concatenate([train[:300] + 1e-6, new[:700]])
    shares = nearer_than_held_out(copied, train, held_out)
    assert shares[0.01] == pytest.approx(0.3 + 0.7 * fresh[0.01], abs=0.02)


def test_a_distance_says_what_it_stands_on(tiny_net: Elastic, tmp_path: Path) -> None:
    images = Digits(holdout=0.2)
    frechet = Frechet(images, SmallClassifier(steps=20), rungs=(64,))
    list(frechet.prepare(tmp_path, 0, "cpu"))
    net = tiny_net.initial(0)
    schedule = Schedule((Step(900, net.full_arch), Step(100, net.full_arch)))
    told = frechet.load(net, tmp_path).grounds(schedule, 64, 0)  # type: ignore[attr-defined]
    features = frechet.features.load(tmp_path, torch.device("cpu"))
    train, held_out = (
        _gaussian(features(torch.from_numpy(part.pixels)).numpy()) for part in (images.load(), images.load().reference)
    )
    # Of as many as a schedule has samples, and fewer are farther.
    assert told["fd_of_train_images"] > held_out.distance(train)
    assert (told["train"], told["held_out"], told["samples"]) == (64, 359, 64)
    every = replace(frechet, rungs=(64, 5000)).load(net, tmp_path).grounds(schedule, 64, 0)  # type: ignore[attr-defined]
    assert every["fd_of_train_images"] == pytest.approx(held_out.distance(train), rel=1e-5)
    assert every["train"] == 1438
    assert "fd_of_reconstructions" not in told
    # Of a file of statistics, all distances are to these.
    near = Moments.of(features(torch.from_numpy(images.load().pixels)).numpy()).gaussian()
    np.savez(tmp_path / "stats.npz", mu=near.mean, sigma=near.covariance)
    against = replace(frechet, reference=str(tmp_path / "stats.npz"), rungs=(64, 5000))
    filed = against.load(net, tmp_path).grounds(schedule, 64, 0)  # type: ignore[attr-defined]
    assert filed["fd_of_train_images"] == pytest.approx(0, abs=1e-4)
    assert filed["reference"].endswith("stats.npz")
    whole = replace(frechet, images=Digits())
    list(whole.prepare(tmp_path / "whole", 0, "cpu"))
    assert whole.load(net, tmp_path / "whole").grounds(schedule, 64, 0) is None  # type: ignore[attr-defined]


@pytest.mark.parametrize(("full", "poor"), [(0.9, False), (3.9, False), (4.1, True)])
def test_a_network_that_is_far_from_real_images_is_called_poor(full: float, poor: bool, tmp_path: Path) -> None:
    assert ("draws poorly" in far_words(full, 1.0)) is poor


@pytest.mark.long
def test_a_report_says_how_far_the_full_network_is_and_a_comparison_too(tmp_path: Path, tiny_study: Study) -> None:
    images = Digits(holdout=0.3)
    study = replace(tiny_study, images=images, evaluator=Frechet(images, rungs=(32, 256)))
    run = open_run(study, tmp_path / "run")
    run.search("evolution", trials=6, threads=1)
    assert run.compare()["grounds"] is None
    run.look_at_grounds()
    grounds = run.compare()["grounds"]
    run.report()
    assert run.compare()["grounds"] == grounds
    floor = run.loaded.grounds(study.space.decode((0,) * 4), 64, 0)["fd_of_train_images"]  # type: ignore[attr-defined]
    assert grounds["floor"] == pytest.approx(floor)
    [full] = run.trials("uniform").query("status == 'complete' and macs_share == 1")["fd"]
    assert grounds["full"] == full
    # Forty steps of training do not make a network that draws digits.
    assert "draws poorly" in grounds["words"]
    assert "times as far as real images" in (run.folder / "report" / "index.html").read_text()
