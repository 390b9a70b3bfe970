from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
import yaml
from diffusers import DiffusionPipeline, ModelMixin
from PIL import Image

from evaluators.sampling import DDIM, DDPM, sample
from nas.contracts import Schedule, Step, UserError
from nas.handover.export import PROGRAM, export
from nas.library import open_run
from nas.study import Study
from search_spaces.networks.slices import Arch
from search_spaces.supernet import Elastic
from tests.arithmetic import CALL, SAMPLES
from tests.conftest import TINY


def schedule(net: Elastic) -> Schedule:
    return Schedule((Step(900, net.uniform(0.5)), Step(400, net.uniform(1.0)), Step(50, net.uniform(0.5))))


def test_each_distinct_net_is_written_once(tiny_net: Elastic, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    export(tiny_net.initial(0), schedule(tiny_net), {"class": "DDIM", "clip": True}, {}, tmp_path / "model")
    names = sorted(path.name for path in (tmp_path / "model").iterdir())
    assert names == [
        "README.md",
        "exported.py",
        "graph.py",
        "latents.py",
        "model_index.json",
        "pictures.py",
        "pipeline.py",
        "provenance.json",
        "reuse.py",
        "sample.py",
        "schedule.json",
        "schedule.svg",
        "scheduler",
        "stepping.py",
        "texts.py",
        "train.json",
        "train_data.py",
        "train_diffusers.py",
        "unet_0",
        "unet_1",
        "walks.py",
    ]
    files = sorted(path.name for path in (tmp_path / "model" / "unet_0").iterdir())
    assert files == ["config.json", "diffusion_pytorch_model.safetensors"]


def test_a_network_of_any_size_is_one_file(tiny_net: Elastic, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """diffusers cuts those above ten gigabytes into several, Stable Diffusion XL's in float32 for one."""
    usual = ModelMixin.save_pretrained.__defaults__
    assert "10GB" in usual
    few = tuple("20KB" if one == "10GB" else one for one in usual)
    monkeypatch.setattr(ModelMixin.save_pretrained, "__defaults__", few)
    net = tiny_net.initial(0)
    net.full.save_pretrained(tmp_path / "cut")
    assert len([*(tmp_path / "cut").glob("*.safetensors")]) > 1
    export(net, schedule(tiny_net), {"class": "DDIM", "clip": True}, {}, tmp_path / "model")
    assert len([*(tmp_path / "model").glob("unet_*/*.safetensors")]) == 2


def test_a_model_that_differs_from_the_supernet_is_not_exported(
    tiny_net: Elastic, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = tiny_net.initial(0)
    extract = loaded.extract

    def wrong(arch: Any) -> Any:
        net = extract(arch)
        with torch.no_grad():
            net.conv_out.bias += 1e-4
        return net

    monkeypatch.setattr(loaded, "extract", wrong)
    with pytest.raises(RuntimeError, match="differ from the supernet"):
        export(loaded, schedule(tiny_net), {"class": "DDIM", "clip": True}, {}, tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def test_a_sampler_without_a_stand_alone_loop_is_refused(tiny_net: Elastic, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="sampler Heun has no stand-alone loop"):
        export(tiny_net.initial(0), schedule(tiny_net), {"class": "Heun"}, {}, tmp_path / "model")


def standing_alone(folder: Path, monkeypatch: pytest.MonkeyPatch) -> torch.Tensor:
    """The images that the exported README's own lines make."""
    monkeypatch.chdir(folder)
    code = re.search(r"```python\n(.*?)```", Path("README.md").read_text(), re.S)
    assert code is not None
    names: dict[str, Any] = {}
    exec(code.group(1), names)
    images: torch.Tensor = names["images"]
    return images * 2 - 1


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
def test_the_stand_alone_loop_samples_as_ours_with_step_noise(
    tiny_net: Elastic, tmp_path: Path, variance: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded, sampler = tiny_net.initial(0), DDPM(variance)
    export(loaded, schedule(tiny_net), sampler.describe(), {}, tmp_path / "model")
    images = standing_alone(tmp_path / "model", monkeypatch)
    assert torch.allclose(images, sample(loaded, schedule(tiny_net), sampler, 0, 0, 16), atol=SAMPLES)


@pytest.mark.long
def test_models_of_both_classes_and_of_experts_stand_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = {**TINY, "layers_per_block": 2}
    net = Elastic(config, (0.5, 1.0), depths=(1, 2), per_level=("width", "depth"), experts=(500,))
    loaded = net.initial(0)
    for seed, name in enumerate(net.expert_names, 1):
        loaded.experts[name] = net.initial(seed).full
    archs = (Arch((0.5, 1.0), (1, 2), (), "500-999"), net.uniform(1.0).replace(expert="0-499"))
    both = Schedule((Step(900, archs[0]), Step(400, archs[1])))
    assert export(loaded, both, DDIM().describe(), {}, tmp_path / "model", programs=True) == {}
    x, t = torch.randn(3, *loaded.state_shape), torch.full((3,), 400)
    program = torch.export.load(tmp_path / "model" / "unet_1" / PROGRAM).module()
    with torch.inference_mode():
        expected, _ = loaded.denoiser(both.steps[1])(x, 400)
        assert torch.allclose(program(x, t), expected, atol=CALL)
        program = torch.export.load(tmp_path / "model" / "unet_0" / PROGRAM).module()
        expected, _ = loaded.denoiser(Step(400, archs[0]))(x, 400)
        assert torch.allclose(program(x, t), expected, atol=CALL)
    kinds = [
        json.loads(path.read_text())["_class_name"] for path in sorted((tmp_path / "model").glob("unet_*/config.json"))
    ]
    assert kinds == ["UNet2DConditionModel", "UNet2DModel"]
    images = standing_alone(tmp_path / "model", monkeypatch)
    assert torch.allclose(images, sample(loaded, both, DDIM(), 0, 0, 16), atol=SAMPLES)


def test_a_network_that_makes_no_program_is_exported_without(
    tiny_net: Elastic, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any, **settings: Any) -> None:
        raise RuntimeError("cannot be traced\nbecause of this and that")

    monkeypatch.setattr(torch.export, "export", fail)
    failed = export(tiny_net.initial(0), schedule(tiny_net), DDIM().describe(), {}, tmp_path / "model", programs=True)
    assert set(failed.values()) == {"RuntimeError: cannot be traced"}
    assert sorted(failed) == sorted(path.name for path in (tmp_path / "model").glob("unet_*"))
    assert not list((tmp_path / "model").glob("*/model.pt2"))


COPY = """
import sys
import torch
from diffusers import DiffusionPipeline
torch.set_num_threads(1)
pipeline = DiffusionPipeline.from_pretrained(sys.argv[1], custom_pipeline=sys.argv[1], trust_remote_code=True)
torch.save(pipeline(batch_size=4, seed=0, output_type="pt").images, sys.argv[2])
"""


@pytest.mark.long
def test_a_copy_that_diffusers_saves_is_opened_as_the_original(tiny_net: Elastic, tmp_path: Path) -> None:
    export(tiny_net.initial(0), schedule(tiny_net), DDIM().describe(), {}, tmp_path / "model")
    folder = str(tmp_path / "model")
    pipeline = DiffusionPipeline.from_pretrained(folder, custom_pipeline=folder, trust_remote_code=True)
    other = schedule(tiny_net)
    alone = Schedule(tuple(replace(step, arch=other.steps[0].arch, reuse=()) for step in other.steps))
    assert len(alone.archs) < len(other.archs)
    export(tiny_net.initial(0), alone, DDIM().describe(), {}, tmp_path / "other")
    DiffusionPipeline.from_pretrained(  # diffusers keeps its code where that of the first one was
        str(tmp_path / "other"), custom_pipeline=str(tmp_path / "other"), trust_remote_code=True
    )
    pipeline.save_pretrained(tmp_path / "copy")
    shutil.rmtree(folder)
    subprocess.run([sys.executable, "-c", COPY, tmp_path / "copy", tmp_path / "images.pt"], cwd=tmp_path, check=True)
    images = torch.load(tmp_path / "images.pt", weights_only=True)
    assert torch.equal(images, pipeline(batch_size=4, seed=0, output_type="pt").images)


def test_each_folder_runs_its_own_code_and_a_copy_says_where_it_lies(
    tiny_net: Elastic, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two of different versions in one process; and what is saved, or pushed, is opened by those that look for the class in its index."""
    plan = schedule(tiny_net)
    for name in ("old", "new"):
        export(tiny_net.initial(0), plan, DDIM().describe(), {}, tmp_path / name)
    stepping = tmp_path / "new" / "stepping.py"
    stepping.write_text(stepping.read_text() + "\n\ndef update(sampler, x, *others):\n    return 0 * x, None\n")

    def opened(name: str) -> Any:
        folder = str(tmp_path / name)
        pipeline = DiffusionPipeline.from_pretrained(folder, custom_pipeline=folder, trust_remote_code=True)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    def images(pipeline: Any) -> torch.Tensor:
        found: torch.Tensor = pipeline(batch_size=2, seed=0, output_type="pt").images
        return found

    pipeline = opened("old")
    before = images(pipeline)
    assert torch.equal(images(opened("new")), torch.full_like(before, 0.5))
    assert torch.equal(images(pipeline), before), "an earlier one goes on as it is"
    assert torch.equal(images(opened("old")), before)
    pushed: dict[str, Any] = {}

    def upload(self: Any, folder: Any, *given: Any, **named: Any) -> None:
        pushed.update(json.loads((Path(folder) / "model_index.json").read_text()))

    monkeypatch.setattr(
        "diffusers.pipelines.pipeline_utils.create_repo", lambda repo, **given: SimpleNamespace(repo_id=repo)
    )
    monkeypatch.setattr(DiffusionPipeline, "_upload_folder", upload)
    pipeline.save_pretrained(str(tmp_path / "copy"), push_to_hub=True)
    assert pushed["_class_name"] == ["pipeline", "StepAwarePipeline"]
    again: Any = DiffusionPipeline.from_pretrained(str(tmp_path / "copy"), trust_remote_code=True)
    assert torch.equal(again(batch_size=2, seed=0, output_type="pt").images, before)


def test_the_readme_is_a_model_card(tiny_study: Study, tiny_run: Path, tmp_path: Path) -> None:
    run = open_run(tiny_study, tiny_run)
    best = run.best(macs_share=0.6)
    run.export(best, tmp_path / "model")
    text = (tmp_path / "model" / "README.md").read_text()
    _, front, body = text.split("---\n", 2)
    told = yaml.safe_load(front)
    assert told["library_name"] == "diffusers"
    assert told["pipeline_tag"] == "unconditional-image-generation"
    assert "step-aware" in told["tags"]
    assert f"| {best.trial.cost['macs_share']:.1%} |" in body
    score = best.trial.score
    assert score is not None
    assert (
        f"{score.labels['fd']}, noises that verified leaders | {score.values['fd']:.4g} ± {score.error('fd'):.2g}"
        in body
    )
    assert "`Digits`" in body
    picture = ElementTree.parse(tmp_path / "model" / "schedule.svg").getroot()
    steps = json.loads((tmp_path / "model" / "schedule.json").read_text())["steps"]
    titles = [title.text or "" for title in picture.iter("{http://www.w3.org/2000/svg}title")]
    assert [int(re.findall(r"t = (\d+)", title)[0]) for title in titles] == [step["timestep"] for step in steps]
    heights = [float(bar.attrib["height"]) for bar in picture.iter("{http://www.w3.org/2000/svg}rect") if len(bar)]
    shares = [int(re.findall(r"(\d+)% of", title)[0]) for title in titles]
    assert np.argsort(heights, kind="stable").tolist() == np.argsort(shares, kind="stable").tolist()
    for name in re.findall(r"!\[.*?\]\((.*?)\)", body):
        assert (tmp_path / "model" / name).exists()
    with Image.open(tmp_path / "model" / "samples.png") as grid:
        assert grid.size == ((8 * 9 - 1) * 8, (2 * 9 - 1) * 8)  # a pixel between them
