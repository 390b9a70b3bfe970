"""Between images and what the sampler holds: pixels as they are, or the latents of a stock diffusers autoencoder.

Of a data set the latents are computed once and kept, mean and log-variance of each image's posterior, mapped into memory where they are
read: that of the mirrored image too where a training flips, since a mirrored latent is not the latent of the mirrored image.
"""

from __future__ import annotations

import hashlib
import inspect
import logging
import os
from collections.abc import Generator, Iterator, Mapping
from dataclasses import field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Protocol

import diffusers
import numpy as np
import numpy.typing as npt
import torch
from diffusers import VQModel
from torch.utils.flop_counter import FlopCounterMode

from nas.base.files import add_file, first_line, partial_of, read_json, room
from nas.contracts import Images, ImageSet, Progress, UserError, digest_of, frozen
from nas.recipes import Positive, recipe
from search_spaces.pretrained import AUTOENCODERS, read_weights_of, weight_files
from search_spaces.shipped.latents import decoded, drawn, moments

log = logging.getLogger("nas")

Shape = tuple[int, int, int]
"""(channels, height, width)."""

ENCODED = 256
"""Images in one call of an encoder."""

UNTOLD_SCALE = 0.18215
"""What diffusers scales the latents of an AutoencoderKL with whose config was written before it could say so: Stable Diffusion 1 and 2."""


class States(Protocol):
    """A data set as states without noise."""

    def draw(self, chosen: torch.Tensor, mirrored: torch.Tensor | None, generator: torch.Generator) -> torch.Tensor:
        """Of the chosen images, (n, channels, height, width), those mirrored where `mirrored` says so, (n,)."""


class LoadedCodec(Protocol):
    @property
    def in_pixels(self) -> bool: ...

    @property
    def network(self) -> torch.nn.Module | None:
        """The stock model that an exported folder takes along."""

    def decode(self, states: torch.Tensor) -> torch.Tensor:
        """Images, (n, channels, height, width)."""

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """Their states without noise."""

    def keep(self, data: ImageSet, mirrored: bool) -> Iterator[Progress]:
        """Computes what `states` needs, and keeps it beside the weights."""

    def states(self, data: ImageSet) -> States: ...


class Codec(Protocol):
    """Recipe of what lies between."""

    def describe(self) -> dict[str, Any]: ...

    def image_shape(self, state: Shape) -> Shape: ...

    def digest(self, folder: Path) -> str:
        """Identifies its weights; empty where there are none."""

    def decoder_macs(self, state: Shape) -> int:
        """Multiply-adds that make one image of its state."""

    def training_macs(self, state: Shape) -> float:
        """What `prepare` takes, forward and backward."""

    def prepare(self, images: Images, folder: Path, seed: int, device: str) -> Iterator[Progress]:
        """Makes what `load` needs and the folder lacks."""

    def load(self, folder: Path | None, device: str) -> LoadedCodec: ...


@recipe
class Pixels:
    """A state is an image."""

    def describe(self) -> dict[str, Any]:
        return {"class": "Pixels"}

    def image_shape(self, state: Shape) -> Shape:
        return state

    def digest(self, folder: Path) -> str:
        return ""

    def decoder_macs(self, state: Shape) -> int:
        return 0

    def training_macs(self, state: Shape) -> float:
        return 0.0

    def prepare(self, images: Images, folder: Path, seed: int, device: str) -> Iterator[Progress]:
        yield from ()

    def load(self, folder: Path | None, device: str) -> LoadedPixels:
        return LoadedPixels(device)


class LoadedPixels:
    in_pixels = True
    network = None

    def __init__(self, device: str) -> None:
        self._device = device

    def decode(self, states: torch.Tensor) -> torch.Tensor:
        return states

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        return images

    def keep(self, data: ImageSet, mirrored: bool) -> Iterator[Progress]:
        yield from ()

    def states(self, data: ImageSet) -> States:
        return _Images(torch.from_numpy(data.pixels), self._device)


class _Images:
    """They stay where they are, for there may be more than a device holds."""

    def __init__(self, pixels: torch.Tensor, device: str) -> None:
        self._pixels = pixels
        self._device = device

    def draw(self, chosen: torch.Tensor, mirrored: torch.Tensor | None, generator: torch.Generator) -> torch.Tensor:
        x = self._pixels[chosen.cpu()].to(self._device)
        return x if mirrored is None else torch.where(mirrored.to(x.device)[:, None, None, None], x.flip(-1), x)


@recipe
class Autoencoder:
    """The latents of a stock AutoencoderKL or VQModel in a local folder; a relative path is one in the study file's folder.

    Latents are scaled as its config says: (z - shift) * scale, or by channel where it has `latents_mean` and `latents_std`. `scale` takes the
    place of its `scaling_factor`. `config`: what the folder's config.json is expected to say, from which shapes and costs follow before there is
    a folder. `posterior`: what a network is trained on, a "sample" of each image's posterior, anew at every step, or its
    "mean". Latents of a VQModel are continuous; it quantises when it decodes. Raises UserError where the folder holds no such model, and where its
    scaling factor is not to be trusted: diffusers writes 0.18215 where nothing was said, which is Stable Diffusion's.
    """

    path: str
    scale: Positive | None = None
    posterior: Literal["sample", "mean"] = "sample"
    config: Mapping[str, Any] | None = None
    base: str = field(default_factory=os.getcwd, repr=False, compare=False, kw_only=True)

    def __post_init__(self) -> None:
        told, kind = self._config.get("scaling_factor"), self._config["_class_name"]
        if self.scale is None and (told is None or (kind == "VQModel" and told == 0.18215)):
            raise UserError(
                f"{self.folder / 'config.json'}: the {kind}'s scaling_factor is {told}, which diffusers takes where nothing was said; give "
                'Autoencoder(..., scale=), or write there, what its latents were multiplied with in training ("scaling_factor": 1.0 for LDM\'s VQ models)'
            )

    @property
    def folder(self) -> Path:
        return (Path(self.base) / Path(self.path).expanduser()).resolve()

    def describe(self) -> dict[str, Any]:
        return {
            "class": "Autoencoder",
            "weights": _files_digest(self.folder),
            "scale": self.scale,
            "posterior": self.posterior,
        }

    def image_shape(self, state: Shape) -> Shape:
        return image_shape_of(self._config, state, str(self.folder))

    def check(self) -> None:
        """Raises UserError where the folder is missing or says otherwise than `config`; before anything is trained."""
        found = read_config(self.folder)
        weight_files(self.folder)
        for name, expected in (self.config or {}).items():
            if frozen(found.get(name)) != frozen(expected):
                raise UserError(
                    f"{self.folder / 'config.json'}: {name} is {found.get(name)!r}, the study expects {expected!r}; change one of them"
                )

    def digest(self, folder: Path) -> str:
        return _files_digest(self.folder)

    def decoder_macs(self, state: Shape) -> int:
        return decoder_macs(self._config, state)

    def training_macs(self, state: Shape) -> float:
        return 0.0

    def prepare(self, images: Images, folder: Path, seed: int, device: str) -> Iterator[Progress]:
        yield from ()

    def load(self, folder: Path | None, device: str) -> LoadedAutoencoder:
        self.check()
        network = read_autoencoder(self.folder)
        if self.scale is not None:
            network.register_to_config(scaling_factor=self.scale)
        return LoadedAutoencoder(network.to(device), self.digest(Path()), self.posterior, folder)

    @cached_property
    def _config(self) -> dict[str, Any]:
        if self.config is None:
            return read_config(self.folder)
        if self.config.get("_class_name") not in AUTOENCODERS:
            raise UserError(f"Autoencoder: config has no _class_name of {' or '.join(AUTOENCODERS)}")
        kind = getattr(diffusers, self.config["_class_name"])
        usual = {
            n: p.default for n, p in inspect.signature(kind.__init__).parameters.items() if p.default is not p.empty
        }
        return {**usual, "scaling_factor": None, **self.config}

    def __getstate__(self) -> dict[str, Any]:
        return {name: self.__dict__[name] for name in self.__dataclass_fields__}


class LoadedAutoencoder:
    """`identity`: of its weights. `folder`: where latents are kept; None for nowhere."""

    in_pixels = False

    def __init__(
        self, network: Any, identity: str, posterior: Literal["sample", "mean"] = "sample", folder: Path | None = None
    ) -> None:
        self.network = network.eval().requires_grad_(False)
        self._identity = identity
        self.posterior = posterior
        self._folder = folder
        self._made: dict[str, npt.NDArray[np.float32]] = {}
        self._device = next(network.parameters()).device

    @torch.no_grad()
    def decode(self, states: torch.Tensor) -> torch.Tensor:
        return decoded(self.network, states)

    @torch.no_grad()
    def encode(self, images: torch.Tensor) -> torch.Tensor:
        return drawn(self.network, moments(self.network, images), "mean", torch.Generator())

    def keep(self, data: ImageSet, mirrored: bool) -> Iterator[Progress]:
        for flip in (False, True)[: 2 if mirrored else 1]:
            yield from self._encode_all(data, flip)

    def states(self, data: ImageSet) -> States:
        return _Latents(self, data)

    def kept(self, data: ImageSet, mirrored: bool) -> npt.NDArray[np.float32]:
        """Mean and log-variance of each image's posterior, (n, 2, channels, height, width); computed where that is still to be done."""
        for _ in self._encode_all(data, mirrored):
            pass
        path = self._path(data, mirrored)
        if path is None:
            return self._made[self._key(data, mirrored)]
        try:
            found: npt.NDArray[np.float32] = np.load(path, mmap_mode="r", allow_pickle=False)
        except (ValueError, EOFError) as error:
            raise UserError(f"{path} is damaged ({first_line(error)}); delete it, it is made again") from error
        return found

    def drawn(self, kept: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """States of kept moments (n, 2, channels, height, width)."""
        return drawn(self.network, kept.to(self._device), self.posterior, generator)

    @torch.no_grad()
    def _encode_all(self, data: ImageSet, mirrored: bool) -> Iterator[Progress]:
        key, path = self._key(data, mirrored), self._path(data, mirrored)
        if key in self._made or (path is not None and path.exists()):
            return
        if path is None:
            self._made[key] = yield from self._encoded(data, mirrored, None)
            return
        with partial_of(path) as partial:
            latents = yield from self._encoded(data, mirrored, partial)
            assert isinstance(latents, np.memmap)
            latents.flush()
            os.replace(partial, path)

    def _encoded(
        self, data: ImageSet, mirrored: bool, partial: Path | None
    ) -> Generator[Progress, None, npt.NDArray[np.float32]]:
        latents: npt.NDArray[np.float32] | None = None
        for start in range(0, len(data), ENCODED):
            images = torch.from_numpy(data.pixels[start : start + ENCODED]).to(self._device)
            made = moments(self.network, images.flip(-1) if mirrored else images)
            if latents is None:
                latents = room(partial, (len(data), *made.shape[1:]))
            latents[start : start + ENCODED] = made.float().cpu().numpy()
            what = "latents of mirrored images" if mirrored else "latents"
            yield Progress(what, min(start + ENCODED, len(data)), len(data))
        assert latents is not None
        return latents

    def _path(self, data: ImageSet, mirrored: bool) -> Path | None:
        return None if self._folder is None else self._folder / "latents" / f"{self._key(data, mirrored)}.npy"

    def _key(self, data: ImageSet, mirrored: bool) -> str:
        return digest_of([data.digest, self._identity, mirrored])


class _Latents:
    def __init__(self, codec: LoadedAutoencoder, data: ImageSet) -> None:
        self._codec = codec
        self._data = data
        self._plain = codec.kept(data, False)

    def draw(self, chosen: torch.Tensor, mirrored: torch.Tensor | None, generator: torch.Generator) -> torch.Tensor:
        places = chosen.cpu().numpy()
        kept = self._plain[places]
        if mirrored is not None:
            flipped = mirrored.cpu().numpy()
            kept[flipped] = self._mirrored[places[flipped]]
        return self._codec.drawn(torch.from_numpy(kept), generator)

    @cached_property
    def _mirrored(self) -> npt.NDArray[np.float32]:
        """Asked for at every step of a training that flips, by no other."""
        return self._codec.kept(self._data, True)


def autoencoder_in(folder: Path) -> Autoencoder:
    """That of a pipeline, which scales its latents as diffusers does for the pipeline."""
    config = read_config(folder)
    if config["_class_name"] == "AutoencoderKL" and config.get("scaling_factor") is None:
        log.info("%s has no scaling_factor; diffusers takes %g", folder / "config.json", UNTOLD_SCALE)
        return Autoencoder(str(folder), scale=UNTOLD_SCALE)
    return Autoencoder(str(folder))


def read_config(folder: Path) -> dict[str, Any]:
    """Of an autoencoder's folder. Raises UserError where it is none that is known here."""
    remedy = "give the folder of an AutoencoderKL or VQModel"
    config = read_json(folder / "config.json", remedy)
    if config.get("_class_name") not in AUTOENCODERS:
        raise UserError(f"{folder} holds a {config.get('_class_name')}, not an {' or a '.join(AUTOENCODERS)}; {remedy}")
    return config


def read_autoencoder(folder: Path) -> Any:
    """The stock model, its weights compared with what its config asks for."""
    config = read_config(folder)
    network = empty_autoencoder(config, str(folder / "config.json")).to_empty(device="cpu")
    network.load_state_dict(read_weights_of(network, folder))
    return network.eval()


def image_shape_of(config: Any, state: Shape, where: str) -> Shape:
    """Raises UserError for states of other channels than its latents."""
    if state[0] != config["latent_channels"]:
        raise UserError(
            f"{where}: latents have {config['latent_channels']} channels, the network takes {state[0]}; they must be as many"
        )
    factor = 2 ** (len(config["block_out_channels"]) - 1)
    return int(config["out_channels"]), state[1] * factor, state[2] * factor


def decoder_macs(config: Any, state: Shape) -> int:
    """Counted by torch on the meta device."""
    network = empty_autoencoder(config, "the autoencoder")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        latents = torch.empty((1, *state), device="meta")
        # Which code a latent is next to is no multiply-add of a layer, and needs values.
        if isinstance(network, VQModel):
            network.decode(latents, force_not_quantize=True)
        else:
            network.decode(latents)
    return int(counter.get_total_flops()) // 2


def empty_autoencoder(config: Any, where: str) -> Any:
    """The stock model on the meta device."""
    kind = getattr(diffusers, config["_class_name"])
    taken = {name: value for name, value in config.items() if name in kind._get_init_keys(kind)}
    with torch.device("meta"):
        try:
            return kind(**taken)
        except (TypeError, ValueError, NotImplementedError) as error:
            raise UserError(f"{where}: diffusers cannot make this {kind.__name__} ({first_line(error)})") from error


def _files_digest(folder: Path) -> str:
    found = hashlib.sha256((folder / "config.json").read_bytes())
    for file in weight_files(folder):
        add_file(found, file)
    return found.hexdigest()[:16]
