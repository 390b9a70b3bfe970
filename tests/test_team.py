"""Several processes train one supernet, as one would."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from evaluators.images import Digits
from nas.contracts import UserError
from nas.engine.ledger import read_ledgers
from nas.engine.storage import open_storage
from search_spaces.supernet import Elastic
from search_spaces.training import Sandwich
from search_spaces.training.stages import Checkpoints
from search_spaces.training.team import Team
from tests.conftest import TINY

ROOT = Path(__file__).parent.parent
TRAIN = """
import os
import sys
from pathlib import Path
import torch
from evaluators.images import Digits
from search_spaces.supernet import Elastic
from search_spaces.training import Sandwich, Stages
from tests.conftest import TINY
torch.set_num_threads(1)
several = os.environ["WORLD_SIZE"] != "1"
net = Elastic(TINY, widths=(0.25, 0.5, 1.0), groups="count")
steps = int(sys.argv[2])
training = Stages((Sandwich(steps=steps, batch=16, warmup=2, learning_rate=2e-4, distillation=0.3), Sandwich(steps=2, batch=16, learning_rate=2e-4)), 3)
for tick in training.run(net, Digits(), Path(sys.argv[1]) / "supernet", 0, "cpu"):
    print(tick.what, tick.done, *tick.values.values())
    if len(sys.argv) > 3 and tick.done == int(sys.argv[3]):
        sys.exit("stopped")
if several:
    import accelerate
    layer = accelerate.Accelerator(cpu=True).prepare(torch.nn.Linear(2, 2))
    assert type(layer) is torch.nn.Linear, "what is trained later is this process's own"
"""


def trained(folder: Path, *arguments: str, processes: int = 2) -> list[str]:
    """By so many processes, as a launcher starts them; what each prints."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    running = []
    for rank in range(processes):
        place = {"WORLD_SIZE": str(processes), "RANK": str(rank), "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1"}
        environment = {**os.environ, **place, "MASTER_PORT": port, "ACCELERATE_USE_CPU": "true"}
        command = [sys.executable, "-c", TRAIN, str(folder), *arguments]
        running.append(subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True))
    try:
        said = [process.communicate(timeout=120)[0] for process in running]
        assert [process.returncode for process in running] == [int(len(arguments) > 1)] * processes  # told to stop
        return said
    finally:
        for process in running:
            process.kill()
            process.wait()


def test_multiply_adds_may_be_more_than_64_bits_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of a long training of a large network."""
    many, device = 5 * 2**63 + 12345, torch.device("cpu")
    assert Team().sum_of(many, device) == many
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda whole: whole.mul_(3))  # as of three alike
    assert Team(0, 3).sum_of(many, device) == 3 * many


@pytest.mark.long
def test_two_processes_train_what_one_trains(tmp_path: Path) -> None:
    [alone] = trained(tmp_path / "one", "6", processes=1)
    first, second = trained(tmp_path / "two", "6")
    assert first == second  # the losses of both shares
    for mine, theirs in zip(first.splitlines(), alone.splitlines(), strict=True):
        assert [float(n) for n in mine.split()[1:]] == pytest.approx([float(n) for n in theirs.split()[1:]], rel=1e-5)
    one, two = (load_file(tmp_path / name / "supernet" / "weights.safetensors") for name in ("one", "two"))
    # Adam moves a weight by up to the learning rate whatever its gradient, whose rounding then shows where it is nearly zero.
    assert max(float((one[name] - two[name]).abs().max()) for name in one) <= 1e-5
    spent = [json.loads((tmp_path / name / "supernet" / "training.json").read_text()) for name in ("one", "two")]
    assert [stage["macs"] for stage in spent[0]] == [stage["macs"] for stage in spent[1]]


@pytest.mark.long
def test_two_processes_that_are_stopped_go_on_bit_for_bit(tmp_path: Path) -> None:
    trained(tmp_path / "two", "6")
    two = load_file(tmp_path / "two" / "supernet" / "weights.safetensors")
    trained(tmp_path / "stopped", "6", "4")
    assert not (tmp_path / "stopped" / "supernet" / "weights.safetensors").exists()
    again, _ = trained(tmp_path / "stopped", "6")
    assert again.splitlines()[0].startswith("supernet 5 ")
    stopped = load_file(tmp_path / "stopped" / "supernet" / "weights.safetensors")
    assert all(torch.equal(stopped[name], two[name]) for name in two)


@pytest.mark.long
def test_the_command_is_launched_in_two_processes_of_which_one_searches(tmp_path: Path) -> None:
    (tmp_path / "study.py").write_text("from tests.conftest import tiny\nstudy = tiny()\n")
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", "-m", "nas.cli"]
    command = [*launcher, "run", str(tmp_path / "study.py"), "--out", str(tmp_path / "run"), "--trials", "4"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "supernet" / "weights.safetensors").exists()
    ledgers = read_ledgers(open_storage(tmp_path / "run"))
    [ledger] = [trials for info, trials in ledgers if info.searcher == "evolution"]
    assert len({trial.number for trial in ledger}) == len(ledger) >= 4


def test_shares_are_whole_and_no_process_has_none(tmp_path: Path) -> None:
    assert [[*Team(rank, 3).mine(range(7))] for rank in range(3)] == [[0, 3, 6], [1, 4], [2, 5]]
    net = Elastic(TINY, widths=(0.5, 1.0), groups="count").initial(0)
    files = Checkpoints(tmp_path / "checkpoint", "", 10, Team(0, 4))
    stage = Sandwich(steps=1, batch=6, accumulate=2)
    with pytest.raises(UserError, match="4 processes, each with accumulate=2 parts of a batch of 6"):
        next(stage.fit(net, Digits().load(), 0, files))
    assert not (tmp_path / "checkpoint").exists()
