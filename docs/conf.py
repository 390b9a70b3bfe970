"""How the site is built: `make docs`. Pages are Markdown; the reference is made of docstrings and of the commands' own help."""

from __future__ import annotations

import importlib.metadata
import re
from typing import Any

import typer.main

from nas.cli import app as commands

project = "Step-aware architecture search"
release = importlib.metadata.version("step-aware-nas")
copyright = "its authors, Apache-2.0"

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx_copybutton"]
html_theme = "furo"
html_title = project
html_show_sourcelink = False
exclude_patterns = ["**/.ipynb_checkpoints"]
nitpicky = False  # docstrings name what they mean in words

myst_heading_anchors = 3
nb_execution_mode = "off"  # notebooks are shown as they were run last; the tests run them
copybutton_prompt_text = "$ "

default_role = "code"
autodoc_typehints = "signature"
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
add_module_names = False

BESIDE = {
    "../benchmarks/README.md": "measurements.md",
    "../README.md": "index.md",
    "../CONTRIBUTING.md": "contributing.md",
    "../SECURITY.md": "security.md",
}
"""Pages of the site that hold what stands elsewhere in the project."""


def linked(_: Any, page: str, source: list[str]) -> None:
    """Links that work where the files stand, as links within the site; the commands in their page."""
    for path, own in BESIDE.items():
        source[0] = source[0].replace(f"]({path}", f"]({own}")
    if page == "commands":
        source[0] = source[0].replace("<!-- commands -->", reference())


def included(_: Any, relative: Any, page: str, content: list[str]) -> None:
    """The same in what a page includes."""
    text = content[0].replace("](../docs/", "](")
    content[0] = re.sub(r"\[([^]]*)\]\(protocols/[^)]*\)", r"\1", text)


def literal(_: Any, kind: str, name: str, what: Any, options: Any, lines: list[str]) -> None:
    """Indented paragraphs of docstrings are code."""
    told: list[str] = []
    code = False
    for line in lines:
        starts = line.startswith("    ") and not code and bool(told) and not told[-1].strip()
        if starts and not told[-2].endswith("::"):
            told += ["::", ""]
        code = line.startswith("    ") or (code and not line.strip())
        told.append(line)
    lines[:] = told


def reference() -> str:
    """Each command with its arguments and options, as `--help` has them."""
    told = []
    for name, command in sorted(typer.main.get_command(commands).commands.items()):  # type: ignore[attr-defined]
        arguments = [one for one in command.params if one.param_type_name == "argument"]
        options = [one for one in command.params if one.param_type_name == "option"]
        usage = " ".join(["nas", name, *(_metavar(one) for one in arguments)])
        told += [f"## nas {name}", "", f"`{usage} [OPTIONS]`", "", _plain(command.help), ""]
        told += [f"- `{_metavar(one)}`: {_plain(one.help)}" for one in arguments]
        told += ["", "| option | |", "|---|---|"]
        for one in options:
            names = ", ".join(f"`{part}`" for part in (*one.opts, *one.secondary_opts))
            shown = one.show_default and not callable(one.default) and one.default not in (None, False, (), "")
            told.append(f"| {names} | {_plain(one.help)}{f' Default: `{one.default}`.' if shown else ''} |")
        told.append("")
    return "\n".join(told)


def _metavar(argument: Any) -> str:
    name = argument.metavar or argument.name.upper()
    return name if argument.required else f"[{name}]"


def _plain(text: str | None) -> str:
    return " ".join((text or "").split()).replace("|", "\\|").replace("<", "&lt;")


def setup(app: Any) -> None:
    app.connect("source-read", linked)
    app.connect("include-read", included)
    app.connect("autodoc-process-docstring", literal)
