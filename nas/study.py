"""A study: the parts of a search bound together, checked against each other, and found in a file."""

from __future__ import annotations

import importlib.util
import re
import sys
import traceback
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import chdir
from dataclasses import dataclass, field, fields, is_dataclass, replace
from importlib.metadata import entry_points
from itertools import chain, combinations
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from nas.base.files import first_line
from nas.contracts import (
    Evaluator,
    Images,
    LoadedEvaluator,
    Problem,
    Progress,
    Searcher,
    SearchSpace,
    Supernet,
    Training,
    UserError,
    digest_of,
)
from nas.genomes.genetics import LATENCY, check_limits, check_reachable, dearest
from nas.genomes.timed import Timing, calls, timed
from nas.recipes import Positive, Seed, check_recipes, recipe
from nas.searchers.uniform import Uniform

ENTRY_POINTS = "nas.searchers"
MOVED = {
    f"{package}.{module}": f"{package}.{room}.{module}"
    for package, room, modules in (
        ("nas", "genomes", "allocation genetics pareto"),
        ("nas", "searchers", "proposers pruner ranking relaxation"),
        ("nas", "engine", "journal ladder learning ledger ray_runner runner session storage timing writers"),
        ("nas", "results", "audit dashboard outline page plots report"),
        ("nas", "handover", "export"),
        ("nas", "base", "exported failures files interrupts pictures"),
        ("search_spaces", "networks", "cost parts unet"),
        ("search_spaces", "training", "importance optimiser similarity"),
        ("search_spaces", "shipped", "pipeline reuse train_diffusers"),
    )
    for module in modules.split()
}
"""Where modules are that study files may have imported from another place."""

BASELINE = "uniform"
"""Ledger of the uniform schedules, the full net among them, scored at every rung whatever the limits."""

TRAINED = "trained"
"""Ledger of schedules trained after export."""

CONFIRMED = "confirmed"
"""Ledger of chosen schedules, scored on noises on which nothing was chosen."""

RESERVED = ("all", BASELINE, TRAINED, CONFIRMED)
"""No searcher's name: those of other ledgers, and of all searchers."""


SEARCH = ("searcher", "limits", "objectives")
"""Parts of a provenance that say what is searched for and how, not what is measured."""


@dataclass(frozen=True)
class LedgerInfo:
    """What identifies a ledger. A ledger is not continued under another `provenance`. `former`: what parts of it were called once, by
    other rules, for the very same thing. `scores`: of the evaluator whatever its rungs, empty where that was not noted. `variant`: tells it from others of the same
    searcher and seed, with other limits, objectives, rungs or settings; empty for the first."""

    study: str
    searcher: str
    seed: int
    objectives: tuple[str, ...]
    rungs: tuple[int, ...]
    limits: Mapping[str, float]
    provenance: Mapping[str, str]
    former: Mapping[str, str] = field(default_factory=dict, compare=False)
    scores: str = ""
    variant: str = ""

    @property
    def base_name(self) -> str:
        """Study, searcher, and the seed where it is not 0."""
        return f"{self.study}.{self.searcher}" + (f".seed{self.seed}" if self.seed else "")

    @property
    def name(self) -> str:
        """Of the Optuna study."""
        return self.base_name + (f".{self.variant}" if self.variant else "")

    def same(self, part: str, stored: str | None) -> bool:
        """Whether this part of the provenance is what a ledger, or a file, has stored."""
        return stored is not None and stored in (self.provenance.get(part), self.former.get(part))

    def changed(self, stored: Mapping[str, str], without: Collection[str] = ()) -> list[str]:
        """Parts of the provenance that are not what was stored. The baseline has no limits."""
        without = {*without, *(["limits"] if self.searcher == BASELINE else [])}
        return [part for part in self.provenance if part not in without and not self.same(part, stored.get(part))]

    def continues(self, stored: LedgerInfo) -> bool:
        """Whether what is stored is the very same search."""
        limits = self.searcher == BASELINE or dict(self.limits) == dict(stored.limits)
        return limits and not self.changed(stored.provenance)

    def compares(self, other: LedgerInfo) -> bool:
        """Whether its scores are of the same weights, by the same evaluator, on the same seeds of noises, whatever is searched for; rungs may differ."""
        same_scores = bool(self.scores) and self.scores == other.scores
        return not self.changed(other.provenance, SEARCH + (("evaluator",) if same_scores else ()))

    @property
    def of_its_search(self) -> str:
        """Eight hexadecimal digits of what may differ between ledgers that compare."""
        return digest_of({part: self.provenance[part] for part in (*SEARCH, "evaluator")})[:8]

    def digests(self, without: Collection[str] = ()) -> tuple[str, ...]:
        """Of the provenance as a whole, but for some parts, the present one first; any of its parts may be called as it was once."""
        present, former = (
            {part: value for part, value in named.items() if part not in without}
            for named in (self.provenance, self.former)
        )
        some = chain.from_iterable(combinations(former.items(), count) for count in range(len(former) + 1))
        return tuple(dict.fromkeys(digest_of({**present, **dict(renamed)}) for renamed in some))

    def to_json(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "former"}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> LedgerInfo:
        return cls(**{**data, "objectives": tuple(data["objectives"]), "rungs": tuple(data["rungs"])})


@recipe
class Study:
    """Everything a search needs, as recipes: no tensors, picklable, printable.

    `trials`: proposals per searcher on the first rung. `verified`: how many of them reach the last one; on several workers a few more, where a straggler
    changes who leads.
    `limits`: upper limits on costs, `macs`, `macs_share`, `macs_share_without_attention`, `params` or `latency_ms`, as many at once as you like. `seed`: of weights and noises; searches have `--seed`.
    `proxies`: cheaper scores, each at its first rung, that `nas audit` compares with the evaluator. `enqueue`: genomes that every searcher proposes first,
    such as `space.genome(...)` of a schedule that was made elsewhere.
    Raises UserError where the parts do not fit together.
    """

    name: str
    space: SearchSpace
    supernet: Supernet
    images: Images
    training: Training
    evaluator: Evaluator
    searchers: Mapping[str, Searcher]
    objectives: Annotated[tuple[str, ...], Field(min_length=1)] = ("fd", "macs")
    limits: Mapping[str, Positive] = field(default_factory=dict)
    trials: Annotated[int, Field(ge=1, le=10**7)] = 60
    verified: Annotated[int, Field(ge=1, le=10**7)] = 12
    seed: Seed = 0
    proxies: Mapping[str, Evaluator] = field(default_factory=dict)
    enqueue: tuple[tuple[int, ...], ...] = ()

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[A-Za-z0-9_-]+", self.name):
            raise UserError(
                f"study name {self.name!r} names files and Optuna studies; use letters, digits, '_' and '-'"
            )
        for name in self.searchers:
            if not re.fullmatch(r"[A-Za-z0-9_-]+", name) or name in RESERVED:
                raise UserError(
                    f"a searcher cannot be called {name!r}: names are of letters, digits, '_' and '-', and {', '.join(RESERVED)} mean something else"
                )
        for name, searcher in self.searchers.items():
            _settings_of(name, searcher)
        check_recipes(
            self.space,
            self.supernet,
            self.images,
            self.training,
            self.evaluator,
            *self.searchers.values(),
            *self.proxies.values(),
        )
        known = {*self.evaluator.metrics, *self.space.cost(_first_genome(self.space))}
        unknown = [name for name in self.objectives if name not in known]
        if (
            unknown
            or len(set(self.objectives)) != len(self.objectives)
            or self.objectives[0] not in self.evaluator.metrics
        ):
            raise UserError(
                f"objectives {self.objectives} must be among {', '.join(sorted(known))}, and the first one measured: "
                f"{' or '.join(self.evaluator.metrics)}"
            )
        given = getattr(self.evaluator, "sampler", None)
        samplers = given if isinstance(given, tuple) else (given,)
        # The first samples a schedule that names none.
        run = samplers if getattr(self.space, "samplers", ()) else samplers[:1]
        notices = any(getattr(one, "stochastic", False) or getattr(one, "multistep", False) for one in run)
        if getattr(self.space, "needs_deterministic", False) and notices:
            raise UserError(
                "the space leaves out steps that compute nothing, which only a deterministic sampler without memory does not notice; give it "
                "deterministic=False, or the evaluator DDIM"
            )
        if unknown := [one.name for one in getattr(self.space, "samplers", ()) if one not in samplers]:
            raise UserError(
                f"the space chooses among samplers that the evaluator lacks: {', '.join(unknown)}; give both the same"
            )
        self._check_samplers(samplers)
        self._check_conditions("the evaluator", self.evaluator)
        for name, proxy in self.proxies.items():
            if hasattr(proxy, "conditions"):  # others may ask for no samples at all
                self._check_conditions(
                    f"proxy {name}" + (", or what it is made of," if hasattr(proxy, "like") else ""), proxy
                )
        check_limits(self.limits)
        self._check_enqueued()
        if not self.limits_time:
            check_reachable(self.problem)
        elif not isinstance(self.evaluator, Timing):
            raise UserError(f"the limit on {LATENCY} needs measured times; use evaluator=Timed(..., Latency(batch=64))")
        else:
            calls(self.space)  # of a space whose calls cannot be timed it says so

    def _check_conditions(self, name: str, evaluator: Evaluator) -> None:
        """Raises UserError where it asks for samples of other conditions than the network takes."""
        conditional, conditions = getattr(self.supernet, "conditional", False), getattr(evaluator, "conditions", None)
        if conditional != (conditions is not None):
            raise UserError(
                f"the network takes conditions; give {name} conditions=Labels(images), or Captions(images, encoder) where it reads texts"
                if conditional
                else f"the network takes no conditions; leave out {name}'s conditions, or give the network num_class_embeds"
            )
        wanted, given = (getattr(one, "condition_kind", "") for one in (self.supernet, conditions))
        if wanted and given and wanted != given:
            raise UserError(
                f"the network takes {wanted}, {name}'s conditions are {given}; give it Labels(images) for labels, Captions or Prompts for texts (nothing gives both)"
            )

    def _check_enqueued(self) -> None:
        """Raises UserError for genomes that are none of the space, or dearer than the limits allow."""
        for number, genome in enumerate(self.enqueue):
            try:
                self.space.decode(genome)
                cost = self.space.cost(genome)
            except (ValueError, IndexError) as error:
                raise UserError(
                    f"enqueued schedule {number} is none of this space ({first_line(error)}); leave it out"
                ) from error
            over = [
                f"{name} {cost[name]:.4g} of {most:g}" for name, most in self.limits.items() if cost.get(name, 0) > most
            ]
            if over:
                raise UserError(
                    f"enqueued schedule {number} costs more than the limits allow: {', '.join(over)}; raise them, or leave it out"
                )

    def _check_samplers(self, samplers: tuple[Any, ...]) -> None:
        """Raises UserError for one that the network's states or outputs are not made for."""
        for one in samplers:
            if getattr(one, "clip", None) is True and not getattr(self.supernet, "in_pixels", True):
                raise UserError(
                    f"{one} would clip latents as if they were images; leave clip out, which then clips in pixel space alone"
                )
            if getattr(one, "variance", "") == "learned_range" and not getattr(
                self.supernet, "learned_variance", False
            ):
                raise UserError(
                    f"{one} needs a network that says where the variance lies; give it twice as many out_channels as in_channels, or another variance"
                )

    @property
    def limits_time(self) -> bool:
        """Whether its searches keep to a time instead of a number of MACs."""
        return LATENCY in self.limits

    @property
    def problem(self) -> Problem:
        """Without measured times."""
        return Problem(self.space, self.objectives, self.limits)

    def problem_in(self, folder: Path) -> Problem:
        """What searchers are bound to in a run folder, with its measured times where time is limited. Raises UserError where they are
        missing, or the limit cannot be met."""
        if not self.limits_time:
            return self.problem
        problem = replace(self.problem, space=timed(self.space, folder))
        check_reachable(problem)
        return problem

    @property
    def full(self) -> dict[str, float]:
        """Cost of the dearest schedule: the full net at every timestep."""
        return dict(self.space.cost(dearest(self.space)))

    def searcher(self, name: str) -> Searcher:
        """From the study, else a class registered in the entry-point group `nas.searchers`, with its default settings."""
        if name in self.searchers:
            return self.searchers[name]
        if name == BASELINE:
            return Uniform()
        registered = {point.name: point for point in entry_points(group=ENTRY_POINTS)}
        if name not in registered:
            raise UserError(
                f"no searcher is called {name!r}; use one of {', '.join(sorted({*self.searchers, *registered}))}"
            )
        searcher: Searcher = registered[name].load()()
        return searcher

    def check(self) -> None:
        """Checks all that can be checked without training: the images' first files, what trains on them, what the evaluators read. Raises
        UserError for the first thing that would end a run later."""
        peek = getattr(self.images, "peek", self.images.load)
        for part, given in (
            (self.training, (self.supernet, peek())),
            *((one, ()) for one in (self.evaluator, *self.proxies.values())),
        ):
            check = getattr(part, "check", None)
            if check is not None:
                check(*given)

    def prepare(self, folder: Path, device: str) -> Iterator[Progress]:
        """Makes the feature extractor and trains the supernet where the run folder lacks them, the quick one first."""
        yield from self._read_images(folder)
        for evaluator in (self.evaluator, *self.proxies.values()):
            yield from evaluator.prepare(folder, self.seed, device)
        yield from self.training.run(self.supernet, self.images, folder / "supernet", self.seed, device)

    def help_to_train(self, folder: Path, device: str) -> Iterator[Progress]:
        """For a process that a launcher has started beside another one, which prepares the run folder: takes its share of the supernet's training."""
        yield from self.training.run(self.supernet, self.images, folder / "supernet", self.seed, device)

    def load(self, folder: Path, device: str) -> LoadedEvaluator:
        """Supernet and evaluator with their tensors; in a worker, once."""
        self._find_images(folder)
        return self.evaluator.load(self.supernet.load(folder / "supernet", device), folder)

    def _read_images(self, folder: Path) -> Iterator[Progress]:
        """A source that takes long to read keeps what it has read in the run folder."""
        prepare = getattr(self.images, "prepare", None)
        if prepare is not None:
            yield from prepare(folder)

    def _find_images(self, folder: Path) -> None:
        for _ in self._read_images(folder):
            pass

    def ledger_info(self, folder: Path, searcher: str, seed: int) -> LedgerInfo:
        """Identity of the searcher's ledger: all that its scores and its replay depend on."""
        self._find_images(folder)
        former = {
            name: part.former_digest(where)
            for name, part, where in (
                ("supernet", self.supernet, folder / "supernet"),
                ("evaluator", self.evaluator, folder),
            )
            if hasattr(part, "former_digest")
        }
        limits = ", ".join(f"{name}<={_exact(limit)}" for name, limit in sorted(self.limits.items()))
        rounded = ", ".join(f"{name}<={limit:g}" for name, limit in self.limits.items())
        if rounded != limits:
            former["limits"] = rounded
        space = self.problem_in(folder).space
        if hasattr(space, "former"):
            former["space"] = digest_of(space.former())
        provenance = {
            "supernet": self.supernet.digest(folder / "supernet"),
            "space": digest_of(space.describe()),
            "evaluator": self.evaluator.digest(folder),
            "seed": str(self.seed),
            "objectives": ", ".join(self.objectives),
            "limits": limits,
            "searcher": _settings_of(searcher, self.searcher(searcher)),
        }
        return LedgerInfo(
            self.name,
            searcher,
            seed,
            self.objectives,
            tuple(self.evaluator.rungs),
            dict(self.limits),
            provenance,
            former,
            with_rungs(self.evaluator, (2,)).digest(folder),
        )

    def unlimited(self, folder: Path) -> Problem:
        """The problem without limits, for baselines."""
        return replace(self.problem_in(folder), limits={})


def _settings_of(name: str, searcher: Searcher) -> str:
    """What identifies it in every process. Raises UserError where its repr does not."""
    told = repr(searcher)
    if re.search(r" at 0x[0-9a-f]+", told):
        raise UserError(
            f"searcher {name} is {told}, which names a place in memory, another one in each process, so that its results would never be found again; give "
            "what it is made of a __repr__ of its settings"
        )
    return told


def _exact(number: float) -> str:
    """Short where that says it."""
    short = f"{number:g}"
    return short if float(short) == number else repr(float(number))


def noise_of(rung: int, rungs: Sequence[int]) -> str:
    """Purpose of the noises on which a rung is scored: the last one verifies, on others than those that its schedules were chosen on."""
    return "verification noise" if rung == rungs[-1] and len(rungs) > 1 else "search noise"


def with_rungs(evaluator: Any, rungs: tuple[int, ...]) -> Any:
    """The evaluator, and those that it is made of, with other rungs. One that is no dataclass stays as it is."""
    if isinstance(evaluator, type) or not is_dataclass(evaluator) or not hasattr(evaluator, "rungs"):
        return evaluator
    changed: dict[str, Any] = {}
    for one in fields(evaluator):
        value = getattr(evaluator, one.name)
        if one.name == "rungs":
            changed["rungs"] = rungs
        elif hasattr(value, "rungs"):
            changed[one.name] = with_rungs(value, rungs)
        elif isinstance(value, tuple) and any(hasattr(part, "rungs") for part in value):
            changed[one.name] = tuple(with_rungs(part, rungs) for part in value)
    made: Any = replace(evaluator, **changed)  # type: ignore[type-var]
    return made


def load_study(file: str | Path) -> Study:
    """The `study` of a Python file, which runs in its own folder and may import its neighbours. Raises UserError where there is none, with
    the file's own error where it has one."""
    path = Path(file).resolve()
    if path.is_dir():
        raise UserError(f"{path} is a folder; give the Python file that defines `study`")
    if not path.is_file():
        raise UserError(f"study file {path} does not exist; give the path of a Python file that defines `study`")
    name = f"nas_study_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise UserError(f"{path} is not a Python file; a study file ends in .py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    # An empty entry means the folder that one is in, which is another one while the file runs.
    sys.path[:] = [str(path.parent), *(e or str(Path.cwd()) for e in sys.path if e != str(path.parent))]
    _forget_namesakes(path.parent)
    try:
        with chdir(path.parent):
            spec.loader.exec_module(module)
    except UserError:
        raise
    except (Exception, SystemExit) as error:  # the file is the user's: whatever it raises is its message
        if isinstance(error, ModuleNotFoundError) and error.name in MOVED:
            raise UserError(
                f"study file {path} imports {error.name}{_line_of(error, path)}, which is {MOVED[error.name]} now; "
                "change the import"
            ) from error
        raise UserError(
            f"study file {path} fails{_line_of(error, path)}: {type(error).__name__}: {first_line(error)}"
        ) from error
    study: Any = getattr(module, "study", None)
    if not isinstance(study, Study):
        raise UserError(f"{path} defines no `study`; it must hold `study = Study(...)`")
    return study


_FOLDERS: set[Path] = set()
"""Whose studies were loaded, and may have imported their neighbours."""


def _forget_namesakes(folder: Path) -> None:
    """Of the neighbours that studies of other folders have imported, those that have namesakes in this one."""
    for name, module in list(sys.modules.items()):
        if "." in name or name in ("nas", "search_spaces", "evaluators") or name.startswith("nas_study_"):
            continue
        # A package has its folder, with or without an __init__.py, and any other module its file.
        places = getattr(module, "__path__", [getattr(module, "__file__", None)])
        theirs = {Path(place).parent for place in places if place}
        if theirs & (_FOLDERS - {folder}) and ((folder / f"{name}.py").exists() or any((folder / name).glob("*.py"))):
            for one in [key for key in sys.modules if key == name or key.startswith(f"{name}.")]:
                del sys.modules[one]
    _FOLDERS.add(folder)


def _line_of(error: BaseException, path: Path) -> str:
    """Where in the file, as far as that is known."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
    return f" in line {lines[-1]}" if lines else ""


def _first_genome(space: SearchSpace) -> tuple[int, ...]:
    return (0,) * len(space.choices)
