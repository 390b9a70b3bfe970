from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nas.contracts import Choice, Problem, Proposal, UserError
from nas.genomes.genetics import IntervalCosts
from nas.searchers.proposers import (
    Chat,
    Local,
    Question,
    RefusedError,
    Remembered,
    Transcript,
    nearest_within,
    read_answer,
)
from nas.searchers.random import Random
from nas.searchers.rounds import Rounds
from nas.testing import TableSpace, check_searcher, closed, joint_problem, table_problem, toy_score
from tests.test_searchers import drive, run_to

WIDTH = Choice("interval0.width", (0.25, 0.5, 1.0), 0)
BLOCKS = Choice("interval0.blocks", ("few", "many"), 0)
QUESTION = Question(
    number=0,
    interval=1,
    intervals=4,
    choices=(WIDTH, BLOCKS),
    costs=np.array([[1, 2], [4, 6], [16, 24]]),
    allowance=16,
    current=(1, 1),
    memory=(Remembered((2, 0), 16, 0.5, 0.1, 1), Remembered((0, 1), 2, 0.9, -0.2, 2, borrowed=True)),
    importance=(np.array([0.0, -0.4, -0.5]), np.array([0.0, -0.1])),
    refused=(("half", "it holds no JSON list"),),
)


@pytest.mark.parametrize(
    "searcher",
    [
        Rounds(split="equal"),
        Rounds(split="linear", least=0.3),
        Rounds(remembered=0),
        Rounds(budgets=2, attempts=1),
        Rounds(proposer=Local(reach=1, temperature=0.0)),
    ],
    ids=repr,
)
def test_every_kind_of_rounds_keeps_the_laws(searcher: Rounds) -> None:
    check_searcher(searcher)


def test_the_question_says_all_that_a_proposer_may_know() -> None:
    text = QUESTION.text()
    for part in (
        "interval 2 of 4",
        "within 0.667",
        'interval0.blocks: ["few", "many"]',
        "importance [0.0, -0.4, -0.5]",
        '[0.5, "many"] there (0.250)',
        '- [1.0, "few"]: cost 0.667, score 0.5 (-0.1 against the best then), rank 1',
        "in a neighbouring interval",
        "'half', which was refused: it holds no JSON list",
    ):
        assert part in text, part


@pytest.mark.parametrize(
    ("answer", "option", "note"),
    [
        ('[0.5, "few"]', (1, 0), ""),
        ('I would take:\n```json\n[1.0, "few"]\n```', (2, 0), ""),
        ('First [0.25, "few"], no: [0.25, "many"]', (0, 1), ""),
        ('[0.6, "many"]', (1, 1), "interval0.width 0.6 became 0.5"),
        ('[1, "many"]', (2, 0), "over the allowance"),
        ('[1e9, "many"]', (2, 0), "over the allowance"),
    ],
)
def test_answers_are_read_and_repaired(answer: str, option: Any, note: str) -> None:
    found, said = read_answer(answer, QUESTION)
    assert found == option
    assert note in said
    assert bool(note) == bool(said)


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ("", "no JSON list"),
        ("wide, many", "no JSON list"),
        ("[0.5, few]", "no JSON"),
        ("[0.5]", "1 entries, there are 2"),
        ('[0.5, "all"]', "'all' is no option of interval0.blocks"),
        ('["0.5", "few"]', "'0.5' is no option"),
        ('[true, "few"]', "True is no option"),
        ('[NaN, "few"]', "nan is no option"),
    ],
)
def test_answers_that_cannot_be_read_are_refused_with_a_reason(answer: str, reason: str) -> None:
    with pytest.raises(RefusedError, match=reason):
        read_answer(answer, QUESTION)


@given(
    option=st.tuples(st.integers(0, 2), st.integers(0, 1)),
    allowance=st.floats(0, 30),
)
def test_the_nearest_configuration_within_an_allowance(option: tuple[int, int], allowance: float) -> None:
    costs = QUESTION.costs
    found = nearest_within(option, costs, allowance)
    fits = [tuple(p) for p in np.argwhere(costs <= max(allowance, 1)).tolist()]
    distance = {p: sum(abs(a - b) for a, b in zip(p, option, strict=True)) for p in fits}
    assert found in fits
    assert distance[found] == min(distance.values())


@given(
    reach=st.integers(1, 3),
    seed=st.integers(0, 50),
    allowance=st.floats(0, 30),
    memory=st.booleans(),
)
def test_the_local_proposer_answers_within_the_allowance(reach: int, seed: int, allowance: float, memory: bool) -> None:
    question = replace(QUESTION, allowance=allowance, seed=seed)
    if not memory:
        question = replace(question, memory=(), importance=(), refused=())
    _, note = read_answer(Local(reach).propose(question), question)
    assert not note


def test_a_transcript_repeats_a_search_and_ends_with_a_word() -> None:
    problem = joint_problem()
    told = drive(Rounds(budgets=2), problem, toy_score, 20)
    rounds = [trial for trial in told if "round" in trial.origin]
    answers = tuple(tuple(each["answer"] for each in trial.origin["answers"]) for trial in rounds)
    again = Rounds(proposer=Transcript(answers), budgets=2)
    assert [t.genome for t in drive(again, problem, toy_score, 20)] == [t.genome for t in told]
    with pytest.raises(UserError, match=f"holds {len(rounds)} rounds"):
        drive(again, problem, toy_score, 21)


def test_a_round_changes_one_interval_and_others_pay() -> None:
    problem = table_problem(genes=5, limit=0.6)
    told = drive(Rounds(budgets=3), problem, toy_score, 60)
    costs = IntervalCosts(problem.space)
    best: dict[int, Any] = {}
    budgets = [5 + (48 - 5) * (i + 1) / 3 for i in range(3)]
    paid = 0
    for trial in told:
        if "interval" in trial.origin:
            k, budget = trial.origin["interval"], trial.origin["budget"]
            before = best[budget]
            changed = [i for i in range(5) if trial.genome[i] != before.genome[i]]
            assert all(trial.genome[i] < before.genome[i] for i in changed if i != k)
            assert costs.total(trial.genome) <= budgets[budget]
            paid += len(changed) > 1
        for budget, most in enumerate(budgets):
            if trial.cost["macs"] <= most:
                best[budget] = min(best.get(budget, trial), trial, key=lambda t: (t.score.values["fd"], t.genome))
    assert paid > 3


def test_memory_and_importance_pay() -> None:
    with_memory, without, random = (
        np.mean([run_to(searcher, seed, 100) for seed in range(5)])
        for searcher in (Rounds(), Rounds(remembered=0), Random())
    )
    assert with_memory > max(without, random)


@pytest.mark.parametrize("split", ["equal", "learned"])
def test_what_others_pay_does_not_depend_on_the_unit_of_cost(split: Any) -> None:
    """A network's multiply-adds are millions, and what matters is then what an option is expected to lose for each."""
    space = TableSpace((tuple((j + 1) ** 2 for j in range(4)),) * 5)
    large = TableSpace(tuple(tuple(10**7 * cost for cost in row) for row in space.table))
    asked = []
    for table in (space, large):
        told = drive(Rounds(split=split), Problem(table, ("fd", "macs"), {"macs_share": 0.6}), toy_score, 60)
        asked.append([trial.genome for trial in told])
    assert asked[0] == asked[1]


def test_linear_shares_are_in_the_papers_proportions() -> None:
    """TDC with five groups and k = 0.5: 60, 70, 80, 90 and 100 % of the full net, in the mean the published 80 %. Here these proportions
    divide what a budget adds to the cheapest schedule, which takes 1 of each interval's 81."""
    search = Rounds(split="linear", least=0.5, budgets=1).start(table_problem(genes=5, options=9, limit=1.0), 0)
    added = np.array([search._allowance(k, 405.0) - 1 for k in range(5)])
    assert added / added.sum() == pytest.approx([0.15, 0.175, 0.2, 0.225, 0.25])
    assert added.sum() == pytest.approx(400)
    assert search._allowance(4, 0.8 * 405) < 81, (
        "unlike under the paper's rule, at its own budget the cleanest interval may not run the full net"
    )


class Model(BaseHTTPRequestHandler):
    """A small chat endpoint: good, malformed, illegal and dear answers in turn."""

    asked: list[dict[str, Any]] = []  # noqa: RUF012
    keys: list[str | None] = []  # noqa: RUF012
    replies: tuple[Any, ...] = ()

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.keys.append(self.headers.get("Authorization"))
        reply = self.replies[len(self.asked) % len(self.replies)]
        self.asked.append(body)
        status = 500 if reply is None else 200
        content = {"choices": [{"message": {"content": reply}}]} if isinstance(reply, str) else reply
        self.send_response(status)
        self.end_headers()
        self.wfile.write(json.dumps({"path": self.path} if reply is None else content).encode())

    def log_message(self, *arguments: Any) -> None: ...


@pytest.fixture
def endpoint() -> Iterator[str]:
    Model.asked, Model.keys = [], []
    server = HTTPServer(("127.0.0.1", 0), Model)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/v1"
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_language_model_is_asked_and_what_it_says_is_repaired_or_refused(
    endpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    Model.replies = ("[2]", "no idea", "[7]", "[]", "[3]", "[1]", "[0]")
    monkeypatch.setenv("TEST_KEY", "secret")
    searcher = Rounds(proposer=Chat(endpoint, "small", key_variable="TEST_KEY"), budgets=2)
    problem = table_problem()
    told = drive(searcher, problem, toy_score, 14)
    assert all(problem.feasible(trial.genome) for trial in told)
    log = [answer for trial in told for answer in trial.origin.get("answers", [])]
    assert [answer["answer"] for answer in log[:3]] == ["[2]", "no idea", "[7]"]
    assert {"holds no JSON list" in answer.get("refused", "") for answer in log} == {True, False}
    assert any("became" in answer.get("repaired", "") for answer in log)
    assert any("that of trial" in answer.get("refused", "") for answer in log)
    assert len(Model.asked) == len(log)
    first = Model.asked[0]
    assert (first["model"], first["temperature"]) == ("small", 0.0)
    assert "Answer with a JSON list" in first["messages"][-1]["content"]
    assert set(Model.keys) == {"Bearer secret"}
    assert "secret" not in repr(searcher) + json.dumps([dict(trial.origin) for trial in told])


def test_it_is_asked_once_for_what_has_not_changed(endpoint: str) -> None:
    Model.replies = ("[2]",)
    problem = table_problem()
    search = Rounds(proposer=Chat(endpoint, "small"), budgets=1).start(problem, 0)
    first = search.ask([])
    assert isinstance(first, Proposal)
    search.tell(closed(problem, 0, first, toy_score(first.genome)))
    assert search.ask([]) == search.ask([])
    asked = len(Model.asked)
    search.ask([])
    assert len(Model.asked) == asked


@pytest.mark.parametrize(
    ("reply", "message"),
    [(None, "answered status 500"), ({"error": "x"}, r"without choices\[0\]"), ([], r"without choices\[0\]")],
)
def test_an_endpoint_that_fails_ends_the_run_with_one_line(endpoint: str, reply: Any, message: str) -> None:
    Model.replies = (reply,)
    with pytest.raises(UserError, match=message):
        Chat(endpoint, "small").propose(QUESTION)


def test_addresses_that_cannot_be_used_are_refused() -> None:
    with pytest.raises(UserError, match="is no http address"):
        Chat("file:///etc", "small").propose(QUESTION)
    with pytest.raises(UserError, match="answered nothing"):
        Chat("http://127.0.0.1:9", "small", timeout=2).propose(QUESTION)


def test_wrong_settings_are_refused() -> None:
    with pytest.raises(UserError, match="budgets=0"):
        Rounds(budgets=0)
    with pytest.raises(UserError, match="split='fair'"):
        Rounds(split="fair")  # type: ignore[arg-type]
