from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from evaluators.images import Digits
from nas.contracts import ImageSet, Problem, UserError
from nas.engine.learning import learned_file, learned_macs, learned_tensors
from nas.engine.ledger import read_ledgers
from nas.engine.session import open_session
from nas.engine.storage import open_storage
from nas.genomes.genetics import IntervalCosts
from nas.results.report import Run
from nas.searchers.relaxation import Relaxation, learn, option_weights
from nas.searchers.routing import Routing, RoutingSearch
from nas.study import Study
from nas.testing import check_searcher, joint_problem, table_problem
from search_spaces.intervals import per_step, uniform
from search_spaces.noise import NoiseSchedule
from search_spaces.patterns import Every, Only
from search_spaces.stepwise import Stepwise
from search_spaces.supernet import Elastic
from tests.toy import facts

LOGITS = st.lists(st.floats(-8, 8), min_size=1, max_size=6)


@given(logits=LOGITS, hidden=st.integers(0, 5), seed=st.integers(0, 99), temperature=st.floats(0.1, 2))
def test_gates_give_weights_and_without_noise_the_softmax(
    logits: list[float], hidden: int, seed: int, temperature: float
) -> None:
    values = torch.tensor(logits, dtype=torch.float64)
    if hidden < len(logits) and len(logits) > 1:
        values[hidden] = -torch.inf
    weights = option_weights(values, 1.0, None)
    assert weights == pytest.approx(torch.softmax(values, -1), abs=1e-9)
    noisy = option_weights(values, temperature, np.random.default_rng(seed))
    assert float(noisy.sum()) == pytest.approx(1.0)
    assert bool((noisy >= 0).all())
    assert not bool(noisy[values.isneginf()].any())


def test_weights_are_differentiable_where_options_are_masked() -> None:
    logits = torch.zeros(3, 4, requires_grad=True)
    mask = torch.tensor([[0, 0, -torch.inf, 0], [-torch.inf, 0, 0, 0], [0, -torch.inf, -torch.inf, -torch.inf]])
    weights = option_weights(logits + mask, 0.4, np.random.default_rng(0))
    torch.autograd.backward((weights * torch.arange(4.0)).sum())
    assert logits.grad is not None
    assert bool(logits.grad.isfinite().all())
    assert bool(logits.grad[0].abs().sum() > 0)


class Formula:
    """A supernet whose subnets err by an amount of their own: late intervals need the wide ones, early ones do not."""

    device = torch.device("cpu")
    alphas_cumprod = np.linspace(0.99, 0.01, 100)

    def denoiser(self, step: Any) -> Any:
        error = (3 - step.arch[0]) * (0.5 if step.timestep < 2 else 0.01)

        def call(x: torch.Tensor, t: int, cache: Any = None, condition: Any = None) -> tuple[torch.Tensor, Any]:
            abar = self.alphas_cumprod[t]
            return x / (1 - abar) ** 0.5 + error, cache  # x0 is zero, so this is the noise plus the error

        return call

    def macs(self, step: Any) -> int:
        return (int(step.arch[0]) + 1) ** 2


def learned_policy(settings: Relaxation, seed: int = 0) -> tuple[RoutingSearch, Problem, int]:
    problem = table_problem(genes=4, options=4, limit=0.8)
    search = RoutingSearch(Routing(evenness=0.0), problem, seed)
    images = ImageSet(np.zeros((16, 1, 2, 2), np.float32), None, "zeros")
    ticks = learn(settings, search, problem, Formula(), images, seed)  # type: ignore[arg-type]
    while True:
        try:
            next(ticks)
        except StopIteration as end:
            return search, problem, end.value


def test_the_policy_learns_where_the_network_is_needed_and_to_use_its_budget() -> None:
    before = RoutingSearch(Routing(evenness=0.0), table_problem(genes=4, options=4, limit=0.8), 0)
    after, problem, _ = learned_policy(Relaxation(steps=300, batch=4, distillation=0.0))
    costs = IntervalCosts(problem.space)

    def drawn(search: RoutingSearch) -> tuple[float, float]:
        genomes, budgets, _ = search.relaxed(200, np.random.default_rng(9))
        late_less_early = np.mean([sum(genome[2:]) - sum(genome[:2]) for genome in genomes])
        used = np.mean([costs.total(g) / b for g, b in zip(genomes, budgets.tolist(), strict=True)])
        return float(late_less_early), float(used)

    assert drawn(after)[0] > drawn(before)[0] + 1.0
    heavy, _, _ = learned_policy(Relaxation(steps=150, batch=4, denoising=0.0, distillation=0.0, budget=1.0))
    assert drawn(heavy)[1] > drawn(before)[1] + 0.05


def test_what_it_took_is_counted() -> None:
    _, _, spent = learned_policy(Relaxation(steps=3, batch=5))
    assert spent == 3 * 5 * (sum((i + 1) ** 2 for i in range(4)) + 16)


def test_learning_repeats_itself() -> None:
    first, second = (learned_policy(Relaxation(steps=5, batch=4))[0].learned() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def warm(study: Study) -> Study:
    settings = Routing(steps=2, warm_start=Relaxation(steps=6, batch=8, genomes=2))
    return replace(study, searchers={"routing": settings}, trials=8)


def searched(study: Study, folder: Path, trials: int, seed: int = 0) -> list[Any]:
    with open_session(study, folder) as session:
        for _ in session.learn("routing", seed):
            pass
        conductor = session.conductor("routing", seed, trials)
        session.run(conductor)
        return facts(conductor.ledger.trials)


def test_a_real_network_is_learned_from_once_and_the_search_resumes(
    tiny_study: Study, tiny_run: Path, tmp_path: Path
) -> None:
    study = warm(tiny_study)
    for folder in ("whole", "parts"):
        (tmp_path / folder).mkdir()
        for part in ("supernet", "features"):
            (tmp_path / folder / part).symlink_to(tiny_run / part)
    whole = searched(study, tmp_path / "whole", 8)
    assert searched(study, tmp_path / "parts", 4)[:4] == whole[:4]
    info = study.ledger_info(tmp_path / "parts", "routing", 0)
    before = learned_file(tmp_path / "parts", info).stat().st_mtime_ns
    parts = searched(study, tmp_path / "parts", 8)
    assert learned_file(tmp_path / "parts", info).stat().st_mtime_ns == before
    assert [fact[1] for fact in parts if fact[2] == 32] == [fact[1] for fact in whole if fact[2] == 32]
    kept = learned_tensors(tmp_path / "parts", info)
    assert kept is not None
    cold = RoutingSearch(Routing(steps=2), study.problem, 0).learned()
    assert any(not torch.equal(kept[name], cold[name]) for name in cold)
    macs = learned_macs(tmp_path / "parts", info)
    [row] = [r for r in Run.open(tmp_path / "parts").compare()["searchers"] if r["searcher"] == "routing"]
    assert row["spent"]["learning_macs"] == macs > 0
    assert row["curve"][0][0] > macs
    [(_, trials)] = read_ledgers(open_storage(tmp_path / "parts"))
    assert len(trials) == len(parts)


def test_damaged_or_foreign_files_are_not_used(tiny_study: Study, tiny_run: Path, tmp_path: Path) -> None:
    study = warm(tiny_study)
    for part in ("supernet", "features"):
        (tmp_path / part).symlink_to(tiny_run / part)
    searched(study, tmp_path, 2)
    info = study.ledger_info(tmp_path, "routing", 0)
    other = replace(info, provenance={**info.provenance, "supernet": "another"})
    assert learned_tensors(tmp_path, other) is None
    tighter = replace(study, limits={"macs_share": 0.5}).ledger_info(tmp_path, "routing", 0)
    assert learned_tensors(tmp_path, tighter) is None  # the policy is of the budgets that it was learned for
    learned_file(tmp_path, info).write_bytes(b"no tensors")
    with pytest.raises(UserError, match=r"is damaged .*delete it"):
        searched(study, tmp_path, 2)


def test_a_learning_searcher_keeps_the_laws_without_what_it_learns() -> None:
    check_searcher(Routing(steps=1, warm_start=Relaxation(steps=2)), trials=10)


def test_every_choice_of_an_interval_is_learned() -> None:
    """Two choices an interval: what either decides teaches the logits of its own gene."""
    problem = joint_problem(0.8)
    search = RoutingSearch(Routing(), problem, 0)
    images = ImageSet(np.zeros((16, 1, 2, 2), np.float32), None, "zeros")
    before = search.learned()
    for _ in learn(Relaxation(steps=12, batch=2), search, problem, Formula(), images, 0):  # type: ignore[arg-type]
        pass
    changed = (before["table"] != search.learned()["table"]).flatten(1).any(1)
    assert changed.tolist() == [True] * 6


def test_wrong_settings_are_refused() -> None:
    with pytest.raises(UserError, match="steps=0"):
        Relaxation(steps=0)


def test_a_space_whose_steps_reuse_is_refused_before_anything_is_trained(tiny_net: Elastic) -> None:
    for patterns in ((Every(1), Only(())), (Every(1), Every(2)), (Every(1), Only(("u1",)))):
        problem = Problem(Stepwise(tiny_net, uniform(4), (2, 2), patterns=patterns), ("fd", "macs"))
        with pytest.raises(UserError, match="also chooses which steps and blocks run"):
            Routing(warm_start=Relaxation()).start(problem, 0)
        Routing().start(problem, 0)


class Unlike(Formula):
    """The full network is no teacher of the noise: at the late steps, where the noise asks for the wide subnets, it does what narrow ones do."""

    def denoiser(self, step: Any) -> Any:
        plain = super().denoiser(step)

        def call(x: torch.Tensor, t: int, cache: Any = None, condition: Any = None) -> tuple[torch.Tensor, Any]:
            found, cache = plain(x, t, cache)
            return found + (2.0 * t if step.arch[0] == 3 else 0.0), cache

        return call


def test_distillation_pulls_towards_the_full_network() -> None:
    """Denoising alone and distillation alone lead to different policies where the full network errs itself."""
    found = {}
    for name, weights in {"denoising": (1.0, 0.0), "distillation": (0.0, 1.0)}.items():
        settings = Relaxation(
            steps=150, batch=4, denoising=weights[0], distillation=weights[1], budget=0.0, learning_rate=0.05
        )
        problem = table_problem(genes=4, options=4, limit=1.0)
        search = RoutingSearch(Routing(evenness=0.0), problem, 0)
        images = ImageSet(np.zeros((16, 1, 2, 2), np.float32), None, "zeros")
        for _ in learn(settings, search, problem, Unlike(), images, 0):  # type: ignore[arg-type]
            pass
        genomes, _, _ = search.relaxed(200, np.random.default_rng(9))
        found[name] = np.mean([[gene == 3 for gene in genome] for genome in genomes])
    assert found["distillation"] > found["denoising"] + 0.2, "who is taught by the full network runs it"


def test_what_predicts_the_image_is_learned_from_too(tiny_net: Elastic) -> None:
    """Where hardly any signal is left the noise follows in float64."""
    net = replace(tiny_net, noise=NoiseSchedule(prediction="v_prediction"))
    timesteps = uniform(2)
    space = Stepwise(net, timesteps, per_step(timesteps))
    problem = Problem(space, ("fd", "macs"), {"macs_share": 0.6})
    images, settings = Digits().load(), Relaxation(steps=8, batch=2)
    search = RoutingSearch(Routing(steps=2), problem, 0)
    for _ in learn(settings, search, problem, net.initial(0), images, 0):
        pass
    assert all(tensor.isfinite().all() for tensor in search.learned().values())
