"""Runs schedules on one supernet, and no shared beginning twice."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import accumulate, pairwise, zip_longest
from math import ceil
from typing import Any, ClassVar, Literal, TypeVar, cast
from weakref import WeakValueDictionary

import torch
from cachetools import LRUCache

from evaluators.conditions import ConditionSet
from evaluators.sampling import Precision, Sampler, State, advance, in_space, initial_noise, name_of
from nas.contracts import LoadedSupernet, Schedule, Step, UserError


@dataclass
class Meter:
    """What sampling took: network `calls` (per sample) and `macs` that ran, and those that a kept state made
    unnecessary; `cache_hits` counts batches that began at a kept state or were kept whole."""

    calls: float = 0.0
    macs: float = 0.0
    cached_calls: float = 0.0
    cached_macs: float = 0.0
    cache_hits: float = 0.0

    def spent_since(self, earlier: Meter) -> dict[str, float]:
        before = asdict(earlier)
        return {name: value - before[name] for name, value in asdict(self).items()}


ReusePrecision = Literal["float32", "bfloat16", "float16"]


@dataclass(frozen=True)
class Reuse:
    """What steps keep to be reused: in which `precision`, and how many bytes of a batch at `most`."""

    precision: ReusePrecision = "float32"
    most: int = 2**32

    def bytes_of(self, net: LoadedSupernet, schedule: Schedule) -> int:
        """The most that a step of the schedule keeps of one sample; 0 for a network that does not say."""
        size: Callable[[Any, Sequence[str]], int] | None = getattr(net, "kept_numbers", None)
        if size is None:
            return 0
        each = 4 if self.precision == "float32" else 2
        pairs = pairwise(schedule.steps)
        return max(
            (each * _rows(step) * size(step.arch, after.reuse) for step, after in pairs if after.reuse), default=0
        )

    def halved(self, cache: Any) -> Any:
        if self.precision == "float32" or not isinstance(cache, Mapping):
            return cache
        dtype = getattr(torch, self.precision)
        most = torch.finfo(dtype).max  # what is larger would be no number any more
        # A prediction that is held is small, and all that there is of its step.
        return {n: value if n == "prediction" else value.clamp(-most, most).to(dtype) for n, value in cache.items()}


def _rows(step: Step) -> int:
    """Of what the step keeps, for one sample: who guides itself predicts twice."""
    return 2 if step.guidance is not None and not step.guidance.arch else 1


STATES_KEPT = 32
"""At most about so many states of one trajectory are kept, besides those where the subnet changes."""

HEAVY = 4
"""So many times as large as the state itself, what it carries to be reused makes it one of those that go first where memory is short."""

Kept = TypeVar("Kept")


class Trajectories:
    """Runs schedules on one supernet, and no shared beginning twice. `samplers`: the first runs a schedule that names none.

    Schedules that agree on their first steps, and on the timestep that follows (the update needs it), pass through the
    same state for the same seed and samples. States are kept, least recently used first out, within `cache_bytes`; with
    the same batches the result is bit-equal to an uncached run. Where that is full, states that carry much to be reused go
    first, as long as they have more than a quarter of it: others, and images and rows, are asked for by several scores. `shared` gives all evaluators of a supernet one object.
    """

    def __init__(
        self,
        net: LoadedSupernet,
        samplers: Sampler | Sequence[Sampler],
        precision: Precision = "float32",
        batch: int = 256,
        cache_bytes: int = 2**29,
        conditions: ConditionSet | None = None,
        reuse: Reuse | None = None,
    ) -> None:
        self.net = net
        self.reuse = reuse or Reuse()
        self.conditions = conditions
        several = samplers if isinstance(samplers, Sequence) else (samplers,)
        self.samplers = {name_of(one): in_space(one, getattr(net, "in_pixels", True)) for one in several}
        self.precision = precision
        self.batch = batch
        self.meter = Meter()
        self._kept: LRUCache[Hashable, Any] = LRUCache(cache_bytes, getsizeof=_bytes)
        self._heavy: LRUCache[Hashable, State] = LRUCache(cache_bytes, getsizeof=_bytes)
        self._version = net.version

    _shared: ClassVar[WeakValueDictionary[Hashable, Trajectories]] = WeakValueDictionary()

    @classmethod
    def shared(
        cls,
        net: LoadedSupernet,
        samplers: Sampler | Sequence[Sampler],
        precision: Precision,
        batch: int,
        cache_bytes: int,
        conditions: ConditionSet | None = None,
        reuse: Reuse | None = None,
    ) -> Trajectories:
        given = None if conditions is None else conditions.digest
        several = samplers if isinstance(samplers, Sequence) else (samplers,)
        described = [in_space(one, getattr(net, "in_pixels", True)).describe() for one in several]
        key = id(net), json.dumps(described), precision, batch, cache_bytes, given, reuse
        found = cls._shared.get(key)
        if found is None:
            cls._shared[key] = found = cls(net, several, precision, batch, cache_bytes, conditions, reuse)
        return found

    def sampler_of(self, schedule: Schedule) -> Sampler:
        """Raises UserError for a name that stands for none of them."""
        if not schedule.sampler:
            return next(iter(self.samplers.values()))
        if schedule.sampler not in self.samplers:
            raise UserError(
                f"the schedule wants the sampler {schedule.sampler}; the evaluator has {', '.join(self.samplers)}"
            )
        return self.samplers[schedule.sampler]

    def batches(self, count: int, edges: Sequence[int] = (), schedule: Schedule | None = None) -> list[tuple[int, int]]:
        """`batches` of this size, or of a smaller one where a batch would keep more of the schedule's steps, to be reused, than is allowed."""
        each = 0 if schedule is None else self.reuse.bytes_of(self.net, schedule)
        most = max(1, self.reuse.most // each) if each else self.batch
        return batches(count, min(self.batch, most), edges)

    @property
    def bytes_kept(self) -> int:
        return int(self._kept.currsize + self._heavy.currsize)

    def images(self, schedule: Schedule, seed: int, start: int, stop: int, again: bool = True) -> torch.Tensor:
        """Final images of samples start..stop-1 in [-1, 1], as `sample`. Those of the last schedule are at hand where decoding them takes long, for the next
        score, unless nobody asks for them `again`."""
        place, of = ("images of the last schedule", start, stop), (self.net.version, schedule.digest, seed)
        shown = self._kept.get(place)
        if shown is not None and shown[0] == of:
            self._count_kept(schedule, stop - start, len(schedule.steps))
            return cast(torch.Tensor, shown[1]).clone()
        state = self._final(schedule, seed, start, stop)
        with torch.inference_mode():
            images = self.net.to_images(state.x).clamp(-1, 1)
        if again and not getattr(self.net, "in_pixels", True):
            self._keep(place, (of, images.clone()))
        return images

    def final(self, schedule: Schedule, seed: int, start: int, stop: int) -> torch.Tensor:
        """Final states of samples start..stop-1, which images are made of."""
        return self._final(schedule, seed, start, stop).x

    def states(self, schedule: Schedule, seed: int, start: int, stop: int) -> tuple[State, ...]:
        """The state before the first step and after each, kept together; charged to whoever asks first."""

        def run() -> tuple[State, ...]:
            states = [self._start(seed, start, stop)]
            for number in range(len(schedule.steps)):
                states.append(self.advance(schedule, number, states[-1], seed, start))
            return tuple(states)

        return self.kept(("states", schedule.digest, seed, start, stop), run, 0, 0)

    def advance(self, schedule: Schedule, number: int, state: State, seed: int, start: int) -> State:
        """`advance`, counted."""
        self.meter.calls += len(state.x)
        self.meter.macs += len(state.x) * self._macs(schedule.steps[number : number + 1])
        sampler = self.sampler_of(schedule)
        after = advance(self.net, sampler, schedule, number, state, seed, start, self.precision, self.conditions)
        return replace(after, cache=self.reuse.halved(after.cache))

    def kept(self, key: Hashable, make: Callable[[], Kept], calls: float, macs: float) -> Kept:
        """What an earlier call made under this key for the same weights, or made now. `calls`, `macs`: what it takes."""
        key = (self.net.version, key)
        if key in self._kept:
            self.meter.cache_hits += 1
            self.meter.cached_calls += calls
            self.meter.cached_macs += macs
            return cast(Kept, self._kept[key])
        made = make()
        self._keep(key, made)
        return made

    def _final(self, schedule: Schedule, seed: int, start: int, stop: int) -> State:
        if self._version != self.net.version:  # what is large and of weights that are no more
            self._version = self.net.version
            self._heavy.clear()
        keys = [(self.net.version, prefix, seed, start, stop) for prefix in _prefixes(schedule)]
        done, state = 0, None
        for number in range(len(keys), 0, -1):
            state = self._found(keys[number - 1])
            if state is not None:
                done = number
                break
        if state is None:
            state = self._start(seed, start, stop)
        else:
            self._count_kept(schedule, stop - start, done)
        passed: dict[int, State] = {}
        splits, room = _splits(schedule), self._kept.maxsize
        # No more of them at once than may be kept afterwards; the last one carries nothing to be reused.
        most_heavy = max(room // 4, room - self._kept.currsize)
        for number in range(done, len(schedule.steps)):
            state = self.advance(schedule, number, state, seed, start)
            size, heavy = _bytes(state), _is_heavy(state)
            if number + 1 in splits and size <= (min(room, most_heavy) if heavy else room):
                passed[number + 1] = state
                room -= size
                most_heavy -= size if heavy else 0
        for number in range(len(schedule.steps), 0, -1):
            # The noisy end last, so that it stays longest: more schedules share it.
            if number in passed:
                self._keep(keys[number - 1], passed[number])
            elif number <= done:
                self._found(keys[number - 1])
        return state

    def _found(self, key: Hashable) -> State | None:
        """A state that is kept, which is then the last to go."""
        return cast("State | None", self._kept.get(key, self._heavy.get(key)))

    def _count_kept(self, schedule: Schedule, samples: int, done: int) -> None:
        """That a batch began behind so many steps."""
        self.meter.cache_hits += 1
        self.meter.cached_calls += samples * done
        self.meter.cached_macs += samples * self._macs(schedule.steps[:done])

    def _start(self, seed: int, start: int, stop: int) -> State:
        key = ("noise", seed, start, stop)
        if key not in self._kept:
            self._keep(key, noise := State(initial_noise(seed, start, stop, self.net.state_shape).to(self.net.device)))
            return noise
        return cast(State, self._kept[key])

    def _keep(self, key: Hashable, value: Any) -> None:
        place = self._heavy if _is_heavy(value) else self._kept
        if _bytes(value) <= place.maxsize:
            place[key] = value
            self._make_room()

    def _make_room(self) -> None:
        """Where more is kept than may be. What was kept last is the last to go."""
        while self.bytes_kept > self._kept.maxsize:
            first = self._heavy if self._heavy.currsize > self._kept.maxsize // 4 else self._kept
            (first if len(first) else self._heavy).popitem()

    def _macs(self, steps: Sequence[Step]) -> int:
        return sum(self.net.macs(step) for step in steps)


def batches(count: int, size: int, edges: Sequence[int] = ()) -> list[tuple[int, int]]:
    """Ranges of at most `size` samples that cover 0..count and never cross an edge: a larger count repeats the ranges of
    a smaller one that is among the edges, and so extends it."""
    marks = sorted({0, count, *(edge for edge in edges if 0 < edge < count)})
    return [
        (start, min(start + size, until)) for since, until in pairwise(marks) for start in range(since, until, size)
    ]


def _prefixes(schedule: Schedule) -> list[str]:
    """For each number of steps 1, 2, ...: what identifies those steps, the timestep that follows them, and what it reuses."""
    parts = [
        json.dumps(
            [step.timestep, step.arch, step.reuse, step.guidance, *([after.timestep, after.reuse] if after else [])]
        )
        for step, after in zip_longest(schedule.steps, schedule.steps[1:])
    ]
    return list(
        accumulate(
            parts,
            lambda before, part: hashlib.sha256((before + part).encode()).hexdigest()[:24],
            initial=schedule.sampler,
        )
    )[1:]


def _splits(schedule: Schedule) -> set[int]:
    """After how many steps a state is worth keeping."""
    steps = schedule.steps
    stride = ceil(len(steps) / STATES_KEPT)
    changes = {
        number
        for number in range(1, len(steps))
        if replace(steps[number], timestep=0) != replace(steps[number - 1], timestep=0)
    }
    return changes | {*range(stride, len(steps), stride), len(steps)}


def _is_heavy(value: Any) -> bool:
    """Whether it is a state that carries much to be reused."""
    return isinstance(value, State) and _bytes(value.cache) > HEAVY * _bytes(value.x)


def _bytes(value: Any) -> int:
    """Memory of the tensors and arrays in nested tuples, dicts and states."""
    if isinstance(value, State):
        return _bytes(value.x) + _bytes(value.cache) + _bytes(value.memory)
    if isinstance(value, tuple | list):
        return sum(_bytes(item) for item in value)
    if isinstance(value, dict):
        return sum(_bytes(item) for item in value.values())
    return int(getattr(value, "nbytes", 0))
