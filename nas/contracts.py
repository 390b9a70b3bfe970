"""The vocabulary: frozen values that travel through the engine, and the protocols its parts implement.

A *recipe* (`Supernet`, `Evaluator`, `Searcher`, `Training`) is a small frozen object that can be pickled, printed and
compared. Tensors exist only in what a recipe's `load` or `start` returns, inside a worker. Objectives are minimised.
"""

from __future__ import annotations

import enum
import hashlib
import json
import math
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol, runtime_checkable

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import torch

WITHOUT_ATTENTION = "macs_share_without_attention"
"""Name of the cost that some papers count: without the two products of every attention."""

SAMPLER = "sampler"
"""Name of the choice that is one of the whole trajectory, whatever its interval: who runs it."""

Genome = tuple[int, ...]
"""One option index per choice of the space."""

Finer = bool | Literal["layers"]
"""How finely a network is taken apart: into blocks (False), their branches (True), or the layers of these."""

Arch = Any
"""A supernet's own description of one of its subnets: numbers, strings and (nested) tuples of them. Opaque to `nas`."""


class UserError(Exception):
    """Bad input. The message names the value, the limit and the remedy; the command line prints it without a traceback."""


def frozen(value: Any) -> Any:
    """JSON lists as (nested) tuples, so that an `Arch` read from JSON equals the one that was written."""
    return tuple(frozen(item) for item in value) if isinstance(value, list | tuple) else value


def derive_seed(*parts: int | str) -> int:
    """A 32-bit seed from, for example, (study seed, trial number, purpose). Distinct parts give independent seeds."""
    return int.from_bytes(hashlib.sha256(json.dumps(parts).encode()).digest()[:4], "big")


def digest_of(description: Any) -> str:
    """16 hexadecimal digits that identify a JSON description, whatever the order of its keys."""
    text = json.dumps(description, sort_keys=True, default=list)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


# ---------------------------------------------------------------------------------------------------------------- values


@dataclass(frozen=True, slots=True)
class Choice:
    """One gene. `options` are shown to people (and to the dashboard); genes stand in sampling order, noisy to clean."""

    name: str
    options: tuple[str | int | float, ...]
    interval: int


class Guidance(NamedTuple):
    """Classifier-free guidance of a step (Ho & Salimans 2022, eq. 6, whose weight is this scale less 1): the noise is u + scale (c - u),
    where c is predicted with the sample's condition and u with the null one, by the subnet `arch`; where that is empty, by the step's own."""

    scale: float
    arch: Arch = ()


@dataclass(frozen=True, slots=True)
class Step:
    """What the sampler does at a timestep: which subnet runs, which blocks' outputs are reused, and how it is guided, if it is."""

    timestep: int
    arch: Arch
    reuse: tuple[str, ...] = ()
    guidance: Guidance | None = None

    @property
    def archs(self) -> tuple[Arch, ...]:
        """The subnets that it calls: its own, and another one that guides it."""
        other = self.guidance.arch if self.guidance else ()
        return (self.arch, other) if other and other != self.arch else (self.arch,)


Price = Callable[[Step], int]
"""What a step costs, in a unit of its own."""

Condition = Mapping[str, "torch.Tensor"]
"""What samples are conditioned on: the stock model's own keyword arguments, one row for each sample."""


@dataclass(frozen=True, slots=True)
class Schedule:
    """What the sampler runs, noisy to clean. Canonical: equal schedules have equal JSON and equal digests.

    `sampler`: the name of the one that is to run it, of those that the evaluator offers; where it is empty, its first.
    Raises ValueError unless the timesteps are non-negative and strictly decreasing.
    """

    steps: tuple[Step, ...]
    sampler: str = ""

    def __post_init__(self) -> None:
        timesteps = self.timesteps
        if not timesteps or min(timesteps) < 0 or any(a <= b for a, b in pairwise(timesteps)):
            raise ValueError(f"a schedule's timesteps must decrease strictly to at least 0, got {timesteps}")

    @property
    def timesteps(self) -> tuple[int, ...]:
        return tuple(step.timestep for step in self.steps)

    @property
    def archs(self) -> tuple[Arch, ...]:
        """The distinct subnets, in order of their first use."""
        return tuple(dict.fromkeys(arch for step in self.steps for arch in step.archs))

    def to_json(self) -> str:
        """Guidance and sampler are left out where there is none, so that schedules from before there was any keep their digests."""
        rows = [
            [step.timestep, step.arch, step.reuse, *([step.guidance] if step.guidance else [])] for step in self.steps
        ]
        return json.dumps({"steps": rows, "sampler": self.sampler} if self.sampler else rows, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> Schedule:
        read = json.loads(text)
        rows, sampler = (read["steps"], read["sampler"]) if isinstance(read, dict) else (read, "")
        return cls(
            tuple(
                Step(t, frozen(arch), frozen(reuse), *(Guidance(scale, frozen(other)) for scale, other in guidance))
                for t, arch, reuse, *guidance in rows
            ),
            sampler,
        )

    @property
    def digest(self) -> str:
        """16 hexadecimal digits that identify the schedule."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()[:16]


@dataclass(frozen=True, slots=True)
class Score:
    """What an evaluator measured.

    `replicates[name]` are delete-a-block jackknife values of `values[name]`: replicate b leaves out the b-th block of
    samples. All schedules of a rung share noises and blocks, so the standard error of one score and of the difference
    of two scores both follow. `spent` counts what this evaluation took: network `calls` (per sample), `macs` and
    `seconds`; and what kept states made unnecessary: `cached_calls`, `cached_macs`, in `cache_hits` batches.
    """

    values: Mapping[str, float]
    replicates: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    spent: Mapping[str, float] = field(default_factory=dict)
    labels: Mapping[str, str] = field(default_factory=dict)

    def error(self, name: str) -> float:
        """Jackknife standard error of `values[name]` over samples; NaN where there are no replicates."""
        return jackknife_error(self.replicates.get(name, ()))

    def difference(self, other: Score, name: str) -> tuple[float, float]:
        """`self - other` and its *paired* standard error. Both must come from the same rung and seed."""
        mine, theirs = self.replicates.get(name, ()), other.replicates.get(name, ())
        paired = [a - b for a, b in zip(mine, theirs, strict=True)]
        return self.values[name] - other.values[name], jackknife_error(paired)

    def charged_in_full(self) -> Score:
        """The same score as if nothing had been kept: what somebody pays who takes it instead of measuring."""
        spent = dict(self.spent)
        for name in ("calls", "macs"):
            spent[name] = spent.get(name, 0.0) + spent.pop(f"cached_{name}", 0.0)
        spent.pop("cache_hits", None)
        return replace(self, spent=spent)

    def to_json(self) -> dict[str, Any]:
        return {
            "values": dict(self.values),
            "replicates": {name: list(values) for name, values in self.replicates.items()},
            "spent": dict(self.spent),
            "labels": dict(self.labels),
        }

    @classmethod
    def plain(cls, answer: Any) -> Score:
        """An evaluator's answer with Python's floats, which a ledger can hold, whatever it computes with. Raises TypeError for what is no score."""
        if not isinstance(answer, Score):
            raise TypeError(f"the evaluator returned {type(answer).__name__}; a call returns a Score")
        values, spent = ({name: float(value) for name, value in of.items()} for of in (answer.values, answer.spent))
        replicates = {name: tuple(map(float, each)) for name, each in answer.replicates.items()}
        return cls(values, replicates, spent, answer.labels)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Score:
        replicates = {name: tuple(values) for name, values in data["replicates"].items()}
        return cls(data["values"], replicates, data["spent"], data["labels"])


def plain(numbers: Mapping[str, Any]) -> dict[str, float]:
    """With Python's own numbers, which a ledger can hold, for those of numpy or torch."""
    return {name: getattr(number, "item", lambda number=number: number)() for name, number in numbers.items()}


def jackknife_error(replicates: Sequence[float]) -> float:
    """sqrt((B-1)/B * sum (r_b - mean)^2) over B delete-a-block replicates; NaN for fewer than two."""
    count = len(replicates)
    if count < 2:
        return math.nan
    mean = sum(replicates) / count
    return math.sqrt((count - 1) / count * sum((value - mean) ** 2 for value in replicates))


Status = Literal["running", "complete", "pruned", "failed"]


@dataclass(frozen=True, slots=True)
class Proposal:
    """What a searcher asks to have scored. `origin` is JSON: whatever a replay of the searcher needs to know of it.

    A genome over the limits is scored only where the origin has the key "probe": to learn from it; it cannot win.
    "predicted", where the searcher has one, is the first objective's value that it expects.
    """

    genome: Genome
    origin: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Trial:
    """One proposal at one rung, as the ledger knows it.

    `violations[name]` is cost minus limit, so positive where the limit is exceeded. A trial of the last rung ends as
    "complete" (verified), one of a lower rung as "pruned" (scored, with fewer samples). `clock`: when it was opened and closed, in
    seconds since 1970, where it was read from a storage.
    """

    number: int
    genome: Genome
    digest: str
    rung: int
    status: Status
    score: Score | None = None
    cost: Mapping[str, float] = field(default_factory=dict)
    violations: Mapping[str, float] = field(default_factory=dict)
    origin: Mapping[str, Any] = field(default_factory=dict)
    reason: str = ""
    clock: tuple[float, float] | None = field(default=None, compare=False)

    @property
    def scored(self) -> bool:
        return self.status in ("complete", "pruned")

    @property
    def failure(self) -> str:
        """What its reason comes to, in one line."""
        return next(iter(self.reason.strip().splitlines()[-1:]), "unknown")

    def objectives(self, names: Sequence[str]) -> tuple[float, ...]:
        """The named objectives, from the exact cost or the measured score; NaN where not (yet) known."""
        measured = self.score.values if self.score else {}
        return tuple(float(self.cost[n]) if n in self.cost else float(measured.get(n, math.nan)) for n in names)


@dataclass(frozen=True, slots=True)
class Problem:
    """What a searcher is bound to: where to look, what to minimise, and hard limits on exact costs."""

    space: SearchSpace
    objectives: tuple[str, ...]
    limits: Mapping[str, float] = field(default_factory=dict)

    def violations(self, genome: Genome) -> dict[str, float]:
        cost = self.space.cost(genome)
        return {name: cost[name] - limit for name, limit in self.limits.items()}

    def feasible(self, genome: Genome) -> bool:
        return all(excess <= 0 for excess in self.violations(genome).values())

    def quality(self, trial: Trial) -> float | None:
        """The first objective of a trial that was scored, and with a number."""
        [value] = trial.objectives(self.objectives[:1])
        return value if trial.scored and math.isfinite(value) else None


class Signal(enum.Enum):
    """What `ask` returns when it has no proposal: WAIT for pending results, or DONE for good."""

    WAIT = "wait"
    DONE = "done"


WAIT = Signal.WAIT
DONE = Signal.DONE


@dataclass(frozen=True, slots=True)
class Progress:
    """One tick of long work: `done` of `total` units, with numbers worth showing (loss per width, accuracy)."""

    what: str
    done: int
    total: int
    values: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Snapshot:
    """What learning has come to: tensors from which it goes on, and the MACs spent so far."""

    tensors: Mapping[str, torch.Tensor]
    macs: int


# ------------------------------------------------------------------------------------------------------------- protocols


@runtime_checkable
class SearchSpace(Protocol):
    """Genes and what they mean. Pure and cheap: no tensors."""

    def describe(self) -> Mapping[str, Any]:
        """JSON that identifies the space: a ledger is not continued under another one."""

    @property
    def choices(self) -> Sequence[Choice]: ...

    def decode(self, genome: Genome) -> Schedule:
        """Total: every genome of the right length with options in range decodes. Raises ValueError otherwise."""

    def cost(self, genome: Genome) -> Mapping[str, float]:
        """Exact cost of the decoded schedule, per sample: `macs`, `macs_share` (of the full net on all timesteps), and
        `params` (stored weights of the distinct subnets); where a space knows it, `macs_share_without_attention`, the share without the
        products of attention."""

    def interval_costs(self, price: Price | None = None) -> Sequence[npt.NDArray[np.int64]]:
        """What each interval costs, in order, by its options: an array with one axis for each choice of the interval. In MACs, or in
        whatever `price` says of a step, of which its subnet and what it reuses count alone. Additive: summed over the intervals, at a
        genome's options, they equal `cost(genome)["macs"]`, or exceed it where an interval can save more thanks to the one before it,
        as where it reuses that one's blocks: who keeps to a budget by them keeps to it."""


class Denoiser(Protocol):
    """One step's noise in x, whatever the network predicts, and behind it, where the network has learned one, as many channels that say
    where the step's variance lies. x: (batch, channels, height, width); t: the step's timestep; cache: what the step before kept; condition:
    the samples' own; a guided step adds the null one itself."""

    def __call__(
        self, x: torch.Tensor, t: int, cache: Any = None, condition: Condition | None = None
    ) -> tuple[torch.Tensor, Any]: ...


class Gated(Protocol):
    """One subnet, all of which runs: a block's output counts as gate * its own + (1 - gate) * that of the step before. Differentiable in
    the gates, a scalar for each block by name; without a cache, and without gates, it is the plain subnet. Returns the cache too. Guided
    by itself both rows of a sample have the same gates; another subnet that guides has none."""

    def __call__(
        self,
        x: torch.Tensor,
        t: int,
        gates: Mapping[str, torch.Tensor],
        cache: Any = None,
        condition: Condition | None = None,
        guidance: Guidance | None = None,
    ) -> tuple[torch.Tensor, Any]: ...


OPTIONAL = {
    "Sampler": ("name",),
    "Supernet": ("profile", "outline"),
    "Training": ("macs",),
    "LoadedSupernet": (
        "apart",
        "autoencoder",
        "conditions_of",
        "in_pixels",
        "posterior",
        "learned_variance",
        "noise_by",
        "null_condition",
        "some_condition",
        "text_components",
        "text_shape",
        "to_states",
    ),
}
"""Members of a protocol that a search does without: a dry run asks for the outline and for what training takes, pictures of schedules for
the profile; a loaded supernet without the last ones works in pixels, predicts the noise alone and takes no conditions, and a search scores it as it is; a sampler without a
name goes by that of its class."""


def some_condition(net: LoadedSupernet, count: int) -> Condition | None:
    """Any condition that the network takes, of so many rows, for who only wants to see it run; None where it takes none."""
    make = getattr(net, "some_condition", None)
    return None if make is None else make(count)


def conditions_of(net: LoadedSupernet, data: ImageSet) -> Callable[[torch.Tensor], Condition] | None:
    """What makes conditions of chosen images, (n,), on the network's device; None where it takes none."""
    make = getattr(net, "conditions_of", None)
    return None if make is None else make(data)


def noise_by(
    net: LoadedSupernet, model: Any, x: torch.Tensor, t: int, condition: Condition | None = None
) -> torch.Tensor:
    """What a stock subnet says of the noise in x: its output, where the supernet does not know better."""
    told = getattr(net, "noise_by", None)
    if told is not None:
        return told(model, x, t, condition)  # type: ignore[no-any-return]
    return model(x, t, **(condition or {})).sample  # type: ignore[no-any-return]


class LoadedSupernet(Protocol):
    """A supernet with its weights on a device."""

    @property
    def alphas_cumprod(self) -> npt.NDArray[np.float64]:
        """abar_t of the forward process for every training timestep."""

    @property
    def scheduler(self) -> Mapping[str, Any]:
        """Arguments of a diffusers scheduler for the same process."""

    @property
    def state_shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of the sampler's state: of noises and inputs."""

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of an image, which is compared with real ones."""

    @property
    def in_pixels(self) -> bool:
        """Whether a state is an image with noise, so that the predicted image may be clipped to an image's range."""

    @property
    def learned_variance(self) -> bool:
        """Whether the network also says, in as many further channels, where a step's variance lies (Nichol & Dhariwal 2021, eq. 15)."""

    def null_condition(self, condition: Condition) -> Condition:
        """The condition that says nothing, in as many rows: what a guided step also predicts with."""

    def conditions_of(self, data: ImageSet) -> Callable[[torch.Tensor], Condition] | None:
        """What makes the conditions of chosen images, (n,): their labels, or what their captions tell the network; None where it takes none.
        Raises UserError where the images have not got them."""

    @property
    def text_components(self) -> Mapping[str, Any]:
        """The stock text encoders and tokenizers that make its conditions of texts, by their names in a pipeline; none where there are none."""

    @property
    def text_shape(self) -> Mapping[str, Any] | None:
        """Of the text that it reads: how many `tokens`, and the `size`, height and width, that an image is said to have; None where it reads none."""

    def some_condition(self, count: int) -> Condition | None:
        """Any condition that the network takes, of so many rows, for who only wants to see it run; None where it takes none."""

    @property
    def device(self) -> torch.device: ...

    @property
    def full_arch(self) -> Arch:
        """The whole network."""

    @property
    def smallest_arch(self) -> Arch:
        """The cheapest subnet."""

    @property
    def version(self) -> int:
        """Grows whenever the weights change: what was computed under another version no longer holds."""

    def denoiser(self, step: Step, keep: Sequence[str] = ()) -> Denoiser:
        """`keep`: blocks whose outputs the next step reuses; the cache that the call returns holds them."""

    def noise_by(self, model: Any, x: torch.Tensor, t: int, condition: Condition | None = None) -> torch.Tensor:
        """What a stock subnet says of the noise in x: its output, or a linear map of it and x where the network predicts v or the image."""

    def gated(self, arch: Arch) -> Gated: ...

    def blocks(self, arch: Arch, finer: Finer = False) -> Sequence[str]:
        """Names of the subnet's blocks, of their branches, or of the layers of these, in the order of the forward pass."""

    def expanded(self, arch: Arch, names: Sequence[str], finer: Finer = False) -> Sequence[str]:
        """The blocks, branches or layers that these names mean whole."""

    def reused(self, arch: Arch, wanted: Sequence[str], finer: Finer = False) -> Sequence[str]:
        """What a step reuses that is to run these blocks alone: the others, and those whose output nobody reads who runs."""

    @property
    def autoencoder(self) -> torch.nn.Module | None:
        """The stock diffusers model between states and images, which an exported folder takes along; None in pixel space."""

    @property
    def posterior(self) -> str:
        """What networks are trained on of an image's posterior: a "sample" or its "mean"."""

    def to_images(self, x: torch.Tensor) -> torch.Tensor:
        """Sampler state to images in [-1, 1]: identity in pixel space."""

    def to_states(self, images: torch.Tensor) -> torch.Tensor:
        """Images in [-1, 1] to the states that they are, the inverse."""

    def extract(self, arch: Arch) -> torch.nn.Module:
        """A stand-alone copy of the subnet as a stock diffusers model, on the CPU."""

    def macs(self, step: Step) -> int:
        """Exact multiply-adds of a step on one sample: what it reuses does not run, what guides it does."""

    @property
    def pipeline_files(self) -> Sequence[Path]:
        """Stand-alone Python: the diffusers pipeline that samples with the stock models, in which "unet_0: Any" and "unet_0=unet_0" stand
        for all of them, what it imports, and a script that trains them."""

    @property
    def training_settings(self) -> Mapping[str, Any]:
        """Defaults of that script."""

    def adopt(self, arch: Arch, model: torch.nn.Module) -> None:
        """From now on this stock model is what serves the arch."""

    def apart(self, arch: Arch, name: str) -> Arch:
        """The same subnet under a name of its own, so that a model may be adopted for it alone."""

    def run_as(self, channels_last: bool, compiled: bool) -> tuple[bool, bool]:
        """How denoisers run from now on, a matter of speed alone; how they did before is returned."""


class Supernet(Protocol):
    """Recipe of a weight-sharing network."""

    def describe(self) -> Mapping[str, Any]:
        """JSON that identifies the recipe; two recipes that describe themselves alike may share weights."""

    def digest(self, folder: Path) -> str:
        """Identifies the trained weights in the folder. Raises UserError where there are none."""

    def profile(self, step: Step) -> Mapping[str, float]:
        """For each block of the full network, in the order of the forward pass, the share of its MACs that run at a step; -1 where its
        output is reused."""

    def outline(self) -> Mapping[str, float]:
        """What the full network is, without a weight: `params`, `macs` of one call, where it knows them the `attention_macs` among these, of
        the two products of every attention, where its states are no images the `decoder_macs` of one image and the `codec_training_macs`, and how many numbers one image's `activations` are, all modules' outputs together. Builds the largest and the smallest network on the meta device and runs them. Raises
        UserError where one does not hand out what it is handed."""

    def load(self, folder: Path, device: str) -> LoadedSupernet:
        """Reads `folder/weights.safetensors`. Raises UserError where the file is missing, damaged or of another shape."""


class Training(Protocol):
    """Recipe of the supernet's training; resumes what it finds in the folder, does nothing where it is finished."""

    def describe(self) -> Mapping[str, Any]: ...

    def macs(self, supernet: Any) -> float:
        """What it takes in all, expected: forward and backward count thrice."""

    def run(self, supernet: Any, images: Images, folder: Path, seed: int, device: str) -> Iterator[Progress]: ...


class Images(Protocol):
    """Recipe of a set of real images; hashable, as every frozen dataclass of plain values is."""

    def load(self) -> ImageSet: ...

    def __hash__(self) -> int: ...


@dataclass(frozen=True, eq=False)
class ImageSet:
    """`pixels`: float32 (n, channels, height, width) in [-1, 1]; `labels`: int64 (n,) or None; `digest`: content hash, of the held-out
    images too; `held_out`: further images, on which nothing is trained; `captions`: what each shows, in words; `source`: digest of the set of
    which these are all but a part of the held-out images, empty where they are none."""

    pixels: npt.NDArray[np.float32]
    labels: npt.NDArray[np.int64] | None
    digest: str
    held_out: ImageSet | None = None
    captions: tuple[str, ...] | None = None
    source: str = ""

    @property
    def reference(self) -> ImageSet:
        """What samples are compared with: the held-out images, where there are some."""
        return self.held_out or self

    @property
    def texts(self) -> tuple[str, ...] | None:
        """The captions; of images that have labels alone, the labels' numbers; None where there are neither."""
        if self.captions is not None or self.labels is None:
            return self.captions
        return tuple(str(label) for label in self.labels)

    def __len__(self) -> int:
        return len(self.pixels)


def spread(count: int, most: int, labels: npt.NDArray[Any] | None = None) -> list[int]:
    """At most so many places, rising, all over so many images; one of the last class is among them."""
    most = min(count, most)
    chosen = sorted({round(place * (count - 1) / max(1, most - 1)) for place in range(most)})
    if labels is not None and most < count and labels.max() not in labels[chosen]:
        chosen = sorted({*chosen[:-1], int(labels.argmax())})
    return chosen


class LoadedEvaluator(Protocol):
    @property
    def supernet(self) -> LoadedSupernet: ...

    def sampler_of(self, schedule: Schedule) -> Mapping[str, Any]:
        """The sampler that runs the schedule, in words: its `class` and its settings."""

    def __call__(self, schedule: Schedule, rung: int, seed: int) -> Score:
        """Scores `rung` samples. Noise of sample i depends on (seed, i) alone, so scores of one seed are paired."""

    def sample(self, schedule: Schedule, count: int, seed: int) -> torch.Tensor:
        """Images (count, channels, height, width) in [-1, 1]."""


@runtime_checkable
class Grounded(Protocol):
    """A loaded evaluator that can also say what its score stands on."""

    def grounds(self, schedule: Schedule, count: int, seed: int) -> Mapping[str, Any] | None:
        """For a report: how many images are held out, how small the score can be, and whether samples repeat train images; None where it does
        not know."""

    def seconds_of_images(self, count: int) -> float:
        """Roughly how long it takes to look at so many real images for that; endless where nobody can say."""


class Evaluator(Protocol):
    """Recipe of a score."""

    @property
    def rungs(self) -> Sequence[int]:
        """Sample counts, increasing. Search happens on the first; the last verifies, on seeds of its own."""

    @property
    def metrics(self) -> Sequence[str]:
        """Names of the values that a score carries."""

    def describe(self) -> Mapping[str, Any]:
        """JSON of the recipe."""

    def digest(self, folder: Path) -> str:
        """Identifies what is measured, with all files that it depends on: scores under other digests do not compare."""

    def prepare(self, folder: Path, seed: int, device: str) -> Iterator[Progress]:
        """Makes what `load` needs and the folder lacks (a feature extractor, reference statistics), once for all workers."""

    def load(self, supernet: LoadedSupernet, folder: Path) -> LoadedEvaluator: ...


class Search(Protocol):
    """A started searcher: a function of (problem, seed, what it was told, what is pending)."""

    def ask(self, pending: Sequence[Genome]) -> Proposal | Signal:
        """A feasible genome that is new and not pending, or WAIT, or DONE; in bounded time. Asking twice with nothing
        told in between gives the same answer."""

    def tell(self, trial: Trial) -> None:
        """A finished trial (scored or failed) of the first rung, in order of completion."""


class Searcher(Protocol):
    """Recipe of a search. `repr` identifies it: a ledger refuses to go on under another one."""

    def start(self, problem: Problem, seed: int) -> Search: ...


Learned = tuple[Mapping[str, "torch.Tensor"], int]
"""Tensors that a searcher learned from the supernet, and the MACs that it took."""


@runtime_checkable
class LearningSearcher(Protocol):
    """A searcher that first learns from the supernet's gradients or losses: once in a run, on a worker; what it learned is kept as
    safetensors in the run folder and handed to `start`. It yields snapshots now and then, and goes on from the last one. With other limits it
    learns anew, unless it says `for_any_limits = True`: what it learns is the same whatever they are. (Where time is limited the space is another one.)"""

    @property
    def learns(self) -> bool:
        """Whether it wants to, with its present settings."""

    def learn(
        self,
        problem: Problem,
        supernet: LoadedSupernet,
        images: ImageSet,
        seed: int,
        so_far: Snapshot | None = None,
    ) -> Generator[Progress | Snapshot, None, Learned]: ...

    def start(self, problem: Problem, seed: int, learned: Mapping[str, torch.Tensor] | None = None) -> Search: ...
