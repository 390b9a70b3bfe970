"""A trained diffusers model as people have it in a folder: a bare network, or a whole pipeline with its scheduler.

Nothing is downloaded, nothing is guessed in silence, and no parameter is left as memory happened to be: names and shapes of all tensors
are compared with the network's before anything else is done.
"""

from __future__ import annotations

import hashlib
import inspect
import logging
import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import diffusers
import torch
from diffusers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError, safe_open

from nas.base.exported import CLASS_EMBEDDING, CLASS_EMBEDDINGS, WEIGHTS
from nas.base.files import add_file, first_line, read_json
from nas.contracts import UserError
from search_spaces.noise import NoiseSchedule

log = logging.getLogger("nas")

NETWORKS = ("UNet2DModel", "UNet2DConditionModel", "DiTTransformer2DModel", "PixArtTransformer2DModel")
FORMER = "Transformer2DModel"
FORMERLY = {"ada_norm_zero": "DiTTransformer2DModel", "ada_norm_single": "PixArtTransformer2DModel"}
"""What diffusers once called both transformers, and which is which by their `norm_type`: released folders say so."""
REMEDY = f"give a folder of a {' or '.join(NETWORKS)}, or that of a pipeline with one"
INDEX = "model_index.json"
AUTOENCODERS = ("AutoencoderKL", "VQModel")
DECODING = ("vae", "vqvae", "movq")
"""What pipelines call theirs."""
TEXT_ENCODERS = ("CLIPTextModel", "CLIPTextModelWithProjection", "T5EncoderModel")
LENGTHS = {"PixArtAlphaPipeline": 120, "PixArtSigmaPipeline": 300}
"""Tokens of a text, where a pipeline's class says so and its tokenizer does not."""
REFUSED = {
    "LDMSuperResolutionPipeline": "whose network is given the small image too, beside the noisy one",
    "LDMTextToImagePipeline": "whose text encoder is a BERT of its own",
    "StableDiffusionInpaintPipeline": "whose network is given the image and its mask too, beside the noisy one",
    "StableDiffusionInstructPix2PixPipeline": "whose network is given the image too, beside the noisy one",
    "StableDiffusionUpscalePipeline": "whose network is given the small image too, beside the noisy one",
}
"""Pipelines whose networks nothing here can call, and why."""
USED = ("scheduler", "tokenizer")
"""Further components that are read."""
VARIANTS = ("", ".fp16", ".bf16")
"""How the names of files of weights in another precision go on."""
FORMER_TENSORS = {"PixArtTransformer2DModel": ("caption_projection.y_embedding",)}
"""What files of released networks hold beside what a network has: a caption for no caption, which lies in the encoded texts now."""
FORMER_LAYERS = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
"""What diffusers once called the layers of attention: models released in 2022, Stable Diffusion's autoencoder among them, have these names."""


class Found(NamedTuple):
    """`folder`: of the network. `config`: arguments of its class. `noise`: None where nothing says which process it was trained on.
    `autoencoder`: the folder of the one whose latents it works on; None where it works on pixels. `text`: the folder of the pipeline whose text
    encoders make what it reads; None where there are none. `length`: tokens of a text, None where its tokenizer says so. `classes`: the file of the
    vectors that it reads in a text's place, as folders that were exported here have it."""

    folder: Path
    config: dict[str, Any]
    noise: NoiseSchedule | None
    autoencoder: Path | None = None
    text: Path | None = None
    length: int | None = None
    classes: Path | None = None
    undecoded: str = ""
    """The class of an autoencoder that is not known here, where there is no other."""


def find(path: str | Path, noise: NoiseSchedule | None = None) -> Found:
    """What a folder holds; `noise` takes the place of its scheduler. Raises UserError, naming the file, where it holds no such model, its
    weights are not the network's, or its noise process cannot be kept."""
    folder = Path(path).expanduser().resolve()
    if not folder.is_dir():
        hub = re.fullmatch(r"[\w.-]+/[\w.-]+", str(path)) and not Path(path).parent.is_dir()
        remedy = (
            "it looks like a name on a hub, and nothing is downloaded here: give the folder of a copy"
            if hub
            else REMEDY
        )
        raise UserError(f"{path} is no folder; {remedy}")
    pipeline = folder if (folder / INDEX).is_file() else None
    if pipeline is not None:
        _check_whole(pipeline)
        folder = _network(pipeline)
    elif (folder.parent / INDEX).is_file():
        pipeline = folder.parent
    autoencoder = None if pipeline is None else _autoencoder(pipeline)
    config = _config(folder)
    check_weights(folder, config)
    if noise is None and pipeline is not None:
        noise = NoiseSchedule.from_scheduler(pipeline)
    if noise is None:
        log.warning(
            "%s: nothing says which noise process it was trained on; taken are %d timesteps of linear betas, %g to %g, and a network that "
            "predicts the noise; give noise=NoiseSchedule(...) where it was another",
            folder,
            NoiseSchedule().timesteps,
            NoiseSchedule().beta_start,
            NoiseSchedule().beta_end,
        )
    kinds = () if pipeline is None else tuple(_parts(pipeline).values())
    text = pipeline if any(kind in TEXT_ENCODERS for kind in kinds) else None
    classes = pipeline / CLASS_EMBEDDING / WEIGHTS if pipeline and {*kinds} & {*CLASS_EMBEDDINGS} else None
    length = None if text is None else _length(text, kinds)
    unknown = "" if pipeline is None or autoencoder is not None else _unknown_autoencoder(pipeline)
    return Found(folder, config, noise, autoencoder, text, length, classes, unknown)


def _length(pipeline: Path, kinds: Collection[str]) -> int | None:
    """Tokens of a text, as the pipeline's class says or, of one that was exported here, its schedule; None where its tokenizer does."""
    known = LENGTHS.get(str(read_json(pipeline / INDEX, REMEDY).get("_class_name")))
    schedule = pipeline / "schedule.json"
    if known is not None or "T5EncoderModel" not in kinds or not schedule.is_file():
        return known
    told = read_json(schedule, REMEDY).get("text")
    return int(told["tokens"]) if isinstance(told, dict) and "tokens" in told else None


def _parts(pipeline: Path) -> dict[str, Any]:
    """Classes of a pipeline's components by name. Raises UserError for a pipeline whose networks are given more than a noisy state."""
    index = read_json(pipeline / INDEX, REMEDY)
    kind = str(index.get("_class_name"))  # of a pipeline with code of its own, as exported folders have, a list
    if kind in REFUSED:
        raise UserError(f"{pipeline} is a {kind}, {REFUSED[kind]}; {REMEDY}")
    parts = {
        name: entry[1]
        for name, entry in index.items()
        if isinstance(entry, list) and len(entry) == 2 and not name.startswith("_")
    }
    known = (*NETWORKS, FORMER, *AUTOENCODERS, *TEXT_ENCODERS, *CLASS_EMBEDDINGS)
    left = [name for name, kind in parts.items() if kind and kind not in known and not name.startswith(USED)]
    if left:
        log.info("%s: %s is not needed, and is left out", pipeline, ", ".join(left))
    return parts


def _check_whole(pipeline: Path) -> None:
    """Raises UserError where a further network has a hand in each step, which the network alone would run without."""
    for name, kind in _parts(pipeline).items():
        if re.search("ControlNet|Adapter", str(kind)):
            raise UserError(
                f"{pipeline} has {name}, a {kind}, which has a hand in each step and is not run here; give the network's own folder, such as {pipeline / 'unet'}, for it alone"
            )


def _autoencoder(pipeline: Path) -> Path | None:
    found = [name for name, kind in _parts(pipeline).items() if kind in AUTOENCODERS and re.fullmatch(r"\w+", name)]
    if len(found) > 1:
        raise UserError(f"{pipeline} has the autoencoders {', '.join(found)}; one with a single one is needed")
    return _inside(pipeline, found[0]) if found else None


def _unknown_autoencoder(pipeline: Path) -> str:
    parts = _parts(pipeline)
    found = (kind for name, kind in parts.items() if kind and (name in DECODING or kind.startswith("Autoencoder")))
    return next(found, "")


def _network(pipeline: Path) -> Path:
    known = _parts(pipeline)
    kinds = (*NETWORKS, FORMER)
    networks = [name for name, kind in known.items() if kind in kinds and re.fullmatch(r"\w+", name)]
    if len(networks) != 1:
        others = ", ".join(f"{name} ({kind})" for name, kind in known.items() if kind) or "nothing"
        raise UserError(f"{pipeline} is a pipeline of {others}; one with a single {' or '.join(NETWORKS)} is needed")
    return _inside(pipeline, networks[0])


def _inside(pipeline: Path, name: str) -> Path:
    """The folder of a component; as for diffusers the pipeline's own where there is none, as the first DDPMs were released."""
    inner = pipeline / name
    return pipeline if (pipeline / "config.json").is_file() and not inner.is_dir() else inner


def _config(folder: Path) -> dict[str, Any]:
    config = read_json(folder / "config.json", REMEDY)
    name = config.get("_class_name")
    name = FORMERLY.get(str(config.get("norm_type")), name) if name == FORMER else name
    if name not in NETWORKS:
        raise UserError(f"{folder} holds a {name}, not a {' or a '.join(NETWORKS)}; {REMEDY}")
    taken = set(inspect.signature(getattr(diffusers, name).__init__).parameters) - {"self"}
    unknown = sorted(key for key in config if not key.startswith("_") and key not in taken)
    if unknown:  # an average's decay, settings of newer versions
        log.info("%s: %s is no setting of %s here, and is left out", folder / "config.json", ", ".join(unknown), name)
    found = {key: value for key, value in config.items() if key in taken}
    return found if name == NETWORKS[0] else {"_class_name": name, **found}


def weight_files(folder: Path) -> list[Path]:
    """The one file of the weights, or all shards that its index names. Raises UserError where there are none, or one is missing."""
    stem, _, ending = SAFETENSORS_WEIGHTS_NAME.rpartition(".")
    whole = [folder / f"{stem}{variant}.{ending}" for variant in VARIANTS]
    single = next((file for file in whole if file.is_file()), None)
    if single is not None:
        return [single]
    index_stem, _, index_ending = SAFE_WEIGHTS_INDEX_NAME.rpartition(".")
    indices = [folder / f"{index_stem}{variant}.{index_ending}" for variant in VARIANTS]
    index = next((file for file in indices if file.is_file()), None)
    if index is None:
        if any(folder.glob(f"{stem}*.bin")):
            whose = next((place for place in (folder, folder.parent) if (place / INDEX).is_file()), None)
            made = "the network's own class" if whose is None else "DiffusionPipeline"
            raise UserError(
                f"{folder} has its weights as .bin, which nothing here reads, for these may hold code; save the model with safetensors by diffusers, "
                f"{made}.from_pretrained({str(whose or folder)!r}).save_pretrained(ANOTHER), and give that folder"
            )
        raise UserError(f"{whole[0]} does not exist; save the model with safetensors")
    shards = read_json(index, "save the model anew").get("weight_map")
    names = sorted(set(shards.values())) if isinstance(shards, dict) else []
    if not names or not all(isinstance(name, str) and re.fullmatch(r"[\w.-]+\.safetensors", name) for name in names):
        raise UserError(f"{index} names no files of weights beside it; save the model anew")
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise UserError(f"{folder / missing[0]} does not exist, though {index.name} names it; copy all files")
    return [folder / name for name in names]


def weights_digest(folder: Path) -> str:
    """16 hexadecimal digits that identify the files of the weights."""
    found = hashlib.sha256()
    for path in weight_files(folder):
        add_file(found, path)
    return found.hexdigest()[:16]


def check_weights(folder: Path, config: Mapping[str, Any]) -> None:
    """Compares names and shapes with the network's, reading no tensor. Raises UserError naming the first that differ."""
    check_weights_of(_empty(folder, config), folder)


def _empty(folder: Path, config: Mapping[str, Any]) -> torch.nn.Module:
    """The stock network on the meta device."""
    kind = getattr(diffusers, config.get("_class_name", NETWORKS[0]))
    with torch.device("meta"):
        try:
            net: torch.nn.Module = kind(**{n: value for n, value in config.items() if not n.startswith("_")})
        except (TypeError, ValueError, NotImplementedError) as error:
            raise UserError(
                f"{folder / 'config.json'}: diffusers cannot make this network ({first_line(error)})"
            ) from error
    return net


def check_weights_of(net: torch.nn.Module, folder: Path) -> None:
    """`check_weights`, of a network that is there, if only on the meta device."""
    wanted = {name: tuple(tensor.shape) for name, tensor in net.state_dict().items()}
    given = {name: shape for name, shape, _ in _tensors_of(net, folder)}
    missing, unexpected = sorted(wanted.keys() - given.keys()), sorted(given.keys() - wanted.keys())
    if missing or unexpected:
        named = [
            f"{words} {names[0]} ({len(names)} in all)"
            for words, names in (("missing", missing), ("unexpected", unexpected))
            if names
        ]
        raise UserError(f"the weights in {folder} are not those of the network in its config.json: {', '.join(named)}")
    odd = sorted(name for name in wanted if wanted[name] != given[name])
    if odd:
        raise UserError(
            f"the weights in {folder} are of another network than its config.json says: {odd[0]} is {given[odd[0]]}, not {wanted[odd[0]]}"
        )


def read_weights(folder: Path, config: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """All tensors by name, float32, on the CPU."""
    return read_weights_of(_empty(folder, config), folder)


def read_weights_of(net: torch.nn.Module, folder: Path) -> dict[str, torch.Tensor]:
    """`read_weights`, of a network that is there, if only on the meta device."""
    check_weights_of(net, folder)
    return {name: read().float() for name, _, read in _tensors_of(net, folder)}


def _tensors_of(net: torch.nn.Module, folder: Path) -> Iterator[tuple[str, tuple[int, ...], Any]]:
    """As the network calls them, without those that it has no longer."""
    now, former = _present_names(net), FORMER_TENSORS.get(type(net).__name__, ())
    for name, shape, read in _tensors(folder):
        if name not in former:
            yield now.get(name, name), shape, read


def _present_names(net: torch.nn.Module) -> dict[str, str]:
    """What the network calls tensors that older files have under another name, by that one."""
    return {
        f"{block}.{former}.{tensor}": f"{block}.{present}.{tensor}"
        for block, module in net.named_modules()
        if getattr(module, "_from_deprecated_attn_block", False)
        for former, present in FORMER_LAYERS.items()
        for tensor in ("weight", "bias")
    }


def _tensors(folder: Path) -> Iterator[tuple[str, tuple[int, ...], Any]]:
    """Name, shape, and a call that reads it."""
    for path in weight_files(folder):
        try:
            with safe_open(path, "pt") as file:
                for name in file.keys():  # noqa: SIM118  it is no dictionary
                    yield (
                        name,
                        tuple(file.get_slice(name).get_shape()),
                        lambda file=file, name=name: file.get_tensor(name),
                    )
        except SafetensorError as error:
            raise UserError(f"{path} is cut off or damaged ({first_line(error)}); copy it anew") from error
