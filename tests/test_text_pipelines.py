"""Pipelines that read a text, taken in, sampled from as the stock ones, and handed out."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
    VQModel,
)

from evaluators.conditions import Prompts
from evaluators.sampling import DDIM, DPMSolver, sample
from nas.base.exported import ExportError, read_export
from nas.contracts import Guidance, Schedule, Step, UserError
from nas.handover.export import export
from nas.handover.stock import export_stock
from search_spaces.codec import Autoencoder
from search_spaces.intervals import free, leading
from search_spaces.loaded import LoadedElastic
from search_spaces.supernet import Elastic
from search_spaces.text import TextEncoder
from tests.pipelines import TEXTS, exported, prompts, small_clip
from tests.test_cli import nas


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@pytest.mark.parametrize("scale", [1.0, 7.5])
@pytest.mark.parametrize("sampler", [DDIM(), DPMSolver()], ids=["DDIM", "DPM-Solver++"])
@pytest.mark.parametrize("kind", ["sd", "xl"])
def test_samples_are_those_of_the_stock_pipeline(
    kind: str, sampler: Any, scale: float, text_pipelines: Path, tmp_path: Path
) -> None:
    """At the same noise, with the same prompts."""
    stock: Any = DiffusionPipeline.from_pretrained(text_pipelines / kind)
    stock.set_progress_bar_config(disable=True)
    timesteps = leading(5, offset=1)
    if isinstance(sampler, DPMSolver):
        stock.scheduler = DPMSolverMultistepScheduler.from_config(stock.scheduler.config, final_sigmas_type="zero")
        stock.scheduler.set_timesteps(5)
        timesteps = free(*stock.scheduler.timesteps.tolist())
    recipe = Elastic.from_pretrained(text_pipelines / kind, widths=(0.5, 1.0))
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


@pytest.mark.parametrize("kind", ["sd", pytest.param("xl", marks=pytest.mark.long)])
def test_an_exported_folder_samples_without_this_project(kind: str, text_pipelines: Path, tmp_path: Path) -> None:
    """In a process that cannot import it; prompts, negative prompts, latents."""
    net, schedule = exported(text_pipelines, tmp_path / "model", kind)
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


def test_an_exported_pipeline_is_called_as_stable_diffusions(text_pipelines: Path, tmp_path: Path) -> None:
    net, schedule = exported(text_pipelines, tmp_path / "model")
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
    for scale in (1, 0.5, 0):  # as in Stable Diffusion's pipelines
        found = pipeline(conditions.texts(1, 0, 2), seed=1, output_type="pt", guidance_scale=scale).images
        assert torch.allclose(found, ours, atol=1e-5)
    embeds = net.text.rows(texts)(torch.arange(2))
    assert torch.allclose(pipeline(prompt_embeds=embeds, seed=1, output_type="pt").images, made, atol=1e-5)
    repeated = pipeline(prompt_embeds=embeds, seed=1, output_type="pt", num_images_per_prompt=2).images
    assert torch.allclose(repeated, twice, atol=1e-5)
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
            "must have rows named encoder_hidden_states, negative_encoder_hidden_states, .* guidance_scale=1",
        ),
        ({"prompt_embeds": embeds["encoder_hidden_states"]}, "and has a Tensor"),
        ({"prompt_embeds": embeds, "prompt": texts}, "prompts or prompt_embeds, not both"),
        ({"prompt_embeds": embeds, "negative_prompt": "a"}, "prompts or prompt_embeds, not both"),
        ({"prompt": texts, "seed": 1, "generator": torch.Generator()}, "seed or generator, not both"),
    ):
        with pytest.raises(ValueError, match=words):
            pipeline(**wrong)
    pipeline.scheduler = PNDMScheduler.from_config(pipeline.scheduler.config)
    with pytest.raises(ValueError, match="its own sampler, which PNDMScheduler cannot replace"):
        pipeline(texts)


def test_rows_of_xl_are_all_asked_for(text_pipelines: Path, tmp_path: Path) -> None:
    """Without its pooled output the negative text would be the prompt's own."""
    net, _ = exported(text_pipelines, tmp_path / "model", "xl")
    pipeline: Any = DiffusionPipeline.from_pretrained(
        tmp_path / "model", custom_pipeline=str(tmp_path / "model"), trust_remote_code=True
    )
    pipeline.set_progress_bar_config(disable=True)
    embeds = net.text.rows(["a photo of a bag"])(torch.arange(1))
    made = pipeline("a photo of a bag", seed=1, output_type="pt").images
    assert torch.allclose(pipeline(prompt_embeds=embeds, seed=1, output_type="pt").images, made, atol=1e-5)
    for missing in ("negative_text_embeds", "text_embeds", "time_ids"):
        some = {name: rows for name, rows in embeds.items() if name != missing}
        with pytest.raises(ValueError, match=rf"must have rows named .*{missing}"):
            pipeline(prompt_embeds=some)


@pytest.mark.long
def test_offloaded_and_compiled_networks_are_called_as_such(text_pipelines: Path, tmp_path: Path) -> None:
    """Hooks of offloading fire where blocks run one by one too; what is compiled runs where nothing is reused."""
    exported(text_pipelines, tmp_path / "model")
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


def test_names_in_an_exported_folder_stay_in_it(text_pipelines: Path, tmp_path: Path) -> None:
    exported(text_pipelines, tmp_path / "model")
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
    kind: str, scale: float | None, text_pipelines: Path, tmp_path: Path
) -> None:
    recipe = Elastic.from_pretrained(text_pipelines / kind, widths=(0.5, 1.0))
    net, half = recipe.initial(0), recipe.uniform(0.5)
    guidance = None if scale is None else Guidance(scale)
    schedule = Schedule(tuple(Step(t, half, (), guidance) for t in leading(4, offset=1)))
    if kind == "xl" and scale is None:
        plain = shutil.copytree(text_pipelines / "xl", tmp_path / "plain")
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


@pytest.mark.parametrize(
    ("kind", "sampler", "autoencoder", "words"),
    [
        ("sd", DDIM(clip=True), {}, "StableDiffusionPipeline does not clip with DDIM"),
        ("xl", DPMSolver(clip=True), {}, "StableDiffusionXLPipeline does not clip with DPMSolver"),
        ("sd", DDIM(clip=False), {"shift_factor": 0.1}, "StableDiffusionPipeline knows no shift_factor"),
        ("sd", DDIM(clip=False), {"latents_mean": [0.1] * 4}, "StableDiffusionPipeline knows no latents_mean"),
        ("xl", DDIM(clip=False), {"shift_factor": 0.1}, "StableDiffusionXLPipeline knows no shift_factor"),
        ("xl", DDIM(clip=False), {"latents_mean": [0.1] * 4, "latents_std": [2.0] * 4}, ""),
        ("sd", DDIM(clip=False), "VQModel", "StableDiffusionPipeline cannot call a VQModel"),
    ],
)
def test_stock_pipelines_of_texts_that_would_sample_otherwise_are_refused(
    kind: str, sampler: Any, autoencoder: Any, words: str, text_pipelines: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(text_pipelines / kind, tmp_path / kind)
    vae = AutoencoderKL.from_pretrained(folder / "vae")
    if autoencoder == "VQModel":
        parts = ("block_out_channels", "down_block_types", "up_block_types", "norm_num_groups", "latent_channels")
        vae = VQModel(**{name: vae.config[name] for name in parts}, scaling_factor=0.5)
    else:
        vae.register_to_config(**autoencoder)
    vae.save_pretrained(folder / "vae")
    net = Elastic.from_pretrained(folder, widths=(0.5, 1.0), codec=Autoencoder(str(folder / "vae"))).initial(0)
    schedule = Schedule(tuple(Step(t, net.full_arch, (), Guidance(2.0)) for t in leading(4, offset=1)))
    with pytest.raises(UserError, match=words) if words else nullcontext():
        export_stock(net, schedule, sampler.describe(), {}, tmp_path / "stock")


def test_stock_pipelines_pad_texts_as_their_tokenizer_says(text_pipelines: Path, tmp_path: Path) -> None:
    text = TextEncoder(str(text_pipelines / "sd"), length=5)
    net = Elastic.from_pretrained(text_pipelines / "sd", widths=(0.5, 1.0), text=text).initial(0)
    schedule = Schedule(tuple(Step(t, net.full_arch, (), Guidance(2.0)) for t in leading(4, offset=1)))
    with pytest.raises(UserError, match="its texts have 5 tokens, and StableDiffusionPipeline pads them to 12"):
        export_stock(net, schedule, DDIM(clip=False).describe(), {}, tmp_path / "stock")
    assert text.describe()["padded to"] == 5, "rows of this length are no rows of the tokenizer's"


def test_a_pipeline_with_a_further_network_in_each_step_is_refused(text_pipelines: Path, tmp_path: Path) -> None:
    """Its network alone may be taken."""
    folder = shutil.copytree(text_pipelines / "sd", tmp_path / "controlled")
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, "controlnet": ["diffusers", "ControlNetModel"]}))
    with pytest.raises(UserError, match="has controlnet, a ControlNetModel, which has a hand in each step"):
        Elastic.from_pretrained(folder)
    assert Elastic.from_pretrained(folder / "unet", widths=(0.5, 1.0)).text is not None


def test_folders_in_half_precision_are_read(text_pipelines: Path, tmp_path: Path) -> None:
    stock = StableDiffusionPipeline.from_pretrained(text_pipelines / "sd")
    stock.to(torch.float16).save_pretrained(tmp_path / "half", variant="fp16")
    assert (tmp_path / "half" / "unet" / "diffusion_pytorch_model.fp16.safetensors").is_file()
    recipe = Elastic.from_pretrained(tmp_path / "half", widths=(1.0,))
    net = recipe.initial(0)
    assert {parameter.dtype for parameter in net.full.parameters()} == {torch.float32}
    assert net.text is not None
    told = net.text.rows(TEXTS)(torch.arange(4))["encoder_hidden_states"]
    theirs, _ = StableDiffusionPipeline.from_pretrained(text_pipelines / "sd").encode_prompt(TEXTS, "cpu", 1, False)
    assert torch.allclose(told, theirs, atol=0.02)


@pytest.mark.parametrize("wrong", [5.0, float("nan")])
def test_parity_sees_what_reads_the_text(
    wrong: float, text_pipelines: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    net = Elastic.from_pretrained(text_pipelines / "sd", widths=(1.0,)).initial(0)
    extract = net.extract

    def changed(arch: Any) -> Any:
        made: Any = extract(arch)
        with torch.no_grad():
            made.down_blocks[0].attentions[0].transformer_blocks[0].attn2.to_k.weight.fill_(wrong)
        return made

    monkeypatch.setattr(net, "extract", changed)
    with pytest.raises(RuntimeError, match="differ from the supernet"):
        export(net, Schedule((Step(500, net.full_arch),)), DDIM(clip=False).describe(), {}, tmp_path / "model")


def test_few_large_subnets_are_kept(text_pipelines: Path) -> None:
    recipe = Elastic.from_pretrained(text_pipelines / "sd", widths=(0.5, 1.0))
    net = recipe.initial(0)
    bounded = LoadedElastic(recipe, net.full, net.codec, cache_bytes=1, text=net.text)
    for width in (0.5, 1.0, 0.5):
        bounded.denoiser(Step(5, recipe.uniform(width)))
        assert list(bounded._subnets) == [recipe.uniform(width)]
    guided = Step(5, recipe.uniform(1.0), (), Guidance(3.0, recipe.uniform(0.5)))
    bounded.denoiser(guided)
    both = {*bounded._subnets.values()}  # which no call of the step makes anew
    bounded.denoiser(guided)
    assert len(both) == 2
    assert both == {*bounded._subnets.values()}


def test_pipelines_that_are_given_more_than_a_text_are_refused(text_pipelines: Path, tmp_path: Path) -> None:
    index = json.loads((text_pipelines / "sd" / "model_index.json").read_text())
    (tmp_path / "model_index.json").write_text(json.dumps({**index, "_class_name": "StableDiffusionInpaintPipeline"}))
    with pytest.raises(UserError, match="whose network is given the image and its mask too"):
        Elastic.from_pretrained(tmp_path)


@pytest.mark.long
def test_a_study_of_prompts_alone_runs_to_an_exported_pipeline(text_pipelines: Path, tmp_path: Path) -> None:
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

net = Elastic.from_pretrained({str(text_pipelines / "sd")!r}, widths=(1.0,))
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
