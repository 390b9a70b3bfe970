"""What a network is told of a text: the hidden states that stock text encoders make of it. Of a set of texts each distinct one is encoded once,
and kept.

`TextEncoder` is Stable Diffusion's, one CLIP text model, or XL's two, or PixArt's T5; `ClassTable` a learned embedding for each class, as of LDM's ImageNet
network, whose captions are the classes' numbers. Needs transformers, the extra "text", where texts are encoded.
"""

from __future__ import annotations

import hashlib
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import field
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from nas.base.exported import CLASS_EMBEDDING
from nas.base.files import add_file, first_line, partial_of, read_json, room
from nas.base.quiet import quiet_transformers
from nas.contracts import Condition, Progress, UserError, digest_of
from nas.recipes import Count, recipe
from search_spaces.pretrained import INDEX, VARIANTS
from search_spaces.shipped.class_embedding import ClassEmbedding
from search_spaces.shipped.reuse import NEGATIVE
from search_spaces.shipped.texts import PARTS, encoded, nothing_said

ENCODED = 64
"""Texts in one call of an encoder."""


Draw = Callable[[torch.Tensor], Condition]
"""Conditions of the chosen, (n,), by the names of the network's arguments, on the CPU."""


class Text(Protocol):
    """Recipe of what makes conditions of texts."""

    def describe(self) -> dict[str, Any]: ...

    def check(self) -> None:
        """Raises UserError where what it reads is missing; before anything is trained."""

    @property
    def shape(self) -> tuple[int, int]:
        """How many tokens a text has, and how many channels a token."""

    def load(self, folder: Path | None, device: str) -> LoadedText: ...


class LoadedText(Protocol):
    @property
    def components(self) -> Mapping[str, Any]:
        """Stock models and tokenizers by their names in a pipeline, which an exported folder takes along."""

    def keep(self, texts: Sequence[str]) -> Iterator[Progress]:
        """Computes what `rows` needs, and keeps it."""

    def rows(self, texts: Sequence[str], negative: str = "") -> Draw:
        """Of these texts, with the negative one's rows beside each text's."""


@recipe
class TextEncoder:
    """The text encoder, or the two, of a pipeline's local folder: `tokenizer`, `text_encoder`, and for Stable Diffusion XL `tokenizer_2`,
    `text_encoder_2`. A relative path is one in the study file's folder.

    `size`: height and width in pixels that XL and PixArt at 1024 are told an image has, uncropped. `length`: tokens of a text, by default as many as
    the tokenizer says; PixArt-alpha reads 120 and PixArt-Sigma 300. Raises UserError where the folder lacks them.
    """

    path: str
    size: tuple[Count, Count] = (1024, 1024)
    length: Count | None = None
    base: str = field(default_factory=os.getcwd, repr=False, compare=False, kw_only=True)

    @property
    def folder(self) -> Path:
        return (Path(self.base) / Path(self.path).expanduser()).resolve()

    def describe(self) -> dict[str, Any]:
        self.check()
        of_xl = {"zeros": self.zeros} if len(self._pairs) > 1 else {}
        length = {"length": self.length} if self.length else {}
        size = {"size": self.size} if self._sized else {}
        return {"class": "TextEncoder", "weights": self._digest, **of_xl, **length, **self._cut, **size}

    @property
    def _cut(self) -> dict[str, Any]:
        """Tells rows of CLIP's, which once had the tokenizer's length whatever was said."""
        return {"padded to": self.length} if self.length and not self._is_t5 else {}

    @property
    def _is_t5(self) -> bool:
        return "d_model" in read_json(self.folder / PARTS[0][1] / "config.json", "copy it anew")

    @property
    def _sized(self) -> bool:
        """Whether its rows may say how large the image is, as XL's and T5's do."""
        return len(self._pairs) > 1 or bool(self.length) or self._is_t5

    @property
    def zeros(self) -> bool:
        """Whether zeros stand for no negative prompt, as XL's pipeline has it unless its settings say otherwise."""
        if len(self._pairs) < 2:
            return False
        index = self.folder / INDEX
        return bool(not index.is_file() or read_json(index, "copy it anew").get("force_zeros_for_empty_prompt", True))

    @property
    def shape(self) -> tuple[int, int]:
        """Tokens of a text, and the channels of each. Raises UserError where the folder does not say."""
        self.check()
        remedy = "save the pipeline anew"
        said = read_json(self.folder / PARTS[0][0] / "tokenizer_config.json", remedy).get("model_max_length")
        tokens: Any = self.length or said
        configs = [read_json(self.folder / encoder / "config.json", remedy) for _, encoder in self._pairs]
        widths: list[Any] = [config.get("hidden_size", config.get("d_model")) for config in configs]
        if not all(isinstance(number, int) and 0 < number < 10**6 for number in (tokens, *widths)):
            raise UserError(
                f"{self.folder}: tokenizer and text encoder say neither length nor width of a text; {remedy}"
            )
        if isinstance(said, int) and tokens > said and not self._is_t5:
            raise UserError(
                f"length={tokens} is more than the {said} tokens that the text encoder of {self.folder} can place; give as many at most"
            )
        return tokens, sum(widths)

    def check(self) -> None:
        for names in self._pairs:
            for name in names:
                if not (self.folder / name).is_dir():
                    raise UserError(
                        f"{self.folder} has no {name}; give the folder of a pipeline with one, as StableDiffusionPipeline and PixArtAlphaPipeline save it"
                    )

    def load(self, folder: Path | None, device: str) -> LoadedTextEncoder:
        self.check()
        identity = digest_of([self._digest, self.length]) if self.length else self._digest
        identity = digest_of([identity, self.size, *self._cut]) if self._sized else identity
        return LoadedTextEncoder(self.folder, self._pairs, self.size, identity, folder, device, self.zeros, self.length)

    @property
    def _pairs(self) -> tuple[tuple[str, str], ...]:
        return PARTS if (self.folder / PARTS[1][1]).is_dir() else PARTS[:1]

    @cached_property
    def _digest(self) -> str:
        self.check()
        found = hashlib.sha256()
        for names in self._pairs:
            for file in sorted(file for name in names for file in (self.folder / name).iterdir() if file.is_file()):
                found.update(file.name.encode())
                add_file(found, file)
        return found.hexdigest()[:16]

    def __getstate__(self) -> dict[str, Any]:
        return {name: self.__dict__[name] for name in self.__dataclass_fields__}


class _Tabled(ABC):
    """Rows of distinct texts, whatever makes them. `_zeros`: whether an empty negative text is zeros instead of what the encoder makes of it."""

    _zeros = False

    @abstractmethod
    def table(self, distinct: Sequence[str]) -> Mapping[str, npt.NDArray[np.float32]]:
        """A row for each text, by the names of the network's arguments; it may be mapped from a file."""

    def rows(self, texts: Sequence[str], negative: str = "") -> Draw:
        distinct = sorted({*texts, negative})
        table = self.table(distinct)
        place = {text: number for number, text in enumerate(distinct)}
        places, null = np.array([place[text] for text in texts]), place[negative]
        nothing = {name: torch.from_numpy(np.array(values[null])) for name, values in table.items()}
        if self._zeros and not negative:
            nothing = nothing_said(nothing)

        def draw(chosen: torch.Tensor) -> Condition:
            mine = places[chosen.cpu().numpy()]
            told = {name: torch.from_numpy(np.array(values[mine])) for name, values in table.items()}
            against = {f"{NEGATIVE}{name}": row.expand(len(mine), *row.shape) for name, row in nothing.items()}
            return {**told, **against}

        return draw


class LoadedTextEncoder(_Tabled):
    """`components` are read when they are first asked for, so that who finds all texts kept reads none. `folder`: where rows are kept, in its
    `texts`, one file for each of the network's arguments, mapped into memory; None for nowhere."""

    def __init__(
        self,
        source: Path,
        pairs: Sequence[tuple[str, str]],
        size: tuple[int, int],
        identity: str,
        folder: Path | None,
        device: str,
        zeros: bool = False,
        length: int | None = None,
    ) -> None:
        self._identity = identity
        self._length = length
        self._folder = folder
        self._source = source
        self._pairs = pairs
        self._size = size
        self._device = device
        self._zeros = zeros
        self._made: dict[str, Mapping[str, npt.NDArray[np.float32]]] = {}

    def keep(self, texts: Sequence[str]) -> Iterator[Progress]:
        distinct = sorted(set(texts))
        key, path = self._key(distinct), self._path(distinct)
        if key in self._made:
            return
        if path is None or not path.exists():
            if path is None:
                self._made[key] = yield from self._encoded(distinct, None)
                return
            with partial_of(path) as partial:
                for values in (yield from self._encoded(distinct, partial)).values():
                    assert isinstance(values, np.memmap)
                    values.flush()
                if not path.exists():  # by another process, which had to encode them too
                    os.replace(partial, path)
        self._made[key] = _mapped(path)

    def _encoded(
        self, distinct: Sequence[str], partial: Path | None
    ) -> Generator[Progress, None, Mapping[str, npt.NDArray[np.float32]]]:
        made: dict[str, npt.NDArray[np.float32]] = {}
        for start in range(0, len(distinct), ENCODED):
            for name, rows in self.encode(distinct[start : start + ENCODED]).items():
                if name not in made:
                    file = None if partial is None else partial / f"{name}.npy"
                    made[name] = room(file, (len(distinct), *rows.shape[1:]))
                made[name][start : start + ENCODED] = rows.float().cpu().numpy()
            yield Progress("texts", min(start + ENCODED, len(distinct)), len(distinct))
        self.__dict__.pop("components", None)  # they are large, and have said what they have to say
        return made

    def table(self, distinct: Sequence[str]) -> Mapping[str, npt.NDArray[np.float32]]:
        for _ in self.keep(distinct):
            pass
        return self._made[self._key(sorted(distinct))]

    def _key(self, distinct: Sequence[str]) -> str:
        return digest_of([self._identity, distinct])

    def _path(self, distinct: Sequence[str]) -> Path | None:
        return None if self._folder is None else self._folder / "texts" / self._key(distinct)

    @cached_property
    def components(self) -> Mapping[str, Any]:
        try:
            import transformers  # noqa: F401
        except ImportError as error:
            raise UserError("texts need transformers; install the extra: pip install -e '.[text]'") from error
        with quiet_transformers():
            return {name: part for pair in self._pairs for name, part in self._read(*pair).items()}

    def _read(self, tokenizer: str, encoder: str) -> dict[str, Any]:
        from transformers import (
            CLIPTextModel,
            CLIPTextModelWithProjection,
            CLIPTokenizer,
            T5EncoderModel,
            T5Tokenizer,
        )

        kinds: dict[str, Any] = {
            kind.__name__: kind for kind in (CLIPTextModel, CLIPTextModelWithProjection, T5EncoderModel)
        }
        config = read_json(self._source / encoder / "config.json", "save the encoder anew")
        kind = kinds.get(str((config.get("architectures") or ["CLIPTextModel"])[0]))
        if kind is None:
            raise UserError(f"{self._source / encoder} holds a {config['architectures'][0]}; known: {', '.join(kinds)}")
        stored = {file.name for file in (self._source / encoder).iterdir()}
        whole = next((v for v in VARIANTS if f"model{v}.safetensors" in stored), None)
        parts = next((v for v in VARIANTS if f"model.safetensors.index{v}.json" in stored), "")
        variant = (parts if whole is None else whole).removeprefix(".") or None
        try:
            read: Any = kind.from_pretrained(
                self._source / encoder,
                local_files_only=True,
                use_safetensors=True,
                variant=variant,
                dtype=torch.float32,
            )
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            raise UserError(f"{self._source}: {encoder} cannot be read ({first_line(error)}); copy it anew") from error
        reader: Any = T5Tokenizer if kind is T5EncoderModel else CLIPTokenizer
        try:
            words: Any = reader.from_pretrained(self._source / tokenizer, local_files_only=True)
        except (OSError, ValueError, RuntimeError, ImportError) as error:
            raise UserError(
                f"{self._source}: {tokenizer} cannot be read ({first_line(error)}); copy it anew, or save it with a tokenizer.json"
            ) from error
        if words.model_max_length > 10**6 and (kind is not T5EncoderModel or not self._length):
            told = (
                "give length=120 for PixArt-alpha, 300 for PixArt-Sigma" if kind is T5EncoderModel else "copy it anew"
            )
            raise UserError(f"{self._source}: {tokenizer} does not say how many tokens a text has; {told}")
        return {tokenizer: words, encoder: read.to(self._device).eval().requires_grad_(False)}

    def encode(self, texts: Sequence[str]) -> Condition:
        """A row for each text, as the stock pipelines make it."""
        return encoded(self.components, texts, self._size, self._device, self._length)


@recipe
class ClassTable:
    """One learned vector for each class, a text of one token, from a safetensors file with a single tensor (classes + 1, channels), whose last
    row says nothing. Its texts are the classes' numbers; the empty one means that row. A relative path is one in the study file's folder.
    """

    path: str
    base: str = field(default_factory=os.getcwd, repr=False, compare=False, kw_only=True)

    @property
    def file(self) -> Path:
        return (Path(self.base) / Path(self.path).expanduser()).resolve()

    def describe(self) -> dict[str, Any]:
        self.check()
        return {"class": "ClassTable", "weights": hashlib.sha256(self.file.read_bytes()).hexdigest()[:16]}

    def check(self) -> None:
        if not self.file.is_file():
            raise UserError(f"{self.file} does not exist; save the class embeddings there as safetensors")

    @property
    def shape(self) -> tuple[int, int]:
        """Tokens of a text, one, and its channels."""
        self.check()
        return 1, LoadedTable(self.file).channels

    def load(self, folder: Path | None, device: str) -> LoadedTable:
        self.check()
        return LoadedTable(self.file)


class LoadedTable(_Tabled):
    """`components`: the table alone, as a model of diffusers."""

    def __init__(self, file: Path) -> None:
        tensors = _read(file)
        if len(tensors) != 1 or next(iter(tensors.values())).ndim != 2:
            raise UserError(f"{file} must hold a single tensor (classes + 1, channels), not {sorted(tensors)}")
        self._rows = next(iter(tensors.values())).float()
        self._file = file
        self.channels = int(self._rows.shape[1])
        vectors = ClassEmbedding(len(self._rows) - 1, self.channels)
        vectors.load_state_dict({"weight": self._rows})
        self.components: Mapping[str, Any] = {CLASS_EMBEDDING: vectors}

    def keep(self, texts: Sequence[str]) -> Iterator[Progress]:
        yield from ()

    def table(self, distinct: Sequence[str]) -> Mapping[str, npt.NDArray[np.float32]]:
        last = len(self._rows) - 1
        wrong = next((text for text in distinct if text and not (text.isdecimal() and int(text) < last)), None)
        if wrong is not None:
            raise UserError(f"{wrong!r} is no class of {self._file}, which has those from 0 to {last - 1}")
        return {"encoder_hidden_states": self._rows[[int(text) if text else last for text in distinct], None].numpy()}


def _mapped(folder: Path) -> dict[str, npt.NDArray[np.float32]]:
    """Raises UserError where a file is damaged."""
    try:
        return {file.stem: np.load(file, mmap_mode="r", allow_pickle=False) for file in sorted(folder.glob("*.npy"))}
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"{folder} is damaged ({first_line(error)}); delete it") from error


def _read(path: Path) -> dict[str, torch.Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is damaged ({first_line(error)}); delete it, or copy it anew") from error
