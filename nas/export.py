"""From a chosen trial to a folder of stock diffusers models that needs nothing of this project.

DIR/unet_0, unet_1, ...   one stock model folder per distinct arch
DIR/schedule.json         which folder at which timestep, and the scheduler's settings
DIR/provenance.json       hashes of weights and images, versions, the trial with its score
DIR/README.md             the lines that sample from it
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from nas.contracts import LoadedSupernet, Schedule, UserError
from nas.session import package_versions

TOLERANCE = 1e-5


def export(
    net: LoadedSupernet, schedule: Schedule, sampler: Mapping[str, Any], provenance: Mapping[str, Any], folder: Path
) -> None:
    """Writes the folder, whole or not at all. `sampler` is in words, as `LoadedEvaluator.sampler`.

    Raises UserError where `folder` is not empty, and RuntimeError where a reloaded model's output differs from the
    supernet's subnet by more than 1e-5: then nothing is left behind.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} is not empty; give --to a new or empty folder")
    if sampler["class"] not in _UPDATES:
        raise UserError(f"sampler {sampler['class']} has no stand-alone loop to export; use {' or '.join(_UPDATES)}")
    partial = folder.parent / f".{folder.name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        names = {arch: f"unet_{i}" for i, arch in enumerate(schedule.archs)}
        for arch, name in names.items():
            net.extract(arch).save_pretrained(partial / name)  # type: ignore[operator]
        differences = {name: _difference(net, schedule, arch, partial / name) for arch, name in names.items()}
        wrong = {name: value for name, value in differences.items() if not value <= TOLERANCE}
        if wrong:
            raise RuntimeError(
                f"exported models differ from the supernet by {wrong}, more than {TOLERANCE}; nothing was exported"
            )
        plan = {
            "steps": [
                {"timestep": step.timestep, "model": names[step.arch], "arch": step.arch} for step in schedule.steps
            ],
            "sampler": dict(sampler),
            "scheduler": dict(net.scheduler),
            "shape": net.image_shape,
        }
        _write(partial / "schedule.json", plan)
        _write(partial / "provenance.json", {**provenance, "parity": differences, "versions": package_versions()})
        (partial / "README.md").write_text(_README.format(update=_UPDATES[sampler["class"]]))
        if folder.exists():
            folder.rmdir()
        os.replace(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _difference(net: LoadedSupernet, schedule: Schedule, arch: Any, folder: Path) -> float:
    """Largest output difference between the model as reloaded from disk and the supernet's subnet, on fixed inputs."""
    import diffusers

    kind = json.loads((folder / "config.json").read_text())["_class_name"]
    reloaded = getattr(diffusers, kind).from_pretrained(folder, low_cpu_mem_usage=False).to(net.device).eval()
    x = torch.randn((4, *net.image_shape), generator=torch.Generator().manual_seed(0)).to(net.device)
    worst = 0.0
    for step in schedule.steps:
        if step.arch == arch:
            with torch.inference_mode():
                ours, _ = net.denoiser(step)(x, step.timestep)
                theirs = reloaded(x, step.timestep, None).sample
            worst = max(worst, float((ours - theirs).abs().max()))
    return worst


def _write(path: Path, data: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=2) + "\n")


_UPDATES = {
    "DDIM": """    x = b**0.5 * image + (1 - b) ** 0.5 * noise
""",
    "DDPM": """    beta = 1 - a / b
    x = b**0.5 * beta / (1 - a) * image + (a / b) ** 0.5 * (1 - b) / (1 - a) * x
    if b < 1:
        variance = beta if plan["sampler"]["variance"] == "fixed_large" else (1 - b) / (1 - a) * beta
        x = x + variance**0.5 * normal(number + 1)
""",
}

_README = """# A step-aware diffusion model

Each sampling step runs the network that `schedule.json` names for it. The networks are ordinary
diffusers UNet folders; `provenance.json` says where they come from. To sample, in this folder:

```python
import diffusers, json, numpy as np, torch

seed, count = 0, 16
with open("schedule.json") as file:
    plan = json.load(file)
nets = {{}}
for name in {{step["model"] for step in plan["steps"]}}:
    with open(f"{{name}}/config.json") as file:
        kind = json.load(file)["_class_name"]
    nets[name] = getattr(diffusers, kind).from_pretrained(name, low_cpu_mem_usage=False).eval()
alphas = [*diffusers.DDIMScheduler(**plan["scheduler"]).alphas_cumprod.tolist(), 1.0]
times = [step["timestep"] for step in plan["steps"]]

def normal(purpose):  # the noise of image i depends on the seed and i alone
    draws = [np.random.default_rng((seed, i, purpose)).standard_normal(plan["shape"], dtype=np.float32) for i in range(count)]
    return torch.from_numpy(np.stack(draws))

x = normal(0)
for number, (step, after) in enumerate(zip(plan["steps"], [*times[1:], -1])):
    a, b = alphas[step["timestep"]], alphas[after]
    with torch.inference_mode():
        noise = nets[step["model"]](x, step["timestep"], None).sample
    image = (x - (1 - a) ** 0.5 * noise) / a**0.5
    image = image.clamp(-1, 1) if plan["sampler"]["clip"] else image
{update}images = x.clamp(-1, 1)  # (count, channels, height, width), the same as `nas sample` makes of this seed
```
"""
