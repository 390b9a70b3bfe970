"""The commands as a user runs them: good input, bad input, a fresh interpreter for what is exported."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from diffusers import DDIMPipeline
from PIL import Image

from nas import cli
from nas.contracts import Trial
from nas.engine.ledger import read_ledgers
from nas.engine.storage import lock_run, open_storage
from nas.library import open_run
from nas.results.report import Run
from nas.study import load_study
from nas.testing import check_space
from tests.arithmetic import SAMPLES

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True, scope="module")
def wide() -> Iterator[None]:
    """Tables as on a wide terminal."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", "160")
        yield


STUDY = """
from evaluators.frechet import Frechet
from evaluators.images import {images}
from evaluators.proxies import TeacherDistance
from nas.searchers.evolution import Evolution
from nas.study import Study
from search_spaces.intervals import per_step, uniform
from search_spaces.stepwise import Stepwise
from search_spaces.supernet import Elastic
from search_spaces.training import Sandwich
from tests.conftest import TINY

images = {images_call}
net = Elastic(TINY, widths={widths})
steps = uniform(4)
study = Study(
    name="tiny", space=Stepwise(net, steps, per_step(steps)), supernet=net, images=images,
    training=Sandwich(steps={steps}, batch=16, warmup=5, checkpoint_every=10),
    evaluator=Frechet(images, rungs=(32, 64)), searchers={{"evolution": Evolution(population=6)}},
    limits={{"macs_share": {limit}}}, trials=10, verified=3,
    proxies={proxies},
)
"""


def study_file(folder: Path, name: str = "study.py", **changes: object) -> Path:
    settings = {"images": "Digits", "images_call": "Digits()", "widths": (0.25, 0.5, 1.0), "steps": 40, "limit": 0.6}
    settings["proxies"] = '{"fd@16": Frechet(images, rungs=(16,)), "teacher": TeacherDistance(images, rungs=(16,))}'
    path = folder / name
    path.write_text(STUDY.format(**{**settings, **changes}))
    return path


@dataclass(frozen=True)
class Result:
    returncode: int
    stdout: str
    stderr: str


def nas(*arguments: object) -> Result:
    """The command in this process, from `main` on; only what needs a process of its own starts one below."""
    out, err = io.StringIO(), io.StringIO()
    argv, sys.argv = sys.argv, ["nas", *map(str, arguments)]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            cli.main()
        code = 0
    except SystemExit as end:
        code = int(end.code or 0)
    finally:
        sys.argv = argv
    return Result(code, out.getvalue(), err.getvalue())


def refused(result: Result, message: str) -> None:
    """One clear message, a non-zero exit, no traceback."""
    assert result.returncode == 1, result
    assert "Traceback" not in result.stderr
    assert result.stderr.strip().startswith("error: "), result.stderr
    assert re.search(message, result.stderr), result.stderr
    assert len(result.stderr.strip().splitlines()) == 1, result.stderr


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a study file and the run that `nas run` made of it."""
    folder = tmp_path_factory.mktemp("workplace")
    result = nas("run", study_file(folder), "--out", folder / "run")
    assert result.returncode == 0, result.stderr
    assert "best verified fd" in result.stdout
    return folder


def test_help_everywhere() -> None:
    commands = [
        command.name or command.callback.__name__ for command in cli.app.registered_commands if command.callback
    ]
    assert {"run", "tune", "confirm", "train"} <= {*commands}
    for command in ([], *([name] for name in commands)):
        result = nas(*command, "--help")
        assert result.returncode == 0
        assert "Usage" in result.stdout


def test_the_same_command_again_evaluates_nothing(workplace: Path) -> None:
    before = read_ledgers(open_storage(workplace / "run"))
    result = nas("run", workplace / "study.py", "--out", workplace / "run", "--quiet")
    assert result.returncode == 0
    assert result.stdout == ""
    assert read_ledgers(open_storage(workplace / "run")) == before


def test_status_reads_the_folder_without_torch_or_ray(workplace: Path) -> None:
    result = nas("status", workplace / "run", "--json")
    facts = json.loads(result.stdout)
    rows = {row["searcher"]: row for row in facts["searchers"]}
    assert rows["evolution"]["proposed"] == rows["evolution"]["planned"] == 10
    assert rows["evolution"]["verified"] >= 1
    assert rows["uniform"]["verified"] == rows["uniform"]["scored"] == 3
    script = "import sys, nas.cli\nsys.argv[1:] = ['status', sys.argv[1]]\ntry: nas.cli.main()\nexcept SystemExit: pass\nprint(sorted({'torch', 'ray', 'diffusers'} & set(sys.modules)))"
    bare = subprocess.run([sys.executable, "-c", script, workplace / "run"], capture_output=True, text=True, check=True)
    assert bare.stdout.strip().endswith("[]")
    assert "evolution" in bare.stdout


def test_compare_is_a_table_a_picture_and_json(workplace: Path) -> None:
    result = nas("compare", workplace / "run", "--json")
    facts = json.loads(result.stdout)
    assert facts["label"].startswith("FD@64 (small classifier")
    evolution = next(row for row in facts["searchers"] if row["searcher"] == "evolution")
    assert evolution["hypervolume"] > 0
    assert evolution["spent"]["macs"] > 0
    best = evolution["best_within"]["0.6"]
    assert best["macs_share"] <= 0.6
    assert best["error"] > 0
    with Image.open(facts["picture"]) as picture:
        assert picture.size[0] > 800
    table = nas("compare", workplace / "run").stdout
    assert f"#{best['trial']}" in table


def test_compare_says_in_words_what_cannot_be_told_apart(workplace: Path) -> None:
    facts = json.loads(nas("compare", workplace / "run", "--json").stdout)
    members = [m for row in facts["searchers"] for m in row["front"] if m["against_cheaper"]]
    members += [m for row in facts["searchers"] for m in row["best_within"].values() if m and m.get("against_leader")]
    compared = [member.get("against_cheaper") or member["against_leader"] for member in members]
    assert compared
    ledgers = {info.searcher: trials for info, trials in Run.open(workplace / "run").ledgers}
    row, member = next((r, m) for r in facts["searchers"] for m in r["front"] if m["against_cheaper"])
    trials = {trial.number: trial for trial in ledgers[row["searcher"]]}
    found = member["against_cheaper"]
    mine, theirs = trials[member["trial"]].score, trials[found["trial"]].score
    assert mine is not None
    assert theirs is not None
    assert (found["difference"], found["error"]) == pytest.approx(mine.difference(theirs, "fd"))
    for found in compared:
        assert found["conclusive"] == (abs(found["difference"]) > 2 * found["error"])
        assert ("inconclusive at 64 samples: " in found["words"]) == (not found["conclusive"])
    text = nas("compare", workplace / "run").stdout
    assert ("inconclusive at 64 samples" in text) == any(not found["conclusive"] for found in compared)


def test_a_search_that_predicts_reports_how_well(tmp_path: Path) -> None:
    (tmp_path / "study.py").write_text("from tests.toy import toy_study\nstudy = toy_study(trials=50)\n")
    result = nas("run", tmp_path / "study.py", "--out", tmp_path / "run", "--searcher", "knapsack")
    assert result.returncode == 0, result.stderr
    assert "knapsack: predicted against measured scores of 12 schedules: R²" in result.stdout
    few = nas("run", tmp_path / "study.py", "--out", tmp_path / "few", "--searcher", "knapsack", "--trials", 20)
    assert "knapsack: 20 trials were probes and next to none made use of them; raise --trials" in few.stdout


def test_an_audit_is_a_table_a_picture_and_json(workplace: Path) -> None:
    arguments = ("audit", workplace / "study.py", "--out", workplace / "run", "--schedules", 12)
    result = nas(*arguments)
    assert result.returncode == 0, result.stderr
    assert "regret" in result.stdout
    facts = json.loads(nas(*arguments, "--json").stdout)
    assert {row["proxy"] for row in facts["proxies"]} == {"fd@16", "teacher"}
    assert facts["schedules"] == 12
    shares = {row["proxy"]: row["macs_share"] for row in facts["proxies"]}
    assert shares["fd@16"] == pytest.approx(0.25)
    with Image.open(facts["picture"]) as picture:
        assert picture.size[0] > 800
    bare = study_file(workplace, "bare.py", proxies="{}")
    refused(nas("audit", bare, "--out", workplace / "run"), "names no proxies")


FRESH = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("nas", "search_spaces", "evaluators"):
            raise ImportError(name + " must not be needed")
sys.meta_path.insert(0, Refuse())
import re, pathlib
exec(re.search(r"```python\\n(.*?)```", pathlib.Path("README.md").read_text(), re.S).group(1))
import numpy as np
np.save(sys.argv[1], images.numpy() * 2 - 1)
"""


@pytest.mark.long
def test_an_exported_model_needs_nothing_of_this_project(workplace: Path, tmp_path: Path) -> None:
    study, run = workplace / "study.py", workplace / "run"
    result = nas("export", study, "--within", "macs_share=0.6", "--to", tmp_path / "model", "--out", run, "--programs")
    assert result.returncode == 0, result.stderr
    searcher, trial = re.search(r"\.(\w+) trial (\d+)", result.stdout).groups()  # type: ignore[union-attr]
    same = (study, "--searcher", searcher, "--trial", trial, "--out", run)
    subprocess.run([sys.executable, "-c", FRESH, tmp_path / "theirs.npy"], cwd=tmp_path / "model", check=True)
    result = nas("sample", *same, "--count", 16, "--to", tmp_path / "ours.npy")
    assert result.returncode == 0, result.stderr
    theirs, ours = np.load(tmp_path / "theirs.npy"), np.load(tmp_path / "ours.npy")
    assert ours.shape == (16, 1, 8, 8)
    assert np.abs(theirs - ours).max() <= SAMPLES
    plan = json.loads((tmp_path / "model" / "schedule.json").read_text())
    assert [step["timestep"] for step in plan["steps"]] == [999, 749, 499, 249]
    assert {step["model"] for step in plan["steps"]} == {path.name for path in (tmp_path / "model").glob("unet_*")}
    provenance = json.loads((tmp_path / "model" / "provenance.json").read_text())
    assert max(provenance["parity"].values()) <= 1e-5
    assert provenance["trial"] == int(trial)
    assert provenance["versions"]["diffusers"]
    refused(nas("export", *same, "--to", tmp_path / "model"), "is not empty; give --to")
    files = {
        "README.md",
        "exported.py",
        "graph.py",
        "latents.py",
        "model_index.json",
        "pictures.py",
        "pipeline.py",
        "provenance.json",
        "reuse.py",
        "sample.py",
        "samples.png",
        "schedule.svg",
        "schedule.json",
        "scheduler",
        "stepping.py",
        "texts.py",
        "walks.py",
    }
    names = {path.name for path in (tmp_path / "model").iterdir() if not path.name.startswith("unet_")}
    assert names - {"teacher"} == files | {"train.json", "train_data.py", "train_diffusers.py"}
    picture = nas("sample", *same, "--to", tmp_path / "grid.png")
    assert picture.returncode == 0
    with Image.open(tmp_path / "grid.png") as grid:
        assert grid.size == ((8 * 9 - 1) * 12, (8 * 9 - 1) * 12)


def test_one_network_at_all_steps_is_exported_as_diffusers_own_pipeline(workplace: Path, tmp_path: Path) -> None:
    study, run = workplace / "study.py", workplace / "run"
    space = load_study(str(study)).space
    ledgers = {info.searcher: trials for info, trials in Run.open(run).ledgers}

    def networks(trial: Trial) -> int:
        return len(set(space.decode(trial.genome).archs))

    def exported(searcher: str, trial: Trial, name: str) -> Result:
        which = ("--searcher", searcher, "--trial", trial.number, "--out", run)
        return nas("export", study, *which, "--to", tmp_path / name, "--stock")

    done = {name: [t for t in trials if t.status == "complete"] for name, trials in ledgers.items()}
    alike = next(t for t in done["uniform"] if networks(t) == 1)
    result = exported("uniform", alike, "stock")
    assert result.returncode == 0, result.stderr
    assert "DDIMPipeline: call it with num_inference_steps=4" in result.stderr
    pipeline = DDIMPipeline.from_pretrained(tmp_path / "stock")
    assert pipeline(batch_size=2, num_inference_steps=4, output_type="np").images.shape == (2, 8, 8, 1)
    mixed = next(t for t in done["evolution"] if networks(t) > 1)
    refused(exported("evolution", mixed, "mixed"), rf"runs {networks(mixed)} networks; export it without --stock")
    assert not (tmp_path / "mixed").exists()


def test_paths_are_printed_as_they_are(workplace: Path, tmp_path: Path) -> None:
    """Brackets are no markup."""
    place = tmp_path / "[v2] [/b]"
    shutil.copytree(workplace / "run", place)
    for command in (("status", place), ("compare", place)):
        result = nas(*command)
        assert result.returncode == 0, result.stderr
    assert f"front: {place}" in result.stdout


def test_within_a_budget_all_searchers_compete_unless_one_is_named(workplace: Path) -> None:
    ledgers = {info.searcher: trials for info, trials in Run.open(workplace / "run").ledgers}
    assert len(ledgers) > 1

    def best(*names: str) -> float:
        within = [t for name in names for t in ledgers[name] if t.status == "complete" and t.cost["macs_share"] <= 0.6]
        return min(t.score.values["fd"] for t in within if t.score)

    study = load_study(str(workplace / "study.py"))
    for names in [tuple(ledgers), *((name,) for name in ledgers)]:
        named = names[0] if len(names) == 1 else None
        found = open_run(study, workplace / "run").best(named, again=False, macs_share=0.6)
        assert found.trial.objectives(("fd",))[0] == best(*names)
        assert found.trial in ledgers[found.ledger.rpartition(".")[2]]


def test_bad_choices_of_a_trial_are_refused(workplace: Path, tmp_path: Path) -> None:
    common = (workplace / "study.py", "--to", tmp_path / "x", "--out", workplace / "run")
    refused(nas("export", *common), "either --trial N or --within")
    refused(nas("export", *common, "--trial", 999), "no scored trial 999")
    refused(nas("export", *common, "--within", "macs_share=0.0001"), "the cheapest has macs_share=")
    refused(nas("export", *common, "--within", "watts=3"), "'watts' is not a cost")
    refused(nas("export", *common, "--within", "half"), "is not COST=LIMIT")
    refused(nas("export", *common, "--trial", 0, "--searcher", "random"), "no trials of searcher random")
    refused(
        nas("sample", workplace / "study.py", "--trial", 0, "--to", tmp_path / "x.gif"), r"must end in \.png or \.npy"
    )
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("file", sorted((ROOT / "studies").glob("digits*.py")), ids=lambda path: path.stem)
def test_the_studies_of_this_repository_load_and_keep_the_laws_of_spaces(file: Path) -> None:
    check_space(load_study(file).space)


def test_bad_studies_are_refused(tmp_path: Path) -> None:
    out = ("--out", tmp_path / "run")
    refused(nas("run", tmp_path / "none.py", *out), r"none\.py does not exist")
    (tmp_path / "empty.py").write_text("x = 1\n")
    refused(nas("run", tmp_path / "empty.py", *out), "defines no `study`")
    (tmp_path / "broken.py").write_text("import nothing_like_this\n")
    refused(nas("run", tmp_path / "broken.py", *out), "fails in line 1: ModuleNotFoundError")
    refused(
        nas("run", study_file(tmp_path, limit=0.01), *out),
        "macs_share=0.01 cannot be met: the cheapest schedule, 0.25 everywhere, costs macs_share=0.0",
    )
    refused(
        nas("run", study_file(tmp_path), "--searcher", "magic", *out),
        "no searcher is called 'magic'; use one of ddsm, enumerate, evolution, gates, knapsack, .*routing",
    )
    refused(nas("run", study_file(tmp_path), "--device", "cuda:7", *out), "device 'cuda:7' cannot be used")
    (tmp_path / "pictures").mkdir()
    for i in range(20):
        Image.new("L", (8, 8), i).save(tmp_path / "pictures" / f"{i:02d}.png")
    (tmp_path / "pictures" / "07.png").write_bytes(b"broken")
    call = f'ImageFolder("{tmp_path}/pictures", (8, 8), channels=1)'
    refused(
        nas("run", study_file(tmp_path, images="ImageFolder", images_call=call), *out),
        r"07\.png cannot be read as an image",
    )
    refused(nas("status", tmp_path), "is no run folder")
    refused(nas("run", study_file(tmp_path), "--out", tmp_path / "study.py"), "choose another path")


def test_bad_run_folders_are_refused_and_the_ledger_stays(workplace: Path, tmp_path: Path) -> None:
    study, run = workplace / "study.py", workplace / "run"
    before, facts = (run / "journal.log").read_bytes(), (run / "study.json").read_bytes()
    lock = lock_run(run)
    refused(nas("run", study, "--out", run), f"in use by process {os.getpid()}")
    lock.release()
    refused(
        nas("run", study, "--out", run, "--storage", "postgresql+psycopg://a:secret@127.0.0.1:1/x"), "cannot be opened"
    )
    other = study_file(tmp_path, steps=50)
    refused(nas("run", other, "--out", run), "was trained with another network, training, seed or images")
    weights = run / "supernet" / "weights.safetensors"
    whole = weights.read_bytes()
    changed = bytearray(whole)
    changed[-1] ^= 1
    weights.write_bytes(changed)
    refused(nas("run", study, "--out", run), "ledger tiny.uniform was written for something else: supernet was")
    weights.write_bytes(whole)
    assert (run / "journal.log").read_bytes() == before
    assert (run / "study.json").read_bytes() == facts
    assert nas("run", study, "--out", run, "--quiet").returncode == 0


def test_a_truncated_checkpoint_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run" / "supernet").mkdir(parents=True)
    checkpoint = tmp_path / "run" / "supernet" / "checkpoint.safetensors"
    checkpoint.write_bytes(b"\x10\x00\x00\x00\x00\x00\x00\x00{")
    refused(nas("run", study_file(tmp_path), "--out", tmp_path / "run", "--quiet"), "is damaged")
    assert checkpoint.exists()


def test_another_seed_and_a_database_have_ledgers_of_their_own(workplace: Path, tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/ledger.db"
    study, run = workplace / "study.py", workplace / "run"
    result = nas(
        "run", study, "--out", run, "--seed", 1, "--searcher", "random", "--trials", 4, "--storage", url, "--quiet"
    )
    assert result.returncode == 0, result.stderr
    facts = json.loads(nas("status", run, "--storage", url, "--json").stdout)
    assert [row["searcher"] for row in facts["searchers"]] == ["uniform", "random (seed 1)"]
    assert nas("run", study, "--out", run, "--quiet").returncode == 0
    assert len(json.loads(nas("status", run, "--json").stdout)["searchers"]) == 2


def test_the_dashboard_serves_the_run(workplace: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "nas.cli", "dashboard", str(workplace / "run"), "--port", str(port)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 60
        while True:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/api/studies", timeout=5) as answer:
                    studies = json.load(answer)["study_summaries"]
                break
            except OSError:
                assert time.monotonic() < deadline
                assert process.poll() is None
                time.sleep(0.2)
        assert {study["study_name"] for study in studies} == {"tiny.uniform", "tiny.evolution", "tiny.confirmed"}
        assert all(study["directions"] == ["minimize", "minimize"] for study in studies)
    finally:
        process.terminate()
        process.wait(timeout=30)


def test_intervals_divide_the_timesteps_and_say_how_well(workplace: Path) -> None:
    command = ("intervals", workplace / "study.py", "--out", workplace / "run", "--grid", 6, "--count", 2)
    result = nas(*command)
    assert result.returncode == 0, result.stderr
    assert "gradients: intervals=bounded(timesteps, (" in result.stdout
    folder = workplace / "run" / "intervals"
    kept = {path: path.read_bytes() for path in folder.glob("*.json")}
    with Image.open(folder / "intervals.png") as picture:
        assert picture.size[0] > 1000
    again = nas(*command, "--json")
    facts = json.loads(again.stdout)
    assert {path: path.read_bytes() for path in folder.glob("*.json")} == kept
    assert [row["partition"] for row in facts["rows"]] == [
        *("equal steps", "even timesteps", "equal SNR", "gradients", "sensitivity", "one for each step")
    ]
    assert facts["share"] == 0.6
    assert all(row["macs_share"] <= 0.6 for row in facts["rows"])
    assert facts["rows"][0]["difference"] == 0.0
    assert len(facts["affinity"]) == 6


def test_scripts_read_what_was_handed_over(workplace: Path, tmp_path: Path) -> None:
    study, run = workplace / "study.py", workplace / "run"
    handed = nas("export", study, "--within", "macs_share=0.6", "--to", tmp_path / "model", "--out", run, "--json")
    assert handed.returncode == 0, handed.stderr
    told = json.loads(handed.stdout)
    origin = json.loads((tmp_path / "model" / "provenance.json").read_text())
    assert (told["ledger"], told["trial"], told["genome"]) == (origin["ledger"], origin["trial"], origin["genome"])
    assert told["folder"] == str(tmp_path / "model")
    assert told["cost"]["macs_share"] <= 0.6
    which = ("--searcher", told["ledger"].split(".")[1], "--trial", told["trial"], "--out", run)
    drawn = nas("sample", study, *which, "--count", 2, "--to", tmp_path / "two.npy", "--json")
    assert drawn.returncode == 0, drawn.stderr
    both = json.loads(drawn.stdout)
    assert {**both, "scores": told["scores"]} == {
        **{name: value for name, value in told.items() if name != "folder"},
        "file": str(tmp_path / "two.npy"),
        "images": 2,
    }


def test_a_quiet_dry_run_says_nothing(workplace: Path) -> None:
    quiet = nas("run", workplace / "study.py", "--dry-run", "--throughput", 1e9, "-q")
    assert (quiet.returncode, quiet.stdout, quiet.stderr) == (0, "", "")


def test_a_command_that_loads_for_long_says_so_at_once_unless_it_is_quiet(tmp_path: Path) -> None:
    (tmp_path / "study.py").write_text("import time, torch\ntime.sleep(1.5)\nstudy = None\n")

    def said(*options: str) -> str:
        command = [sys.executable, "-m", "nas.cli", "run", str(tmp_path / "study.py"), "--dry-run", *options]
        return subprocess.run(command, check=False, capture_output=True, text=True).stderr

    assert said().startswith("loading torch")
    assert said("--quiet").startswith("error: ")
