"""Environment of all tests and of the processes that they start."""

import atexit
import os
import shutil
import tempfile
from pathlib import Path

# Tests run side by side, one on each core: more threads would only wait for each other, and those that look for long keep others from a core.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

# Ray asks a cloud's metadata service which cloud it is in, unless its cluster file in the home folder says; the clusters
# of these tests are in none and report to nobody.
# One for all of pytest's processes, in which each has its own, and so has what a test starts.
if "NAS_TEST_HOME" not in os.environ:
    os.environ["NAS_TEST_HOME"] = tempfile.mkdtemp(prefix="nas-test-home-")
    atexit.register(shutil.rmtree, os.environ["NAS_TEST_HOME"], ignore_errors=True)
_home = Path(os.environ["NAS_TEST_HOME"], os.environ.get("PYTEST_XDIST_WORKER", "one"))
_home.mkdir(exist_ok=True)
(_home / "ray_bootstrap_config.yaml").write_text("{}")
os.environ["HOME"] = str(_home)
os.environ["RAY_USAGE_STATS_REPORT_URL"] = "http://127.0.0.1:9"
