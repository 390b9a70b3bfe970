"""What a study would take, found without data, weights or a GPU."""

from __future__ import annotations

import math
from typing import Any

from nas.contracts import UserError
from nas.engine.ladder import Ladder
from nas.genomes.genetics import budget_of, cheapest, dearest
from nas.genomes.timed import calls
from nas.study import Study


def outline(
    study: Study, throughput: float | None = None, price: float | None = None, seeds: int = 1
) -> dict[str, Any]:
    """Size of the space, its range of MACs, the network, memory; `words` says by which formulas. `throughput`: multiply-adds in a second of a device, which
    give hours; `price`: of one of them. `seeds`: of each search. Raises UserError where a network cannot be built or run."""
    for part, member in ((study.supernet, "outline"), (study.training, "macs")):
        if not hasattr(part, member):
            raise UserError(
                f"{type(part).__name__} has no {member}, which --dry-run reports; give it one, or run without --dry-run"
            )
    space, network = study.space, dict(study.supernet.outline())
    sizes = [len(choice.options) for choice in space.choices]
    least, most = space.cost(cheapest(space)), space.cost(dearest(space))
    budget = float(most["macs"]) if study.limits_time else min(budget_of(study.problem), float(most["macs"]))
    typical = (float(least["macs"]) + budget) / 2 + network.get("decoder_macs", 0.0)
    training = float(study.training.macs(study.supernet)) + network.pop("codec_training_macs", 0.0)
    rungs = Ladder(tuple(study.evaluator.rungs), study.objectives, study.trials, study.verified).planned()
    samples = sum(count * each for count, each in rungs)
    search = seeds * samples * typical
    weights, activations = 4 * network["params"], 4 * network["activations"]
    steps = space.decode(cheapest(space)).steps
    kept = {}
    if any(step.reuse for step in steps) and "kept_numbers" in network:
        rows = 2 if any(step.guidance and not step.guidance.arch for step in steps) else 1
        each = 2 if getattr(study.evaluator, "reuse_precision", None) in ("bfloat16", "float16") else 4
        kept = {"reused_per_image": each * rows * network["kept_numbers"]}
    return {
        "study": study.name,
        "choices": len(sizes),
        "intervals": len({choice.interval for choice in space.choices}),
        "log10_schedules": sum(math.log10(size) for size in sizes),
        "macs": {"least": least["macs"], "budget": budget, "most": most["macs"]},
        "macs_share": {
            "least": least["macs_share"],
            "budget": budget / most["macs"] * most["macs_share"],
            "most": most["macs_share"],
        },
        "network": network,
        "bytes": {"weights": weights, "training_state": 5 * weights, "activations_per_image": activations, **kept},
        "training_macs": training,
        "search_macs_per_searcher": search,
        **_reckoned(training, search, throughput, price),
        "words": [
            *(
                [f"the limit on time is taken for none: {len(calls(space)):,} calls are timed when the run begins"]
                if study.limits_time
                else []
            ),
            *([f"hours = MACs / {throughput:.3g} per second / 3600"] if throughput else []),
            f"MACs of a search = {f'{seeds} seeds x ' if seeds > 1 else ''}({' + '.join(f'{count} schedules x {each:,}' for count, each in rungs)} samples) x the mean of the "
            "cheapest schedule and the budget"
            + (", and decoding" if "decoder_macs" in network else "")
            + "; shared beginnings save part of it",
            *(
                ["reused of one image: all branches' outputs of the full network, twice where a step guides itself"]
                if kept
                else []
            ),
            "training state: weights, gradients, two moments and the average, in float32; activations of one image, all modules' outputs",
        ],
    }


def _reckoned(training: float, search: float, throughput: float | None, price: float | None) -> dict[str, Any]:
    if throughput is None:
        return {}
    hours = {"training": training / throughput / 3600, "search_per_searcher": search / throughput / 3600}
    cost = {} if price is None else {"price": {name: each * price for name, each in hours.items()}}
    return {"throughput": throughput, "hours": hours, **cost}
