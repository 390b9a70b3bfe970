from __future__ import annotations

import importlib.util
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings

from evaluators.frechet import Frechet
from evaluators.images import Digits
from nas.searchers.evolution import Evolution
from nas.study import Study
from search_spaces.intervals import per_step, uniform
from search_spaces.loaded import LoadedElastic
from search_spaces.stepwise import Stepwise
from search_spaces.supernet import Elastic
from search_spaces.training import Sandwich

torch.set_num_threads(1)
# A shell without job control starts what is in the background deaf to Ctrl-C, and so would be every process that a test starts.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
settings.register_profile("ci", deadline=None, max_examples=25, derandomize=True)
settings.load_profile("ci")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files of many lines first, which take longest as a rule: begun last, one would run on alone beside an idle worker."""
    items.sort(key=lambda item: (-item.path.stat().st_size, item.path))


TINY = {
    "sample_size": 8,
    "in_channels": 1,
    "out_channels": 1,
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "norm_num_groups": 2,
    "attention_head_dim": 4,
}


def tiny() -> Study:
    """Real images, network, training and evaluator, only small."""
    net = Elastic(TINY, widths=(0.25, 0.5, 1.0), groups="count")
    images, steps = Digits(), uniform(4)
    return Study(
        name="tiny",
        space=Stepwise(net, steps, per_step(steps)),
        supernet=net,
        images=images,
        training=Sandwich(steps=20, batch=16, warmup=5, checkpoint_every=10),
        evaluator=Frechet(images, rungs=(32, 64)),
        searchers={"evolution": Evolution(population=6)},
        limits={"macs_share": 0.6},
        trials=10,
        verified=3,
    )


@pytest.fixture(scope="session")
def tiny_study() -> Study:
    return tiny()


@pytest.fixture(scope="session")
def tiny_net(tiny_study: Study) -> Elastic:
    net = tiny_study.supernet
    assert isinstance(net, Elastic)
    return net


@pytest.fixture(scope="session")
def tiny_run(tiny_study: Study, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder of the tiny study, searched to its end."""
    from nas.engine.session import open_session

    folder = tmp_path_factory.mktemp("tiny-run")
    with open_session(tiny_study, folder) as session:
        for _ in session.prepare(threads=1):
            pass
        for name in ("uniform", "evolution"):
            session.run(session.conductor(name))
    return folder


@pytest.fixture(scope="session")
def text_pipelines(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds "sd" and "xl", of small networks."""
    from tests.pipelines import stable_diffusion, stable_diffusion_xl

    where = tmp_path_factory.mktemp("pipelines")
    stable_diffusion(where / "sd")
    stable_diffusion_xl(where / "xl")
    return where


@pytest.fixture(scope="session")
def labelled() -> LoadedElastic:
    """A small network that takes labels, of random weights."""
    from tests.labelled import NET
    from tests.test_supernet import randomised

    found: LoadedElastic = randomised(NET)
    return found


@pytest.fixture(scope="session")
def labelled_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, trained a little."""
    from tests.labelled import NET

    folder = tmp_path_factory.mktemp("conditional")
    training = Sandwich(steps=12, batch=16, warmup=2, checkpoint_every=5)
    for _ in training.run(NET, Digits(), folder / "supernet", 0, "cpu"):
        pass
    return folder


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[Any]:
    """Two nodes of one CPU each on this machine, joined by this process."""
    import nas.engine.cluster  # noqa: F401  sets Ray's environment before Ray is imported
    import ray  # isort: skip
    from ray.cluster_utils import Cluster  # isort: skip

    cluster = Cluster(
        initialize_head=True,
        head_node_args={"num_cpus": 1, "include_dashboard": False, "object_store_memory": 80 * 2**20},
    )
    cluster.add_node(num_cpus=1, object_store_memory=80 * 2**20)
    ray.init(address=cluster.address, log_to_driver=False, logging_level="error")
    yield cluster
    ray.shutdown()
    cluster.shutdown()


@pytest.fixture(scope="session")
def tool(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The module that applies schedules as people get it, in one file."""
    from tests.test_portable import CODE

    path = tmp_path_factory.mktemp("module") / "apply_schedule.py"
    path.write_text(CODE)
    return module_of(path)


def module_of(file: Path) -> Any:
    """As who has the file beside his own code imports it."""
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None
    assert spec.loader is not None
    found = importlib.util.module_from_spec(spec)
    sys.modules[file.stem] = found
    spec.loader.exec_module(found)
    return found
