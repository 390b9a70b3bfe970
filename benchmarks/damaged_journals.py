"""A finished journal, damaged in six ways."""

from __future__ import annotations

import random
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

from benchmarks.tiny_study import Formula, command
from evaluators.images import Digits
from nas.contracts import UserError
from nas.engine.journal import JOURNAL
from nas.engine.ledger import read_ledgers
from nas.engine.session import open_session
from nas.searchers.evolution import Evolution
from nas.study import Study
from nas.testing import TableSpace


def damages(folder: Path, count: int) -> dict[str, Any]:
    base: Any = Formula()
    study = Study(
        "faults",
        TableSpace(((1, 4, 9, 16),) * 5),
        base,
        Digits(),
        base,
        base,
        {"evolution": Evolution(population=8)},
        limits={"macs_share": 0.6},
        trials=30,
    )

    def search(where: Path) -> list[Any]:
        with open_session(study, where) as session:
            for name in ("uniform", "evolution"):
                session.run(session.conductor(name))
            return [
                (info.name, [(t.genome, t.status, t.score and dict(t.score.values)) for t in trials])
                for info, trials in read_ledgers(session.storage)
            ]

    whole = folder / "whole"
    shutil.rmtree(folder, ignore_errors=True)
    before = search(whole)
    content = (whole / JOURNAL).read_bytes()
    lines = content.splitlines(keepends=True)
    draw, counts, silent = random.Random(0), Counter[str](), []
    kinds = ("cut", "lost", "doubled", "joined", "flipped", "foreign")
    for number in range(count):
        kind, place, made = kinds[number % len(kinds)], draw.randrange(len(lines)), list(lines)
        if kind == "lost":
            del made[place]
        elif kind == "doubled":
            made.insert(draw.randrange(len(lines) + 1), made[place])
        elif kind == "joined":
            made[place] = made[place].rstrip(b"\n")
        elif kind == "flipped":
            line = bytearray(made[place])
            line[draw.randrange(len(line))] ^= 1 << draw.randrange(8)
            made[place] = bytes(line)
        elif kind == "foreign":
            made.insert(place, b'{"op_code":6,"worker_id":"x","trial_id":3,"state":3,"values":null}\n')
        after = b"".join(made) if kind != "cut" else content[: draw.randrange(len(content))]
        copy = folder / "copy"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(whole, copy)
        (copy / JOURNAL).write_bytes(after)
        try:
            found = search(copy)
        except UserError as error:
            named = "journal" in str(error) and "nas repair" in str(error)
            counts["refused by line" if named and " line " in str(error) else "refused"] += 1
            code, _said = command("repair", copy)
            counts["repaired and searched on" if code == 0 and search(copy) else "not repaired"] += 1
            continue
        counts["goes on to the same end" if found == before else "silently different"] += 1
        if found != before:
            silent.append([kind, place])
    return {"damages": count, **dict(counts), "silent": counts["silently different"], "which": silent}
