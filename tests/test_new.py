"""A study file for one's own pictures, from a command; and what ships."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits
from typer.testing import CliRunner

from nas.cli import app
from nas.contracts import UserError
from nas.library import open_run
from nas.study import Study, load_study
from search_spaces.supernet import Elastic
from tests.conftest import TINY


@pytest.fixture
def pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Digits in folders of their classes; the working folder is the one beside them."""
    digits = load_digits()
    for number in range(300):
        folder = tmp_path / "pictures" / str(digits.target[number])
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray((digits.images[number] * 15.9).astype(np.uint8)).save(folder / f"{number}.png")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "pictures"


def made(*options: object) -> Study:
    done = CliRunner().invoke(app, ["new", "mine", *map(str, options)])
    assert done.exit_code == 0, done.exception
    return load_study("mine.py")


def test_the_file_is_of_the_pictures_as_they_are(pictures: Path) -> None:
    study = made("--images", pictures)
    assert isinstance(study.supernet, Elastic)
    assert study.supernet.image_shape == (1, 8, 8)
    assert study.images.load().held_out is not None
    assert not study.supernet.conditional


@pytest.mark.long
def test_it_is_searched_to_its_end_once_its_numbers_are_small(pictures: Path) -> None:
    made("--images", pictures, "--labels")
    text = Path("mine.py").read_text()
    for pattern, small in (
        (r"steps=6000", "steps=10, batch=8, warmup=2"),
        (r"SmallClassifier\(\)", "SmallClassifier(steps=10)"),
        (r"uniform\(20\)", "uniform(5)"),
        (r"rungs=\(256, 1024\)", "rungs=(16, 32)"),
        (r"trials=60,\n    verified=10", "trials=8,\n    verified=2"),
    ):
        text, count = re.subn(pattern, small, text)
        assert count == 1, pattern
    Path("mine.py").write_text(text)
    run = open_run("mine.py")
    run.search("evolution", "random")
    assert len(run.front())
    assert (run.trials("evolution")["macs_share"] <= 0.5).all()


def test_large_pictures_of_classes_are_drawn_as_latents(pictures: Path) -> None:
    study = made("--images", pictures, "--labels", "--size", 64)
    assert isinstance(study.supernet, Elastic)
    assert study.supernet.image_shape == (1, 64, 64)
    assert not study.supernet.in_pixels
    assert study.supernet.condition_kind == "labels"


def test_pictures_of_one_size_that_is_large_are_resized(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pictures").mkdir()
    for number in range(70):
        picture = np.random.default_rng(number).integers(0, 255, (320, 320, 3), dtype=np.uint8)
        Image.fromarray(picture).save(tmp_path / "pictures" / f"{number}.png")
    study = made("--images", tmp_path / "pictures")
    assert isinstance(study.supernet, Elastic)
    assert study.supernet.image_shape == (3, 64, 64)
    images = study.images.load()
    assert images.pixels.shape[1:] == (3, 64, 64)
    assert images.held_out is not None
    assert len(images.held_out) // 2 >= 16  # a half each for the search and the last judgement
    for number in range(50):
        (tmp_path / "pictures" / f"{number}.png").unlink()
    Path("mine.py").unlink()
    done = CliRunner().invoke(app, ["new", "mine", "--images", "pictures"])
    assert "20 pictures are too few: of the 10 that are held out" in str(done.exception)
    assert not Path("mine.py").exists()


def test_a_pipelines_network_is_searched(pictures: Path, tmp_path: Path) -> None:
    from diffusers import DDIMPipeline, DDIMScheduler

    network = Elastic(TINY, widths=(1.0,)).initial(0)
    pipeline = DDIMPipeline(network.extract(network.full_arch), DDIMScheduler())
    pipeline.save_pretrained(tmp_path / "pipe")
    study = made("--images", pictures, "--pipeline", tmp_path / "pipe")
    assert isinstance(study.supernet, Elastic)
    assert study.supernet.image_shape == (1, 8, 8)
    assert study.supernet.widths == (0.5, 0.75, 1.0)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("mine", "--images", "nowhere"), "no folder"),
        (("a b", "--images", "pictures"), "no name of a study"),
        (("mine", "--images", "pictures", "--size", "30"), "a multiple of 4"),
        (("mine", "--images", "pictures/0", "--labels"), "0 folders right below"),
        (("mine", "--images", "pictures", "--pipeline", "nowhere"), "nowhere"),
    ],
)
def test_what_cannot_be_is_refused_and_nothing_is_left(pictures: Path, options: tuple[str, ...], words: str) -> None:
    done = CliRunner().invoke(app, ["new", *options])
    assert done.exit_code == 1
    assert isinstance(done.exception, UserError)
    assert words in str(done.exception)
    assert not Path("mine.py").exists()


@pytest.mark.parametrize("name", ['x"""; raise SystemExit(3); """y', "back\\slash", "camera \U0001f4f7", "tab\tbed"])
def test_a_folders_name_is_no_code(name: str, pictures: Path) -> None:
    pictures.rename(pictures.with_name(name))
    study = made("--images", pictures.with_name(name))
    assert len(study.images.load())


def test_what_is_there_is_not_written_over(pictures: Path) -> None:
    Path("mine.py").write_text("kept")
    done = CliRunner().invoke(app, ["new", "mine", "--images", str(pictures)])
    assert "exists" in str(done.exception)
    assert Path("mine.py").read_text() == "kept"


def test_the_studies_that_ship_are_listed_with_what_they_are() -> None:
    done = CliRunner().invoke(app, ["studies"])
    assert done.exit_code == 0
    for path in (Path(__file__).parent.parent / "studies").glob("[a-z]*.py"):
        assert path.name in done.stdout


def test_the_version_is_the_packages() -> None:
    from importlib.metadata import version

    assert CliRunner().invoke(app, ["--version"]).stdout.strip() == version("step-aware-nas")
