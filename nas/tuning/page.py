"""What tuning came to, as files: the schedule, the module that applies it, other projects' formats, the study, and a page."""

from __future__ import annotations

import base64
import os
import shlex
from collections.abc import Mapping, Sequence
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import jinja2
from markupsafe import Markup

from nas.base.files import read_json, write_text
from nas.contracts import LoadedSupernet, Schedule, UserError
from nas.handover.portable import module, portable, write_portable
from nas.results.recommendation import of_trial
from nas.results.samples import draw_samples, shrunk
from nas.results.schedules import mapped
from nas.tuning.found import CONFIDENCE, Candidate, Found, percent
from nas.tuning.study import LOSS, SEARCHER, USUAL, Wanted
from search_spaces import shipped
from search_spaces.layouts import cache_dit_yaml, smoothcache_json
from search_spaces.shipped.schedule_file import FORMAT

METRICS = {
    LOSS: "loss",
    "teacher_dissimilarity": "1 - SSIM",
    "fd_network": "FD, network's features",
    "teacher_disagreement": "nearer to another's",
    "teacher_perceptual": "perceptual",
}
"""What people call them."""

SIDE = 256
"""Pixels of a picture's longer side, at most."""

SCHEDULE, APPLY = "schedule.json", "apply_schedule.py"
FORMATS = {"cache_dit.yaml": cache_dit_yaml, "smoothcache.json": smoothcache_json}
"""Of other projects."""

OTHERS = (
    f"{' and '.join(FORMATS)} say for these projects what is computed, and what it loses there was not measured: cache-dit adds what skipped blocks added, gates and "
    "all, and SmoothCache's helper for diffusers takes attn1 alone unless it is told the other parts."
)

STEPPED = ("DDIMScheduler", "DDPMScheduler", "PNDMScheduler", "DPMSolverMultistepScheduler")
"""Schedulers whose states are those of DDIM, so that the module takes over their steps as they are."""


def apply_module() -> str:
    """The stand-alone module that runs a schedule file."""
    here = Path(shipped.__file__).parent
    return module(
        [here / f"{name}.py" for name in ("graph", "walks", "reuse", "stepping", "schedule_file")], here / "apply.py"
    )


def measured(found: Found) -> dict[str, Any]:
    """What stands in the file of what is known of the schedule."""
    wanted, chosen = found.wanted, found.chosen
    return {
        "share": chosen.share,
        "of": wanted.measure,
        "loss": chosen.loss,
        "loss_error": chosen.error,
        "apart": found.apart,
        "samples": found.study.evaluator.rungs[-1],
        **({} if found.kept_prompts is None else {"kept_prompts": found.kept_prompts}),
        "grid": list(found.grid),
        "full_timesteps": list(wanted.grid(wanted.full_steps or wanted.steps)),
        "full_guidance": wanted.scale,
        "loss_is": "mean squared distance of a sample in [-1, 1] to the full pipeline's own of the same noise; two unrelated ones are `apart`",
    }


def compared(found: Sequence[Found]) -> str:
    """Schedules of several numbers of steps beside each other, in words; empty where they are not measured from the same full pipeline."""
    if len({one.wanted.full_steps for one in found}) > 1 or not found[0].wanted.full_steps or len(found) < 2:
        return ""
    told = []
    for one in sorted(found, key=lambda one: one.chosen.loss):
        lost = f"{percent(one.chosen.loss / one.apart)} ± {percent(CONFIDENCE * one.chosen.error / one.apart)}"
        takes = f", {one.milliseconds * one.chosen.share:.3g} ms an image" if one.milliseconds else ""
        told.append(f"of {one.wanted.steps} steps {lost}{takes}")
    return f"Of the way from the same {found[0].wanted.full_steps} whole steps: {'; '.join(told)}."


def write_found(found: Found, net: LoadedSupernet, sampler: Mapping[str, Any], folder: Path, run: Path) -> list[str]:
    """Writes study.py and report.html; where the schedule is one to be used, schedule.json, apply_schedule.py, and cache_dit.yaml and smoothcache.json if
    these can say it; returned is why they cannot, where so. What another search left there is not. `run`: the run folder."""
    chosen, graph = found.chosen.schedule, found.wanted.graph
    folder.mkdir(parents=True, exist_ok=True)
    left_out = []
    # The schedule goes last: by it the folder is known as a search's.
    stale = dict.fromkeys((*FORMATS, APPLY, SCHEDULE))
    if not found.far:
        write_portable(portable(net, chosen, sampler, measured(found)), apply_module(), folder)
        del stale[SCHEDULE], stale[APPLY]
        if not any(step.reuse for step in chosen.steps):
            left_out.append(f"no {' or '.join(FORMATS)}: no step reuses anything")
        for name, write in FORMATS.items() if not left_out else ():
            try:
                write_text(folder / name, write(chosen, graph, found.wanted.grid(len(chosen.steps))))
                del stale[name]
            except UserError as error:
                left_out.append(f"no {name}: {error}")
    for name in stale:
        (folder / name).unlink(missing_ok=True)
    keep_study(folder / "study.py", study_file(found, run))
    write_text(folder / "report.html", page(found, folder, run, left_out))
    return left_out


def check_target(folder: Path) -> None:
    """Raises UserError for a folder whose files are not those of another search."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file; give --to a folder")
    schedule = folder / SCHEDULE
    others = [name for name in (APPLY, *FORMATS) if (folder / name).exists()]
    # Where nothing was gained a search leaves a report beside its study alone.
    others += ["report.html"] if (folder / "report.html").exists() and not (folder / "study.py").exists() else []
    if others and not schedule.exists():
        raise UserError(
            f"{folder} holds a {others[0]} without a {SCHEDULE}, which would be overwritten; give another --to"
        )
    known = read_json(schedule, "give another --to") if schedule.exists() else {"format": FORMAT}
    if (folder / "model_index.json").exists() or not isinstance(known, dict) or known.get("format") != FORMAT:
        raise UserError(
            f"{folder} holds a pipeline or a {SCHEDULE} of another kind, which would be overwritten; give another --to"
        )


def aside_of(path: Path) -> Path:
    """Where a file that another one takes the place of is kept."""
    names = (path.with_name(f"{path.stem}.before{'' if n == 1 else f'-{n}'}{path.suffix}") for n in count(1))
    return next(name for name in names if not name.exists())


def keep_study(path: Path, text: str) -> Path | None:
    """Another one that is there is not lost, since studies are changed by hand: returned is where it is kept."""
    if not path.exists() or _said(path.read_text()) == _said(text):
        write_text(path, text)
        return None
    aside = aside_of(path)
    os.replace(path, aside)
    write_text(path, text)
    return aside


def _said(study: str) -> str:
    """Without what stands above it."""
    return study.partition('"""')[2].partition('"""')[2] or study


def study_file(found: Found, run: Path) -> str:
    """A study file that goes on by hand where `nas tune` stopped, in its run folder."""
    wanted = found.wanted
    given = ", ".join(f"{name}={value!r}" for name, value in _settings(wanted).items())
    return f'''"""Faster schedules for {wanted.folder.name}, as `nas tune` searched them: `nas run`, `nas compare`, `nas export` and all others take this file.
What was searched so far lies in {run}, so give `--out {shlex.quote(str(run))}`, or leave it out to begin anew.

Change anything: `dataclasses.replace(study, trials=1000, searchers={{...}})`, or build another one of `wanted.net`.
"""

from pathlib import Path

from nas.tuning.study import Wanted

wanted = Wanted({given})
study = wanted.study({dict(found.study.limits)!r}, enqueue={found.study.enqueue!r})
'''


class _Path:
    """Prints as a path is written in a study file."""

    def __init__(self, path: Path) -> None:
        self._path = path.resolve()

    def __repr__(self) -> str:
        return f"Path({str(self._path)!r})"


def _settings(wanted: Wanted) -> dict[str, Any]:
    fields = {name: getattr(wanted, name) for name in wanted.__dataclass_fields__}
    return {name: _Path(value) if isinstance(value, Path) else value for name, value in fields.items()}


def page(found: Found, folder: Path, run: Path, left_out: list[str]) -> str:
    """One self-contained page."""
    wanted = found.wanted
    candidates = [c for c in (found.best, found.fewer, found.rival, found.start) if c is not None]
    shown: dict[Schedule, Candidate] = {}
    for candidate in candidates:
        shown.setdefault(candidate.schedule, candidate)
    metrics = [name for name in METRICS if name in found.best.score.values]
    grids = []
    with TemporaryDirectory() as drawn:
        path = Path(drawn) / "samples.png"
        for name, images in found.images.items():
            draw_samples(shrunk(images, SIDE), path, columns=len(images), scale=max(1, 96 // images.shape[-1]))
            source = base64.b64encode(path.read_bytes()).decode()
            grids.append({"name": name, "source": f"data:image/png;base64,{source}"})
    schedule = found.chosen.schedule
    profile = mapped(found.grid, {s.timestep: wanted.net.profile(s) for s in schedule.steps})
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("nas.tuning"), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True
    )
    return environment.get_template("report.html").render(
        title=f"{wanted.folder.name}: a faster schedule",
        what=_what(found),
        verdict=found.verdict,
        measure=f"share of the {wanted.measure}",
        metrics=[METRICS[name] for name in metrics],
        rows=[_row(found, candidate, metrics) for candidate in shown.values()],
        grounds=f"On {found.study.evaluator.rungs[-1]} samples of {_apart(found)}. Loss: mean squared distance to the full pipeline's own sample of the "
        f"same noise, as a share of that between two unrelated ones; ± {CONFIDENCE:g} standard errors.",
        profile=Markup(profile),
        grids=grids,
        use=usage(found, folder, run),
        formats="; ".join(left_out) or ("" if found.far else OTHERS),
    )


def usage(found: Found, folder: Path, run: Path) -> str:
    """What runs the chosen schedule: code for a stock pipeline, and the command that writes a pipeline with it, where the search scored it; nothing where the full
    pipeline is to be kept."""
    if found.far:
        return ""
    trial, study = found.chosen.trial, str(folder / "study.py")
    export = "" if trial is None else f"nas export {of_trial(study, run, SEARCHER, trial)} --to model"
    if found.wanted.kind in ("", "StepAwarePipeline"):
        return f"{export or f'# {SCHEDULE} holds it, and no trial of a search does'}  # no stock pipeline of diffusers samples with it"
    scale = next((s.guidance.scale for s in found.chosen.schedule.steps if s.guidance), None)
    # A pipeline that guides where nobody says otherwise is told not to.
    scale = 1.0 if scale is None and found.wanted.kind in USUAL else scale
    guided = "" if scale is None else f", guidance_scale={scale:g}"
    own, load, swap = found.wanted.scheduler.get("_class_name"), "", ""
    if own not in STEPPED:
        load = "from diffusers import DDIMScheduler\n"
        swap = f"pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)  # in place of its {own}\n"
    return (
        f"from apply_schedule import apply_schedule, remove_schedule\n{load}\n{swap}"
        'apply_schedule(pipeline, "schedule.json")  # your own, as diffusers loads it\n'
        f"pipeline(..., num_inference_steps={len(found.chosen.schedule.steps)}{guided})"
        + (f"\n\n# or as a folder of its own: {export}" if export else "")
    )


def _apart(found: Found) -> str:
    """On what nothing was searched."""
    kept = found.kept_prompts
    prompts = f" and {kept} prompt{'s' * (kept > 1)}" if kept else ""
    same = "; the prompts are those of the search, as there are few" if found.wanted.prompts and not kept else ""
    return f"noises{prompts} that nothing was searched on{same}"


def _what(found: Found) -> str:
    wanted = found.wanted
    full = len(wanted.grid(wanted.full_steps or wanted.steps))
    each = "" if full == wanted.steps else f" in {wanted.steps} whole steps"
    on = "one CPU thread" if found.device == "cpu" else found.device
    time = "" if found.milliseconds is None else f", {found.milliseconds:.3g} ms an image{each} on {on}"
    guided = "" if wanted.scale is None else f", guided at {wanted.scale:g}"
    return (
        f"{wanted.kind or 'A network'} of {full} steps {wanted.stepped_by}{guided}{time}; a schedule within {wanted.limit:.0%} of {wanted.whole} {wanted.measure}. "
        f"{found.trials} scores, {found.spent['samples']:,.0f} samples of the full pipeline's worth, {found.spent['seconds'] / 60:.1f} minutes."
    )


def _row(found: Found, candidate: Candidate, metrics: list[str]) -> dict[str, Any]:
    steps = candidate.schedule.steps

    def value(name: str) -> str:
        by = found.apart if name == LOSS else 1.0
        worth, error = candidate.score.values[name] / by, CONFIDENCE * candidate.score.error(name) / by
        return f"{percent(worth)} ± {percent(error)}" if name == LOSS else f"{worth:.3g} ± {error:.1g}"

    return {
        "name": candidate.name + (" (chosen)" if candidate.schedule == found.chosen.schedule and not found.far else ""),
        "steps": len(steps),
        "whole": sum(not step.reuse for step in steps),
        "guided": sum(step.guidance is not None for step in steps) if found.wanted.scale is not None else "-",
        "share": f"{candidate.share:.1%}",
        "values": [value(name) for name in metrics],
    }
