"""The README of an exported folder, a model card: what it is, how to use it, what runs when, what was measured; with its pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy.typing as npt

from nas.contracts import Score
from nas.results.samples import draw_samples
from nas.results.schedules import Bar, drawn

SCHEDULE, SAMPLES = "schedule.svg", "samples.png"
SIDE = 64
"""Pixels of a small sample's side in the grid."""


def write_card(
    plan: Mapping[str, Any],
    bars: Sequence[Bar],
    provenance: Mapping[str, Any],
    samples: npt.NDArray[Any] | None,
    folder: Path,
) -> None:
    """Writes README.md, schedule.svg, and samples.png where there are some. `plan`: what schedule.json holds. `bars`: the schedule
    to be drawn. `samples`: (n, channels, height, width) in [-1, 1]."""
    (folder / SCHEDULE).write_text(drawn(bars))
    pictures = f"![What each step runs]({SCHEDULE})\n"
    if samples is not None:
        draw_samples(samples, folder / SAMPLES, scale=max(1, SIDE // samples.shape[-1]))
        pictures += f"\n![Samples of it, as it was exported]({SAMPLES})\n"
    reads, classes = plan.get("text") is not None, plan.get("null_label")
    task = "pipeline_tag: text-to-image\n" if reads else "pipeline_tag: unconditional-image-generation\n"
    told, options = "batch_size=16", ""
    if reads:
        told, options = 'prompt="what the image shows"', " --captions txt"
    elif classes is not None:
        told, options, task = f"class_labels=[n % {classes} for n in range(16)]", " --labels folders", ""
    (folder / "README.md").write_text(
        _HEAD.format(task=task, conditions="" if task else "- class-conditional\n")
        + pictures
        + _USE.format(told=told)
        + _measured(provenance)
        + _tested(provenance)
        + _MORE.format(options=options)
    )


def _measured(provenance: Mapping[str, Any]) -> str:
    """Costs and scores, with what they are of."""
    cost = provenance.get("cost", {})
    rows = []
    if "macs_share" in cost:
        rows.append(("multiply-adds of an image, of the full network's at every step", f"{cost['macs_share']:.1%}"))
    if "params" in cost:
        rows.append(("parameters of the networks", f"{cost['params']:,}"))
    verified = provenance.get("noise") != "search noise"
    for name, words in (
        ("score", "noises that verified leaders" if verified else "noises of the search, on which it was chosen"),
        ("confirmed", "noises on which nothing was chosen"),
    ):
        if name in provenance:
            score = Score.from_json(provenance[name])
            rows += [
                (f"{score.labels.get(metric, metric)}, {words}", f"{value:.4g} ± {score.error(metric):.2g}")
                for metric, value in score.values.items()
            ]
    if not rows:
        return ""
    table = "".join(f"| {what} | {value} |\n" for what, value in rows)
    data = f" The images are those of `{provenance['data']}`." if "data" in provenance else ""
    return f"\n## What was measured\n\nOf the networks as they were exported, before any training of their own; an error is one standard error.{data}\n\n| what | measured |\n|---|---|\n{table}"


def _tested(provenance: Mapping[str, Any]) -> str:
    """What `nas confirm` found of this schedule's networks, trained; nothing where it was not asked."""
    found = "".join(f"\n- {words}" for words in provenance.get("tested", ()))
    head = "\n## What was shown\n\nOf this schedule, its networks fine-tuned after they were exported, on the study's images:\n"
    return f"{head}{found}\n" if found else ""


_HEAD = """---
library_name: diffusers
{task}license: other
tags:
- diffusion
- step-aware
- neural-architecture-search
{conditions}---

# A step-aware diffusion model

Each sampling step runs the network that `schedule.json` names for it, or takes blocks' outputs from the step before. The networks
are ordinary diffusers model folders; `provenance.json` says where they come from. Their licence is that of the weights and images they were made of; name it
above before you share the folder.

"""

_USE = """
## To sample

With torch and diffusers alone:

```
python sample.py --count 16 --seed 0 --to samples.png
```

or in Python, in this folder:

```python
from diffusers import DiffusionPipeline

pipeline = DiffusionPipeline.from_pretrained(".", custom_pipeline=".", trust_remote_code=True)
images = pipeline({told}, seed=0, output_type="pt").images  # (batch, channels, height, width) in [0, 1]
```

`trust_remote_code` lets diffusers run this folder's `pipeline.py`: do so with folders that you or people you trust have written.

With `seed`, the images are those that `nas sample` makes of it; without, `generator` is a torch generator, as in other pipelines. Networks that
take class labels are told them by `class_labels=[3, 1, 4]`, one for each image, those that read a text by `prompt=`, `negative_prompt=` and
`guidance_scale=`, as in Stable Diffusion's pipeline; how the schedule guides them is in it. `pipeline.save_pretrained` takes the code along.
"""

_MORE = """
## To train it further

Each network on the timesteps that it serves (`train.json`), with distillation from the full network:

```
python train_diffusers.py --images folder/of/pictures{options}
```

Where a model folder holds model.pt2, `torch.export.load` reads the same network: module(sample, timestep), for batches of 2 to 63, with
one timestep for each image.
"""
