"""Class-conditional networks: who sample i is, label dropout, scores that ask for classes, folders that are exported and trained with labels."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file

from evaluators.agreement import Agreement
from evaluators.conditions import Labels
from evaluators.features import SmallClassifier
from evaluators.frechet import Frechet
from evaluators.images import Digits
from evaluators.proxies import Additive
from evaluators.sampling import DDIM, DPMSolver, sample
from evaluators.scoring import Scores
from nas.base.exported import ExportError, read_export
from nas.base.pictures import PictureError
from nas.contracts import ImageSet, UserError
from nas.handover.export import export
from nas.recipes import recipe
from nas.results.samples import class_by_class
from nas.study import Study
from nas.testing import check_evaluator
from search_spaces.intervals import uniform
from search_spaces.loaded import LoadedElastic
from search_spaces.shipped.train_data import folder_labels
from search_spaces.shipped.train_diffusers import Settings, train
from search_spaces.stepwise import Stepwise
from search_spaces.supernet import WEIGHTS, Elastic
from search_spaces.training import Sandwich
from search_spaces.training.optimiser import Batches
from tests.arithmetic import SAMPLES
from tests.conftest import TINY
from tests.labelled import CLASSES, NET, SCHEDULES, SPACES
from tests.test_cli import nas
from tests.toy import ToyEvaluator

ROOT = Path(__file__).parent.parent


@given(st.integers(0, 99), st.integers(0, 4000), st.integers(1, 300))
def test_the_label_of_a_sample_depends_on_seed_and_place_alone(seed: int, start: int, count: int) -> None:
    labels = Labels(Digits()).load()
    rows = labels.of(seed, start, start + count)["class_labels"]
    middle = start + count // 2
    parts = [labels.of(seed, *span)["class_labels"] for span in ((start, middle), (middle, start + count))]
    assert torch.equal(torch.cat(parts), rows)


def test_every_image_is_met_once_before_any_is_met_again_and_classes_are_spread_evenly() -> None:
    data = Digits().load()
    assert data.labels is not None
    count, labels = len(data), Labels(Digits()).load()
    real = np.bincount(data.labels, minlength=CLASSES)
    for seed, number in ((0, 0), (0, 1), (7, 0)):
        rows = labels.of(seed, number * count, (number + 1) * count)["class_labels"].numpy()
        assert np.array_equal(np.bincount(rows, minlength=CLASSES), real)
        for start in range(0, count - 100, 50):
            here = np.bincount(rows[start : start + 100], minlength=CLASSES)
            assert np.abs(here - 100 * real / count).max() < 2, (
                "of n evenly spread places one more or less falls into a window"
            )
    first, second, other = (
        labels.of(seed, start, start + 200)["class_labels"] for seed, start in ((0, 0), (0, count), (1, 0))
    )
    assert not torch.equal(first, second)
    assert not torch.equal(first, other)


def test_images_without_labels_condition_nothing() -> None:
    class Bare(Digits):
        def load(self) -> ImageSet:
            return replace(super().load(), labels=None)

    with pytest.raises(UserError, match="have no labels to condition samples on"):
        Labels(Bare()).load()


def test_agreement_is_the_share_that_the_judge_puts_into_their_class(labelled_run: Path) -> None:
    images = Digits()
    data, labels = images.load(), Labels(images)
    evaluator = Agreement(images, rungs=(32, 64), conditions=labels)
    check_evaluator(evaluator, NET, SPACES["guidance and width"], labelled_run)
    loaded = evaluator.load(NET.load(labelled_run / "supernet", "cpu"), labelled_run)
    classify = SmallClassifier().classifier(labelled_run, torch.device("cpu"))
    with torch.inference_mode():
        real = classify(torch.from_numpy(data.pixels)).argmax(1).numpy()
        seen = classify(loaded.sample(SCHEDULES["guided in the middle"], 64, 5)).argmax(1)
    assert (real == data.labels).mean() > 0.9, "the judge knows real digits"
    asked = labels.load().of(5, 0, 64)["class_labels"]
    score = loaded(SCHEDULES["guided in the middle"], 64, 5)
    assert score.values["disagreement"] == pytest.approx(float((seen != asked).double().mean()))
    with pytest.raises(UserError, match=r"give it conditions=Labels\(images\)"):
        Agreement(images)


@recipe
class Relabelled:
    """Digits that somebody else numbered, or nobody."""

    classes: int

    def load(self) -> ImageSet:
        images = Digits().load()
        assert images.labels is not None
        labels = images.labels % self.classes if self.classes else None
        return replace(images, labels=labels, digest=f"digits in {self.classes}")


def test_agreement_by_a_judge_that_knows_no_such_classes_is_refused(tmp_path: Path) -> None:
    labels = Labels(Digits())
    unlabelled = Agreement(Relabelled(0), rungs=(32, 64), conditions=labels)
    for check in (unlabelled.check, lambda: list(unlabelled.prepare(tmp_path, 0, "cpu"))):
        with pytest.raises(UserError, match=r"have no labels, by which a judge learns"):
            check()
    fewer = Agreement(Relabelled(7), rungs=(32, 64), conditions=labels)
    with pytest.raises(UserError, match="asks for class 9, and the judge's images have the classes 0 to 6"):
        list(fewer.prepare(tmp_path, 0, "cpu"))


def test_several_scores_of_the_same_samples_cost_their_samples_once(labelled_run: Path) -> None:
    images = Digits()
    labels = Labels(images)
    parts = (Frechet(images, rungs=(32, 64), conditions=labels), Agreement(images, rungs=(32, 64), conditions=labels))
    both = Scores(parts)
    check_evaluator(both, NET, SPACES["guidance and width"], labelled_run)
    fresh = [part.load(NET.load(labelled_run / "supernet", "cpu"), labelled_run) for part in (both, *parts)]
    together, fd, disagreement = (loaded(SCHEDULES["reused"], 32, 0) for loaded in fresh)
    assert together.values == {**fd.values, **disagreement.values}
    assert together.replicates == {**fd.replicates, **disagreement.replicates}
    assert (together.spent["calls"], together.spent["macs"]) == (fd.spent["calls"], fd.spent["macs"])
    assert together.charged_in_full().spent["macs"] == fd.charged_in_full().spent["macs"]
    with pytest.raises(UserError, match="parts of Scores have the rungs"):
        Scores((parts[0], replace(parts[1], rungs=(16,))))
    with pytest.raises(UserError, match="each may stand there once"):
        Scores((parts[0], parts[0]))


def test_labels_are_dropped_by_the_steps_own_generator(labelled: LoadedElastic) -> None:
    data = Digits().load()
    generators = [torch.Generator().manual_seed(3) for _ in range(2)]
    x0, kept = Batches(labelled, data, 2000, flip=False).images(generators[0])
    again, dropped = Batches(labelled, data, 2000, flip=False, drop=0.25).images(generators[1])
    assert torch.equal(x0, again)
    assert kept is not None
    assert dropped is not None
    null = dropped["class_labels"] == CLASSES
    assert float(null.float().mean()) == pytest.approx(0.25, abs=4 * (0.25 * 0.75 / 2000) ** 0.5)
    assert torch.equal(dropped["class_labels"][~null], kept["class_labels"][~null])


def test_a_stopped_training_ends_as_the_uninterrupted_one(labelled_run: Path, tmp_path: Path) -> None:
    training = Sandwich(steps=12, batch=16, warmup=2, checkpoint_every=5)
    stopped = training.run(NET, Digits(), tmp_path, 0, "cpu")
    for _ in range(7):
        next(stopped)
    stopped.close()  # type: ignore[attr-defined]
    for _ in training.run(NET, Digits(), tmp_path, 0, "cpu"):
        pass
    first, second = (
        NET.read(folder / WEIGHTS, "cpu").full.state_dict() for folder in (labelled_run / "supernet", tmp_path)
    )
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_recipes_of_networks_without_labels_are_described_as_ever() -> None:
    assert "drop" not in Sandwich(steps=1).describe()
    assert Sandwich(steps=1, drop=0.2).describe()["drop"] == 0.2
    assert "conditions" not in Frechet(Digits()).describe()
    assert "guidance" not in Stepwise(NET, uniform(2), (1, 1)).describe()


@pytest.mark.parametrize(
    ("embeds", "conditions", "message"),
    [
        (CLASSES + 1, None, r"give the evaluator conditions=Labels\(images\)"),
        (None, Labels(Digits()), "takes no conditions; leave out"),
    ],
)
def test_a_study_whose_parts_disagree_on_conditions_is_refused(
    embeds: int | None, conditions: Any, message: str, tiny_study: Study
) -> None:
    net = Elastic({**TINY, "num_class_embeds": embeds}, (0.5, 1.0))
    space = replace(tiny_study.space, net=net)  # type: ignore[type-var]
    with pytest.raises(UserError, match=message):
        replace(tiny_study, supernet=net, space=space, evaluator=Frechet(Digits(), conditions=conditions))


def test_proxies_ask_for_the_same_conditions(tiny_study: Study) -> None:
    """Before anything is trained for an audit that could score nothing."""
    net = Elastic({**TINY, "num_class_embeds": CLASSES + 1}, (0.5, 1.0))
    space, labels = replace(tiny_study.space, net=net), Labels(Digits())  # type: ignore[type-var]
    fine = Frechet(Digits(), rungs=(8,), conditions=labels)
    study = replace(tiny_study, supernet=net, space=space, evaluator=Frechet(Digits(), conditions=labels))
    replace(study, proxies={"few": fine, "sum": Additive(fine, (1, 1, 1, 1))})
    plain = Frechet(Digits(), rungs=(8,))
    for proxy, words in ((plain, ""), (Additive(plain, (1, 1, 1, 1)), ", or what it is made of,")):
        with pytest.raises(UserError, match=rf"give proxy few{words} conditions=Labels\(images\)"):
            replace(study, proxies={"few": proxy})
    toy = ToyEvaluator(rungs=(8,))  # asks for no samples
    replace(study, proxies={"toy": toy, "sum": Additive(toy, (1, 1, 1, 1))})


def test_labels_that_the_network_has_no_room_for_are_refused() -> None:
    few = Elastic({**TINY, "num_class_embeds": CLASSES}, (0.5, 1.0))
    with pytest.raises(
        UserError, match="and the network knows 9 classes and one of none; set num_class_embeds to 11 or more"
    ):
        Sandwich(steps=1).check(few, Digits().load())
    with pytest.raises(UserError, match="use images with labels"):
        Sandwich(steps=1).check(NET, replace(Digits().load(), labels=None))


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("sampler", [DDIM(), DPMSolver()], ids=lambda sampler: type(sampler).__name__)
def test_an_exported_folder_samples_the_classes_asked_for_as_ours(
    name: str, sampler: Any, labelled: LoadedElastic, tmp_path: Path
) -> None:
    folder, conditions = str(tmp_path / "model"), Labels(Digits()).load()
    export(labelled, SCHEDULES[name], sampler.describe(), {}, Path(folder))
    read_export(Path(folder))
    pipeline = DiffusionPipeline.from_pretrained(folder, custom_pipeline=folder, trust_remote_code=True)
    labels = conditions.of(0, 0, 6)["class_labels"]
    images = pipeline(class_labels=labels, seed=0, output_type="pt").images * 2 - 1
    assert torch.allclose(images, sample(labelled, SCHEDULES[name], sampler, 0, 0, 6, conditions), atol=SAMPLES)
    others = pipeline(class_labels=[0] * 6, seed=0, output_type="pt").images * 2 - 1
    assert not torch.allclose(images, others, atol=1e-2)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"batch_size": 2}, "need class_labels, one from 0 to 9"),
        ({"batch_size": 3, "class_labels": [1, 2]}, "2 class_labels for 3 images"),
        ({"class_labels": [1, 11]}, "from 0 to 9, or 10 for no class"),
        ({"class_labels": []}, "give one for each"),
    ],
)
def test_labels_that_a_pipeline_cannot_draw_are_refused(
    asked: dict[str, Any], message: str, labelled: LoadedElastic, tmp_path: Path
) -> None:
    folder = str(tmp_path / "model")
    export(labelled, SCHEDULES["unguided"], DDIM().describe(), {}, Path(folder))
    pipeline = DiffusionPipeline.from_pretrained(folder, custom_pipeline=folder, trust_remote_code=True)
    with pytest.raises(ValueError, match=message):
        pipeline(**asked)


@pytest.mark.parametrize(
    "guidance", [{"scale": "2", "model": "unet_1"}, {"scale": 2.0, "model": "../unet_1"}, {"scale": 2.0}, 3]
)
def test_guidance_of_an_exported_folder_is_not_trusted(guidance: Any, labelled: LoadedElastic, tmp_path: Path) -> None:
    export(labelled, SCHEDULES["guided by the half"], DDIM().describe(), {}, tmp_path / "model")
    plan = json.loads((tmp_path / "model" / "schedule.json").read_text())
    assert plan["steps"][0]["guidance"] == {"scale": 2.5, "model": "unet_1", "arch": [[0.5, 0.5], [], [], ""]}
    assert plan["null_label"] == CLASSES
    plan["steps"][0]["guidance"] = guidance
    (tmp_path / "model" / "schedule.json").write_text(json.dumps(plan))
    with pytest.raises(ExportError):
        read_export(tmp_path / "model")


def test_guidance_of_networks_without_labels_is_refused(labelled: LoadedElastic, tmp_path: Path) -> None:
    export(labelled, SCHEDULES["guided by the half"], DDIM().describe(), {}, tmp_path / "model")
    plan = json.loads((tmp_path / "model" / "schedule.json").read_text())
    del plan["null_label"]
    (tmp_path / "model" / "schedule.json").write_text(json.dumps(plan))
    with pytest.raises(ExportError, match="guides steps of networks that take no labels"):
        read_export(tmp_path / "model")


@pytest.mark.long
def test_exported_networks_are_trained_with_labels_and_resume_exactly(labelled: LoadedElastic, tmp_path: Path) -> None:
    data = Digits().load()
    settings = Settings(steps=12, batch=8, warmup=2, checkpoint_every=3)
    weights = "diffusion_pytorch_model.safetensors"
    found = []
    for name, stop in (("whole", 99), ("parts", 4)):
        folder = tmp_path / name
        export(labelled, SCHEDULES["guided by the half"], DDIM().describe(), {}, folder)
        ticks = train(folder, data.pixels, settings, cpu=True, labels=data.labels)
        for _, _ in zip(range(stop), ticks, strict=False):
            pass
        ticks.close()
        list(train(folder, data.pixels, settings, cpu=True, labels=data.labels))
        found.append({path.name: load_file(path / weights) for path in sorted((folder / "trained").glob("unet_*"))})
    assert [*found[0]] == ["unet_0", "unet_1"], "the network that guides is trained too"
    for network in found[0]:
        assert all(torch.equal(found[0][network][name], found[1][network][name]) for name in found[0][network])
    before = load_file(tmp_path / "whole" / "unet_0" / weights)
    assert (before["class_embedding.weight"] != found[0]["unet_0"]["class_embedding.weight"]).any()


@pytest.mark.parametrize("labels", [None, np.full(1797, CLASSES), np.full(1797, -1)])
def test_networks_with_labels_are_trained_on_images_with_labels(
    labels: Any, labelled: LoadedElastic, tmp_path: Path
) -> None:
    export(labelled, SCHEDULES["unguided"], DDIM().describe(), {}, tmp_path / "model")
    with pytest.raises(ExportError, match="need a label from 0 to 9 for each image"):
        next(train(tmp_path / "model", Digits().load().pixels, Settings(), cpu=True, labels=labels))


def test_a_compiled_network_holds_what_it_predicted(labelled: LoadedElastic, tmp_path: Path) -> None:
    """At a guided step that does not run."""
    export(labelled, SCHEDULES["reused"], DDIM().describe(), {}, tmp_path / "model")
    folder = str(tmp_path / "model")
    pipeline: Any = DiffusionPipeline.from_pretrained(folder, custom_pipeline=folder, trust_remote_code=True)
    made = [pipeline(class_labels=labels, seed=1, output_type="pt").images for labels in ([3], [1, 2])]
    pipeline.unet_0 = torch.compile(pipeline.unet_0, backend="eager")
    for labels, images in zip(([3], [1, 2]), made, strict=True):
        again = pipeline(class_labels=labels, seed=1, output_type="pt").images
        assert torch.allclose(again, images, atol=1e-5)


def test_folders_are_classes_where_asked(tmp_path: Path) -> None:
    for name, count in (("b", 2), ("a", 1)):
        (tmp_path / name).mkdir()
        for i in range(count):
            Image.new("L", (8, 8)).save(tmp_path / name / f"{i}.png")
    assert folder_labels(tmp_path).tolist() == folder_labels(tmp_path, 2).tolist() == [0, 1, 1]
    with pytest.raises(PictureError, match="has pictures in 2 folders, and the networks take 10 classes"):
        folder_labels(tmp_path, 10)
    Image.new("L", (8, 8)).save(tmp_path / "c.png")
    with pytest.raises(PictureError, match="lies in no class's folder"):
        folder_labels(tmp_path)


STUDY = """
from dataclasses import replace
from evaluators.agreement import Agreement
from evaluators.conditions import Labels
from evaluators.frechet import Frechet
from evaluators.proxies import DenoisingLoss, TeacherFrechet
from evaluators.scoring import Scores
from nas.searchers.knapsack import Knapsack
from nas.searchers.routing import Routing
from nas.searchers.relaxation import Relaxation
from search_spaces.training import Sandwich
from studies.digits_classes import images, labels, study as digits

settings = {"rungs": (32, 64), "conditions": labels}
study = replace(
    digits,
    training=Sandwich(steps=30, batch=16),
    evaluator=Scores((Frechet(images, **settings), Agreement(images, **settings))),
    searchers={**digits.searchers, "knapsack": Knapsack(), "routing": Routing(warm_start=Relaxation(steps=3, batch=4))},
    trials=5,
    verified=2,
    proxies={"loss": DenoisingLoss(images, rungs=(32,), conditions=labels), "teacher": TeacherFrechet(images, rungs=(32,), conditions=labels)},
)
"""


def test_samples_are_shown_class_by_class() -> None:
    asked = Labels(Digits()).load().of(3, 0, 40)["class_labels"].numpy()
    images = asked[:, None, None, None].astype(np.float32)
    shown = class_by_class(images, Frechet(Digits(), conditions=Labels(Digits())), 3)
    assert shown.ravel().tolist() == sorted(asked.tolist())
    assert class_by_class(images, Frechet(Digits()), 3) is images


@pytest.mark.long
def test_a_class_conditional_study_goes_all_the_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study, run, model = tmp_path / "study.py", tmp_path / "run", tmp_path / "model"
    study.write_text(STUDY)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.syspath_prepend(str(ROOT))
    for command in (
        ("run", study, "--dry-run", "--out", run),
        ("run", study, "--searcher", "evolution,knapsack,routing", "--out", run, "-q"),
        ("compare", run),
        ("report", study, "--out", run),
        ("audit", study, "--schedules", 20, "--out", run, "-q"),
        ("export", study, "--within", "macs_share=0.5", "--to", model, "--out", run),
        ("sample", study, "--within", "macs_share=0.5", "--to", tmp_path / "samples.png", "--count", 20, "--out", run),
        ("sample", study, "--within", "macs_share=0.5", "--to", tmp_path / "samples.npy", "--count", 20, "--out", run),
        ("train", model, "--steps", 12, "--study", study, "--out", run, "-q"),
    ):
        done = nas(*command)
        assert done.returncode == 0, (command, done.stderr)
    alone = subprocess.run(
        [sys.executable, "sample.py", "--count", "12", "--labels", "3", "7"],
        cwd=model / "trained",
        capture_output=True,
        text=True,
        check=False,
    )
    assert alone.returncode == 0, alone.stderr
    page = (Path(run) / "report" / "index.html").read_text()
    assert "1,438 to 359 images" in page
    assert page.count("nearer to a train image than") == 2
    told = json.loads((model / "provenance.json").read_text())
    assert set(told["confirmed"]["values"]) == {"fd", "disagreement"}
    folder = str(model)
    pipeline = DiffusionPipeline.from_pretrained(folder, custom_pipeline=folder, trust_remote_code=True)
    asked = Labels(Digits(holdout=0.2)).load().of(0, 0, 20)["class_labels"]
    images = pipeline(class_labels=asked, seed=0, output_type="pt").images * 2 - 1
    assert torch.allclose(images, torch.from_numpy(np.load(tmp_path / "samples.npy")), atol=SAMPLES)
