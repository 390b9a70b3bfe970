"""A policy-gradient agent that allocates one budget over the intervals, after DiffPruning's Expert Routing Agent (Ganjdanesh et al., ECCV
2024). It is not that agent, which is trained with the weights through Gumbel gates: this one learns from measured scores alone.

A recurrent policy walks over the genes, noisy to clean, sees the budget and what is left of it, and draws an option for each. What
no longer fits is masked, so that every draw keeps its budget exactly. Budgets are drawn over the whole range below the study's
limit: one agent serves the whole front. The gradient is that of PPO (Schulman et al. 2017): proposals of one version of the policy
are told, compared with what was to be expected of their budgets, and made more or less likely, some steps at a time.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
import numpy.typing as npt
import scipy.special
import torch
from pydantic import Field

from nas.contracts import (
    DONE,
    Genome,
    ImageSet,
    Learned,
    LoadedSupernet,
    Problem,
    Progress,
    Proposal,
    Signal,
    Snapshot,
    Trial,
    derive_seed,
)
from nas.genomes.genetics import IntervalCosts, Taken, most_within, near
from nas.recipes import Count, Few, Positive, Weight, recipe
from nas.searchers.relaxation import Relaxation, check_whole, learn

Array = npt.NDArray[np.float64]

SPARE = 32
"""Batches that are drawn of one version of the policy; when all of them were scored already, their neighbours follow."""

FEATURES = 4
"""What the policy sees at a gene: the share of the budget left above the cheapest rest, the whole budget, its last option, the place."""


@recipe
class Routing:
    """`batch`: scored proposals between two updates of the policy. `memory`: the latest so many proposals that an update learns
    from. `steps`, `learning_rate`: of each update. `entropy`: weight of the policy's entropy at the start, falling to a tenth of it
    over `horizon` scores. `clip`: how far, as a share, the probability of a draw may move before PPO no longer rewards it. `hidden`: size
    of the recurrent state. `evenness`: how strongly the first policy prefers options near an even share of what is left.

    `recurrent`: False for a flat policy, whose options depend on the gene and the budget left alone. `split`: "learned", or "equal"
    where each interval has the same share of what the budget adds to the cheapest schedule. `warm_start`: losses of the supernet from
    which the policy is learned before the search, by gates as the published agent's but without all of its terms; None for none.
    """

    batch: Few = 4
    memory: Annotated[int, Field(ge=1, le=10**5)] = 64
    steps: Few = 8
    learning_rate: Positive = 0.03
    entropy: Weight = 0.05
    horizon: Count = 100
    hidden: Few = 32
    clip: Positive = 0.5
    evenness: Weight = 4.0
    recurrent: bool = True
    split: Literal["learned", "equal"] = "learned"
    warm_start: Relaxation | None = None

    @property
    def learns(self) -> bool:
        return self.warm_start is not None

    def learn(
        self,
        problem: Problem,
        supernet: LoadedSupernet,
        images: ImageSet,
        seed: int,
        so_far: Snapshot | None = None,
    ) -> Generator[Progress | Snapshot, None, Learned]:
        """The policy's parameters after its training on the supernet, and the MACs that took."""
        assert self.warm_start is not None
        search = RoutingSearch(self, problem, seed)
        spent = yield from learn(self.warm_start, search, problem, supernet, images, seed, so_far)
        return search.learned(), spent

    def start(self, problem: Problem, seed: int, learned: Mapping[str, torch.Tensor] | None = None) -> RoutingSearch:
        return RoutingSearch(self, problem, seed, learned)


class RoutingSearch:
    def __init__(
        self, settings: Routing, problem: Problem, seed: int, learned: Mapping[str, torch.Tensor] | None = None
    ) -> None:
        if settings.warm_start is not None:
            check_whole(problem)
        self._settings = settings
        self._problem = problem
        self._seed = seed
        self._walk = Walk(problem, settings.split, settings.evenness)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive_seed(seed, "routing policy"))
            self._policy = Policy(self._walk.sizes, settings.hidden, settings.recurrent)
        if learned is not None:
            self._policy.load_state_dict(learned)
        self._optimiser = torch.optim.Adam(self._policy.parameters(), lr=settings.learning_rate)
        self._version = 0
        self._told: set[Genome] = set()
        self._scored: list[tuple[Genome, float, float, float]] = []
        self._drawn: list[tuple[Genome, float, float]] = []

    def ask(self, pending: Sequence[Genome]) -> Proposal | Signal:
        taken = Taken(self._told, pending)
        self._drawn = self._drawn or self._draw()
        for place, (genome, budget, likelihood) in enumerate(self._drawn):
            if genome not in taken and self._problem.feasible(
                genome
            ):  # limits on further costs are no part of the walk
                origin = {"policy": self._version, "draw": place, "budget": budget, "log_likelihood": likelihood}
                return Proposal(genome, origin)
        rng = np.random.default_rng(derive_seed(self._seed, len(taken), "routing neighbour"))
        nearest = self._drawn[len(taken) % len(self._drawn)][0]
        found = near(self._problem, nearest, rng, taken.__contains__)
        return Proposal(found, {"policy": self._version, "operator": "neighbour"}) if found is not None else DONE

    def tell(self, trial: Trial) -> None:
        self._told.add(trial.genome)
        value = self._problem.quality(trial)
        if value is None or "budget" not in trial.origin:
            return
        self._scored.append((trial.genome, value, trial.origin["budget"], trial.origin["log_likelihood"]))
        if len(self._scored) % self._settings.batch == 0:
            self._update()

    def parameters(self) -> list[torch.nn.Parameter]:
        return list(self._policy.parameters())

    def learned(self) -> dict[str, torch.Tensor]:
        return {name: tensor.detach().clone() for name, tensor in self._policy.state_dict().items()}

    def relaxed(self, count: int, rng: np.random.Generator) -> tuple[list[Genome], torch.Tensor, torch.Tensor]:
        """Draws of the policy for budgets spread over the range, see `RelaxedPolicy`."""
        budgets = self._budgets(count, rng)
        with torch.inference_mode():
            genomes, _ = self._policy.draw(self._walk, budgets, rng)
        features, priors = self._walk.replay(np.array(genomes), budgets, masked=False)
        logits, _ = self._policy.logits(features, 0)
        return genomes, torch.from_numpy(budgets), logits + priors

    def _budgets(self, count: int, rng: np.random.Generator) -> Array:
        """Spread evenly over the range, each at a random place of its stratum."""
        shares = (rng.permutation(count) + rng.random(count)) / count
        return self._walk.least + shares * (self._walk.most - self._walk.least)

    def _draw(self) -> list[tuple[Genome, float, float]]:
        """Of this version of the policy: genomes, the budgets given to it, log-likelihoods. Some batches at once, which take hardly
        longer than one, since a policy that is sure of itself draws again what was scored already."""
        rng = np.random.default_rng(derive_seed(self._seed, self._version, "routing draw"))
        budgets = np.concatenate([self._budgets(self._settings.batch, rng) for _ in range(SPARE)])
        with torch.inference_mode():
            genomes, likelihoods = self._policy.draw(self._walk, budgets, rng)
        return list(zip(genomes, budgets.tolist(), likelihoods.tolist(), strict=True))

    def _update(self) -> None:
        """Some steps of PPO on the latest scores. A score's advantage is what it falls below the expectation at its budget, a
        parabola through all scores but itself, in units of their spread."""
        advantages = -advantage_of(np.array([s[2] for s in self._scored]), np.array([s[1] for s in self._scored]))
        latest = self._scored[-self._settings.memory :]
        advantage = torch.tensor(advantages[-len(latest) :], dtype=torch.float32)
        genomes = np.array([genome for genome, *_ in latest])
        budgets = np.array([budget for *_, budget, _ in latest])
        before = torch.tensor([likelihood for *_, likelihood in latest], dtype=torch.float32)
        features, priors = self._walk.replay(genomes, budgets)
        spent = min(1.0, len(self._scored) / self._settings.horizon)
        entropy_weight = self._settings.entropy * (1 - 0.9 * spent)
        for _ in range(self._settings.steps):
            likelihood, entropy = self._policy.likelihood(features, priors, torch.as_tensor(genomes))
            ratio = (likelihood - before).exp()
            kept = ratio.clamp(1 - self._settings.clip, 1 + self._settings.clip)
            loss = -torch.minimum(ratio * advantage, kept * advantage).mean() - entropy_weight * entropy.mean()
            self._optimiser.zero_grad()
            torch.autograd.backward(loss)
            torch.nn.utils.clip_grad_norm_(self._policy.parameters(), 1.0)
            self._optimiser.step()
        self._version += 1
        self._drawn = []


def advantage_of(budgets: Array, scores: Array) -> Array:
    """Each score less the value at its budget of a parabola fitted to the others, over their root mean square: (n,)."""
    x = (budgets - budgets.mean()) / max(float(np.ptp(budgets)), 1e-12)
    design = np.vander(x, min(3, max(1, len(scores) // 4)))
    fitted, *_ = np.linalg.lstsq(design, scores, rcond=None)
    leverage = np.einsum("ij,ji->i", design, np.linalg.pinv(design))
    residual = (scores - design @ fitted) / np.maximum(1 - leverage, 0.1)
    spread = float(np.sqrt((residual**2).mean()))
    rounding = 1e-9 * float(np.abs(scores).max())
    found: Array = residual / spread if spread > rounding else np.zeros_like(residual)
    return found


@dataclass
class Walked:
    """Where a batch of genomes stands: their budgets, MACs spent on whole intervals, options so far by gene, the last one's place."""

    budgets: Array
    spent: Array
    last: Array
    genes: list[npt.NDArray[np.int64]]


class Walk:
    """The genes in order, and what a budget leaves to choose at each. Prices are MACs; a batch of genomes goes side by side."""

    def __init__(self, problem: Problem, split: Literal["learned", "equal"], evenness: float) -> None:
        self._evenness = evenness
        costs = IntervalCosts(problem.space)
        self._costs = costs
        self.sizes = [len(choice.options) for choice in problem.space.choices]
        least = np.array([int(table.min()) for table in costs.tables], dtype=np.float64)
        dearest = np.array([int(table.max()) for table in costs.tables], dtype=np.float64)
        self.least, self.most = float(least.sum()), float(min(dearest.sum(), most_within(problem)))
        self._least_after = np.append(np.cumsum(least[::-1])[::-1], 0.0)[1:]
        self._most_after = np.append(np.cumsum(dearest[::-1])[::-1], 0.0)
        self._span = dearest - least
        self._floor = least
        self._equal = split == "equal"

    def start(self, budgets: Array) -> Walked:
        """Before the first gene."""
        zero = np.zeros(len(budgets))
        return Walked(budgets, zero, zero, [])

    def look(self, state: Walked, gene: int, masked: bool = True) -> tuple[Array, Array]:
        """What the policy sees at a gene, (n, FEATURES), and the logits before it has learned anything, (n, most options): minus
        infinity for what does not fit (unless not `masked`), and the lower the further an option is from an even share of what is
        left."""
        k = self._costs.home(gene)
        before = state.genes[self._costs.genes[k].start :]
        left = state.budgets - state.spent
        prices = np.broadcast_to(self._costs.least(gene, tuple(before)), (len(left), self.sizes[gene]))
        allowed = left - self._least_after[k]
        if self._equal:
            share = (state.budgets - self.least) / max(self._span.sum(), 1.0)
            allowed = np.minimum(allowed, self._floor[k] + share * self._span[k])
        room = self._most_after[k] - self._floor[k] - self._least_after[k]
        slack = (left - self._floor[k] - self._least_after[k]) / max(room, 1.0)
        whole = (state.budgets - self.least) / max(self._most_after[0] - self.least, 1.0)
        place = np.full(len(left), gene / max(len(self.sizes) - 1, 1))
        even = self._floor[k] + np.clip(slack, 0, 1) * self._span[k]
        prior = np.full((len(left), max(self.sizes)), -np.inf)
        distance = (prices - even[:, None]) / max(self._span[k], 1.0)
        fits = (prices <= allowed[:, None] * (1 + 1e-12)) | (not masked)
        prior[:, : self.sizes[gene]] = np.where(fits, -self._evenness * distance**2, -np.inf)
        return np.stack([np.clip(slack, 0, 1), whole, state.last, place], axis=1), prior

    def step(self, state: Walked, gene: int, options: npt.NDArray[np.int64]) -> None:
        """Takes an option of the gene in each genome; an interval is paid for at its last gene."""
        state.genes.append(options)
        state.last = options / max(self.sizes[gene] - 1, 1)
        k = self._costs.home(gene)
        genes = self._costs.genes[k]
        if gene == genes.stop - 1:
            state.spent = state.spent + self._costs.tables[k][tuple(state.genes[genes])]

    def replay(
        self, genomes: npt.NDArray[np.int64], budgets: Array, masked: bool = True
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What was seen on the way to known genomes: features (n, genes, FEATURES) and prior logits (n, genes, options)."""
        state = self.start(budgets)
        seen = []
        for gene, options in enumerate(genomes.T):
            seen.append(self.look(state, gene, masked))
            self.step(state, gene, options)
        features, priors = (np.stack(parts, axis=1) for parts in zip(*seen, strict=True))
        return torch.as_tensor(features, dtype=torch.float32), torch.as_tensor(priors, dtype=torch.float32)


class Policy(torch.nn.Module):
    """Logits of each gene's options: from the recurrent state, plus a table of each gene's own that is linear in what it sees."""

    def __init__(self, sizes: Sequence[int], hidden: int, recurrent: bool) -> None:
        super().__init__()
        genes, options = len(sizes), max(sizes)
        self.table = torch.nn.Parameter(torch.zeros(genes, FEATURES + 1, options))
        self.recurrent = torch.nn.GRU(FEATURES, hidden, batch_first=True) if recurrent else None
        self.head = torch.nn.Linear(hidden, options) if recurrent else None
        if self.head is not None:
            torch.nn.init.zeros_(self.head.weight)
            torch.nn.init.zeros_(self.head.bias)

    def logits(
        self, features: torch.Tensor, first: int, state: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """features (n, genes, FEATURES) of genes from `first` on; logits (n, genes, options) and the recurrent state after them."""
        table = self.table[first : first + features.shape[1]]
        own = torch.einsum("ngf,gfo->ngo", features, table[:, 1:]) + table[:, 0]
        if self.recurrent is None or self.head is None:
            return own, None
        hidden, state = self.recurrent(features, state)
        return own + self.head(hidden), state

    def likelihood(
        self, features: torch.Tensor, priors: torch.Tensor, genomes: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-likelihood of genomes (n,), and the entropy of a gene's options, mean over genes (n,)."""
        logits, _ = self.logits(features, 0)
        logarithms = torch.log_softmax(logits + priors, dim=-1)
        chosen = logarithms.gather(-1, genomes[..., None])[..., 0].sum(-1)
        fits = priors.isfinite()
        return chosen, -(logarithms.exp() * logarithms.masked_fill(~fits, 0.0)).sum(-1).mean(-1)

    def draw(self, walk: Walk, budgets: Array, rng: np.random.Generator) -> tuple[list[Genome], Array]:
        """One genome for each budget, and its log-likelihood, (n,)."""
        walked, state = walk.start(budgets), None
        likelihoods = np.zeros(len(budgets))
        for gene in range(len(walk.sizes)):
            features, prior = walk.look(walked, gene)
            logits, state = self.logits(torch.as_tensor(features, dtype=torch.float32)[:, None], gene, state)
            logarithms = logits[:, 0].numpy().astype(np.float64) + prior
            logarithms -= scipy.special.logsumexp(logarithms, axis=1, keepdims=True)
            below = np.exp(logarithms).cumsum(1)
            options = np.minimum((below < rng.random((len(budgets), 1)) * below[:, -1:]).sum(1), prior.shape[1] - 1)
            likelihoods += np.take_along_axis(logarithms, options[:, None], 1)[:, 0]
            walk.step(walked, gene, options)
        return [tuple(genome) for genome in np.stack(walked.genes, axis=1).tolist()], likelihoods
