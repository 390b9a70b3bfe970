"""Texts, from a caption or a prompt to what a network reads, and how well images show them."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline
from PIL import Image
from safetensors.torch import save_file

from evaluators.agreement import Agreement
from evaluators.captions import Captioned
from evaluators.clip import DEVIATION, MEAN, ClipScore
from evaluators.conditions import Captions, Labels, Prompts
from evaluators.frechet import Frechet
from evaluators.images import Digits, ImageFolder
from evaluators.sampling import DDIM
from nas.contracts import Schedule, Step, UserError
from nas.searchers.random import Random
from nas.study import Study
from search_spaces.intervals import leading
from search_spaces.stepwise import Stepwise
from search_spaces.supernet import Elastic
from search_spaces.text import ClassTable, TextEncoder
from search_spaces.training import Stages
from tests.pipelines import TEXT_WIDTH, TEXTS, TOKENS, captioned_images, prompts, small_clip


def test_texts_are_encoded_as_the_stock_pipelines_do(text_pipelines: Path, tmp_path: Path) -> None:
    loaded = TextEncoder(str(text_pipelines / "sd")).load(tmp_path, "cpu")
    ours = loaded.rows(TEXTS)(torch.arange(4))
    stock = StableDiffusionPipeline.from_pretrained(text_pipelines / "sd")
    theirs, _ = stock.encode_prompt(TEXTS, "cpu", 1, False)
    assert torch.allclose(ours["encoder_hidden_states"], theirs, atol=1e-6)
    assert ours["encoder_hidden_states"].shape == (4, TOKENS, TEXT_WIDTH)
    empty = ours["negative_encoder_hidden_states"]
    assert torch.allclose(empty, theirs[2].expand_as(empty), atol=1e-6)


def test_both_encoders_of_xl_and_the_sizes(text_pipelines: Path) -> None:
    loaded = TextEncoder(str(text_pipelines / "xl"), size=(16, 24)).load(None, "cpu")
    ours = loaded.rows(TEXTS)(torch.tensor([3, 0]))
    stock = DiffusionPipeline.from_pretrained(text_pipelines / "xl")
    states, negative, pooled, _ = stock.encode_prompt([TEXTS[3], TEXTS[0]], device="cpu")
    assert torch.allclose(ours["encoder_hidden_states"], states, atol=1e-6)
    assert torch.allclose(ours["text_embeds"], pooled, atol=1e-6)
    assert torch.equal(ours["negative_encoder_hidden_states"], negative)
    assert ours["time_ids"].tolist() == [[16, 24, 0, 0, 16, 24]] * 2
    empty, *_ = stock.encode_prompt([TEXTS[2]], device="cpu")  # an empty text that was asked for is one
    assert torch.allclose(loaded.rows(TEXTS)(torch.tensor([2]))["encoder_hidden_states"], empty, atol=1e-6)


@pytest.mark.parametrize("kind", ["sd", "xl"])
def test_texts_are_as_long_as_is_said(kind: str, text_pipelines: Path) -> None:
    recipe = TextEncoder(str(text_pipelines / kind), length=5)
    rows = recipe.load(None, "cpu").rows(["a photo"])(torch.arange(1))
    assert rows["encoder_hidden_states"].shape[1:] == recipe.shape
    assert recipe.shape[0] == 5
    with pytest.raises(UserError, match="length=40 is more than the 12 tokens"):
        TextEncoder(str(text_pipelines / kind), length=40).shape  # noqa: B018


def test_xl_may_have_no_zeros_for_no_negative_prompt(text_pipelines: Path, tmp_path: Path) -> None:
    shutil.copytree(text_pipelines / "xl", tmp_path / "xl")
    index = json.loads((tmp_path / "xl" / "model_index.json").read_text())
    (tmp_path / "xl" / "model_index.json").write_text(json.dumps({**index, "force_zeros_for_empty_prompt": False}))
    plain, told = TextEncoder(str(text_pipelines / "xl")), TextEncoder(str(tmp_path / "xl"))
    assert plain.describe() != told.describe()
    ours = told.load(None, "cpu").rows(TEXTS)(torch.tensor([0]))
    _, negative, _, pooled = DiffusionPipeline.from_pretrained(tmp_path / "xl").encode_prompt([TEXTS[0]], device="cpu")
    assert torch.allclose(ours["negative_encoder_hidden_states"], negative, atol=1e-6)
    assert torch.allclose(ours["negative_text_embeds"], pooled, atol=1e-6)


def test_a_text_is_encoded_once(text_pipelines: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = TextEncoder(str(text_pipelines / "sd"))
    loaded = recipe.load(tmp_path, "cpu")
    told = [tick.done for tick in loaded.keep(TEXTS * 50)]
    assert told == [4]  # distinct ones
    assert "components" not in vars(loaded)  # what has said all is not kept in memory
    again = recipe.load(tmp_path, "cpu")
    monkeypatch.setattr(type(again), "components", property(lambda self: pytest.fail("was read again")))
    assert not list(again.keep(TEXTS))
    assert again.rows(TEXTS)(torch.tensor([1]))["encoder_hidden_states"].shape == (1, TOKENS, TEXT_WIDTH)


def test_damaged_rows_and_missing_encoders_are_told(text_pipelines: Path, tmp_path: Path) -> None:
    recipe = TextEncoder(str(text_pipelines / "sd"))
    list(recipe.load(tmp_path, "cpu").keep(TEXTS))
    [kept] = (tmp_path / "texts").glob("*/*.npy")
    kept.write_bytes(kept.read_bytes()[:50])
    with pytest.raises(UserError, match=r"is damaged .*delete it"):
        recipe.load(tmp_path, "cpu").rows(TEXTS)
    with pytest.raises(UserError, match="has no tokenizer; give the folder of a pipeline"):
        TextEncoder(str(text_pipelines / "sd" / "vae")).describe()


def test_a_tokenizer_that_says_no_length_is_refused(text_pipelines: Path, tmp_path: Path) -> None:
    """CLIP's texts are as long as it says, whatever is asked for."""
    shutil.copytree(text_pipelines / "sd", tmp_path / "sd")
    config = tmp_path / "sd" / "tokenizer" / "tokenizer_config.json"
    said = json.loads(config.read_text())
    del said["model_max_length"]
    config.write_text(json.dumps(said))
    for length in (None, 77):
        with pytest.raises(UserError, match="tokenizer does not say how many tokens a text has; copy it anew"):
            TextEncoder(str(tmp_path / "sd"), length=length).load(None, "cpu").rows(TEXTS)


def test_prompts_have_their_turns_and_their_classes(text_pipelines: Path, tmp_path: Path) -> None:
    file, encoder = tmp_path / "prompts.txt", TextEncoder(str(text_pipelines / "sd"))
    file.write_text("a bag\t3\n\na small dress\t1\na coat\t1\n")
    conditions = Prompts(str(file), encoder, negative="a drawing").load(tmp_path)
    texts, classes = conditions.texts(0, 0, 9), conditions.classes(0, 0, 9)
    assert classes is not None
    assert texts is not None
    assert dict(zip(texts, classes.tolist(), strict=True)) == {"a bag": 3, "a small dress": 1, "a coat": 1}
    assert sorted(texts[:3]) == sorted(texts[3:6]) == ["a bag", "a coat", "a small dress"]
    assert conditions.texts(0, 4, 6) == texts[4:6]
    rows = conditions.of(0, 0, 9)["encoder_hidden_states"]
    expected = encoder.load(None, "cpu").rows(texts)(torch.arange(9))["encoder_hidden_states"]
    assert torch.equal(rows, expected)
    plain, negative = Prompts(str(file), encoder), Prompts(str(file), encoder, negative="a drawing")
    assert plain.load(tmp_path).digest != negative.load(tmp_path).digest


@pytest.mark.parametrize(
    ("text", "words"),
    [("", "has no prompts"), ("a bag\t1\na coat", "1 of 2 have one"), ("a bag\tone", "'one' is no number of a class")],
)
def test_files_that_hold_no_prompts_are_told(text_pipelines: Path, tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "prompts.txt").write_text(text)
    with pytest.raises(UserError, match=words):
        Prompts(str(tmp_path / "prompts.txt"), TextEncoder(str(text_pipelines / "sd"))).load(tmp_path)
    with pytest.raises(UserError, match="cannot be read"):
        Prompts(str(tmp_path / "none.txt"), TextEncoder(str(text_pipelines / "sd"))).load(tmp_path)


def test_captions_are_the_images_own_or_the_numbers_of_their_classes(tmp_path: Path) -> None:
    save_file({"weight": torch.randn(11, 5)}, tmp_path / "classes.safetensors")
    table = ClassTable(str(tmp_path / "classes.safetensors"))
    conditions, labels = Captions(Digits(), table).load(tmp_path), Labels(Digits()).load()
    asked = labels.classes(3, 0, 40)
    given = conditions.classes(3, 0, 40)
    assert given is not None
    assert torch.equal(given, asked)
    weight = table.load(None, "cpu").rows([str(i) for i in range(10)])(torch.arange(10))["encoder_hidden_states"]
    assert weight.shape == (10, 1, 5)
    assert torch.equal(conditions.of(3, 0, 40)["encoder_hidden_states"], weight[asked])
    save_file({"weight": torch.randn(5, 5)}, tmp_path / "few.safetensors")
    with pytest.raises(UserError, match=r"is no class of .*few\.safetensors"):
        Captions(Digits(), ClassTable(str(tmp_path / "few.safetensors"))).load(tmp_path).of(0, 0, 1)


def test_images_with_classes_alone_are_captioned() -> None:
    names = tuple(f"thing {number}" for number in range(10))
    recipe = Captioned(Digits(holdout=0.2), names, ("a {}", "one {}"), inverted=("a dark {}",))
    made, plain = recipe.load(), Digits(holdout=0.2).load()
    assert made.captions is not None
    assert made.labels is not None
    assert plain.labels is not None
    assert made.held_out is not None
    assert made.held_out.captions is not None
    assert len(made.held_out.captions) == len(made.held_out)
    dark = made.labels >= 10
    assert 0.4 < dark.mean() < 0.6
    assert np.array_equal(made.labels % 10, plain.labels)
    assert np.array_equal(made.pixels, np.where(dark[:, None, None, None], -plain.pixels, plain.pixels))
    for caption, label in zip(made.captions, made.labels, strict=True):
        assert caption in (
            {f"a dark thing {label - 10}"} if label >= 10 else {f"a thing {label}", f"one thing {label}"}
        )
    assert len(set(made.captions)) == 30
    assert recipe.load().digest == made.digest != replace(recipe, seed=1).load().digest
    with pytest.raises(UserError, match="a name is needed for each class"):
        Captioned(Digits(), names[:3]).load()
    with pytest.raises(UserError, match=r"must have one \{\}"):
        Captioned(Digits(), names, ("a thing",))
    braces = Captioned(Digits(), names, ("a {x} {}",)).load().captions
    assert braces is not None
    assert braces[0].startswith("a {x} thing")


def test_a_folder_of_pictures_has_its_captions_beside_them(tmp_path: Path) -> None:
    for number in range(80):
        Image.new("L", (8, 8), number).save(tmp_path / f"{number:02}.png")
        (tmp_path / f"{number:02}.txt").write_text(f"picture\n {number}\n")
    recipe = ImageFolder(str(tmp_path), 8, channels=1, captions="txt", holdout=0.2)
    made = recipe.load()
    assert made.held_out is not None
    for part in (made, made.held_out):
        assert part.captions is not None
        shown = ((part.pixels[:, 0, 0, 0] + 1) * 127.5).round().astype(int)
        assert [f"picture {number}" for number in shown] == list(part.captions)
    (tmp_path / "03.txt").write_text("another")
    assert replace(recipe, channels=3).load().digest != made.digest
    (tmp_path / "04.txt").unlink()
    with pytest.raises(UserError, match=r"04\.png has no caption: 04\.txt beside it cannot be read"):
        recipe.source()


def test_the_clip_score_is_transformers_own(text_pipelines: Path, tmp_path: Path) -> None:
    """Cosines by the whole stock model, which is told the pixels as they are."""
    clip, words = small_clip(tmp_path / "clip")
    recipe = Elastic.from_pretrained(text_pipelines / "sd", widths=(1.0,))
    net = recipe.initial(0)
    told = prompts(tmp_path, recipe.text)
    score = ClipScore(str(tmp_path / "clip"), conditions=told, rungs=(6, 8), sampler=DDIM(), batch=4)
    schedule = Schedule((Step(501, net.full_arch), Step(1, net.full_arch)))
    list(score.prepare(tmp_path, 0, "cpu"))
    loaded = score.load(net, tmp_path)
    found = loaded(schedule, 6, 0)
    images, texts = loaded.sample(schedule, 6, 0), told.load(tmp_path).texts(0, 0, 6)
    mean, deviation = (torch.tensor(values)[:, None, None] for values in (MEAN, DEVIATION))
    given = words(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        made = clip(pixel_values=((images / 2 + 0.5) - mean) / deviation, **given)
        cosines = (made.logits_per_image / clip.logit_scale.exp()).diagonal()
    assert found.values["clip_distance"] == pytest.approx(float(1 - cosines.mean()), abs=1e-5)
    assert "1 - cosine of image and text@6" in found.labels["clip_distance"]
    with pytest.raises(UserError, match="not a CLIPModel"):
        replace(score, model=str(text_pipelines / "sd" / "text_encoder")).check()
    with pytest.raises(UserError, match="give it conditions=Prompts"):
        ClipScore(str(tmp_path / "clip"))


def test_texts_have_the_length_and_the_width_that_the_network_reads(text_pipelines: Path, tmp_path: Path) -> None:
    recipe = Elastic.from_pretrained(text_pipelines / "sd", widths=(1.0,))
    assert recipe.tokens == TOKENS
    with pytest.raises(UserError, match=f"texts have {TOKENS} tokens, costs are reckoned with 77"):
        Stages(()).check(replace(recipe, tokens=77), captioned_images())
    save_file({"weight": torch.randn(4, 5)}, tmp_path / "classes.safetensors")
    table = ClassTable(str(tmp_path / "classes.safetensors"))
    with pytest.raises(UserError, match="texts have 5 channels, the network reads 16"):
        Stages(()).check(replace(recipe, text=table, tokens=1), captioned_images())
    index = json.loads((text_pipelines / "sd" / "unet" / "config.json").read_text())
    shutil.copytree(text_pipelines / "sd", tmp_path / "sd")
    (tmp_path / "sd" / "unet" / "config.json").write_text(json.dumps({**index, "sample_size": None}))
    with pytest.raises(UserError, match="has no sample_size"):
        Elastic.from_pretrained(tmp_path / "sd")


def test_conditions_of_another_kind_are_refused(text_pipelines: Path, tmp_path: Path) -> None:
    recipe = Elastic.from_pretrained(text_pipelines / "sd", widths=(0.5, 1.0))
    steps = leading(4, offset=1)
    parts: dict[str, Any] = {"space": Stepwise(recipe, steps, (4,)), "supernet": recipe, "images": Digits()}
    both = replace(recipe, config={**recipe.config, "num_class_embeds": 4}, pretrained=None)
    assert both.condition_kind == "labels and texts"
    for conditions, words in (
        (Labels(Digits()), "the network takes texts, the evaluator's conditions are labels"),
        (None, "the network takes conditions"),
    ):
        with pytest.raises(UserError, match=words):
            Study(
                name="wrong",
                training=Stages(()),
                evaluator=Frechet(Digits(), conditions=conditions, rungs=(32, 64)),
                searchers={"random": Random()},
                limits={"macs_share": 0.9},
                trials=4,
                **parts,
            )


def test_agreement_needs_classes(text_pipelines: Path, tmp_path: Path) -> None:
    recipe = Elastic.from_pretrained(text_pipelines / "sd", widths=(1.0,))
    net = recipe.initial(0)
    told = prompts(tmp_path, recipe.text)
    score = Agreement(Digits(), conditions=told, rungs=(4, 8))
    with pytest.raises(UserError, match="asks for no classes"):
        score.check()
    with pytest.raises(UserError, match="asks for no classes"):
        score.load(net, tmp_path)
