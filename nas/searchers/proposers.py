"""Who answers in a multi-round search: given what an interval may be and what was tried, one configuration as a JSON list.

Whatever a proposer says takes one path: it is read strictly, numbers are taken for the nearest option, and what exceeds the
allowance becomes the nearest configuration that does not; what cannot be read is refused, and the reason is told with the next try.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Annotated, Any, Protocol

import httpx2
import numpy as np
import numpy.typing as npt
from pydantic import Field

from nas.base.files import first_line
from nas.contracts import Choice, UserError
from nas.recipes import Natural, Weight, recipe

MOST_ANSWERED = 2**20
"""Bytes of a reply that are read."""

LONGEST_ANSWER = 4096
"""Characters of an answer that are looked at, and booked."""

Option = tuple[int, ...]
"""What one interval runs: an option index for each of its choices."""


@dataclass(frozen=True)
class Remembered:
    """One earlier round: what the interval ran, its MACs, the whole schedule's score, how much that was below the best schedule
    known then (negative: worse), its rank among the rounds remembered, and whether it comes from a neighbouring interval."""

    option: Option
    macs: int
    score: float
    gain: float
    rank: int
    borrowed: bool = False


@dataclass(frozen=True)
class Question:
    """One round. `costs`: MACs of the interval, an axis for each choice. `allowance`: how many it may take. `current`: what the best
    schedule runs there. `memory`: best first. `importance`: for each choice, the expected change of the score's normal rank with each
    option against the first; empty where nothing is known. `refused`: answers of this round so far, with reasons."""

    number: int
    interval: int
    intervals: int
    choices: tuple[Choice, ...]
    costs: npt.NDArray[np.int64]
    allowance: float
    current: Option
    memory: tuple[Remembered, ...] = ()
    importance: tuple[npt.NDArray[np.float64], ...] = ()
    refused: tuple[tuple[str, str], ...] = ()
    seed: int = 0

    def values(self, option: Option) -> list[str | int | float]:
        return [choice.options[place] for choice, place in zip(self.choices, option, strict=True)]

    def text(self) -> str:
        """The question in words."""
        full = int(self.costs.max())
        lines = [
            "One UNet is shared by all denoising steps. Each interval of steps runs a part of it, and the cheaper the part, the worse "
            "the images, more so in some intervals than in others.",
            f"Choose what interval {self.interval + 1} of {self.intervals} (1 is the noisiest) runs, within "
            f"{self.allowance / full:.3f} of the whole network's multiply-adds there. Lower scores are better.",
            "Choices, each with its options:",
            *(
                f"- {c.name}: {json.dumps(list(c.options))}"
                + (f", importance {np.round(self.importance[i], 3).tolist()}" if self.importance else "")
                for i, c in enumerate(self.choices)
            ),
            f"The best schedule so far runs {json.dumps(self.values(self.current))} there "
            f"({self.costs[self.current] / full:.3f}).",
        ]
        if self.memory:
            lines.append("Earlier rounds, best first:")
        lines += [
            f"- {json.dumps(self.values(m.option))}: cost {m.macs / full:.3f}, score {m.score:.4g} ({-m.gain:+.2g} against the best then), "
            f"rank {m.rank}" + (", in a neighbouring interval" if m.borrowed else "")
            for m in self.memory
        ]
        lines += [f"You answered {answer!r}, which was refused: {reason}." for answer, reason in self.refused]
        lines.append("Answer with a JSON list of one option for each choice, in their order, and nothing else.")
        return "\n".join(lines)


class Proposer(Protocol):
    """A recipe: frozen, printable."""

    def propose(self, question: Question) -> str:
        """An answer: text that holds a JSON list."""


class RefusedError(ValueError):
    """An answer that cannot be read; the message says why."""


def read_answer(text: str, question: Question) -> tuple[Option, str]:
    """The configuration that an answer means, within the allowance, and a note on what was repaired, empty for nothing.

    Raises RefusedError for an answer that holds no list of one known option for each choice.
    """
    text = text[-LONGEST_ANSWER:]  # what was thought aloud comes before it
    lists = re.findall(r"\[[^\[\]]*\]", text)
    if not lists:
        raise RefusedError("it holds no JSON list")
    try:
        values = json.loads(lists[-1])
    except (ValueError, RecursionError) as error:
        raise RefusedError(f"its list is no JSON ({first_line(error)[:200]})") from error
    if len(values) != len(question.choices):
        raise RefusedError(f"its list has {len(values)} entries, there are {len(question.choices)} choices")
    places, notes = [], []
    for value, choice in zip(values, question.choices, strict=True):
        place = _place(value, choice)
        if choice.options[place] != value:
            notes.append(f"{choice.name} {_cut(value)} became {choice.options[place]!r}")
        places.append(place)
    option = tuple(places)
    if question.costs[option] > max(question.allowance, int(question.costs.min())):
        option = nearest_within(option, question.costs, question.allowance)
        notes.append(f"over the allowance, became {question.values(option)}")
    return option, "; ".join(notes)


def _place(value: object, choice: Choice) -> int:
    if isinstance(value, str) and value in choice.options:
        return choice.options.index(value)
    numbers = [option for option in choice.options if not isinstance(option, str)]
    if isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300:
        if value in choice.options:
            return choice.options.index(value)
        if len(numbers) == len(choice.options):
            return int(np.abs(np.array(numbers, dtype=np.float64) - value).argmin())
    raise RefusedError(f"{_cut(value)} is no option of {choice.name}; it has {list(choice.options)}")


def _cut(value: object) -> str:
    try:
        return repr(value)[:80]
    except ValueError:  # an integer of more digits than Python prints
        return "a number of thousands of digits"


def nearest_within(option: Option, costs: npt.NDArray[np.int64], allowance: float) -> Option:
    """The configuration of at most so many MACs that differs by the fewest places; of equals the dearest. The cheapest where
    none is within."""
    grids = np.indices(costs.shape)
    distance = sum(np.abs(grid - place) for grid, place in zip(grids, option, strict=True))
    fits = costs <= max(allowance, int(costs.min()))
    found = np.where(fits, distance - costs / (costs.max() + 1.0), np.inf)
    return tuple(int(i) for i in np.unravel_index(int(found.argmin()), costs.shape))


@recipe
class Local:
    """The offline proposer: local search guided by memory and importance.

    Around what the best schedule runs and the best of the memory, configurations up to `reach` places away are weighed by their
    importance, with a random term of the importance's own spread times `temperature`; without any memory it draws at random.
    """

    reach: Natural = 2
    temperature: Weight = 0.3

    def propose(self, question: Question) -> str:
        rng = np.random.default_rng([question.seed, len(question.refused)])
        grids = np.indices(question.costs.shape)
        fits = question.costs <= max(question.allowance, int(question.costs.min()))
        if not question.memory and not question.importance:
            places = np.argwhere(fits)
            return json.dumps(question.values(tuple(int(i) for i in places[rng.integers(len(places))])))
        starts = [question.current, *(m.option for m in question.memory[:3])]
        near = np.min(
            [sum(np.abs(grid - place) for grid, place in zip(grids, option, strict=True)) for option in starts], axis=0
        )
        shape = [len(choice.options) for choice in question.choices]
        effects = question.importance or tuple(-np.linspace(0, 1, size) for size in shape)
        expected = np.zeros(shape)
        for axis, effect in enumerate(effects):
            expected = expected + effect.reshape([-1 if i == axis else 1 for i in range(len(shape))])
        spread = float(expected.std()) or 1.0
        noisy = expected + self.temperature * (1 + len(question.refused)) * spread * rng.gumbel(size=shape)
        allowed = fits & (near <= self.reach + len(question.refused))
        for option in (question.current, *(m.option for m in question.memory if not m.borrowed)):
            allowed[option] = False
        found = np.where(allowed if allowed.any() else fits, noisy, np.inf)
        return json.dumps(question.values(tuple(int(i) for i in np.unravel_index(int(found.argmin()), shape))))


@recipe
class Transcript:
    """Recorded answers: those of each round, in the order of its tries.

    Raises UserError at a round that was not recorded.
    """

    answers: tuple[tuple[str, ...], ...]

    def propose(self, question: Question) -> str:
        try:
            return self.answers[question.number][len(question.refused)]
        except IndexError:
            raise UserError(
                f"the transcript holds {len(self.answers)} rounds and no try {len(question.refused) + 1} of round {question.number + 1}; "
                "record more, or ask for fewer trials"
            ) from None


@recipe
class Chat:
    """A language model behind an OpenAI-compatible endpoint of yours: POST `url`/chat/completions with `model`. The key is read from
    the environment variable `key_variable` where that is set, sent to this endpoint alone, and kept nowhere: redirects are not followed.
    `timeout`: seconds for the whole answer.

    Raises UserError where the endpoint does not answer in time, or not as it should.
    """

    url: str
    model: str
    temperature: Weight = 0.0
    timeout: Annotated[float, Field(gt=0, le=3600)] = 60.0
    key_variable: str = "OPENAI_API_KEY"
    system: str = field(default="You design neural networks under a compute budget.", repr=False)

    def propose(self, question: Question) -> str:
        body = {
            "model": self.model,
            "temperature": self.temperature,
            "messages": [{"role": "system", "content": self.system}, {"role": "user", "content": question.text()}],
        }
        key = os.environ.get(self.key_variable)
        headers = {"Accept-Encoding": "identity"} | ({"Authorization": f"Bearer {key}"} if key else {})
        address = f"{self.url.rstrip('/')}/chat/completions"
        if not address.startswith(("http://", "https://")):
            raise UserError(f"chat endpoint {self.url!r} is no http address; give one such as http://127.0.0.1:8000/v1")
        # In a thread of its own, where no other event loop runs.
        with ThreadPoolExecutor(1) as pool:
            return pool.submit(asyncio.run, self._asked(address, headers, body)).result()

    async def _asked(self, address: str, headers: dict[str, str], body: dict[str, Any]) -> str:
        try:
            async with (
                asyncio.timeout(self.timeout),
                httpx2.AsyncClient(follow_redirects=False, timeout=None) as client,
                client.stream("POST", address, headers=headers, json=body) as reply,
            ):
                if reply.status_code != 200:
                    raise self._failed(f"status {reply.status_code}", "check it and its key")
                if reply.headers.get("content-encoding", "identity") != "identity":
                    raise self._failed("a compressed answer, which was not asked for", "mend the endpoint")
                answer = bytearray()
                async for part in reply.aiter_raw():
                    answer += part
                    if len(answer) > MOST_ANSWERED:
                        raise self._failed(f"more than {MOST_ANSWERED >> 10} KiB", "mend the endpoint")
        except TimeoutError:
            raise self._failed(f"nothing whole within {self.timeout:g} s", "raise timeout=") from None
        except (httpx2.HTTPError, httpx2.InvalidURL, OSError, ValueError) as error:
            raise self._failed(
                f"nothing: {type(error).__name__} {first_line(error)}".replace("\r", " "), "check it"
            ) from error
        return self._content(bytes(answer))

    def _content(self, answer: bytes) -> str:
        try:
            content = json.loads(answer)["choices"][0]["message"]["content"]
        except (ValueError, RecursionError, KeyError, IndexError, TypeError) as error:
            raise self._failed(
                f"without choices[0].message.content ({type(error).__name__})",
                "it must speak OpenAI's chat completions",
            ) from error
        if not isinstance(content, str):
            raise self._failed(
                f"with a {type(content).__name__} for a message", "it must speak OpenAI's chat completions"
            )
        return content[-LONGEST_ANSWER:]

    def _failed(self, answered: str, remedy: str) -> UserError:
        return UserError(
            f"chat endpoint {self.url} answered {answered[:200]}; {remedy} and run the same command again, or use the local proposer"
        )
