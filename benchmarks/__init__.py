"""One script per claim: `python -m benchmarks.NAME [--quick] [--json]`. Each ends with one JSON object."""

import nas  # noqa: F401  first, so that CPU threads wait as it says
