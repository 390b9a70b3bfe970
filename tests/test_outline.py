"""`nas run --dry-run`: what a study would take, without data, weights or a GPU."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import nas.results.forecast as forecasts
from benchmarks import published
from benchmarks.cost import DDPM_CIFAR10
from nas.contracts import UserError
from nas.engine.session import open_session
from nas.results.outline import outline
from nas.results.report import Run
from nas.study import Study, load_study
from search_spaces.training import Experts, Sandwich, Stages
from tests.test_cli import ROOT, nas, refused

STUDIES = sorted(path for path in (ROOT / "studies").glob("*.py") if path.name != "__init__.py")


@cache
def facts_of(study: Path) -> Any:
    """Several tests look at them, and the large networks take seconds."""
    return outline(load_study(study))


@pytest.mark.parametrize("study", STUDIES, ids=lambda path: path.stem)
def test_every_study_passes_a_dry_run_without_its_data(study: Path, tmp_path: Path) -> None:
    facts = facts_of(study)
    assert facts["macs"]["least"] <= facts["macs"]["budget"] <= facts["macs"]["most"]
    assert facts["training_macs"] > 0 or load_study(study).training == Stages(())
    assert facts["network"]["activations"] > 0
    json.dumps(facts)


def test_the_networks_are_the_published_ones() -> None:
    found = {
        path.stem: facts_of(path)["network"]
        for path in STUDIES
        if any(part in path.stem for part in ("lsun", "ldm", "64", "sd15", "sdxl", "dit_", "pixart"))
    }
    assert found["ddsm_celeba64"]["params"] == pytest.approx(78.7e6, rel=0.002)
    assert found["ddsm_celeba64"]["macs"] == pytest.approx(24.051e9, rel=1e-4)
    plain = found["ddsm_celeba64"]["macs"] - found["ddsm_celeba64"]["attention_macs"]
    assert plain == pytest.approx(23.883e9, rel=1e-4)
    assert found["diffpruning_lsun256"]["params"] == pytest.approx(113.7e6, rel=0.002)
    for name, network in (
        ("ldm_celebahq256", "LDM-4 bedrooms, FFHQ, CelebA-HQ"),
        ("ldm_church256", "LDM-8 churches"),
        ("tdc_imagenet64", "IDDPM ImageNet-64, class-conditional, 192 channels"),
        ("ldm_imagenet256", "LDM-4 ImageNet, by class"),
        ("sd15_dip_go", "Stable Diffusion 1.x, 512 pixels"),
        ("sd15_width", "Stable Diffusion 1.x, 512 pixels"),
        ("dit_xl2_dip_go", "DiT-XL/2, 256 pixels"),
        ("dit_xl2_reuse", "DiT-XL/2, 256 pixels"),
        ("dit_width", "DiT-XL/2, 256 pixels"),
        ("pixart_ecad", "PixArt-alpha, 256 pixels"),
    ):
        expected = published.NETWORKS[network]
        # One label more than IDDPM's, that of no class.
        assert found[name]["params"] / 1e6 == pytest.approx(expected.params, rel=1e-4)
        assert found[name]["macs"] / 1e9 == pytest.approx(expected.macs, rel=1e-4)
        plain = (found[name]["macs"] - found[name]["attention_macs"]) / 1e9
        assert plain == pytest.approx(expected.without_attention, rel=1e-4)
    assert found["ldm_celebahq256"]["decoder_macs"] == pytest.approx(335.3e9, rel=1e-3)
    assert found["ldm_church256"]["decoder_macs"] == pytest.approx(311.1e9, rel=1e-3)
    assert found["sd15_dip_go"]["decoder_macs"] == pytest.approx(1257.3e9, rel=1e-3)
    assert found["sdxl_reuse"]["params"] == pytest.approx(2567.5e6, rel=1e-4)
    cifar = load_study(ROOT / "studies" / "ddsm_cifar10.py").supernet
    assert cifar.config == DDPM_CIFAR10  # type: ignore[attr-defined]  # whose MACs benchmarks.cost compares with the published ones


def test_the_reckoned_training_is_what_training_spends(tiny_study: Study, tiny_run: Path) -> None:
    """Up to what is drawn: a middle subnet of three widths is always the same one."""
    [stage] = json.loads((tiny_run / "supernet" / "training.json").read_text())
    assert tiny_study.training.macs(tiny_study.supernet) == pytest.approx(stage["macs"], rel=0.2)
    net = tiny_study.supernet
    alone, both = (
        Sandwich(40, 16, full_only=True),
        Stages((Sandwich(40, 16, full_only=True), Sandwich(10, 16, full_only=True))),
    )
    assert both.macs(net) == pytest.approx(1.25 * alone.macs(net))  # type: ignore[arg-type]
    assert alone.macs(net) == 3 * 40 * 16 * outline(tiny_study)["network"]["macs"]  # type: ignore[arg-type]
    experts = replace(net, experts=(300, 700))  # type: ignore[type-var]
    assert Experts(alone).macs(experts) == 3 * alone.macs(net)  # type: ignore[arg-type]


def with_data(name: str, folder: Path) -> Path:
    """A study file of that folder, beside data such as it names."""
    study = folder / f"{name}.py"
    study.write_text((ROOT / "studies" / f"{name}.py").read_text())
    (folder / "data" / "cifar10").mkdir(parents=True)
    for number in range(16):
        Image.new("RGB", (32, 32), (number, 0, 0)).save(folder / "data" / "cifar10" / f"{number}.png")

    class Pooled(torch.nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return images.mean((2, 3))

    torch.jit.script(Pooled()).save(str(folder / "inception.pt"))
    return study


def test_the_command_says_it_in_a_table_or_as_json(tmp_path: Path) -> None:
    study = with_data("dip_go_cifar10", tmp_path)
    table = nas("run", study, "--dry-run", "--throughput", "4e13", "--price", "2")
    assert table.returncode == 0, table.stderr
    assert "10^84" in table.stdout
    assert "hours = MACs / 4e+13" in table.stdout
    slow = json.loads(nas("run", study, "--dry-run", "--json", "--throughput", "4e12").stdout)
    fast = json.loads(nas("run", study, "--dry-run", "--json", "--throughput", "4e13", "--price", "2").stdout)
    assert slow["hours"]["training"] == pytest.approx(10 * fast["hours"]["training"])
    assert fast["price"]["training"] == pytest.approx(2 * fast["hours"]["training"])
    more = (
        "--dry-run",
        "--json",
        "--throughput",
        "4e13",
        "--seeds",
        "3",
        "--trials",
        str(2 * load_study(study).trials),
    )
    planned = json.loads(nas("run", study, *more).stdout)
    assert 3 * fast["hours"]["search_per_searcher"] < planned["hours"]["search_per_searcher"]
    assert planned["hours"]["search_per_searcher"] <= 6.01 * fast["hours"]["search_per_searcher"]
    assert planned["hours"]["training"] == pytest.approx(fast["hours"]["training"])


def test_every_rung_of_a_search_is_reckoned_with(tiny_study: Study) -> None:
    """Half of those on each rung go on to the next."""
    study = replace(tiny_study, trials=40, verified=10)
    few, many = (
        outline(replace(study, evaluator=replace(study.evaluator, rungs=rungs)))["search_macs_per_searcher"]  # type: ignore[type-var]
        for rungs in ((32, 512), (32, 128, 512))
    )
    assert many / few == pytest.approx((40 * 32 + 20 * 128 + 10 * 512) / (40 * 32 + 10 * 512))


TOY = """
from evaluators.frechet import Frechet
from evaluators.images import Digits
from nas.searchers.evolution import Evolution
from nas.searchers.random import Random
from nas.study import Study
from search_spaces.intervals import equal, uniform
from search_spaces.stepwise import Stepwise
from search_spaces.supernet import Elastic
from search_spaces.training import Sandwich, Stages
from tests.conftest import TINY

images, steps, net = Digits(holdout=0.2), uniform(6), Elastic(TINY, widths=(0.25, 0.5, 1.0), groups="count")
study = Study(
    name="toy", space=Stepwise(net, steps, equal(steps, 3)), supernet=net, images=images,
    training=Stages((Sandwich(steps=30, full_only=True), Sandwich(steps=60))),
    evaluator=Frechet(images, rungs=(32, 64)), searchers={"random": Random(), "evolution": Evolution(population=4)},
    limits={"macs_share": 0.7}, trials=12, verified=3,
)
"""


def test_without_a_throughput_the_device_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forecasts, "SECONDS", 0.5)
    (tmp_path / "toy.py").write_text(TOY)
    done = nas("run", tmp_path / "toy.py", "--dry-run", "--searcher", "all", "--threads", "1")
    assert done.returncode == 0, done.stderr
    for row in ("features", "full network", "supernet", "search by random", "search by evolution", "all of it"):
        assert re.search(rf"^ {row} +\d", done.stdout, re.M), row
    options = ("--json", "--price", "3", "--threads", "1", "--workers", "4", "--searcher", "uniform,random")
    facts = json.loads(nas("run", tmp_path / "toy.py", "--dry-run", *options).stdout)["here"]
    assert {row for row in facts["seconds"] if "search" in row} == {"search by random"}, (
        "the baseline is a row of its own"
    )
    assert any(words.startswith("--workers: not reckoned with") for words in facts["words"])
    assert facts["hours"] == pytest.approx(sum(facts["seconds"].values()) / 3600)
    assert facts["price"] == pytest.approx(3 * facts["hours"])
    assert not (tmp_path / "runs").exists()


def test_shared_beginnings_are_taken_off_as_a_run_takes_them_off(tmp_path: Path) -> None:
    """Random proposals follow from the seed alone, so what a search runs is known to the last multiply-add."""
    (tmp_path / "toy.py").write_text(TOY)
    study = load_study(tmp_path / "toy.py")
    shrunk, steps = forecasts._shrunk(study)
    assert sorted(steps.values()) == [30, 60, 400]  # of both trainings, and of the judge
    assert len(shrunk.images.load()) == forecasts.IMAGES
    with open_session(shrunk, tmp_path / "run") as session:
        for _ in session.prepare(threads=1):
            pass
        session.run(session.conductor("random"))
    [(_, trials)] = [found for found in Run.open(tmp_path / "run").ledgers if found[0].searcher == "random"]
    spent = sum(trial.score.spent["macs"] for trial in trials if trial.rung == 32 and trial.score)
    net = shrunk.load(tmp_path / "run", "cpu").supernet
    shared, _ = forecasts._searched(shrunk, "random", study.trials, forecasts._Costs(net))
    assert 32 * shared == spent
    whole = sum(trial.cost["macs"] for trial in trials if trial.rung == 32)
    assert shared < whole


def test_a_network_that_would_take_long_even_to_try_is_reckoned_alone() -> None:
    with pytest.raises(UserError, match="takes too long to try here; give --device, or --throughput"):
        forecasts.forecast(load_study(ROOT / "studies" / "sd15_dip_go.py"), ["evolution"])


def test_what_a_run_would_miss_is_said_without_training(tmp_path: Path) -> None:
    study = with_data("dip_go_cifar10", tmp_path)
    (tmp_path / "inception.pt").rename(tmp_path / "elsewhere.pt")
    missing = nas("run", study, "--dry-run")
    assert "MACs of a search = " in missing.stdout, "what it would take is said all the same"
    refused(missing, r"feature extractor .*inception\.pt does not exist")
    (tmp_path / "elsewhere.pt").rename(tmp_path / "inception.pt")
    Image.new("RGB", (32, 16)).save(tmp_path / "data" / "cifar10" / "0.png")
    refused(nas("run", study, "--dry-run"), r"0\.png is 16x32 pixels, not 32x32")
    refused(nas("run", study, "--dry-run", "--device", "cuda:7"), "device 'cuda:7' cannot be used")
    refused(nas("run", study, "--dry-run", "--storage", "postgresql://u@h:x/y"), "is no database URL")
    refused(nas("run", study, "--dry-run", "--storage", "postgresql+psycopg://u@127.0.0.1:9/y"), "cannot be opened")
    refused(nas("run", study, "--dry-run", "--storage", f"sqlite:///{tmp_path}/nowhere/x.db"), "nowhere does not exist")


def test_a_study_that_cannot_be_is_refused(tmp_path: Path) -> None:
    text = (ROOT / "studies" / "ddsm_cifar10.py").read_text()
    (tmp_path / "study.py").write_text(text.replace('"macs_share": 0.55', '"macs_share": 0.01'))
    refused(nas("run", tmp_path / "study.py", "--dry-run"), "cannot be met: the cheapest schedule")
