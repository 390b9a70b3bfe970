"""What a ledger was made of is known by tensors, not by how a file holds them; ledgers of before are continued."""

from __future__ import annotations

import importlib
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from benchmarks.digits import on_all_images
from nas.base.files import file_digest, tensors_digest
from nas.contracts import UserError, digest_of
from nas.engine.ledger import STUDY
from nas.engine.session import open_session
from nas.genomes.genetics import dearest
from nas.results.report import Run
from nas.study import Study


def rewritten(path: Path, reverse: bool = True) -> None:
    """The same tensors in a file of other bytes."""
    with safe_open(path, "pt") as file:
        metadata = file.metadata() or {}
    tensors = load_file(path)
    names = sorted(tensors, reverse=reverse)
    save_file({name: tensors[name] for name in names}, path, {**metadata, "zz": "more"})


def test_a_digest_is_of_names_types_shapes_and_values(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    tensors = {"b": torch.arange(6.0).reshape(2, 3), "a": torch.ones(4, dtype=torch.bfloat16), "c": torch.empty(0)}
    save_file(tensors, path, {"x": "1", "y": "2"})
    first, bytes_first = tensors_digest(path), file_digest(path)
    rewritten(path)
    assert tensors_digest(path) == first
    assert file_digest(path) != bytes_first
    for changed in (
        {**tensors, "b": tensors["b"].reshape(3, 2)},
        {**tensors, "b": tensors["b"] + 1},
        {**tensors, "a": torch.ones(4, dtype=torch.float16)},
        {name + "x": tensor for name, tensor in tensors.items()},
        {"b": tensors["b"]},
    ):
        save_file(changed, path)
        assert tensors_digest(path) != first
    for damage in (b"", b"\x00" * 8, b"\xff" * 40, path.read_bytes()[:-3], b'\x02\x00\x00\x00\x00\x00\x00\x00{"'):
        path.write_bytes(damage)
        if damage not in (b"\x00" * 8,):
            with pytest.raises(UserError, match=r"a\.safetensors"):
                tensors_digest(path)


@pytest.fixture
def copied(tiny_run: Path, tmp_path: Path) -> Path:
    shutil.copytree(tiny_run, tmp_path / "run")
    return tmp_path / "run"


def test_the_same_weights_in_another_file_are_the_same_weights(tiny_study: Study, copied: Path) -> None:
    before = [trials for _, trials in Run.open(copied).ledgers]
    rewritten(copied / "supernet" / "weights.safetensors")
    rewritten(copied / "features" / "classifier.safetensors")
    with open_session(tiny_study, copied) as session:
        for name in ("uniform", "evolution"):
            session.run(session.conductor(name))
    assert [trials for _, trials in Run.open(copied).ledgers] == before


def test_other_weights_are_not(tiny_study: Study, copied: Path) -> None:
    path = copied / "supernet" / "weights.safetensors"
    tensors = load_file(path)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors["conv_in.bias"] = tensors["conv_in.bias"] + 2**-20
    save_file(tensors, path, metadata)
    with open_session(tiny_study, copied) as session, pytest.raises(UserError, match="supernet was"):
        session.conductor("evolution")


def test_a_ledger_that_knows_its_weights_by_their_file_is_continued_and_learns_the_new_name(
    tiny_study: Study, copied: Path
) -> None:
    info = tiny_study.ledger_info(copied, "evolution", 0)
    assert set(info.former) == {"supernet", "evaluator"}
    old = replace(info, provenance={**info.provenance, **info.former})
    before = [trials for _, trials in Run.open(copied).ledgers]
    with open_session(tiny_study, copied) as session:
        study_id = session.storage.get_study_id_from_name(info.name)
        for write in (session.storage.set_study_user_attr, session.storage.set_study_system_attr):
            write(study_id, STUDY, old.to_json())
        session.run(session.conductor("evolution"))
        stored = session.storage.get_study_user_attrs(study_id)[STUDY]
    assert stored["provenance"] == json.loads(json.dumps(dict(info.provenance)))
    assert [trials for _, trials in Run.open(copied).ledgers] == before
    rewritten(copied / "supernet" / "weights.safetensors")
    with open_session(tiny_study, copied) as session:
        session.run(session.conductor("evolution"))


PINNED = {
    "digits": ("356946db079993c9", "cd08b7b0d6ddfd84", "ec4070424990c659", "b2d44c6c664a65dd", "84ea20908a7fdbce"),
    "digits_wide": ("fee218a0b27ca77b", "cd08b7b0d6ddfd84", "bc4c5dd54b7cc89d", "d87794b2b0132878", "84ea20908a7fdbce"),
    "digits_reuse": (
        "0a7d735980591cf2",
        "540d56b274120f05",
        "9b39ce95dc1e5ddf",
        "c6002a4ed8102aa3",
        "5a9577e7a0ecfba2",
    ),
}
"""Of space, dearest schedule, supernet, training and evaluator, as run folders have them that were written before there were conditions
and before images were held out."""


@pytest.mark.parametrize("name", PINNED)
def test_ledgers_from_before_there_were_conditions_are_continued(name: str) -> None:
    study = on_all_images(importlib.import_module(f"studies.{name}").study)
    described = (study.space, study.supernet, study.training, study.evaluator)
    space, supernet, training, evaluator = (digest_of(part.describe()) for part in described)
    schedule = study.space.decode(dearest(study.space)).digest
    assert (space, schedule, supernet, training, evaluator) == PINNED[name]
