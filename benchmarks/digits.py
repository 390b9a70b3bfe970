"""The digits studies as benchmarks measure them: on all 1,797 images, as their first rows were, where the studies hold a fifth of them out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import studies.digits
import studies.digits_reuse
from benchmarks.common import RUNS
from nas.contracts import Images
from nas.engine.session import open_session
from nas.study import Study
from search_spaces.training import Sandwich


def on_all_images(study: Study) -> Study:
    """The same study with nothing held out, in every part that names its images."""
    everything = replace(study.images, holdout=0.0)  # type: ignore[type-var]
    changed: Study = _with(study, study.images, everything)
    return changed


def _with(value: Any, old: Images, new: Images) -> Any:
    if value == old:
        return new
    if isinstance(value, Mapping):
        return {key: _with(one, old, new) for key, one in value.items()}
    if isinstance(value, tuple):
        changed = [_with(one, old, new) for one in value]
        return type(value)(*changed) if hasattr(value, "_fields") else tuple(changed)
    if is_dataclass(value) and not isinstance(value, type):
        changes = {one.name: _with(getattr(value, one.name), old, new) for one in fields(value) if one.init}
        return replace(value, **changes) if any(changes[name] != getattr(value, name) for name in changes) else value
    return value


digits = on_all_images(studies.digits.study)
digits_reuse = on_all_images(studies.digits_reuse.study)
images, images16 = digits.images, digits_reuse.images


def digits_run(quick: bool) -> tuple[Study, Path]:
    """`digits` with its supernet and features trained, and their run folder; shared by the benchmarks."""
    study = replace(digits, training=Sandwich(steps=60)) if quick else digits
    folder = (RUNS / ("digits-quick" if quick else "digits")).resolve()
    with open_session(study, folder) as session:
        for _ in session.prepare(threads=1):
            pass
    return study, folder
