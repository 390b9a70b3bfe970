"""`nas tune`: from the folder of a stock pipeline to a schedule that it runs."""

from __future__ import annotations

import html
import itertools
import json
import re
import shlex
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler, LCMScheduler

from evaluators.sampling import DDIM, DPMSolver
from nas.contracts import Guidance, Schedule, Score, Step, UserError, derive_seed
from nas.engine.ledger import read_ledgers
from nas.engine.session import open_session
from nas.engine.storage import open_storage
from nas.handover.portable import schedule_of
from nas.study import load_study
from nas.tuning.found import Candidate, Found
from nas.tuning.page import usage, write_found
from nas.tuning.study import LEAST_CACHE, MOST_CACHE, Wanted, sets
from nas.tuning.tune import baselines, full_samples, given_schedule, read_file, tune, within
from search_spaces.patterns import LeftOut
from search_spaces.shipped.graph import AROUND, TransformerGraph, UNetGraph
from search_spaces.supernet import Elastic
from tests.conftest import module_of
from tests.pipelines import LINEAR, dit, pixart, stable_diffusion
from tests.test_cli import nas, refused
from tests.test_portable import pixels

QUICK = ("--steps", "6", "--trials", "40", "--samples", "8,16", "--quiet")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pipelines, and what was tuned of the first one."""
    folder = tmp_path_factory.mktemp("tune")
    dit(folder / "dit")
    stable_diffusion(folder / "sd")
    pixels(folder / "ddim")
    (folder / "prompts.txt").write_text("a bag\na boot\na small coat\n")
    result = nas(
        "tune",
        folder / "dit",
        "--within",
        "macs=0.6",
        *QUICK,
        "--to",
        folder / "out",
        "--out",
        folder / "run",
        "--json",
    )
    assert result.returncode == 0, result.stderr
    (folder / "said.json").write_text(result.stdout)
    return folder


def quick(folder: Path, limit: float = 0.6) -> Wanted:
    """As the command of `place` asks."""
    return Wanted(folder, "macs", limit, 6, samples=(8, 16), trials=40)


def said(place: Path) -> dict[str, Any]:
    [found] = json.loads((place / "said.json").read_text())["schedules"]
    return dict(found)


def applied(folder: Path) -> Any:
    """The module that lies beside the schedule."""
    return module_of(folder / "apply_schedule.py")


def test_a_folder_becomes_a_schedule_that_its_own_pipeline_runs(place: Path) -> None:
    found, plan = said(place), json.loads((place / "out" / "schedule.json").read_text())
    assert found["share"] <= 0.6
    assert plan["measured"]["loss"] == found["loss"]
    page = (place / "out" / "report.html").read_text()
    assert found["verdict"][0] in page.replace("&#39;", "'")
    pipeline = dit(place / "again")
    pipeline.transformer.eval()
    applied(place / "out").apply_schedule(pipeline, place / "out" / "schedule.json")
    images = pipeline(
        class_labels=[1, 2],
        num_inference_steps=plan["num_inference_steps"],
        guidance_scale=plan["guidance_scale"],
        generator=torch.Generator().manual_seed(0),
        output_type="np",
    ).images
    assert images.shape == (2, 16, 16, 3)
    assert np.isfinite(images).all()


def test_an_extractor_adds_a_perceptual_distance_to_the_report(place: Path, tmp_path: Path) -> None:
    program = torch.export.export(
        torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten()),
        (torch.zeros(2, 3, 16, 16),),
        dynamic_shapes=({0: torch.export.Dim("batch", min=1)},),
    )
    torch.export.save(program, tmp_path / "seen.pt2")
    few = ("--within", "macs=0.6", "--steps", "4", "--trials", "10", "--samples", "4,8", "-q")
    where = ("--to", tmp_path / "out", "--out", tmp_path / "run")
    result = nas("tune", place / "dit", *few, "--extractor", tmp_path / "seen.pt2", *where)
    assert result.returncode == 0, result.stderr
    assert "perceptual" in (tmp_path / "out" / "report.html").read_text()
    assert "perceptual" not in (place / "out" / "report.html").read_text()
    (tmp_path / "bad.pt2").write_bytes(b"no program")
    refused(nas("tune", place / "dit", *few, "--extractor", tmp_path / "bad.pt2", *where), "bad.pt2")


def test_the_same_command_scores_nothing_again(place: Path) -> None:
    journal = (place / "run" / "6-macs-0.6" / "journal.log").read_bytes()
    command = ("tune", place / "dit", "--within", "macs=0.60", *QUICK, "--to", place / "out", "--out", place / "run")
    result = nas(*command, "--json")
    assert result.returncode == 0, result.stderr
    assert (place / "run" / "6-macs-0.6" / "journal.log").read_bytes() == journal
    again = json.loads(result.stdout)["schedules"][0]
    assert again["verdict"] == said(place)["verdict"]
    assert "DPM-Solver++ in " in " ".join(again["verdict"]), "another sampler was tried"


def test_another_limit_loses_no_schedule_that_was_found(place: Path, tmp_path: Path) -> None:
    shutil.copytree(place / "out", tmp_path / "out")
    before = (tmp_path / "out" / "schedule.json").read_bytes()
    few = ("--steps", "4", "--trials", "10", "--samples", "4,8", "-q")
    where = ("--to", tmp_path / "out", "--out", tmp_path / "run")
    for limit, kept, moved in (("macs=0.9", 1, True), ("macs=0.9", 1, False), ("macs=0.3", 2, True)):
        result = nas("tune", place / "dit", "--within", limit, *few, *where)
        assert result.returncode == 0, result.stderr
        aside = sorted((tmp_path / "out").glob("schedule.before*.json"))
        assert len(aside) == kept
        assert ("was another schedule, which is now" in result.stderr) == moved
        assert before in [file.read_bytes() for file in aside]


@pytest.mark.long
def test_pipelines_that_are_not_to_guide_are_called_so(place: Path, tmp_path: Path) -> None:
    found = tune(replace(quick(place / "dit"), guidance=1.0), tmp_path / "run")
    assert "guidance_scale=1)" in usage(found, tmp_path / "out", tmp_path / "run")
    index = json.loads((place / "dit" / "model_index.json").read_text())
    shutil.copytree(place / "dit", tmp_path / "other")
    (tmp_path / "other" / "model_index.json").write_text(json.dumps({**index, "_class_name": "OwnPipeline"}))
    with pytest.raises(UserError, match=r"how strongly OwnPipeline is usually guided .* give --guidance, 1 for none"):
        quick(tmp_path / "other").check()
    replace(quick(tmp_path / "other"), guidance=2.0).check()
    shutil.copytree(place / "dit" / "transformer", tmp_path / "transformer")
    shutil.copytree(place / "sd" / "unet", tmp_path / "unet")
    with pytest.raises(
        UserError, match=r"works on 4 channels, which are no pixels.* give the folder of the whole pipeline"
    ):
        replace(quick(tmp_path / "transformer"), guidance=2.0).check()
    with pytest.raises(UserError, match="has no text encoder; give the folder of the whole pipeline"):
        Wanted(tmp_path / "unet", "macs", 0.6, guidance=2.0, prompts=place / "prompts.txt").check()


def test_scores_have_room_for_what_the_first_leaves_to_the_next(place: Path, tmp_path: Path) -> None:
    """What is sampled is sampled once, however large."""
    wanted = quick(place / "dit")
    assert wanted.cache_bytes == LEAST_CACHE
    large = replace(wanted, samples=(32, 256))
    large.__dict__["net"] = SimpleNamespace(image_shape=(3, 512, 512), state_shape=(4, 64, 64))
    assert 2 * 256 * 4 * 3 * 512**2 < large.cache_bytes <= MOST_CACHE
    study = wanted.study({})
    smaller = replace(study.evaluator.parts[0], cache_bytes=2**29)  # type: ignore[attr-defined]
    assert smaller.digest(tmp_path) == replace(smaller, cache_bytes=2**32).digest(tmp_path)


def test_the_study_goes_on_by_hand(place: Path) -> None:
    study = load_study(place / "out" / "study.py")
    assert study.limits == {"macs_share": 0.6}
    assert {"path", "evolution"} <= set(study.searchers)
    result = nas(
        "run", place / "out" / "study.py", "--searcher", "evolution", "--trials", "8", "--out", place / "by hand", "-q"
    )
    assert result.returncode == 0, result.stderr


def test_where_nothing_is_lost_nothing_is_searched(place: Path) -> None:
    """The schedule of a model, tried on itself."""
    shutil.copytree(place / "dit", place / "same")
    start = place / "out" / "schedule.json"
    found = tune(quick(place / "same"), place / "run2", start=read_file(start))
    assert not found.searched
    assert tune(quick(place / "same"), place / "run2", start=read_file(start)).verdict == found.verdict
    assert "loses no more of it than where it was found, so nothing was searched" in found.verdict[-1]
    assert found.chosen.schedule == schedule_of(read_file(start), found.wanted.net.anatomy.full)


def test_a_schedule_goes_over_to_other_weights_and_sizes(place: Path) -> None:
    """Tried first; searched where it loses, and where it takes more than is wanted there."""
    start = read_file(place / "out" / "schedule.json")
    pipeline = dit(place / "tuned further", seed=0)
    with torch.no_grad():
        for name, weight in pipeline.transformer.named_parameters():
            if ".ff." in name:
                weight += 0.3 * weight.std() * torch.randn_like(weight)
    pipeline.save_pretrained(place / "tuned further")
    better = {**start, "measured": {**start["measured"], "loss": 0.0}}
    found = tune(quick(place / "tuned further"), place / "run3", start=better)
    assert found.searched
    assert found.start is not None
    assert found.start.loss > 0
    assert found.best.loss <= found.start.loss + 2 * found.start.error
    assert "more was searched for" in found.verdict[-1]
    dit(place / "larger", sample_size=12)
    found = tune(quick(place / "larger", limit=0.4), place / "run4", start=start)
    assert found.searched
    assert found.start is not None
    assert found.best.share <= 0.4 < found.start.share
    assert "more than is wanted" in found.verdict[-1]


def test_where_all_is_far_nothing_is_left_to_be_used(place: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("nas.tuning.found.FAR", 0.0)
    run = place / "run" / "6-macs-0.6"
    found = tune(quick(place / "dit"), run)
    shutil.copytree(place / "out", tmp_path / "out")
    loaded = found.study.load(run, "cpu")
    assert write_found(found, loaded.supernet, loaded.sampler_of(found.chosen.schedule), tmp_path / "out", run) == []
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == ["report.html", "study.py"]
    page = (tmp_path / "out" / "report.html").read_text()
    assert "No gain: keep 6 steps" in page
    assert "How to use it" not in page
    assert replace(found, wanted=replace(found.wanted, full_steps=50)).verdict[0].startswith("No gain: keep 50 steps")


def test_a_search_is_reckoned_in_samples_of_the_pipeline_that_it_is_compared_with(place: Path, tmp_path: Path) -> None:
    """Which may have more steps than schedules choose from."""
    found = tune(replace(quick(place / "dit"), full_steps=12), tmp_path)
    every = {info.searcher: trials for info, trials in read_ledgers(open_storage(tmp_path))}
    spent = sum(trial.score.spent["macs"] for trial in every["path"] if trial.score)
    net = found.wanted.net
    sample = 12 * net.macs(Step(0, net.anatomy.full, (), Guidance(found.wanted.scale)))  # type: ignore[arg-type]
    assert found.spent["samples"] == pytest.approx(spent / sample)


def test_another_sampler_is_taken_where_it_is_nearer(place: Path, tmp_path: Path, monkeypatch: Any) -> None:
    folder = place / "run" / "6-macs-0.6"
    found = tune(quick(place / "dit"), folder)
    assert found.rival is not None
    assert len(found.rival.schedule.steps) == 3
    assert found.rival.share == 0.5
    assert found.chosen != found.rival
    assert "Another sampler, DPM-Solver++ in 3 whole steps (50%), loses" in " ".join(found.verdict)
    monkeypatch.setattr("nas.tuning.found._less", lambda one, than: one == found.rival)
    assert found.verdict[0].startswith("Another sampler is nearer: 3 whole steps of DPM-Solver++ take 50%")
    loaded = found.study.load(folder, "cpu")
    schedule = found.chosen.schedule
    write_found(found, loaded.supernet, loaded.sampler_of(schedule), tmp_path, folder)
    assert {file.name for file in tmp_path.iterdir()} == {
        "apply_schedule.py",
        "report.html",
        "schedule.json",
        "study.py",
    }
    assert "another sampler (chosen)" in (tmp_path / "report.html").read_text()
    pipeline = dit(place / "stock")
    pipeline.transformer.eval()
    plan = applied(tmp_path).apply_schedule(pipeline, tmp_path / "schedule.json")
    assert plan["sampler"]["class"] == "DPMSolver"
    assert pipeline([1], num_inference_steps=3, guidance_scale=4.0, output_type="np").images.shape == (1, 16, 16, 3)
    with pytest.raises(UserError, match="of the sampler DPMSolver, this pipeline's is DDIM"):
        given_schedule(quick(place / "dit"), plan)
    full = full_samples(loaded, found.wanted)
    mine = loaded.sample(schedule, 8, derive_seed(0, "pictures")).double().numpy()
    # Beside the full pipeline's own sampler, whatever the schedule's is.
    distance = float(np.square(mine - full[:8]).mean())
    score = loaded(schedule, 8, derive_seed(0, "pictures")).values["teacher_mse"]
    assert score == pytest.approx(distance, rel=1e-4)


def test_a_sampler_with_a_memory_is_compared_with_fewer_steps(tmp_path: Path) -> None:
    """And what a text asks for is verified on texts that nothing was chosen on."""
    pixart(tmp_path / "pixart")
    (tmp_path / "prompts.txt").write_text(
        "a bag\na boot\na small coat\na dress\na photo of a shirt\na drawing\na bag\n"
    )
    wanted = Wanted(tmp_path / "pixart", "macs", 0.6, 5, prompts=tmp_path / "prompts.txt", samples=(4, 8), trials=24)
    found = tune(wanted, tmp_path / "run")
    assert found.fewer is not None
    assert len(found.fewer.schedule.steps) == 3
    assert not any(step.reuse for step in found.fewer.schedule.steps)
    assert found.kept_prompts == 1
    [searched], [kept] = ([*(tmp_path / "run" / "prompts").glob(f"{name}-*.txt")] for name in ("searched", "verified"))
    assert kept.read_text() == "a photo of a shirt\n"
    assert "a photo of a shirt" not in searched.read_text()
    loaded = found.study.load(tmp_path / "run", "cpu")
    write_found(found, loaded.supernet, loaded.sampler_of(found.chosen.schedule), tmp_path / "out", tmp_path / "run")
    assert "noises and 1 prompt that nothing was searched on" in (tmp_path / "out" / "report.html").read_text()
    assert read_file(tmp_path / "out" / "schedule.json")["sampler"]["class"] == "DPMSolver"
    by_hand = load_study(tmp_path / "out" / "study.py")
    with open_session(by_hand, tmp_path / "run") as session:  # whose ledgers are not those of the kept prompts
        session.confirmation([by_hand.enqueue[0]])
    (tmp_path / "prompts.txt").write_text("a bag\na cap\na coat\na dress\na sock\n")
    with pytest.raises(UserError, match="another network, training, seed or images"):
        tune(wanted, tmp_path / "run")
    assert kept.read_text() == "a photo of a shirt\n"  # the run's own are as they were
    with open_session(by_hand, tmp_path / "run") as session:
        session.confirmation([by_hand.enqueue[0]])


def test_the_command_that_the_report_names_writes_the_chosen_schedule(place: Path, tmp_path: Path) -> None:
    """A folder that can be tuned in turn, as it samples; and cannot be trained on no images."""
    page = html.unescape((place / "out" / "report.html").read_text())
    [command] = re.findall(r"or as a folder of its own: (nas export .*)</pre>", page)
    arguments = shlex.split(command)
    arguments[arguments.index("--to") + 1] = str(tmp_path / "model")
    result = nas(*arguments[1:])
    assert result.returncode == 0, result.stderr
    plan, exported = (
        json.loads((folder / "schedule.json").read_text()) for folder in (place / "out", tmp_path / "model")
    )
    assert [(step["timestep"], step["reuse"], "guidance" in step) for step in exported["steps"]] == [
        (step["timestep"], step["reuse"], step["guided"]) for step in plan["steps"]
    ]
    where = ("--study", place / "out" / "study.py", "--out", place / "run" / "6-macs-0.6")
    refused(nas("train", tmp_path / "model", *where), "has no images to train on")
    wanted = Wanted(tmp_path / "model", "macs", 0.5)
    assert (wanted.stepped_by, wanted.sampler, wanted.scale) == ("by DDIM", DDIM(clip=False), 4.0)
    told = {**exported, "guided_channels": 3, "sampler": {"class": "DPMSolver", "clip": True}}
    (tmp_path / "model" / "schedule.json").write_text(json.dumps(told))
    assert (wanted := replace(wanted)).sampler == DPMSolver(clip=True)
    assert wanted.stepped_by == "by DPM-Solver++"
    assert wanted.net.guided_channels == 3
    told["sampler"] = {"class": "DDPM", "variance": "fixed_small", "clip": False}
    (tmp_path / "model" / "schedule.json").write_text(json.dumps(told))
    assert replace(wanted).stepped_by == "by DDIM in place of its DDPM"


@pytest.mark.long
def test_several_numbers_of_steps_time_and_texts(place: Path) -> None:
    prompts = ("--prompts", place / "prompts.txt")
    result = nas(
        "tune", place / "sd", "--within", "time=0.95", "--steps", "4,6", "--trials", "30", "--samples", "4,8", "--batch", "1", *prompts,
        "--full-steps", "8", "--to", place / "sd out", "--out", place / "sd run", "--write-study", place / "sd.py", "-q",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    for count in (4, 6):
        plan = json.loads((place / "sd out" / f"{count}-steps" / "schedule.json").read_text())
        assert plan["measured"]["share"] <= 0.95
        assert plan["guidance_scale"] == 7.5
        by_ddim = plan["sampler"]["class"] == "DDIM"
        assert len(plan["measured"]["grid"]) == (count if by_ddim else len(plan["steps"]))
        reusing = any(step["reuse"] for step in plan["steps"])
        why = "cache_dit.yaml: cache-dit's mask can say a transformer's" if reusing else "cache_dit.yaml or smoothcache"
        assert f"no {why}" in result.stderr
        [scores] = re.findall(r"(\d+) scores", (place / "sd out" / f"{count}-steps" / "report.html").read_text())
        assert int(scores) >= 30
        page = (place / "sd out" / f"{count}-steps" / "report.html").read_text()
        assert f"ms an image in {count} whole steps" in page  # not in the eight of what it is compared with
    first, second = (
        json.loads((place / "sd run" / f"{count}-time-0.95" / "latency.json").read_text()) for count in (4, 6)
    )
    for device, times in first.items():  # timed once
        assert times.items() <= second[device].items()
    assert re.search(
        r"Of the way from the same 8 whole steps: of [46] steps .* ms an image", " ".join(result.stdout.split())
    )
    assert load_study(place / "sd-6.py").limits["latency_ms"] > 0


def test_what_cannot_be_tuned_is_refused(place: Path) -> None:
    for arguments, message in (
        ((place / "none", "--within", "macs=0.5"), "is no folder"),
        ((place / "dit", "--within", "speed=2"), "is not time=SHARE or macs=SHARE"),
        ((place / "dit", "--within", "macs=0.5", "--workers", "1", "--gpus-per-worker", "1"), "give --device cuda too"),
        ((place / "dit", "--within", "macs=1.5"), "no share of what the full pipeline takes"),
        ((place / "dit", "--within", "macs=0.5", "--steps", "1"), "leaves nothing to choose"),
        ((place / "dit", "--within", "macs=0.5", "--steps", "a"), "whole numbers with commas"),
        ((place / "dit", "--within", "macs=0.5", "--samples", "9,3"), "the second larger"),
        ((place / "dit", "--within", "macs=0.5", "--labels", "1000"), "none of the network's 1000 classes"),
        ((place / "dit", "--within", "macs=0.5", "--prompts", place / "prompts.txt"), "reads no text"),
        (
            (place / "dit", "--within", "macs=0.5", "--labels", "-1"),
            "--labels -1 is none of the network's 1000 classes",
        ),
        ((place / "ddim", "--within", "macs=0.5", "--labels", "3"), "--labels 3: the network takes no labels"),
        (
            (place / "ddim", "--within", "macs=0.5", "--guidance", "7.5"),
            "--guidance 7.5: the network takes no condition",
        ),
        ((place / "sd", "--within", "macs=0.5"), "give --prompts FILE"),
        ((place / "dit", "--within", "macs=0.001", *QUICK), "macs_share"),
        ((place / "ddim", "--within", "macs=0.6", "--start", place / "out" / "schedule.json", *QUICK), "search anew"),
        ((place / "dit", "--within", "macs=0.6", "--start", place / "prompts.txt"), "cannot be read"),
        ((place / "dit", "--within", "macs=0.6", "--steps", "2000"), "2000 steps .* more than the 1000 timesteps"),
        ((place / "dit", "--within", "macs=0.6", "--steps", "6,2000"), "2000 steps .* more than the 1000 timesteps"),
        ((place / "dit", "--within", "macs=0.6", "--batch", "8"), "--batch 8 is of calls that are timed"),
        ((place / "dit", "--within", "macs=0.6", "--full-steps", "2000"), "2000 steps .* more than the 1000 timesteps"),
    ):
        refused(nas("tune", *arguments, "--out", place / "refused", "--to", place / "nothing"), message)
    assert not (place / "refused" / "6-macs-0.6" / "journal.log").exists(), "nothing was searched before"


def test_a_search_whose_schedules_cannot_be_confirmed_there_is_refused_before_it(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A schedule that was given widens the space of what is confirmed, and not of what is searched without it."""
    monkeypatch.setattr("nas.tuning.tune.FAR", 10.0)
    start = read_file(place / "out" / "schedule.json")
    steps = [{**step, "reuse": ["b1"] if number else []} for number, step in enumerate(start["steps"][:3])]
    measured = {**start["measured"], "loss": 10 * start["measured"]["apart"]}
    assert not tune(quick(place / "dit"), tmp_path, start={**start, "steps": steps, "measured": measured}).searched
    with pytest.raises(UserError, match="was written for something else: space"):
        tune(quick(place / "dit"), tmp_path)
    assert {info.searcher for info, _ in read_ledgers(open_storage(tmp_path))} == {"confirmed"}


def test_nothing_of_somebody_elses_is_overwritten(place: Path, tmp_path: Path) -> None:
    common = ("tune", place / "dit", "--within", "macs=0.6", *QUICK, "--out", place / "run", "-q")
    other = tmp_path / "exported"
    other.mkdir()
    (other / "schedule.json").write_text('{"steps": []}')
    for folder in (place / "dit", other):
        refused(nas(*common, "--to", folder), "would be overwritten; give another --to")
    assert (other / "schedule.json").read_text() == '{"steps": []}'
    by_hand = tmp_path / "by-hand"
    by_hand.mkdir()
    (by_hand / "cache_dit.yaml").write_text("mine")
    refused(nas(*common, "--to", by_hand), r"holds a cache_dit\.yaml without a schedule\.json")
    assert [file.name for file in by_hand.iterdir()] == ["cache_dit.yaml"]
    reported = tmp_path / "reported"
    reported.mkdir()
    (reported / "report.html").write_text("mine")
    refused(nas(*common, "--to", reported), r"holds a report\.html without a schedule\.json")
    mine = tmp_path / "mine.py"
    mine.write_text("# changed by hand\n")
    for kept in (0, 1, 1):
        done = nas(*common, "--to", tmp_path / "out", "--write-study", mine)
        assert done.returncode == 0, done.stderr
        assert len([*tmp_path.glob("mine.before*")]) == 1
        assert len([*(tmp_path / "out").glob("study.before*")]) == kept
        if not kept:
            (tmp_path / "out" / "study.py").write_text("# changed by hand\n")
    assert (tmp_path / "mine.before.py").read_text() == "# changed by hand\n"
    assert (tmp_path / "out" / "study.before.py").read_text() == "# changed by hand\n"


def test_the_dearest_schedule_of_each_rule_is_that_of_trying_all(place: Path) -> None:
    wanted = quick(place / "dit")
    study = wanted.study({"macs_share": 0.6})
    space: Any = study.space
    tried = []
    for schedules in baselines(wanted).values():
        genomes = (space.genome(space.running(pattern, stop)) for pattern, stop in schedules)
        tried += [*itertools.islice(filter(study.problem.feasible, genomes), 1)]
    assert within(study, place / "run", baselines(wanted)) == tried
    assert len(tried) > 2


# --------------------------------------------------------------------------------------------------------- the study


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # of the stock scheduler asked here
def test_the_full_pipeline_is_the_folders_own(place: Path, tmp_path: Path) -> None:
    wanted = Wanted(place / "dit", "macs", 0.5, steps=10)
    euler = {name: value for name, value in LINEAR.items() if name != "clip_sample"}
    stock = DDIMScheduler(**LINEAR)
    stock.set_timesteps(10)
    assert wanted.grid(10) == tuple(stock.timesteps.tolist())
    assert wanted.scale == 4.0
    assert replace(wanted, guidance=1.0).scale is None
    with pytest.raises(UserError, match=r"--guidance 0\.5: .*give 1 or more"):
        replace(wanted, guidance=0.5)
    assert replace(wanted, guidance=1.5).scale == 1.5
    assert type(wanted.sampler).__name__ == "DDIM"
    assert Wanted(place / "ddim", "macs", 0.5).scale is None
    pixart(tmp_path / "pixart")
    multistep = Wanted(tmp_path / "pixart", "macs", 0.5, prompts=place / "prompts.txt")
    assert type(multistep.sampler).__name__ == "DPMSolver"
    assert multistep.study({}).space.choices[0].options[-1] == "whole"
    assert multistep.patterns[-1] == LeftOut()  # not a prediction that is held
    own = DPMSolverMultistepScheduler.from_pretrained(tmp_path / "pixart" / "scheduler")
    own.set_timesteps(10)
    assert multistep.grid(10) == tuple(own.timesteps.tolist())
    own.register_to_config(use_karras_sigmas=True, solver_type="heun")
    own.save_pretrained(tmp_path / "pixart" / "scheduler")
    odd = replace(multistep)
    assert odd.grid(10) == multistep.grid(10)
    assert odd.stepped_by == "by DPM-Solver++ without its use_karras_sigmas and solver_type"
    shutil.copytree(place / "ddim", tmp_path / "pixels")
    DPMSolverMultistepScheduler.from_config(DDIMScheduler(clip_sample=True).config).save_pretrained(
        tmp_path / "pixels" / "scheduler"
    )
    assert Wanted(tmp_path / "pixels", "macs", 0.5).sampler.clip is False  # as the stock scheduler, which does not
    assert Wanted(place / "ddim", "macs", 0.5).sampler.clip is False  # its config says so
    DDIMScheduler(thresholding=True, clip_sample_range=2.0).save_pretrained(tmp_path / "pixels" / "scheduler")
    assert (
        Wanted(tmp_path / "pixels", "macs", 0.5).stepped_by == "by DDIM without its thresholding and clip_sample_range"
    )
    shutil.copytree(place / "dit", tmp_path / "euler")
    EulerDiscreteScheduler(**euler).save_pretrained(tmp_path / "euler" / "scheduler")
    instead = Wanted(tmp_path / "euler", "macs", 0.5)
    assert instead.stepped_by == "by DDIM in place of its EulerDiscreteScheduler"
    own = EulerDiscreteScheduler(**euler)
    own.set_timesteps(10)
    assert instead.grid(10) == tuple(own.timesteps.round().int().tolist())
    assert instead.rival_grid(10) == (999, 899, 799, 699, 599, 500, 400, 300, 200, 100)  # linspace, as Euler's
    how = usage(replace(found_of((0.01, 0.2)), wanted=instead), tmp_path, tmp_path)
    assert "from diffusers import DDIMScheduler\n" in how
    assert "pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)" in how
    shutil.copytree(place / "sd", tmp_path / "sd")
    (tmp_path / "sd" / "scheduler" / "scheduler_config.json").unlink()
    DDIMScheduler(**{**LINEAR, "clip_sample": True}).save_pretrained(tmp_path / "sd" / "scheduler")
    steady = Wanted(tmp_path / "sd", "macs", 0.5)
    assert steady.grid(10) == tuple(t + 1 for t in wanted.grid(10)), "as StableDiffusionPipeline sets its scheduler"
    assert steady.stepped_by == "by DDIM"
    some = replace(wanted)
    object.__setattr__(some, "exported", {"guided_channels": 3})
    with pytest.raises(UserError, match=r"guides 3 channels alone, which schedule\.json cannot say"):
        some.check()
    LCMScheduler().save_pretrained(tmp_path / "euler" / "scheduler")
    with pytest.raises(UserError, match=r"LCMScheduler, as networks do that were distilled to a few steps.* No gain"):
        Wanted(tmp_path / "euler", "macs", 0.5).check()


def test_sets_of_blocks_go_from_the_least_to_the_most() -> None:
    assert sets(TransformerGraph(2)) == ((AROUND,), ("b0",), ("b0.mlp", "b1.mlp"), ("b0.attn", "b1.attn"))
    assert sets(UNetGraph((1, 1))) == (("u1",), ("d0", "u1"))
    four = sets(UNetGraph((2, 2, 2, 2)))
    assert four[0] == ("u3",)
    assert four[-1] == ("d0", "d1", "d2", "u1", "u2", "u3")
    assert len(four) == 3


def found_of(losses: tuple[float, float], apart: float = 1.0) -> Found:
    """The best and fewer steps, of so much loss each."""

    def candidate(loss: float, reuse: tuple[str, ...]) -> Candidate:
        pairs = tuple(loss + 0.001 * ((n % 3) - 1) for n in range(20))
        steps = (Step(9, ("a",)), Step(5, ("a",), reuse))
        return Candidate("", Schedule(steps), 0.5, Score({"teacher_mse": loss}, {"teacher_mse": pairs}))

    best, fewer = candidate(losses[0], ("b0",)), candidate(losses[1], ())
    wanted = Wanted(Path("none"), "macs", 0.5, steps=4)
    study: Any = None
    return Found(wanted, study, best, fewer, None, None, apart, 10, {})


def test_the_verdict_is_in_words() -> None:
    assert found_of((0.01, 0.2)).verdict[0].startswith("A schedule of 2 steps, 1 of which reuse blocks, takes 50%")
    level = found_of((0.2, 0.2))
    assert level.chosen == level.fewer
    assert level.verdict[0].startswith("Reuse adds nothing here that is beyond the error: take 2 of the 4 steps")
    assert found_of((0.5, 0.6)).verdict[0].startswith("No gain: keep 4 steps.")
    far = found_of((0.2502, 0.2504))
    near = replace(far.best, name="another sampler", score=found_of((0.2499, 0.0)).best.score)
    rescued = replace(far, rival=near)
    assert far.far
    assert (rescued.chosen, rescued.far) == (near, False), "near, where all others are too far"
    between = found_of((0.2497, 0.2503))
    assert between.fewer is not None
    turned = tuple(0.2503 + 0.001 * ((n + 1) % 3 - 1) for n in range(20))
    fewer = replace(between.fewer, score=Score({"teacher_mse": 0.2503}, {"teacher_mse": turned}))
    between = replace(between, fewer=fewer)  # which the error does not tell apart
    assert not between.gains
    assert between.chosen == between.best
    assert between.verdict[0].startswith("A schedule of 2 steps")
    assert "is not shown, but these are too far" in between.verdict[0]
    assert "loses 0.05 times as much" in found_of((0.01, 0.2)).verdict[1]
    assert "loses more; the difference" in found_of((0.01, 0.0)).verdict[1]
    assert "loses as much; the difference" in found_of((0.0, 0.0)).verdict[1]


def test_a_schedule_moves_to_other_steps_and_guidance(place: Path) -> None:
    plan = json.loads((place / "out" / "schedule.json").read_text())
    same = given_schedule(Wanted(place / "dit", "macs", 0.6, steps=6), plan)
    assert same.timesteps == tuple(step["timestep"] for step in plan["steps"])
    wanted = Wanted(place / "dit", "macs", 0.6, steps=12, guidance=2.0)
    moved = given_schedule(wanted, plan)
    assert set(moved.timesteps) <= set(wanted.grid(12))
    assert {step.guidance for step in moved.steps} <= {None, Guidance(2.0)}
    with pytest.raises(UserError, match="search anew"):
        given_schedule(Wanted(place / "ddim", "macs", 0.6), plan)


@pytest.mark.parametrize("reuse", [["b1", "b0"], ["b0.mlp", "b0.attn", "b1"], ["b1.attn", "b0", "b1.mlp"]])
def test_a_schedule_may_name_what_it_reuses_as_it_likes(reuse: list[str], place: Path) -> None:
    plan = json.loads((place / "out" / "schedule.json").read_text())
    timesteps = Wanted(place / "dit", "macs", 0.6, steps=6).grid(6)
    like = {"guided": False, "alpha": 0.5}
    told = {**plan, "steps": [{**like, "timestep": t, "reuse": reuse * (n == 2)} for n, t in enumerate(timesteps)]}
    told["measured"] = {"grid": timesteps}
    given = given_schedule(Wanted(place / "dit", "macs", 0.6, steps=6), told)
    assert given.steps[2].reuse == ("b0", "b1")
    wanted = Wanted(place / "dit", "macs", 0.6, steps=6, further=(("b2",),))
    space: Any = wanted.study({"macs_share": 0.6}).space
    assert space.decode(space.genome(given)) == given


def test_a_schedule_of_parts_of_blocks_is_not_taken_for_one_of_blocks(place: Path) -> None:
    wanted = Wanted(place / "ddim", "macs", 0.6, steps=3)
    graph, timesteps = wanted.graph, wanted.grid(3)
    plan = {
        "sampler": {"class": "DDIM"},
        "network": {"class": "UNet2DModel", "branches": [*graph.names(True)]},
        "guidance_scale": None,
        "measured": {},
    }

    def of(*reuse: str) -> dict[str, Any]:
        steps = [{"timestep": t, "guided": False, "reuse": [*reuse] * (n == 1)} for n, t in enumerate(timesteps)]
        return {**plan, "steps": steps}

    assert given_schedule(wanted, of("u0", "mid", "d1")).steps[1].reuse == ("d1", "mid", "u0")
    # Whose outputs nobody else reads.
    assert given_schedule(wanted, of("u0.1")).steps[1].reuse == ("d1", "mid", "u0")
    with pytest.raises(UserError, match=r"reuses u0\.0 at a step, where the blocks d0, d1, mid, u0, u1 are searched"):
        given_schedule(wanted, of("u0.0"))


def test_a_network_alone_can_be_tuned(place: Path) -> None:
    assert Wanted(place / "ddim" / "unet", "macs", 0.5).kind == ""
    assert isinstance(Wanted(place / "ddim" / "unet", "macs", 0.5).net, Elastic)
