"""What people see in the terminal: tables, and words."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from nas.contracts import WITHOUT_ATTENTION

HANDFUL = 5
"""Remarks below a comparison that are printed unasked."""

STALE = 300
"""Seconds without a note after which a run is said to have stopped: a step of a large network may take minutes."""

out = Console(markup=False)  # names and paths may hold brackets
notes = Console(stderr=True, markup=False)


class _Words(logging.Handler):
    """What parts of the engine say by the logger "nas", for people, beside progress bars."""

    def emit(self, record: logging.LogRecord) -> None:
        notes.print(record.getMessage(), highlight=False, soft_wrap=True)


def say_in_words() -> None:
    """From now on what the engine notices by the way is printed, to the error stream."""
    log = logging.getLogger("nas")
    log.setLevel(logging.INFO)
    log.propagate = False
    log.handlers = [_Words()]


def duration(seconds: float) -> str:
    """As people say it: 40 s, 12 min, 3.5 h."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _table(title: str) -> Table:
    return Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True)


def print_status(facts: Mapping[str, Any]) -> None:
    """What `Run.status` returns, as a table."""
    table = _table(f"{facts['study']} in {facts['folder']}")
    columns = ("searcher", "proposed", "planned", "running", "scored", "verified", "failed")
    for column in columns:
        table.add_column(column, justify="left" if column == "searcher" else "right")
    for row in facts["searchers"]:
        table.add_row(*("-" if row[column] is None else str(row[column]) for column in columns))
    out.print(table)
    working = facts["working"]
    if working is not None:
        left = "" if working["seconds_left"] is None else f", {duration(working['seconds_left'])} left"
        values = "".join(f", {name} {value:.4g}" for name, value in sorted(working["values"].items()))
        old = working.get("stopped") or working["seconds_ago"] > STALE
        out.print(
            f"{'stopped at' if old else 'working on'} {working['stage']}: {working['done']:,} of {working['total']:,}{values}"
            + (f", {duration(working['seconds_ago'])} ago; the same command goes on" if old else left),
            highlight=False,
            soft_wrap=True,
        )
    _say_others(facts)
    if facts["training"]:
        spent = ", ".join(
            f"{stage['class']} {stage['expert'] + ' ' if stage.get('expert') else ''}{_short(stage['macs'])}"
            for stage in facts["training"]
        )
        total = _short(sum(stage["macs"] for stage in facts["training"]))
        out.print(f"supernet trained with {total} MACs: {spent}", highlight=False, soft_wrap=True)


def _say_others(facts: Mapping[str, Any]) -> None:
    count = facts["other_ledgers"]
    if count:
        out.print(
            f"{count} ledger{'s' if count > 1 else ''} of other limits, objectives, rungs or settings {'are' if count > 1 else 'is'} kept beside; what they scored is not scored again",
            highlight=False,
            soft_wrap=True,
        )


def print_forecast(facts: Mapping[str, Any], device: str) -> None:
    """What `Forecast.to_json` returns, as a table."""
    table = _table(f"on this device ({device}), as measured")
    table.add_column("")
    table.add_column("", justify="right")
    for name, seconds in facts["seconds"].items():
        table.add_row(name, duration(seconds))
    price = f", {facts['price']:,.2f} in all" if "price" in facts else ""
    table.add_row("all of it", f"{duration(3600 * facts['hours'])}{price}")
    out.print(table)
    for line in facts["words"]:
        out.print(line, highlight=False, soft_wrap=True)


def print_outline(facts: Mapping[str, Any]) -> None:
    """What `outline` returns, as a table."""
    network, macs, share, hours = facts["network"], facts["macs"], facts["macs_share"], facts.get("hours")
    price = facts.get("price", {})
    table = _table(f"{facts['study']}: what it would take")
    table.add_column("")
    table.add_column("", justify="right")
    rows = {
        "schedules": f"10^{facts['log10_schedules']:.0f}"
        if facts["log10_schedules"] > 6
        else f"{10 ** facts['log10_schedules']:.0f}",
        "choices, intervals": f"{facts['choices']}, {facts['intervals']}",
        "full network: parameters": _short(network["params"]),
        "full network: MACs of one call": _short(network["macs"]),
        **(
            {"the same without attention products": _short(network["macs"] - network["attention_macs"])}
            if "attention_macs" in network
            else {}
        ),
        **({"MACs that decode an image": _short(network["decoder_macs"])} if "decoder_macs" in network else {}),
        "MACs of a trajectory: cheapest": f"{_short(macs['least'])}  ({share['least']:.1%})",
        "MACs of a trajectory: budget": f"{_short(macs['budget'])}  ({share['budget']:.1%})",
        "MACs of a trajectory: full": f"{_short(macs['most'])}  ({share['most']:.1%})",
        "weights": f"{facts['bytes']['weights'] / 2**20:,.0f} MiB",
        "state of training": f"{facts['bytes']['training_state'] / 2**20:,.0f} MiB",
        **(
            {"the same as papers count them": f"{facts['network']['distinct_params'] / 1e6:,.1f} M"}
            if "distinct_params" in facts["network"]
            else {}
        ),
        "activations of one image": f"{facts['bytes']['activations_per_image'] / 2**20:,.1f} MiB",
        **(
            {"kept of one image to be reused": f"at most {facts['bytes']['reused_per_image'] / 2**20:,.1f} MiB"}
            if "reused_per_image" in facts["bytes"]
            else {}
        ),
    }
    for name, key, spent in (
        ("training", "training", facts["training_macs"]),
        ("search, each searcher", "search_per_searcher", facts["search_macs_per_searcher"]),
    ):
        reckoned = f", {hours[key]:,.1f} h" if hours else ""
        rows[name] = f"{_short(spent)} MACs{reckoned}" + (f", {price[key]:,.2f}" if price else "")
    for name, value in rows.items():
        table.add_row(name, value)
    out.print(table)
    for line in facts["words"]:
        out.print(line, highlight=False, soft_wrap=True)


def print_comparison(facts: Mapping[str, Any], details: bool = False) -> None:
    """What `Run.compare` returns, as tables: the searchers, their best within budgets, and both over seeds."""
    rows = facts["searchers"]
    table = _table(f"{facts['study']}: {facts['label']}")
    table.add_column("searcher", no_wrap=True)
    for column in ("trials", "failed", "front", "volume", "area", "MACs", "reused", "seconds", "wall"):
        table.add_column(column, justify="right")
    for row in rows:
        macs, seconds, kept, wall = (row["spent"][key] for key in ("macs", "seconds", "cached_macs", "wall_seconds"))
        saved = f"{kept / (macs + kept):.0%}" if macs + kept else "-"
        spent = [f"{row['area']:.4g}", _short(macs), saved, _short(seconds), _short(wall)]
        table.add_row(
            row["searcher"],
            *(str(row[key]) for key in ("trials", "failed")),
            str(len(row["front"])),
            f"{row['hypervolume']:.4g}",
            *spent,
        )
    budgets = list(rows[0]["best_within"]) if rows else []
    best = _table(
        f"best verified {facts['objective']}, ± standard error on a third noise, and its trial, within a share of the full net's {facts['compared_by']}"
    )
    best.add_column("searcher", no_wrap=True)
    for budget in budgets:
        best.add_column(f"{float(budget):.0%}", justify="right", no_wrap=True)
    several = {row["searcher"] for row in facts["over_seeds"]}
    for row in rows:
        if row["searcher"].partition(" (seed")[0] in several:
            continue  # the third table has their means
        best.add_row(row["searcher"], *(_best(row["best_within"][budget], facts["objective"]) for budget in budgets))
    out.print(table, best)
    if any(best and WITHOUT_ATTENTION in best for row in rows for best in row["best_within"].values()):
        out.print("* of the MACs without attention products, which some papers leave out", highlight=False)
    if facts["over_seeds"]:
        out.print(_over_seeds(facts["over_seeds"], budgets))
    lines = list(_verdicts(rows, budgets))
    for line in lines if details else lines[:HANDFUL]:
        out.print(line, highlight=False, soft_wrap=True)
    if len(lines) > HANDFUL and not details:
        out.print(f"{len(lines) - HANDFUL} more remarks: nas compare --details", highlight=False, soft_wrap=True)
    out.print(
        "volume: hypervolume of the verified front; area: mean hypervolume on search samples while the first "
        f"{_short(facts['area_until_macs'])} MACs were spent, as all have; curves: {facts['curves']}",
        highlight=False,
        soft_wrap=True,
    )
    _say_others(facts)
    out.print(f"front: {facts['picture']}", highlight=False, soft_wrap=True)
    grounds = facts["grounds"]
    if grounds:
        out.print(
            f"the full network is {grounds['words']} ({grounds['full']:.3g}, train images to held-out ones {grounds['floor']:.3g})",
            highlight=False,
            soft_wrap=True,
        )
    if facts["recommended"]:
        out.print(f"\n{facts['recommended']['words']}", style="bold", highlight=False, soft_wrap=True)
        out.print(facts["recommended"]["command"], highlight=False, soft_wrap=True, markup=False)


def _over_seeds(rows: Any, budgets: list[str]) -> Table:
    table = _table(
        "mean ± standard deviation over seeds; within a share of the full net's on a third noise, in brackets where not all are scored on it"
    )
    table.add_column("searcher", no_wrap=True)
    for column in ("seeds", "hypervolume", "area", *(f"{float(budget):.0%}" for budget in budgets)):
        table.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        cells = [row["hypervolume"], row["area"], *(row["best_within"][budget] for budget in budgets)]
        table.add_row(
            row["searcher"], str(row["seeds"]), *("-" if c is None else _with_spread(c, row["seeds"]) for c in cells)
        )
    return table


def _with_spread(one: Mapping[str, Any], seeds: int) -> str:
    """With how many seeds it is of, where those are fewer."""
    from nas.results.trials import with_error

    words = with_error(one["mean"], one["sd"], "±")
    words = words if one.get("confirmed", True) else f"({words})"
    return words + (f", {one['seeds']} seed{'s' * (one['seeds'] > 1)}" if one["seeds"] < seeds else "")


def _best(member: Mapping[str, Any] | None, objective: str) -> str:
    """A tilde marks what cannot be told apart from the best of all searchers, brackets what was not scored on a third noise yet; below it
    the trial, and the time of an image, where it is known."""
    from nas.results.trials import with_error

    if member is None:
        return "-"
    against = member["against_leader"]
    mark = "~" if against and not against["conclusive"] else ""
    time = f", {member['latency_ms']:.3g} ms" if "latency_ms" in member else ""
    if WITHOUT_ATTENTION in member:
        time += f", {member[WITHOUT_ATTENTION]:.0%}*"
    shown = member["confirmed"] or member
    words = with_error(shown[objective], shown["error"], "±")
    return f"{mark}{words if member['confirmed'] else f'({words})'}\n#{member['trial']}{time}"


def _verdicts(rows: Any, budgets: list[str]) -> Iterator[str]:
    """What the tables do not decide, in words."""
    if any(m and not m["confirmed"] for row in rows for m in row["best_within"].values()):
        yield "in brackets: on the noise that it was chosen on, which flatters; `nas run` goes on to score it on another"
    for row in rows:
        ties: dict[str, list[str]] = {}
        for budget in budgets:
            member = row["best_within"][budget]
            against = member and member["against_leader"]
            if against and not against["conclusive"]:
                ties.setdefault(against["words"], []).append(f"{float(budget):.0%}")
        for words, within in ties.items():
            yield f"~ within {' and '.join(within)}, {row['searcher']} and the best: {words}"
        if row["baseline"]:
            continue
        for member in row["front"]:
            against = member["against_cheaper"]
            if against and not against["conclusive"]:
                yield (
                    f"{row['searcher']}: trial {member['trial']} ({member['cost']}) and the cheaper "
                    f"{against['trial']} are {against['words']}"
                )
        if row["probes"] and not row["prediction"]:
            yield (
                f"{row['searcher']}: {row['probes']} trials were probes and next to none made use of them; raise --trials, or probe less"
            )
        if row["spent"]["learning_macs"]:
            yield f"{row['searcher']}: {_short(row['spent']['learning_macs'])} MACs more were spent on learning before the search"
        if (screening := row["screening"]) and screening["screened"] < screening["offspring"]:
            yield (
                f"{row['searcher']}: {screening['offspring'] - screening['screened']} of {screening['offspring']} offspring were not "
                f"screened, the model's held-out Kendall tau being too low; it is {screening['tau']:.2f} now"
            )
        if row["answers"]:
            yield (
                "{searcher}: of {answers} answers of the proposer {repaired} were repaired and {refused} refused".format(
                    searcher=row["searcher"], **row["answers"]
                )
            )
        if row["prediction"]:
            p = row["prediction"]
            yield (
                f"{row['searcher']}: predicted against measured scores of {p['schedules']} schedules: R² {p['r_squared']:.3f}, "
                f"Kendall's tau {p['tau']:.2f}, inside bands of equal MACs {p['tau_in_band']:.2f}"
            )


def print_audit(facts: Mapping[str, Any]) -> None:
    """What `audit.summary` returns, as a table."""
    bands = ", ".join(map(str, facts["bands"]))
    table = _table(f"{facts['schedules']} schedules ({bands} in bands of equal MACs) against {facts['reference']}")
    table.add_column("proxy")
    for column in ("tau", "in bands [95%]", "of retest", "recall", "regret", "MACs"):
        table.add_column(column, justify="right", no_wrap=True)
    retest = facts["test_retest"]
    table.add_row(
        "reference again", f"{retest['tau']:.2f}", _with_interval(retest, "tau_in_band"), "1.00", "-", "-", "100%"
    )
    for row in facts["proxies"]:
        table.add_row(
            row["proxy"],
            f"{row['tau']:.2f}",
            _with_interval(row, "tau_in_band"),
            f"{row['relative']:.2f}",
            f"{row['recall']:.0%}",
            "-" if row["regret"] is None else f"{row['regret']:.1%}",
            f"{row['macs_share']:.1%}",
        )
    out.print(table)
    out.print(
        "Kendall's tau with the reference; recall of its best tenth; regret: how much worse the proxy's pick is than its band's best",
        highlight=False,
    )
    if facts["failed"]:
        out.print(
            f"{facts['failed']} schedules failed, one with {facts['failure']}; the same command tries them again",
            highlight=False,
            soft_wrap=True,
            markup=False,
        )
    out.print(f"picture: {facts['picture']}", highlight=False, soft_wrap=True)


def print_intervals(facts: Mapping[str, Any]) -> None:
    """What `Partitions.facts` returns, as a table."""
    metric = facts["metric"]
    table = _table(
        f"best schedule of each partition within {facts['share']:.0%} of the MACs, one width per interval; {metric} on 3 fresh seeds "
        f"of {facts['samples']} samples"
    )
    table.add_column("partition", no_wrap=True)
    for column in ("steps in each", "MACs", metric, "against the first"):
        table.add_column(column, justify="right")
    for number, row in enumerate(facts["rows"]):
        paired = f"{row['difference']:+.3f} ± {row['difference_error']:.3f}" if number else "-"
        steps = (
            " ".join(map(str, row["intervals"])) if len(set(row["intervals"])) > 1 else f"{row['intervals'][0]} each"
        )
        table.add_row(row["partition"], steps, f"{row['macs_share']:.0%}", f"{row[metric]:.3f}", paired)
    out.print(table)
    for name, found in facts["boundaries"].items():
        out.print(f"{name}: intervals=bounded(timesteps, {tuple(found)})", highlight=False, soft_wrap=True)
    out.print(f"affinity and boundaries: {facts['picture']}", highlight=False, soft_wrap=True)


def _with_interval(row: Mapping[str, Any], name: str) -> str:
    low, high = row[f"{name}_interval"]
    return f"{row[name]:.2f} [{low:.2f} {high:.2f}]"


def _short(number: float) -> str:
    for unit, size in (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number:.3g}"
