"""The report, as a reader's browser has it."""

from __future__ import annotations

import json
import re
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nas.results.audit import TABLE
from nas.results.page import _audit
from tests.test_cli import nas

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")

STUDY = """
from dataclasses import replace
from evaluators.frechet import Frechet
from evaluators.images import Digits
from nas.searchers.evolution import Evolution
from nas.searchers.random import Random
from nas.study import Study
from search_spaces.intervals import uniform
from search_spaces.patterns import Every, Only
from search_spaces.stepwise import Stepwise
from search_spaces.supernet import Elastic
from search_spaces.training import Sandwich
from tests.conftest import TINY

net, images, steps = Elastic(TINY, widths=(0.25, 0.5, 1.0)), Digits(), uniform(4)
study = Study(
    name="page",
    space=Stepwise(net, steps, (2, 2), patterns=(Every(1), Every(2), Every(2, ("d0", "u1")), Only(()))),
    supernet=net,
    images=images,
    training=Sandwich(steps=20, batch=16, warmup=5, checkpoint_every=10),
    evaluator=Frechet(images, rungs=(32, 64)),
    searchers={"evolution": Evolution(population=6), "random": Random()},
    limits={"macs_share": 0.6},
    trials=10,
    verified=4,
    proxies={"fd@16": Frechet(images, rungs=(16,))},
)
"""


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("page")
    (folder / "study.py").write_text(STUDY)
    arguments = (folder / "study.py", "--out", folder / "run")
    assert nas("run", *arguments, "--searcher", "all", "-q").returncode == 0
    assert nas("audit", *arguments, "--schedules", 12, "-q").returncode == 0
    result = nas("report", *arguments)
    assert result.returncode == 0, result.stderr
    found = folder / "run" / "report" / "index.html"
    assert str(found) in result.stdout
    return found


def test_the_page_needs_no_other_file_and_no_network(page: Path) -> None:
    text = page.read_text()
    assert not re.findall(
        r"""(?:src|href)=["'](?!#|data:|https?://www\.w3\.org)""", text.replace('xlink:href="#', 'href="#')
    )
    for heading in (
        "Quality against cost",
        "What runs when",
        "Samples from the same noise",
        "can be trusted",
        "Provenance",
    ):
        assert heading in text
    facts = json.loads((page.parents[1] / "study.json").read_text())
    assert facts["spans"] == [[999, 749], [499, 249]]
    assert {path.name for path in page.parent.glob("*.svg")} >= {"fronts.svg", "compute.svg", "audit.svg"}
    assert len(re.findall(r'id="([^"]+)"', text)) == len(set(re.findall(r'id="([^"]+)"', text))), "identifiers repeat"


def test_every_command_of_the_page_exports_its_candidate(page: Path, tmp_path: Path) -> None:
    commands = dict.fromkeys(re.findall(r"<code[^>]*>nas (export [^<]*)</code>", page.read_text()))
    assert len(commands) >= 6
    for number, command in enumerate(commands):
        words = command.split()
        words[-1] = str(tmp_path / f"exported-{number}")
        result = nas(*words)
        assert result.returncode == 0, result.stderr
        told = json.loads((Path(words[-1]) / "provenance.json").read_text())
        assert told["trial"] == int(words[words.index("--trial") + 1])
        assert told["ledger"].split(".")[1] == words[words.index("--searcher") + 1]


@pytest.fixture
def browser() -> Iterator[Any]:
    if CHROMIUM is None:
        pytest.skip("no chromium on this machine")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as started:
        yield started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (390, "dark")])
def test_a_browser_sorts_filters_and_follows_links_without_an_error(
    page: Path, browser: Any, width: int, scheme: str
) -> None:
    context = browser.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme)
    opened = context.new_page()
    complaints: list[str] = []
    requests: list[str] = []
    opened.on("console", lambda message: complaints.append(message.text))
    opened.on("pageerror", lambda error: complaints.append(str(error)))
    opened.on("request", lambda request: requests.append(request.url))
    opened.goto(page.as_uri())
    wide = opened.evaluate("document.documentElement.scrollWidth")
    assert wide <= width

    titles = opened.locator("#table thead th").all_inner_texts()
    assert "less attention" in titles  # the shares as papers have them that leave out its products
    place = 1 + titles.index("fd")

    def column() -> list[float]:
        cells = opened.locator(f"#table tbody tr:visible td:nth-child({place})")
        return [float(cells.nth(i).get_attribute("data-value")) for i in range(cells.count())]

    opened.get_by_role("button", name="fd").click()
    assert column() == sorted(column())
    opened.get_by_role("button", name="fd").click()
    assert column() == sorted(column(), reverse=True)
    before = len(column())
    opened.locator("#filter").fill("random")
    assert 0 < len(column()) < before
    assert opened.locator("#shown").inner_text() == f"{len(column())} of {before}"
    opened.get_by_role("link", name="Provenance").click()
    assert opened.url.endswith("#provenance")
    assert opened.locator("#provenance").is_visible()
    ground = opened.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (ground == "rgb(255, 255, 255)") == (scheme == "light")
    assert complaints == []
    assert [url for url in requests if not url.startswith(("file:", "data:"))] == []


@pytest.mark.parametrize("phone", [False, True])
def test_a_reader_points_at_a_schedule_and_picks_it(page: Path, browser: Any, phone: bool) -> None:
    """With a mouse and the keyboard, or with a finger on a screen of 390 pixels."""
    size: dict[str, Any] = {"viewport": {"width": 1280, "height": 900}}
    if phone:
        size = {
            "viewport": {"width": 390, "height": 844},
            "is_mobile": True,
            "has_touch": True,
            "device_scale_factor": 3,
        }
    opened = browser.new_context(**size).new_page()
    complaints: list[str] = []
    opened.on("pageerror", lambda error: complaints.append(str(error)))
    opened.goto(page.as_uri())
    points = json.loads(opened.locator("#points").text_content())
    marks, details = opened.locator(".point"), opened.locator("#details")
    assert marks.count() == len(points) >= 8
    assert opened.evaluate("document.documentElement.scrollWidth") <= size["viewport"]["width"]
    box = opened.locator("#chart svg").bounding_box()
    assert box["width"] <= size["viewport"]["width"]
    assert opened.locator(".point.picked").count() == 1

    def told(mark: Any) -> dict[str, Any]:
        wanted = mark.get_attribute("id")
        [point] = [p for p in points if f"trial-{p['searcher']}-{p['trial']}" == wanted]
        return dict(point)

    places = Counter((p["share"], p["value"]) for p in points)  # both searchers may have found one
    alone = [
        marks.nth(n)
        for n in range(marks.count())
        if places[told(marks.nth(n))["share"], told(marks.nth(n))["value"]] == 1
    ]
    one, other = alone[0], alone[-1]
    (one.tap if phone else one.click)(force=True)
    point = told(one)
    assert f"{point['searcher']}, trial {point['trial']}" in details.inner_text()
    assert point["command"] in details.inner_text()
    assert details.locator("svg rect title").count() == point["schedule"].count("<title>") > 0
    assert details.locator("img").evaluate("image => image.naturalWidth") > 0
    assert opened.url.endswith(f"#{one.get_attribute('id')}")
    if not phone:
        other.hover(force=True)
        assert f"trial {told(other)['trial']}" in details.inner_text()
        opened.mouse.move(5, 5)
        assert f"trial {point['trial']}:" in details.inner_text()  # what was picked comes back
        other.focus()
        opened.keyboard.press("Enter")
        assert opened.locator(".point.picked").get_attribute("id") == other.get_attribute("id")
    opened.get_by_role("button", name="random", exact=True).click()
    assert marks.count() == len([p for p in points if p["searcher"] != "random"])
    assert complaints == []
    again = browser.new_page()
    again.goto(opened.url)
    assert f"#{again.locator('.point.picked').get_attribute('id')}" == opened.url[opened.url.index("#") :]


def test_the_dashboard_shows_each_verified_trials_pictures_and_command(page: Path, browser: Any) -> None:
    """What the dashboard's own page loads: artifacts of a trial, its note, and the study's pictures."""
    import subprocess
    import sys
    import time
    import urllib.request

    run = page.parents[1]
    port = 18431
    served = subprocess.Popen([sys.executable, "-m", "nas.cli", "dashboard", str(run), "--port", str(port)])
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(100):
            try:
                listed = json.load(urllib.request.urlopen(f"{address}/api/studies"))
                break
            except OSError:
                time.sleep(0.2)
        names = {study["study_name"]: study["study_id"] for study in listed["study_summaries"]}
        detail = json.load(urllib.request.urlopen(f"{address}/api/studies/{names['page.evolution']}?after=0"))
        verified = [trial for trial in detail["trials"] if trial["state"] == "Complete"]
        assert len(verified) == 4
        for trial in verified:
            kinds = [artifact["filename"].partition("-")[0] for artifact in trial["artifacts"]]
            assert sorted(kinds) == ["samples", "schedule"]
            assert f"--searcher evolution --trial {trial['number']} " in trial["note"]["body"]
        assert {artifact["filename"] for artifact in detail["artifacts"]} == {"front.png", "curves.png"}
        opened = browser.new_page()
        opened.goto(f"{address}/dashboard/studies/{names['page.evolution']}/trials?numbers={verified[0]['number']}")
        opened.get_by_text("samples-").first.wait_for(timeout=30_000)
        shown = "[...document.images].filter(i => i.src.includes('artifacts'))"
        opened.wait_for_function(f"{shown}.length >= 2 && {shown}.every(i => i.naturalWidth > 0)", timeout=30_000)
    finally:
        served.terminate()
        served.wait(30)


def test_a_second_report_books_nothing_twice(page: Path) -> None:
    from nas.engine.storage import open_storage

    run = page.parents[1]

    def booked() -> int:
        storage = open_storage(run)
        return sum(len(storage.get_study_system_attrs(study._study_id)) for study in storage.get_all_studies())

    before = booked()
    assert nas("report", page.parents[2] / "study.py", "--out", run, "-q").returncode == 0
    assert booked() == before


def test_the_picture_of_an_audit_shows_the_schedules_that_its_words_are_of(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The table may hold a larger audit's, too."""
    run = tmp_path / "run"
    shutil.copytree(page.parents[1], run)
    table = run / "audit" / TABLE
    facts = json.loads((run / "audit" / "audit.json").read_text())
    [*_, last] = table.read_text().splitlines()
    with table.open("a") as file:
        file.write(json.dumps({**json.loads(last), "digest": "another", "genome": [9]}) + "\n")
    drawn: list[Any] = []
    monkeypatch.setattr("nas.results.page.draw_audit", lambda rows, facts, path: drawn.append(rows))
    monkeypatch.setattr("nas.results.page._inline", lambda path: "")
    assert _audit(run, tmp_path, "fd") is not None
    assert {row["digest"] for row in drawn[0]} == {*facts["of"]}


@pytest.mark.parametrize("left", ["", '{"schedules": 12,'])
def test_a_report_does_without_an_audit_that_is_damaged(left: str, page: Path, tmp_path: Path) -> None:
    shutil.copytree(page.parents[1], tmp_path / "run")
    if left:
        (tmp_path / "run" / "audit" / "audit.json").write_text(left)
    else:
        (tmp_path / "run" / "audit" / "scores.jsonl").unlink()
    done = nas("report", page.parents[2] / "study.py", "--out", tmp_path / "run", "-q")
    assert done.returncode == 0, done.stderr
    told = (tmp_path / "run" / "report" / "index.html").read_text()
    assert "Best: fd@16, Kendall" in page.read_text()
    assert "Kendall" not in told
