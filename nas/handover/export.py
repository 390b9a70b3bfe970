"""From a chosen trial to a folder of stock diffusers models that needs nothing of this project.

DIR/unet_0, unet_1, ...     one stock model folder per distinct arch, transformer_0, ... of transformers; where asked for, with model.pt2, a
                            torch.export program of it
DIR/schedule.json           which folder at which timestep with which blocks reused, and the scheduler's settings
DIR/model_index.json        the same as a diffusers pipeline, with
DIR/scheduler, pipeline.py  its scheduler and its code, and what that imports
DIR/sample.py               a script that samples
DIR/train_diffusers.py      a script that fine-tunes the models, and DIR/train.json, which timesteps each serves and what else it needs
DIR/exported.py, pictures.py  what the scripts read the folder and pictures with
DIR/teacher                 the full network, unless it is among the models
DIR/vae                     the stock autoencoder whose latents they work on, if any
DIR/tokenizer, text_encoder the stock parts that make of a text what they read, if they read any
DIR/class_embedding         the vectors of classes that they read in a text's place, if they do
DIR/provenance.json         SHA-256 of the networks' files, versions, the trial with its score
DIR/README.md               a model card: how to use it, what was measured; with schedule.svg, what runs when, and samples.png
"""

from __future__ import annotations

import inspect
import json
import math
import shutil
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from nas.base import exported, pictures
from nas.base.exported import hashes_of, read_network
from nas.base.files import new_folder
from nas.base.quiet import quiet_transformers
from nas.contracts import LoadedSupernet, Schedule, Step, UserError, noise_by, some_condition
from nas.engine.facts import package_versions
from nas.handover.card import write_card
from nas.results.schedules import bars_of

TOLERANCE = 1e-5
"""How far an exported model's output may be from the subnet's."""

ONE_FILE = "1TB"
"""Above what any network weighs: those of more than diffusers' 10 GB would be cut into files, which an exported folder's reader knows nothing of."""

PROGRAM = "model.pt2"
BATCHES = 2, 63
"""What a program accepts: torch.export specialises to a batch of 1, and diffusers' upsampling to those of 64 and more."""


def export(
    net: LoadedSupernet,
    schedule: Schedule,
    sampler: Mapping[str, Any],
    provenance: Mapping[str, Any],
    folder: Path,
    programs: bool = False,
    samples: npt.NDArray[Any] | None = None,
) -> dict[str, str]:
    """Writes the folder, whole or not at all. `sampler` is in words, as `LoadedEvaluator.sampler`. `programs`: each network also as a
    torch.export program, where that works; returned is why it did not, for each network of which there is none. `samples`: images of the schedule,
    (n, channels, height, width) in [-1, 1], to be shown.

    Raises UserError where `folder` is not empty, and RuntimeError where a reloaded model's output differs from the
    supernet's subnet by more than 1e-5: then nothing is left behind.
    """
    if sampler["class"] not in exported.SAMPLERS:
        raise UserError(
            f"sampler {sampler['class']} has no stand-alone loop to export; use {' or '.join(exported.SAMPLERS)}"
        )
    with new_folder(folder) as partial:
        names: dict[Any, str] = {}
        for number, arch in enumerate(schedule.archs):
            model: Any = net.extract(arch)
            if (kind := type(model).__name__) not in exported.CLASSES:
                raise UserError(
                    f"a {kind} is no network of diffusers, and an exported folder holds those alone; take the trained subnets as modules: "
                    "run.networks(run.best(...)), after run = nas.open_run(study, folder)"
                )
            names[arch] = f"{'transformer' if 'Transformer' in type(model).__name__ else 'unet'}_{number}"
            model.save_pretrained(partial / names[arch], max_shard_size=ONE_FILE)
        differences = {name: _difference(net, schedule, arch, partial / name) for arch, name in names.items()}
        wrong = {name: value for name, value in differences.items() if not value <= TOLERANCE}
        if wrong:
            raise RuntimeError(
                f"exported models differ from the supernet by {wrong}, more than {TOLERANCE}; nothing was exported"
            )
        failed = write_programs(partial, names.values(), net.state_shape, some_condition(net, 1)) if programs else {}
        plan = {
            "steps": [_step_in_words(step, names) for step in schedule.steps],
            "sampler": dict(sampler),
            "scheduler": dict(net.scheduler),
            "shape": net.state_shape,
            **_classes(net),
            **({"guided_channels": channels} if (channels := getattr(net, "guided_channels", None)) else {}),
            **_latents(net, partial),
            **_texts(net, partial),
        }
        _write(partial / "schedule.json", plan)
        teacher = _write_training(net, schedule, names, provenance, partial)
        facts = {"parity": differences, "versions": package_versions()}
        vae = [exported.AUTOENCODER] if "image_shape" in plan else []
        others = [*getattr(net, "text_components", {})]
        files = hashes_of(partial, dict.fromkeys([*names.values(), teacher, *vae, *others]))
        _write(partial / "provenance.json", {**provenance, **facts, "files": files})
        _write_pipeline(net, plan, [*names.values(), *vae], others, partial)
        write_card(plan, bars_of(schedule, net), provenance, samples, partial)
        (partial / "sample.py").write_text(_SAMPLE)
        return failed


def _difference(net: LoadedSupernet, schedule: Schedule, arch: Any, folder: Path) -> float:
    """Largest output difference between the model as reloaded from disk and the supernet's subnet, on fixed inputs."""
    reloaded = read_network(folder).to(net.device)
    x = torch.randn((4, *net.state_shape), generator=torch.Generator().manual_seed(0)).to(net.device)
    differences = []
    condition = {name: rows.to(net.device) for name, rows in (some_condition(net, len(x)) or {}).items()}
    before = net.run_as(False, False)  # as the reloaded one runs
    try:
        mine = [step for step in schedule.steps if arch in step.archs]
        # At its noisiest, its cleanest and one between: the same weights run at all of them.
        for step in {mine[0], mine[len(mine) // 2], mine[-1]}:
            with torch.inference_mode():
                ours, _ = net.denoiser(Step(step.timestep, arch))(x, step.timestep, None, condition or None)
                theirs = noise_by(net, reloaded, x, step.timestep, condition or None)
            differences.append(float((ours[:, : x.shape[1]] - theirs).abs().max()))
    finally:
        net.run_as(*before)
    return float(np.max(differences))  # which is no number where one is none


def _step_in_words(step: Step, names: Mapping[Any, str]) -> dict[str, Any]:
    """As schedule.json has it."""
    guidance = step.guidance and {"scale": step.guidance.scale, "model": names[step.archs[-1]], "arch": step.archs[-1]}
    said = {"timestep": step.timestep, "model": names[step.arch], "arch": step.arch, "reuse": step.reuse}
    return {**said, **({"guidance": guidance} if guidance else {})}


def _classes(net: LoadedSupernet) -> dict[str, int]:
    """The label of no class, where the networks take labels, or read vectors of so many channels: there are as many classes before it."""
    vectors = getattr(net, "text_components", {}).get(exported.CLASS_EMBEDDING)
    if vectors is not None:
        return {"null_label": vectors.config.classes, "class_channels": vectors.config.channels}
    condition = some_condition(net, 1) or {}
    return {"null_label": int(net.null_condition(condition)["class_labels"][0])} if "class_labels" in condition else {}


def _texts(net: LoadedSupernet, folder: Path) -> dict[str, Any]:
    """Writes the text encoders, or vectors of classes, where there are any, and says what text the networks read."""
    shape = getattr(net, "text_shape", None)
    for name, component in getattr(net, "text_components", {}).items():
        if not (folder / name).exists():
            with quiet_transformers():
                component.save_pretrained(folder / name)
    return {} if shape is None else {"text": dict(shape)}


def _latents(net: LoadedSupernet, folder: Path) -> dict[str, Any]:
    """Writes the autoencoder, where states are its latents, and says what a decoded image is."""
    autoencoder: Any = getattr(net, "autoencoder", None)
    if autoencoder is None:
        return {}
    if not (folder / exported.AUTOENCODER).exists():
        autoencoder.save_pretrained(folder / exported.AUTOENCODER)
    return {"image_shape": net.image_shape, "posterior": net.posterior}


class _Call(torch.nn.Module):
    """A stock model as (sample, timestep) -> prediction, whichever class it is."""

    def __init__(self, net: torch.nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        prediction: torch.Tensor = self.net(sample, timestep, None, return_dict=False)[0]
        return prediction


def write_programs(
    folder: Path, names: Iterable[str], shape: Sequence[int], condition: Mapping[str, Any] | None = None
) -> dict[str, str]:
    """Writes model.pt2 into these model folders: call(sample, timestep), (batch, *shape) and (batch,), returns the prediction. Returned is
    why there is none, for each of which that is so, as of all that take a `condition`."""
    if condition:
        kind = "a text" if "encoder_hidden_states" in condition else "class labels"
        return dict.fromkeys(
            names, f"it takes {kind}, and programs are made of networks that take neither labels nor texts"
        )
    reasons = {name: _write_program(folder / name, shape) for name in names}
    return {name: reason for name, reason in reasons.items() if reason}


def _write_program(folder: Path, shape: Sequence[int]) -> str:
    model = _Call(read_network(folder)).eval()
    least, most = BATCHES
    batch = torch.export.Dim("batch", min=least, max=most)
    dynamic = {"sample": {0: batch}, "timestep": {0: batch}}
    noise = torch.randn((most, *shape), generator=torch.Generator().manual_seed(0))
    inputs = {count: (noise[:count], torch.full((count,), 10)) for count in (least, most)}
    try:
        program = torch.export.export(model, inputs[least], dynamic_shapes=dynamic, strict=False)
        torch.export.save(program, folder / PROGRAM)
        again = torch.export.load(folder / PROGRAM).module()
        with torch.inference_mode():
            worst = max(float((again(*given) - model(*given)).abs().max()) for given in inputs.values())
    except Exception as error:  # torch.export raises whatever its tracing meets
        worst, reason = math.inf, f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
    else:
        reason = f"its outputs differ by {worst:.2g}"
    if worst <= TOLERANCE:
        return ""
    (folder / PROGRAM).unlink(missing_ok=True)
    return reason


def _write(path: Path, data: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=2) + "\n")


def _write_pipeline(
    net: LoadedSupernet, plan: Mapping[str, Any], names: Sequence[str], others: Sequence[str], folder: Path
) -> None:
    """`others`: names of tokenizers and text encoders, or of vectors of classes, whose code is put beside them."""
    from diffusers import DDIMScheduler, __version__

    DDIMScheduler(**plan["scheduler"]).save_pretrained(folder / "scheduler")
    for file in (*net.pipeline_files, Path(exported.__file__), Path(pictures.__file__)):
        code = file.read_text().replace("from nas.base.", "from ").replace("from search_spaces.shipped.", "from ")
        for template in ("{}: Any", "{0}={0}"):
            code = code.replace(
                template.format("unet_0"), ", ".join(template.format(name) for name in (*names, *others))
            )
        code = code.replace("->unet_0->", "".join(f"->{name}" for name in names if name != exported.AUTOENCODER) + "->")
        (folder / file.name).write_text(code)
    parts = getattr(net, "text_components", {})
    index = {
        "_class_name": ["pipeline", "StepAwarePipeline"],
        "_diffusers_version": __version__,
        "schedule": plan,
        "scheduler": ["diffusers", "DDIMScheduler"],
        **{
            name: ["diffusers", json.loads((folder / name / "config.json").read_text())["_class_name"]]
            for name in names
        },
        **{
            name: [name if name == exported.CLASS_EMBEDDING else "transformers", type(parts[name]).__name__]
            for name in others
        },
    }
    if exported.CLASS_EMBEDDING in others:
        shutil.copy(inspect.getfile(type(parts[exported.CLASS_EMBEDDING])), folder / exported.CLASS_EMBEDDING)
    _write(folder / "model_index.json", index)


def _write_training(
    net: LoadedSupernet, schedule: Schedule, names: Mapping[Any, str], provenance: Mapping[str, Any], folder: Path
) -> str:
    """The teacher's name. A step serves the timesteps from its own down to the next step's, the first one all above it too, and the last one down to 0."""
    teacher = names.get(net.full_arch)
    if teacher is None:
        teacher = "teacher"
        net.extract(net.full_arch).save_pretrained(folder / teacher, max_shard_size=ONE_FILE)  # type: ignore[operator]
    bounds = [len(net.alphas_cumprod), *(t + 1 for t in schedule.timesteps[1:]), 0]
    timesteps: dict[str, list[list[int]]] = {name: [] for name in names.values()}
    for step, (stop, start) in zip(schedule.steps, pairwise(bounds), strict=True):
        for arch in step.archs:
            mine = timesteps[names[arch]]
            if mine and mine[-1][0] == stop:
                mine[-1][0] = start
            else:
                mine.append([start, stop])
    plan = {
        "timesteps": timesteps,
        "teacher": teacher,
        "loss": "mean squared error to lerp(noise, the teacher's prediction, distillation), timesteps uniform over those served; plus features x the "
        "distance of normalised spatial maps of the blocks",
        "settings": dict(net.training_settings),
        "images": provenance.get("images"),
        "scheduler": dict(net.scheduler),
        "shape": net.state_shape,
        **_classes(net),
        **_latents(net, folder),
        **_texts(net, folder),
    }
    _write(folder / "train.json", plan)
    return teacher


_SAMPLE = '''"""Samples from the folder that this file lies in, into one picture."""

import argparse
from pathlib import Path

from diffusers import DiffusionPipeline
from PIL import Image

from exported import ExportError, read_export

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--count", type=int, default=16)
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--labels", type=int, nargs="*", help="classes, taken in turn; all of them by default, where the networks take any")
parser.add_argument("--prompt", nargs="*", help="what the images are to show, taken in turn, where the networks read a text")
parser.add_argument("--negative-prompt")
parser.add_argument("--guidance-scale", type=float, help="in place of the schedule's own")
parser.add_argument("--device", default="cpu")
parser.add_argument("--to", default="samples.png")
arguments = parser.parse_args()

if arguments.count < 1 or arguments.seed < 0 or arguments.prompt == []:
    raise SystemExit(f"error: --count {arguments.count} must be at least 1, --seed {arguments.seed} at least 0, and --prompt has one text or more")
if not Path(arguments.to).absolute().parent.is_dir() or Path(arguments.to).suffix.lower() not in Image.registered_extensions():
    raise SystemExit(f"error: --to {arguments.to} must be a picture's name, such as samples.png, in a folder that exists")
folder = str(Path(__file__).resolve().parent)
try:
    read_export(Path(folder))
except ExportError as error:
    raise SystemExit(f"error: {error}") from error
pipeline = DiffusionPipeline.from_pretrained(folder, custom_pipeline=folder, trust_remote_code=True)
plan = pipeline.config.schedule
classes, reads = plan.get("null_label"), plan.get("text") is not None
for option, given, used in (
    ("--labels", arguments.labels, classes is not None),
    ("--prompt", arguments.prompt, reads),
    ("--negative-prompt", arguments.negative_prompt, reads),
    ("--guidance-scale", arguments.guidance_scale, any(step.get("guidance") for step in plan["steps"])),
):
    if given is not None and not used:
        raise SystemExit(f"error: {option} is of no use: {'no step of the schedule is guided' if option == '--guidance-scale' else 'the networks read no such thing'}; leave it out")
try:
    pipeline.to(arguments.device)
except (AssertionError, RuntimeError) as error:  # as torch says that there is no such device
    raise SystemExit(f"error: --device {arguments.device} cannot be used ({str(error).splitlines()[0]}); use cpu") from error
labels = None if classes is None else [arguments.labels[i % len(arguments.labels)] if arguments.labels else i % classes for i in range(arguments.count)]
told = {}
if reads:
    prompts = arguments.prompt or [""]
    told = {"prompt": [prompts[i % len(prompts)] for i in range(arguments.count)], "negative_prompt": arguments.negative_prompt}
try:
    images = pipeline(batch_size=arguments.count, seed=arguments.seed, class_labels=labels, guidance_scale=arguments.guidance_scale, **told).images
except ValueError as error:  # as the pipeline says what it cannot be told
    raise SystemExit(f"error: {error}") from error
except RuntimeError as error:  # as torch says that there is too little memory, of a device or at all
    if "memory" not in str(error):
        raise
    raise SystemExit(f"error: {arguments.count} images at once are too many for the memory ({str(error).splitlines()[0]}); give a smaller --count") from error
columns = min(8, len(images))
scale = max(1, -(-64 // max(images[0].size)))  # small ones are enlarged, to be looked at
images = [image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST) for image in images]
width, height = images[0].size
grid = Image.new(images[0].mode, (columns * width, -(-len(images) // columns) * height))
for i, image in enumerate(images):
    grid.paste(image, (i % columns * width, i // columns * height))
grid.save(arguments.to)
print(f"{len(images)} samples are in {arguments.to}")
'''
