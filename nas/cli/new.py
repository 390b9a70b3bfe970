"""Commands that start somebody off: a study file for one's own images, and the studies that ship."""

from __future__ import annotations

import ast
import json
import re
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.text import Text

from nas.cli.options import JsonOption, print_json
from nas.cli.terminal import notes, out
from nas.contracts import UserError

LARGE = 48
"""Pixels a side from which on images are drawn as latents."""

MOST = 256


def new(
    name: Annotated[str, typer.Argument(help="Name of the study, and of its file, NAME.py here.", show_default=False)],
    images: Annotated[
        Path, typer.Option(help="Folder of pictures to train on and to be judged by.", show_default=False)
    ],
    pipeline: Annotated[
        Path | None,
        typer.Option(
            help="Local folder of a diffusers pipeline whose network is to be searched; without, one is trained from nothing.",
            show_default=False,
        ),
    ] = None,
    labels: Annotated[
        bool, typer.Option("--labels", help="The folders right below --images are classes, which networks are told.")
    ] = False,
    size: Annotated[
        int | None,
        typer.Option(
            min=8,
            max=MOST,
            help="Side that pictures are cropped and resized to. Default: their own where all have one of at most 256, else 64.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Write a study file that runs, with its choices explained in it."""
    if not re.fullmatch(r"[A-Za-z0-9_-]+", name):
        raise UserError(f"{name} is no name of a study; use letters, digits, dashes and underscores")
    path = Path(f"{name.replace('-', '_')}.py")
    if path.exists():
        raise UserError(f"{path} exists; give another name, or delete it")
    text = study_text(name, path.name, images, pipeline, labels, size)
    path.write_text(text)
    try:
        _checked(path)
    except BaseException:
        path.unlink()
        raise
    count = _looked_at(images)[-1]
    if (held_out := round(count * _held_out(count) / 2)) < FEW:
        notes.print(
            f"{count} pictures: some {held_out} are held out for the search to be compared with, which is few; more pictures tell schedules apart better",
            highlight=False,
            soft_wrap=True,
        )
    out.print(f"{path}: `nas run {path} --dry-run` says what it would take", highlight=False, soft_wrap=True)


FEW = 200
"""Images compared with below which a distance to them says little of small differences."""

HELD_OUT = 128
"""Pictures that are held out where a tenth of them would be fewer; of fewer than some four hundred, three tenths."""

LEAST_HELD_OUT = 36
"""Pictures that are held out where three tenths of them would be fewer, up to a half of them: those of two distances, with some to spare for rounding."""


def _checked(path: Path) -> None:
    """As `nas run --dry-run` would, so that what is written runs. Raises UserError where it would not."""
    from evaluators.kept import MINIMUM, KeptImages
    from nas.study import load_study

    study = load_study(path)
    study.check()
    assert isinstance(study.images, KeptImages)
    source = study.images.source()
    if source.held_out // 2 < MINIMUM:
        raise UserError(
            f"{source.shape[0]} pictures are too few: of the {source.held_out} that are held out the search and the last judgement have a half each, which must be "
            f"{MINIMUM} at least; add pictures"
        )


def _held_out(count: int) -> float:
    """A tenth, or more of few pictures: the search and the last judgement have a half each, of very few as many as a distance needs."""
    return round(max(min(0.3, max(0.1, HELD_OUT / count)), min(0.5, LEAST_HELD_OUT / count)), 2)


def study_text(name: str, file: str, images: Path, pipeline: Path | None, labels: bool, size: int | None) -> str:
    """Of the study file. Raises UserError where the folder holds no pictures, or the pipeline is none that this can be done with."""
    import jinja2

    if pipeline is not None and size is not None:
        raise UserError(f"--size {size} is of a network of its own, and the pipeline's has its size; leave it out")
    height, width, channels, alike, count = _looked_at(images)
    facts: dict[str, Any] = {
        "title": f"{name}: which network each interval of denoising timesteps needs, for the pictures of a folder.",
        "name": name,
        "file": file,
        "images": _quoted(str(images.resolve())),
        "channels": channels,
        "holdout": _held_out(count),
        "labels": labels,
        "classes": _classes(images) if labels else 0,
        "pipeline": None,
        "codec": False,
        "steps": 6000,
    }
    if pipeline is not None:
        facts |= _of_pipeline(pipeline, labels)
    else:
        sides = (size, size) if size else (height, width) if alike and max(height, width) <= MOST else (64, 64)
        facts |= {"size": sides, "resize": bool(size) or not alike or sides != (height, width)} | _of_size(
            sides, channels
        )
    loader = jinja2.PackageLoader("nas.cli")
    environment = jinja2.Environment(loader=loader, trim_blocks=True, keep_trailing_newline=True, autoescape=False)
    text = environment.get_template("study.py.jinja").render(**facts)
    ast.parse(text)
    return text


@lru_cache(maxsize=1)
def _looked_at(images: Path) -> tuple[int, int, int, bool, int]:
    """Height, width and channels of some pictures, whether these are of one size, and how many pictures there are."""
    from PIL import Image

    from nas.base.pictures import PictureError, find_pictures

    if not images.is_dir():
        raise UserError(f"--images {images} is no folder; give one of pictures")
    try:
        files = find_pictures(images).files
    except PictureError as error:
        raise UserError(str(error)) from error
    sizes, grey = set(), True
    for file in files[:: max(1, len(files) // 64)]:
        try:
            with Image.open(file) as picture:
                sizes.add((picture.height, picture.width))
                grey = grey and picture.mode in ("1", "L", "I;16")
        except (OSError, Image.DecompressionBombError) as error:
            raise UserError(f"{file} cannot be read as a picture ({error}); mend it, or take it away") from error
    height, width = min(sizes)
    return height, width, 1 if grey else 3, len(sizes) == 1, len(files)


def _classes(images: Path) -> int:
    count = sum(path.is_dir() and not path.name.startswith(".") for path in images.iterdir())
    if count < 2:
        raise UserError(
            f"--labels: {images} has {count} folders right below it; give one for each class, or leave it out"
        )
    return count


def _of_size(sides: tuple[int, int], channels: int) -> dict[str, Any]:
    """A network for images of this size, in pixels or in latents of an eighth or a quarter of the side."""
    codec = max(sides) >= LARGE
    factor = 1 if not codec else 4 if max(sides) <= 128 else 8
    if any(side % (4 * factor) for side in sides):
        raise UserError(
            f"pictures of {sides[0]}x{sides[1]} pixels cannot be halved often enough; give --size, a multiple of {4 * factor}"
        )
    state = (sides[0] // factor, sides[1] // factor)
    levels = 2 if min(state) < 16 else 3
    down = ("DownBlock2D",) * (levels - 1) + ("AttnDownBlock2D",)
    up = ("AttnUpBlock2D",) + ("UpBlock2D",) * (levels - 1)
    return {
        "codec": codec,
        "codec_widths": (16, 32, 32) if factor == 4 else (16, 32, 32, 64),
        "sample_size": state[0] if state[0] == state[1] else state,
        "net_channels": 4 if codec else channels,
        "widths": (32, 64, 64)[:levels],
        "down": _tuple(down),
        "up": _tuple(up),
    }


def _quoted(text: str) -> str:
    """As Python source, in double quotes."""
    return json.dumps(text, ensure_ascii=False)


def _tuple(names: tuple[str, ...]) -> str:
    """As a formatter would write it."""
    return f"({', '.join(_quoted(name) for name in names)})"


def _of_pipeline(pipeline: Path, labels: bool) -> dict[str, Any]:
    from search_spaces.supernet import Elastic

    net = Elastic.from_pretrained(pipeline, widths=(1.0,))
    if net.condition_kind == "texts":
        raise UserError(f"{pipeline} reads texts; studies/sd15_width.py is a study of such a pipeline to start from")
    if (net.condition_kind == "labels") is not labels:
        raise UserError(
            f"{pipeline} {'takes class labels; give --labels' if not labels else 'takes no class labels; leave --labels out'}"
        )
    channels, height, width = net.image_shape
    return {
        "pipeline": _quoted(str(pipeline.resolve())),
        "size": (height, width),
        "resize": True,
        "channels": channels,
        "steps": 3000,
    }


def studies(as_json: JsonOption = False) -> None:
    """List the studies that ship with the project, in a clone of it."""
    folder = Path(__file__).parent.parent.parent / "studies"
    files = sorted(path for path in folder.glob("*.py") if path.name != "__init__.py")
    if not files:
        raise UserError(f"{folder} holds no studies: they are in a clone of the project; `nas new` writes one")
    told = {str(path): (ast.get_docstring(ast.parse(path.read_text())) or "").partition("\n\n")[0] for path in files}
    if as_json:
        print_json({path: " ".join(words.split()) for path, words in told.items()})
        return
    for path, words in told.items():
        out.print(
            Text.assemble((Path(path).name, "bold"), f"  {' '.join(words.split())}"), highlight=False, soft_wrap=True
        )
    out.print(f"all in {folder}", highlight=False, soft_wrap=True)
