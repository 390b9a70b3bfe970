"""Agreement of proxies with the reference, its table, and searches on that table."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from nas.cli.terminal import print_audit
from nas.contracts import Schedule, Score, UserError
from nas.engine.session import open_session
from nas.results.audit import TABLE, Agreement, Tabular, bands_of, measure, read_table, schedules_to_audit, summary
from tests.toy import ToyEvaluator, ToySpace, toy_study


@given(st.integers(0, 10_000), st.integers(3, 30), st.integers(1, 6))
def test_tau_is_scipys(seed: int, count: int, levels: int) -> None:
    rng = np.random.default_rng(seed)
    a, b = rng.integers(levels, size=(2, count)).astype(float)
    expected = scipy.stats.kendalltau(a, b).statistic
    [tau] = Agreement(a, b).tau(np.ones((1, count)))
    assert tau == pytest.approx(expected, nan_ok=True)
    weights = rng.multinomial(count, np.full(count, 1 / count))
    repeated = [np.repeat(values, weights) for values in (a, b)]
    [resampled] = Agreement(a, b).tau(weights[None].astype(float))
    assert resampled == pytest.approx(scipy.stats.kendalltau(*repeated).statistic, nan_ok=True)


def test_tau_in_bands_ignores_what_more_macs_explain() -> None:
    macs = np.repeat([1.0, 2.0, 3.0], 20)
    bands = bands_of(macs, 3)
    rng = np.random.default_rng(0)
    quality = -10 * macs + rng.standard_normal(60)
    ones = np.ones((1, 60))
    assert Agreement(-macs, quality).tau(ones) > 0.7
    assert np.isnan(Agreement(-macs, quality, bands).tau(ones))
    assert abs(Agreement(-10 * macs + rng.standard_normal(60), quality, bands).tau(ones)[0]) < 0.3


@given(st.integers(2, 8), st.integers(2, 4), st.integers(0, 100))
def test_audited_schedules_are_distinct_and_spread(genes: int, options: int, seed: int) -> None:
    space = ToySpace(genes, options)
    chosen = schedules_to_audit(space, 30, seed)
    assert len(chosen) == len({*map(tuple, chosen)})
    if options**genes <= 30:
        assert len(chosen) == options**genes
    else:
        assert len(chosen) >= min(30, options**genes) * 0.5
    if options**genes > 1000:
        assert len(chosen) == 30
        shares = [space.cost(genome)["macs_share"] for genome in chosen]
        assert min(shares) < 0.4
        assert max(shares) > 0.8


@dataclass(frozen=True)
class Misleading(ToyEvaluator):
    """Says the opposite of the toy's score."""

    def __call__(self, schedule: Schedule, rung: int, seed: int) -> Score:
        score = super().__call__(schedule, rung, seed)
        return replace(score, values={"fd": -score.values["fd"]})


def audited(folder: Path, count: int = 60, **changes: Any) -> list[dict[str, Any]]:
    proxies = {"good": ToyEvaluator(rungs=(128,)), "noisy": ToyEvaluator(rungs=(2,)), "bad": Misleading(rungs=(128,))}
    study = toy_study(proxies=proxies, **changes)
    for _ in measure(study, folder, count, "cpu"):
        pass
    return read_table(folder / "audit" / TABLE)


def test_an_audit_tells_good_proxies_from_bad(tmp_path: Path) -> None:
    facts = summary(audited(tmp_path), resamples=200)
    found = {row["proxy"]: row for row in facts["proxies"]}
    assert [row["proxy"] for row in facts["proxies"]] == ["good", "noisy", "bad"]
    assert found["good"]["tau_in_band"] > found["noisy"]["tau_in_band"] > 0 > found["bad"]["tau_in_band"]
    for row in facts["proxies"]:
        low, high = row["tau_in_band_interval"]
        assert low <= row["tau_in_band"] <= high
        assert row["relative"] == pytest.approx(row["tau_in_band"] / facts["test_retest"]["tau_in_band"])
    assert found["good"]["regret"] < found["bad"]["regret"]
    assert found["good"]["recall"] > 0.5 > found["bad"]["recall"]
    assert found["good"]["macs_share"] == pytest.approx(128 / 256)
    assert sum(facts["bands"]) == facts["schedules"] == 60


@dataclass(frozen=True)
class NotAbove(ToyEvaluator):
    """Of losses that may be nothing or, as an unbiased estimate, less."""

    def __call__(self, schedule: Schedule, rung: int, seed: int) -> Score:
        score = super().__call__(schedule, rung, seed)
        return replace(score, values={"fd": score.values["fd"] - 10})


def test_of_a_loss_of_nothing_there_is_no_share_that_a_pick_is_worse_by(tmp_path: Path) -> None:
    facts = summary(audited(tmp_path, count=20, evaluator=NotAbove()), resamples=20)
    assert [row["regret"] for row in facts["proxies"]] == [None] * 3
    print_audit({**facts, "picture": "audit.png"})
    json.dumps(facts, allow_nan=False)


@dataclass(frozen=True)
class Both(Misleading):
    """Measures something else first."""

    metrics: tuple[str, ...] = ("other", "fd")

    def __call__(self, schedule: Schedule, rung: int, seed: int) -> Score:
        good = ToyEvaluator.__call__(self, schedule, rung, seed)
        values = {"other": -good.values["fd"], **good.values}
        return replace(good, values=values, labels={"other": "another", **good.labels})


@dataclass(frozen=True)
class Blind(ToyEvaluator):
    """Says the same of all."""

    def __call__(self, schedule: Schedule, rung: int, seed: int) -> Score:
        return replace(super().__call__(schedule, rung, seed), values={"fd": 1.0})


def test_what_ranks_nothing_stands_last(tmp_path: Path) -> None:
    """Of equal scores there is no tau, and no number is smaller or larger than that."""
    proxies = {"bad": Misleading(rungs=(128,)), "blind": Blind(rungs=(128,)), "good": ToyEvaluator(rungs=(128,))}
    study = toy_study(proxies=proxies)
    for _ in measure(study, tmp_path, 40, "cpu"):
        pass
    facts = summary(read_table(tmp_path / "audit" / TABLE), resamples=20)
    assert [row["proxy"] for row in facts["proxies"]] == ["good", "bad", "blind"]


def test_an_audit_is_of_what_the_study_minimises(tmp_path: Path) -> None:
    proxies = {"good": ToyEvaluator(rungs=(128,)), "both": Both(rungs=(128,))}
    study = toy_study(proxies=proxies, evaluator=Both())
    for _ in measure(study, tmp_path, 40, "cpu"):
        pass
    facts = summary(read_table(tmp_path / "audit" / TABLE, objective="fd"), resamples=50)
    assert facts["reference"] == "toy@256"
    table = Tabular(str(tmp_path / "audit" / TABLE), ("both", "reference")).load(None, tmp_path)
    row = next(row for row in read_table(tmp_path / "audit" / TABLE) if row["scores"])
    schedule = study.space.decode(tuple(row["genome"]))
    assert table(schedule, 1, 0).values == {"fd": row["scores"]["both"]["values"]["fd"]}
    assert {row["proxy"]: round(row["tau"], 6) for row in facts["proxies"]}.keys() == {"good", "both"}
    assert all(row["tau"] > 0.5 for row in facts["proxies"])


def test_an_audit_goes_on_where_it_stopped(tmp_path: Path) -> None:
    whole = audited(tmp_path / "whole", 30)
    study_log = tmp_path / "calls"
    parts = audited(tmp_path / "parts", 30)
    path = tmp_path / "parts" / "audit" / TABLE
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:12]) + lines[12][:40])
    again = audited(tmp_path / "parts", 30, evaluator__log=str(study_log))
    assert again == parts == whole
    assert len(study_log.read_text().splitlines()) == 2 * (30 - 11)
    with pytest.raises(UserError, match="another supernet"):
        audited(tmp_path / "parts", 30, supernet__version="2")


def test_searchers_run_on_the_table_of_a_small_space(tmp_path: Path) -> None:
    rows = audited(tmp_path, 64, space__genes=3)
    assert len(rows) == 4**3
    table = Tabular(str(tmp_path / "audit" / TABLE), ("good", "reference"))
    study = replace(toy_study(space__genes=3, trials=40), evaluator=table)
    with open_session(study, tmp_path / "run") as session:
        conductor = session.conductor("evolution")
        session.run(conductor)
    assert {t.status for t in conductor.ledger.trials} == {"pruned", "complete"}
    by_digest = {row["digest"]: row["scores"]["reference"]["values"]["fd"] for row in rows}
    for trial in conductor.ledger.trials:
        if trial.status == "complete":
            assert trial.score is not None
            assert trial.score.values["fd"] == by_digest[trial.digest]
    relative = Tabular(f"audit/{TABLE}", ("good", "reference"), base=str(tmp_path))
    assert relative.digest(tmp_path) == table.digest(tmp_path), "whatever folder a worker is in"
    with pytest.raises(UserError, match="audit the whole space"):
        table.load(None, tmp_path)(ToySpace(4).decode((0, 0, 0, 0)), 1, 0)


def test_a_table_is_identified_by_what_it_holds(tmp_path: Path) -> None:
    audited(tmp_path, 12)
    path = tmp_path / "audit" / TABLE
    table = Tabular(str(path))
    before = table.digest(tmp_path)
    path.write_text(path.read_text().replace('"genome": [0', '"genome":  [0'))
    assert table.digest(tmp_path) != before


def test_a_schedule_that_cannot_be_scored_is_left_out_and_counted(tmp_path: Path) -> None:
    genomes = schedules_to_audit(ToySpace(), 30, 0)
    rows = audited(tmp_path, 30, evaluator__failing=(genomes[3], genomes[7]))
    assert len(rows) == 30
    facts = summary(rows)
    assert facts["schedules"] == 28
    assert facts["failed"] == 2
    assert "was told to fail" in facts["failure"]
    assert "was told to fail" in rows[3]["failure"]
    again = audited(tmp_path, 30)  # once their cause is gone
    assert len(again) == 30
    assert summary(again)["failed"] == 0


@dataclass(frozen=True)
class Unlabelled(ToyEvaluator):
    """As a third party's may be, without labels and an account; of some schedules no number, or nothing at all."""

    odd: tuple[Any, ...] = ()

    def __call__(self, schedule: Schedule, rung: int, seed: int) -> Score:
        genome = tuple(step.arch for step in schedule.steps)
        if genome in self.odd[:1]:
            raise KeyError("pixels")
        value = np.nan if genome in self.odd[1:] else super().__call__(schedule, rung, seed).values["fd"]
        numpy: Any = {"fd": np.float32(value)}
        return Score(numpy, {}, {}, {})


def test_a_third_partys_scores_are_audited(tmp_path: Path) -> None:
    genomes = schedules_to_audit(ToySpace(), 30, 0)
    odd = (genomes[3], genomes[7])
    study = toy_study(proxies={"good": ToyEvaluator(rungs=(128,))})
    study = replace(study, evaluator=Unlabelled(odd=odd))
    for _ in measure(study, tmp_path, 30, "cpu"):
        pass
    found = summary(rows := read_table(tmp_path / "audit" / TABLE))
    assert found["failed"] == 2
    assert found["reference"] == "fd"
    assert found["proxies"][0]["tau"] > 0.5
    assert [row["failure"].partition(":")[0] for row in (rows[3], rows[7])] == ["KeyError", "ArithmeticError"]
    for _ in measure(replace(study, evaluator=Unlabelled()), tmp_path, 30, "cpu"):
        pass
    assert summary(read_table(tmp_path / "audit" / TABLE))["failed"] == 0


def test_what_all_failed_by_is_told(tmp_path: Path) -> None:
    rows = audited(tmp_path, 30, evaluator__failing=tuple(schedules_to_audit(ToySpace(), 30, 0)))
    with pytest.raises(UserError, match=r"30 failed, one with .*was told to fail.* tries them again"):
        summary(rows)


def test_a_smaller_audit_of_a_larger_table_is_a_smaller_audit(tmp_path: Path) -> None:
    audited(tmp_path, 30)
    fewer = set(schedules_to_audit(ToySpace(), 15, 0))
    audited(tmp_path, 15)
    assert len(read_table(tmp_path / "audit" / TABLE, fewer)) == 15


def test_too_small_an_audit_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="at least 10"):
        summary(audited(tmp_path, 4))
    with pytest.raises(UserError, match="`nas audit` writes it"):
        read_table(tmp_path / "none.jsonl")
    for content in ("", "{}\nnot JSON\n"):
        (tmp_path / "bad.jsonl").write_text(content)
        with pytest.raises(UserError, match="delete it, and `nas audit` writes it again"):
            read_table(tmp_path / "bad.jsonl")


def test_rows_are_plain_json(tmp_path: Path) -> None:
    rows = audited(tmp_path, 12)
    assert json.loads(json.dumps(rows)) == rows
    assert {"genome", "digest", "cost", "scores"} == set(rows[0])
