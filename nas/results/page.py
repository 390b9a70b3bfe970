"""One HTML page of a run: self-contained, no network, for a screen, a phone or paper, light or dark. Its pictures also as files."""

from __future__ import annotations

import base64
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from nas.contracts import WITHOUT_ATTENTION, Genome, Trial, UserError
from nas.genomes.genetics import LATENCY, dearest
from nas.results.explore import points
from nas.results.grounds import keep_grounds, winner_of
from nas.results.plots import INK, draw_audit, draw_curves, draw_scores
from nas.results.recommendation import next_command, recommended
from nas.results.report import Run, Scale, best_searcher, verdicts
from nas.results.samples import class_by_class, draw_samples, shrunk
from nas.results.schedules import mapped
from nas.results.trials import against, cost_in_words, far_words, full_network, verified_front, with_error
from nas.study import BASELINE, Study

SUPERSCRIPTS = str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹")

MAPS = 12
"""At most so many schedules of the front are drawn."""

SAMPLES, TILE = 36, 128
"""Images in each grid, and the longest side of one in pixels."""


def write_page(study: Study, study_file: str, run: Run, loaded: Any) -> Path:
    """Writes <run>/report/index.html and the pictures beside it; `loaded` is the study's evaluator, which draws the samples."""
    folder = run.folder / "report"
    folder.mkdir(exist_ok=True)
    facts, weights = run.compare(), study.supernet.digest(run.folder / "supernet")
    ledgers = {row["searcher"]: trials for row, (_, trials) in zip(facts["searchers"], run.ledgers, strict=True)}
    whose = {row["searcher"]: (i.searcher, i.seed) for row, (i, _) in zip(facts["searchers"], run.ledgers, strict=True)}
    quality = study.objectives[0]
    draw_scores(ledgers, run.facts, run.scale, facts["label"], folder / "fronts.svg")
    draw_curves(facts["searchers"], facts["area_until_macs"], folder / "compute.svg")
    best = best_searcher(facts)
    full = full_network(ledgers.get(BASELINE, ()), quality)
    winner = winner_of(ledgers, run.facts["limits"], quality)
    page = _template().render(
        study=study.name,
        searched=_searched(study, facts),
        label=facts["label"],
        compared_by=facts["compared_by"],
        baseline=BASELINE,
        pick=recommended(run, study_file),
        cards=_cards(winner, full, quality, run),
        points=points(
            study,
            study_file,
            run,
            ledgers,
            whose,
            loaded,
            lambda trial: samples_of(study, loaded, trial, folder, weights),
        ),
        front=_inline(folder / "fronts.svg"),
        curves=_inline(folder / "compute.svg"),
        mapped=best,
        maps=_maps(study, verified_front(ledgers.get(best, ()), study.objectives), folder),
        grids=_grids(study, loaded, winner[1], ledgers.get(BASELINE, ()), run.scale, folder, quality, weights)
        if winner
        else [],
        grounds=_grounds(keep_grounds(study, run, loaded)),
        audit=_audit(run.folder, folder, run.facts["objectives"][0]),
        trained=_trained(facts["trained"], quality),
        verdicts=[_verdict(found) for found in verdicts(run.folder, weights)],
        spent=_spent(study, run, facts),
        candidates=_candidates(study, study_file, run, ledgers, quality),
        provenance=_provenance(run, study),
    )
    path = folder / "index.html"
    path.write_text(page, encoding="utf-8")
    return path


def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("nas.results"), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True
    )
    return environment.get_template("report.html")


def _inline(picture: Path) -> Markup:
    """An SVG to stand in the page, its ink that of the page."""
    svg = picture.read_text()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*" height="[^"]*"', r"\1", svg, count=1)
    # Identifiers are unique in a file, not in a page.
    prefix = picture.stem
    svg = re.sub(r'(id="|url\(#|href="#)', rf"\g<1>{prefix}-", svg)
    return Markup(svg.replace(INK, "currentColor"))


def _searched(study: Study, facts: Mapping[str, Any]) -> str:
    choices = study.space.choices
    intervals = len({choice.interval for choice in choices})
    size = sum(math.log10(len(choice.options)) for choice in choices)
    schedules = f"About 10{str(round(size)).translate(SUPERSCRIPTS)}" if size > 6 else f"{round(10**size):,}"
    limits = ", ".join(f"{name} at most {limit:g}" for name, limit in study.limits.items()) or "no limit"
    samples = ", then ".join(f"{rung:,}" for rung in study.evaluator.rungs)
    return (
        f"{schedules} schedules: {len(choices)} choices over {intervals} intervals of the denoising timesteps; {limits}. "
        f"Minimised: {' and '.join(study.objectives)}, scored on {samples} samples; {facts['label']}."
    )


def _cards(winner: tuple[str, Trial] | None, full: Trial | None, quality: str, run: Run) -> list[dict[str, str]]:
    cards, scale = [], run.scale
    if winner is not None:
        name, trial = winner
        again = run.confirmed.get(trial.digest)
        shown = _with_error(trial if again is None else replace(trial, score=again), quality)
        noise = "on the noise that it was chosen on" if again is None else "on noise that nothing was chosen on"
        cards.append(
            {
                "what": f"best {quality} within the limits",
                "value": shown,
                "words": f"{name}, trial {trial.number}, {noise}",
            }
        )
        cards.append(
            {
                "what": f"of the full network's {scale.words}",
                "value": f"{scale.share(trial):.1%}",
                "words": f"all steps together: {cost_in_words(trial)}",
            }
        )
    if full is not None:
        assert full.score is not None
        best = winner and winner[1]
        if best is not None and {full.digest, best.digest} <= {*run.confirmed}:
            full, best = (replace(one, score=run.confirmed[one.digest]) for one in (full, best))
        shown = _with_error(full, quality)
        difference = against(best, full, quality) if best is not None else None
        words = f"the best {difference['words']}" if difference else ""
        cards.append(
            {
                "what": f"{quality} of the full network{', guided throughout' if run.guided else ''}",
                "value": shown,
                "words": words,
            }
        )
    return cards


def _with_error(trial: Trial, quality: str) -> str:
    assert trial.score is not None
    return with_error(trial.score.values[quality], trial.score.error(quality))


def _maps(study: Study, front: Sequence[Trial], folder: Path) -> list[dict[str, Any]]:
    found = []
    cheapest_first = sorted(front, key=lambda trial: trial.cost["macs"])
    places = range(len(cheapest_first))
    if len(cheapest_first) > MAPS:
        places = sorted({round(i * (len(cheapest_first) - 1) / (MAPS - 1)) for i in range(MAPS)})  # type: ignore[assignment]
    for place in places:
        trial = cheapest_first[place]
        picture = Markup(schedule_of(study, trial.genome))
        if not picture:
            break
        found.append({"trial": trial.number, "cost": cost_in_words(trial), "picture": picture})
    return found


def schedule_of(study: Study, genome: Genome, ink: str = "currentColor") -> str:
    """What its schedule runs when, over all timesteps that the dearest schedule has, as SVG; nothing where the supernet does not say how its subnets look."""
    if not hasattr(study.supernet, "profile"):
        return ""
    schedule = study.space.decode(genome)
    timesteps = {*study.space.decode(dearest(study.space)).timesteps, *schedule.timesteps}
    return mapped(
        sorted(timesteps, reverse=True), {step.timestep: study.supernet.profile(step) for step in schedule.steps}, ink
    )


def _grids(
    study: Study,
    loaded: Any,
    winner: Trial,
    uniform: Sequence[Trial],
    scale: Scale,
    folder: Path,
    quality: str,
    weights: str,
) -> list[dict[str, str]]:
    """The full network, the winner, and one option at every step that costs no more."""
    full = full_network(uniform, quality)
    same = [trial for trial in uniform if trial.scored and scale.share(trial) <= scale.share(winner)]
    shown = [("best within the limits", winner)]
    if full is not None:
        shown.insert(0, ("full network", full))
    if same:
        shown.append(("one option at every step, no dearer", max(same, key=scale.share)))
    grids = []
    for title, trial in shown:
        picture = samples_of(study, loaded, trial, folder, weights)
        data = "data:image/png;base64," + base64.b64encode(picture.read_bytes()).decode()
        grids.append({"title": title, "picture": data, "words": cost_in_words(trial)})
    return grids


def _grounds(facts: Mapping[str, Any] | None) -> list[tuple[str, str, str]]:
    """What the distance stands on: (what, figure, in words)."""
    if facts is None:
        return []
    floor = float(facts["fd_of_train_images"])
    given = "reference" in facts
    to = f"the statistics in {facts['reference']}" if given else f"{facts['held_out']:,} images"
    rows = [
        (
            "train images to the reference" if given else "train images to held-out ones",
            f"{floor:.3g}",
            f"{facts['train']:,} to {to}: samples of the train images themselves would be as far",
        )
    ]
    if "full" in facts:
        value = float(facts["full"])
        rows.append(("the full network's samples", f"{value:.3g}", far_words(value, floor)))
    if "fd_of_reconstructions" in facts:
        words = "held-out images encoded and decoded: no network on these latents comes nearer"
        what = f"reconstructions to {'the reference' if given else 'held-out images'}"
        rows.append((what, f"{facts['fd_of_reconstructions']:.3g}", words))
    for quantile, share in facts["nearer"].items():
        words = (
            f"of {facts['samples']:,} samples of the best within the limits; about {quantile:.0%} where they are as new as held-out images, more "
            "where train images are repeated"
        )
        rows.append((f"nearer to a train image than {1 - quantile:.0%} of held-out ones", f"{share:.1%}", words))
    return rows


def samples_of(study: Study, loaded: Any, trial: Trial, folder: Path, weights: str) -> Path:
    """Samples of a trial's schedule, drawn once for page and dashboard. `weights`: the digest of the supernet's."""
    picture = folder / "trials" / f"samples-{trial.digest}-{weights[:8]}-{TILE}.png"
    draw_once(picture, partial(draw_grid, study, loaded, trial.genome))
    return picture


def draw_once(picture: Path, draw: Callable[[Path], None]) -> None:
    """Whole or not at all, unless it is there."""
    if not picture.exists():
        torn = picture.with_name(f".partial-{picture.name}")
        draw(torn)
        os.replace(torn, picture)


def draw_grid(study: Study, loaded: Any, genome: Genome, path: Path) -> None:
    """Samples of a genome's schedule, from the noise that all grids share."""
    sample = getattr(loaded, "sample_as_scored", loaded.sample)
    images = shrunk(sample(study.space.decode(genome), SAMPLES, study.seed).cpu().numpy(), TILE)
    draw_samples(
        class_by_class(images, study.evaluator, study.seed), path, columns=6, scale=max(1, 64 // images.shape[-1])
    )


def _audit(run: Path, folder: Path, objective: str) -> dict[str, Any] | None:
    import json

    from nas.results.audit import TABLE, read_table

    facts_file = run / "audit" / "audit.json"
    if not facts_file.exists():
        return None
    try:
        facts = json.loads(facts_file.read_text())
        rows = read_table(run / "audit" / TABLE, objective=objective)
    except (ValueError, UserError):  # the report is of the search, and does without
        return None
    # The table may hold those of another audit, of more schedules, too.
    rows = [row for row in rows if row["digest"] in facts.get("of", [row["digest"]])]
    audited = {name for row in rows for name in row["scores"]}
    if not {proxy["proxy"] for proxy in facts["proxies"]} <= audited:  # the table of another audit, which is not done
        return None
    draw_audit(rows, facts, folder / "audit.svg")
    best = facts["proxies"][0]
    words = (
        f"{facts['schedules']} schedules scored by each proxy and by the reference, {facts['reference']}. Best: {best['proxy']}, Kendall's tau "
        f"{best['tau_in_band']:.2f} inside bands of equal MACs for {best['macs_share']:.1%} of the reference's MACs."
    )
    return {"picture": _inline(folder / "audit.svg"), "words": words}


def _trained(found: Mapping[str, Any] | None, quality: str) -> dict[str, Any] | None:
    if found is None:
        return None
    rows = [
        (
            f"{row['ledger']} #{row['trial']}",
            f"{row['macs_share']:.1%}",
            f"{row['before']:.4g}",
            f"{row['after']:.4g}",
            row["difference"]["words"] if row["difference"] else "",
        )
        for row in found["schedules"]
    ]
    words = "The same noises judge the supernet's subnets and the exported networks after their fine-tuning."
    if found["tau"] is not None:
        words += f" Kendall's tau between the two over {len(rows)} schedules: {found['tau']:.2f}."
    return {
        "columns": ("trial", "MACs", f"{quality} before", f"{quality} after", "difference"),
        "rows": rows,
        "words": words,
    }


def _verdict(found: Mapping[str, Any]) -> dict[str, Any]:
    rows = [
        (
            judge["judge"] + ("" if judge["decides"] else ", beside them"),
            f"{judge['value']:.4g}",
            f"{judge['reference']:.4g}",
            f"{judge['floor']:.4g}",
            f"{judge['interval'][0]:+.3g} to {judge['interval'][1]:+.3g}",
            f"{judge['margin']:.3g}",
            judge["words"].rpartition(": ")[2].removesuffix(" beyond the margin"),
        )
        for judge in found["judges"]
    ]
    columns = ("judge", "schedule", "full network", "real images", "difference, 95 % interval", "margin", "")
    words = f"{found['words']} {found['advice']} Protocol {found['protocol']}, {found['digest']}, schedule {found['schedule']}."
    return {"columns": columns, "rows": rows, "words": " ".join(words.split())}


def _spent(study: Study, run: Run, facts: Mapping[str, Any]) -> dict[str, Any]:
    columns = (
        "searcher",
        "scored",
        "failed",
        "MACs",
        "saved",
        "learning",
        "seconds",
        "wall",
        "hypervolume",
    )
    rows = []
    for row in facts["searchers"]:
        spent = row["spent"]
        rows.append(
            (
                row["searcher"],
                row["trials"],
                row["failed"],
                f"{spent['macs']:.3g}",
                f"{spent['cached_macs'] / max(spent['macs'] + spent['cached_macs'], 1):.0%}",
                f"{spent['learning_macs']:.3g}" if spent["learning_macs"] else "",
                f"{spent['seconds']:.0f}",
                f"{spent['wall_seconds']:.0f}",
                f"{row['hypervolume']:.4g}",
            )
        )
    training = sum(stage["macs"] for stage in run.status()["training"])
    words = [
        "MACs: multiply-adds of all networks' calls; saved: the share that schedules of equal beginnings did not run again; learning: "
        "multiply-adds before the search. Seconds are those of scoring, wall those in which at least one candidate was scored."
    ]
    words += [f"Training the supernet took {training:.3g} multiply-adds."] if training else []
    network = study.supernet.outline() if hasattr(study.supernet, "outline") else {}
    if decoding := network.get("decoder_macs"):
        calls = decoding / network["macs"]
        words.append(
            f"Decoding an image takes {decoding:.3g} multiply-adds more, as many as {calls:.2g} calls of the full network, which no share counts."
        )
    return {"columns": columns, "rows": rows, "words": words}


def _candidates(
    study: Study, study_file: str, run: Run, ledgers: Mapping[str, Sequence[Trial]], quality: str
) -> dict[str, Any]:
    timed = any(trial.objectives((LATENCY,))[0] >= 0 for trials in ledgers.values() for trial in trials)
    time = ("ms an image",) if timed else ()
    attends = any(WITHOUT_ATTENTION in trial.cost for trials in ledgers.values() for trial in trials)
    titles = (
        "searcher",
        "trial",
        "MACs",
        *(("less attention",) if attends else ()),
        *time,
        quality,
        "±",
        "samples",
        "on the front",
        "told apart",
    )
    text = {"searcher", "on the front", "told apart"}
    rows = []
    seeds = {row: info.seed for row, (info, _) in zip(ledgers, run.ledgers, strict=True)}
    for name, trials in ledgers.items():
        front = sorted(verified_front(trials, study.objectives), key=run.scale.share)
        cheaper = {trial.number: before for before, trial in zip([None, *front], front, strict=False)}
        for trial in trials:
            if trial.status != "complete" or trial.score is None:
                continue
            member = trial.number in cheaper
            difference = against(trial, cheaper[trial.number], quality) if member else None
            said = "" if difference is None else "yes" if difference["conclusive"] else "inconclusive"
            error = trial.score.error(quality)
            [milliseconds] = trial.objectives((LATENCY,))
            known = (milliseconds, f"{milliseconds:.3g}") if milliseconds >= 0 else ("", "")
            cells = (
                (name, name),
                (trial.number, str(trial.number)),
                (trial.cost["macs_share"], f"{trial.cost['macs_share']:.1%}"),
                *((_share(trial.cost.get(WITHOUT_ATTENTION)),) if attends else ()),
                *((known,) if timed else ()),
                (trial.score.values[quality], f"{trial.score.values[quality]:.4g}"),
                (error if error == error else "", f"{error:.2g}" if error == error else ""),
                (trial.rung, f"{trial.rung:,}"),
                ("front" if member else "", "front" if member else ""),
                (said, said),
            )
            searcher = name.partition(" (seed")[0]
            rows.append(
                {
                    "cells": [
                        {"value": value, "shown": shown, "text": title in text}
                        for title, (value, shown) in zip(titles, cells, strict=True)
                    ],
                    "command": next_command(study_file, run, searcher, seeds[name], trial.number),
                }
            )
    return {"columns": [{"title": title, "text": title in text} for title in titles], "rows": rows}


def _share(value: float | None) -> tuple[float | str, str]:
    """A cell, empty for trials of before it was known."""
    return ("", "") if value is None else (value, f"{value:.1%}")


def _provenance(run: Run, study: Study) -> list[tuple[str, str]]:
    found: dict[str, str] = {"objectives": ", ".join(study.objectives), "seed": str(study.seed)}
    for info, _ in run.ledgers[-1:]:
        found |= {
            name: str(value) for name, value in info.provenance.items() if name not in found and name != "searcher"
        }
    for row, (info, _) in zip(run.status()["searchers"], run.ledgers, strict=True):
        found[f"searcher {row['searcher']}"] = info.provenance["searcher"]
    return [*found.items(), *((f"version of {name}", value) for name, value in run.facts["versions"].items())]
