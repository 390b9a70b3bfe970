"""Exported networks trained: by the command, by the stand-alone script, killed and resumed, scored and booked."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
from contextlib import closing
from dataclasses import replace
from importlib import metadata
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from PIL import Image
from safetensors.torch import load_file

from evaluators.images import Digits
from nas.base.exported import ExportError, check_hashes, read_export
from nas.contracts import Schedule, Score, Step, derive_seed
from nas.engine.ledger import read_ledgers
from nas.engine.storage import open_storage
from nas.handover.export import export
from nas.handover.training import adopt, fine_tune
from nas.results.report import Run
from nas.study import load_study
from search_spaces.noise import NoiseSchedule
from search_spaces.shipped import train_diffusers as script
from search_spaces.shipped.train_diffusers import Settings, settings_of, train
from search_spaces.supernet import Elastic
from tests.conftest import TINY
from tests.test_cli import nas, refused

QUICK = Settings(steps=12, batch=8, warmup=2, checkpoint_every=3)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {
        f"{path.parent.name}.{name}": tensor
        for path in sorted(folder.glob("unet_*/*.safetensors"))
        for name, tensor in load_file(path).items()
    }


@pytest.fixture
def exported(tiny_net: Elastic, tmp_path: Path) -> Path:
    steps = ((900, 0.5), (600, 1.0), (300, 0.5), (50, 0.25))
    schedule = Schedule(tuple(Step(t, tiny_net.uniform(width)) for t, width in steps))
    export(tiny_net.initial(0), schedule, {"class": "DDIM", "clip": True}, {"images": "digits"}, tmp_path / "model")
    return tmp_path / "model"


def test_the_plan_says_which_timesteps_each_network_serves(exported: Path) -> None:
    plan = json.loads((exported / "train.json").read_text())
    assert plan["timesteps"] == {"unet_0": [[601, 1000], [51, 301]], "unet_1": [[301, 601]], "unet_2": [[0, 51]]}
    assert plan["teacher"] == "unet_1"  # the full network is among them
    assert plan["images"] == "digits"
    assert Settings(**plan["settings"]) == Settings()


def test_each_network_is_trained_on_its_timesteps_and_resumes_exactly(exported: Path) -> None:
    pixels = Digits().load().pixels
    again = exported.parent / "again"
    shutil.copytree(exported, again)
    ticks = list(train(exported, pixels, QUICK, cpu=True))
    assert [(t["model"], t["steps"]) for t in ticks if t["step"] == t["steps"]] == [
        ("unet_0", 8),  # 649 of 1,000 timesteps
        ("unet_1", 4),
        ("unet_2", 1),
    ]
    for stop in (5, 2, 4):
        for _, _ in zip(range(stop), stopped := train(again, pixels, QUICK, cpu=True), strict=False):
            pass
        stopped.close()
    list(train(again, pixels, QUICK, cpu=True))
    first, second = weights(exported / "trained"), weights(again / "trained")
    assert first.keys() == second.keys() == weights(exported).keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not all(torch.equal(first[name], tensor) for name, tensor in weights(exported).items())
    assert list(train(exported, pixels, QUICK, cpu=True)) == []
    provenance = json.loads((exported / "trained" / "provenance.json").read_text())
    assert provenance["exported"]["images"] == "digits"
    assert provenance["trained"]["steps"] == 12
    folder = str(exported / "trained")
    pipeline = DiffusionPipeline.from_pretrained(folder, custom_pipeline=folder, trust_remote_code=True)
    assert pipeline(2, output_type="np").images.shape == (2, 8, 8, 1)


@pytest.mark.long
@pytest.mark.parametrize("changed", [{"distillation": 1.0}, {"features": 0.1}])
def test_losses_pull_towards_the_teacher(exported: Path, changed: dict[str, Any]) -> None:
    """From other weights than the teacher's, distillation lowers the distance to it."""
    pixels = Digits().load().pixels
    settings = Settings(
        **{"steps": 400, "batch": 16, "warmup": 5, "ema": 0.9, "distillation": 1.0, "learning_rate": 2e-3, **changed}
    )
    with closing(train(exported, pixels, settings, cpu=True)) as ticks:
        losses = [tick["loss"] for tick in takewhile(lambda tick: tick["model"] == "unet_0", ticks)]
    assert np.mean(losses[-20:]) < 0.7 * np.mean(losses[:20])


ALONE = """
import json, runpy, sys
from importlib.machinery import PathFinder
refused = set(json.loads(sys.argv[1]))
class Finder(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.split(".")[0] in refused else super().find_spec(name, path, target)
sys.meta_path = [each for each in sys.meta_path if each is not PathFinder and "editable" not in repr(each)] + [Finder]
sys.argv = sys.argv[2:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def alone(script: Path, *options: object) -> subprocess.CompletedProcess[str]:
    """Runs it where torch, diffusers, accelerate, numpy, pillow and what these require are all that can be imported."""
    allowed, waiting = set(), ["torch", "diffusers", "accelerate", "numpy", "pillow"]
    while waiting:
        name = canonicalize_name(waiting.pop())
        if name not in allowed:
            allowed.add(name)
            needed = [Requirement(line) for line in metadata.requires(name) or []]
            waiting += [each.name for each in needed if each.marker is None or each.marker.evaluate({"extra": ""})]
    refused = [
        module
        for module, owners in metadata.packages_distributions().items()
        if not any(canonicalize_name(owner) in allowed for owner in owners)
    ]
    assert {"optuna", "ray", "scipy"} <= set(refused)
    refused += ["nas", "search_spaces", "evaluators"]
    words = [sys.executable, "-c", ALONE, json.dumps(refused), script, *options]
    return subprocess.run([str(word) for word in words], capture_output=True, text=True, cwd=script.parent, check=False)


@pytest.mark.long
def test_the_script_alone_trains_the_same(exported: Path) -> None:
    pixels = Digits().load().pixels[:40]
    for i, image in enumerate(pixels):
        (exported.parent / "pictures").mkdir(exist_ok=True)
        shown = ((image[0] + 1) * 127.5).round().astype(np.uint8)
        Image.fromarray(shown).save(exported.parent / "pictures" / f"{i:03d}.png")
    again = exported.parent / "again"
    shutil.copytree(exported, again)
    options = ["--steps", "12", "--batch", "8", "--cpu"]
    done = alone(exported / "train_diffusers.py", "--images", exported.parent / "pictures", *options)
    assert done.returncode == 0, done.stderr
    assert "unet_0: step 8 of 8" in done.stdout
    result = nas("train", again, "--images", exported.parent / "pictures", "--steps", 12, "--batch", 8, "-q")
    assert result.returncode == 0, result.stderr
    first, second, before = weights(exported / "trained"), weights(again / "trained"), weights(exported)
    moved, apart = (
        math.sqrt(sum(float((first[name] - other[name]).square().sum()) for name in first))
        for other in (before, second)
    )
    assert moved > 0
    assert apart <= 0.05 * moved  # Adam makes a whole step of what rounding leaves of a gradient that is zero
    for folder in (exported, exported / "trained"):
        sampled = alone(folder / "sample.py", "--count", 2, "--to", exported.parent / "grid.png")
        assert sampled.returncode == 0, sampled.stderr
        with Image.open(exported.parent / "grid.png") as grid:
            assert grid.size == (2 * 64, 64)  # enlarged to be looked at
    otherwise = alone(exported / "train_diffusers.py", "--images", exported.parent / "pictures", *options, "--seed", 1)
    assert otherwise.returncode == 1
    assert "was trained otherwise: seed was 0, now 1. Delete it to train again" in otherwise.stderr
    begun = ("train", exported, "--images", exported.parent / "pictures", "-q")
    refused(nas(*begun, "--steps", 13), "steps was 12, now 13; batch was 8, now 64")
    wrong = alone(again / "train_diffusers.py", "--images", exported / "unet_0")
    assert wrong.returncode == 1
    assert "holds no pictures" in wrong.stderr


@pytest.mark.long
def test_two_processes_train_one_network_on_noises_of_their_own(exported: Path) -> None:
    pictures = exported.parent / "pictures.npy"
    np.save(pictures, Digits().load().pixels[:40])
    alone_too = exported.parent / "one"
    shutil.copytree(exported, alone_too)
    options = [
        "train_diffusers.py",
        "--images",
        str(pictures),
        "--steps",
        "12",
        "--batch",
        "8",
        "--warmup",
        "1",
        "--cpu",
    ]
    pair = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", *options]
    for folder, words in ((exported, pair), (alone_too, [sys.executable, *options])):
        done = subprocess.run(words, capture_output=True, text=True, cwd=folder, check=False)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("unet_0: step 8 of 8") == 1
    both, one = weights(exported / "trained"), weights(alone_too / "trained")
    assert both.keys() == one.keys()
    assert all(bool(torch.isfinite(tensor).all()) for tensor in both.values())
    assert max(float((both[name] - one[name]).abs().max()) for name in both) > 1e-4


STUDY = """
from tests.conftest import tiny
study = tiny()
"""
OTHER = f"""
from dataclasses import replace
{STUDY}
study = replace(study, space=replace(study.space, intervals=(2, 2)))
"""


@pytest.mark.slow
def test_the_command_is_killed_resumed_scored_and_booked(tiny_run: Path, tmp_path: Path) -> None:
    study, run = tmp_path / "study.py", tmp_path / "run"
    study.write_text(STUDY)
    shutil.copytree(tiny_run, run)
    trained: list[Any] = []
    for share in (0.6, 0.4):
        folder = tmp_path / f"model-{share}"
        result = nas("export", study, "--within", f"macs_share={share}", "--to", folder, "--out", run)
        if result.returncode:
            assert "no verified trial keeps" in result.stderr
            continue
        command = [
            sys.executable,
            "-m",
            "nas.cli",
            "train",
            folder,
            "--images",
            "digits",
            "--steps",
            "60",
            "--batch",
            "16",
        ]
        if not trained:
            killed = subprocess.Popen([*map(str, command), "--study", str(study), "--out", str(run), "-q"])
            while not (folder / "trained" / "losses.jsonl").exists():
                assert killed.poll() is None
            killed.send_signal(signal.SIGKILL)
            killed.wait(30)
        result = nas(*command[3:], "--study", study, "--out", run, "--json")
        assert result.returncode == 0, result.stderr
        trained.append(json.loads(result.stdout))
        assert (folder / "trained" / "losses.png").exists()
        scored = [json.loads(line) for line in (folder / "trained" / "validation.jsonl").read_text().splitlines()]
        at = [(row["model"], row["step"]) for row in scored]
        assert len(set(at)) == len(at)
        assert at[0] == ("", 0)
        losses = [json.loads(line) for line in (folder / "trained" / "losses.jsonl").read_text().splitlines()]
        assert {(row["model"], row["steps"]) for row in losses} <= set(at)  # the end of each network's training
        # What was scored last is what was trained, on the noises and samples of the search.
        recipe = load_study(study)
        evaluator = recipe.load(run, "cpu")
        adopt(evaluator, folder / "trained")
        genome = tuple(json.loads((folder / "provenance.json").read_text())["genome"])
        again_scored = evaluator(recipe.space.decode(genome), 32, derive_seed(recipe.seed, "search noise"))
        assert scored[-1]["fd"] == pytest.approx(again_scored.values["fd"], abs=1e-4)
        again = nas(*command[3:], "--study", study, "--out", run, "--json")
        assert json.loads(again.stdout)["booked"] == trained[-1]["booked"]  # booked once
        # Of the same networks another schedule, trained alike: another trial, with a score of its own.
        copied, told = tmp_path / f"again-{share}", json.loads((folder / "provenance.json").read_text())
        told["genome"] = [(gene + 1) % 3 for gene in genome]
        another = recipe.space.decode(tuple(told["genome"]))
        export(evaluator.supernet, another, dict(evaluator.sampler_of(another)), told, copied)
        shutil.copytree(folder / "trained", copied / "trained")
        other = nas("train", copied, *command[5:], "--study", study, "--out", run, "--changed-weights", "--json")
        assert other.returncode == 0, other.stderr
        assert json.loads(other.stdout)["booked"] != trained[-1]["booked"]
        trained.append(json.loads(other.stdout))
        (tmp_path / "other.py").write_text(OTHER)
        refused(nas(*command[3:], "--study", tmp_path / "other.py", "--out", run), "from another search space")
    assert trained
    found = Run.open(run)
    assert [info.searcher for info, _ in found.ledgers] == [
        "uniform",
        "evolution",
    ]  # a search is not compared with a training
    after = found.compare()["trained"]
    once = {facts["booked"]: facts for facts in trained}  # budgets may have one winner
    assert len(after["schedules"]) == len(once)
    for row, facts in zip(after["schedules"], once.values(), strict=True):
        assert row["after"] == facts["fd"]
        assert row["difference"]["difference"] == pytest.approx(row["after"] - row["before"])
    # No search takes a trained schedule's score for the supernet's.
    assert nas("run", study, "--out", run, "--trials", 14, "-q").returncode == 0
    for info, trials in read_ledgers(open_storage(run)):
        if info.searcher == "evolution":
            assert not any("trained" in str(t.origin.get("scored_by", "")) for t in trials)
    assert nas("report", study, "--out", run, "-q").returncode == 0
    assert "After training" in (run / "report" / "index.html").read_text()
    refused(
        nas("report", tmp_path / "other.py", "--out", run, "-q"),
        "was searched with another space than study tiny has now",
    )


def test_two_do_not_train_the_same_networks_at_once(exported: Path) -> None:
    pixels = Digits().load().pixels
    with closing(train(exported, pixels, QUICK, cpu=True)) as first:
        next(first)
        with pytest.raises(ExportError, match="another process trains the networks"):
            next(train(exported, pixels, QUICK, cpu=True))
    assert list(train(exported, pixels, QUICK, cpu=True))


def test_a_loss_that_is_none_is_not_kept(exported: Path) -> None:
    """What was kept before it stays: one would go on from weights that are no numbers."""
    pixels = Digits().load().pixels[:16]
    settings = Settings(steps=12, batch=4, checkpoint_every=1, learning_rate=1e30, clip=1e9, ema=0.0, warmup=0)
    seen: list[int] = []
    with pytest.raises(
        ExportError, match=r"the loss of unet_0 is (nan|inf) at step \d; delete .*trained and train with less"
    ):
        seen.extend(tick["step"] for tick in train(exported, pixels, settings, cpu=True))
    assert seen
    kept = load_file(exported / "trained" / ".unet_0.safetensors")
    assert int(kept["step"]) == seen[-1]


def test_settings_that_train_nothing_or_too_much_are_refused() -> None:
    for name, value in (("clip", 0), ("drop", 50), ("distillation", 1.5), ("ema", 2)):
        with pytest.raises(ExportError, match=f"{name}={value}"):
            settings_of({name: value})
    assert settings_of({"drop": 1, "features": 1}).features == 1
    with pytest.raises(ExportError, match=r"^the options: drop=2\.0 is no float"):
        settings_of({"drop": 2.0}, "the options")


def test_the_script_stops_at_once_where_no_step_is_under_way(exported: Path) -> None:
    """Captions and latents are read for long before the first step."""
    program = exported / "train_diffusers.py"
    waits = f"""
import runpy, sys, time
sys.path.insert(0, {str(exported)!r})
import train_data
def conditions(*given):
    print("reads", flush=True)
    time.sleep(60)
train_data.conditions = conditions
sys.argv = ["train", "--images", {str(exported.parent / "some.npy")!r}, "--cpu"]
runpy.run_path({str(program)!r}, run_name="__main__")
"""
    np.save(exported.parent / "some.npy", np.zeros((4, 1, 8, 8), dtype=np.float32))
    begun = subprocess.Popen(
        [sys.executable, "-c", waits], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=exported
    )
    assert begun.stdout is not None
    assert "reads" in begun.stdout.readline()
    begun.send_signal(signal.SIGINT)
    said, error = begun.communicate(timeout=30)
    assert begun.returncode == 130, error
    assert "the same command goes on from here" in said


def test_wrong_input_is_refused_in_one_line(exported: Path, tmp_path: Path) -> None:
    refused(nas("train", exported), "what to train on is not said; give --images")
    refused(nas("train", tmp_path, "--images", "digits"), "no exported folder")
    refused(nas("train", exported, "--images", tmp_path / "none"), "does not exist; give a folder")
    refused(nas("train", exported, "--images", "digits:16"), "the networks take")
    refused(nas("train", exported, "--images", "digits", "--device", "cuda:9"), "cannot be used")
    refused(nas("train", exported, "--images", "digits:x"), "does not exist; give a folder")
    np.save(tmp_path / "some.npy", np.zeros((4, 1, 8, 8), np.float32))
    of_file = nas("train", exported, "--images", tmp_path / "some.npy", "--labels", "folders")
    refused(of_file, "is one file, whose images have no folders that name their classes; give a folder of pictures")
    np.save(tmp_path / "bytes.npy", np.full((20, 1, 8, 8), 200, dtype=np.uint8))
    refused(nas("train", exported, "--images", tmp_path / "bytes.npy"), r"must hold images in \[-1, 1\]")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "a.png").write_text("no picture")
    refused(nas("train", exported, "--images", tmp_path / "broken"), "cannot be read as an image")
    assert nas("train", exported, "--images", "digits", "--precision", "bf15").returncode == 2
    refused(nas("train", exported, "--images", "digits", "--precision", "fp16"), "fp16 needs a GPU")
    assert json.loads((exported / "trained" / "settings.json").read_text())["precision"] == "fp16"
    # Nothing was trained, so that nothing was trained otherwise.
    quick = ("train", exported, "--images", "digits", "--batch", 8, "-q")
    assert nas(*quick, "--steps", 6).returncode == 0
    refused(nas(*quick, "--steps", 60), "was trained otherwise: steps was 6, now 60. Delete it to train again")
    np.save(tmp_path / "others.npy", np.zeros((20, 1, 8, 8), dtype=np.float32))
    others = ("train", exported, "--images", tmp_path / "others.npy", "--batch", 8, "--steps", 6, "-q")
    refused(nas(*others), "was trained otherwise: on other images, labels or captions. Delete it")
    refused(nas("train", exported, "--images", "digits", "--validate-every", 5), "--validate-every is of scores")
    # What is known of a training is not written again, which a full disk would end in its midst.
    kept = (exported / "trained" / "settings.json").stat()
    assert nas(*quick, "--steps", 6).returncode == 0
    assert (exported / "trained" / "settings.json").stat().st_mtime_ns == kept.st_mtime_ns


@pytest.mark.long
def test_each_network_sees_its_timesteps_alone(exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    served = json.loads((exported / "train.json").read_text())["timesteps"]
    seen: dict[str, set[int]] = {name: set() for name in served}
    asked: list[torch.Tensor] = []
    original = DDIMScheduler.add_noise

    def noted(self: Any, x: torch.Tensor, noise: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        asked.append(t)
        return original(self, x, noise, t)

    monkeypatch.setattr(DDIMScheduler, "add_noise", noted)
    for tick in train(exported, Digits().load().pixels, replace(QUICK, steps=60), cpu=True):
        seen[tick["model"]].update(asked.pop().tolist())
    for name, ranges in served.items():
        allowed = {t for start, stop in ranges for t in range(start, stop)}
        assert seen[name] <= allowed
        widest = max(stop - start for start, stop in ranges)
        assert max(seen[name]) - min(seen[name]) > widest / 2, "and they are spread over them"


@pytest.mark.parametrize(
    "count", [pytest.param(count, marks=() if count in (1, 4) else pytest.mark.long) for count in range(1, 8)]
)
def test_killed_between_any_two_files_the_trained_folder_has_the_hashes_of_its_networks(
    exported: Path, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    renamed = os.replace
    left = iter(range(count))

    def replace_until(source: Any, target: Any) -> None:
        if next(left, None) is None:
            raise SystemExit("killed")
        renamed(source, target)

    pixels = Digits().load().pixels
    with monkeypatch.context() as patched:
        patched.setattr("os.replace", replace_until)
        with pytest.raises(SystemExit):
            list(train(exported, pixels, Settings(steps=4, batch=4), cpu=True))
    list(train(exported, pixels, Settings(steps=4, batch=4), cpu=True))
    found = read_export(exported / "trained")
    check_hashes(exported / "trained", found.networks, found.provenance, "")


@pytest.mark.long
def test_a_training_goes_on_whose_steps_so_far_overflowed(tmp_path: Path) -> None:
    """Adam has seen none of them."""
    net, average = torch.nn.Linear(2, 2), {"weight": torch.ones(2, 2), "bias": torch.ones(2)}
    script._keep(tmp_path / "state", net, torch.optim.AdamW(net.parameters()), average, 3)
    again = torch.nn.Linear(2, 2)
    optimiser = torch.optim.AdamW(again.parameters())
    assert script._restore(tmp_path / "state", again, optimiser, average) == 3
    assert torch.equal(again.weight, net.weight)
    assert not optimiser.state
    # Of others it has, fewer than were asked for; and the scale that was reached is gone on with.
    net(torch.ones(1, 2)).sum().backward()
    first, scaler = torch.optim.AdamW(net.parameters()), torch.amp.GradScaler("cpu", init_scale=1024.0)
    first.step()
    scaler.scale(torch.ones(()))  # which makes it
    scaler.update(512.0)
    script._keep(tmp_path / "state", net, first, average, 5, scaler)
    scaler = torch.amp.GradScaler("cpu")
    assert script._restore(tmp_path / "state", again, optimiser, average, scaler) == 5
    assert {int(state["step"]) for state in optimiser.state.values()} == {1}
    assert scaler.get_scale() == 512.0


def test_distillation_is_the_share_of_the_teacher(exported: Path) -> None:
    """The full network is its own teacher: wholly distilled it has nothing to learn, not distilled it has the noise to predict."""
    pixels = Digits().load().pixels
    losses = {}
    for share in (0.0, 0.5, 1.0):
        copy = exported.parent / f"copy{share}"
        shutil.copytree(exported, copy)
        ticks = train(copy, pixels, replace(QUICK, distillation=share, batch=64), cpu=True)
        losses[share] = next(tick["loss"] for tick in ticks if tick["model"] == "unet_1")
    assert losses[1.0] == pytest.approx(0.0, abs=1e-10)
    assert losses[0.0] > 0.3
    assert losses[0.5] == pytest.approx(losses[0.0] / 4, rel=1e-4), "half of the way is a quarter of the squared error"


@pytest.mark.parametrize(("kind", "expected"), [("sample", 9.0), ("v_prediction", None), ("epsilon", 1.0)])
def test_the_script_trains_what_the_network_predicts(kind: Any, expected: float | None, tmp_path: Path) -> None:
    """A network that answers zero, on images that are 3 everywhere: its loss is the mean square of what it should have answered."""
    process = NoiseSchedule(prediction=kind)
    net = Elastic(TINY, (1.0,), noise=process)
    loaded = net.initial(0)
    torch.nn.init.zeros_(loaded.full.conv_out.weight)
    torch.nn.init.zeros_(loaded.full.conv_out.bias)
    schedule = Schedule((Step(900, net.uniform(1.0)),))
    export(loaded, schedule, {"class": "DDIM", "clip": True}, {}, tmp_path / "model")
    ticks = train(
        tmp_path / "model", np.full((4, 1, 8, 8), 3, np.float32), replace(QUICK, batch=512, distillation=0.0), cpu=True
    )
    if expected is None:
        expected = float(np.mean(process.alphas_cumprod + 9 * (1 - process.alphas_cumprod)))
    # 512 timesteps of uniform draws: their mean of abar has a standard error of 0.014, and v's square grows by 8 of it
    assert next(ticks)["loss"] == pytest.approx(expected, abs=0.45 if kind == "v_prediction" else 0.05)
    ticks.close()


def test_a_training_is_closed_with_who_follows_it_whoever_else_holds_it(tmp_path: Path) -> None:
    (tmp_path / "trained").mkdir()
    closed = []

    def training() -> Any:
        try:
            while True:
                yield {"model": "unet_0", "step": 1, "steps": 9, "loss": 0.5, "average": {}}
        finally:
            closed.append(True)

    ticks = training()
    following = fine_tune(ticks, tmp_path)
    next(following)
    following.close()  # type: ignore[attr-defined]
    assert closed
    assert list(ticks) == []


def test_a_training_goes_on_where_the_study_judges_by_another_score_now(tmp_path: Path) -> None:
    class Similarity:
        """What `fine_tune` asks of a Validation, with a score of its own."""

        quality = "ssim"
        begun = True

        def take(self, name: str, average: Any) -> None: ...

        def __call__(self) -> Score:
            return Score({"ssim": 0.9})

    scores = tmp_path / "trained" / "validation.jsonl"
    scores.parent.mkdir()
    scores.write_text(json.dumps({"model": "unet_0", "step": 2, "fd": 3.0, "error": 0.1}) + "\n")
    tick = {"model": "unet_0", "steps": 2, "loss": 0.5, "average": {}}
    [first, _] = fine_tune(({**tick, "step": step} for step in (1, 2)), tmp_path, Similarity())  # type: ignore[arg-type]
    assert first.values == {"loss": 0.5, "ssim": 0.9}
    assert [sorted(json.loads(line)) for line in scores.read_text().splitlines()][1:] == [
        ["error", "model", "ssim", "step"]
    ] * 2
    assert (tmp_path / "trained" / "losses.png").exists()
    [_] = fine_tune(({**tick, "step": 2} for _ in range(1)), tmp_path)  # without a study, what was scored last is drawn
