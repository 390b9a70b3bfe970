"""What `benchmarks.confirm_spread` and `benchmarks.confirm` share: schedules of Fashion-MNIST's latents, unguided, trained and judged as `nas confirm` does it.

They take the network that `benchmarks.latent` left.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from typing import Any

import torch

from benchmarks import confirm_pilot, recover
from benchmarks.common import Benchmark
from nas.contracts import Schedule
from nas.evidence.confirm import FULL, equal_steps
from nas.evidence.protocol import Protocol
from nas.evidence.verdict import Verdict
from search_spaces.shipped.train_diffusers import settings_of

Row = dict[str, Any]


@dataclass(frozen=True)
class Claim:
    """`schedules`: of all arms, as JSON, the full network's among them."""

    setting: recover.Setting
    protocol: Protocol
    schedules: Mapping[str, Any]

    def confirmation(self, seeds: Sequence[int]) -> confirm_pilot.Controlled:
        """What `nas confirm` would do of these arms with these seeds."""
        study, settings, quick = self.setting.study, self.protocol.settings, self.setting.quick
        judged = study.evaluator.rungs if quick else (settings["judged"],)
        study = replace(study, evaluator=replace(study.evaluator, rungs=judged))  # type: ignore[type-var]
        net = study.supernet.load(self.setting.run / "supernet", "cpu")
        training = {**settings["training"], **({"steps": 6, "batch": 8} if quick else {})}
        given = settings_of({**dict(net.training_settings), **training})
        made = {name: Schedule.from_json(json.dumps(one)) for name, one in self.schedules.items()}
        steps = {
            name: equal_steps(net, one, given) * (2 if name == confirm_pilot.LONGER else 1)
            for name, one in made.items()
        }
        protocol = replace(
            self.protocol,
            seeds=tuple(seeds),
            arms={name: self.protocol.arms.get(name, "as in confirm-pilot") for name in made},
            settings={
                **settings,
                "schedules": dict(self.schedules),
                "timesteps": len(net.alphas_cumprod),
                "training": {name: value for name, value in given.__dict__.items() if name not in ("seed", "steps")},
                "gradient_steps": steps,
            },
        )
        return confirm_pilot.Controlled(study, self.setting.run, protocol)


def scored(claim: Claim, arm: str, seed: int) -> Row:
    """Trains, unless it is there, and judges: a row that needs no weights any more."""
    torch.set_num_threads(1)
    made = claim.confirmation((seed,))
    for _ in made.trained(arm, seed):
        pass
    found = made.judged(arm, seed)
    return {
        "gradient_steps": made.protocol.settings["gradient_steps"][arm],
        "scores": {name: score.to_json() for name, score in found.items()},
    }


def asked(bench: Benchmark, claim: Claim, arms: Sequence[str], seeds: Sequence[int]) -> dict[str, Verdict]:
    """The arms against the full network, with these seeds."""
    made = claim.confirmation(seeds)
    pairs = [(arm, seed) for seed in seeds for arm in dict.fromkeys((*arms, FULL))]
    of_training: dict[tuple[str, int], list[tuple[str, int]]] = {}
    for arm, seed in pairs:
        of_training.setdefault((made.trained_as(arm), seed), []).append((arm, seed))
    rows: dict[str, Row] = {}
    # Arms of one training after each other, so that no two processes make it.
    for turn in zip_longest(*of_training.values()):
        jobs = {f"{arm}, seed {seed}": (scored, claim, arm, seed) for arm, seed in filter(None, turn)}
        rows |= bench.rows(jobs)
    made.keep({f"{arm}-{seed}": rows[f"{arm}, seed {seed}"]["scores"] for arm, seed in pairs})
    return {arm: made.verdict(arm) for arm in arms}
