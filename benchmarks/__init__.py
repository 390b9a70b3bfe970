"""One script per claim: `python -m benchmarks.NAME [--quick] [--json]`. Each ends with one JSON object."""
