"""README's commands and code, run as they are written, on the digits study made small."""

from __future__ import annotations

import importlib
import os
import re
import shlex
import signal
import subprocess
import sys
import time
import urllib.request
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
from nas.searchers.evolution import Evolution
from nas.searchers.gates import Gates
from nas.searchers.pruner import Pruner
from nas.searchers.router import Router
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

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
SMALLER = {
    r"Sandwich\(steps=1500\)": "Sandwich(steps=30, batch=16)",
    r"rungs=\(512, 2048\)": "rungs=(32, 64)",
    r"rungs=\(\d+,\)": "rungs=(32,)",
    r"trials=60": "trials=6",
    r"linspace\(10,": "linspace(4,",
    r"verified=10": "verified=3",
    r"proxies=\{.*?\n    \}": 'proxies={"fd@16": Frechet(images, rungs=(16,))}',
}


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.S)


def test_the_study_shown_is_the_study_that_runs() -> None:
    real = " ".join((ROOT / "studies" / "digits.py").read_text().split())
    shown, *_ = blocks("python")
    lines = [line.partition("#")[0].split() for line in shown.splitlines()]
    for line in (" ".join(words) for words in lines if words):
        if not line.startswith(("proxies=", "searchers=", "}", ")")):
            assert line in real, f"{line!r} is not in studies/digits.py"


def test_the_table_of_searchers_names_what_is_registered() -> None:
    table = README.partition("## Searchers")[2].partition("## Adding a searcher")[0]
    named = {name for row in re.findall(r"^\| (`.*?) \|", table, re.M) for name in re.findall(r"`(\w+)`", row)}
    assert named | {"uniform"} == {point.name for point in entry_points(group="nas.searchers")} | {"uniform"}


def test_files_that_are_named_exist() -> None:
    built = README.partition("## How it is built")[2].partition("```\n\n")[0]
    folder = ""
    for line in built.splitlines():
        if found := re.match(r"(\w+)/ ", line):
            folder = found.group(1)
        if found := re.match(r"  (\w+)/ ", line):
            assert (ROOT / folder / found.group(1)).is_dir(), f"{folder}/{found.group(1)}"
        for name in re.findall(r"[\w/]+\.py\b", line) if folder else ():
            assert (ROOT / folder / name).exists(), f"{folder}/{name}"
    for name in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / name).exists(), name


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
    shown = [
        block
        for block in blocks("python")
        if ("Stepwise(" in block or "Timed(" in block) and "Prompts(" not in block and "Branches(" not in block
    ]
    for block, module in zip(shown, (digits, digits_wide, digits_reuse, digits_classes, digits), strict=True):  # type: ignore[assignment]
        exec(block.replace("    ...,\n", SAME), {**common, **vars(module)})


def test_the_codecs_shown_can_be_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    latent = {name: value for name, value in fashion_latent.UNET.items() if name != "num_class_embeds"}
    vae = AutoencoderKL(**{k: v for k, v in fashion_latent.codec.config.items() if k != "_class_name"})
    vae.save_pretrained("vae")
    unet = Elastic(latent, (1.0,)).initial(0).full
    LDMPipeline(vqvae=vae, unet=unet, scheduler=DDIMScheduler()).save_pretrained("pipeline")
    [shown] = [block for block in blocks("python") if "codec=" in block]
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
    config = {"block_out_channels": (16, 32, 64, 64), "down_block_types": levels[0], "up_block_types": levels[1]}
    stable_diffusion(tmp_path / "sd15", layers_per_block=2, **config)
    save_file(
        {"unet.conv_in.lora_A.weight": torch.zeros(1, 4, 3, 3), "unet.conv_in.lora_B.weight": torch.zeros(16, 1, 1, 1)},
        "style.safetensors",
    )
    Path("prompts.txt").write_text("a bag\na coat\n")
    [shown] = [block for block in blocks("python") if "Prompts(" in block]
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
    [shown] = [block for block in blocks("python") if "Branches(" in block]
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


SAME = "".join(
    f"    {name}=study.{name},\n" for name in ("name", "space", "supernet", "images", "training", "searchers")
)


@pytest.mark.slow
def test_the_commands_of_the_three_jobs_run_as_written(tmp_path: Path) -> None:
    study = (ROOT / "studies" / "digits.py").read_text()
    for pattern, small in SMALLER.items():
        study, count = re.subn(pattern, small, study, flags=re.S)
        assert count, f"{pattern} is no longer in studies/digits.py"
    (tmp_path / "studies").mkdir()
    (tmp_path / "studies" / "digits.py").write_text(study)
    bin_folder = str(Path(sys.executable).parent)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PATH": f"{bin_folder}{os.pathsep}{os.environ['PATH']}"}
    every = [line.partition("#")[0].strip() for block in blocks("sh") for line in block.splitlines()]
    commands = [command for command in every if not command.startswith("nas tune")]  # of pipelines: below
    assert {
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
    } == {command.split()[1] for command in commands if command.startswith("nas ")}
    for command in commands:
        started = time.monotonic()
        if command.startswith("nas dashboard"):
            serving = subprocess.Popen(shlex.split(command), cwd=tmp_path, env=environment, start_new_session=True)
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
            continue
        # Of each training; those of a thousand steps are no part of what is shown here.
        few = {"train": ["--steps", "100"], "confirm": ["--steps", "5", "--seeds", "2"]}.get(command.split()[1], [])
        done = subprocess.run(
            [*shlex.split(command), *few], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, f"{command}\n{done.stderr}"
        print(f"{time.monotonic() - started:.1f} s: {command}")
    for made in ("runs/digits/report/index.html", "runs/digits/report/front.png", "samples.png", "model/trained"):
        assert (tmp_path / made).exists(), made
    [script] = [block for block in blocks("python") if "nas.open_run(" in block]
    for as_written, small in (
        ("trials=60, workers=2", "trials=4"),
        ('"half"', '"half", seeds=2, training={"steps": 5}'),
    ):
        assert as_written in script
        script = script.replace(as_written, small)
    script = script.replace('"model"', '"another model"')  # there is one of the commands'
    subprocess.run([sys.executable, "-c", script], cwd=tmp_path, env=environment, check=True)
    [pipeline] = [block for block in blocks("python") if "DiffusionPipeline" in block]
    check = pipeline + "assert len(images) == 16\n"
    subprocess.run([sys.executable, "-c", check], cwd=tmp_path, check=True)


@pytest.mark.slow
def test_tuning_runs_as_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On small pipelines, whose decoding takes most of their time; then the module that lies there is applied as shown."""
    pipeline = dit(tmp_path / "dit")
    dit(tmp_path / "other", seed=1)
    stable_diffusion(tmp_path / "sd15")
    (tmp_path / "prompts.txt").write_text("a bag\na boot\n")
    monkeypatch.chdir(tmp_path)
    every = [line.partition("#")[0].strip() for block in blocks("sh") for line in block.splitlines()]
    commands = [command for command in every if command.startswith("nas tune")]
    assert len(commands) == 3
    for command in commands:
        small = command.replace("time=0.5", "macs=0.5").replace("20,50", "4,6")
        steps = () if "--steps" in small else ("--steps", "5")
        done = nas(*shlex.split(small)[1:], *steps, "--trials", "12", "--samples", "4,8", "--quiet")
        assert done.returncode == 0, done.stderr
    for name in ("schedule.json", "apply_schedule.py", "report.html", "study.py"):
        assert (tmp_path / "tuned" / "dit" / name).exists()
    monkeypatch.chdir(tmp_path / "tuned" / "dit")
    monkeypatch.syspath_prepend(str(tmp_path / "tuned" / "dit"))
    [shown] = [block for block in blocks("python") if "apply_schedule(" in block]
    made: dict[str, Any] = {"pipeline": pipeline}
    exec(shown, made)
    made["remove_schedule"](pipeline)
