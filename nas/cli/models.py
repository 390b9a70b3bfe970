"""Commands that hand a schedule over: export it, sample from it, train it."""

from __future__ import annotations

import enum
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from nas.cli.options import (
    DeviceOption,
    JsonOption,
    OutOption,
    SearcherOption,
    SeedOption,
    StorageOption,
    StudyFile,
    TrialOption,
    WithinOption,
    check_device,
    chosen_of,
    facts_of,
    print_json,
    resumable,
    run_folder,
    summary_of,
)
from nas.cli.progress import follow, progress_bars
from nas.cli.terminal import notes, out
from nas.contracts import Progress, UserError


class Precision(enum.StrEnum):
    no = "no"
    bf16 = "bf16"
    fp16 = "fp16"


class Labels(enum.StrEnum):
    folders = "folders"


class Captions(enum.StrEnum):
    txt = "txt"


class Resize(enum.StrEnum):
    box = "box"
    bilinear = "bilinear"
    bicubic = "bicubic"
    lanczos = "lanczos"


def export(
    study_file: StudyFile,
    to: Annotated[Path, typer.Option(help="New or empty folder.", show_default=False)],
    trial: TrialOption = None,
    within: WithinOption = None,
    searcher: SearcherOption = None,
    seed: SeedOption = 0,
    programs: Annotated[
        bool, typer.Option("--programs", help="Also each network as a torch.export program, model.pt2.")
    ] = False,
    stock: Annotated[
        bool,
        typer.Option("--stock", help="As diffusers' own pipeline, of a schedule that runs one network at all steps."),
    ] = False,
    out_dir: OutOption = None,
    storage: StorageOption = None,
    device: Annotated[
        str,
        typer.Option(
            help="Where the best of a budget is scored on new noises, where `nas run` has not: cpu, cuda, cuda:1, mps."
        ),
    ] = "cpu",
    as_json: JsonOption = False,
) -> None:
    """Write a trial's networks as stock diffusers folders, with the schedule, provenance and a proof of equality."""
    from nas.base.files import check_new
    from nas.library import StudyRun
    from nas.study import load_study

    check_new(to)
    check_device(device)
    if stock and programs:
        raise UserError(
            "--programs are of exported folders, and --stock writes diffusers' own pipeline; give one of them"
        )
    study = load_study(study_file)
    folder = run_folder(study, out_dir)
    run = StudyRun(study, folder, storage, device)
    with resumable(folder):
        chosen = chosen_of(run, searcher, seed, trial, within)
    said: dict[str, Any] = {}
    if stock:
        said = run.export_stock(chosen, to)
        own = (
            ""
            if said["timesteps"]
            else ", which takes other steps than the schedule: no setting of a stock scheduler leads to its own"
        )
        further = {name: value for name, value in said.items() if name not in ("pipeline", "steps", "timesteps")}
        call = ", ".join(f"{name}={value}" for name, value in {"num_inference_steps": said["steps"], **further}.items())
        notes.print(
            f"{said['pipeline']}: call it with {call}{own}",
            highlight=False,
            soft_wrap=True,
        )
    else:
        failed = run.export(chosen, to, programs)
        for name, reason in failed.items():
            notes.print(f"{name} has no model.pt2: {reason}", highlight=False, soft_wrap=True)
    if as_json:
        print_json(facts_of(chosen, folder=str(to.resolve()), **({"stock": said} if stock else {})))
    else:
        out.print(f"{summary_of(chosen, study)} is in {to}", highlight=False, soft_wrap=True)


def sample(
    study_file: StudyFile,
    to: Annotated[Path, typer.Option(help="A .png grid, or .npy with float32 images in [-1, 1].", show_default=False)],
    trial: TrialOption = None,
    within: WithinOption = None,
    searcher: SearcherOption = None,
    search_seed: Annotated[int, typer.Option(min=0, help="Seed of the search whose trial is meant.")] = 0,
    count: Annotated[int, typer.Option(min=1, help="Images.")] = 64,
    seed: Annotated[
        int, typer.Option(min=0, max=2**32 - 1, help="Seed of the noise; image i depends on it and on i alone.")
    ] = 0,
    out_dir: OutOption = None,
    storage: StorageOption = None,
    device: DeviceOption = "cpu",
    as_json: JsonOption = False,
) -> None:
    """Draw images with a trial's schedule; where they are of classes, the picture shows them class by class."""
    import numpy as np

    from nas.library import StudyRun
    from nas.study import load_study

    if to.suffix not in (".png", ".npy"):
        raise UserError(f"--to {to} must end in .png or .npy")
    check_device(device)
    study = load_study(study_file)
    folder = run_folder(study, out_dir)
    run = StudyRun(study, folder, storage, device)
    with resumable(folder):
        chosen = chosen_of(run, searcher, search_seed, trial, within)
    images = run.sample(chosen, count, seed)
    to.parent.mkdir(parents=True, exist_ok=True)
    if to.suffix == ".npy":
        np.save(to, images)
    else:
        from nas.results.samples import class_by_class, draw_samples

        images = class_by_class(images, study.evaluator, seed)
        draw_samples(images, to, scale=max(1, 96 // images.shape[-1]))
    if as_json:
        print_json(facts_of(chosen, file=str(to.resolve()), images=count))
    else:
        out.print(f"{count} images of {summary_of(chosen, study)} are in {to}", highlight=False, soft_wrap=True)


def train(
    export_dir: Annotated[
        Path, typer.Argument(metavar="EXPORT_DIR", help="Folder that `nas export` wrote.", show_default=False)
    ],
    images: Annotated[
        str | None,
        typer.Option(
            help="Folder of pictures, .npy in [-1, 1], or `digits` (`digits:16` enlarged). By default what the supernet of --study was trained on.",
            show_default=False,
        ),
    ] = None,
    study_file: Annotated[
        str | None,
        typer.Option("--study", help="Study whose evaluator scores it, before and after.", show_default=False),
    ] = None,
    out_dir: OutOption = None,
    storage: StorageOption = None,
    steps: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Gradient steps of all networks together. Default, here and below: as train.json says.",
            show_default=False,
        ),
    ] = None,
    batch: Annotated[int | None, typer.Option(min=1, help="Images of a step.", show_default=False)] = None,
    learning_rate: Annotated[float | None, typer.Option(min=0, help="Peak of a cosine.", show_default=False)] = None,
    distillation: Annotated[
        float | None,
        typer.Option(min=0, max=1, help="Share of the full network's prediction in the target.", show_default=False),
    ] = None,
    features: Annotated[
        float | None,
        typer.Option(min=0, help="Weight of the distance of blocks' maps to the full network's.", show_default=False),
    ] = None,
    precision: Annotated[
        Precision | None, typer.Option(help="Number format of the networks' calls.", show_default=False)
    ] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Seed of the training's noises.", show_default=False)] = None,
    validate_every: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Gradient steps of a network between two scores with --study, on its first rung's samples; 0 for none. "
            "By default a quarter of the network's steps.",
            show_default=False,
        ),
    ] = None,
    resize: Annotated[
        Resize | None, typer.Option(help="Crop and resize pictures of other sizes by this rule.", show_default=False)
    ] = None,
    labels: Annotated[
        Labels | None, typer.Option(help="The folders right below --images are the classes.", show_default=False)
    ] = None,
    captions: Annotated[
        Captions | None,
        typer.Option(
            help="Beside each picture of --images lies a .txt of its name, what it shows.", show_default=False
        ),
    ] = None,
    changed_weights: Annotated[
        bool,
        typer.Option("--changed-weights", help="Take networks that were changed on purpose after they were written."),
    ] = False,
    device: DeviceOption = "cpu",
    as_json: JsonOption = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress bars.")] = False,
) -> None:
    """Fine-tune an exported folder's networks into EXPORT_DIR/trained, each on the timesteps it serves. The same command goes on after a stop."""
    from nas.base.exported import check_hashes, read_export
    from nas.base.interrupts import whole
    from nas.handover.export import PROGRAM, write_programs
    from nas.handover.training import Validation, check_origin, fine_tune, score_and_book, train_on
    from nas.study import load_study

    folder = export_dir.resolve()
    exported = read_export(folder)
    plan = exported.training
    if not changed_weights:
        check_hashes(folder, exported.parts, exported.provenance, "--changed-weights")
    check_device(device)
    if images is None and study_file is None:
        raise UserError("what to train on is not said; give --images, or the --study whose images are to be used")
    of_images = {"--resize": resize, "--labels": labels, "--captions": captions} if images is None else {}
    for option in [name for name, value in of_images.items() if value is not None]:
        raise UserError(f"{option} is of --images, and the study's own are trained on; leave it out, or give --images")
    if validate_every and study_file is None:
        raise UserError("--validate-every is of scores, which need the --study; give it, or leave --validate-every out")
    study = load_study(study_file) if study_file else None
    searched = run_folder(study, out_dir) if study else None
    given = {
        "steps": steps,
        "batch": batch,
        "learning_rate": learning_rate,
        "distillation": distillation,
        "features": features,
        "precision": None if precision is None else precision.value,
        "seed": seed,
    }
    if study is not None and searched is not None:
        check_origin(study, searched, exported)
    settings = {**plan["settings"], **{name: value for name, value in given.items() if value is not None}}
    bars = progress_bars(quiet or as_json)
    facts: dict[str, Any] = {"trained": str(folder / "trained")}
    with resumable(folder), bars:
        from search_spaces.shipped.train_diffusers import data_digest, keep_settings, settings_of
        from search_spaces.shipped.train_diffusers import train as begin

        train_on(device)
        chosen = settings_of(settings)
        conditional, reads = "null_label" in plan or labels is not None, "text" in plan or captions is not None
        if images is not None:
            if study is not None and study.images.load().held_out is not None:
                notes.print(
                    "the study keeps some images from training, to compare samples with; whether --images holds any of them is not known, so leave it out "
                    "to train on the study's own",
                    highlight=False,
                    soft_wrap=True,
                )
            # These first: that they are wrong is seen at once.
            classes = _labels(images, labels, plan.get("null_label")) if conditional else None
            texts = _captions(images, captions) if reads else None
            pixels = follow(bars, _pixels(images, plan.get("image_shape", plan["shape"]), resize))
        else:
            assert study is not None
            data = study.images.load()
            if not len(data):
                raise UserError(f"study {study.name} has no images to train on; give --images")
            pixels, classes = data.pixels, data.labels if conditional else None
            texts = data.texts if reads else None
        keep_settings(folder, chosen, data_digest(pixels, classes, texts))
        ticks = begin(folder, pixels, chosen, device == "cpu", changed_weights, whole, classes, texts)
        validation = None
        if study is not None and searched is not None and validate_every != 0:
            validation = Validation(study, searched, exported, device)
        follow(bars, fine_tune(ticks, folder, validation, validate_every))
        programs = [name for name in plan["timesteps"] if (folder / name / PROGRAM).exists()]
        for name, reason in write_programs(folder / "trained", programs, plan["shape"]).items():
            notes.print(f"trained/{name} has no model.pt2: {reason}", highlight=False, soft_wrap=True)
        if study is not None and searched is not None:
            facts |= follow(bars, score_and_book(study, searched, storage, exported, device, changed_weights))
    if as_json:
        print_json(facts)
    else:
        out.print(facts["trained"], highlight=False, soft_wrap=True)
        if "words" in facts:
            out.print(facts["words"], highlight=False, soft_wrap=True)


def _labels(images: str, labels: Labels | None, classes: int | None) -> Any:
    """Of the digits, or by folders; None where nothing says any."""
    from search_spaces.shipped.train_data import folder_labels

    if images.partition(":")[0] == "digits":
        from evaluators.images import Digits

        return Digits().load().labels
    return folder_labels(Path(images), classes) if labels else None


def _captions(images: str, captions: Captions | None) -> Any:
    """Of the files beside the pictures; None where nothing says that there are any."""
    from search_spaces.shipped.train_data import folder_captions

    return folder_captions(Path(images)) if captions else None


def _pixels(images: str, shape: Sequence[int], resize: str | None) -> Generator[Progress, None, Any]:
    """Of a named set, a folder or an array; (n, channels, height, width) in [-1, 1]."""
    from search_spaces.shipped.train_data import read_images

    name, _, size = images.partition(":")
    if name == "digits" and (not size or size.isdigit()):
        from evaluators.images import Digits

        pixels = Digits(int(size or 8)).load().pixels
        if pixels.shape[1:] != tuple(shape):
            raise UserError(
                f"--images {images} are {pixels.shape[1:]}, the networks take {tuple(shape)}; use digits:{shape[-1]}"
            )
        return pixels
    path = Path(images)
    if not path.exists():
        raise UserError(f"--images {images} does not exist; give a folder of pictures, an .npy file, or digits")
    for done, total, found in read_images(path, shape[0], shape[1:], resize):  # noqa: B007  the last is whole
        if done % 100 == 0 or done == total:
            yield Progress("reading images", done, total)
    return found
