"""Reads a folder that `nas export` wrote, and trusts nothing in it: every name is one of ours and lies in the folder, every network is of a
class that is exported, and weights are those whose hashes were noted. Stands alone: an exported folder holds a copy of this file.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

SCHEDULE, TRAINING, PROVENANCE, INDEX = "schedule.json", "train.json", "provenance.json", "model_index.json"
WEIGHTS = "diffusion_pytorch_model.safetensors"
CLASSES = ("UNet2DModel", "UNet2DConditionModel", "DiTTransformer2DModel", "PixArtTransformer2DModel")
"""Of networks that are exported."""

AUTOENCODER, AUTOENCODERS = "vae", ("AutoencoderKL", "VQModel")
"""The folder of the one whose latents the networks work on, if any, and its class."""

TEXTS = {
    "tokenizer": ("CLIPTokenizer", "T5Tokenizer"),
    "tokenizer_2": ("CLIPTokenizer",),
    "text_encoder": ("CLIPTextModel", "CLIPTextModelWithProjection", "T5EncoderModel"),
    "text_encoder_2": ("CLIPTextModel", "CLIPTextModelWithProjection"),
}
"""What makes of a text what the networks read, if they read any, and its classes, which are those of transformers."""
TEXT_WEIGHTS = "model.safetensors"

CLASS_EMBEDDING, CLASS_EMBEDDINGS = "class_embedding", ("ClassEmbedding",)
"""The folder of the learned vectors that networks read in a text's place, if they do, and its class, whose code lies there too."""

SAMPLERS = ("DDIM", "DDPM", "DPMSolver")

NAME = re.compile(r"(unet|transformer)_[0-9]{1,5}|teacher")
POSTERIORS = ("sample", "mean")
REMEDY = "export the schedule again"


class ExportError(ValueError):
    """An exported folder that is damaged or was changed; the message names the file and the remedy."""


@dataclass(frozen=True)
class Export:
    """`networks`: by name, what each is. `plan`: schedule.json. `training`: train.json. `provenance`: provenance.json. `texts`: the folders of the
    text encoders and their tokenizers."""

    folder: Path
    networks: Mapping[str, Any]
    plan: Mapping[str, Any]
    training: Mapping[str, Any]
    provenance: Mapping[str, Any]
    texts: tuple[str, ...] = ()

    @property
    def parts(self) -> list[str]:
        """Folders of what a training needs: networks, teacher, autoencoder, text encoders and tokenizers, or vectors of classes."""
        vae = [AUTOENCODER] if "image_shape" in self.plan else []
        classes = [CLASS_EMBEDDING] if "class_channels" in self.plan else []
        return list(dict.fromkeys([*self.training["timesteps"], self.training["teacher"], *vae, *self.texts, *classes]))


def read_export(folder: Path) -> Export:
    """Raises ExportError where the folder is none of ours, or anything in its four files is not what it should be."""
    if not (folder / TRAINING).is_file():
        raise ExportError(f"{folder} is no exported folder: it holds no {TRAINING}; give one that `nas export` wrote")
    plan, training = _json(folder / SCHEDULE), _json(folder / TRAINING)
    provenance = _json(folder / PROVENANCE)
    networks = _check_schedule(folder, plan)
    _check_training(folder, training, networks)
    if ("image_shape" in plan) != ("image_shape" in training):
        raise ExportError(f"{folder / TRAINING} and {SCHEDULE} do not agree whether networks work on latents; {REMEDY}")
    for name in ("text", "null_label", "class_channels"):
        if (name in plan) != (name in training):
            raise ExportError(f"{folder / TRAINING} and {SCHEDULE} do not agree on the networks' {name}; {REMEDY}")
    texts = _check_index(folder / INDEX, networks, plan)
    for name in (*networks, training["teacher"]):
        _network_class(folder / name)
    if "image_shape" in plan:
        _network_class(folder / AUTOENCODER, AUTOENCODERS)
    if "class_channels" in plan:
        _network_class(folder / CLASS_EMBEDDING, CLASS_EMBEDDINGS)
    _hashes(folder, provenance)
    return Export(folder, networks, plan, training, provenance, texts)


def read_network(folder: Path, classes: Sequence[str] = CLASSES) -> Any:
    """The stock model of a network's folder, in evaluation mode. Raises ExportError where it is damaged."""
    import diffusers
    from safetensors.torch import load_file

    kind = getattr(diffusers, _network_class(folder, classes))
    path = folder / WEIGHTS
    if not path.is_file():
        raise ExportError(f"{path} does not exist; {REMEDY}")
    try:
        net = kind.from_config(_json(folder / "config.json"))
        net.load_state_dict(load_file(path))
    except MemoryError:
        raise
    except Exception as error:  # stock classes and safetensors raise whatever a damaged file makes of them
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ExportError(f"{folder} cannot be read as a network ({reason}); {REMEDY}") from error
    return net.eval()


def hashes_of(folder: Path, names: Iterable[str]) -> dict[str, str]:
    """SHA-256 of the files of these networks, by their paths in the folder."""
    files = [f"{name}/{file}" for name in names for file in _files_of(name)]
    return {file: _sha256(folder / file) for file in files}


def _files_of(name: str) -> tuple[str, str]:
    if name.startswith("tokenizer"):
        return "tokenizer_config.json", "tokenizer.json"
    return "config.json", TEXT_WEIGHTS if name in TEXTS else WEIGHTS


def noted_hashes(folder: Path) -> dict[str, str]:
    """Those that stand in the folder's provenance, as far as there is one."""
    return _hashes(folder, _json(folder / PROVENANCE)) if (folder / PROVENANCE).exists() else {}


def check_hashes(folder: Path, names: Iterable[str], provenance: Mapping[str, Any], option: str) -> None:
    """Raises ExportError naming the first file that is not the one whose hash was noted. `option`: takes changed files."""
    known = _hashes(folder, provenance)
    for file, found in hashes_of(folder, names).items():
        if file not in known:
            raise ExportError(f"{folder / PROVENANCE} notes no hash of {file}; {REMEDY}, or give {option}")
        if known[file] != found:
            raise ExportError(
                f"{folder / file} was changed or damaged since it was written: its SHA-256 is not the one in {PROVENANCE}; {REMEDY}, or give "
                f"{option} where it was changed on purpose"
            )


def _check_schedule(folder: Path, plan: Mapping[str, Any]) -> dict[str, Any]:
    path = folder / SCHEDULE
    steps = _entry(plan, "steps", list, path)
    if not steps:
        raise ExportError(f"{path} has no steps; {REMEDY}")
    networks: dict[str, Any] = {}
    for step in steps:
        if not isinstance(step, dict):
            raise ExportError(f"{path}: a step is {step!r}; {REMEDY}")
        _entry(step, "timestep", int, path)
        if not all(isinstance(name, str) for name in _entry(step, "reuse", list, path)):
            raise ExportError(f"{path}: reuse={step['reuse']!r} names no blocks; {REMEDY}")
        name = _name(_entry(step, "model", str, path), folder, path)
        arch = _tuples(step.get("arch"))
        if networks.setdefault(name, arch) != arch:
            raise ExportError(f"{path} calls two networks {name}; {REMEDY}")
        if "guidance" in step:
            _check_guidance(_entry(step, "guidance", dict, path), networks, folder, path)
    _check_scheduler(plan, path)
    _check_classes(plan, path)
    if not {"null_label", "text"} & plan.keys() and any("guidance" in step for step in steps):
        raise ExportError(f"{path} guides steps of networks that take no labels and read no text; {REMEDY}")
    timesteps = [step["timestep"] for step in steps]
    total = plan["scheduler"]["num_train_timesteps"]
    if not 0 <= timesteps[-1] <= timesteps[0] < total or any(a <= b for a, b in pairwise(timesteps)):
        raise ExportError(f"{path}: timesteps must fall from at most {total - 1} to at least 0; {REMEDY}")
    if _entry(_entry(plan, "sampler", dict, path), "class", str, path) not in SAMPLERS:
        raise ExportError(f"{path}: sampler {plan['sampler']['class']!r} is none of {', '.join(SAMPLERS)}; {REMEDY}")
    if (kept := plan["sampler"].get("reuse_precision", "float16")) not in ("bfloat16", "float16"):
        raise ExportError(f"{path}: reuse_precision={kept!r} is neither bfloat16 nor float16; {REMEDY}")
    return networks


def _check_guidance(guidance: Mapping[str, Any], networks: dict[str, Any], folder: Path, path: Path) -> None:
    scale: Any = guidance.get("scale")
    if type(scale) not in (int, float) or not abs(scale) <= 1e6:
        raise ExportError(f"{path}: guidance by a scale of {scale!r}; {REMEDY}")
    name = _name(_entry(guidance, "model", str, path), folder, path)
    arch = _tuples(guidance.get("arch"))
    if networks.setdefault(name, arch) != arch:
        raise ExportError(f"{path} calls two networks {name}; {REMEDY}")


def _check_classes(data: Mapping[str, Any], path: Path) -> None:
    if "guided_channels" in data and not 1 <= _entry(data, "guided_channels", int, path) <= 2**16:
        raise ExportError(f"{path}: guided_channels={data['guided_channels']} is out of range; {REMEDY}")
    if "null_label" in data and not 0 <= _entry(data, "null_label", int, path) <= 10**6:
        raise ExportError(f"{path}: null_label={data['null_label']} is out of range; {REMEDY}")
    if "class_channels" in data and not 1 <= _entry(data, "class_channels", int, path) <= 2**16:
        raise ExportError(f"{path}: class_channels={data['class_channels']} is out of range; {REMEDY}")
    if "class_channels" in data and "null_label" not in data:
        raise ExportError(f"{path} has class_channels, and does not say how many classes; {REMEDY}")
    if "text" in data:
        text = _entry(data, "text", dict, path)
        size: Any = text.get("size")
        numbers = [text.get("tokens"), *(size if isinstance(size, list) and len(size) == 2 else [None])]
        if not all(type(number) is int and 0 < number <= 2**16 for number in numbers):
            raise ExportError(f"{path}: text={text!r} has no tokens and no size; {REMEDY}")
        if type(text.get("zeros", False)) is not bool:
            raise ExportError(f"{path}: text={text!r} says neither true nor false for zeros; {REMEDY}")


def _check_training(folder: Path, training: Mapping[str, Any], networks: Mapping[str, Any]) -> None:
    path = folder / TRAINING
    served = _entry(training, "timesteps", dict, path)
    _check_scheduler(training, path)
    _check_classes(training, path)
    total = training["scheduler"]["num_train_timesteps"]
    for name, ranges in served.items():
        if _name(name, folder, path) not in networks:
            raise ExportError(f"{path} names {name}, which {SCHEDULE} does not; {REMEDY}")
        if not isinstance(ranges, list) or not ranges:
            raise ExportError(f"{path}: {name} serves {ranges!r}, which are no timesteps; {REMEDY}")
        for pair in ranges:
            whole = isinstance(pair, list) and len(pair) == 2 and all(type(end) is int for end in pair)
            if not whole or not 0 <= pair[0] < pair[1] <= total:
                raise ExportError(f"{path}: {name} serves {pair!r}, which are no timesteps below {total}; {REMEDY}")
    _name(_entry(training, "teacher", str, path), folder, path)
    _entry(training, "settings", dict, path)


def _check_scheduler(data: Mapping[str, Any], path: Path) -> None:
    scheduler = _entry(data, "scheduler", dict, path)
    if not 1 <= _entry(scheduler, "num_train_timesteps", int, path) <= 10**6:
        raise ExportError(f"{path}: num_train_timesteps={scheduler['num_train_timesteps']} is out of range; {REMEDY}")
    for name in ("shape", "image_shape") if "image_shape" in data else ("shape",):
        shape = _entry(data, name, list, path)
        if len(shape) != 3 or not all(type(size) is int and 0 < size <= 2**16 for size in shape):
            raise ExportError(f"{path}: {name}={shape!r} is not (channels, height, width); {REMEDY}")
    if "image_shape" in data and _entry(data, "posterior", str, path) not in POSTERIORS:
        raise ExportError(f"{path}: posterior={data['posterior']!r} is none of {', '.join(POSTERIORS)}; {REMEDY}")


def _check_index(path: Path, networks: Mapping[str, Any], plan: Mapping[str, Any]) -> tuple[str, ...]:
    """The components that make of a text what networks read."""
    index = _json(path)
    if index.get("_class_name") != ["pipeline", "StepAwarePipeline"]:
        raise ExportError(f"{path}: _class_name={index.get('_class_name')!r} is not the exported pipeline; {REMEDY}")
    texts = tuple(name for name in TEXTS if name in index and "text" in plan)
    folders = (*texts, CLASS_EMBEDDING) if "class_channels" in plan else texts
    if "class_channels" in plan and CLASS_EMBEDDING not in index:
        raise ExportError(f"{path} names no {CLASS_EMBEDDING}, which the networks read; {REMEDY}")
    for name, entry in index.items():
        if name.startswith("_") or name == "schedule":
            continue
        known: Sequence[str] = ["DDIMScheduler"] if name == "scheduler" else CLASSES if name in networks else ()
        known = AUTOENCODERS if name == AUTOENCODER and "image_shape" in plan else known
        known = TEXTS[name] if name in texts else CLASS_EMBEDDINGS if name in folders else known
        library = "transformers" if name in texts else name if name in folders else "diffusers"
        if not isinstance(entry, list) or len(entry) != 2 or entry[0] != library or entry[1] not in known:
            raise ExportError(f"{path}: {name}={entry!r} is no part of an exported pipeline; {REMEDY}")
        if name in folders and ((path.parent / name).is_symlink() or not (path.parent / name).is_dir()):
            raise ExportError(f"{path} names {name}, but {path.parent} has no such folder; {REMEDY}")
    return texts


def _name(name: str, folder: Path, path: Path) -> str:
    """A network's name, which is a folder of ours and no way out of it."""
    if not NAME.fullmatch(name):
        raise ExportError(
            f"{path} names a network {name!r}; its networks are called unet_0, unet_1, ..., or transformer_0, ..., and teacher; {REMEDY}"
        )
    if (folder / name).is_symlink() or not (folder / name).is_dir():
        raise ExportError(f"{path} names a network {name}, but {folder} has no such folder; {REMEDY}")
    return name


def _network_class(folder: Path, classes: Sequence[str] = CLASSES) -> str:
    kind = _json(folder / "config.json").get("_class_name")
    if kind not in classes:
        raise ExportError(
            f"{folder / 'config.json'}: {kind!r} is no class that is exported, {' or '.join(classes)}; {REMEDY}"
        )
    return str(kind)


def _hashes(folder: Path, provenance: Mapping[str, Any]) -> dict[str, str]:
    found = provenance.get("files", {})
    if not isinstance(found, dict) or not all(isinstance(value, str) for value in found.values()):
        raise ExportError(f"{folder / PROVENANCE}: files={found!r} are no hashes; {REMEDY}")
    return found


def _entry(data: Mapping[str, Any], name: str, kind: type, path: Path) -> Any:
    value = data.get(name)
    if type(value) is not kind:
        raise ExportError(f"{path}: {name}={str(value)[:80]!r} is no {kind.__name__}; {REMEDY}")
    return value


def _json(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > 2**26:
            raise ExportError(f"{path} is larger than any such file; {REMEDY}")
        found = json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        raise ExportError(f"{path} does not exist; {REMEDY}") from None
    except ExportError:
        raise
    except (ValueError, RecursionError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise ExportError(f"{path} is damaged ({reason}); {REMEDY}") from error
    if not isinstance(found, dict):
        raise ExportError(f"{path} holds no JSON object; {REMEDY}")
    return found


def _sha256(path: Path) -> str:
    if not path.is_file():
        raise ExportError(f"{path} does not exist; {REMEDY}")
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _tuples(value: Any) -> Any:
    return (
        tuple(_tuples(item) for item in value) if isinstance(value, Sequence) and not isinstance(value, str) else value
    )
