"""Writes the table of docs/results.md from benchmarks/results/*.json, between its two markers."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

from benchmarks.protocol import BEFORE, order

RESULTS = Path(__file__).parent / "results"
ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "results.md"
START, END = "<!-- results: python -m benchmarks.table -->", "<!-- /results -->"


def table() -> str:
    lines = ["| what | target | measured | command | date |", "|---|---|---|---|---|"]
    for path in sorted(RESULTS.glob("*.json")):
        result = json.loads(path.read_text())
        for target in result["targets"]:
            goal = "-" if target["target"] is None else f"{'≤' if target['at_most'] else '≥'} {target['target']:g}"
            value = "no value" if target["measured"] is None else f"{target['measured']:.3g}"
            measured = value + ("" if target["met"] or target["target"] is None else " (not met)")
            command = f"`python -m benchmarks.{result['name']}`"
            lines.append(f"| {target['what']} | {goal} | {measured} | {command} | {result['date']} |")
    return "\n".join(lines)


def stale() -> list[str]:
    """Results whose commit is older than the last change of the files that their benchmark names, or does not hold their protocol, in words."""
    found = []
    for path in sorted(RESULTS.glob("*.json")):
        result = json.loads(path.read_text())
        # Rows may be of several runs, and older than the last of them.
        told = [result.get("commit", ""), *(row.get("commit", "") for row in result["rows"])]
        commits = dict.fromkeys(str(commit).rstrip("+") for commit in told if commit)
        if not commits:
            found.append(f"{path.name} does not say which commit made it")
        changed = _git("log", "-1", "--format=%H", "--", *result.get("files", ()))
        protocol = result.get("protocol")
        if protocol and order(protocol["name"], protocol["digest"], told) != BEFORE:
            found.append(
                f"{path.name}: that protocol {protocol['name']} was written before its rows cannot be verified here"
            )
        for made in commits:
            if _git("cat-file", "-t", made) != "commit":
                found.append(f"{path.name} was made by {made[:9]}, which cannot be found here")
            elif changed and _git("merge-base", changed, made) != changed:
                found.append(
                    f"{path.name} was made by {made[:9]}, before {changed[:9]} changed {', '.join(result['files'])}"
                )
    return found


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=ROOT, check=False, capture_output=True, text=True)
    return done.stdout.strip()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.table", description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; fail where the page is not up to date")
    options = parser.parse_args()
    text = PAGE.read_text()
    before, rest = text.split(START)
    _, after = rest.split(END)
    updated = f"{before}{START}\n{table()}\n{END}{after}"
    for words in stale() if options.check else ():
        print(words, file=sys.stderr)
    if options.check and updated != text:
        raise SystemExit(
            "the table of docs/results.md is not what benchmarks/results holds; run `python -m benchmarks.table`"
        )
    if not options.check:
        PAGE.write_text(updated)


if __name__ == "__main__":
    main()
