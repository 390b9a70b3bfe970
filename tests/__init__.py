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
_PREFIX = "nas-test-home-"
if not Path(os.environ.get("HOME", "")).name.startswith(_PREFIX):  # else a test's own process, in its home
    _home = tempfile.mkdtemp(prefix=_PREFIX)
    Path(_home, "ray_bootstrap_config.yaml").write_text("{}")
    os.environ["HOME"] = _home
    atexit.register(shutil.rmtree, _home, ignore_errors=True)
os.environ["RAY_USAGE_STATS_REPORT_URL"] = "http://127.0.0.1:9"
