"""A routing policy learned from the supernet's own losses, before anything is sampled, after the training of the Expert Routing Agent
(DiffPruning, Ganjdanesh et al., ECCV 2024; gates and penalty after APTP, Ganjdanesh et al. 2025). What the published one has and this
one lacks: the gates' offset b, weights of the steps in the loss, and weights of the network that are trained along.

An option is chosen by gates, "at least the second option", "at least the third", each a Gumbel-sigmoid of the policy's own logits.
At one timestep the subnets of all options predict the noise, and the gates' weights mix their predictions: at hard gates this is the
subnet's own prediction, so nothing but the choice is relaxed, and no gradient goes through a network. The loss is that of
denoising, plus distillation from the full network, plus weight x abs(log(r / p)) for a cost r where the budget is p.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import Protocol

import numpy as np
import torch

from nas.contracts import (
    Genome,
    ImageSet,
    LoadedSupernet,
    Problem,
    Progress,
    Schedule,
    Snapshot,
    UserError,
    conditions_of,
    derive_seed,
)
from nas.genomes.genetics import IntervalCosts, dearest
from nas.recipes import Batch, Count, Few, Positive, Weight, recipe

EVERY = 50
"""Gradient steps between two snapshots."""

HIDDEN = -1e4
"""Logit of an option that does not fit, where minus infinity would have no gradient."""


@recipe
class Relaxation:
    """`temperature`: of the gates. `denoising`, `distillation`, `budget`: weights of the losses. `batch`: images of a step, all at one
    timestep; `genomes`: draws of the policy that its budget loss is averaged over."""

    steps: Count = 400
    batch: Batch = 64
    genomes: Few = 8
    temperature: Positive = 0.4
    learning_rate: Positive = 0.02
    denoising: Weight = 1.0
    distillation: Weight = 1.0
    budget: Weight = 0.05


class RelaxedPolicy(Protocol):
    """What a policy has to offer to be learned so."""

    def parameters(self) -> list[torch.nn.Parameter]: ...

    def relaxed(self, count: int, rng: np.random.Generator) -> tuple[list[Genome], torch.Tensor, torch.Tensor]:
        """Draws of the policy: genomes; their budgets in MACs, (count,); logits of each gene's options on the way to them, (count,
        genes, options), differentiable, minus infinity for options that the gene has not. What does not fit the budget is not hidden:
        the budget loss has to teach it, or early intervals would never learn to leave something to late ones."""


def learn(
    settings: Relaxation,
    policy: RelaxedPolicy,
    problem: Problem,
    supernet: LoadedSupernet,
    images: ImageSet,
    seed: int,
    so_far: Snapshot | None = None,
) -> Generator[Progress | Snapshot, None, int]:
    """Trains the policy in place; MACs spent are returned."""
    costs = IntervalCosts(problem.space)
    full = problem.space.decode(dearest(problem.space))
    homes = [costs.home(gene) for gene in range(len(problem.space.choices))]
    steps_of = _steps_of(problem, costs)
    pixels = torch.from_numpy(images.pixels)  # not moved whole: there may be more than a device holds
    states = getattr(supernet, "to_states", lambda images: images)
    conditions = conditions_of(supernet, images)
    if not len(pixels):
        raise UserError(
            "there are no images to learn from; give the study some, or a searcher that learns nothing of images"
        )
    abar = torch.from_numpy(supernet.alphas_cumprod).float()
    optimiser = torch.optim.Adam(policy.parameters(), lr=settings.learning_rate)
    first, spent = (0, 0) if so_far is None else (_restore(policy, optimiser, so_far), so_far.macs)
    for number in range(first, settings.steps):
        rng = np.random.default_rng(derive_seed(seed, number, "relaxation"))
        genomes, budgets, logits = policy.relaxed(settings.genomes, rng)
        weights = option_weights(logits, settings.temperature, rng)
        ratio = _expected_macs(costs, homes, genomes, weights) / budgets
        budget_loss = ratio.log().abs().mean()

        gene = int(rng.integers(len(homes)))
        place = int(rng.choice(steps_of[homes[gene]]))
        generator = torch.Generator().manual_seed(derive_seed(seed, number, "relaxation batch"))
        chosen = torch.randint(len(pixels), (settings.batch,), generator=generator)
        x0, condition = states(pixels[chosen].to(supernet.device)), None if conditions is None else conditions(chosen)
        noise = torch.randn(x0.shape, generator=generator).to(x0)
        step = full.steps[place]
        x = abar[step.timestep].sqrt() * x0 + (1 - abar[step.timestep]).sqrt() * noise
        options = len(problem.space.choices[gene].options)
        schedules = [problem.space.decode(_changed(genomes[0], gene, option)) for option in range(options)]
        arches = [schedule.steps[place] for schedule in schedules]
        with torch.no_grad():
            predictions = torch.stack(
                [supernet.denoiser(each)(x, step.timestep, None, condition)[0][:, : x.shape[1]] for each in arches]
            )
            teacher = supernet.denoiser(step)(x, step.timestep, None, condition)[0][:, : x.shape[1]]
        spent += settings.batch * sum(supernet.macs(each) for each in (*arches, step))
        mixed = torch.einsum("o,onchw->nchw", weights[0, gene, :options].to(predictions), predictions.clone())
        denoising = (mixed - noise).square().mean()
        distillation = (mixed - teacher.clone()).square().mean()
        loss = (
            settings.denoising * denoising
            + settings.distillation * distillation
            + settings.budget * budget_loss.to(denoising)
        )
        optimiser.zero_grad()
        torch.autograd.backward(loss)
        optimiser.step()
        values = {"loss": float(loss.detach()), "MACs/budget": float(ratio.detach().mean())}
        yield Progress("routing agent", number + 1, settings.steps, values)
        if (number + 1) % EVERY == 0 and number + 1 < settings.steps:
            yield _snapshot(policy, optimiser, number + 1, spent)
    return spent


def _snapshot(policy: RelaxedPolicy, optimiser: torch.optim.Adam, step: int, spent: int) -> Snapshot:
    tensors = {"step": torch.tensor(step)}
    for i, parameter in enumerate(policy.parameters()):
        state = optimiser.state[parameter]
        tensors[f"parameter.{i}"] = parameter.detach().clone()
        tensors[f"first.{i}"], tensors[f"second.{i}"] = state["exp_avg"].clone(), state["exp_avg_sq"].clone()
    return Snapshot(tensors, spent)


def _restore(policy: RelaxedPolicy, optimiser: torch.optim.Adam, so_far: Snapshot) -> int:
    """The step to go on with."""
    tensors = so_far.tensors
    with torch.no_grad():
        for i, parameter in enumerate(policy.parameters()):
            parameter.copy_(tensors[f"parameter.{i}"])
            optimiser.state[parameter] = {
                "step": tensors["step"].float(),
                "exp_avg": tensors[f"first.{i}"],
                "exp_avg_sq": tensors[f"second.{i}"],
            }
    return int(tensors["step"])


def option_weights(logits: torch.Tensor, temperature: float, rng: np.random.Generator | None) -> torch.Tensor:
    """Relaxed choice of one option in each last axis, summing to 1. Gate j is open where the option is at least the j-th, given that
    it is at least the one before; option i has the weight of gates 1..i open and i + 1 shut. Without `rng` and at temperature 1 these
    are the softmax's own probabilities.
    """
    fits = ~logits.isneginf()
    logarithms = torch.log_softmax(logits.double().masked_fill(~fits, HIDDEN), dim=-1)
    at_least = torch.logcumsumexp(logarithms.flip(-1), dim=-1).flip(-1)
    open_logits = at_least[..., 1:] - logarithms[..., :-1]
    never = fits.flip(-1).cumsum(-1).flip(-1)[..., 1:] == 0
    always = ~fits[..., :-1] & ~never
    noise = torch.zeros_like(open_logits)
    if rng is not None:
        noise = torch.from_numpy(rng.gumbel(size=tuple(open_logits.shape)))
    safe = open_logits.masked_fill(never | always, 0.0)
    gates = torch.sigmoid((safe + noise) / temperature)
    gates = gates.masked_fill(never, 0.0).masked_fill(always, 1.0)
    ones = torch.ones_like(logarithms[..., :1])
    opened = torch.cat([ones, gates.cumprod(-1)], dim=-1)
    shut = torch.cat([1 - gates, ones], dim=-1)
    found: torch.Tensor = opened * shut
    return found


def _expected_macs(
    costs: IntervalCosts, homes: list[int], genomes: list[Genome], weights: torch.Tensor
) -> torch.Tensor:
    """MACs of each genome, each gene's own part relaxed while the other genes are as they are, (n,)."""
    found = []
    for genome, weight in zip(genomes, weights, strict=True):
        total = torch.tensor(float(costs.total(genome)), dtype=torch.float64)
        for gene in range(len(homes)):
            row = torch.tensor(costs.by_option(genome, gene), dtype=torch.float64)
            total = total + weight[gene, : len(row)] @ row - row[genome[gene]]
        found.append(total)
    return torch.stack(found).clamp_min(1.0)


def _steps_of(problem: Problem, costs: IntervalCosts) -> list[list[int]]:
    """Which of the schedule's steps each interval decides: those that differ between its ends, of the most and the fewest multiply-adds."""
    top = dearest(problem.space)
    whole = problem.space.decode(top)
    tables = getattr(problem.space, "untimed", problem.space).interval_costs()
    lows = [np.unravel_index(int(table.argmin()), table.shape) for table in tables]
    return [
        _differing(whole, problem.space.decode(costs.changed(top, {k: tuple(map(int, low))})))
        for k, low in enumerate(lows)
    ]


def check_whole(problem: Problem) -> None:
    """Raises UserError for a space that chooses more than a subnet for each step: what a step loses that leaves blocks or itself out depends on the steps
    before, which are not run here."""
    top = dearest(problem.space)
    full = problem.space.decode(top)
    for gene, choice in enumerate(problem.space.choices):
        for option in range(len(choice.options)):
            changed = problem.space.decode(_changed(top, gene, option))
            if changed.timesteps != full.timesteps or any(step.reuse for step in changed.steps):
                raise UserError(
                    f"warm_start learns which subnet each step runs, and {choice.name} also chooses which steps and blocks run ({choice.options[option]}); leave "
                    "warm_start out, or give the space no patterns"
                )


def _differing(one: Schedule, other: Schedule) -> list[int]:
    steps = range(len(one.steps))
    return [i for i in steps if one.steps[i] != other.steps[i]] or list(steps)


def _changed(genome: Genome, gene: int, option: int) -> Genome:
    return (*genome[:gene], option, *genome[gene + 1 :])
