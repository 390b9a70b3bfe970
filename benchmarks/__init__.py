"""One script per claim: `python -m benchmarks.NAME [--quick] [--json]`. Each ends with one JSON object."""

import os

# As `nas` sets it: CPU threads that wait soon sleep, so that whatever else runs does not slow training down many times over.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
