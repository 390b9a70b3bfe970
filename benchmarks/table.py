"""Writes README's table of results from benchmarks/results/*.json, between its two markers."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
README = Path(__file__).parent.parent / "README.md"
START, END = "<!-- results: python -m benchmarks.table -->", "<!-- /results -->"


def table() -> str:
    lines = ["| what | target | measured | command | date |", "|---|---|---|---|---|"]
    for path in sorted(RESULTS.glob("*.json")):
        result = json.loads(path.read_text())
        for target in result["targets"]:
            goal = "-" if target["target"] is None else f"{'≤' if target['at_most'] else '≥'} {target['target']:g}"
            value = "no value" if target["measured"] is None else f"{target['measured']:.3g}"
            measured = value + ("" if target["met"] else " (not met)")
            command = f"`python -m benchmarks.{result['name']}`"
            lines.append(f"| {target['what']} | {goal} | {measured} | {command} | {result['date']} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.table", description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; fail where README is not up to date")
    options = parser.parse_args()
    text = README.read_text()
    before, rest = text.split(START)
    _, after = rest.split(END)
    updated = f"{before}{START}\n{table()}\n{END}{after}"
    if options.check and updated != text:
        raise SystemExit("README's table is not what benchmarks/results holds; run `python -m benchmarks.table`")
    if not options.check:
        README.write_text(updated)


if __name__ == "__main__":
    main()
