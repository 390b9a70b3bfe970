from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from evaluators.sampling import DDIM, DDPM, sample
from nas.contracts import Schedule, Step, UserError
from nas.handover.export import PROGRAM, export
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
