"""Fine-tunes the networks of an exported folder, each on the timesteps that it serves, with distillation from the full network.

Needs torch, diffusers, accelerate, numpy, pillow and safetensors alone; an exported folder holds a copy of this file:

    python train_diffusers.py --images my/images            # or: accelerate launch train_diffusers.py ...

`train.json` says which timesteps each network serves, the loss and the defaults. What is trained lies in `trained/`, a folder like this
one. The same command goes on after a stop.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import numpy.typing as npt
import torch
from accelerate import Accelerator, PartialState
from safetensors.torch import load_file, save_file

TRAINED = "trained"
PROVENANCE = "provenance.json"


@dataclass(frozen=True)
class Settings:
    """`steps`: gradient steps of all networks together, divided by how many timesteps each serves. `distillation`: share of the target
    that is the full network's prediction, instead of the noise. `features`: weight of the distance of blocks' spatial maps (mean square
    over channels, normalised; Zagoruyko & Komodakis 2017) to the full network's. `batch`: images of a step, on each device."""

    steps: int = 1000
    batch: int = 64
    learning_rate: float = 2e-4
    warmup: int = 50
    ema: float = 0.995
    clip: float = 1.0
    distillation: float = 0.5
    features: float = 0.0
    flip: bool = False
    precision: str = "no"
    seed: int = 0
    checkpoint_every: int = 250


def train(
    folder: Path, pixels: npt.NDArray[np.float32], settings: Settings, cpu: bool = False
) -> Iterator[dict[str, Any]]:
    """Trains what `folder/trained` lacks; yields after each step the network's name, its step, how many there are, the loss, and the
    average of its weights, which the next step changes.

    pixels: (n, channels, height, width) in [-1, 1].
    """
    accelerator = Accelerator(mixed_precision=settings.precision, cpu=cpu)
    plan = json.loads((folder / "train.json").read_text())
    into = folder / TRAINED
    into.mkdir(exist_ok=True)
    teacher = _read(folder / plan["teacher"]).to(accelerator.device).eval().requires_grad_(False)
    data = torch.from_numpy(pixels).to(accelerator.device)
    scheduler = diffusers.DDPMScheduler(**plan["scheduler"])
    for name, ranges in plan["timesteps"].items():
        if not (into / name / "config.json").exists():
            yield from _train_one(folder, name, ranges, teacher, data, scheduler, settings, accelerator)
    if accelerator.is_main_process:
        for part in folder.iterdir():
            if part.name not in (TRAINED, PROVENANCE, *plan["timesteps"]) and not (into / part.name).exists():
                partial = into / f".{part.name}.partial"
                shutil.rmtree(partial, ignore_errors=True)
                (shutil.copytree if part.is_dir() else shutil.copy)(part, partial)
                os.replace(partial, into / part.name)
        if (folder / PROVENANCE).exists():
            exported = json.loads((folder / PROVENANCE).read_text())
            (into / PROVENANCE).write_text(
                json.dumps({"exported": exported, "trained": asdict(settings)}, indent=2) + "\n"
            )


def _train_one(
    folder: Path,
    name: str,
    ranges: Sequence[Sequence[int]],
    teacher: Any,
    data: torch.Tensor,
    scheduler: Any,
    settings: Settings,
    accelerator: Any,
) -> Iterator[dict[str, Any]]:
    served = torch.cat([torch.arange(start, stop) for start, stop in ranges])
    total = max(1, round(settings.steps * len(served) / scheduler.config.num_train_timesteps))
    net = _read(folder / name).train()
    optimiser = torch.optim.Adam(net.parameters(), settings.learning_rate)
    net, optimiser = accelerator.prepare(net, optimiser)
    bare = accelerator.unwrap_model(net)
    average = {key: tensor.detach().clone() for key, tensor in bare.state_dict().items()}
    state = folder / TRAINED / f".{name}.safetensors"
    first = _restore(state, bare, optimiser, average)
    for step in range(first, total):
        # Each process has noise of its own; the same step has the same noise, whatever came before it.
        seed = int.from_bytes(np.random.default_rng((settings.seed, step, accelerator.process_index)).bytes(4), "big")
        generator = torch.Generator().manual_seed(seed)
        x0 = data[torch.randint(len(data), (settings.batch,), generator=generator).to(data.device)]
        if settings.flip:
            mirrored = torch.rand(settings.batch, generator=generator).to(data.device) < 0.5
            x0 = torch.where(mirrored[:, None, None, None], x0.flip(-1), x0)
        t = served[torch.randint(len(served), (settings.batch,), generator=generator)].to(data.device)
        noise = torch.randn(x0.shape, generator=generator).to(x0)
        x = scheduler.add_noise(x0, noise, t)
        loss = _loss(net, bare, teacher, x, t, noise, settings, accelerator)
        optimiser.zero_grad()
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(net.parameters(), settings.clip)
        rate = min(1.0, (step + 1) / max(settings.warmup, 1)) * 0.5 * (1 + np.cos(np.pi * step / total))
        for group in optimiser.param_groups:
            group["lr"] = settings.learning_rate * float(rate)
        optimiser.step()
        decay = min(settings.ema, (1 + step) / (10 + step))
        for key, tensor in bare.state_dict().items():
            average[key].lerp_(tensor.detach().to(average[key]), 1 - decay)
        if (step + 1) % settings.checkpoint_every == 0 and accelerator.is_main_process:
            _keep(state, bare, optimiser, average, step + 1)
        yield {"model": name, "step": step + 1, "steps": total, "loss": float(loss.detach()), "average": average}
    if accelerator.is_main_process:
        bare.load_state_dict(average)
        partial = folder / TRAINED / f".{name}"
        shutil.rmtree(partial, ignore_errors=True)
        bare.save_pretrained(partial)
        os.replace(partial, folder / TRAINED / name)
        state.unlink(missing_ok=True)
    accelerator.wait_for_everyone()
    accelerator.free_memory()


def _loss(
    net: Any,
    bare: Any,
    teacher: Any,
    x: torch.Tensor,
    t: torch.Tensor,
    noise: torch.Tensor,
    settings: Settings,
    accelerator: Any,
) -> torch.Tensor:
    mine, theirs = Maps(bare, settings.features > 0), Maps(teacher, settings.features > 0)
    with accelerator.autocast():
        prediction = _predict(net, x, t).float()
        target = noise
        if settings.distillation or settings.features:
            with torch.no_grad():
                shown = _predict(teacher, x, t).float()
            target = torch.lerp(noise, shown, settings.distillation)
    loss = torch.nn.functional.mse_loss(prediction, target)
    maps = [torch.nn.functional.mse_loss(a, b) for a, b in zip(mine.close(), theirs.close(), strict=True)]
    return loss + settings.features * torch.stack(maps).mean() if maps else loss


class Maps:
    """Spatial maps of a network's blocks, (batch, positions), as its next call has them."""

    def __init__(self, net: Any, wanted: bool) -> None:
        blocks = [*net.down_blocks, *net.up_blocks] if wanted else []
        self._found: list[torch.Tensor] = []
        self._hooks = [block.register_forward_hook(self._note) for block in blocks]

    def _note(self, block: Any, inputs: Any, output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        squares = hidden.float().square().mean(1).flatten(1)
        self._found.append(squares / squares.mean(1, keepdim=True).clamp_min(1e-12))

    def close(self) -> list[torch.Tensor]:
        for hook in self._hooks:
            hook.remove()
        return self._found


def _predict(net: Any, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    prediction: torch.Tensor = net(x, t, None, return_dict=False)[0]
    return prediction


def _read(folder: Path) -> Any:
    kind = json.loads((folder / "config.json").read_text())["_class_name"]
    return getattr(diffusers, kind).from_pretrained(folder, low_cpu_mem_usage=False, local_files_only=True)


def _keep(path: Path, net: Any, optimiser: Any, average: dict[str, torch.Tensor], step: int) -> None:
    """Whole or not at all."""
    tensors = {"step": torch.tensor(step)}
    names = {id(parameter): name for name, parameter in net.named_parameters()}
    tensors |= {f"weight:{name}": tensor for name, tensor in net.state_dict().items()}
    tensors |= {f"average:{name}": tensor for name, tensor in average.items()}
    for parameter, state in optimiser.state.items():
        tensors[f"first:{names[id(parameter)]}"] = state["exp_avg"]
        tensors[f"second:{names[id(parameter)]}"] = state["exp_avg_sq"]
    partial = path.with_suffix(".partial")
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, partial)
    os.replace(partial, path)


def _restore(path: Path, net: Any, optimiser: Any, average: dict[str, torch.Tensor]) -> int:
    """The step to go on with."""
    if not path.exists():
        return 0
    kept = load_file(path)
    net.load_state_dict({name[7:]: tensor for name, tensor in kept.items() if name.startswith("weight:")})
    for name in average:
        average[name].copy_(kept[f"average:{name}"])
    bare = getattr(optimiser, "optimizer", optimiser)
    for name, parameter in net.named_parameters():
        bare.state[parameter] = {
            "step": torch.tensor(float(kept["step"])),
            "exp_avg": kept[f"first:{name}"].to(parameter.device),
            "exp_avg_sq": kept[f"second:{name}"].to(parameter.device),
        }
    return int(kept["step"])


def read_images(path: Path, channels: int, size: Sequence[int]) -> npt.NDArray[np.float32]:
    """Every picture below a folder, or the array of an .npy file in [-1, 1]. Raises SystemExit naming what does not fit."""
    from PIL import Image, UnidentifiedImageError

    if path.suffix == ".npy":
        try:
            found: npt.NDArray[np.float32] = np.load(path, allow_pickle=False).astype(np.float32)
        except (OSError, ValueError) as error:
            raise SystemExit(f"{path} cannot be read as an array ({error})") from error
        if not found.size or not np.abs(found).max() <= 1:
            raise SystemExit(f"{path} must hold images in [-1, 1]; divide bytes by 127.5 and take 1 off")
    else:
        files = sorted(
            file for file in path.rglob("*") if file.suffix.lower() in (".png", ".jpg", ".jpeg", ".webp", ".bmp")
        )
        if not files:
            raise SystemExit(f"{path} holds no pictures; give a folder of them, or an .npy file")
        pictures = []
        for file in files:
            try:
                with Image.open(file) as image:
                    array = np.asarray(image.convert("L" if channels == 1 else "RGB"), dtype=np.float32)
            except (UnidentifiedImageError, OSError, ValueError) as error:
                raise SystemExit(f"{file} cannot be read as a picture ({error}); repair or remove it") from error
            pictures.append(array.reshape(*array.shape[:2], channels).transpose(2, 0, 1) / 127.5 - 1)
            if pictures[-1].shape[1:] != tuple(size):
                raise SystemExit(
                    f"{file} has {pictures[-1].shape[1:]} pixels, the networks take {tuple(size)}; resize it"
                )
        found = np.stack(pictures)
    if found.shape[1:] != (channels, *size):
        raise SystemExit(f"{path} holds images {found.shape[1:]}, the networks take {(channels, *size)}")
    return found


def main() -> None:
    folder = Path(__file__).resolve().parent
    plan = json.loads((folder / "train.json").read_text())
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--images", type=Path, required=True, help="folder of pictures, or .npy in [-1, 1]")
    parser.add_argument("--cpu", action="store_true")
    for name, value in asdict(Settings(**plan["settings"])).items():
        option = "--" + name.replace("_", "-")
        if isinstance(value, bool):
            parser.add_argument(option, action=argparse.BooleanOptionalAction, default=value)
        else:
            parser.add_argument(option, type=type(value), default=value, help=f"default {value}")
    chosen = vars(parser.parse_args())
    images, cpu = chosen.pop("images"), chosen.pop("cpu")
    channels, *size = plan["shape"]
    speaks = PartialState(cpu=cpu).is_main_process
    for tick in train(folder, read_images(images, channels, size), Settings(**chosen), cpu):
        if speaks and (tick["step"] % 50 == 0 or tick["step"] == tick["steps"]):
            print(f"{tick['model']}: step {tick['step']} of {tick['steps']}, loss {tick['loss']:.4f}", flush=True)
    if speaks:
        print(folder / TRAINED)


if __name__ == "__main__":
    main()
