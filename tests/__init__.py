"""Environment of all tests and of the processes that they start."""

import os
import tempfile
from pathlib import Path

import nas  # noqa: F401  first, so that CPU threads wait as it says

# Ray asks a cloud's metadata service which cloud it is in, unless its cluster file in the home folder says; the clusters
# of these tests are in none and report to nobody.
_home = tempfile.mkdtemp(prefix="nas-test-home-")
Path(_home, "ray_bootstrap_config.yaml").write_text("{}")
os.environ["HOME"] = _home
os.environ["RAY_USAGE_STATS_REPORT_URL"] = "http://127.0.0.1:9"
