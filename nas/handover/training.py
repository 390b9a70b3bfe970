"""What becomes of an exported folder: its networks trained, scored by the study's evaluator, and booked beside the search.

A trained schedule is a trial of the Optuna study STUDY.trained, on the last rung's samples and noises, so that it compares with what the
supernet scored; its origin says which trial it was exported from.
"""

from __future__ import annotations

import json
from collections.abc import Generator, Iterator, Mapping
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from nas.base.exported import WEIGHTS, Export, check_hashes, read_export, read_network
from nas.base.files import tensors_digest
from nas.contracts import LoadedEvaluator, Progress, Proposal, Score, UserError, derive_seed, digest_of, frozen
from nas.engine.facts import read_facts
from nas.engine.session import open_session, torch_threads
from nas.results.plots import draw_losses
from nas.results.report import Run
from nas.study import BASELINE, TRAINED, LedgerInfo, Study, noise_of


def adopt(evaluator: LoadedEvaluator, folder: Path) -> None:
    """Lets the evaluator's supernet run the folder's models in place of its own subnets."""
    for name, arch in read_export(folder).networks.items():
        evaluator.supernet.adopt(arch, read_network(folder / name))


class Validation:
    """The schedule's score as its training goes, on the samples and noises of the search's first rung: networks trained so far, the
    one in training by the average of its weights, and the others as they were exported."""

    def __init__(self, study: Study, searched: Path, export: Export, device: str) -> None:
        self.quality = study.objectives[0]
        self._study = study
        self._export = export
        self._evaluator = study.load(searched, device)
        self._schedule = study.space.decode(_origin(export)["genome"])
        into = export.folder / "trained"
        trained = [name for name in export.networks if (into / name / "config.json").exists()]
        self.begun = bool(trained)
        for name in trained:
            self._evaluator.supernet.adopt(export.networks[name], read_network(into / name))

    def take(self, name: str, average: Mapping[str, torch.Tensor]) -> None:
        """From now on this is the network."""
        model = read_network(self._export.folder / name)
        model.load_state_dict(average)
        self._evaluator.supernet.adopt(self._export.networks[name], model)

    def __call__(self) -> Score:
        with torch_threads(1):
            return self._evaluator(
                self._schedule, self._study.evaluator.rungs[0], derive_seed(self._study.seed, "search noise")
            )


def train_on(device: str | torch.device) -> None:
    """Has the training of what was exported take this GPU, where it is one: of its own it takes the process's present one."""
    if (chosen := torch.device(device)).type == "cuda" and chosen.index is not None:
        torch.cuda.set_device(chosen)


def fine_tune(
    ticks: Generator[Mapping[str, Any], None, None],
    folder: Path,
    validation: Validation | None = None,
    every: int | None = None,
) -> Iterator[Progress]:
    """Follows a training: `ticks` name the network, its step, how many there are, the loss and the weights' average. Keeps the losses in
    trained/losses.jsonl, the scores of `validation`, after every so many steps of a network (a quarter of them by default) and its last
    one, in trained/validation.jsonl, and draws both."""
    log, scores = folder / "trained" / "losses.jsonl", folder / "trained" / "validation.jsonl"
    known = {(row["model"], row["step"]): row for row in _scored(scores, validation)}
    values: dict[str, float] = {}

    def validate(name: str, step: int) -> None:
        assert validation is not None
        if (name, step) not in known:
            try:
                score = Score.plain(validation())
            except FloatingPointError as error:
                raise UserError(
                    f"the networks cannot be scored at step {step} of {name}: {error}; delete {log.parent} and lower --learning-rate"
                ) from error
            quality = validation.quality
            known[name, step] = {"model": name, "step": step, quality: score.values[quality]}
            with scores.open("a") as file:
                file.write(json.dumps({**known[name, step], "error": score.error(quality)}) + "\n")
        values[validation.quality] = known[name, step][validation.quality]

    if validation is not None and not validation.begun and not known:
        yield Progress("scoring the exported networks", 0, 1)
        validate("", 0)
        yield Progress("scoring the exported networks", 1, 1, values)
    with closing(
        ticks
    ):  # who stops this in its midst has the training keep its state now, not at the end of the interpreter
        for tick in ticks:
            with log.open("a") as file:
                file.write(json.dumps({name: tick[name] for name in ("model", "step", "steps", "loss")}) + "\n")
            step, last = tick["step"], tick["steps"]
            if validation is not None and (step == last or step % (every or -(-last // 4)) == 0):
                validation.take(tick["model"], tick["average"])
                validate(tick["model"], step)
                draw_losses(_losses(log), _scored(scores, validation), log.with_suffix(".png"))
            yield Progress(f"training {tick['model']}", step, last, {"loss": tick["loss"], **values})
    if log.exists():
        draw_losses(_losses(log), _scored(scores, validation), log.with_suffix(".png"))


def _losses(log: Path) -> list[dict[str, Any]]:
    """In the order of the networks' names and their steps."""
    return sorted(_rows(log), key=lambda row: (row["model"], row["step"]))


def _scored(scores: Path, validation: Validation | None) -> list[dict[str, Any]]:
    """Those of the study's present first objective; without a study, of the one that was scored last."""
    rows = _rows(scores)
    last = [name for row in rows[-1:] for name in row if name not in ("model", "step", "error")]
    quality = validation.quality if validation else "".join(last)
    return [row for row in rows if quality in row]


def _rows(log: Path) -> list[dict[str, Any]]:
    """The last row of each step: a training that was stopped repeats those after its checkpoint, and may have torn a line."""
    found: dict[tuple[str, int], dict[str, Any]] = {}
    for line in log.read_text().splitlines() if log.exists() else ():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        found[row["model"], row["step"]] = row
    return list(found.values())


def score_and_book(
    study: Study, folder: Path, storage: str | None, export: Export, device: str, changed_weights: bool = False
) -> Generator[Progress, None, dict[str, Any]]:
    """Scores the trained networks on the last rung and books them, once; what `nas train` says of it is returned. Raises ExportError where
    they were changed since, unless that is meant."""
    trained = export.folder / "trained"
    provenance = _origin(export)
    if not changed_weights:
        check_hashes(trained, export.networks, read_export(trained).provenance, "--changed-weights")
    info = check_origin(study, folder, export)
    samples, genome = study.evaluator.rungs[-1], provenance["genome"]
    weights = digest_of([[name, tensors_digest(trained / name / WEIGHTS)] for name in sorted(export.networks)])
    with open_session(study, folder, storage or _storage_of(folder), device) as session:
        ledger = session.ledger(info, study.unlimited(folder), lambda holder: None)
        schedule = study.space.decode(genome)
        done = [t for t in ledger.trials if t.status == "complete" and t.digest == schedule.digest]
        booked = [t for t in done if t.origin.get("weights") == weights]
        yield Progress("scoring the trained networks", 0, 1)
        if not booked:
            with torch_threads(1):
                evaluator = study.load(folder, device)
                adopt(evaluator, trained)
                try:
                    score = evaluator(schedule, samples, verification_seed(study))
                except FloatingPointError as error:
                    raise UserError(
                        f"the trained networks cannot be scored: {error}; train them with a lower rate"
                    ) from error
            origin = {"ledger": provenance["ledger"], "trial": provenance["trial"], "weights": weights}
            opened = ledger.open(Proposal(genome, origin), schedule, samples)
            booked = [ledger.close(opened.number, score)]
        yield Progress("scoring the trained networks", 1, 1)
        quality = study.objectives[0]
        found = Run.open(folder, session.storage).compare()["trained"]
    [trial] = booked[-1:]
    assert trial.score is not None
    words = f"{quality} {trial.score.values[quality]:.4g} ± {trial.score.error(quality):.2g} after training"
    for row in [] if found is None else found["schedules"]:
        if row["booked"] == trial.number and row["difference"]:
            words += f", {row['before']:.4g} before: {row['difference']['words']}"
    return {"booked": f"{info.name} trial {trial.number}", quality: trial.score.values[quality], "words": words}


def _storage_of(folder: Path) -> str | None:
    """Where the run's ledgers are, unless that is the run folder itself."""
    storage: str | None = read_facts(folder)["storage"]
    return storage


def verification_seed(study: Study) -> int:
    """Of the noises on which the study's winners are verified."""
    return derive_seed(study.seed, noise_of(study.evaluator.rungs[-1], study.evaluator.rungs))


def check_origin(study: Study, folder: Path, export: Export) -> LedgerInfo:
    """The ledger of the trained schedules. Raises UserError where the folder was exported from another study, supernet or space."""
    provenance = _origin(export)
    like = study.ledger_info(folder, BASELINE, 0)
    if provenance["study"] != study.name or not like.same("supernet", provenance["supernet"]):
        raise UserError(
            f"{export.folder} was exported from study {provenance['study']} with another supernet than {folder} holds; give its study and --out"
        )
    steps = [
        (step["timestep"], frozen(step["arch"]), frozen(step["reuse"]), frozen(_guide(step)))
        for step in export.plan["steps"]
    ]
    try:
        decoded = study.space.decode(provenance["genome"])
    except (ValueError, IndexError):
        decoded = None
    if decoded is None or steps != [
        (step.timestep, frozen(step.arch), step.reuse, step.guidance and (step.guidance.scale, step.archs[-1]))
        for step in decoded.steps
    ]:
        raise UserError(
            f"{export.folder} was exported from another search space than study {study.name} has now; restore its study file"
        )
    # Its scores are not the supernet's: no search may take them for its own.
    kept = {**like.provenance, "supernet": "networks fine-tuned after export", "searcher": "none"}
    return replace(like, searcher=TRAINED, rungs=like.rungs[-1:], limits={}, provenance=kept)


def _guide(step: Mapping[str, Any]) -> tuple[float, Any] | None:
    """Of a step as schedule.json has it."""
    return (step["guidance"]["scale"], step["guidance"]["arch"]) if "guidance" in step else None


def _origin(export: Export) -> dict[str, Any]:
    """Which trial of which study the folder was exported from. Raises UserError where it does not say."""
    found = {name: export.provenance.get(name) for name in ("study", "ledger", "trial", "genome", "supernet")}
    genome = found["genome"]
    whole = isinstance(genome, list) and all(type(gene) is int and gene >= 0 for gene in genome)
    if (
        not whole
        or type(found["trial"]) is not int
        or not all(isinstance(found[n], str) for n in ("study", "ledger", "supernet"))
    ):
        raise UserError(
            f"{export.folder / 'provenance.json'} does not say which trial of which study this is; give the folder that `nas export` wrote, or no --study"
        )
    return {**found, "genome": tuple(genome or ())}
