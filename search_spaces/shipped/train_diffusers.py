"""Fine-tunes the networks of an exported folder, each on the timesteps that it serves, with distillation from the full network.

Needs torch, diffusers, accelerate, numpy, pillow and safetensors alone, and transformers where the networks read a text; an exported folder
holds a copy of this file and of what it imports:

    python train_diffusers.py --images my/images            # or: accelerate launch train_diffusers.py ...

`train.json` says which timesteps each network serves, the loss and the defaults. What is trained lies in `trained/`, a folder like this
one. The same command goes on after a stop.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import math
import os
import shutil
import signal
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import numpy.typing as npt
import torch
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch.optim.swa_utils import get_ema_multi_avg_fn

try:
    import fcntl
except ImportError:  # Windows has no such locks
    fcntl = None  # type: ignore[assignment]

from nas.base.exported import (
    AUTOENCODER,
    CLASS_EMBEDDING,
    PROVENANCE,
    ExportError,
    check_hashes,
    hashes_of,
    noted_hashes,
    read_export,
    read_network,
)
from nas.base.pictures import PictureError
from search_spaces.shipped.train_data import Data, conditions, folder_captions, folder_labels, prepared, read_images
from search_spaces.shipped.walks import arguments

TRAINED = "trained"
SETTINGS, DATA = "settings.json", "data.json"
"""How a folder is trained, and the digest of what on, which scripts of folders from before it do not know."""

OURS = (
    "README.md",
    "class_embedding",
    "exported.py",
    "graph.py",
    "latents.py",
    "model_index.json",
    "pictures.py",
    "pipeline.py",
    "reuse.py",
    "sample.py",
    "samples.png",
    "schedule.json",
    "schedule.svg",
    "scheduler",
    "stepping.py",
    "teacher",
    "text_encoder",
    "text_encoder_2",
    "texts.py",
    "tokenizer",
    "tokenizer_2",
    "train.json",
    "train_data.py",
    "train_diffusers.py",
    "vae",
    "walks.py",
)
"""What an exported folder holds besides its networks, and a trained one too."""


@dataclass(frozen=True)
class Settings:
    """`steps`: gradient steps of all networks together, divided by how many timesteps each serves. `distillation`: share of the target
    that is the full network's prediction, instead of the noise. `features`: weight of the distance of blocks' spatial maps (mean square
    over channels, normalised; Zagoruyko & Komodakis 2017) to the full network's. `batch`: images of a step, on each device, in `accumulate` parts.
    `checkpointing`: blocks run again in the backward pass, which takes less memory. `snr_cap`: of min-SNR weighting (Hang et al. 2023), 0 for
    none. `drop`: share of labels or captions that say nothing instead. `clip`: the largest norm of a gradient."""

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
    drop: float = 0.1
    accumulate: int = 1
    checkpointing: bool = False
    snr_cap: float = 0.0


class LossError(ExportError):
    """A loss that is no number: `told`, what it is and where."""

    def __init__(self, told: str, trained: Path, rate: float) -> None:
        super().__init__(f"{told}; delete {trained} and train with less than learning_rate={rate:g}")
        self.told = told


SHARES = ("drop", "distillation", "ema")


def settings_of(given: Any, source: str = "train.json") -> Settings:
    """Raises ExportError naming what no training can have, and where it was said."""
    known = {field.name: type(field.default) for field in fields(Settings)}
    for name, value in given.items():
        kind = known.get(name)
        if kind is None:
            raise ExportError(f"{source}: settings have no {name!r}; there are {', '.join(known)}")
        number = kind in (int, float) and type(value) in (int, kind)
        most = 1 if name in SHARES else 2**32 - 1 if name == "seed" else 1e9
        if not (number or type(value) is kind) or (number and not 0 <= value <= most) or (name == "clip" and not value):
            allowed = f", from {'more than ' if name == 'clip' else ''}0 to {most:g}" if number else ""
            raise ExportError(f"{source}: {name}={value!r} is no {kind.__name__} that a training can have{allowed}")
    made = Settings(**given)
    counts = (made.steps, made.batch, made.checkpoint_every, made.accumulate)
    if min(counts) < 1 or made.accumulate > made.batch or made.precision not in ("no", "bf16", "fp16"):
        raise ExportError(
            f"{source}: steps, batch, checkpoint_every and accumulate must be at least 1, accumulate at most batch, precision no, bf16 or fp16; {made}"
        )
    return made


def data_digest(
    pixels: npt.NDArray[np.float32], labels: npt.NDArray[np.int64] | None = None, captions: Sequence[str] | None = None
) -> str:
    """By which other images, labels or captions are told."""
    found = hashlib.sha256(np.ascontiguousarray(pixels).data)
    found.update(json.dumps([None if labels is None else labels.tolist(), captions and [*captions]]).encode())
    return found.hexdigest()[:16]


def keep_settings(folder: Path, settings: Settings, data: str = "", writes: bool = True) -> None:
    """Notes how `folder/trained` is trained, where this process `writes`. `data`: the digest of what it is trained on. Raises ExportError where it was begun
    otherwise; what was refused before anything was trained is no beginning."""
    path, on = (folder / TRAINED / name for name in (SETTINGS, DATA))
    if path.exists() and any(other not in (path, on) for other in path.parent.iterdir()):
        try:
            before = asdict(settings_of(json.loads(path.read_text())))
            known = json.loads(on.read_text())["digest"] if on.exists() else data
        except (ValueError, KeyError, TypeError) as error:
            raise ExportError(f"{path} is damaged ({error}); delete {path.parent} to train again") from error
        now = asdict(settings)
        changed = [f"{name} was {before[name]}, now {value}" for name, value in now.items() if before[name] != value]
        changed += ["on other images, labels or captions"] if data and known != data else []
        if changed:
            raise ExportError(f"{path.parent} was trained otherwise: {'; '.join(changed)}. Delete it to train again")
    elif writes:
        with _alone(folder):
            path.parent.mkdir(exist_ok=True)
            _replace(path, json.dumps(asdict(settings), indent=2) + "\n")
            if data:
                _replace(on, json.dumps({"digest": data}) + "\n")


def train(
    folder: Path,
    pixels: npt.NDArray[np.float32],
    settings: Settings,
    cpu: bool = False,
    changed_weights: bool = False,
    whole: Callable[[], AbstractContextManager[Any]] = nullcontext,
    labels: npt.NDArray[np.int64] | None = None,
    captions: Sequence[str] | None = None,
    timesteps: Mapping[str, Sequence[Sequence[int]]] | None = None,
) -> Generator[dict[str, Any], None, None]:
    """Trains what `folder/trained` lacks; yields after each step the network's name, its step, how many there are, the loss, and the
    average of its weights, which the next step changes. Closed early, it keeps its state first.

    pixels: (n, channels, height, width) in [-1, 1]. `changed_weights`: takes networks that are not those that were exported. `whole`: makes
    a context in which nobody is interrupted. `labels`: (n,), where the networks take labels, `captions`, where they read a text; a share
    `settings.drop` of them is dropped. `timesteps`: of these networks alone, on these ranges (from, up to) in place of those that they serve. Raises ExportError where the folder is
    damaged, where another process trains them, for what the networks need or do not take, and where a loss is no number any more, of which nothing is kept.
    """
    export = read_export(folder)
    plan = export.training
    accelerator = _accelerator(settings.precision, cpu)
    if settings.precision == "fp16" and accelerator.device.type == "cpu":
        raise ExportError("precision fp16 needs a GPU, and this is a CPU; take bf16, or no")
    if not changed_weights:
        check_hashes(folder, export.parts, export.provenance, "--changed-weights")
    with _alone(folder) if accelerator.is_main_process else nullcontext():
        into = folder / TRAINED
        into.mkdir(exist_ok=True)
        # Before any network is there: what reads texts may be larger than all of them.
        told = conditions(export, labels, captions, len(pixels), accelerator.device)
        teacher = read_network(folder / plan["teacher"]).to(accelerator.device).requires_grad_(False)
        data = prepared(folder, plan, pixels, told, settings.flip, accelerator.device)
        scheduler = diffusers.DDIMScheduler(**plan["scheduler"])
        exported = export.provenance.get("files", {})
        kept = {
            file: exported[file]
            for file in exported
            if file.startswith(("teacher/", f"{AUTOENCODER}/", f"{CLASS_EMBEDDING}/", "text_encoder", "tokenizer"))
        }
        scaling = accelerator.scaler.state_dict() if accelerator.scaler else None
        for name, ranges in (timesteps or plan["timesteps"]).items():
            if not (into / name / "config.json").exists():
                if scaling:  # each network begins with it, whichever was trained before in this process
                    accelerator.scaler.load_state_dict(scaling)
                yield from _train_one(folder, name, ranges, teacher, data, scheduler, settings, accelerator, whole)
                if accelerator.is_main_process:
                    # Its hash is noted before it has its name: whatever is killed here, a named network has its hash.
                    files = {**kept, **noted_hashes(into)}
                    files |= {file.removeprefix("."): found for file, found in hashes_of(into, [f".{name}"]).items()}
                    facts = {"exported": export.provenance, "trained": asdict(settings), "files": files}
                    _replace(into / PROVENANCE, json.dumps(facts, indent=2) + "\n")
                    os.replace(into / f".{name}", into / name)
                    (into / f".{name}.safetensors").unlink(missing_ok=True)
                accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            for part in (folder / name for name in OURS):
                if part.exists() and not part.is_symlink() and not (into / part.name).exists():
                    partial = into / f".{part.name}.partial"
                    shutil.rmtree(partial, ignore_errors=True)
                    (shutil.copytree if part.is_dir() else shutil.copy)(part, partial)
                    os.replace(partial, into / part.name)


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Raises ExportError where another process trains these networks."""
    if fcntl is None:
        yield
        return
    plan = folder / "train.json"
    # Network file systems lock alone what may be written.
    mode = "r+" if os.access(plan, os.W_OK) else "r"
    with plan.open(mode) as held:
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ExportError(f"another process trains the networks in {folder}; wait for it, or stop it") from error
        except OSError:
            pass  # a file system without locks
        yield


def _accelerator(precision: str, cpu: bool) -> Accelerator:
    """Accelerate keeps what the first one of a process was made with, and refuses others; where a process trains alone, it may begin anew."""
    if AcceleratorState._shared_state:
        known = AcceleratorState()
        if known.num_processes == 1 and (known.mixed_precision != precision or (known.device.type == "cpu") != cpu):
            AcceleratorState._reset_state(reset_partial_state=True)
    return Accelerator(mixed_precision=precision, cpu=cpu)


def _replace(path: Path, text: str) -> None:
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text)
    os.replace(partial, path)


def _train_one(
    folder: Path,
    name: str,
    ranges: Sequence[Sequence[int]],
    teacher: Any,
    data: Data,
    scheduler: Any,
    settings: Settings,
    accelerator: Any,
    whole: Callable[[], AbstractContextManager[Any]],
) -> Iterator[dict[str, Any]]:
    served = torch.cat([torch.arange(start, stop) for start, stop in ranges])
    total = max(1, round(settings.steps * len(served) / scheduler.config.num_train_timesteps))
    # In evaluation mode: a stock transformer in training mode drops labels by itself, each of its blocks others.
    net = tied(read_network(folder / name))
    # On a CPU Adam's own default is a loop over the weights, of some ten operations each.
    fused = True if accelerator.device.type == "cpu" else None
    optimiser = torch.optim.Adam(net.parameters(), settings.learning_rate, fused=fused)
    net, optimiser = accelerator.prepare(net, optimiser)
    bare = accelerator.unwrap_model(net)
    if settings.checkpointing:
        bare.enable_gradient_checkpointing()
    trained = bare.state_dict()
    average = {key: tensor.clone() for key, tensor in trained.items()}
    state = folder / TRAINED / f".{name}.safetensors"
    scaler = accelerator.scaler
    done = _restore(state, bare, optimiser, average, scaler)
    try:
        while done < total:
            with whole():
                loss = _step(net, bare, teacher, data, served, scheduler, settings, accelerator, optimiser, done, total)
                if not math.isfinite(loss):  # before anything of it is kept
                    told = f"the loss of {name} is {float(loss)} at step {done + 1}"
                    raise LossError(told, folder / TRAINED, settings.learning_rate)
                decay = min(settings.ema, (1 + done) / (10 + done))
                averaged = get_ema_multi_avg_fn(decay)  # type: ignore[no-untyped-call]
                averaged(list(average.values()), list(trained.values()), done)
                done += 1
                if done % settings.checkpoint_every == 0 and accelerator.is_main_process:
                    _keep(state, bare, optimiser, average, done, scaler)
            yield {"model": name, "step": done, "steps": total, "loss": float(loss), "average": average}
    except (GeneratorExit, KeyboardInterrupt):
        if done and done % settings.checkpoint_every and accelerator.is_main_process:
            with whole():
                _keep(state, bare, optimiser, average, done, scaler)
        raise
    if accelerator.is_main_process:
        if done % settings.checkpoint_every:  # whoever stops it while it is saved goes on from its end
            _keep(state, bare, optimiser, average, done, scaler)
        bare.load_state_dict(average)
        partial = folder / TRAINED / f".{name}"
        shutil.rmtree(partial, ignore_errors=True)
        untied(bare).save_pretrained(partial, max_shard_size="1TB")  # one file, which a pipeline's folder is known by
    accelerator.free_memory()


def tied(net: Any) -> Any:
    """With one embedding of timestep and label for all blocks, of which a stock DiT keeps a copy in each."""
    for block in net.transformer_blocks[1:] if _copies(net) else []:
        block.norm1.emb = net.transformer_blocks[0].norm1.emb
    return net


def untied(net: Any) -> Any:
    """With a copy in each block again, as its file has them."""
    for block in net.transformer_blocks[1:] if _copies(net) else []:
        block.norm1.emb = copy.deepcopy(net.transformer_blocks[0].norm1.emb)
    return net


def _copies(net: Any) -> bool:
    return hasattr(net, "transformer_blocks") and hasattr(net.transformer_blocks[0].norm1, "emb")


def _step(
    net: Any,
    bare: Any,
    teacher: Any,
    data: Data,
    served: torch.Tensor,
    scheduler: Any,
    settings: Settings,
    accelerator: Any,
    optimiser: Any,
    step: int,
    total: int,
) -> torch.Tensor:
    """One gradient step; the loss, detached."""
    # Each process has noise of its own; the same step has the same noise, whatever came before it.
    seed = int.from_bytes(np.random.default_rng((settings.seed, step, accelerator.process_index)).bytes(4), "big")
    generator = torch.Generator().manual_seed(seed)
    device = data.device
    chosen = torch.randint(len(data.pixels), (settings.batch,), generator=generator)
    mirrored = torch.rand(settings.batch, generator=generator).to(device) < 0.5 if settings.flip else None
    x0 = data.draw(chosen, mirrored, generator)
    told = {}
    if len(data.told):
        dropped = torch.rand(settings.batch, generator=generator).to(device) < settings.drop
        told = data.told.of(chosen, dropped)
    t = served[torch.randint(len(served), (settings.batch,), generator=generator)].to(device)
    noise = torch.randn(x0.shape, generator=generator).to(x0)
    x = scheduler.add_noise(x0, noise, t)
    kind = scheduler.config.prediction_type
    truth = noise if kind == "epsilon" else x0 if kind == "sample" else scheduler.get_velocity(x0, noise, t)
    weights = _weights(scheduler, t, settings.snr_cap)
    optimiser.zero_grad()
    total_loss = torch.zeros((), device=device)
    for places in torch.arange(settings.batch, device=device).tensor_split(settings.accumulate):
        mine = {name: rows[places] for name, rows in told.items()}
        given = (x[places], t[places], mine, truth[places], weights[places])
        loss = _loss(net, bare, teacher, *given, settings, accelerator) * len(places) / settings.batch
        accelerator.backward(loss)
        total_loss += loss.detach()
    accelerator.clip_grad_norm_(net.parameters(), settings.clip)
    rate = min(1.0, (step + 1) / max(settings.warmup, 1)) * 0.5 * (1 + np.cos(np.pi * step / total))
    for group in optimiser.param_groups:
        group["lr"] = settings.learning_rate * float(rate)
    optimiser.step()
    return total_loss


def _weights(scheduler: Any, t: torch.Tensor, cap: float) -> torch.Tensor:
    """Of each image's error, (n,): min(SNR, cap) as an error of the predicted image; 1 without a cap."""
    if not cap:
        return torch.ones(len(t), device=t.device)
    abar = scheduler.alphas_cumprod.to(t.device)[t]
    snr = abar / (1 - abar).clamp_min(1e-12)
    kind = scheduler.config.prediction_type
    each = torch.ones_like(snr) if kind == "sample" else snr + 1 if kind == "v_prediction" else snr
    found: torch.Tensor = snr.clamp(max=cap) / each.clamp_min(1e-12)
    return found


def _loss(
    net: Any,
    bare: Any,
    teacher: Any,
    x: torch.Tensor,
    t: torch.Tensor,
    told: dict[str, torch.Tensor],
    truth: torch.Tensor,
    weights: torch.Tensor,
    settings: Settings,
    accelerator: Any,
) -> torch.Tensor:
    mine, theirs = Maps(bare, settings.features > 0), Maps(teacher, settings.features > 0)
    with accelerator.autocast():
        prediction = net(*arguments(bare, x, t, told), return_dict=False)[0].float()
        target, own = truth, x.shape[1]
        learned = prediction.shape[1] > own
        if settings.distillation or settings.features or learned:
            with torch.no_grad():
                shown = teacher(*arguments(teacher, x, t, told), return_dict=False)[0].float()
            target = torch.lerp(truth, shown[:, :own], settings.distillation)
    loss = (weights * (prediction[:, :own] - target).square().mean((1, 2, 3))).mean()
    if learned:  # where the variance lies is as the full network has it
        loss = loss + torch.nn.functional.mse_loss(prediction[:, own:], shown[:, own:])
    maps = [torch.nn.functional.mse_loss(a, b) for a, b in zip(mine.close(), theirs.close(), strict=True)]
    made: torch.Tensor = loss + settings.features * torch.stack(maps).mean() if maps else loss
    return made


SCALED = ("scale", "_growth_tracker")
"""Of what a loss is scaled by in float16, that which changes."""


class Maps:
    """Spatial maps of a UNet's blocks, or of a transformer's last one, (batch, positions), as its next call has them."""

    def __init__(self, net: Any, wanted: bool) -> None:
        self._channels = 1
        self._found: list[torch.Tensor] = []
        self._hooks: list[Any] = []
        if wanted and hasattr(net, "transformer_blocks"):
            self._channels = -1
            # What comes of the last block, outside of it: with checkpointing a block runs again in the backward pass, and a hook on it does not.
            self._hooks = [net.norm_out.register_forward_pre_hook(lambda _, given: self._note(given[0]))]
        elif wanted:
            noted = lambda _, given, output: self._note(output[0] if isinstance(output, tuple) else output)  # noqa: E731
            self._hooks = [block.register_forward_hook(noted) for block in (*net.down_blocks, *net.up_blocks)]

    def _note(self, hidden: torch.Tensor) -> None:
        squares = hidden.float().square().mean(self._channels).flatten(1)
        self._found.append(squares / squares.mean(1, keepdim=True).clamp_min(1e-12))

    def close(self) -> list[torch.Tensor]:
        for hook in self._hooks:
            hook.remove()
        return self._found


def _keep(
    path: Path, net: Any, optimiser: Any, average: dict[str, torch.Tensor], step: int, scaler: Any = None
) -> None:
    """Whole or not at all. `scaler`: of the loss in float16."""
    tensors = {"step": torch.tensor(step)}
    names = {id(parameter): name for name, parameter in net.named_parameters()}
    tensors |= {f"weight:{name}": tensor for name, tensor in net.state_dict().items()}
    tensors |= {f"average:{name}": tensor for name, tensor in average.items()}
    for parameter, state in optimiser.state.items():
        tensors[f"first:{names[id(parameter)]}"] = state["exp_avg"]
        tensors[f"second:{names[id(parameter)]}"] = state["exp_avg_sq"]
        tensors[f"steps:{names[id(parameter)]}"] = torch.as_tensor(state["step"])
    if scaler is not None:
        told = scaler.state_dict()
        tensors |= {f"scaler:{name}": torch.tensor(told[name]) for name in SCALED}
    partial = path.with_suffix(".partial")
    # Cloned, since copies of one tensor share their memory.
    save_file({name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}, partial)
    os.replace(partial, path)


def _restore(path: Path, net: Any, optimiser: Any, average: dict[str, torch.Tensor], scaler: Any = None) -> int:
    """The step to go on with."""
    if not path.exists():
        return 0
    try:
        kept = load_file(path)
    except (SafetensorError, OSError) as error:
        raise ExportError(f"{path} is damaged ({error}); delete it to train this network from its beginning") from error
    net.load_state_dict({name[7:]: tensor for name, tensor in kept.items() if name.startswith("weight:")})
    for name in average:
        average[name].copy_(kept[f"average:{name}"])
    bare = getattr(optimiser, "optimizer", optimiser)
    for name, parameter in net.named_parameters():
        # Where each step so far was left out, as those that overflow in half precision are, there is none yet.
        if f"first:{name}" in kept:
            bare.state[parameter] = {
                "step": kept.get(f"steps:{name}", kept["step"]).float(),
                "exp_avg": kept[f"first:{name}"].to(parameter.device),
                "exp_avg_sq": kept[f"second:{name}"].to(parameter.device),
            }
    if scaler is not None and all(f"scaler:{name}" in kept for name in SCALED):
        scaler.load_state_dict({**scaler.state_dict(), **{name: kept[f"scaler:{name}"].item() for name in SCALED}})
    return int(kept["step"])


def main() -> None:
    folder = Path(__file__).resolve().parent
    try:
        plan = read_export(folder).training
        defaults = settings_of(plan["settings"])
    except ExportError as error:
        raise SystemExit(f"error: {error}") from error
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--images", type=Path, required=True, help="folder of pictures, or .npy in [-1, 1]")
    parser.add_argument(
        "--resize", choices=["box", "bilinear", "bicubic", "lanczos"], help="crop and resize pictures of other sizes"
    )
    parser.add_argument("--labels", choices=["folders"], help="the folders right below --images are the classes")
    parser.add_argument(
        "--captions", choices=["txt"], help="beside each picture lies a .txt of its name, what it shows"
    )
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument(
        "--changed-weights", action="store_true", help="take networks that were changed after the export"
    )
    for one in fields(Settings):
        option, value = "--" + one.name.replace("_", "-"), getattr(defaults, one.name)
        if isinstance(one.default, bool):
            parser.add_argument(option, action=argparse.BooleanOptionalAction, default=value)
        else:  # train.json may have 1 where a share is meant
            parser.add_argument(option, type=type(one.default), default=value, help=f"default {value}")
    chosen = vars(parser.parse_args())
    images, resize, cpu, changed, said, shown = (
        chosen.pop(name) for name in ("images", "resize", "cpu", "changed_weights", "labels", "captions")
    )
    channels, *size = plan.get("image_shape", plan["shape"])
    speaks = PartialState(cpu=cpu).is_main_process
    asked: list[int] = []
    within: list[bool] = []

    def stop(number: int, frame: Any) -> None:
        asked.append(number)
        if not within:
            raise KeyboardInterrupt

    @contextmanager
    def whole() -> Iterator[None]:
        """A step is finished first."""
        within.append(True)
        try:
            yield
        finally:
            within.pop()
        if asked and not within:
            raise KeyboardInterrupt

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    try:
        settings = settings_of(chosen, "the options")
        labels = folder_labels(images, plan.get("null_label")) if said else None
        captions = folder_captions(images) if shown else None
        for done, total, pixels in read_images(images, channels, size, resize):  # noqa: B007  the last is whole
            if speaks and done % 10_000 == 0:
                print(f"reading images: {done} of {total}", flush=True)
        keep_settings(folder, settings, data_digest(pixels, labels, captions), speaks)
        training = train(folder, pixels, settings, cpu, changed, whole, labels, captions)
        with closing(training) as ticks:
            for tick in ticks:
                if speaks and (tick["step"] % 50 == 0 or tick["step"] == tick["steps"]):
                    print(
                        f"{tick['model']}: step {tick['step']} of {tick['steps']}, loss {tick['loss']:.4f}", flush=True
                    )
    except (ExportError, PictureError, SafetensorError, OSError) as error:
        raise SystemExit(f"error: {error}") from error
    except KeyboardInterrupt:
        if speaks:
            print("interrupted; the same command goes on from here", flush=True)
        raise SystemExit(128 + asked[0]) from None
    if speaks:
        print(folder / TRAINED)


if __name__ == "__main__":
    main()
