"""study.json: what a run folder says of its study to who reads the folder alone."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from nas.base.files import read_json, write_json
from nas.contracts import UserError
from nas.engine.storage import kept_url
from nas.study import BASELINE, Study

FILE = "study.json"
VERSIONS = ("step-aware-nas", "torch", "diffusers", "optuna", "ray", "numpy")


def read_facts(folder: Path) -> dict[str, Any]:
    """study.json of a run folder. Raises UserError where there is none, or it is damaged."""
    if not (folder / FILE).is_file():
        raise UserError(f"{folder} is no run folder: it holds no {FILE}; give the folder that `nas run` printed")
    remedy = "run the same `nas run` command again, which writes it anew"
    facts = read_json(folder / FILE, remedy)
    kinds = {"study": str, "baseline": str, "trials": int, "objectives": list, "limits": dict, "choices": list}
    odd = [name for name, kind in kinds.items() if not isinstance(facts.get(name), kind)]
    if odd or "storage" not in facts or not facts["objectives"]:
        raise UserError(f"{folder / FILE} is damaged (it has no {(odd or ['storage'])[0]}); {remedy}")
    return facts


def write_facts(study: Study, folder: Path, storage: str | None) -> None:
    """For a new folder, and again once a ledger has accepted the study as it is now. `storage`: a URL, None for the folder's own journal."""
    facts = {
        "study": study.name,
        "storage": kept_url(storage) if storage else None,
        "baseline": BASELINE,
        **what_is_searched(study),
        "choices": [[choice.name, choice.options] for choice in study.space.choices],
        **({"spans": study.space.spans} if hasattr(study.space, "spans") else {}),
        **({} if getattr(study.supernet, "exportable", True) else {"exportable": False}),
        "seed": study.seed,
        "versions": package_versions(),
    }
    write_json(folder / FILE, facts)


def what_is_searched(study: Study) -> dict[str, Any]:
    """By which a run's ledgers of this study are told from those of one with other limits, objectives, rungs or settings."""
    return {
        "trials": study.trials,
        "objectives": list(study.objectives),
        "limits": dict(study.limits),
        "rungs": list(study.evaluator.rungs),
        "searchers": {name: repr(searcher) for name, searcher in study.searchers.items()},
    }


def package_versions() -> dict[str, str]:
    """Of this project and of the libraries that a score may depend on."""
    found = {}
    for name in VERSIONS:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found
