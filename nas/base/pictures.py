"""How picture files become arrays: one set of rules for search, training and exported folders. Needs numpy and pillow alone.

Every file below a folder counts that has a picture's suffix, links followed; what is hidden, or of another kind, is left out and said. A
camera's orientation is applied, what is transparent shows the background, grey of 16 bits counts as such, and nothing is resized unless asked for.
"""

from __future__ import annotations

import io
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps, UnidentifiedImageError

SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
MOST_PIXELS = 100 * 10**6
WHITE = (255, 255, 255)
RESAMPLING = {
    "box": Image.Resampling.BOX,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}


class PictureError(ValueError):
    """A file that cannot be taken as it is; the message names it and the remedy."""


SYSTEMS = ("__MACOSX", "lost+found", "System Volume Information", "$RECYCLE.BIN")
"""Folders of operating systems."""


@dataclass(frozen=True)
class Found:
    """`files`: in order of their paths. `left_out`: how many others there are, by reason."""

    root: Path
    files: tuple[Path, ...]
    left_out: dict[str, int]

    def words(self, used: Sequence[str] = ()) -> str:
        """`used`: suffixes of other files that are read too."""
        known = [f"files of another kind ({suffix})" for suffix in used]
        others = ", ".join(f"{count} {reason}" for reason, count in self.left_out.items() if reason not in known)
        return f"{self.root}: {len(self.files)} pictures" + (f"; left out: {others}" if others else "")


def find_pictures(root: Path) -> Found:
    """Raises PictureError where there is no such folder, or no picture in it."""
    if not root.is_dir():
        raise PictureError(f"image folder {root} does not exist")
    files: list[Path] = []
    left_out: Counter[str] = Counter()
    been: set[str] = set()

    def refuse(error: OSError) -> None:
        raise PictureError(
            f"image folder {error.filename} cannot be read ({error.strerror}); change its permissions, or take it away"
        ) from error

    for where, folders, names in os.walk(root, onerror=refuse, followlinks=True):
        real = os.path.realpath(where)
        if real in been:  # a link to a folder above or beside
            left_out["folders that were found before"] += 1
            folders.clear()
            continue
        been.add(real)
        hidden = [name for name in folders if name.startswith(".") or name in SYSTEMS]
        for name in hidden:
            left_out[f"hidden folders ({name})"] += 1
        folders[:] = sorted(set(folders) - set(hidden))
        for name in names:
            suffix = Path(name).suffix.lower()
            if name.startswith("."):
                left_out["hidden files"] += 1
            elif suffix in SUFFIXES:
                files.append(Path(where, name))
            else:
                left_out[f"files of another kind ({suffix or 'no suffix'})"] += 1
    if not files:
        others = f", but {sum(left_out.values())} others" if left_out else ""
        raise PictureError(f"image folder {root} holds no pictures{others}; known are {', '.join(SUFFIXES)}")
    return Found(root, tuple(sorted(files)), dict(sorted(left_out.items())))


def read_caption(file: Path) -> str:
    """The text in the file of the picture's name that ends in .txt. Raises PictureError where there is none."""
    text = file.with_suffix(".txt")
    try:
        caption = " ".join(text.read_text(encoding="utf-8-sig").split())
    except (OSError, UnicodeDecodeError) as error:
        raise PictureError(
            f"{file} has no caption: {text.name} beside it cannot be read ({error}); write it"
        ) from error
    if not caption:
        raise PictureError(f"{file} has no caption: {text.name} beside it is empty; write it")
    return caption


def read_picture(
    file: Path,
    size: Sequence[int],
    channels: int,
    resize: str | None = None,
    background: tuple[int, int, int] = WHITE,
    content: bytes | None = None,
) -> npt.NDArray[np.float32]:
    """The picture, (channels, height, width) in [-1, 1]. `size`: (height, width). `resize`: a resampling rule by name, after a central
    crop to the sides' ratio, with antialiasing; without one the file must have this size. `content`: of the file, where that is no file of its own. Raises
    PictureError where it cannot be so."""
    try:
        with Image.open(file if content is None else io.BytesIO(content)) as opened:
            width, height = opened.size
            if width * height > MOST_PIXELS:
                raise PictureError(
                    f"{file} has {width * height / 1e6:.0f} million pixels, more than {MOST_PIXELS / 1e6:.0f}; make it smaller"
                )
            # The others of an MPO, which telephones write as .jpg, are previews or depths of its first.
            if getattr(opened, "n_frames", 1) > 1 and opened.format != "MPO":
                raise PictureError(f"{file} holds {opened.n_frames} pictures; save one of them as a file of its own")  # type: ignore[attr-defined]
            sixteen = opened.mode.startswith("I;16") or (opened.mode == "I" and opened.format == "PNG")
            picture = _flat(ImageOps.exif_transpose(opened), channels, background, file, sixteen)
    except PictureError:
        raise
    except Image.DecompressionBombError as error:
        raise PictureError(
            f"{file} has more than {MOST_PIXELS / 1e6:.0f} million pixels ({error}); make it smaller"
        ) from error
    except Exception as error:  # decoders raise whatever a damaged file makes of them
        known = isinstance(error, UnidentifiedImageError)
        reason = "no picture that is known" if known else f"{type(error).__name__}: {error}"
        raise PictureError(f"{file} cannot be read as an image ({reason}); repair or remove it") from error
    return _fitted(picture, file, size, channels, resize)


def array_of(
    picture: Image.Image, file: Path, size: Sequence[int], channels: int, resize: str | None = None
) -> npt.NDArray[np.float32]:
    """The same of an opened picture, which `file` names in messages."""
    return _fitted(_flat(picture, channels, WHITE, file, picture.mode.startswith("I;16")), file, size, channels, resize)


def _fitted(
    picture: Any, file: Path, size: Sequence[int], channels: int, resize: str | None
) -> npt.NDArray[np.float32]:
    wanted = size[1], size[0]
    if picture.size != wanted and resize is not None:
        picture = ImageOps.fit(picture, wanted, RESAMPLING[resize])
    if picture.size != wanted:
        width, height = picture.size
        raise PictureError(
            f"{file} is {height}x{width} pixels, not {size[0]}x{size[1]}; resize it, change size, or ask for resize='bicubic'"
        )
    array = np.asarray(picture, dtype=np.float32).reshape(size[0], size[1], channels)
    return np.ascontiguousarray((array.clip(0, 255) / 127.5 - 1).transpose(2, 0, 1))


def _flat(picture: Any, channels: int, background: tuple[int, int, int], file: Path, sixteen: bool) -> Any:
    """Grey or RGB, without transparency; grey of 16 bits (`sixteen`) as floats up to 255."""
    transparent = "transparency" in picture.info or picture.mode in ("RGBA", "LA", "PA", "RGBa", "La")
    if sixteen:
        if transparent:
            raise PictureError(f"{file} is grey of 16 bits with a transparent colour; save it without")
        grey = Image.fromarray(np.asarray(picture).astype(np.float32) / 257)
        return grey if channels == 1 else Image.merge("RGB", [grey.point(lambda v: v + 0.5).convert("L")] * 3)
    if picture.mode in ("I", "F"):
        raise PictureError(f"{file} has 32 bits for each pixel, whose range nothing says; save it with 8 or 16 bits")
    if transparent:
        ground = Image.new("RGBA", picture.size, (*background, 255))
        picture = Image.alpha_composite(ground, picture.convert("RGBA"))
    return picture.convert("L" if channels == 1 else "RGB")
