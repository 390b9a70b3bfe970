"""What becomes of an exported folder: its networks trained, scored by the study's evaluator, and booked beside the search.

A trained schedule is a trial of the Optuna study STUDY.trained, on the last rung's samples and noises, so that it compares with what the
supernet scored; its origin says which trial it was exported from.
"""

from __future__ import annotations

import json
from collections.abc import Generator, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from nas.contracts import LoadedEvaluator, Progress, Proposal, UserError, derive_seed, frozen
from nas.ledger import Ledger, LedgerInfo
from nas.plots import draw_losses
from nas.report import TRAINED, Run
from nas.session import open_session
from nas.study import BASELINE, Study


def read_plan(folder: Path) -> dict[str, Any]:
    """`train.json` of an exported folder. Raises UserError where there is none."""
    path = folder / "train.json"
    if not path.exists():
        raise UserError(f"{folder} is no exported folder: it holds no train.json; give one that `nas export` wrote")
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def adopt(evaluator: LoadedEvaluator, folder: Path) -> None:
    """Lets the evaluator's supernet run the folder's models in place of its own subnets."""
    import diffusers

    plan = json.loads((folder / "schedule.json").read_text())
    for name, arch in {step["model"]: frozen(step["arch"]) for step in plan["steps"]}.items():
        kind = json.loads((folder / name / "config.json").read_text())["_class_name"]
        model = getattr(diffusers, kind).from_pretrained(folder / name, low_cpu_mem_usage=False, local_files_only=True)
        evaluator.supernet.adopt(arch, model)


def fine_tune(ticks: Iterator[Mapping[str, Any]], folder: Path) -> Iterator[Progress]:
    """Follows a training: `ticks` name the network, its step, how many there are, and the loss. Keeps the losses in
    trained/losses.jsonl and draws them."""
    log = folder / "trained" / "losses.jsonl"
    for tick in ticks:
        with log.open("a") as file:
            file.write(json.dumps(dict(tick)) + "\n")
        yield Progress(f"training {tick['model']}", tick["step"], tick["steps"], {"loss": tick["loss"]})
    if log.exists():
        draw_losses([json.loads(line) for line in log.read_text().splitlines()], log.with_suffix(".png"))


def score_and_book(
    study: Study, folder: Path, storage: str | None, trained: Path, device: str
) -> Generator[Progress, None, dict[str, Any]]:
    """Scores the trained networks on the last rung and books them; what `nas train` says of it is returned. Raises UserError for a folder
    that was exported from another study."""
    provenance = json.loads((trained / "provenance.json").read_text())
    info = ledger_info(study, folder, provenance)
    samples = study.evaluator.rungs[-1]
    with open_session(study, folder, storage, device) as session:
        ledger = Ledger(session.storage, info, study.unlimited())
        yield Progress("scoring the trained networks", 0, 1)
        evaluator = study.load(folder, device)
        adopt(evaluator, trained)
        genome = tuple(provenance["genome"])
        schedule = study.space.decode(genome)
        score = evaluator(schedule, samples, verification_seed(study))
        origin = {"ledger": provenance["ledger"], "trial": provenance["trial"], "folder": str(trained)}
        opened = ledger.open(Proposal(genome, origin), schedule, samples)
        closed = ledger.close(opened.number, score)
        yield Progress("scoring the trained networks", 1, 1)
        quality = study.objectives[0]
        found = Run.open(folder, session.storage).compare()["trained"]
    rows = [] if found is None else [row for row in found["schedules"] if row["trial"] == provenance["trial"]]
    words = f"{quality} {score.values[quality]:.4g} ± {score.error(quality):.2g} after training"
    if rows and rows[-1]["difference"]:
        words += f", {rows[-1]['before']:.4g} before: {rows[-1]['difference']['words']}"
    return {"booked": f"{info.name} trial {closed.number}", quality: score.values[quality], "words": words}


def verification_seed(study: Study) -> int:
    """Of the noises on which the study's winners are verified."""
    return derive_seed(study.seed, "verification noise" if len(study.evaluator.rungs) > 1 else "search noise")


def ledger_info(study: Study, folder: Path, provenance: Mapping[str, Any]) -> LedgerInfo:
    """Of the trained schedules. Raises UserError where the folder was exported from another study or supernet."""
    if provenance["study"] != study.name or provenance["supernet"] != study.supernet.digest(folder / "supernet"):
        raise UserError(
            f"the folder was exported from study {provenance['study']} with another supernet than {folder} holds; give its study and --out"
        )
    like = study.ledger_info(folder, BASELINE, 0)
    # Its scores are not the supernet's: no search may take them for its own.
    provenance = {**like.provenance, "supernet": "networks fine-tuned after export", "searcher": "none"}
    return replace(like, searcher=TRAINED, rungs=like.rungs[-1:], limits={}, provenance=provenance)
