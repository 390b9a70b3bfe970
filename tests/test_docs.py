"""What README and the pages of the documentation show, run as it is written, on the digits study made small; the notebooks; the wheel."""

from __future__ import annotations

import importlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
import urllib.request
import zipfile
from collections import Counter
from collections.abc import Mapping, Sequence
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, LDMPipeline
from safetensors.torch import save_file

from evaluators.clip import ClipScore
from evaluators.conditions import Captions, Labels, Prompts
from evaluators.frechet import Frechet
from evaluators.images import Digits, ImageFolder
from evaluators.latency import Latency, Timed
from nas.contracts import Guidance
from nas.results import forecast
from nas.searchers.evolution import Evolution
from nas.searchers.gates import Gates
from nas.searchers.pruner import Pruner
from nas.searchers.router import Router
from nas.study import Study
from nas.testing import check_evaluator, check_supernet
from search_spaces.branches import Branches
from search_spaces.codec import Autoencoder
from search_spaces.intervals import equal, leading, per_step, uniform
from search_spaces.layouts import learning_to_cache
from search_spaces.options import Options
from search_spaces.patterns import Every, legal
from search_spaces.shipped.graph import AROUND
from search_spaces.stepwise import Stepwise
from search_spaces.supernet import Elastic
from search_spaces.training import Sandwich, TrainAutoencoder
from studies import digits, digits_classes, digits_reuse, digits_wide, fashion_latent
from tests.pipelines import dit, stable_diffusion
from tests.test_cli import nas
from tests.test_images import folder_of

ROOT = Path(__file__).parent.parent
PAGES = {path.name: path.read_text() for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))}
NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))
SMALLER = {
    r"Sandwich\(steps=1500\)": "Sandwich(steps=30, batch=16)",
    r"rungs=\(512, 2048\)": "rungs=(32, 64)",
    r"rungs=\(\d+,\)": "rungs=(32,)",
    r"trials=60": "trials=6",
    r"(linspace|uniform)\(10": r"\1(4",
    r"verified=10": "verified=3",
    r"proxies=\{.*?\n    \}": 'proxies={"fd@16": Frechet(images, rungs=(16,))}',
}


def blocks(page: str, language: str = "python") -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGES[page], re.S)


def commands(page: str) -> list[str]:
    return [line.partition("#")[0].strip() for block in blocks(page, "sh") for line in block.splitlines()]


def smaller(study: str, *kept: str) -> str:
    for pattern, small in SMALLER.items():
        study, count = re.subn(pattern, small, study, flags=re.S)
        assert count or pattern in kept, f"{pattern} is no longer in the study"
    return study


def environment() -> dict[str, str]:
    bin_folder = str(Path(sys.executable).parent)
    return {**os.environ, "PYTHONPATH": str(ROOT), "PATH": f"{bin_folder}{os.pathsep}{os.environ['PATH']}"}


def typed(command: str, further: Sequence[str] = ()) -> None:
    """In the present folder; the project's own commands in this process, which has imported what they need."""
    name, *given = [*shlex.split(command), *further]
    if name == "nas":
        told = nas(*given)
        assert told.returncode == 0, f"{command}\n{told.stderr}"
    else:
        done = subprocess.run([name, *given], env=environment(), capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{command}\n{done.stderr}"


# ------------------------------------------------------------------------------------------------- what can be read alone


def test_what_is_shown_is_run_here() -> None:
    """A page that shows code for the first time fails here until a test runs it."""
    shown = Counter({page: len(blocks(page)) for page in PAGES if blocks(page)})
    assert shown == Counter(
        {
            "README.md": 1,
            "quick-start.md": 1,
            "networks.md": 6,
            "searching.md": 2,
            "tune.md": 1,
            "hand-over.md": 1,
            "bring-your-own.md": 5,
        }
    )
    with_commands = {page for page in PAGES if blocks(page, "sh")}
    assert with_commands == {"README.md", "quick-start.md", "searching.md", "compare.md", "hand-over.md", "tune.md"}


def test_the_quick_start_shows_the_study_of_the_readme() -> None:
    assert blocks("README.md") == blocks("quick-start.md")


def test_the_table_of_searchers_names_what_is_registered() -> None:
    named = {
        name
        for row in re.findall(r"^\| (`.*?) \|", PAGES["searchers.md"], re.M)
        for name in re.findall(r"`(\w+)`", row)
    }
    assert named | {"uniform"} == {point.name for point in entry_points(group="nas.searchers")} | {"uniform"}


def test_files_that_are_named_exist() -> None:
    built = PAGES["how-it-works.md"].partition("```\n\n")[0]
    folder = ""
    for line in built.splitlines():
        if found := re.match(r"(\w+)/ ", line):
            folder = found.group(1)
        if found := re.match(r"  (\w+)/ ", line):
            assert (ROOT / folder / found.group(1)).is_dir(), f"{folder}/{found.group(1)}"
        for name in re.findall(r"[\w/]+\.py\b", line) if folder else ():
            assert (ROOT / folder / name).exists(), f"{folder}/{name}"
    for page, text in PAGES.items():
        place = ROOT if page == "README.md" else ROOT / "docs"
        for name in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text):
            assert (place / name).exists(), f"{page}: {name}"


def test_published_settings_that_are_named_ship() -> None:
    named = re.findall(r"`(\w+)`", PAGES["searching.md"].partition("## Published settings")[2])
    own = {"digits", "digits_classes", "digits_reuse", "digits_wide", "fashion_latent", "__init__"}
    assert {*named} == {path.stem for path in (ROOT / "studies").glob("*.py")} - own


# --------------------------------------------------------------------------------------------------- parts that are shown

SAME = "".join(
    f"    {name}=study.{name},\n" for name in ("name", "space", "supernet", "images", "training", "searchers")
)


def test_the_spaces_shown_can_be_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    common: dict[str, Any] = {
        "Gates": Gates,
        "Evolution": Evolution,
        "Latency": Latency,
        "Timed": Timed,
        "Guidance": Guidance,
    }
    for module in ("intervals", "options", "patterns", "stepwise", "supernet", "training"):
        common |= vars(importlib.import_module(f"search_spaces.{module}"))
    digits_wide.net.initial(0).extract(digits_wide.net.uniform(1.0)).save_pretrained("model")
    wide, reuse, classes, *_ = blocks("networks.md")
    [timed] = [block for block in blocks("searching.md") if "Timed(" in block]
    for block, study in ((wide, digits_wide), (reuse, digits_reuse), (classes, digits_classes), (timed, digits)):
        exec(block.replace("    ...,\n", SAME), {**common, **vars(study)})


def test_the_codecs_shown_can_be_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    latent = {name: value for name, value in fashion_latent.UNET.items() if name != "num_class_embeds"}
    vae = AutoencoderKL(**{k: v for k, v in fashion_latent.codec.config.items() if k != "_class_name"})
    vae.save_pretrained("vae")
    unet = Elastic(latent, (1.0,)).initial(0).full
    LDMPipeline(vqvae=vae, unet=unet, scheduler=DDIMScheduler()).save_pretrained("pipeline")
    [shown] = [block for block in blocks("networks.md") if "codec=" in block]
    made: dict[str, Any] = {
        "Elastic": Elastic,
        "LATENT": latent,
        "TrainAutoencoder": TrainAutoencoder,
        "Autoencoder": Autoencoder,
    }
    exec(shown, made)
    assert made["net"].image_shape == (1, 32, 32)


def test_what_is_shown_of_texts_can_be_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a small pipeline of the folder's name, of Stable Diffusion's levels."""
    monkeypatch.chdir(tmp_path)
    levels = ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",), ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3
    config: dict[str, Any] = {
        "block_out_channels": (16, 32, 64, 64),
        "down_block_types": levels[0],
        "up_block_types": levels[1],
    }
    stable_diffusion(tmp_path / "sd15", layers_per_block=2, **config)
    save_file(
        {"unet.conv_in.lora_A.weight": torch.zeros(1, 4, 3, 3), "unet.conv_in.lora_B.weight": torch.zeros(16, 1, 1, 1)},
        "style.safetensors",
    )
    Path("prompts.txt").write_text("a bag\na coat\n")
    [shown] = [block for block in blocks("networks.md") if "Prompts(" in block]
    made: dict[str, Any] = {
        **{kind.__name__: kind for kind in (Elastic, Prompts, Captions, ImageFolder, Stepwise, ClipScore, Sandwich)},
        "leading": leading,
        "per_step": per_step,
        "legal": legal,
        "steps": leading(50, offset=1),
    }
    exec(shown, made)
    assert len(made["space"].choices) > 100
    assert made["net"].text is not None
    made["net"].initial(0)


def test_what_is_shown_of_transformers_can_be_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a small pipeline of the folder's name, of DiT-XL's blocks."""
    monkeypatch.chdir(tmp_path)
    dit(tmp_path / "dit", num_layers=28)
    save_file({f"{number}.prob": torch.randn(56) for number in range(20)}, "router.safetensors")
    [shown] = [block for block in blocks("networks.md") if "Branches(" in block]
    kinds = (Elastic, Branches, Stepwise, Options, Every, Gates, Router, Pruner, Frechet, Labels)
    made: dict[str, Any] = {
        **{kind.__name__: kind for kind in kinds},
        "AROUND": AROUND,
        "equal": equal,
        "learning_to_cache": learning_to_cache,
        "steps": uniform(20),
        "images": Digits(),
    }
    exec(shown, made)
    assert len(made["frozen"].choices) == 19 * 56
    assert len(made["released"]) == 10 * 56
    assert len(made["pairs"].choices) == 1
    assert len(made["space"].choices) == 15


def test_own_parts_keep_the_laws(
    tiny_study: Study, tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pasted into a file, as a user would: the images, the searcher with its check, the evaluator."""
    monkeypatch.chdir(tmp_path)
    folder_of(tmp_path / "pictures", count=160, size=32, classes=2)
    (tmp_path / "own_parts.py").write_text("\n".join(blocks("bring-your-own.md")))
    assert all(len(block.splitlines()) <= 40 for block in blocks("bring-your-own.md"))
    monkeypatch.syspath_prepend(str(tmp_path))
    own = importlib.import_module("own_parts")  # which checks the searcher
    assert own.images.load().pixels.shape[1:] == (3, 32, 32)
    unsure = own.Unsure(tiny_study.images, rungs=(16, 32))
    check_evaluator(unsure, tiny_study.supernet, tiny_study.space, tiny_run)
    check_supernet(own.mixer.initial(0), Stepwise(own.mixer, uniform(4), (2, 2)))


# ---------------------------------------------------------------------------------------------------- commands, as written


@pytest.mark.docs
def test_the_study_of_the_readme_runs_when_it_is_pasted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(forecast, "SECONDS", 0.5)
    (tmp_path / "mine.py").write_text(smaller(blocks("README.md")[0], r"proxies=\{.*?\n    \}", r"rungs=\(\d+,\)"))
    assert [c.partition("#")[0].strip() for c in commands("README.md")] == commands("quick-start.md")
    for command in commands("README.md"):
        typed(command)
    for made in ("runs/mine/report/index.html", "runs/mine/report/front.png", "exported/model_index.json"):
        assert (tmp_path / made).exists(), made


@pytest.mark.docs
def test_the_commands_of_the_three_jobs_run_as_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(forecast, "SECONDS", 0.5)
    (tmp_path / "studies").mkdir()
    (tmp_path / "studies" / "digits.py").write_text(smaller((ROOT / "studies" / "digits.py").read_text()))
    every = [command for page in ("searching.md", "compare.md", "hand-over.md") for command in commands(page)]
    assert {command.split()[1] for command in every if command.startswith("nas ")} == {
        "run",
        "status",
        "repair",
        "compare",
        "report",
        "dashboard",
        "audit",
        "intervals",
        "export",
        "train",
        "confirm",
        "sample",
    }
    # As written but for how much of it: that is no part of what is shown here.
    few = {
        "audit": ["--schedules", "12"],
        "intervals": ["--grid", "6"],
        "train": ["--steps", "30"],
        "confirm": ["--steps", "5", "--seeds", "2"],
    }
    for command in every:
        started = time.monotonic()
        if command.startswith("nas dashboard"):
            served(command, tmp_path)
        else:
            typed(command, few.get(command.split()[1], []))
        print(f"{time.monotonic() - started:.1f} s: {command}")
    for made in ("runs/digits/report/index.html", "runs/digits/report/front.png", "samples.png", "model/trained"):
        assert (tmp_path / made).exists(), made
    [script] = [block for block in blocks("searching.md") if "nas.open_run(" in block]
    for as_written, small in (
        ("trials=60, workers=2", "trials=4"),
        ('"half"', '"half", seeds=2, training={"steps": 5}'),
    ):
        assert as_written in script
        script = script.replace(as_written, small)
    subprocess.run([sys.executable, "-c", script], cwd=tmp_path, env=environment(), check=True)
    [pipeline] = blocks("hand-over.md")
    subprocess.run([sys.executable, "-c", pipeline + "assert len(images) == 16\n"], cwd=tmp_path, check=True)


def served(command: str, place: Path) -> None:
    """The dashboard answers."""
    serving = subprocess.Popen(shlex.split(command), cwd=place, env=environment(), start_new_session=True)
    try:
        page, until = None, time.monotonic() + 60
        while page is None:
            assert serving.poll() is None
            assert time.monotonic() < until
            try:
                page = urllib.request.urlopen("http://127.0.0.1:8080/dashboard", timeout=5).read()
            except OSError:
                time.sleep(0.2)
        assert b"Optuna Dashboard" in page
    finally:
        os.killpg(serving.pid, signal.SIGKILL)
        serving.wait(30)


@pytest.mark.docs
def test_tuning_runs_as_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On small pipelines, whose decoding takes most of their time; then the module that lies there is applied as shown."""
    pipeline = dit(tmp_path / "dit")
    dit(tmp_path / "other", seed=1)
    stable_diffusion(tmp_path / "sd15")
    (tmp_path / "prompts.txt").write_text("a bag\na boot\n")
    monkeypatch.chdir(tmp_path)
    assert len(commands("tune.md")) == 3
    for command in commands("tune.md"):
        small = command.replace("time=0.5", "macs=0.5").replace("20,50", "4,6")
        steps = () if "--steps" in small else ("--steps", "5")
        done = nas(*shlex.split(small)[1:], *steps, "--trials", "12", "--samples", "4,8", "--quiet")
        assert done.returncode == 0, done.stderr
    for name in ("schedule.json", "apply_schedule.py", "report.html", "study.py"):
        assert (tmp_path / "tuned" / "dit" / name).exists()
    monkeypatch.chdir(tmp_path / "tuned" / "dit")
    monkeypatch.syspath_prepend(str(tmp_path / "tuned" / "dit"))
    [shown] = blocks("tune.md")
    made: dict[str, Any] = {"pipeline": pipeline}
    exec(shown, made)
    made["remove_schedule"](pipeline)


# ------------------------------------------------------------------------------------------------- notebooks and the wheel


def told(cells: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """The lines that each cell prints."""
    every = [[output for output in cell.get("outputs", ()) if output.get("name") == "stdout"] for cell in cells]
    return ["".join(output["text"] for output in outputs).splitlines() for outputs in every]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_shown_as_it_was_run_and_tells_of_no_machine(path: Path) -> None:
    cells = json.loads(path.read_text())["cells"]
    outputs = [output for cell in cells for output in cell.get("outputs", ())]
    assert outputs
    assert not [output for output in outputs if output.get("name") == "stderr"]
    assert not re.search(r"/(home|root|tmp|work|Users)/", json.dumps(outputs))


@pytest.mark.long
@pytest.mark.docs
@pytest.mark.filterwarnings("ignore")  # of the kernel's libraries
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import nbformat
    from nbclient import NotebookClient

    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    book = nbformat.read(path, as_version=4)
    shown = told(book.cells)
    where = {"metadata": {"path": str(tmp_path)}}
    NotebookClient(book, timeout=900, kernel_name="python3", resources=where).execute()
    kinds = {kind for cell in book.cells for out in cell.get("outputs", ()) for kind in out.get("data", {})}
    assert "image/png" in kinds
    assert [bool(lines) for lines in told(book.cells)] == [bool(lines) for lines in shown]


@pytest.mark.docs
def test_the_site_is_built_without_a_warning(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", str(ROOT / "docs"), str(tmp_path / "site")]
    done = subprocess.run(build, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "nas run" in (tmp_path / "site" / "commands.html").read_text()


@pytest.mark.docs
def test_the_wheel_works_without_the_clone(tmp_path: Path) -> None:
    """Built, unpacked elsewhere, and used from there: a study is written, opened and looked at."""
    source = tmp_path / "source"
    subprocess.run(["git", "clone", "-q", str(ROOT), str(source)], check=True)
    build = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(tmp_path / "wheels"), str(source)]
    subprocess.run(build, check=True, capture_output=True)
    [wheel] = (tmp_path / "wheels").glob("*.whl")
    with zipfile.ZipFile(wheel) as opened:
        names = opened.namelist()
        opened.extractall(tmp_path / "installed")
    for needed in ("nas/py.typed", "nas/results/templates/report.html", "search_spaces/shipped/pipeline.py"):
        assert needed in names
    assert not [name for name in names if name.startswith(("tests", "benchmarks", "docs"))]
    folder_of(tmp_path / "pictures", count=160, size=16)
    elsewhere = {**os.environ, "PYTHONPATH": str(tmp_path / "installed")}
    for line in (
        "import nas; assert nas.__file__.startswith({place!r}); print(nas.__file__)",
        "from nas.cli import main; import sys; sys.argv = ['nas', 'new', 'mine', '--images', 'pictures']; main()",
        "from nas.cli import main; import sys; sys.argv = ['nas', 'run', 'mine.py', '--dry-run']; main()",
    ):
        code = line.format(place=str(tmp_path / "installed")) if "{place" in line else line
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=tmp_path, env=elsewhere, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
