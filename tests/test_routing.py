from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nas.contracts import Problem, Proposal, Score, Trial, UserError
from nas.genomes.genetics import IntervalCosts, feasible_genomes
from nas.searchers.random import Random
from nas.searchers.routing import Policy, Routing, Walk, advantage_of
from nas.testing import check_searcher, joint_problem, table_problem, toy_score
from tests.test_searchers import drive, run_to


@pytest.mark.parametrize(
    "searcher",
    [Routing(recurrent=False, steps=2), Routing(split="equal", steps=2), Routing(batch=3, memory=4, steps=1)],
    ids=repr,
)
def test_every_kind_of_agent_keeps_the_laws(searcher: Routing) -> None:
    check_searcher(searcher, trials=24)


def policy_of(walk: Walk, recurrent: bool, seed: int = 0) -> Policy:
    torch.manual_seed(seed)
    policy = Policy(walk.sizes, 8, recurrent)
    for parameter in policy.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return policy


@given(
    problem=st.sampled_from([table_problem(), joint_problem(), joint_problem(0.3), table_problem(limit=1 / 16)]),
    recurrent=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_every_draw_keeps_its_own_budget_to_the_last_mac(problem: Problem, recurrent: bool, seed: int) -> None:
    walk = Walk(problem, "learned", 4.0)
    budgets = np.linspace(walk.least, walk.most, 7)
    with torch.inference_mode():
        genomes, _ = policy_of(walk, recurrent, seed).draw(walk, budgets, np.random.default_rng(seed))
    costs = IntervalCosts(problem.space)
    assert all(costs.total(genome) <= budget for genome, budget in zip(genomes, budgets, strict=True))


@given(recurrent=st.booleans(), seed=st.integers(0, 100))
def test_likelihoods_of_all_genomes_within_a_budget_sum_to_one(recurrent: bool, seed: int) -> None:
    """Masks hide what does not fit and nothing else: all that fits can be drawn."""
    problem = joint_problem(0.4)
    walk = Walk(problem, "learned", 4.0)
    genomes = list(feasible_genomes(problem))
    budgets = np.full(len(genomes), walk.most)
    features, priors = walk.replay(np.array(genomes), budgets)
    with torch.inference_mode():
        policy = policy_of(walk, recurrent, seed)
        likelihood, entropy = policy.likelihood(features, priors, torch.tensor(genomes))
    assert float(likelihood.double().exp().sum()) == pytest.approx(1.0, abs=1e-4)
    assert bool((entropy >= 0).all())


@pytest.mark.parametrize("recurrent", [True, False])
def test_what_was_drawn_has_the_likelihood_that_it_was_drawn_with(recurrent: bool) -> None:
    problem = joint_problem()
    walk = Walk(problem, "learned", 2.0)
    policy, budgets = policy_of(walk, recurrent), np.linspace(walk.least, walk.most, 16)
    with torch.inference_mode():
        genomes, drawn = policy.draw(walk, budgets, np.random.default_rng(0))
        features, priors = walk.replay(np.array(genomes), budgets)
        likelihood, _ = policy.likelihood(features, priors, torch.tensor(genomes))
    assert likelihood.numpy() == pytest.approx(drawn, abs=1e-4)


def test_equal_shares_bound_each_interval() -> None:
    problem = table_problem(genes=4, options=4, limit=1.0)
    walk = Walk(problem, "equal", 0.0)
    budgets = np.full(200, walk.least + (walk.most - walk.least) * 0.3)
    with torch.inference_mode():
        genomes, _ = policy_of(walk, True).draw(walk, budgets, np.random.default_rng(0))
    most = 1 + 0.3 * (16 - 1)
    assert {gene for genome in genomes for gene in genome} == {j for j in range(4) if (j + 1) ** 2 <= most}


def test_advantages_compare_scores_of_like_budgets() -> None:
    budgets = np.linspace(1, 2, 20)
    scores = 5 / budgets
    scores[7] -= 1.0
    advantages = advantage_of(budgets, scores)
    assert advantages.argmin() == 7
    assert advantages[7] < -3
    assert math.isclose(float((advantages**2).mean()), 1.0)
    assert advantage_of(budgets, np.ones(20)) == pytest.approx(np.zeros(20), abs=1e-6)


@pytest.mark.long
def test_the_agent_beats_random_search_and_learns_what_matters() -> None:
    wins = [run_to(Routing(), seed, 150) > run_to(Random(), seed, 150) for seed in range(5)]
    assert sum(wins) >= 4
    problem = table_problem(genes=6, options=3, limit=0.6)

    def score(genome: Any) -> Any:
        from nas.contracts import Score

        return Score({"fd": float(2 - genome[5]) + 0.01 * sum(genome[:5])})

    told = drive(Routing(), problem, score, 120)
    early, late = (np.mean([t.genome[5] for t in part]) for part in (told[:24], told[-24:]))
    assert late > early + 0.3


def test_the_origin_names_the_policy_and_the_budget() -> None:
    told = drive(Routing(batch=4), table_problem(), toy_score, 20)
    drawn = [trial.origin for trial in told if "draw" in trial.origin]
    assert [origin["policy"] for origin in drawn] == sorted(origin["policy"] for origin in drawn)
    assert drawn[-1]["policy"] >= 3
    assert all(trial.cost["macs"] <= trial.origin["budget"] for trial in told if "draw" in trial.origin)


def test_wrong_settings_are_refused() -> None:
    with pytest.raises(UserError, match="batch=0"):
        Routing(batch=0)
    with pytest.raises(UserError, match="split='fair'"):
        Routing(split="fair")  # type: ignore[arg-type]


def test_an_update_moves_a_draws_probability_no_further_than_it_pays() -> None:
    """PPO (Schulman et al. 2017): once a good draw is 1 + clip times as likely, more of it earns nothing. Adam's momentum goes on for some
    steps; without the clip all forty of them move the same draws."""
    problem = table_problem(genes=4, limit=1.0)

    def largest(clip: float) -> float:
        search = Routing(batch=8, steps=40, learning_rate=0.003, entropy=0.0, clip=clip).start(problem, 0)
        before, draws = [], []
        for number in range(8):
            proposal = search.ask([])
            assert isinstance(proposal, Proposal)
            draws.append((proposal.genome, proposal.origin["budget"]))
            before.append(proposal.origin["log_likelihood"])
            score = Score({"fd": float(number)})
            search.tell(Trial(number, proposal.genome, str(number), 64, "pruned", score, {}, {}, proposal.origin))
        genomes, budgets = np.array([g for g, _ in draws]), np.array([b for _, b in draws])
        features, priors = search._walk.replay(genomes, budgets)
        with torch.inference_mode():
            after, _ = search._policy.likelihood(features, priors, torch.as_tensor(genomes))
        return float(np.exp(after.numpy() - before).max())

    tight, loose, free = largest(0.05), largest(0.5), largest(1e6)
    assert 1 < tight < loose < free
    assert free - 1 > 2 * (tight - 1)
