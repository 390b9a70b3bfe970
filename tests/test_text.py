"""Texts, from a caption or a prompt to what a network reads; pipelines that read them taken in, sampled from, and handed out."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, DPMSolverMultistepScheduler, StableDiffusionPipeline
from PIL import Image
from safetensors.torch import save_file
from transformers import CLIPConfig, CLIPModel

from benchmarks.small_text import text_config, tokenizer
from evaluators.agreement import Agreement
from evaluators.captions import Captioned
from evaluators.clip import DEVIATION, MEAN, ClipScore
from evaluators.conditions import Captions, Labels, Prompts
from evaluators.frechet import Frechet
from evaluators.images import Digits, ImageFolder
from evaluators.sampling import DDIM, DPMSolver, sample
from nas.base.exported import ExportError, read_export, read_network
from nas.contracts import Guidance, ImageSet, Schedule, Step, UserError
from nas.handover.export import export
from nas.handover.stock import export_stock
from nas.searchers.random import Random
from nas.study import Study
from search_spaces.intervals import free, leading
from search_spaces.loaded import LoadedElastic
from search_spaces.noise import NoiseSchedule
from search_spaces.shipped.train_diffusers import Settings, train
from search_spaces.stepwise import Stepwise
from search_spaces.supernet import Elastic
from search_spaces.text import ClassTable, TextEncoder
from search_spaces.training import Sandwich, Stages
from search_spaces.training.optimiser import Batches, Optimiser
from tests.conftest import TINY
from tests.pipelines import TEXT_WIDTH, TOKENS, WORDS, stable_diffusion, stable_diffusion_xl
from tests.test_cli import nas

TEXTS = ["a photo of a bag", "a small dress", "", "a drawing of a coat"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    where = tmp_path_factory.mktemp("pipelines")
    stable_diffusion(where / "sd")
    stable_diffusion_xl(where / "xl")
    return where


def prompts(folder: Path, encoder: Any, **settings: Any) -> Prompts:
    (folder / "prompts.txt").write_text("\n".join(text for text in TEXTS if text))
    return Prompts(str(folder / "prompts.txt"), encoder, **settings)


# -------------------------------------------------------------------------------------------------------------- texts


def test_texts_are_encoded_as_the_stock_pipelines_do(folder: Path, tmp_path: Path) -> None:
    loaded = TextEncoder(str(folder / "sd")).load(tmp_path, "cpu")
    ours = loaded.rows(TEXTS)(torch.arange(4))
    stock = StableDiffusionPipeline.from_pretrained(folder / "sd")
    theirs, _ = stock.encode_prompt(TEXTS, "cpu", 1, False)
    assert torch.allclose(ours["encoder_hidden_states"], theirs, atol=1e-6)
    assert ours["encoder_hidden_states"].shape == (4, TOKENS, TEXT_WIDTH)
    empty = ours["negative_encoder_hidden_states"]
    assert torch.allclose(empty, theirs[2].expand_as(empty), atol=1e-6)


def test_both_encoders_of_xl_and_the_sizes(folder: Path) -> None:
    loaded = TextEncoder(str(folder / "xl"), size=(16, 24)).load(None, "cpu")
    ours = loaded.rows(TEXTS)(torch.tensor([3, 0]))
    stock = DiffusionPipeline.from_pretrained(folder / "xl")
    states, negative, pooled, _ = stock.encode_prompt([TEXTS[3], TEXTS[0]], device="cpu")
    assert torch.allclose(ours["encoder_hidden_states"], states, atol=1e-6)
    assert torch.allclose(ours["text_embeds"], pooled, atol=1e-6)
    assert torch.equal(ours["negative_encoder_hidden_states"], negative)
    assert ours["time_ids"].tolist() == [[16, 24, 0, 0, 16, 24]] * 2
    empty, *_ = stock.encode_prompt([TEXTS[2]], device="cpu")  # an empty text that was asked for is one
    assert torch.allclose(loaded.rows(TEXTS)(torch.tensor([2]))["encoder_hidden_states"], empty, atol=1e-6)


def test_xl_may_have_no_zeros_for_no_negative_prompt(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "xl", tmp_path / "xl")
    index = json.loads((tmp_path / "xl" / "model_index.json").read_text())
    (tmp_path / "xl" / "model_index.json").write_text(json.dumps({**index, "force_zeros_for_empty_prompt": False}))
    plain, told = TextEncoder(str(folder / "xl")), TextEncoder(str(tmp_path / "xl"))
    assert plain.describe() != told.describe()
    ours = told.load(None, "cpu").rows(TEXTS)(torch.tensor([0]))
    _, negative, _, pooled = DiffusionPipeline.from_pretrained(tmp_path / "xl").encode_prompt([TEXTS[0]], device="cpu")
    assert torch.allclose(ours["negative_encoder_hidden_states"], negative, atol=1e-6)
    assert torch.allclose(ours["negative_text_embeds"], pooled, atol=1e-6)


def test_a_text_is_encoded_once(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = TextEncoder(str(folder / "sd"))
    loaded = recipe.load(tmp_path, "cpu")
    told = [tick.done for tick in loaded.keep(TEXTS * 50)]
    assert told == [4]  # distinct ones
    assert "components" not in vars(loaded)  # what has said all is not kept in memory
    again = recipe.load(tmp_path, "cpu")
    monkeypatch.setattr(type(again), "components", property(lambda self: pytest.fail("was read again")))
    assert not list(again.keep(TEXTS))
    assert again.rows(TEXTS)(torch.tensor([1]))["encoder_hidden_states"].shape == (1, TOKENS, TEXT_WIDTH)


def test_damaged_rows_and_missing_encoders_are_told(folder: Path, tmp_path: Path) -> None:
    recipe = TextEncoder(str(folder / "sd"))
    list(recipe.load(tmp_path, "cpu").keep(TEXTS))
    [kept] = (tmp_path / "texts").glob("*/*.npy")
    kept.write_bytes(kept.read_bytes()[:50])
    with pytest.raises(UserError, match=r"is damaged .*delete it"):
        recipe.load(tmp_path, "cpu").rows(TEXTS)
    with pytest.raises(UserError, match="has no tokenizer; give the folder of a pipeline"):
        TextEncoder(str(folder / "sd" / "vae")).describe()


def test_a_tokenizer_that_says_no_length_is_refused(folder: Path, tmp_path: Path) -> None:
    """CLIP's texts are as long as it says, whatever is asked for."""
    shutil.copytree(folder / "sd", tmp_path / "sd")
    config = tmp_path / "sd" / "tokenizer" / "tokenizer_config.json"
    said = json.loads(config.read_text())
    del said["model_max_length"]
    config.write_text(json.dumps(said))
    for length in (None, 77):
        with pytest.raises(UserError, match="tokenizer does not say how many tokens a text has; copy it anew"):
            TextEncoder(str(tmp_path / "sd"), length=length).load(None, "cpu").rows(TEXTS)


def test_prompts_have_their_turns_and_their_classes(folder: Path, tmp_path: Path) -> None:
    file, encoder = tmp_path / "prompts.txt", TextEncoder(str(folder / "sd"))
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
def test_files_that_hold_no_prompts_are_told(folder: Path, tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "prompts.txt").write_text(text)
    with pytest.raises(UserError, match=words):
        Prompts(str(tmp_path / "prompts.txt"), TextEncoder(str(folder / "sd"))).load(tmp_path)
    with pytest.raises(UserError, match="cannot be read"):
        Prompts(str(tmp_path / "none.txt"), TextEncoder(str(folder / "sd"))).load(tmp_path)


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


def test_trained_on_captions_some_are_dropped_whole(folder: Path) -> None:
    net = Elastic.from_pretrained(folder / "sd", widths=(1.0,)).initial(0)
    pixels = np.zeros((4, 3, 16, 16), np.float32)
    data = ImageSet(pixels, None, "four", captions=tuple(TEXTS))
    _, condition = Batches(net, data, 64, flip=False, drop=0.5).images(torch.Generator().manual_seed(0))
    assert condition is not None
    assert set(condition) == {"encoder_hidden_states"}
    known = TextEncoder(str(folder / "sd")).load(None, "cpu").rows(TEXTS)(torch.arange(4))["encoder_hidden_states"]
    which = [int((row == known).flatten(1).all(1).nonzero()[0]) for row in condition["encoder_hidden_states"]]
    assert 30 < which.count(2) < 50  # half of all, and a quarter of the rest
    with pytest.raises(UserError, match="captions, but the images have none"):
        net.conditions_of(ImageSet(pixels, None, "four"))


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


def test_the_clip_score_is_transformers_own(folder: Path, tmp_path: Path) -> None:
    """Cosines by the whole stock model, which is told the pixels as they are."""
    clip, words = small_clip(tmp_path / "clip")
    recipe = Elastic.from_pretrained(folder / "sd", widths=(1.0,))
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
        replace(score, model=str(folder / "sd" / "text_encoder")).check()
    with pytest.raises(UserError, match="give it conditions=Prompts"):
        ClipScore(str(tmp_path / "clip"))


# ----------------------------------------------------------------------------------------------------------- training


def gradients(stage: Sandwich, net: Any, data: ImageSet) -> dict[str, torch.Tensor]:
    """Of the first step, as they stand before Adam sees them."""
    seen: dict[str, torch.Tensor] = {}
    update = Optimiser.update

    def noted(self: Optimiser, *_: Any) -> None:
        seen.update(
            {name: parameter.grad.clone() for name, parameter in self._named.items() if parameter.grad is not None}
        )
        update(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Optimiser, "update", noted)
        for _ in stage.fit(net, data, 0):
            pass
    return seen


def captioned_images() -> ImageSet:
    pixels = np.random.default_rng(0).standard_normal((8, 3, 16, 16)).astype(np.float32).clip(-1, 1)
    return ImageSet(pixels, None, "eight", captions=tuple(TEXTS * 2))


@pytest.mark.parametrize(
    "change", [{"accumulate": 3}, {"checkpointing": True}, {"accumulate": 2, "checkpointing": True}]
)
def test_how_a_batch_is_run_changes_no_gradient(folder: Path, change: dict[str, Any]) -> None:
    recipe = Elastic.from_pretrained(folder / "sd", widths=(0.5, 1.0))
    stage = Sandwich(steps=1, batch=8, warmup=0, distillation=0.5)
    expected = gradients(stage, recipe.initial(0), captioned_images())
    found = gradients(replace(stage, **change), recipe.initial(0), captioned_images())
    assert found.keys() == expected.keys()
    largest = max(float(gradient.abs().max()) for gradient in expected.values())
    for name, gradient in expected.items():
        assert torch.allclose(found[name], gradient, atol=1e-4 * largest), name
    assert stage.describe() == replace(stage, **change).describe()


def test_half_precision_changes_a_gradient_by_its_rounding(folder: Path) -> None:
    recipe = Elastic.from_pretrained(folder / "sd", widths=(1.0,))
    stage = Sandwich(steps=1, batch=8, warmup=0, full_only=True, distillation=0.5)
    expected = gradients(stage, recipe.initial(0), captioned_images())
    found = gradients(replace(stage, precision="bfloat16"), recipe.initial(0), captioned_images())
    name = "conv_out.weight"
    assert 0 < (found[name] - expected[name]).norm() < 0.1 * expected[name].norm()
    assert found[name].dtype == torch.float32


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_min_snr_weighs_all_predictions_as_errors_of_the_image(prediction: Any) -> None:
    """The same wrong image, told in each of three ways, costs the same: min(SNR, cap) of its squared error."""
    noise = NoiseSchedule(prediction=prediction)
    net = Elastic(TINY, (1.0,), noise=noise).initial(0)
    data = ImageSet(np.zeros((4, 1, 8, 8), np.float32), None, "four")
    batches = Batches(net, data, 4, flip=False, snr_cap=5.0)
    generator = torch.Generator().manual_seed(0)
    x0, wrong, drawn = torch.randn((3, 4, 1, 8, 8), generator=generator).unbind()
    t = torch.tensor([20, 300, 600, 900])
    x = batches.at(x0, t, drawn)
    abar = torch.from_numpy(net.alphas_cumprod).float()[t, None, None, None]
    said = (x - abar.sqrt() * wrong) / (1 - abar).sqrt()
    told = {"sample": wrong, "epsilon": said, "v_prediction": abar.sqrt() * said - (1 - abar).sqrt() * wrong}
    loss = batches.loss(told[prediction], batches.target(x0, t, drawn), x0, x, t)
    snr = (abar / (1 - abar)).flatten().clamp(max=5.0)
    assert float(loss) == pytest.approx(float((snr * (wrong - x0).square().mean((1, 2, 3))).mean()), rel=1e-3)


def test_a_batch_has_no_more_parts_than_images(folder: Path) -> None:
    recipe = Elastic.from_pretrained(folder / "sd", widths=(1.0,))
    with pytest.raises(UserError, match="accumulate=9 parts of a batch of 8"):
        Sandwich(steps=1, batch=8, accumulate=9)
    nothing = ImageSet(np.empty((0, 3, 16, 16), np.float32), None, "none", captions=("a",))
    with pytest.raises(UserError, match="there are no images to train on"):
        Sandwich(steps=1).check(recipe, nothing)
    Stages(()).check(recipe, nothing)
    with pytest.raises(UserError, match="reads captions, but the images have none"):
        Sandwich(steps=1).check(recipe, ImageSet(captioned_images().pixels, None, "eight"))
    with pytest.raises(UserError, match="nothing makes them of captions"):
        Sandwich(steps=1).check(replace(recipe, text=None), captioned_images())


# ---------------------------------------------------------------------------------------------------------- pipelines


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@pytest.mark.parametrize("scale", [1.0, 7.5])
@pytest.mark.parametrize("sampler", [DDIM(), DPMSolver()], ids=["DDIM", "DPM-Solver++"])
@pytest.mark.parametrize("kind", ["sd", "xl"])
def test_samples_are_those_of_the_stock_pipeline(
    kind: str, sampler: Any, scale: float, folder: Path, tmp_path: Path
) -> None:
    """At the same noise, with the same prompts."""
    stock: Any = DiffusionPipeline.from_pretrained(folder / kind)
    stock.set_progress_bar_config(disable=True)
    timesteps = leading(5, offset=1)
    if isinstance(sampler, DPMSolver):
        stock.scheduler = DPMSolverMultistepScheduler.from_config(stock.scheduler.config, final_sigmas_type="zero")
        stock.scheduler.set_timesteps(5)
        timesteps = free(*stock.scheduler.timesteps.tolist())
    recipe = Elastic.from_pretrained(folder / kind, widths=(0.5, 1.0))
    net = recipe.initial(0)
    guidance = Guidance(scale) if scale != 1 else None
    schedule = Schedule(tuple(Step(t, net.full_arch, (), guidance) for t in timesteps))
    conditions = prompts(tmp_path, recipe.text).load(tmp_path)
    ours = sample(net, schedule, sampler, 0, 0, 3, conditions)
    rows = [np.random.default_rng((0, i, 0)).standard_normal(net.state_shape, np.float32) for i in range(3)]
    theirs = stock(
        conditions.texts(0, 0, 3),
        latents=torch.from_numpy(np.stack(rows)),
        num_inference_steps=5,
        guidance_scale=scale,
        output_type="np",
    ).images
    assert torch.allclose(ours / 2 + 0.5, torch.from_numpy(theirs).permute(0, 3, 1, 2), atol=1e-4)


def exported(
    folder: Path, to: Path, kind: str = "sd", reuse: tuple[str, ...] = ("d1", "mid", "u0")
) -> tuple[Any, Schedule]:
    recipe = Elastic.from_pretrained(folder / kind, widths=(0.5, 1.0))
    net = recipe.initial(0)
    half = recipe.uniform(0.5)
    steps = (
        Step(801, net.full_arch, (), Guidance(3.0)),
        Step(601, net.full_arch, reuse, Guidance(3.0)),
        Step(401, half, (), Guidance(2.0)),
        Step(201, half),
    )
    schedule = Schedule(steps)
    export(net, schedule, DDIM(clip=False).describe(), {}, to)
    return net, schedule


@pytest.mark.parametrize("kind", ["sd", pytest.param("xl", marks=pytest.mark.long)])
def test_an_exported_folder_samples_without_this_project(kind: str, folder: Path, tmp_path: Path) -> None:
    """In a process that cannot import it; prompts, negative prompts, latents."""
    net, schedule = exported(folder, tmp_path / "model", kind)
    read_export(tmp_path / "model")
    texts, negative = ["a photo of a bag", "a small dress"], "a drawing"
    (tmp_path / "prompts.txt").write_text("\n".join(texts))
    conditions = Prompts(str(tmp_path / "prompts.txt"), net.recipe.text, negative).load(tmp_path)
    ours = sample(net, schedule, DDIM(clip=False), 7, 0, 2, conditions)
    program = f"""
import sys
for name in ("nas", "search_spaces", "evaluators", "optuna", "pydantic"):
    sys.modules[name] = None
from diffusers import DiffusionPipeline
from safetensors.torch import save_file
pipeline = DiffusionPipeline.from_pretrained("model", custom_pipeline="model", trust_remote_code=True)
seen = []
def callback(pipeline, number, timestep, given):
    seen.append((number, timestep, tuple(given["latents"].shape)))
    return given
made = pipeline({conditions.texts(7, 0, 2)!r}, negative_prompt={negative!r}, seed=7, output_type="pt", callback_on_step_end=callback)
assert [place for place, _, _ in seen] == [0, 1, 2, 3], seen
assert [t for _, t, _ in seen] == [801, 601, 401, 201], seen
save_file({{"images": made.images.contiguous()}}, "images.safetensors")
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    from safetensors.torch import load_file

    assert torch.allclose(load_file(tmp_path / "images.safetensors")["images"], ours / 2 + 0.5, atol=1e-5)


def test_an_exported_pipeline_is_called_as_stable_diffusions(folder: Path, tmp_path: Path) -> None:
    net, schedule = exported(folder, tmp_path / "model")
    pipeline: Any = DiffusionPipeline.from_pretrained(
        tmp_path / "model", custom_pipeline=str(tmp_path / "model"), trust_remote_code=True
    )
    pipeline.set_progress_bar_config(disable=True)
    texts = ["a photo of a bag", "a small dress"]
    made = pipeline(texts, seed=1, output_type="pt").images
    twice = pipeline(texts, seed=1, output_type="pt", num_images_per_prompt=2).images
    assert len(twice) == 4
    assert torch.allclose(twice[0], made[0], atol=1e-5)
    stronger = pipeline(texts, seed=1, output_type="pt", guidance_scale=9.0).images
    assert (stronger - made).abs().max() > 1e-4
    unguided = Schedule(tuple(replace(step, guidance=None) for step in schedule.steps))
    (tmp_path / "prompts.txt").write_text("\n".join(texts))
    conditions = Prompts(str(tmp_path / "prompts.txt"), net.recipe.text).load(tmp_path)
    ours = sample(net, unguided, DDIM(clip=False), 1, 0, 2, conditions) / 2 + 0.5
    found = pipeline(conditions.texts(1, 0, 2), seed=1, output_type="pt", guidance_scale=1).images
    assert torch.allclose(found, ours, atol=1e-5)
    embeds = net.text.rows(texts)(torch.arange(2))
    assert torch.allclose(pipeline(prompt_embeds=embeds, seed=1, output_type="pt").images, made, atol=1e-5)
    drawn = torch.stack(
        [torch.from_numpy(np.random.default_rng((1, i, 0)).standard_normal((4, 8, 8), np.float32)) for i in range(2)]
    )
    assert torch.equal(pipeline(texts, latents=drawn, seed=9, output_type="pt").images, made)
    held = pipeline(
        texts, seed=1, output_type="pt", callback_on_step_end=lambda p, i, t, given: {"latents": given["latents"] * 0}
    ).images
    assert torch.allclose(held[0], held[1], atol=1e-5)
    for wrong, words in (
        ({}, "give a prompt"),
        ({"prompt": texts, "negative_prompt": ["a"]}, "1 negative prompts for 2"),
        ({"prompt": texts, "class_labels": [1, 2]}, "no class_labels"),
        ({"prompt": texts, "batch_size": 5}, "2 prompts or labels for 5"),
        (
            {"prompt_embeds": {"encoder_hidden_states": embeds["encoder_hidden_states"]}},
            "the schedule guides; give prompt_embeds negative_encoder_hidden_states",
        ),
    ):
        with pytest.raises(ValueError, match=words):
            pipeline(**wrong)


def test_offloaded_and_compiled_networks_are_called_as_such(folder: Path, tmp_path: Path) -> None:
    """Hooks of offloading fire where blocks run one by one too; what is compiled runs where nothing is reused."""
    exported(folder, tmp_path / "model")
    pipeline: Any = DiffusionPipeline.from_pretrained(
        tmp_path / "model", custom_pipeline=str(tmp_path / "model"), trust_remote_code=True
    )
    pipeline.set_progress_bar_config(disable=True)
    made = pipeline(TEXTS[0], seed=1, output_type="pt").images
    order = type(pipeline).model_cpu_offload_seq.split("->")
    assert {"text_encoder", "unet_0", "unet_1", "vae"} <= set(order)
    calls: list[str] = []

    class Hook:
        def __init__(self, name: str) -> None:
            self.name = name

        def pre_forward(self, module: Any, *given: Any, **named: Any) -> Any:
            calls.append(self.name)
            return given, named

    pipeline.unet_0._hf_hook = Hook("unet_0")
    assert torch.equal(pipeline(TEXTS[0], seed=1, output_type="pt").images, made)
    assert calls == ["unet_0", "unet_0"]  # what keeps, and what reuses
    pipeline.unet_1 = torch.compile(pipeline.unet_1, backend="eager")
    assert torch.allclose(pipeline(TEXTS[0], seed=1, output_type="pt").images, made, atol=1e-5)


def test_names_in_an_exported_folder_stay_in_it(folder: Path, tmp_path: Path) -> None:
    exported(folder, tmp_path / "model")
    index = json.loads((tmp_path / "model" / "model_index.json").read_text())
    for change in (
        {"text_encoder": ["transformers", "AutoModel"]},
        {"text_encoder": ["diffusers", "CLIPTextModel"]},
        {"safety_checker": ["transformers", "CLIPTextModel"]},
    ):
        (tmp_path / "model" / "model_index.json").write_text(json.dumps({**index, **change}))
        with pytest.raises(ExportError, match="is no part of an exported pipeline"):
            read_export(tmp_path / "model")
    (tmp_path / "model" / "model_index.json").write_text(json.dumps(index))
    (tmp_path / "model" / "text_encoder").rename(tmp_path / "elsewhere")
    (tmp_path / "model" / "text_encoder").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ExportError, match="has no such folder"):
        read_export(tmp_path / "model")


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@pytest.mark.parametrize("kind", ["sd", "xl"])
@pytest.mark.parametrize("scale", [None, 5.0])
def test_one_network_for_all_steps_is_the_plain_pipeline(
    kind: str, scale: float | None, folder: Path, tmp_path: Path
) -> None:
    recipe = Elastic.from_pretrained(folder / kind, widths=(0.5, 1.0))
    net, half = recipe.initial(0), recipe.uniform(0.5)
    guidance = None if scale is None else Guidance(scale)
    schedule = Schedule(tuple(Step(t, half, (), guidance) for t in leading(4, offset=1)))
    if kind == "xl" and scale is None:
        plain = shutil.copytree(folder / "xl", tmp_path / "plain")
        index = json.loads((plain / "model_index.json").read_text())
        (plain / "model_index.json").write_text(json.dumps({**index, "force_zeros_for_empty_prompt": False}))
        other = Elastic.from_pretrained(plain, widths=(0.5, 1.0)).initial(0)
        export_stock(other, schedule, DDIM(clip=False).describe(), {}, tmp_path / "unlike")
        assert DiffusionPipeline.from_pretrained(tmp_path / "unlike").config.force_zeros_for_empty_prompt is False
    facts = export_stock(net, schedule, DDIM(clip=False).describe(), {}, tmp_path / "stock")
    assert facts["pipeline"] == {"sd": "StableDiffusionPipeline", "xl": "StableDiffusionXLPipeline"}[kind]
    assert facts["timesteps"]
    assert facts["guidance_scale"] == (scale or 1.0)
    stock: Any = DiffusionPipeline.from_pretrained(tmp_path / "stock")
    stock.set_progress_bar_config(disable=True)
    conditions = prompts(tmp_path, recipe.text).load(tmp_path)
    ours = sample(net, schedule, DDIM(clip=False), 0, 0, 2, conditions)
    rows = [np.random.default_rng((0, i, 0)).standard_normal(net.state_shape, np.float32) for i in range(2)]
    theirs = stock(
        conditions.texts(0, 0, 2),
        latents=torch.from_numpy(np.stack(rows)),
        num_inference_steps=4,
        guidance_scale=facts["guidance_scale"],
        output_type="np",
    ).images
    assert torch.allclose(ours / 2 + 0.5, torch.from_numpy(theirs).permute(0, 3, 1, 2), atol=1e-4)
    uneven = Schedule((Step(801, half, (), Guidance(2.0)), Step(1, half)))
    with pytest.raises(UserError, match="not all guided alike"):
        export_stock(net, uneven, DDIM(clip=False).describe(), {}, tmp_path / "other")


def test_folders_in_half_precision_are_read(folder: Path, tmp_path: Path) -> None:
    stock = StableDiffusionPipeline.from_pretrained(folder / "sd")
    stock.to(torch.float16).save_pretrained(tmp_path / "half", variant="fp16")
    assert (tmp_path / "half" / "unet" / "diffusion_pytorch_model.fp16.safetensors").is_file()
    recipe = Elastic.from_pretrained(tmp_path / "half", widths=(1.0,))
    net = recipe.initial(0)
    assert {parameter.dtype for parameter in net.full.parameters()} == {torch.float32}
    assert net.text is not None
    told = net.text.rows(TEXTS)(torch.arange(4))["encoder_hidden_states"]
    theirs, _ = StableDiffusionPipeline.from_pretrained(folder / "sd").encode_prompt(TEXTS, "cpu", 1, False)
    assert torch.allclose(told, theirs, atol=0.02)


NAMES = {
    "peft": ("unet.{}.lora_A.weight", "unet.{}.lora_B.weight", "{}"),
    "diffusers": ("unet.{}.lora.down.weight", "unet.{}.lora.up.weight", "{}"),
    "kohya": ("lora_unet_{}.lora_down.weight", "lora_unet_{}.lora_up.weight", "lora_unet_{}"),
}


@pytest.mark.parametrize("style", NAMES)
def test_low_rank_changes_are_added_before_anything_is_sliced(style: str, folder: Path, tmp_path: Path) -> None:
    """Against layers that answer with what they did, plus what goes through the two factors."""
    generator = torch.Generator().manual_seed(3)
    base = Elastic.from_pretrained(folder / "sd", widths=(0.5, 1.0))
    net = base.initial(0)
    layers = ["down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q", "up_blocks.1.resnets.0.conv1"]
    layers += ["down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_out.0"]
    tensors: dict[str, torch.Tensor] = {}
    factors: dict[str, tuple[torch.Tensor, torch.Tensor, float]] = {}
    for layer in layers:
        weight = net.full.get_submodule(layer).weight
        down = torch.randn((2, *weight.shape[1:]), generator=generator)
        up = torch.randn((weight.shape[0], 2, *(1,) * (weight.ndim - 2)), generator=generator)
        name = layer.replace(".", "_") if style == "kohya" else layer
        first, second, stem = (pattern.format(name) for pattern in NAMES[style])
        tensors |= {first: down, second: up}
        if style == "kohya":
            tensors[f"{stem}.alpha"] = torch.tensor(1.0)
        factors[layer] = (down, up, 0.5 if style == "kohya" else 1.0)
    save_file(tensors, tmp_path / "lora.safetensors")
    changed = replace(base, loras=(str(tmp_path / "lora.safetensors"),)).initial(0)
    x, t = torch.randn((2, *net.state_shape), generator=generator), torch.tensor([10, 900])
    told = net.recipe.anatomy.some_condition(2)
    told["encoder_hidden_states"] = torch.randn(told["encoder_hidden_states"].shape, generator=generator)

    def beside(down: torch.Tensor, up: torch.Tensor, scale: float) -> Any:
        def hook(module: Any, given: Any, answer: torch.Tensor) -> torch.Tensor:
            if down.ndim == 2:
                return answer + scale * torch.nn.functional.linear(torch.nn.functional.linear(given[0], down), up)
            inner = torch.nn.functional.conv2d(given[0], down, padding=module.padding)
            return answer + scale * torch.nn.functional.conv2d(inner, up)

        return hook

    for layer, parts in factors.items():
        net.full.get_submodule(layer).register_forward_hook(beside(*parts))
    with torch.no_grad():
        expected = net.full(x, t, **told).sample
        found = changed.full(x, t, **told).sample
    assert torch.allclose(found, expected, atol=1e-4 * float(expected.abs().max()))
    assert base.describe() != changed.recipe.describe()


@pytest.mark.parametrize("where", ["header", "beside"])
def test_how_much_a_lora_counts_is_read_where_it_stands(where: str, folder: Path, tmp_path: Path) -> None:
    """In the header that diffusers writes, or in peft's settings; else alpha is the rank, as diffusers takes it."""
    tensors = {
        "unet.conv_in.lora_A.weight": torch.randn(2, 4, 3, 3),
        "unet.conv_in.lora_B.weight": torch.randn(16, 2, 1, 1),
    }
    header = {"lora_adapter_metadata": json.dumps({"unet.lora_alpha": 8, "unet.r": 2})} if where == "header" else None
    base = Elastic.from_pretrained(folder / "sd", widths=(1.0,))
    before = base.initial(0).full.conv_in.weight

    def change(metadata: Any) -> torch.Tensor:
        save_file(tensors, tmp_path / "lora.safetensors", metadata)
        return replace(base, loras=(str(tmp_path / "lora.safetensors"),)).initial(0).full.conv_in.weight - before

    plain = change(None)
    if where == "beside":
        (tmp_path / "adapter_config.json").write_text(json.dumps({"lora_alpha": 8, "r": 2}))
    assert torch.allclose(change(header), 4 * plain, atol=1e-4)
    odd = json.dumps({"use_rslora": True, "lora_alpha": 8})
    (tmp_path / "adapter_config.json").write_text(odd)
    with pytest.raises(UserError, match="use_rslora=True is not known here"):
        change({"lora_adapter_metadata": odd} if where == "header" else None)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("text_encoder.layers.0.q_proj.lora_A.weight", "changes the text encoder too"),
        ("unet.nowhere.lora_A.weight", "belongs to no weight of the network"),
        ("unet.conv_in.something", "is no part of a LoRA that is known here"),
        ("unet.conv_in.lora_A.weight", "is missing"),
    ],
)
def test_what_cannot_be_added_is_never_left_out(name: str, words: str, folder: Path, tmp_path: Path) -> None:
    save_file({name: torch.zeros(2, 4)}, tmp_path / "lora.safetensors")
    net = Elastic.from_pretrained(folder / "sd", widths=(1.0,), loras=(str(tmp_path / "lora.safetensors"),))
    with pytest.raises(UserError, match=words):
        net.initial(0)


def test_parity_sees_what_reads_the_text(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    net = Elastic.from_pretrained(folder / "sd", widths=(1.0,)).initial(0)
    extract = net.extract

    def wrong(arch: Any) -> Any:
        made: Any = extract(arch)
        with torch.no_grad():
            made.down_blocks[0].attentions[0].transformer_blocks[0].attn2.to_k.weight.normal_(std=5.0)
        return made

    monkeypatch.setattr(net, "extract", wrong)
    with pytest.raises(RuntimeError, match="differ from the supernet"):
        export(net, Schedule((Step(500, net.full_arch),)), DDIM(clip=False).describe(), {}, tmp_path / "model")


def test_texts_have_the_length_and_the_width_that_the_network_reads(folder: Path, tmp_path: Path) -> None:
    recipe = Elastic.from_pretrained(folder / "sd", widths=(1.0,))
    assert recipe.tokens == TOKENS
    with pytest.raises(UserError, match=f"texts have {TOKENS} tokens, costs are reckoned with 77"):
        Stages(()).check(replace(recipe, tokens=77), captioned_images())
    save_file({"weight": torch.randn(4, 5)}, tmp_path / "classes.safetensors")
    table = ClassTable(str(tmp_path / "classes.safetensors"))
    with pytest.raises(UserError, match="texts have 5 channels, the network reads 16"):
        Stages(()).check(replace(recipe, text=table, tokens=1), captioned_images())
    index = json.loads((folder / "sd" / "unet" / "config.json").read_text())
    shutil.copytree(folder / "sd", tmp_path / "sd")
    (tmp_path / "sd" / "unet" / "config.json").write_text(json.dumps({**index, "sample_size": None}))
    with pytest.raises(UserError, match="has no sample_size"):
        Elastic.from_pretrained(tmp_path / "sd")


def test_few_large_subnets_are_kept(folder: Path) -> None:
    recipe = Elastic.from_pretrained(folder / "sd", widths=(0.5, 1.0))
    net = recipe.initial(0)
    bounded = LoadedElastic(recipe, net.full, net.codec, cache_bytes=1, text=net.text)
    for width in (0.5, 1.0, 0.5):
        bounded.denoiser(Step(5, recipe.uniform(width)))
        assert list(bounded._subnets) == [recipe.uniform(width)]


def test_pipelines_that_are_given_more_than_a_text_are_refused(folder: Path, tmp_path: Path) -> None:
    index = json.loads((folder / "sd" / "model_index.json").read_text())
    (tmp_path / "model_index.json").write_text(json.dumps({**index, "_class_name": "StableDiffusionInpaintPipeline"}))
    with pytest.raises(UserError, match="whose network is given the image and its mask too"):
        Elastic.from_pretrained(tmp_path)


def small_clip(folder: Path) -> tuple[CLIPModel, Any]:
    """Saved there, with its tokenizer."""
    words = tokenizer(folder, WORDS, TOKENS)
    words.save_pretrained(folder)
    torch.manual_seed(0)
    vision = {"image_size": 16, "patch_size": 8, "hidden_size": 16, "intermediate_size": 32}
    vision |= {"num_hidden_layers": 2, "num_attention_heads": 2, "projection_dim": TEXT_WIDTH}
    config = CLIPConfig(
        text_config=text_config(len(words), TOKENS, TEXT_WIDTH).to_dict(),
        vision_config=vision,
        projection_dim=TEXT_WIDTH,
    )
    clip = CLIPModel(config).eval()
    clip.save_pretrained(folder)
    return clip, words


def test_a_study_of_prompts_alone_runs_to_an_exported_pipeline(folder: Path, tmp_path: Path) -> None:
    """As a user does it: a frozen pipeline, a file of prompts, a CLIP model, no images; gates and evolution, report, export, sample."""
    small_clip(tmp_path / "clip")
    (tmp_path / "prompts.txt").write_text("\n".join(text for text in TEXTS if text))
    (tmp_path / "study.py").write_text(
        f"""
from evaluators.captions import TextsAlone
from evaluators.clip import ClipScore
from evaluators.conditions import Prompts
from nas.searchers.evolution import Evolution
from nas.searchers.gates import Gates
from nas.searchers.pruner import Pruner
from nas.study import Study
from search_spaces.intervals import leading, per_step
from search_spaces.options import Options
from search_spaces.patterns import legal
from search_spaces.stepwise import Stepwise
from search_spaces.supernet import Elastic
from search_spaces.training import Stages

net = Elastic.from_pretrained({str(folder / "sd")!r}, widths=(1.0,))
prompts = Prompts("prompts.txt", net.text)
steps = leading(4, offset=1)
study = Study(
    name="prompts",
    space=Stepwise(net, steps, per_step(steps), Options((1.0,)), patterns=legal(levels=2), guidance=(None, 7.5)),
    supernet=net,
    images=TextsAlone("prompts.txt", size=16),
    training=Stages(()),
    evaluator=ClipScore("clip", conditions=prompts, rungs=(4, 8)),
    searchers={{"gates": Gates(Pruner(steps=2, batch=1)), "evolution": Evolution(population=4)}},
    objectives=("clip_distance", "macs"),
    limits={{"macs_share": 0.6}},
    trials=5,
    verified=2,
)
"""
    )
    run = tmp_path / "run"
    for command in (
        ["run", "--dry-run"],
        ["run", "--quiet"],
        ["report"],
        ["export", "--within", "macs_share=0.6", "--to", str(tmp_path / "model")],
        ["sample", "--within", "macs_share=0.6", "--count", "3", "--to", str(tmp_path / "samples.png")],
    ):
        where = [] if "--dry-run" in command else ["--out", str(run)]
        done = nas(command[0], tmp_path / "study.py", *command[1:], *where)
        assert done.returncode == 0, (command, done.stdout, done.stderr)
    assert read_export(tmp_path / "model").texts == ("tokenizer", "text_encoder")
    alone = subprocess.run(
        [sys.executable, "sample.py", "--count", "2", "--prompt", "a bag", "--negative-prompt", "a coat"],
        cwd=tmp_path / "model",
        capture_output=True,
        text=True,
        check=False,
    )
    assert alone.returncode == 0, alone.stderr[-2000:]
    assert (tmp_path / "model" / "samples.png").exists()


def test_conditions_of_another_kind_are_refused(folder: Path, tmp_path: Path) -> None:
    recipe = Elastic.from_pretrained(folder / "sd", widths=(0.5, 1.0))
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


def test_agreement_needs_classes(folder: Path, tmp_path: Path) -> None:
    recipe = Elastic.from_pretrained(folder / "sd", widths=(1.0,))
    net = recipe.initial(0)
    told = prompts(tmp_path, recipe.text)
    score = Agreement(Digits(), conditions=told, rungs=(4, 8))
    with pytest.raises(UserError, match="asks for no classes"):
        score.check()
    with pytest.raises(UserError, match="asks for no classes"):
        score.load(net, tmp_path)


def with_pictures(folder: Path) -> Path:
    images = folder / "pictures"
    images.mkdir()
    for number in range(12):
        colour = (20 * number, 120, 255 - 20 * number)
        Image.new("RGB", (16, 16), colour).save(images / f"{number:02}.png")
        (images / f"{number:02}.txt").write_text(TEXTS[number % 4] or "a")
    return images


@pytest.mark.long
@pytest.mark.parametrize("kind", ["sd", "xl"])
def test_an_exported_folder_is_trained_on_captions_without_this_project(
    kind: str, folder: Path, tmp_path: Path
) -> None:
    exported(folder, tmp_path / "model", kind)
    images = with_pictures(tmp_path)
    program = """
import runpy, sys
for name in ("nas", "search_spaces", "evaluators", "optuna", "pydantic"):
    sys.modules[name] = None
sys.path.insert(0, "model")
sys.argv = ["train_diffusers.py", *sys.argv[1:]]
runpy.run_path("model/train_diffusers.py", run_name="__main__")
"""
    options = ["--images", str(images), "--captions", "txt", "--cpu", "--steps", "6", "--batch", "6", "--warmup", "0"]
    options += ["--accumulate", "2", "--checkpointing", "--snr-cap", "5", "--features", "0.1"]
    done = subprocess.run(
        [sys.executable, "-c", program, *options], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "unet_1: step" in done.stdout
    trained = read_export(tmp_path / "model" / "trained")
    assert trained.texts
    before = read_network(tmp_path / "model" / "unet_0").state_dict()
    after = read_network(tmp_path / "model" / "trained" / "unet_0").state_dict()
    text = next(name for name in before if name.endswith("attn2.to_k.weight"))
    assert not torch.equal(before[text], after[text])  # what reads the text has learned too
    missing = subprocess.run(
        [sys.executable, "-c", program, *options[:2], *options[4:], "--cpu"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert missing.returncode != 0
    assert "the networks need a caption for each image: give --captions txt" in missing.stderr


@pytest.mark.long
def test_parts_and_checkpoints_change_no_gradient_of_the_script(folder: Path, tmp_path: Path) -> None:
    exported(folder, tmp_path / "model")
    pixels = captioned_images().pixels
    losses = {}
    for name, change in (("plain", {}), ("parts", {"accumulate": 3, "checkpointing": True})):
        settings = Settings(steps=4, batch=6, warmup=0, **change)  # type: ignore[arg-type]
        where = tmp_path / name
        shutil.copytree(tmp_path / "model", where)
        ticks = train(where, pixels, settings, cpu=True, captions=list(captioned_images().captions or ()))
        losses[name] = [tick["loss"] for tick in ticks]
    assert losses["parts"] == pytest.approx(losses["plain"], rel=1e-3)
