"""An autoencoder of one's own, where there is none: a small stock AutoencoderKL trained on the study's images before the network is."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from diffusers import AutoencoderKL
from pydantic import Field
from torch.utils.flop_counter import FlopCounterMode

from nas.base.files import read_json, tensors_digest, written
from nas.base.interrupts import whole
from nas.contracts import Images, ImageSet, Progress, UserError, derive_seed, digest_of
from nas.recipes import Batch, Count, Few, Natural, Positive, Share, Weight, recipe
from search_spaces.codec import (
    LoadedAutoencoder,
    Shape,
    decoder_macs,
    image_shape_of,
    read_autoencoder,
)
from search_spaces.shipped.latents import at_once
from search_spaces.training.optimiser import Optimiser
from search_spaces.training.stages import Checkpoints

log = logging.getLogger("nas")

FOLDER, FACTS = "autoencoder", "training.json"
COLLAPSED = 0.9
"""Share of a latent channel's variance that is the posterior's own noise, from which on the channel says nothing."""


@recipe
class TrainAutoencoder:
    """A stock AutoencoderKL: `channels` of each level, outermost first, each level but the last halving the sides; `layers` residual blocks in
    each; images of `in_channels`, `latent_channels` latents.

    Loss: squared error and `absolute` times absolute error, means over pixels, and `divergence` times the posterior's divergence from a
    standard normal, summed over an image's latents (Rombach et al. 2022, without its adversary). Adam, the weights' moving average and the
    learning rate's course are those of `Sandwich`. Afterwards every latent channel has mean 0 and deviation 1 over the images, by
    weights alone: its scaling factor is 1, for every pipeline.

    In the run folder `supernet/autoencoder/training.json` says what came of it: the squared error of reconstructions, of held-out images where
    there are some, and which share of each channel's variance is the posterior's noise; a channel that is all noise is warned of.
    """

    in_channels: Literal[1, 3] = 3
    latent_channels: Few = 3
    channels: Annotated[tuple[Few, ...], Field(min_length=2)] = (16, 32, 32)
    layers: Few = 1
    norm_groups: Few = 8
    steps: Count = 2500
    batch: Batch = 32
    learning_rate: Positive = 2e-3
    warmup: Natural = 100
    ema: Share = 0.995
    clip: Positive = 1.0
    absolute: Weight = 0.1
    divergence: Weight = 2e-5
    flip: bool = False
    checkpoint_every: Count = 250
    posterior: Literal["sample", "mean"] = "sample"

    def __post_init__(self) -> None:
        odd = next((count for count in self.channels if count % self.norm_groups), None)
        if odd is not None:
            raise UserError(f"channels {self.channels}: {odd} is no multiple of norm_groups={self.norm_groups}")

    @property
    def config(self) -> dict[str, Any]:
        """Arguments of the stock class."""
        levels = len(self.channels)
        return {
            "_class_name": "AutoencoderKL",
            "in_channels": self.in_channels,
            "out_channels": self.in_channels,
            "latent_channels": self.latent_channels,
            "block_out_channels": self.channels,
            "down_block_types": ("DownEncoderBlock2D",) * levels,
            "up_block_types": ("UpDecoderBlock2D",) * levels,
            "layers_per_block": self.layers,
            "norm_num_groups": self.norm_groups,
            "scaling_factor": 1.0,
        }

    def describe(self) -> dict[str, Any]:
        settings = asdict(self)
        del settings["checkpoint_every"]
        return {"class": "TrainAutoencoder", **settings}

    def image_shape(self, state: Shape) -> Shape:
        return image_shape_of(self.config, state, "TrainAutoencoder")

    def decoder_macs(self, state: Shape) -> int:
        return decoder_macs(self.config, state)

    def training_macs(self, state: Shape) -> float:
        """Of all steps, forward and backward."""
        with torch.device("meta"):
            network = self._network()
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            network.decode(network.encode(torch.empty((1, *self.image_shape(state)), device="meta")).latent_dist.mean)
        return 3.0 * self.steps * self.batch * (int(counter.get_total_flops()) // 2)

    def digest(self, folder: Path) -> str:
        return tensors_digest(self._weights(folder))

    def load(self, folder: Path | None, device: str) -> LoadedAutoencoder:
        if folder is None:
            raise UserError(
                "the autoencoder is trained in a run folder, and none is given; use Autoencoder(path) for one that is there"
            )
        identity = self.digest(folder)
        return LoadedAutoencoder(read_autoencoder(folder / FOLDER).to(device), identity, self.posterior, folder)

    def prepare(self, images: Images, folder: Path, seed: int, device: str) -> Iterator[Progress]:
        """Trains it in `folder`/autoencoder, or goes on; nothing where it is finished. Raises UserError where there is another."""
        data = images.load()
        # Whether networks are trained on the posteriors' means or on samples of them is nothing to it, though it once told trainings apart.
        digest, other = (
            digest_of({**self.describe(), "posterior": posterior, "images": data.digest, "seed": seed})
            for posterior in (self.posterior, "mean" if self.posterior == "sample" else "sample")
        )
        if (folder / FOLDER / FACTS).exists():
            told = read_json(folder / FOLDER / FACTS, "delete the folder to train again")
            if told.get("recipe") not in (digest, other):
                raise UserError(
                    f"{folder / FOLDER} was trained on other images or with other settings; use another --out, or delete it"
                )
            return
        shape = tuple(data.pixels.shape[1:])
        if shape[0] != self.in_channels or any(side % 2 ** (len(self.channels) - 1) for side in shape[1:]):
            raise UserError(
                f"TrainAutoencoder takes {self.in_channels} channels and sides that can be halved {len(self.channels) - 1} times, the images are "
                f"{'x'.join(map(str, shape))}"
            )
        folder.mkdir(parents=True, exist_ok=True)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive_seed(seed, "autoencoder", "weights"))
            trained = _Trained(self._network().to(device))
        files = Checkpoints(folder / f"{FOLDER}.safetensors", digest, self.checkpoint_every)
        optimiser = Optimiser(self, trained, digest)
        files.restore(optimiser)
        yield from self._steps(optimiser, trained, data, seed, files)
        optimiser.adopt_average()
        facts = {"recipe": digest, **_evened_out(trained.network, data)}
        partial = folder / f".{FOLDER}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        with written(partial):
            trained.network.save_pretrained(partial)
            (partial / FACTS).write_text(json.dumps(facts, indent=1) + "\n")
        shutil.rmtree(folder / FOLDER, ignore_errors=True)  # what was left of one that did not end
        os.replace(partial, folder / FOLDER)
        files.path.unlink(missing_ok=True)
        _say(facts, folder)

    def _steps(
        self, optimiser: Optimiser, trained: _Trained, data: ImageSet, seed: int, files: Checkpoints
    ) -> Iterator[Progress]:
        pixels = torch.from_numpy(data.pixels)
        try:
            while optimiser.step < self.steps:
                with whole():
                    generator = torch.Generator().manual_seed(derive_seed(seed, optimiser.step, "autoencoder"))
                    chosen = torch.randint(len(pixels), (self.batch,), generator=generator)
                    x = pixels[chosen].to(trained.device)
                    if self.flip:
                        mirrored = torch.rand(self.batch, generator=generator) < 0.5
                        x = torch.where(mirrored.to(x.device)[:, None, None, None], x.flip(-1), x)
                    posterior = trained.network.encode(x).latent_dist
                    noise = torch.randn(posterior.mean.shape, generator=generator).to(x)
                    difference = trained.network.decode(posterior.mean + posterior.std * noise).sample - x
                    squared = difference.square().mean()
                    loss = squared + self.absolute * difference.abs().mean() + self.divergence * posterior.kl().mean()
                    if not bool(torch.isfinite(loss)):
                        raise UserError(
                            f"the autoencoder's loss is {loss.item()} at step {optimiser.step + 1}; lower learning_rate={self.learning_rate:g}, and use "
                            "another --out"
                        )
                    torch.autograd.backward(loss)
                    optimiser.update()
                    files.keep(optimiser, self.steps)
                yield Progress("autoencoder", optimiser.step, self.steps, {"squared error": squared.item()})
        except (GeneratorExit, KeyboardInterrupt):
            if optimiser.step:
                files.keep_now(optimiser)
            raise

    def _network(self) -> Any:
        return AutoencoderKL(**{name: value for name, value in self.config.items() if name != "_class_name"})

    def _weights(self, folder: Path) -> Path:
        path = folder / FOLDER / "diffusion_pytorch_model.safetensors"
        if not path.exists():
            raise UserError(f"{path} does not exist; `nas run` trains it")
        return path


class _Trained:
    """An autoencoder as the optimiser wants its networks."""

    def __init__(self, network: Any) -> None:
        self.network = network
        self.device = next(network.parameters()).device
        self.trained_macs = 0

    def weights(self, expert: str) -> Any:
        return self.network

    def forget(self) -> None:
        """Nothing was made of the weights."""


@torch.no_grad()
def _evened_out(network: Any, data: ImageSet) -> dict[str, Any]:
    """Makes each latent channel's mean 0 and deviation 1 over the images, by the last layer of the encoder and the first of the decoder; what
    can be said of reconstructions and of the channels."""
    device = next(network.parameters()).device
    mean, spread, noise = (values.to(device, torch.float32) for values in _moments(network, data, device))
    scale = (spread + noise).sqrt()
    encoder, decoder = network.quant_conv, network.post_quant_conv
    both = torch.cat([scale, torch.ones_like(scale)])
    encoder.weight.div_(both[:, None, None, None])
    encoder.bias.div_(both).sub_(torch.cat([mean / scale, 2 * scale.log()]))
    decoder.bias.add_(decoder.weight[:, :, 0, 0] @ mean)
    decoder.weight.mul_(scale[None, :, None, None])
    shown = data.reference
    total = 0.0
    for x in _parts(network, shown, device):
        total += float((network.decode(network.encode(x).latent_dist.mean).sample - x).square().mean((1, 2, 3)).sum())
    return {
        "squared_error": total / len(shown),
        "of": "held-out images" if data.held_out is not None else "the images that it was trained on",
        "images": len(shown),
        "share_of_noise": [float(share) for share in noise / (spread + noise)],
    }


def _moments(network: Any, data: ImageSet, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of all posteriors, by channel: mean and variance of their means, and the mean of their variances; part by part, for there may be more images than
    memory holds."""
    count, total, squares, variances = 0, *(torch.zeros((), dtype=torch.float64) for _ in range(3))
    for x in _parts(network, data, device):
        posterior = network.encode(x).latent_dist
        means = posterior.mean.cpu().double()
        count += means.numel() // means.shape[1]
        total = total + means.sum((0, 2, 3))
        squares = squares + means.square().sum((0, 2, 3))
        variances = variances + posterior.var.cpu().double().sum((0, 2, 3))
    mean = total / count
    return mean, (squares - count * mean.square()) / (count - 1), variances / count


def _parts(network: Any, data: ImageSet, device: torch.device) -> Iterator[torch.Tensor]:
    """So many images at once that the autoencoder's maps of them have room."""
    _, _, height, width = data.pixels.shape
    each = min(256, at_once(network, height * width))
    for start in range(0, len(data), each):
        yield torch.from_numpy(data.pixels[start : start + each]).to(device)


def _say(facts: dict[str, Any], folder: Path) -> None:
    log.info("autoencoder: squared error %.3g of %d %s", facts["squared_error"], facts["images"], facts["of"])
    collapsed = [number for number, share in enumerate(facts["share_of_noise"]) if share > COLLAPSED]
    if collapsed:
        log.warning(
            "%s: latent channel %s is nearly all noise, and says nothing about an image; lower TrainAutoencoder's divergence, or give fewer "
            "latent_channels",
            folder / FOLDER,
            ", ".join(map(str, collapsed)),
        )
