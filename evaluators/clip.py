"""Whether samples show what they were told: the CLIP score (Hessel et al. 2021) by a local CLIP model."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F  # noqa: N812  as everybody calls it

from evaluators.features import in_parts
from evaluators.scoring import LoadedScore, Rows, Sampled, mean_with_replicates
from nas.base.files import add_file, first_line, read_json
from nas.base.quiet import quiet_transformers
from nas.contracts import LoadedSupernet, Progress, Schedule, UserError, digest_of
from nas.recipes import recipe

MEAN, DEVIATION = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
"""Of the images that CLIP was trained on, by colour, in [0, 1]."""


@recipe
class ClipScore(Sampled):
    """Value: "clip_distance", 1 - cos(image, text) of CLIP's embeddings, which falls as samples fit their texts better; the CLIP score as most
    papers print it is 100 (1 - clip_distance), its negative part not cut off.

    `model`: folder of a local CLIPModel with its tokenizer, as transformers saves them. A relative path is one in the study file's folder. Samples
    are resized with antialiasing, grey ones to three equal colours. Needs conditions with texts. Raises UserError where the folder holds no
    such model.
    """

    model: str
    base: str = field(default_factory=os.getcwd, repr=False, compare=False, kw_only=True)
    metrics = ("clip_distance",)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.conditions is None:
            raise UserError(
                "ClipScore compares samples with what they were told; give it conditions=Prompts(file, encoder) or Captions(images, encoder)"
            )

    @property
    def folder(self) -> Path:
        return (Path(self.base) / Path(self.model).expanduser()).resolve()

    def check(self) -> None:
        """Raises UserError where the model is missing; before anything is trained."""
        kind = (read_json(self.folder / "config.json", "give the folder of a CLIPModel").get("architectures") or [""])[
            0
        ]
        if kind != "CLIPModel":
            raise UserError(
                f"{self.folder} holds a {kind or 'model of no name'}, not a CLIPModel; give the folder of one"
            )

    def describe(self) -> Mapping[str, object]:
        return {"class": "ClipScore", **self.describe_sampling(), "model": self._digest}

    def digest(self, folder: Path) -> str:
        return digest_of(self.describe())

    def prepare(self, folder: Path, seed: int, device: str) -> Iterator[Progress]:
        self.check()
        yield from self.prepare_conditions(folder, device)

    def load(self, supernet: LoadedSupernet, folder: Path) -> LoadedScore:
        trajectories = self.trajectories(supernet, folder)
        conditions = trajectories.conditions
        if conditions is None or conditions.texts(0, 0, 1) is None:
            raise UserError(f"{self.conditions} are no texts, which ClipScore needs; use Prompts or Captions")
        clip = Clip(self.folder, str(supernet.device))

        def make(schedule: Schedule, seed: int, start: int, stop: int) -> npt.NDArray[np.float64]:
            texts = conditions.texts(seed, start, stop)
            assert texts is not None
            return 1 - clip.similarity(trajectories.images(schedule, seed, start, stop), texts)

        return LoadedScore(
            self,
            trajectories,
            "clip_distance",
            Rows(f"distance from the text by {self._digest}", make),
            mean_with_replicates,
            lambda count: f"1 - cosine of image and text@{count} (CLIP {self._digest})",
        )

    @cached_property
    def _digest(self) -> str:
        self.check()
        found = hashlib.sha256()
        for file in sorted(path for path in self.folder.iterdir() if path.suffix in (".json", ".safetensors", ".txt")):
            found.update(file.name.encode())
            add_file(found, file)
        return found.hexdigest()[:16]

    def __getstate__(self) -> dict[str, Any]:
        return {name: self.__dict__[name] for name in self.__dataclass_fields__}


class Clip:
    """The model with its weights. Raises UserError where it cannot be read."""

    def __init__(self, folder: Path, device: str) -> None:
        try:
            from transformers import CLIPModel, CLIPTokenizer
        except ImportError as error:
            raise UserError("ClipScore needs transformers; install the extra: pip install -e '.[text]'") from error
        try:
            with quiet_transformers():
                read: Any = CLIPModel.from_pretrained(
                    folder, local_files_only=True, use_safetensors=True, dtype=torch.float32
                )
                self._tokenizer: Any = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
        except (OSError, ValueError, RuntimeError) as error:
            raise UserError(f"{folder} cannot be read as a CLIP model ({first_line(error)}); copy it anew") from error
        self._model = read.to(device).eval().requires_grad_(False)
        self._device = device
        self._known: dict[str, torch.Tensor] = {}

    @torch.no_grad()
    def similarity(self, images: torch.Tensor, texts: Sequence[str]) -> npt.NDArray[np.float64]:
        """Cosine of each image, (n, channels, height, width) in [-1, 1], and its text."""
        seen = in_parts(self.of_images)(images)
        told = torch.stack([self._of_text(text) for text in texts])
        return F.cosine_similarity(seen.cpu().double(), told.cpu().double(), dim=-1).numpy()

    def of_images(self, images: torch.Tensor) -> torch.Tensor:
        side = self._model.config.vision_config.image_size
        x = images.to(self._device).float() / 2 + 0.5
        x = x.expand(-1, 3, -1, -1) if x.shape[1] == 1 else x
        x = F.interpolate(x, (side, side), mode="bicubic", antialias=True).clamp(0, 1)
        mean, deviation = (torch.tensor(values, device=x.device)[:, None, None] for values in (MEAN, DEVIATION))
        pooled = self._model.vision_model(pixel_values=(x - mean) / deviation).pooler_output
        embedding: torch.Tensor = self._model.visual_projection(pooled)
        return embedding

    def _of_text(self, text: str) -> torch.Tensor:
        if text not in self._known:
            length = self._model.config.text_config.max_position_embeddings
            tokens = self._tokenizer([text], padding=True, truncation=True, max_length=length, return_tensors="pt")
            pooled = self._model.text_model(
                **{name: rows.to(self._device) for name, rows in tokens.items()}
            ).pooler_output
            self._known[text] = self._model.text_projection(pooled)[0]
        return self._known[text]
