"""Recipes check themselves, and are identified as they always were."""

from __future__ import annotations

import importlib
import math
import pickle
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.digits import on_all_images
from evaluators.features import SmallClassifier
from evaluators.frechet import Frechet
from evaluators.images import Digits, ImageFolder
from evaluators.latency import Latency, Timed
from nas.contracts import UserError, digest_of
from nas.recipes import Count, Share, check_recipe, recipe
from nas.searchers.ddsm import DDSM
from nas.searchers.evolution import Evolution
from nas.searchers.knapsack import Knapsack
from nas.searchers.proposers import Chat
from nas.searchers.pruner import Pruner
from nas.searchers.rounds import Rounds
from nas.searchers.routing import Routing
from search_spaces.intervals import per_step, uniform
from search_spaces.options import Options
from search_spaces.patterns import Every
from search_spaces.stepwise import Stepwise
from search_spaces.supernet import Elastic
from search_spaces.training import Sandwich
from tests.conftest import TINY
from tests.toy import ToyEvaluator, toy_study

KNOWN = {
    "digits": {
        "space": "356946db079993c9",
        "supernet": "ec4070424990c659",
        "training": "b2d44c6c664a65dd",
        "evaluator": "84ea20908a7fdbce",
        "searchers": "42ad4076a3c56408",
        "images": "45ed6f5c1936b8e6",
    },
    "digits_wide": {
        "space": "fee218a0b27ca77b",
        "supernet": "bc4c5dd54b7cc89d",
        "training": "d87794b2b0132878",
        "evaluator": "84ea20908a7fdbce",
        "searchers": "78d5aab68fb8bfdd",
        "images": "45ed6f5c1936b8e6",
    },
    "digits_reuse": {
        "space": "0a7d735980591cf2",
        "supernet": "9b39ce95dc1e5ddf",
        "training": "c6002a4ed8102aa3",
        "evaluator": "5a9577e7a0ecfba2",
        "searchers": "8f7127401f816a5a",
        "images": "a23abb9f2d5dbe99",
    },
    "ddsm_cifar10": {
        "space": "32bef4e016a3f135",
        "supernet": "a387cceb8f857aca",
        "training": "e51d7df3886be401",
        "searchers": "aef898ce139f3c0a",
    },
    "ddsm_celeba64": {
        "space": "4f6c74d1ae3fcbad",
        "supernet": "31d0463b119b21ee",
        "training": "77d51dbd5cff196e",
        "searchers": "3cc4906266426da6",
    },
    "diff_pruning_cifar10": {
        "space": "f4615f7f545cbc16",
        "supernet": "f3af7f188236309b",
        "training": "285458a36e3a35c1",
        "searchers": "561b8cd74f122a51",
    },
    "diffpruning_lsun256": {
        "space": "9e830c63ad03c08e",
        "supernet": "06265d8abb221579",
        "training": "50da9e8eadaea9fa",
        "searchers": "5c72f2f386f9cc7c",
    },
    "dip_go_cifar10": {
        "space": "7b0a2f32407aeefd",
        "supernet": "230abcd007a66c0b",
        "training": "07c6d9e44e9141d0",
        "searchers": "7bd7dd3c589f2301",
    },
    "tdc_cifar10": {
        "space": "a0937b4329f35c16",
        "supernet": "a4d8ab6cbe7e99eb",
        "training": "4af61d371738f347",
        "searchers": "2ae5ec39b8070ae1",
    },
}
"""Digests of descriptions, and of the searchers' reprs, as ledgers out there have them."""


@pytest.mark.parametrize("name", KNOWN)
def test_recipes_are_identified_as_before(name: str) -> None:
    study = importlib.import_module(f"studies.{name}").study
    found = {
        "space": digest_of(study.space.describe()),
        "supernet": digest_of(study.supernet.describe()),
        "training": digest_of(study.training.describe()),
        "searchers": digest_of([repr(searcher) for searcher in study.searchers.values()]),
    }
    if "evaluator" in KNOWN[name]:
        study = on_all_images(study)
        found |= {"evaluator": digest_of(study.evaluator.describe()), "images": study.images.load().digest}
    assert found == KNOWN[name]


def test_a_value_stays_as_it_was_given() -> None:
    """A whole number for a real one is legal, and is the same recipe as before."""
    assert repr(Rounds(least=1)) == repr(Rounds(least=1)).replace("1.0", "1")
    assert digest_of(Sandwich(steps=5, clip=1).describe()) == digest_of({**Sandwich(steps=5).describe(), "clip": 1})


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Sandwich(steps=-1), "Sandwich: steps=-1: it should be greater than or equal to 1"),
        (lambda: Sandwich(steps=math.nan), "Sandwich: steps=nan"),  # type: ignore[arg-type]
        (lambda: Sandwich(steps=True), "Sandwich: steps=True"),
        (lambda: Sandwich(steps="5"), "Sandwich: steps='5'"),  # type: ignore[arg-type]
        (lambda: Sandwich(steps=5, learning_rate=math.inf), "learning_rate=inf: it should be a finite number"),
        (lambda: SmallClassifier(dimensions=0), "SmallClassifier: dimensions=0"),
        (lambda: Evolution(screened=10**15), "screened=1000000000000000: it should be less than or equal to 4096"),
        (lambda: Rounds(budgets=10**15), "Rounds: budgets"),
        (lambda: Routing(clip=10**30), f"Routing: clip={10**30}: it should be less than 2^63, or have a decimal point"),
        (lambda: Pruner(learning_rate=-(10**40)), f"learning_rate={-(10**40)}: it should be less than 2^63"),
        (lambda: ImageFolder("x", 8, channels=True), "ImageFolder: channels=True: it should be 1 or 3"),  # type: ignore[arg-type]
        (lambda: Evolution(crossover_rate=-1), "crossover_rate=-1"),
        (lambda: DDSM(mutation="both"), "'released' or 'intended'"),  # type: ignore[arg-type]
        (lambda: Knapsack(top=65), "top=65"),
        (lambda: Knapsack(around="none"), "'full', 'smallest' or 'both'"),  # type: ignore[arg-type]
        (lambda: Routing(hidden=0), "Routing: hidden=0"),
        (lambda: Pruner(dimension=6), "Pruner: dimension=6: it should be a multiple of 4"),
        (lambda: Every(0), "Every: period=0"),
        (lambda: Latency(repeats=0), "Latency: repeats=0"),
        (lambda: Options((0.5, math.nan)), "Options: widths"),
        (lambda: Digits(4), "Digits: size=4"),
        (lambda: Frechet(Digits(), rungs=()), "Frechet: rungs"),
        (lambda: Frechet(Digits(), rungs=(64, 1)), "Frechet: rungs"),
        (lambda: Frechet("digits"), "it is no Images, for it has no load"),  # type: ignore[arg-type]
        (lambda: ImageFolder("x", 0), "ImageFolder: size=0"),
        (lambda: ImageFolder("x", 8, channels=4), "ImageFolder: channels=4: it should be 1 or 3"),  # type: ignore[arg-type]
        (lambda: Elastic(TINY, groups="none"), "Elastic: groups='none'"),  # type: ignore[arg-type]
        (lambda: Elastic(TINY, experts=(5.5,)), "Elastic: experts"),  # type: ignore[arg-type]
        (lambda: Stepwise(Elastic(TINY), uniform(4), (0, 4)), "Stepwise: intervals"),
        (lambda: Stepwise(None, uniform(4), (4,)), "Stepwise: net=None: it should be a Elastic"),  # type: ignore[arg-type]
        (lambda: Elastic(TINY, noise=[]), "Elastic: noise=(): it should be a NoiseSchedule"),  # type: ignore[arg-type]
        (lambda: Timed(Frechet(Digits()), None), "Timed: latency=None"),  # type: ignore[arg-type]
        (lambda: Chat("http://x", "m", timeout=0), "Chat: timeout=0"),
        (lambda: toy_study(limits={"macs": math.nan}), "Study: limits"),
        (lambda: toy_study(seed=-1), "Study: seed=-1"),
        (lambda: toy_study(trials=0), "Study: trials=0"),
        (lambda: toy_study(space=3), "it is no SearchSpace"),
        (lambda: toy_study(searchers={"all": Evolution()}), "a searcher cannot be called 'all'"),
        (lambda: toy_study(searchers={"uniform": Evolution()}), "a searcher cannot be called 'uniform'"),
        (lambda: toy_study(searchers={"": Evolution()}), "a searcher cannot be called ''"),
        (lambda: toy_study(evaluator__rungs="many"), "ToyEvaluator: rungs='many'"),
    ],
)
def test_what_is_wrong_is_named_when_it_is_built(make: Callable[[], Any], words: str) -> None:
    with pytest.raises(UserError) as refused:
        make()
    assert words in str(refused.value)
    assert "\n" not in str(refused.value)


def test_lists_become_tuples_so_that_recipes_can_be_hashed() -> None:
    made = ImageFolder("x", [8, 8])  # type: ignore[arg-type]
    assert made.size == (8, 8)
    assert hash(made) == hash(ImageFolder("x", (8, 8)))
    assert Frechet(Digits(), rungs=[16, 32]).rungs == (16, 32)  # type: ignore[arg-type]
    assert Stepwise(Elastic(TINY), list(uniform(4)), list(per_step(uniform(4)))).intervals == (1,) * 4  # type: ignore[arg-type]


@recipe
class Theirs:
    """As a third party would write one."""

    count: Count
    share: Share = 0.5
    names: tuple[str, ...] = field(default=())

    def __post_init__(self) -> None:
        if self.count == 13:
            raise UserError("13 brings bad luck")


@recipe
class More(Theirs):
    more: int = 0


@dataclass(frozen=True)
class Bare:
    count: Count
    kind: str = "x"


def test_third_parties_recipes_are_checked_by_the_same_decorator_or_when_a_study_is_built() -> None:
    assert More(1, names=["a"]).names == ("a",)  # type: ignore[arg-type]
    for wrong in (lambda: More(0), lambda: More(1, share=2), lambda: More(13), lambda: replace(More(1), more=0.5)):  # type: ignore[arg-type]
        with pytest.raises(UserError):
            wrong()
    with pytest.raises(UserError, match="Bare: count=0"):
        check_recipe(Bare(0))
    with pytest.raises(UserError, match="ToyEvaluator: seconds='1'"):
        toy_study(evaluator=ToyEvaluator(seconds="1"))  # type: ignore[arg-type]
    assert pickle.loads(pickle.dumps(More(1))) == More(1)


@given(st.integers(-(10**20), 10**20) | st.floats(allow_nan=True) | st.text(max_size=3) | st.none() | st.booleans())
def test_a_count_is_a_whole_number_from_one_and_nothing_else(value: Any) -> None:
    legal = type(value) is int and 1 <= value <= 10**9
    if legal and value != 13:
        assert Theirs(value).count == value
    else:
        with pytest.raises(UserError, match=r"\A[^\n]*\Z"):
            Theirs(value)
