"""Texts, from a caption or a prompt to what a network reads; pipelines that read them taken in, sampled from, and handed out."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, DPMSolverMultistepScheduler, StableDiffusionPipeline
from safetensors.torch import save_file

from evaluators.agreement import Agreement
from evaluators.conditions import Captions, Labels, Prompts
from evaluators.images import Digits
from evaluators.sampling import DDIM, DPMSolver, sample
from nas.base.exported import ExportError, read_export
from nas.contracts import Guidance, ImageSet, Schedule, Step, UserError
from nas.handover.export import export
from nas.handover.stock import export_stock
from search_spaces.intervals import free, leading
from search_spaces.noise import NoiseSchedule
from search_spaces.supernet import ElasticUNet
from search_spaces.text import ClassTable, TextEncoder
from search_spaces.training.optimiser import Batches
from tests.pipelines import TEXT_WIDTH, TOKENS, stable_diffusion, stable_diffusion_xl

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


def test_a_text_is_encoded_once(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = TextEncoder(str(folder / "sd"))
    told = [tick.done for tick in recipe.load(tmp_path, "cpu").keep(TEXTS * 50)]
    assert told == [4]  # distinct ones
    again = recipe.load(tmp_path, "cpu")
    monkeypatch.setattr(type(again), "components", property(lambda self: pytest.fail("was read again")))
    assert not list(again.keep(TEXTS))
    assert again.rows(TEXTS)(torch.tensor([1]))["encoder_hidden_states"].shape == (1, TOKENS, TEXT_WIDTH)


def test_damaged_rows_and_missing_encoders_are_told(folder: Path, tmp_path: Path) -> None:
    recipe = TextEncoder(str(folder / "sd"))
    list(recipe.load(tmp_path, "cpu").keep(TEXTS))
    [kept] = (tmp_path / "texts").iterdir()
    kept.write_bytes(kept.read_bytes()[:50])
    with pytest.raises(UserError, match=r"is damaged .*delete it"):
        recipe.load(tmp_path, "cpu").rows(TEXTS)
    with pytest.raises(UserError, match="has no tokenizer; give the folder of a pipeline"):
        TextEncoder(str(folder / "sd" / "vae")).describe()


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
    net = ElasticUNet.from_pretrained(folder / "sd", widths=(1.0,)).initial(0)
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
    timesteps, noise = leading(5, offset=1), None
    if isinstance(sampler, DPMSolver):
        stock.scheduler = DPMSolverMultistepScheduler.from_config(stock.scheduler.config, final_sigmas_type="zero")
        stock.scheduler.set_timesteps(5)
        timesteps = free(*stock.scheduler.timesteps.tolist())
        noise = NoiseSchedule.from_scheduler(folder / kind)
        noise = replace(noise, final_alpha="one")
    recipe = ElasticUNet.from_pretrained(folder / kind, widths=(0.5, 1.0), noise=noise)
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
    recipe = ElasticUNet.from_pretrained(folder / kind, widths=(0.5, 1.0))
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


@pytest.mark.parametrize("kind", ["sd", "xl"])
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
    net, _ = exported(folder, tmp_path / "model")
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
    recipe = ElasticUNet.from_pretrained(folder / kind, widths=(0.5, 1.0))
    net, half = recipe.initial(0), recipe.uniform(0.5)
    guidance = None if scale is None else Guidance(scale)
    schedule = Schedule(tuple(Step(t, half, (), guidance) for t in leading(4, offset=1)))
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
    recipe = ElasticUNet.from_pretrained(tmp_path / "half", widths=(1.0,))
    net = recipe.initial(0)
    assert {parameter.dtype for parameter in net.full.parameters()} == {torch.float32}
    told = net.text.rows(TEXTS)(torch.arange(4))["encoder_hidden_states"]
    theirs, _ = StableDiffusionPipeline.from_pretrained(folder / "sd").encode_prompt(TEXTS, "cpu", 1, False)
    assert torch.allclose(told, theirs, atol=0.02)


def test_pipelines_that_are_given_more_than_a_text_are_refused(folder: Path, tmp_path: Path) -> None:
    index = json.loads((folder / "sd" / "model_index.json").read_text())
    (tmp_path / "model_index.json").write_text(json.dumps({**index, "_class_name": "StableDiffusionInpaintPipeline"}))
    with pytest.raises(UserError, match="whose network is given the image and its mask too"):
        ElasticUNet.from_pretrained(tmp_path)


def test_agreement_needs_classes(folder: Path, tmp_path: Path) -> None:
    recipe = ElasticUNet.from_pretrained(folder / "sd", widths=(1.0,))
    net = recipe.initial(0)
    told = prompts(tmp_path, recipe.text)
    score = Agreement(Digits(), conditions=told, rungs=(4, 8))
    with pytest.raises(UserError, match="asks for no classes"):
        score.load(net, tmp_path)
