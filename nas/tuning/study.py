"""The study that `nas tune` runs: a pipeline folder's network with frozen weights, judged by the samples that it makes itself.

Genes: at each step, which blocks run, or none, and where steps may be guided, whether they are. Loss: mean squared distance of a sample to the full
pipeline's own of the same noise, condition and guidance.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any, Literal

import diffusers
import numpy as np
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler

from evaluators.captions import NoImages, TextsAlone
from evaluators.conditions import Conditions, Labels, Prompts
from evaluators.features import ExternalFeatures
from evaluators.latency import Latency, Timed
from evaluators.proxies import TeacherDistance, TeacherSimilarity
from evaluators.sampling import DDIM, DPMSolver
from evaluators.scoring import Scores
from evaluators.teacher import NetworkAgreement, NetworkFrechet, TeacherPerceptual
from evaluators.trajectories import STATES_KEPT
from nas.base.files import read_json
from nas.contracts import Evaluator, Images, UserError
from nas.searchers.evolution import Evolution
from nas.searchers.path import Path as ShortestPath
from nas.study import Study
from search_spaces.intervals import Timesteps, per_step, uniform
from search_spaces.options import Options
from search_spaces.patterns import ALL, Every, LeftOut, Only, Pattern
from search_spaces.pretrained import INDEX
from search_spaces.shipped.graph import AROUND, Graph
from search_spaces.stepwise import Stepwise
from search_spaces.supernet import Elastic
from search_spaces.training import Stages

USUAL = {
    "StableDiffusionPipeline": 7.5,
    "StableDiffusionXLPipeline": 5.0,
    "DiTPipeline": 4.0,
    "PixArtAlphaPipeline": 4.5,
    "PixArtSigmaPipeline": 4.5,
}
"""By how much these pipelines guide where nobody says otherwise."""

DISTILLED = ("LCMScheduler", "TCDScheduler")
"""Schedulers that networks of a few steps are used with."""

PLAIN: Mapping[str, Any] = {
    "use_karras_sigmas": False,
    "use_exponential_sigmas": False,
    "use_beta_sigmas": False,
    "use_lu_lambdas": False,
    "solver_type": "midpoint",
    "final_sigmas_type": "zero",
}
"""What DPM-Solver++ is here: of the midpoint, its steps spaced by timesteps alone."""

OVERRIDDEN: Mapping[str, Any] = {"steps_offset": 1, "clip_sample": False}
"""Of its scheduler, whatever that is saved with, by a StableDiffusionPipeline."""

LEAST_CACHE, MOST_CACHE = 2**29, 2**32
"""Bytes of what scores keep."""

SPACING = ("timestep_spacing", "steps_offset", "num_train_timesteps")
LOSS, SEARCHER = "teacher_mse", "path"


@dataclass(frozen=True)
class Wanted:
    """What is asked of a pipeline. `limit`: the share of the full pipeline's "time" or "macs" that a schedule may take. `steps`: of the grid that schedules
    choose from. `full_steps`: of the full pipeline that they are compared with, as many by default. `guidance`: the full pipeline's, its usual one by
    default, 1 for none. `prompts`: a file with one in each line. `classes`: asked for in turn, all by default. `extractor`: a file of features for a
    perceptual distance. `samples`: that search and that verify. `batch`: images of a call whose time is measured."""

    folder: Path
    measure: Literal["time", "macs"]
    limit: float
    steps: int = 20
    full_steps: int | None = None
    guidance: float | None = None
    prompts: Path | None = None
    classes: tuple[int, ...] = ()
    extractor: Path | None = None
    samples: tuple[int, int] = (32, 256)
    batch: int = 4
    trials: int = 240
    further: tuple[tuple[str, ...], ...] = ()

    def __post_init__(self) -> None:
        if not 0 < self.limit < 1:
            raise UserError(
                f"--within {self.measure}={self.limit:g} is no share of what the full pipeline takes; give one between 0 and 1"
            )
        if self.steps < 2:
            raise UserError(f"--steps {self.steps} leaves nothing to choose; give at least 2")
        if self.guidance is not None and self.guidance < 1:
            raise UserError(
                f"--guidance {self.guidance:g}: pipelines guide by 1, which is not at all, or more; give 1 or more"
            )

    @cached_property
    def net(self) -> Elastic:
        channels = self.exported.get("guided_channels")
        return Elastic.from_pretrained(self.folder, widths=(1.0,), guided_channels=channels)

    @property
    def graph(self) -> Graph:
        return self.net.cost.graph(self.net.anatomy.full)

    @cached_property
    def kind(self) -> str:
        """Of the pipeline, as its class is called; empty for the folder of a bare network."""
        if not (self.folder / INDEX).is_file():
            return ""
        name = read_json(self.folder / INDEX, "give the folder of a diffusers pipeline").get("_class_name")
        return str(name[1] if isinstance(name, list) else name)

    @cached_property
    def exported(self) -> Mapping[str, Any]:
        """What a folder that `nas export` wrote says of its schedule; nothing of others."""
        own = self.kind == "StepAwarePipeline"
        return read_json(self.folder / "schedule.json", "export it anew") if own else {}

    @cached_property
    def scheduler(self) -> Mapping[str, Any]:
        """Settings of the pipeline's own, none where it has none."""
        places = (self.folder / "scheduler", self.folder)  # the first DDPMs were released without folders within
        files = [file for place in places if (file := place / "scheduler_config.json").is_file()]
        told = read_json(files[0], "give the folder of a diffusers pipeline") if files else {}
        stock = getattr(diffusers, str(told.get("_class_name")), DDIMScheduler)
        if told and self.kind == "StableDiffusionPipeline":  # which sets these two where it is made
            known = inspect.signature(stock).parameters
            told = {**told, **{name: value for name, value in OVERRIDDEN.items() if name in known}}
        found: Mapping[str, Any] = told
        return found

    @cached_property
    def sampler(self) -> DDIM | DPMSolver:
        """DPM-Solver++ of second order where that is the pipeline's; DDIM for all others."""
        if self.exported:
            own = self.exported["sampler"]
            return (DPMSolver if own["class"] == "DPMSolver" else DDIM)(clip=bool(own.get("clip", True)))
        config = self.scheduler
        multistep = (
            config.get("_class_name") == "DPMSolverMultistepScheduler"
            and config.get("algorithm_type", "dpmsolver++") == "dpmsolver++"
            and config.get("solver_order", 2) == 2
        )
        # DPM-Solver++ clips nothing, whatever its settings still say of another one; DDIM in the place of another does, as diffusers makes it of these.
        clip = (not multistep and bool(config.get("clip_sample", True))) if self.net.in_pixels else None
        return DPMSolver(clip=clip) if multistep else DDIM(clip=clip)

    def check(self) -> None:
        """Raises UserError for a network that was distilled to a few steps, as its scheduler says, and for guidance or classes that it does not take."""
        if self.guidance not in (None, 1) and not self.net.conditional:
            raise UserError(f"--guidance {self.guidance:g}: the network takes no condition; leave that out")
        if self.classes and "labels" not in self.net.condition_kind:
            raise UserError(f"--labels {','.join(map(str, self.classes))}: the network takes no labels; leave that out")
        if self.guidance is None and self.net.conditional and self.kind not in (*USUAL, "StepAwarePipeline"):
            raise UserError(
                f"{self.folder}: how strongly {self.kind or 'a network without a pipeline'} is usually guided is not known here; give --guidance, 1 for none"
            )
        if self.net.condition_kind == "texts" and self.net.text is None:
            raise UserError(f"{self.folder} has no text encoder; give the folder of the whole pipeline")
        if self.net.in_pixels and self.net.image_shape[0] not in (1, 3):
            raise UserError(
                f"{self.folder}: the network works on {self.net.image_shape[0]} channels, which are no pixels, and has no autoencoder beside it; give the folder of the "
                "whole pipeline"
            )
        if self.exported.get("guided_channels"):
            raise UserError(
                f"{self.folder} guides {self.exported['guided_channels']} channels alone, which schedule.json cannot say; search it by a study, whose schedules `nas export` writes"
            )
        for count in {self.steps, self.full_steps or self.steps}:
            self.grid(count)
        own = self.scheduler.get("_class_name")
        if own in DISTILLED:
            raise UserError(
                f"{self.folder} samples by {own}, as networks do that were distilled to a few steps, each of which does what many did. "
                "No gain: keep its steps; give the network that it was distilled from"
            )

    @property
    def stepped_by(self) -> str:
        """What samples, in words, and what the folder has in its place."""
        mine, like = (
            ("DPM-Solver++", "DPMSolverMultistepScheduler")
            if isinstance(self.sampler, DPMSolver)
            else ("DDIM", "DDIMScheduler")
        )
        if self.exported:
            # A deterministic DDIM is what samples; one of another eta, and DDPM, draw noise on the way.
            told = self.exported["sampler"]
            own = f"{told['class']} of eta {told['eta']:g}" if told.get("eta") else told["class"]
            return f"by {mine}" if own == self.sampler_name else f"by {mine} in place of its {own}"
        own = self.scheduler.get("_class_name", like)
        others = {**(PLAIN if mine != "DDIM" else {}), **({"thresholding": False} if self.net.in_pixels else {})}
        others |= {"clip_sample_range": 1.0} if self.sampler.clip else {}
        left_out = [name for name, plain in others.items() if self.scheduler.get(name, plain) != plain]
        # Of latents nothing is clipped here; these two of diffusers' clip what they are not told to leave.
        clips = own in ("DDIMScheduler", "DDPMScheduler") and self.scheduler.get("clip_sample", True)
        left_out += ["clip_sample"] if clips and not self.net.in_pixels else []
        without = f" without its {' and '.join(left_out)}" if left_out else ""
        if own == like:
            return f"by {mine}{without}"
        return f"by {mine} in place of its {own}{without}"

    @cached_property
    def rival(self) -> DPMSolver | None:
        """Another sampler, whose fewer steps are compared with, where the pipeline is one of diffusers' and DDIM samples."""
        other = isinstance(self.sampler, DPMSolver) or self.exported or not self.kind
        return None if other else DPMSolver(clip=self.sampler.clip)  # which the module that runs it does as it is told

    @property
    def sampler_name(self) -> str:
        return type(self.sampler).__name__

    @property
    def whole(self) -> str:
        """Of what a limit is a share, in words."""
        return "the full pipeline's" if self.full_steps in (None, self.steps) else f"{self.steps} whole steps'"

    def rival_grid(self, steps: int) -> Timesteps:
        """Timesteps of so many steps of the other sampler, spaced as the pipeline's scheduler does it."""
        told = {name: self.scheduler[name] for name in SPACING if name in self.scheduler}
        return self._spaced(DPMSolverMultistepScheduler(**told), steps)

    def grid(self, steps: int) -> Timesteps:
        """Timesteps of the full pipeline in so many steps, as its scheduler spaces them: DPM-Solver++ where that samples, else DDIM with its settings."""
        if not self.scheduler or self.exported:
            return uniform(steps, self.net.noise.timesteps)
        kind = DDIMScheduler if isinstance(self.sampler, DDIM) else DPMSolverMultistepScheduler
        known = inspect.signature(kind).parameters
        told = {name: value for name, value in self.scheduler.items() if name in known and name not in PLAIN}
        return self._spaced(kind(**told), steps)

    def _spaced(self, stock: DDIMScheduler | DPMSolverMultistepScheduler, steps: int) -> Timesteps:
        if steps > self.net.noise.timesteps:
            raise UserError(
                f"{steps} steps (--steps, --full-steps) are more than the {self.net.noise.timesteps} timesteps that the model was trained on; ask for fewer"
            )
        with warnings.catch_warnings():  # diffusers makes arrays of tensors in a way that numpy will not know any more
            warnings.filterwarnings("ignore", "__array__ implementation", DeprecationWarning)
            stock.set_timesteps(steps)
        found = tuple(int(t) for t in stock.timesteps)
        if len(found) != steps or any(a <= b for a, b in pairwise(found)) or found[0] >= self.net.noise.timesteps:
            return uniform(steps, self.net.noise.timesteps)
        return found

    @cached_property
    def scale(self) -> float | None:
        """By which the full pipeline guides; None for not at all."""
        given = self.guidance
        if given is None and self.exported:
            given = max((s["guidance"]["scale"] for s in self.exported["steps"] if s.get("guidance")), default=None)
        elif given is None:
            given = USUAL.get(self.kind)
        return None if given is None or given == 1 or not self.net.conditional else float(given)

    @property
    def images(self) -> Images:
        channels, height, width = self.net.image_shape
        if self.net.condition_kind == "texts":
            if self.prompts is None:
                raise UserError("the network reads a text; give --prompts FILE, with a prompt in each line")
            return TextsAlone(str(self.prompts.resolve()), (height, width), 1 if channels == 1 else 3)
        if self.prompts is not None:
            raise UserError(f"--prompts {self.prompts}: the network reads no text; leave that out")
        classes: tuple[int, ...] = ()
        if self.net.condition_kind == "labels":
            null = self.net.anatomy.null_label
            assert null is not None
            classes = self.classes or tuple(range(null))
            if strange := [label for label in classes if not 0 <= label < null]:
                raise UserError(
                    f"--labels {strange[0]} is none of the network's {null} classes; give some from 0 to {null - 1}"
                )
        elif self.net.condition_kind:
            raise UserError(f"the network takes {self.net.condition_kind}, of which one kind at a time is known here")
        return NoImages((height, width), 1 if channels == 1 else 3, classes)

    @property
    def conditions(self) -> Conditions | None:
        if self.net.condition_kind == "texts":
            assert self.prompts is not None
            assert self.net.text is not None
            return Prompts(str(self.prompts.resolve()), self.net.text)
        return Labels(self.images) if self.net.condition_kind else None

    @property
    def patterns(self) -> tuple[Pattern, ...]:
        """What a step may compute: all, or less and less, or nothing."""
        return distinct((Every(1), *(Only(one) for one in (*sets(self.graph), *self.further)), self.nothing))

    @property
    def nothing(self) -> Pattern:
        """A step that does not run. DDIM without memory does not tell it from one that holds the prediction."""
        return Only(()) if isinstance(self.sampler, DDIM) else LeftOut()

    @property
    def cache_bytes(self) -> int:
        """Room for what one score leaves to the next of the samples that verify, the full pipeline's and a schedule's: images, and states on the way. Of
        several gigabytes no more, where they are large; then the scores that search, of fewer samples, have room."""
        numbers = prod(self.net.image_shape) + (STATES_KEPT + 2) * prod(self.net.state_shape)
        # A quarter of it is for states that carry what is reused.
        return min(max(LEAST_CACHE, 2 * 4 * numbers * self.samples[1] * 4 // 3), MOST_CACHE)

    def study(self, limits: Mapping[str, float], enqueue: tuple[tuple[int, ...], ...] = ()) -> Study:
        """`limits`: on `macs_share` or `latency_ms`."""
        steps, full = self.grid(self.steps), self.grid(self.full_steps or self.steps)
        given: dict[str, Any] = {
            "images": self.images,
            "conditions": self.conditions,
            "rungs": self.samples,
            "sampler": self.sampler if self.rival is None else (self.sampler, self.rival),
            "timesteps": full,
            "guidance": self.scale,
            "cache_bytes": self.cache_bytes,
        }
        parts: list[Evaluator] = [TeacherDistance(**given)]
        if min(self.net.image_shape[1:]) >= WINDOW:
            parts.append(TeacherSimilarity(**given))
        parts += [NetworkFrechet(**given), NetworkAgreement(**given)]
        if self.extractor is not None:
            features = ExternalFeatures(str(self.extractor.resolve()), self.extractor.stem)
            parts.append(TeacherPerceptual(**given, features=features))
        scores = Scores(tuple(parts))
        guides = (None, self.scale) if self.scale is not None else ()
        space = Stepwise(
            self.net,
            steps,
            per_step(steps),
            Options((1.0,)),
            patterns=self.patterns,
            finer=self.graph.predicts_anew,
            deterministic=isinstance(self.sampler, DDIM),
            guidance=guides,
        )
        probes = max(1, round(self.trials * PROBES))
        path = ShortestPath(probes=probes, budgets=BUDGETS, options=min(64, len(self.patterns) * max(1, len(guides))))
        return Study(
            name=f"tune-{self.steps}",
            space=space,
            supernet=self.net,
            images=self.images,
            training=Stages(()),
            evaluator=Timed(scores, Latency(self.batch, warmup=1, repeats=5)) if self.measure == "time" else scores,
            searchers={SEARCHER: path, "evolution": Evolution()},
            objectives=(LOSS,),
            limits=limits,
            trials=self.trials,
            verified=VERIFIED,
            enqueue=enqueue,
        )


WINDOW = 11
"""Sides of the smallest image that SSIM is known of."""

PROBES = 0.75
"""Share of the trials that may be probes."""

BUDGETS = 2
VERIFIED = 5


def sets(graph: Graph) -> tuple[tuple[str, ...], ...]:
    """What runs at a step that reuses the rest, from the least to the most: of a UNet its outer blocks, as many levels as there are (DeepCache); of a
    transformer what stands around its blocks (FORA), its first block, all feed-forward layers, or all attentions (SmoothCache)."""
    if graph.predicts_anew:
        parts = {part: tuple(name for name in graph.names(True) if name.endswith(part)) for part in ("mlp", "attn")}
        first = (graph.blocks[0],) if len(graph.blocks) > 1 else ()
        return tuple(one for one in ((AROUND,), first, *parts.values()) if one)
    levels = sum(name.startswith("d") for name in graph.blocks)
    outer = [
        (*(f"d{i}" for i in range(n)), *(f"u{levels - 1 - i}" for i in reversed(range(n)))) for n in range(1, levels)
    ]
    wanted = ((f"u{levels - 1}",), *outer)
    chosen = np.unique(np.linspace(0, len(wanted) - 1, min(len(wanted), MOST)).round().astype(int))
    return tuple(wanted[i] for i in chosen)


MOST = 3
"""Sets of a UNet's blocks."""


def distinct(patterns: tuple[Pattern, ...]) -> tuple[Pattern, ...]:
    """Without those of a name that stands there already."""
    return tuple({pattern.label: pattern for pattern in patterns}.values())


def computed(graph: Graph, reuse: tuple[str, ...]) -> tuple[str, ...]:
    """What runs at a step that reuses these."""
    runs = graph.expand(graph.blocks) - graph.expand(reuse)
    if len(runs) == len(graph.layers):
        return ALL
    return graph.collapse(runs, graph.predicts_anew) or ((AROUND,) if graph.predicts_anew else ())
