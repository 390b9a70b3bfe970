"""Makes a stock diffusers pipeline run a schedule that was found for it: at each step the network takes some blocks' outputs from the step before, leaves
guidance out, or does not run at all.

    apply_schedule(pipeline, "schedule.json")  # and call it with num_inference_steps= and guidance_scale= as the file says
    remove_schedule(pipeline)

Needs torch alone. Networks: UNet2DModel, UNet2DConditionModel, DiTTransformer2DModel, PixArtTransformer2DModel.
"""

from __future__ import annotations

import inspect
import threading
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import FunctionType, SimpleNamespace
from typing import Any

import torch

from .graph import graph_of, holds
from .reuse import PREDICTION, as_noise, run
from .schedule_file import ScheduleError, read_schedule
from .stepping import update
from .walks import ADDED, SIZES, offloaded

COMPONENTS = ("transformer", "unet")
"""What a pipeline calls its network."""

STATES, TIMES = ("sample", "hidden_states"), ("timestep",)
"""What networks call the noisy state and the timestep."""

CONDITIONS = ("class_labels", "encoder_hidden_states", "encoder_attention_mask")
EXTRA = "added_cond_kwargs"
CLOSE = 1e-4
"""By how much abar may differ, relatively, between the model that the schedule was found for and this one."""
METHODS = ("set_timesteps", "step", "scale_model_input", "add_noise")
"""Of a scheduler, which are replaced."""
FAINT = 1e-6
"""abar below which hardly a signal is left: diffusers' schedulers have numbers of their own where none is."""


def apply_schedule(
    pipeline: Any, schedule: str | Path | Mapping[str, Any], compiled: bool | str = False
) -> Mapping[str, Any]:
    """From now on the pipeline runs the schedule, a file or what it holds; returned is what it holds. One that was applied before is removed.

    `compiled`: each distinct set of blocks that runs is compiled as a graph of its own, by torch's own backend or by the one of this name; the first call at
    each takes long. Otherwise nothing is. LoRA layers stay in use, whether they were loaded before or are later.

    Nothing is left over from one call to the next: each begins where the pipeline sets its timesteps.

    Raises ScheduleError where the file is no schedule of this version, or was found for another kind of network, sampler or noise process.
    """
    plan = read_schedule(schedule)
    component = next((name for name in COMPONENTS if getattr(pipeline, name, None) is not None), None)
    if component is None:
        raise ScheduleError(f"the pipeline has neither a {' nor a '.join(COMPONENTS)}; give one of diffusers' own")
    net, scheduler = getattr(pipeline, component), pipeline.scheduler
    if hasattr(net, "_orig_mod") or getattr(net, "_compiled_call_impl", None) is not None:
        raise ScheduleError(
            f"pipeline.{component} is compiled as a whole, which knows no blocks that do not run; give the plain network back, and compiled=True here"
        )
    _check(plan, net, scheduler)
    _check_call(component, net)
    remove_schedule(pipeline)
    applied = _Applied(plan, pipeline, component, compiled)
    applied.begin()
    return plan


def remove_schedule(pipeline: Any) -> None:
    """The pipeline runs as it did before; nothing happens where no schedule is applied."""
    for name in (*COMPONENTS, "scheduler"):
        applied = getattr(getattr(pipeline, name, None), "_step_aware", None)
        if applied is not None:
            applied.end()
    for name in COMPONENTS:  # one that ended within a hook, which has put it back since
        ended = _owner(getattr(getattr(pipeline, name, None), "__dict__", {}).get("forward"))
        if ended is not None:
            ended.end()


def _owner(call: Any) -> Any:
    """The schedule whose call it is, of this module or of a copy of it; None where it is nobody's."""
    found = getattr(call, "__self__", None)
    return found if type(found).__name__ == _Applied.__name__ else None


class _Applied:
    """One schedule on one pipeline. The network's call and four methods of the scheduler are replaced on these very objects."""

    def __init__(self, plan: Mapping[str, Any], pipeline: Any, component: str, compiled: bool | str) -> None:
        self.plan = plan
        self.pipeline = pipeline
        self.component = component
        self.net = net = getattr(pipeline, component)
        self.scheduler = pipeline.scheduler
        self.steps: Sequence[Mapping[str, Any]] = plan["steps"]
        self.number = 0
        self.called = -1
        self.thread = 0
        self.cache: Any = None
        self.memory: Any = None
        self.held: torch.Tensor | None = None
        self.ended = False
        self.asked = 0
        self.halved = False
        self.signature = inspect.signature(type(net).forward)
        self.compiled = compiled
        self.graphs: dict[Any, Callable[..., Any]] = {}
        self.place = _place(net)
        self.before = net.__dict__.get(self.place)
        self.call = getattr(net, self.place)

    def begin(self) -> None:
        self.net._step_aware = self.scheduler._step_aware = self
        setattr(self.net, self.place, self.forward)
        for name in METHODS:
            setattr(self.scheduler, name, getattr(self, name))

    def end(self) -> None:
        # Hooks of offloading may have been put on or taken off since, and with them where ours stands; within one that says nothing of it, ours passes on.
        self.ended = True
        for place in ("forward", "_old_forward"):
            if self.net.__dict__.get(place) == self.forward:
                if place == "forward" and self.before is None:
                    delattr(self.net, place)
                else:
                    setattr(self.net, place, self.call)
        for name in METHODS:
            if self.scheduler.__dict__.get(name) == getattr(self, name):
                delattr(self.scheduler, name)
        for one in (self.net, self.scheduler):
            if one.__dict__.get("_step_aware") is self:
                del one._step_aware

    # ---------------------------------------------------------------------------------- in place of the scheduler's

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: Any = None,
        timesteps: Any = None,
        sigmas: Any = None,
        **other: Any,
    ) -> None:
        """Begins a trajectory. `timesteps`, `sigmas`: named here, or pipelines say that the scheduler knows none."""
        other |= {name: told for name, told in (("timesteps", timesteps), ("sigmas", sigmas)) if told is not None}
        if num_inference_steps != len(self.steps) or other:
            asked = f"{num_inference_steps} steps" if not other else f"{', '.join(other)} of its own"
            raise ScheduleError(
                f"the schedule has {len(self.steps)} steps, the pipeline asks for {asked}; call it with num_inference_steps={len(self.steps)}, "
                "or make a schedule of as many"
            )
        rescale = getattr(self.pipeline, "guidance_rescale", None) or 0
        guides = getattr(self.pipeline, "do_classifier_free_guidance", True)
        if rescale and guides and self.plan["prediction"] != "epsilon":
            raise ScheduleError(
                f"the pipeline rescales its guidance by guidance_rescale={rescale:g}, which is of what the network predicts, {self.plan['prediction']}, and steps "
                "of a schedule see its noise; call it with guidance_rescale=0, or remove_schedule(pipeline)"
            )
        if 0 < (getattr(self.pipeline, "denoising_end", None) or 0) < 1:
            raise ScheduleError(
                f"the pipeline that the schedule was applied to stops at denoising_end={self.pipeline.denoising_end:g}, and the schedule was made for whole trajectories: its "
                "steps stand elsewhere; leave that out, apply it to the pipeline that is called, or remove_schedule(pipeline)"
            )
        self.number, self.called, self.cache, self.memory, self.held = 0, -1, None, None, None
        self.thread = threading.get_ident()
        self._check_network()
        self._compare_guidance()
        self.scheduler.num_inference_steps = len(self.steps)
        self.scheduler.timesteps = torch.tensor([step["timestep"] for step in self.steps], device=device)

    def step(
        self,
        model_output: torch.Tensor,
        timestep: Any,
        sample: torch.Tensor,
        eta: float = 0.0,
        use_clipped_model_output: bool = False,
        generator: Any = None,
        variance_noise: Any = None,
        return_dict: bool = True,
    ) -> Any:
        """The state at the schedule's next timestep."""
        if eta:
            raise ScheduleError(
                f"the schedule was found without noise on the way, and eta={eta:g} adds some; leave it out"
            )
        if use_clipped_model_output:
            raise ScheduleError("the schedule was found without use_clipped_model_output; leave it out")
        here = self._here(timestep)
        if self.called != self.number:
            raise ScheduleError(
                f"at timestep {here['timestep']} the scheduler is asked for a step of another network than the schedule was applied to; apply_schedule again on the "
                "pipeline that is called, or remove_schedule(pipeline) on the one that it was applied to"
            )
        after: Mapping[str, Any] = (
            self.steps[self.number + 1] if self.number + 1 < len(self.steps) else {"alpha": self.plan["final_alpha"]}
        )
        self._check_rows(len(sample))
        channels = sample.shape[1]
        self.held = model_output
        made, self.memory = update(
            self.plan["sampler"],
            sample,
            model_output[:, :channels],
            here["alpha"],
            after["alpha"],
            None,
            self.memory,
            model_output[:, channels:],
        )
        self.number += 1
        previous = made.to(sample.dtype)
        # PixArt's pipeline takes the second where there is one step alone.
        return SimpleNamespace(prev_sample=previous) if return_dict else (previous, previous)

    def scale_model_input(self, sample: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        return sample

    def add_noise(self, original_samples: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """By abar at these timesteps, (n,): multistep schedulers look for them among their own steps."""
        abar = self.scheduler.alphas_cumprod.to(original_samples.device)[timesteps.to(original_samples.device)]
        abar = abar.reshape(-1, *(1,) * (original_samples.ndim - 1))
        made: torch.Tensor = abar.sqrt() * original_samples + (1 - abar).sqrt() * noise
        return made.to(original_samples.dtype)

    # ----------------------------------------------------------------------------------- in place of the network's

    def forward(self, *given: Any, **named: Any) -> Any:
        """The noise that the network sees, whatever it predicts, since the steps here are taken by it."""
        if self.ended:
            return self.call(*given, **named)
        told = dict(self.signature.bind(self.net, *given, **named).arguments)
        told.pop("self", None)
        as_dict = told.pop("return_dict", True)
        x = told[next(name for name in STATES if name in told)]
        step = self._here(told["timestep"])
        if self.called == self.number:
            raise ScheduleError(
                f"the pipeline calls the network twice at timestep {step['timestep']}: what steps take from the step before is of one batch; give both, with "
                "and without the condition, in one call, or remove_schedule(pipeline)"
            )
        self.called = self.number
        rows = self._rows(x, told) if step["guided"] is False else None
        self.asked, self.halved = len(x), rows is not None
        noise = self._noise(step, x if rows is None else x[rows], self._condition(told, rows), told["timestep"])
        if rows is not None:
            noise = torch.cat([noise, noise])
        return SimpleNamespace(sample=noise) if as_dict else (noise,)

    def _check_network(self) -> None:
        """Raises ScheduleError where the network was given what blocks one by one do not follow, before or since the schedule was applied."""
        present = getattr(self.pipeline, self.component, None)
        if present is not self.net:
            compiled = getattr(present, "_orig_mod", None) is self.net
            what = "compiled as a whole" if compiled else "another than the schedule was applied to"
            remedy = (
                "give the plain network back, and apply_schedule(..., compiled=True)" if compiled else "apply it again"
            )
            raise ScheduleError(f"pipeline.{self.component} is {what}; {remedy}, or remove_schedule(pipeline)")
        self._check_offloading()
        freed = any(getattr(block, "s1", None) is not None for block in getattr(self.net, "up_blocks", ()))
        adapted = getattr(self.net, "encoder_hid_proj", None) is not None
        if adapted or freed:
            what, off = ("an IP-Adapter", "unload_ip_adapter") if adapted else ("FreeU", "disable_freeu")
            raise ScheduleError(
                f"the network has {what}, which steps that take blocks from the step before cannot follow; pipeline.{off}() first, or remove_schedule(pipeline)"
            )

    def _check_offloading(self) -> None:
        """Raises ScheduleError where blocks' own calls, which are not made here, bring their weights."""
        if block := offloaded(self.net):
            raise ScheduleError(
                f"{block} is offloaded by itself, and its call, which would bring its weights, is not made where blocks run one by one; take "
                "pipeline.enable_model_cpu_offload() instead, or remove_schedule(pipeline)"
            )

    def _compare_guidance(self) -> None:
        """Warns where the pipeline says that it guides by another scale: what that loses was not measured."""
        asked = getattr(self.pipeline, "guidance_scale", None)  # others than Stable Diffusion's do not say it
        if asked is None:
            return
        asked = asked if getattr(self.pipeline, "do_classifier_free_guidance", True) else 1.0
        wanted = self.plan["guidance_scale"] or 1.0
        if asked != wanted:
            warnings.warn(
                f"the schedule was found guided at {wanted:g}, the pipeline guides at {asked:g} (1 is not at all); what it loses so was not measured; "
                f"call it with guidance_scale={wanted:g}",
                stacklevel=2,
            )

    def _here(self, timestep: Any) -> Mapping[str, Any]:
        if self.pipeline.scheduler is not self.scheduler:
            raise ScheduleError(
                "the pipeline has another scheduler than when the schedule was applied; apply_schedule again, or remove_schedule(pipeline)"
            )
        if self.thread != threading.get_ident() and self.thread:
            raise ScheduleError(
                "another thread has begun a call of this pipeline, whose steps take from each other; one call at a time, or a pipeline for each thread"
            )
        asked = int(torch.as_tensor(timestep).reshape(-1)[0])
        if self.number >= len(self.steps) or self.steps[self.number]["timestep"] != asked:
            expected = self.steps[self.number]["timestep"] if self.number < len(self.steps) else "no further one"
            raise ScheduleError(
                f"the pipeline is at timestep {asked}, the schedule at {expected}: it was made for whole trajectories from noise; "
                "remove_schedule(pipeline) for others"
            )
        return self.steps[self.number]

    def _rows(self, x: torch.Tensor, told: Mapping[str, Any]) -> slice | None:
        """The half that has the samples' own conditions, where a pipeline that guides asks for both. Raises ScheduleError where it asks for more."""
        guides = getattr(self.pipeline, "do_classifier_free_guidance", None)
        if guides is False:
            return None
        half = len(x) // 2
        first, second = x[:half], x[half:]
        # NaN equals nothing.
        twice = len(x) % 2 == 0 and (torch.equal(first, second) or torch.equal(first.nan_to_num(), second.nan_to_num()))
        if guides is None and self._own_first:  # the second half of its labels is that of no class
            guides = twice and bool((told["class_labels"][half:] == self.net.config.num_embeds_ada_norm).all())
        elif guides is None:  # which samples of equal noise look like, too: `_check_rows` tells them apart
            guides = twice and self.plan["guidance_scale"] is not None
        if guides and not twice:
            raise ScheduleError(
                f"the pipeline asks for {len(x)} predictions that are not two of each sample, with and without the condition; leave other kinds of guidance "
                "out, apply the schedule to the pipeline that is called, or remove_schedule(pipeline)"
            )
        return (slice(0, half) if self._own_first else slice(half, None)) if guides else None

    def _check_rows(self, samples: int) -> None:
        """Raises ScheduleError where half of what was asked for was taken for predictions without the condition, and was none. Warns where there are such
        and the schedule knows none."""
        if self.halved and not self._own_first and self.asked != 2 * samples:  # a DiT's pipeline steps both halves
            raise ScheduleError(
                f"the pipeline asks for {self.asked} predictions of {samples} samples at a step that is not guided, some of equal noise, which looks as if it "
                f"guided; call it with guidance_scale={self.plan['guidance_scale'] or 1:g}, or give each sample a noise of its own"
            )
        if getattr(self.pipeline, "do_classifier_free_guidance", None) is False and self.asked == 2 * samples:
            raise ScheduleError(
                f"the pipeline that the schedule was applied to does not guide, and {self.asked} predictions of {samples} samples are asked for, as of one that does; "
                "apply_schedule to the pipeline that is called"
            )
        says = self._own_first or hasattr(self.pipeline, "guidance_scale")
        if not says and self.number == 0 and self.plan["guidance_scale"] is None and self.asked == 2 * samples:
            warnings.warn(
                "the schedule was found without guidance, the pipeline guides; what it loses so was not measured; call it with guidance_scale=1",
                stacklevel=2,
            )

    @property
    def _own_first(self) -> bool:
        return type(self.net).__name__ == "DiTTransformer2DModel"

    def _condition(self, told: dict[str, Any], rows: slice | None) -> dict[str, torch.Tensor]:
        found = {name: told[name] for name in CONDITIONS if told.get(name) is not None}
        extra = {name: value for name, value in (told.get(EXTRA) or {}).items() if value is not None}
        known = {*STATES, *TIMES, *CONDITIONS, EXTRA}
        if not hasattr(self.net, "transformer_blocks"):
            known.discard("encoder_attention_mask")
        strange = [name for name, value in told.items() if name not in known and value is not None and value != {}]
        strange += [name for name in extra if name not in (*ADDED, *SIZES)]
        found |= extra
        if strange:
            raise ScheduleError(
                f"the network is given {', '.join(strange)}, which steps that take blocks from the step before cannot follow; leave that out, or "
                "remove_schedule(pipeline)"
            )
        return found if rows is None else {name: value[rows] for name, value in found.items()}

    def _noise(
        self, step: Mapping[str, Any], x: torch.Tensor, condition: Mapping[str, torch.Tensor], t: Any
    ) -> torch.Tensor:
        if holds(self.net, step["reuse"]):
            assert self.held is not None
            return torch.cat([self.held] * (len(x) // len(self.held)))
        following = self.steps[self.number + 1] if self.number + 1 < len(self.steps) else {"reuse": []}
        t = torch.as_tensor(t)
        t = t.reshape(-1)[: len(x)] if t.ndim else t
        answer = partial(as_noise, x=x, alpha=step["alpha"], kind=self.plan["prediction"])
        reuse, keep = tuple(step["reuse"]), tuple(following["reuse"])
        kept = self.cache if reuse and self.cache else {}
        cache = {
            name: rows if len(rows) == len(x) else rows[: len(x)] if self._own_first else rows[-len(x) :]
            for name, rows in kept.items()
        }
        made, cache = self._graph(reuse, keep)(self.net, x, t, cache, condition)
        self.cache = {name: rows for name, rows in cache.items() if name != PREDICTION} or None
        return answer(made)

    def _graph(self, reuse: tuple[str, ...], keep: tuple[str, ...]) -> Callable[..., Any]:
        if (reuse, keep) not in self.graphs:
            self.graphs[reuse, keep] = _call(reuse, keep, self.compiled, len(self.graphs))
        return self.graphs[reuse, keep]


def _call(reuse: tuple[str, ...], keep: tuple[str, ...], compiled: bool | str, number: int) -> Callable[..., Any]:
    """What runs where these are reused and those kept. Compiled, each has code of its own: torch counts what it compiles by code, and gives up on what it
    has compiled eight times."""

    def some(net: Any, x: Any, t: Any, cache: Any, condition: Any) -> Any:
        return run(net, x, t, reuse, keep, cache, condition)

    if not compiled:
        return some
    own = FunctionType(some.__code__.replace(co_name=f"step_{number}"), some.__globals__, None, None, some.__closure__)
    backend = {} if compiled is True else {"backend": compiled}
    graph = torch.compile(own, **backend)  # type: ignore[call-overload]

    def call(*given: Any) -> Any:
        with warnings.catch_warnings():  # what is cached of a network's blocks depends on nothing that changes
            warnings.filterwarnings("ignore", message="Dynamo detected a call to a `functools.lru_cache`")
            return graph(*given)

    return call


def _check_call(component: str, net: Any) -> None:
    """Raises ScheduleError where somebody else has replaced the network's call: blocks that run one by one would leave that out."""
    place = _place(net)
    call = net.__dict__.get(place)
    # What accelerate unwraps is the function within the stock one's decorators.
    own = (type(net).forward, inspect.unwrap(type(net).forward))
    if call is not None and _owner(call) is None and getattr(call, "__func__", None) not in own:
        raise ScheduleError(
            f"pipeline.{component}.{place} was replaced, by torch.compile, by offloading of groups, by accelerate's mixed precision or by another tool, which blocks that "
            "run one by one leave out; take that off first (accelerator.unwrap_model(network, keep_fp32_wrapper=False)), and give compiled=True here where it was "
            "to be compiled"
        )


def _place(net: Any) -> str:
    """Where the network's own call is: its hook, where it is offloaded, calls what it calls the old forward."""
    return "_old_forward" if hasattr(net, "_hf_hook") else "forward"


def _check(plan: Mapping[str, Any], net: Any, scheduler: Any) -> None:
    kind = type(net).__name__
    if plan["network"]["class"] != kind:
        raise ScheduleError(f"the schedule was found for a {plan['network']['class']}, the pipeline has a {kind}")
    graph = graph_of(net)
    blocks = [*graph.names(True)]
    known = {*blocks, *graph.blocks, *graph.names("layers")}
    if plan["network"]["branches"] != blocks:
        raise ScheduleError(
            f"the schedule was found for a network of {len(plan['network']['branches'])} branches, the pipeline's has {len(blocks)} others; "
            "make one for this network"
        )
    for name in dict.fromkeys(name for step in plan["steps"] for name in step["reuse"]):
        if name not in known:
            raise ScheduleError(f"the schedule reuses {name}, which is no layer of this {kind}; mend the file")
    if getattr(scheduler, "init_noise_sigma", 1.0) != 1.0:
        raise ScheduleError(
            f"{type(scheduler).__name__} scales its states; set pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config) first"
        )
    predicts = getattr(scheduler.config, "prediction_type", None)
    if predicts not in (None, plan["prediction"]):
        raise ScheduleError(
            f"the schedule was found for a network that predicts {plan['prediction']}, the pipeline's scheduler says that it predicts {predicts}; make one for "
            "this pipeline"
        )
    abar = getattr(scheduler, "alphas_cumprod", None)
    for step in plan["steps"]:
        here = None if abar is None or step["timestep"] >= len(abar) else float(abar[step["timestep"]])
        most = max(here or 0.0, step["alpha"])
        if here is None or (most > FAINT and abs(here - step["alpha"]) > CLOSE * most):
            raise ScheduleError(
                f"the schedule was found for another noise process: abar is {step['alpha']:.6g} at timestep {step['timestep']}, here it is {here}"
            )
