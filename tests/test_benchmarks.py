"""What the benchmarks build on: the port of the published loop, and the replay of searches on a table."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import ttest_1samp

from benchmarks import (
    charged,
    common,
    cost,
    ddsm_loop,
    digits_table,
    fitted_table,
    handover,
    pareto_problems,
    search_cost_latents,
)
from benchmarks.published import NETWORKS
from evaluators.conditions import Labels
from evaluators.features import SmallClassifier
from evaluators.frechet import Frechet, Moments
from evaluators.images import Digits
from evaluators.proxies import TeacherDistance
from evaluators.sampling import DDIM, sample
from evaluators.scoring import Scores
from nas.contracts import Schedule, Step, jackknife_error
from nas.searchers.random import Random
from nas.study import Study
from search_spaces.intervals import per_step, uniform
from search_spaces.options import Options
from search_spaces.patterns import Every, Only
from search_spaces.stepwise import Stepwise
from search_spaces.supernet import Elastic
from tests.jobs import measured_or_not
from tests.labelled import NET, SPACES
from tests.test_protocol import WHOLE

ROOT = Path(__file__).parent.parent


def test_the_published_loop_at_full_width_draws_what_the_stock_model_draws(
    tiny_net: Elastic, monkeypatch: pytest.MonkeyPatch
) -> None:
    net = tiny_net.initial(0)
    model = ddsm_loop.slimmable(net.extract(net.full_arch))
    noise = torch.randn(6, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(torch, "randn", lambda *shape, device: noise)
    monkeypatch.setattr("evaluators.sampling.initial_noise", lambda *a: noise)
    timesteps = uniform(4)
    drawn = ddsm_loop.sample(model, (1.0,) * 4, timesteps, 6, net.alphas_cumprod)
    schedule = Schedule(tuple(Step(t, net.full_arch) for t in timesteps))
    assert torch.allclose(drawn, sample(net, schedule, DDIM(), 0, 0, 6), atol=1e-4)
    narrow = ddsm_loop.sample(model, (0.5, 1.0, 0.5, 0.5), timesteps, 6, net.alphas_cumprod)
    assert narrow.shape == drawn.shape
    assert not torch.allclose(narrow, drawn)
    again = ddsm_loop.sample(model, (1.0,) * 4, timesteps, 6, net.alphas_cumprod)
    assert torch.equal(again, drawn)


def test_the_published_loops_distance_is_the_frechet_distance(tiny_run: Path, tmp_path: Path) -> None:
    images = torch.from_numpy(Digits().load().pixels[:300])
    rows = SmallClassifier().load(tiny_run, torch.device("cpu"))(images).numpy()
    reference = Moments.of(rows[:200]).gaussian()
    np.savez(tmp_path / "statistics.npz", mu=reference.mean, sigma=reference.covariance)
    found = ddsm_loop.distance(images[100:], SmallClassifier(), tiny_run, tmp_path / "statistics.npz")
    assert found == pytest.approx(reference.distance(Moments.of(rows[100:]).gaussian()), rel=1e-3)


def test_a_replay_scores_and_charges_as_sampling_does(
    tiny_net: Elastic, tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = uniform(4)
    space = Stepwise(tiny_net, steps, (2, 2))
    size = digits_table.TableSize(2, 64)
    monkeypatch.setattr(digits_table.TableSize, "space", space)
    net = tiny_net.load(tiny_run / "supernet", "cpu")
    recipe = Frechet(Digits(), rungs=(8, 16), batch=8)
    evaluate = recipe.load(net, tiny_run)
    files = []
    for first in range(3):
        genomes: Any = [(first, second) for second in range(3)]
        rows = [evaluate.rows_of(space.decode(genome), 64, 5) for genome in genomes]
        np.save(tmp_path / f"{first}.npy", np.stack(rows))
        files.append(tmp_path / f"{first}.npy")
    real = SmallClassifier().load(tiny_run, torch.device("cpu"))(torch.from_numpy(Digits().load().pixels)).numpy()
    table = digits_table.Table(size, tuple(files), Moments.of(real).gaussian())
    live = replace(recipe, cache_bytes=2**29).load(tiny_net.load(tiny_run / "supernet", "cpu"), tiny_run)
    replay = digits_table.Replay(table, (8, 16, 32), shared=True, seed=None)
    for genome, samples in (((0, 1), 8), ((0, 2), 8), ((1, 2), 8), ((0, 1), 16), ((0, 0), 16)):
        schedule = space.decode(genome)
        measured, replayed = live(schedule, samples, 5), replay(schedule, samples, 5)
        assert replayed.values["fd"] == pytest.approx(measured.values["fd"], rel=1e-4)
        assert replayed.spent["macs"] == measured.spent["macs"]
    verified = replay(space.decode((0, 1)), 32, 5)
    assert verified.spent["macs"] == 32 * space.cost((0, 1))["macs"], "verification shares nothing with the search"


def test_test_problems_have_their_published_fronts() -> None:
    x = np.zeros((5, 30))
    x[:, 0] = np.linspace(0, 1, 5)
    first = x[:, 0]
    fronts = {
        1: 1 - np.sqrt(first),
        2: 1 - first**2,
        3: 1 - np.sqrt(first) - first * np.sin(10 * np.pi * first),
    }
    for number, expected in fronts.items():
        assert pareto_problems.zdt(number)(x) == pytest.approx(np.stack([first, expected], axis=1))
        assert (pareto_problems.zdt(number)(x + 0.1 * (np.arange(30) > 0))[:, 1] > expected).all()
    corners = np.full((4, 12), 0.5)
    corners[:, :2] = [[0, 0], [0, 1], [1, 0], [0.5, 0.5]]
    values = pareto_problems.dtlz2(corners)
    assert (values**2).sum(1) == pytest.approx(np.ones(4))
    assert values[0] == pytest.approx([1, 0, 0], abs=1e-12)
    corners[:, 2:] = 0.0
    assert (pareto_problems.dtlz2(corners) ** 2).sum(1) == pytest.approx(np.full(4, 3.5**2))


@pytest.mark.parametrize("seeds", [3, 8])
def test_no_loss_is_told_by_students_interval_over_training_seeds(seeds: int) -> None:
    draw = np.random.default_rng(seeds)
    theirs = draw.normal(1.0, 0.05, seeds)
    mine = theirs + draw.normal(0.0, 0.02, seeds)

    def row(value: float) -> dict[str, Any]:
        return {"fd": [value, value], "replicates": [[value - 1e-6, value + 1e-6]] * 2}

    found = handover.compared([row(x) for x in mine], [row(x) for x in theirs])
    interval = ttest_1samp(mine - theirs, 0).confidence_interval(0.95)
    assert found["of_each_training_seed"] == pytest.approx(mine - theirs)
    assert found["upper_bound_share"] == pytest.approx(interval.high / theirs.mean())
    assert found["no_loss"] == (interval.high <= 0.05 * theirs.mean())
    assert handover.compared([row(x - 0.2) for x in mine], [row(x) for x in theirs])["better"]


def test_the_error_of_sampling_can_forbid_what_training_seeds_would_allow() -> None:
    same = {"fd": [1.0], "replicates": [[0.9, 1.1]]}
    other = {"fd": [1.0], "replicates": [[1.1, 0.9]]}
    found = handover.compared([same] * 3, [other] * 3)
    assert found["spread_over_training_seeds"] == 0
    assert found["upper_bound_share"] == pytest.approx(1.96 * found["error_of_sampling"])
    assert not found["no_loss"]


def test_the_reference_takes_the_fewest_steps_that_lose_nothing_against_any_more() -> None:
    def rows(value: float) -> list[dict[str, Any]]:
        return [{"fd": [value + i], "replicates": [[value + i] * 2]} for i in range(3)]

    count, words = handover.reference({10: rows(1.3), 20: rows(1.08), 30: rows(1.0), 40: rows(1.02)})
    assert count == 20  # 4 % of the mean of 2
    assert words["worst_upper_bound_share_against_more"] == {
        "10 steps": pytest.approx(0.15),
        "20 steps": pytest.approx(0.04),
        "30 steps": pytest.approx(-0.01, abs=0.001),
        "40 steps": None,
    }


def test_a_row_says_which_commit_made_it_and_whether_code_was_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def git(*arguments: str) -> str:
        command = ["git", "-c", "user.name=a", "-c", "user.email=a@b", *arguments]
        return subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True).stdout.strip()

    results, code = tmp_path / "benchmarks" / "results", tmp_path / "code.py"
    results.mkdir(parents=True)
    monkeypatch.setattr(common, "RESULTS", results)
    files = (results / "cost.json", tmp_path / "README.md", code)
    git("init", "-q")
    for file in files:
        file.write_text("1")
    git("add", "-A")
    git("commit", "-qm", "first")
    for file in files[:2]:  # results and words about them are no code
        file.write_text("2")
    begun = common.commit()
    assert begun == git("rev-parse", "HEAD")
    git("commit", "-aqm", "words")
    assert common.commit() != begun
    assert common.same_code(begun)
    code.write_text("2")
    assert common.commit() == git("rev-parse", "HEAD") + "+"
    assert not common.same_code(begun)
    git("commit", "-aqm", "code")
    assert not common.same_code(begun)


def test_what_a_run_folder_lacks_is_not_borrowed_of_it(tmp_path: Path) -> None:
    (tmp_path / "trained" / "supernet").mkdir(parents=True)
    for _ in range(2):
        own = common.borrow(tmp_path / "trained", tmp_path / "own")
    assert [part.name for part in own.iterdir()] == ["supernet"]


@pytest.mark.parametrize("name", NETWORKS)
def test_published_networks_cost_what_is_printed_of_them(name: str) -> None:
    row = cost.beside(NETWORKS[name])
    assert row["difference"] <= 1e-4, row


def test_replicates_stay_in_runs_however_deep_they_are() -> None:
    row = {"fd": 1.0, "replicates": [1], "of": {"a": {"loss": 2.0, "replicates": [2]}, "b": [{"scores": {}, "x": 1}]}}
    assert common.short(row) == {"fd": 1.0, "of": {"a": {"loss": 2.0}, "b": [{"x": 1}]}}
    assert json.loads(common.short({"of": {"schedule": [[900, [[1.0], []]]]}})["of"]["schedule"]) == [
        [900, [[1.0], []]]
    ]
    assert common.short({"schedule": "3014bc923d406dbb"}) == {"schedule": "3014bc923d406dbb"}


POOL = """
import os, time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from benchmarks.common import end_with_parent
if __name__ == "__main__":
    with ProcessPoolExecutor(1, mp_context=get_context("spawn"), initializer=end_with_parent) as pool:
        print(pool.submit(os.getpid).result(), flush=True)
        pool.submit(time.sleep, 100).result()
"""


def test_work_ends_with_the_benchmark_that_started_it(tmp_path: Path) -> None:
    """The worker holds the other end of the pipe, so that it ends with it."""
    script = tmp_path / "pool.py"
    script.write_text(POOL)
    environment = dict(os.environ, PYTHONPATH=str(ROOT))
    with subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True, env=environment) as started:
        assert started.stdout is not None
        worker = int(started.stdout.readline())
        started.kill()
        try:
            started.communicate(timeout=60)
        except subprocess.TimeoutExpired:
            os.kill(worker, signal.SIGKILL)
            raise


@pytest.fixture
def begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where benchmarks lie, with rows and weights of one that is not finished, made elsewhere. Returns their folder."""
    monkeypatch.setattr(common, "UNFINISHED", tmp_path / "unfinished")
    monkeypatch.setattr(common, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(common, "RUNS", tmp_path / "runs")
    monkeypatch.setattr(sys, "argv", ["bench", "--json"])
    folder = tmp_path / "unfinished" / "bench"
    (folder / "run" / "supernet").mkdir(parents=True)
    (folder / "run" / "supernet" / "weights.safetensors").write_bytes(b"weights")
    (tmp_path / "results").mkdir()
    row = {"row": "first", "commit": "elsewhere", "fd": 1.0, "replicates": [1.0, 2.0]}
    rows = {"first": row, "rest on": {"row": "rest on", "commit": "elsewhere", "network": "a"}}
    (folder / "rows.json").write_text(json.dumps(rows))
    return folder


def test_rows_that_another_machine_began_are_gone_on_with(begun: Path) -> None:
    bench = common.Benchmark("bench", "")
    assert (bench.folder / "run" / "supernet" / "weights.safetensors").read_bytes() == b"weights"
    bench.rest_on(network="a")
    assert bench.row("first", lambda: {"fd": 9.0})["replicates"] == [1.0, 2.0]
    bench.row("second", lambda: {"fd": 2.0})
    assert begun.exists()
    assert common.Benchmark("bench", "").kept("second")["fd"] == 2.0
    bench.finish([])
    assert not begun.exists()
    rows = json.loads((common.RESULTS / "bench.json").read_text())["rows"]
    assert {row["row"]: row["commit"] for row in rows}["first"] == "elsewhere"


def test_what_a_stop_left_is_kept_for_another_machine(begun: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rested_on = ("run/supernet/*.*", "searches/*/*.log")
    bench = common.Benchmark("bench", "", rested_on=rested_on)
    bench.row("second", lambda: {"fd": 2.0})
    own = bench.folder / "searches" / "one"
    (bench.folder / "elsewhere").mkdir()
    (bench.folder / "elsewhere" / "other.log").write_text("not its own")
    own.mkdir(parents=True)
    (own / "journal.log").write_text("a search")
    (own / "latents.npy").write_text("made again")
    (own / "linked.log").symlink_to(bench.folder / "elsewhere" / "other.log")
    (bench.folder / "searches" / "two").symlink_to(bench.folder / "elsewhere")
    monkeypatch.setattr(sys, "argv", ["bench", "--keep"])
    with pytest.raises(SystemExit) as end:
        common.Benchmark("bench", "", rested_on=rested_on)
    assert end.value.code == 0
    kept = {str(file.relative_to(begun)) for file in begun.rglob("*") if file.is_file()}
    assert kept == {"rows.json", "run/supernet/weights.safetensors", "searches/one/journal.log"}
    shutil.rmtree(bench.folder)
    monkeypatch.setattr(sys, "argv", ["bench", "--json"])
    again = common.Benchmark("bench", "", rested_on=rested_on)
    assert again.kept("second")["fd"] == 2.0
    assert (again.folder / "searches" / "one" / "journal.log").read_text() == "a search"
    shutil.rmtree(again.folder)
    shutil.rmtree(begun)
    monkeypatch.setattr(sys, "argv", ["bench", "--keep"])
    with pytest.raises(SystemExit, match="holds no rows to keep; run the benchmark first"):
        common.Benchmark("bench", "", rested_on=rested_on)


def test_rows_that_another_machine_has_made_since_are_not_passed_over_silently(
    begun: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["bench"])
    bench = common.Benchmark("bench", "")
    assert "are not in" not in capsys.readouterr().err
    kept = json.loads((begun / "rows.json").read_text())
    (begun / "rows.json").write_text(json.dumps({**kept, "third": {**kept["first"], "row": "third"}}))
    common.Benchmark("bench", "")
    assert f"1 rows of {begun} are not in {bench.folder}, third among them" in capsys.readouterr().err


def test_what_rows_rest_on_is_not_left_behind_silently(begun: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    common.Benchmark("bench", "").rest_on(network="a")
    monkeypatch.setattr(sys, "argv", ["bench", "--keep"])
    with pytest.raises(SystemExit, match=r"rest on weights in .* by hand"):
        common.Benchmark("bench", "")
    assert (begun / "run" / "supernet" / "weights.safetensors").exists(), "what was copied so stays"


def test_rows_under_a_protocol_are_gone_on_with_whatever_they_say_themselves(begun: Path) -> None:
    """A verdict names its protocol too."""
    shutil.rmtree(begun)
    common.Benchmark("bench", "", protocol=WHOLE).reckon("verdict", {"protocol": "whole", "confirmed": True})
    again = common.Benchmark("bench", "", protocol=WHOLE)
    assert again.kept("verdict")["confirmed"]
    with pytest.raises(SystemExit, match="rows of another protocol"):
        common.Benchmark("bench", "", protocol=replace(WHOLE, margin=0.1))


def test_rows_of_a_seed_are_measured_anew(begun: Path) -> None:
    bench = common.Benchmark("bench", "")
    for seed in (1, 11):
        bench.row(f"training, seed {seed}", lambda: {"fd": 1.0})
    bench.forget(", seed 1")
    assert not bench.has("training, seed 1")
    assert bench.has("training, seed 11")
    assert bench.row("training, seed 1", lambda: {"fd": 2.0})["fd"] == 2.0
    again = common.Benchmark("bench", "")
    assert again.kept("training, seed 1")["fd"] == 2.0
    again.forget(beginning="training, seed 1")
    assert not again.has("training, seed 11")
    assert again.has("first")


def test_rows_of_other_weights_are_not_gone_on_with(begun: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit, match=r"of other weights \(network a, here b\).*--fresh"):
        common.Benchmark("bench", "").rest_on(network="b")
    monkeypatch.setattr(sys, "argv", ["bench", "--json", "--fresh"])
    fresh = common.Benchmark("bench", "")
    fresh.rest_on(network="b")
    assert not fresh.has("first")
    assert not (fresh.folder / "run").exists()


def test_what_runs_beside_a_failing_job_is_kept_and_nothing_more_begun(begun: Path, tmp_path: Path) -> None:
    bench = common.Benchmark("bench", "")
    bench.processes = 2
    jobs = {f"job {n}": (measured_or_not, n, tmp_path) for n in range(12)}
    with pytest.raises(ValueError, match="no such row"):
        bench.rows(jobs)
    assert common.Benchmark("bench", "").kept("job 1")["number"] == 1
    # Of those behind, a pool has handed one on before it is asked for.
    assert not (tmp_path / "11").exists()
    assert not bench.has("job 11")


def test_rows_are_of_the_code_that_the_benchmark_was_begun_with(
    begun: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    bench = common.Benchmark("bench", "")
    monkeypatch.setattr(common, "same_code", lambda earlier: False)
    with pytest.raises(SystemExit, match=r"no longer that of commit .* begin the command again"):
        bench.rows({"job 1": (measured_or_not, 1, tmp_path)})
    assert bench.rows({"first": (measured_or_not, 1, tmp_path)})["first"]["fd"] == 1.0


def test_a_fitted_table_says_what_it_was_told_with_the_noise_of_what_it_misses(tiny_net: Elastic) -> None:
    space = Stepwise(tiny_net, uniform(6), per_step(uniform(6)))
    options = [len(choice.options) for choice in space.choices]
    slopes = np.linspace(0.1, 0.4, len(options))
    noise = {32: 0.02, 8: 0.05}

    def told(seed: int, count: int) -> list[tuple[tuple[int, ...], int, float]]:
        """Wider is nearer; fewer images are farther by a constant factor."""
        rng = np.random.default_rng(seed)
        found = []
        for number in range(count):
            genome = tuple(int(rng.integers(n)) for n in options)
            images = 8 if number % 4 else 32
            log = 1 - float(slopes @ genome) + (0.5 if images == 8 else 0.0) + noise[images] * rng.standard_normal()
            found.append((genome, images, float(np.exp(log))))
        return found

    table = fitted_table.Fitted(fitted_table.Size(space, 32), told(0, 1200))
    genome = tuple(n - 1 for n in options)
    assert np.log(table.true(genome)) == pytest.approx(1 - slopes @ genome, abs=4 * 0.02)
    checked = table.checked(told(1, 400))
    for images, error in noise.items():
        row = checked[str(images)]
        assert row["tau"] > 0.85
        assert row["missed"] == pytest.approx(error, rel=0.25)
        assert row["missed_by_the_fit"] == pytest.approx(error, rel=0.25)
    value, replicates = table.distance(genome, 0, 8, seed=3)
    assert table.distance(genome, 0, 8, seed=3) == (value, replicates)
    assert table.distance(genome, 0, 8, seed=4) != (value, replicates)
    assert jackknife_error(replicates) == pytest.approx(value * checked["8"]["missed_by_the_fit"])
    drawn = [np.log(table.distance(genome, 0, 32, seed)[0]) for seed in range(400)]
    assert np.std(drawn) == pytest.approx(noise[32], rel=0.3)
    trials = digits_table.replayed(table, Random(), (32,), 20, 0, shared=False)
    assert len({trial.genome for trial in trials}) == 20
    for trial in trials:
        assert trial.score is not None
        assert trial.score.spent["macs"] == 32 * space.cost(trial.genome)["macs"]
    assert table.volume([genome]) == pytest.approx(
        (table.true((0,) * 6) - table.true(genome)) * (1.0001 - space.cost(genome)["macs_share"])
    )


def test_the_smallest_search_that_gets_there_is_found() -> None:
    looked: list[int] = []

    def at(reaching: set[int]) -> Any:
        looked.clear()

        def look(trials: int) -> dict[str, Any]:
            looked.append(trials)
            return {"trials": trials, "reached": trials in reaching}

        return look

    assert search_cost_latents.until(at({20, 40}), (10, 20, 30, 40))["trials"] == 20
    assert looked == [10, 20]
    assert search_cost_latents.until(at(set()), (10, 20))["trials"] == 20
    assert not search_cost_latents.until(at({10}), (10, 20), largest_first=True)["reached"]
    assert looked == [20]
    assert search_cost_latents.until(at({10, 20}), (10, 20), largest_first=True)["trials"] == 10
    assert search_cost_latents.until(at({20, 40}), (10, 20, 30, 40), every=True) == {
        "trials": 20,
        "reached": True,
        "holds_from_there_on": False,
    }
    assert looked == [10, 20, 30, 40]


def test_a_goal_is_looked_for_within_the_generation_that_reaches_it(tmp_path: Path) -> None:
    setting = search_cost_latents.Setting(tmp_path, quick=True)
    assert setting.population == 4
    values = {2: 0.999, 4: 0.5, 6: 0.95, 8: 0.995, 10: 0.2, 12: 1.0}
    asked: list[int] = []

    def of(some: Any) -> list[float]:
        asked.extend(some)
        return [values[end] for end in some]

    assert search_cost_latents.goal_of(setting, values, of) == (12, 8, 8)
    assert asked == [12, 4, 8, 6, 8], "what a generation has lost again before its end is no goal"
    values[6] = 0.991
    assert search_cost_latents.goal_of(setting, values, of) == (12, 8, 6)


def test_what_is_known_is_charged_as_though_it_were_made_here(
    tiny_study: Study, tiny_run: Path, tmp_path: Path
) -> None:
    """With memory for some of the states alone, so that which of them are kept decides what is charged; after a stop in the middle of a line too."""
    images, space = tiny_study.images, tiny_study.space

    def loaded(number: int) -> Any:
        recipe = Frechet(images, tiny_study.evaluator.features, rungs=(16, 48), cache_bytes=40_000 + number)  # type: ignore[attr-defined]
        return replace(tiny_study, evaluator=recipe).load(tiny_run, "cpu")

    rng = np.random.default_rng(0)
    schedules = [
        space.decode(tuple(int(rng.integers(len(choice.options))) for choice in space.choices)) for _ in range(12)
    ]
    asked = [(schedule, int(rng.choice([16, 48])), int(rng.integers(2))) for schedule in 3 * schedules]
    plain, file = loaded(0), tmp_path / "scores.jsonl"
    wanted = [plain(*one) for one in asked]
    assert plain.trajectories.meter.cached_macs > 0

    def kept_of(number: int) -> charged.Charged:
        evaluate = loaded(number)
        return charged.Charged(evaluate, charged.silent(evaluate), charged.Kept(file))

    first = kept_of(1)
    for one in asked[:20]:
        first(*one)
    file.write_text(file.read_text()[:-9])
    for number in (2, 3):
        told = kept_of(number)
        for one, score in zip(asked, wanted, strict=True):
            found = told(*one)
            assert (found.values, found.replicates, found.labels) == (score.values, score.replicates, score.labels)
            assert {**found.spent, "seconds": 0} == {**score.spent, "seconds": 0}
    keys = [json.loads(line)["key"] for line in file.read_text().splitlines() if line.endswith("}")]
    assert len(keys) == len({*keys}) == len({(schedule.digest, rung, seed) for schedule, rung, seed in asked})


BLOCKS = Stepwise(
    NET,
    uniform(6),
    (1,) * 6,
    Options((1.0,)),
    guidance=(None, 1.5),
    patterns=(Every(1), Only(("u1",)), Only(("d0", "u1"))),
)


@pytest.mark.parametrize("of", [BLOCKS, SPACES["and reuse, held"]], ids=["by step", "held"])
def test_what_reuses_is_charged_as_though_it_were_made_here(of: Stepwise, labelled_run: Path, tmp_path: Path) -> None:
    """As much is kept to be reused, of guided steps and others, and the full model's samples once."""
    images, rng = Digits(), np.random.default_rng(0)
    asked = [
        (
            of.decode(tuple(int(rng.integers(len(choice.options))) for choice in of.choices)),
            int(rng.choice([16, 48])),
            3,
        )
        for _ in range(24)
    ]

    def loaded(number: int, net: Any) -> Any:
        recipe = Scores(
            (
                TeacherDistance(
                    images,
                    rungs=(16, 48),
                    conditions=Labels(images),
                    timesteps=of.timesteps,
                    guidance=2.0,
                    cache_bytes=300_000 + number,
                ),
            )
        )
        return recipe.load(net, labelled_run)

    net = NET.load(labelled_run / "supernet", "cpu")
    plain = loaded(0, net)
    wanted = [plain(*one) for one in asked]
    assert any(step.reuse for schedule, *_ in asked for step in schedule.steps)
    assert sum(score.spent["cached_macs"] for score in wanted) > 0
    for number in (1, 2):
        told = charged.Charged(
            loaded(0, net) if number == 1 else None,  # type: ignore[arg-type]  # all is known
            loaded(number, charged.Silent(net)),
            charged.Kept(tmp_path / "scores.jsonl"),
        )
        for one, score in zip(asked, wanted, strict=True):
            found = told(*one)
            assert found.values == score.values
            assert {**found.spent, "seconds": 0} == {**score.spent, "seconds": 0}


def test_a_share_of_hypervolumes_has_the_error_of_noises_that_both_share() -> None:
    rng = np.random.default_rng(0)
    common = 1 + 0.1 * rng.standard_normal(20)
    own = 0.01 * rng.standard_normal(20)

    def volume(scale: float, extra: Any = 0.0) -> Any:
        return search_cost_latents.Volume(scale, tuple((scale * common + extra).tolist()))

    share, error = search_cost_latents.share_of([volume(1.0), volume(2.0)], [volume(2.0), volume(1.0)])
    assert share == pytest.approx(1)
    assert error == pytest.approx(0, abs=1e-9)
    _, apart = search_cost_latents.share_of([volume(1.0, own)], [volume(1.0)])
    assert apart == pytest.approx(jackknife_error((own / common).tolist()), rel=1e-6)
