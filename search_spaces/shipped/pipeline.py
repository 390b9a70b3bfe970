"""Samples from an exported folder: at each step the network that the folder's schedule names, with the blocks that it reuses.

Needs torch, numpy and diffusers alone, and transformers where the networks read a text. An exported folder holds a copy of this file, and one
argument of the class for each network:

    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder, custom_pipeline=folder, trust_remote_code=True)
    images = pipeline(batch_size=16).images
"""

from __future__ import annotations

import inspect
import json
import shutil
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput

if str(__package__).startswith("diffusers_modules"):
    # diffusers puts the code of all folders into one place and imports this file anew for each; what it imports would stay that of the first.
    for _name in ("graph", "latents", "reuse", "stepping", "texts", "walks"):
        sys.modules.pop(f"{__package__}.{_name}", None)
    sys.modules.pop(__name__, None)  # nor would it be run in a module of its own, and change what the first one calls

from .graph import holds
from .latents import decoded
from .reuse import NEGATIVE, PREDICTION, as_noise, first_rows, guided, null_of, run
from .stepping import update
from .texts import PARTS, encoded, nothing_said, rows_read_by
from .walks import arguments, offloaded


class StepAwarePipeline(DiffusionPipeline):  # type: ignore[misc]
    """`schedule`: the steps, each with its timestep, network, reused blocks, and how it is guided, if it is; the sampler, the shape of a
    state, where the networks take class labels that of no class, and where they read a text what that is.

    Works with `enable_model_cpu_offload`, and with networks that were compiled (`pipeline.unet_0 = torch.compile(pipeline.unet_0)`): what is
    compiled runs at the steps that neither reuse nor keep anything.
    """

    model_cpu_offload_seq = "text_encoder->text_encoder_2->unet_0->vae"
    _optional_components = [*(name for pair in PARTS for name in pair), "class_embedding"]  # noqa: RUF012
    _callback_tensor_inputs = ["latents"]  # noqa: RUF012
    # As it was loaded: diffusers keeps the code of all folders in one place, where the next one's takes its.
    _code = {  # noqa: RUF012
        name: (Path(__file__).parent / name).read_text(encoding="utf-8")
        for name in ("pipeline.py", "graph.py", "latents.py", "reuse.py", "stepping.py", "texts.py", "walks.py")
    }

    def __init__(self, scheduler: Any, unet_0: Any, schedule: Any = None) -> None:
        super().__init__()
        self.register_modules(scheduler=scheduler, unet_0=unet_0)
        self.register_to_config(schedule=schedule)
        for component in self.components.values():
            if isinstance(component, torch.nn.Module):
                for parameter in component.parameters():
                    # As mapped from their file weights lie unaligned, which changes the rounding of convolutions.
                    parameter.data = parameter.data.clone()

    def save_pretrained(self, save_directory: str | Path, **given: Any) -> None:
        """As of every pipeline; with the code that reads it, so that the copy is opened as this one was."""
        Path(save_directory).mkdir(parents=True, exist_ok=True)
        for name, code in self._code.items():
            (Path(save_directory) / name).write_text(code, encoding="utf-8")
        super().save_pretrained(save_directory, **given)

    def save_config(self, save_directory: str | Path, push_to_hub: bool = False, **given: Any) -> None:
        """The index, which `save_pretrained` asks for when all components are saved and nothing is pushed yet; it says where the code of this class lies, and of what reads classes,
        as diffusers notes it of this process alone. Raises ValueError for `push_to_hub`: an index alone is no model."""
        if push_to_hub:
            raise ValueError("save_config writes the index alone; call pipeline.push_to_hub(...)")
        super().save_config(save_directory, **given)
        index = Path(save_directory) / self.config_name
        told = {**json.loads(index.read_text(encoding="utf-8")), "_class_name": ["pipeline", type(self).__name__]}
        vectors = getattr(self, "class_embedding", None)
        if vectors is not None:
            (Path(save_directory) / "class_embedding").mkdir(exist_ok=True)
            shutil.copy(inspect.getfile(type(vectors)), Path(save_directory) / "class_embedding")
            told["class_embedding"] = ["class_embedding", type(vectors).__name__]
        index.write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")

    @torch.inference_mode()
    def __call__(
        self,
        prompt: str | Sequence[str] | int | None = None,
        batch_size: int | None = None,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        num_inference_steps: int | None = None,
        output_type: str | None = "pil",
        return_dict: bool = True,
        seed: int | None = None,
        class_labels: Sequence[int] | torch.Tensor | None = None,
        negative_prompt: str | Sequence[str] | None = None,
        guidance_scale: float | None = None,
        num_images_per_prompt: int = 1,
        latents: torch.Tensor | None = None,
        prompt_embeds: Mapping[str, torch.Tensor] | None = None,
        callback_on_step_end: Callable[[Any, int, int, dict[str, Any]], dict[str, Any] | None] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        reuse_dtype: torch.dtype | None = None,
    ) -> Any:
        """`batch_size` images, or `num_images_per_prompt` for each `prompt`, or one for each of the `class_labels`, as `output_type` says: "pil",
        "np" in [0, 1], (batch, height, width, channels), or "pt", the same as a tensor (batch, channels, height, width). A number in the first place
        is the batch size.

        `generator`: where the noise comes from, one or a list with one for each image; `seed` instead: image i depends on the seed and i
        alone, and equals image i of `nas sample` of this seed where it was told the same; `latents`: the first noise itself, a row for each image.
        `num_inference_steps`: evenly so many of the schedule's steps; all by default. `guidance_scale`: in place of the schedule's own at the steps
        that it guides; 1 or less guides none, as in stock pipelines. `negative_prompt`: what takes the prompt's place where a guided step predicts without it.
        `prompt_embeds`: a row for each prompt by the names of the networks' arguments, "negative_" before those of the negative prompt, instead
        of prompts. `reuse_dtype`: of what a step keeps to be reused, such as torch.bfloat16 for half the memory; by default as the schedule was scored. `callback_on_step_end(pipeline, i, timestep, {"latents": ...})`: after each step; may return other latents.
        Raises ValueError for other kinds of output, more steps than the schedule has, for fewer where steps reuse blocks, for labels or prompts that are missing,
        too many, or not taken, and for what cannot be followed: another scheduler, or blocks that are offloaded one by one where some are reused. Warns where it is told
        how to guide and the schedule guides no step.
        """
        if output_type not in ("pil", "np", "numpy", "pt"):
            raise ValueError(f"output_type={output_type!r} is none of 'pil', 'np' and 'pt'")
        if strange := {*callback_on_step_end_tensor_inputs} - {"latents"}:
            raise ValueError(f"callback_on_step_end_tensor_inputs: there are no {min(strange)}, but latents alone")
        if isinstance(prompt, int):  # as the first argument of pipelines that read no text is
            prompt, batch_size = None, prompt
        if seed is not None and generator is not None:
            raise ValueError("give seed or generator, not both")
        if type(self.scheduler).__name__ != "DDIMScheduler":
            raise ValueError(
                f"the schedule brings its own sampler, which {type(self.scheduler).__name__} cannot replace; leave the folder's scheduler"
            )
        plan = self.config.schedule
        steps = [_guided_at(step, guidance_scale) for step in _subset(plan["steps"], num_inference_steps)]
        device = self._execution_device
        guides = any(step.get("guidance") for step in steps)
        if (guidance_scale or 0) > 1 and not guides:
            warnings.warn(
                f"guidance_scale={guidance_scale:g} is of no effect: the schedule guides no step", stacklevel=3
            )
        pairs = zip(steps, [*steps[1:], {"reuse": []}], strict=True)
        self._check_offloading({step["model"] for step, after in pairs if step["reuse"] or after["reuse"]})
        if reuse_dtype is None and "reuse_precision" in plan["sampler"]:
            reuse_dtype = getattr(torch, plan["sampler"]["reuse_precision"])
        told = self._told(plan, prompt, negative_prompt, num_images_per_prompt, prompt_embeds, guides, device)
        told |= self._classes(plan.get("null_label"), class_labels, batch_size, device)
        count = len(next(iter(told.values()))) if told else batch_size or (1 if latents is None else len(latents))
        if (batch_size or count) != count or any(len(rows) != count for rows in told.values()):
            raise ValueError(f"{count} prompts or labels for {batch_size or count} images; give one for each")
        if latents is not None and tuple(latents.shape) != (count, *plan["shape"]):
            raise ValueError(
                f"latents are of shape {tuple(latents.shape)}, {count} images need {(count, *plan['shape'])}"
            )
        noise = _noise(count, plan["shape"], generator, seed)
        # Where no signal is left at all, what is divided by must not be zero.
        alphas = [max(a, 1e-12) for a in self.scheduler.alphas_cumprod.double().tolist()]
        # DDIM alone arrives where the process ends, which may be short of the image.
        ends = plan["sampler"]["class"] == "DDIM"
        alphas.append(float(self.scheduler.final_alpha_cumprod) if ends else 1.0)
        drawn = next(noise)
        x = (drawn if latents is None else latents).to(device)
        cache: Any = None
        memory: Any = None
        null = null_of(told, plan.get("null_label"))
        with self.progress_bar(total=len(steps)) as bar:
            for number, step in enumerate(steps):
                following: Any = steps[number + 1] if number + 1 < len(steps) else {"timestep": -1, "reuse": []}
                kept = following["reuse"]
                a, b = alphas[step["timestep"]], alphas[following["timestep"]]
                prediction, cache = self._denoise(step, a, kept, x, cache, told, null)
                cache = _kept_as(cache, reuse_dtype)
                drawn = next(noise).to(x)
                fresh = drawn if number + 1 < len(steps) else None
                after, memory = update(
                    plan["sampler"], x, prediction[:, : x.shape[1]], a, b, fresh, memory, prediction[:, x.shape[1] :]
                )
                x = after.to(x.dtype)
                if callback_on_step_end is not None:
                    given = dict.fromkeys(callback_on_step_end_tensor_inputs, x)
                    x = (callback_on_step_end(self, number, step["timestep"], given) or {}).get("latents", x)
                bar.update()
        images = self._output(x, output_type, return_dict)
        self.maybe_free_model_hooks()
        return images

    def _told(
        self, plan: Mapping[str, Any], prompt: Any, negative: Any, each: int, embeds: Any, guides: bool, device: Any
    ) -> dict[str, torch.Tensor]:
        """What the networks read, a row for each image."""
        if plan.get("text") is None:
            if prompt is not None or negative is not None or embeds is not None or each != 1:
                raise ValueError(
                    "the networks read no text; leave out prompt, negative_prompt, prompt_embeds and num_images_per_prompt"
                )
            return {}
        if embeds is not None:
            if prompt is not None or negative is not None:
                raise ValueError("give prompts or prompt_embeds, not both")
            net = getattr(self, plan["steps"][0]["model"])
            said, further = rows_read_by(getattr(net, "_orig_mod", net))
            rows = [*said, *further, *([f"{NEGATIVE}{name}" for name in said] if guides else [])]
            if not isinstance(embeds, Mapping) or not {*rows} <= {*embeds}:
                found = ", ".join(embeds) if isinstance(embeds, Mapping) else f"a {type(embeds).__name__}"
                raise ValueError(
                    f"prompt_embeds must have rows named {', '.join(rows)}, and has {found}{'; guidance_scale=1 asks for no negative ones' if guides else ''}"
                )
            return {name: tensor.to(device).repeat_interleave(each, dim=0) for name, tensor in embeds.items()}
        parts = {name: getattr(self, name) for pair in PARTS for name in pair if getattr(self, name, None) is not None}
        if prompt is None or not parts:
            wanted = "a prompt, or one for each image" if parts else "prompt_embeds: the folder has no text encoder"
            raise ValueError(f"the networks read a text; give {wanted}")
        texts = [prompt] if isinstance(prompt, str) else list(prompt)
        against = [negative or ""] * len(texts) if negative is None or isinstance(negative, str) else list(negative)
        if len(against) != len(texts):
            raise ValueError(f"{len(against)} negative prompts for {len(texts)} prompts; give one, or one for each")
        size, length = plan["text"]["size"], plan["text"]["tokens"]
        told = encoded(parts, texts, size, device, length)
        null = encoded(parts, against, size, device, length)
        null = nothing_said(null) if negative is None and plan["text"].get("zeros") else null
        told |= {NEGATIVE + name: rows for name, rows in null.items()}
        return {name: rows.repeat_interleave(each, dim=0) for name, rows in told.items()}

    def _classes(self, null_label: int | None, labels: Any, count: int | None, device: Any) -> dict[str, torch.Tensor]:
        """The labels, or the vectors of these classes that the networks read in a text's place."""
        told = _labelled(null_label, labels, count, device)
        vectors = getattr(self, "class_embedding", None)
        if vectors is None or null_label is None:
            return told
        chosen, none = told["class_labels"], torch.full_like(told["class_labels"], null_label)
        return {"encoder_hidden_states": vectors(chosen), f"{NEGATIVE}encoder_hidden_states": vectors(none)}

    def _check_offloading(self, models: Iterable[str]) -> None:
        """Of these networks, whose blocks run one by one."""
        for model in sorted(models):
            net = getattr(self, model)
            if block := offloaded(getattr(net, "_orig_mod", net)):
                raise ValueError(
                    f"{block} of {model} is offloaded by itself, and its call, which would bring its weights, is not made where blocks are reused; take "
                    "pipeline.enable_model_cpu_offload() instead"
                )

    def _denoise(
        self,
        step: Mapping[str, Any],
        alpha: float,
        keep: Sequence[str],
        x: torch.Tensor,
        cache: Any,
        told: Any,
        null: Any,
    ) -> tuple[torch.Tensor, Any]:
        """The noise in x by a step's network, guided where the step is, and what the next step may reuse."""
        own = partial(self._noise_in, step["model"], step["timestep"], alpha, step["reuse"], keep)
        guidance = step.get("guidance")
        net = getattr(self, step["model"])
        if holds(getattr(net, "_orig_mod", net), step["reuse"]):
            return own(x, cache, None)
        if guidance is None:
            return own(x, first_rows(cache, len(x)), told or None)
        by = None
        if guidance["model"] != step["model"]:
            other = partial(self._noise_in, guidance["model"], step["timestep"], alpha, (), ())
            by = lambda x, null: other(x, None, null)[0]  # noqa: E731
        channels = self.config.schedule.get("guided_channels")
        return guided(own, by, x, guidance["scale"], cache, told, null, channels)

    def _noise_in(
        self,
        model: str,
        t: int,
        alpha: float,
        reuse: Sequence[str],
        keep: Sequence[str],
        x: torch.Tensor,
        cache: Any,
        condition: Any,
    ) -> tuple[torch.Tensor, Any]:
        net = getattr(self, model)
        answer = partial(as_noise, x=x, alpha=alpha, kind=self.scheduler.config.prediction_type)
        x = x.to(net.dtype)
        condition = condition and {
            name: rows.to(net.dtype) if rows.is_floating_point() else rows for name, rows in condition.items()
        }
        if not reuse and not keep:
            return answer(net(*arguments(net, x, t, condition), return_dict=False)[0]), None
        if getattr(net, "_hf_hook", None) is not None:  # which offloading hangs on the call that is not made here
            net._hf_hook.pre_forward(net)
        return run(getattr(net, "_orig_mod", net), x, t, reuse, keep, cache, condition, answer=answer)

    def _output(self, x: torch.Tensor, output_type: str | None, return_dict: bool) -> Any:
        images: Any = decoded(self.vae, x).to(x.dtype) if hasattr(self, "vae") else x
        images = (images.clamp(-1, 1) / 2 + 0.5).cpu()
        if output_type != "pt":
            images = images.permute(0, 2, 3, 1).float().numpy()
        if output_type == "pil":
            images = self.numpy_to_pil(images)
        return ImagePipelineOutput(images=images) if return_dict else (images,)


def _kept_as(cache: Any, dtype: torch.dtype | None) -> Any:
    """What is reused, in this precision; a prediction that is held stays as it is."""
    if cache is None or dtype is None:
        return cache
    most = torch.finfo(dtype).max

    def narrowed(rows: torch.Tensor) -> torch.Tensor:
        bound = min(most, torch.finfo(rows.dtype).max)
        return rows.clamp(-bound, bound).to(dtype)

    return {name: rows if name == PREDICTION else narrowed(rows) for name, rows in cache.items()}


def _guided_at(step: Mapping[str, Any], scale: float | None) -> Mapping[str, Any]:
    """The step with another scale, if it is guided at all; 1 or less is no guidance, at any step, so that outputs have as many rows at all of them."""
    if scale is None or step.get("guidance") is None:
        return step
    if scale <= 1:
        return {**step, "guidance": None}
    return {**step, "guidance": {**step["guidance"], "scale": scale}}


def _labelled(null_label: int | None, labels: Any, count: int | None, device: Any) -> dict[str, torch.Tensor]:
    """The classes that the images are to be of; nothing where the networks take none."""
    if null_label is None:
        if labels is not None:
            raise ValueError("the networks take no class_labels; leave them out")
        return {}
    if labels is None:
        raise ValueError(f"the networks need class_labels, one from 0 to {null_label - 1} for each image")
    rows = torch.as_tensor(labels, dtype=torch.long).reshape(-1)
    if (count is not None and len(rows) != count) or not len(rows):
        raise ValueError(f"{len(rows)} class_labels for {count} images; give one for each")
    if rows.min() < 0 or rows.max() > null_label:
        raise ValueError(f"class_labels must be from 0 to {null_label - 1}, or {null_label} for no class")
    return {"class_labels": rows.to(device)}


def _subset(steps: Sequence[dict[str, Any]], count: int | None) -> Sequence[dict[str, Any]]:
    if count is None or count == len(steps):
        return steps
    if not 1 <= count < len(steps):
        raise ValueError(f"num_inference_steps={count} must be from 1 to the schedule's {len(steps)}")
    if any(step["reuse"] for step in steps):
        raise ValueError(
            f"num_inference_steps={count} leaves out steps whose blocks later ones reuse; leave it at {len(steps)}"
        )
    places = np.linspace(0, len(steps) - 1, count).round().astype(int)
    return [steps[place] for place in places]


def _noise(count: int, shape: Sequence[int], generator: Any, seed: int | None) -> Iterator[torch.Tensor]:
    """Standard normal (count, *shape), for the start and then for each step."""
    purpose = 0
    while True:
        if seed is not None:
            rows = [np.random.default_rng((seed, i, purpose)).standard_normal(shape, np.float32) for i in range(count)]
            yield torch.from_numpy(np.stack(rows))
        elif isinstance(generator, list | tuple):
            if len(generator) != count:
                raise ValueError(f"{len(generator)} generators for {count} images; give one, or one for each")
            yield torch.stack([torch.randn(*shape, generator=one, device=one.device).cpu() for one in generator])
        else:
            where = generator.device if generator is not None else "cpu"
            yield torch.randn(count, *shape, generator=generator, device=where).cpu()
        purpose += 1
