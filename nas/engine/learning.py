"""Searchers that learn from the supernet before they search: once in a run, kept as safetensors in <run>/learned/.

Metadata of a file: what it was learned from (the ledger's provenance, without the limits where these do not matter to what is learned), and the MACs that
it took, which count as those of every search that uses it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError, safe_open

from nas.base.files import written
from nas.contracts import LearningSearcher, Progress, Snapshot, UserError, derive_seed
from nas.study import LedgerInfo

if TYPE_CHECKING:
    import torch

    from nas.study import Study


LIMITS = ("limits",)
"""Of a provenance, the part that does not matter to who says `for_any_limits`."""


def learned_file(folder: Path, info: LedgerInfo) -> Path:
    """Where what serves this search is, or will be. The first that a searcher of this seed has learned has the ledger's plain name; what it learns otherwise
    later stands beside it."""
    plain = folder / "learned" / f"{info.base_name}.safetensors"
    own = plain.with_name(f"{info.base_name}.{info.of_its_search}.safetensors")
    of_others = sorted(plain.parent.glob(f"{info.base_name}.{'[0-9a-f]' * 8}.safetensors"))
    serving = (file for file in (plain, own, *of_others) if _serves(info, _metadata(file)))
    return next(serving, own if plain.exists() else plain)


def _serves(info: LedgerInfo, metadata: Mapping[str, str] | None) -> bool:
    """Whether it was learned under this very provenance, or under one that differs in limits alone, which did not matter."""
    return metadata is not None and metadata["recipe"] in (*info.digests(), *info.digests(LIMITS))


def learned_macs(folder: Path, info: LedgerInfo) -> int:
    """What this ledger's searcher spent on learning; 0 for one that has not. Reads neither torch nor tensors."""
    metadata = _metadata(learned_file(folder, info))
    return int(metadata["macs"]) if metadata else 0


def learned_tensors(folder: Path, info: LedgerInfo) -> dict[str, torch.Tensor] | None:
    """What it learned under this provenance; None where it has not."""
    from safetensors.torch import load_file

    path = learned_file(folder, info)
    return load_file(path) if _serves(info, _metadata(path)) else None


def learn_once(study: Study, folder: Path, device: str, searcher: str, seed: int) -> Iterator[Progress]:
    """Lets the searcher learn where it wants to and has not, from where it was interrupted."""
    recipe = study.searcher(searcher)
    info = study.ledger_info(folder, searcher, seed)
    if not wants_to_learn(study, folder, searcher, seed):
        return
    assert isinstance(recipe, LearningSearcher)
    supernet = study.supernet.load(folder / "supernet", device)
    path = learned_file(folder, info)
    digest = info.digests(LIMITS if getattr(recipe, "for_any_limits", False) else ())[0]
    path.parent.mkdir(parents=True, exist_ok=True)
    snapshot = path.with_suffix(".snapshot")
    seed = derive_seed(seed, "searcher's learning")
    learning = recipe.learn(
        study.problem_in(folder), supernet, study.images.load(), seed, _read_snapshot(snapshot, info)
    )
    while True:
        try:
            tick = next(learning)
        except StopIteration as end:
            tensors, macs = end.value
            break
        if isinstance(tick, Snapshot):
            _write(tick.tensors, tick.macs, digest, snapshot)
        else:
            yield tick
    _write(tensors, macs, digest, path)
    snapshot.unlink(missing_ok=True)


def _write(tensors: Mapping[str, torch.Tensor], macs: int, digest: str, path: Path) -> None:
    """Whole or not at all."""
    from safetensors.torch import save_file

    partial = path.with_suffix(".partial")
    with written(path):
        save_file(dict(tensors), partial, {"recipe": digest, "macs": str(macs)})
    os.replace(partial, path)


def _read_snapshot(path: Path, info: LedgerInfo) -> Snapshot | None:
    """Where an interrupted learning under the same provenance stopped."""
    from safetensors.torch import load_file

    metadata = _metadata(path)
    if metadata is None or not _serves(info, metadata):
        return None
    return Snapshot(load_file(path), int(metadata["macs"]))


def wants_to_learn(study: Study, folder: Path, searcher: str, seed: int) -> bool:
    """Whether there is something to learn that the run folder does not hold."""
    recipe = study.searcher(searcher)
    if not isinstance(recipe, LearningSearcher) or not recipe.learns:
        return False
    info = study.ledger_info(folder, searcher, seed)
    return not _serves(info, _metadata(learned_file(folder, info)))


@dataclass(frozen=True)
class Learner:
    """`learn_once` as a job of a worker: called with (searcher, seed)."""

    study: Study
    folder: Path
    device: str

    def __call__(self, job: tuple[str, int]) -> str:
        for _ in learn_once(self.study, self.folder, self.device, *job):
            pass
        return job[0]


def _metadata(path: Path) -> Mapping[str, str] | None:
    """None where there is no such file. Raises UserError where it is damaged."""
    if not path.exists():
        return None
    try:
        with safe_open(path, "np") as file:
            metadata: dict[str, str] = file.metadata() or {}
        return {"recipe": metadata["recipe"], "macs": metadata["macs"]}
    except (SafetensorError, KeyError) as error:
        raise UserError(f"{path} is damaged ({error}); delete it, and the same command learns it again") from error
