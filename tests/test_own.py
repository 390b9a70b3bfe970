"""A network that diffusers does not have, made elastic by its shapes: the one that the documentation shows, and one that attends and takes labels."""

from __future__ import annotations

import importlib
import inspect
import pickle
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import ConfigMixin, ModelMixin, UNet2DModel
from diffusers.configuration_utils import register_to_config
from diffusers.models.embeddings import get_timestep_embedding
from fvcore.nn import FlopCountAnalysis
from torch import nn

import nas
from evaluators.conditions import Labels
from evaluators.frechet import Frechet
from evaluators.images import Digits
from nas.contracts import UserError
from nas.searchers.evolution import Evolution
from nas.study import Study
from nas.testing import check_space, check_supernet
from search_spaces.intervals import equal, per_step, uniform
from search_spaces.networks.own import Own
from search_spaces.networks.slices import Arch
from search_spaces.options import Options
from search_spaces.patterns import Every, Only
from search_spaces.stepwise import Stepwise
from search_spaces.supernet import Elastic
from search_spaces.training import Sandwich, Stages
from search_spaces.training.importance import Order

PAGE = Path(__file__).parent.parent / "docs" / "bring-your-own.md"


class Attend(ModelMixin, ConfigMixin):
    """Pixels attend to each other. `extra`: channels beside those that shrink. `groups`: of the last convolution."""

    @register_to_config
    def __init__(
        self,
        sample_size: int = 8,
        in_channels: int = 1,
        channels: int = 32,
        heads: int = 4,
        hidden: tuple[int, ...] = (16, 32),
        num_class_embeds: int | None = 11,
        extra: int = 0,
        groups: int = 1,
        batch_norm: bool = False,
    ) -> None:
        super().__init__()
        self.start = nn.Conv2d(in_channels, channels, 1)
        self.labels = nn.Embedding(num_class_embeds or 1, 32)
        self.told = nn.Linear(32, channels)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.out = nn.Linear(channels + extra, channels) if extra else nn.Linear(channels, channels)
        self.first, self.second = nn.Linear(channels, hidden[0]), nn.Linear(hidden[0], hidden[1])
        self.back = nn.Linear(hidden[1], channels)
        self.end = nn.Conv2d(channels, in_channels, 3, padding=1, groups=1)
        self.mixed = nn.Conv2d(channels, channels, 3, padding=1, groups=groups)
        self.norm = nn.BatchNorm2d(channels) if batch_norm else nn.Identity()

    def forward(self, sample: Any, timestep: Any, class_labels: Any = None, return_dict: bool = True) -> Any:
        x, heads = self.norm(self.mixed(self.start(sample))), self.config.heads
        time = get_timestep_embedding(timestep, 32) + self.labels(class_labels)
        hidden = x.flatten(2).transpose(1, 2) + self.told(time)[:, None]
        q, k, v = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in self.qkv(hidden).chunk(3, dim=-1))
        attended = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        hidden = hidden + self.out(attended)
        hidden = hidden + self.back(self.second(self.first(hidden).relu()).relu())
        return (self.end(hidden.transpose(1, 2).reshape(x.shape)),)


ATTEND = Own(Attend, shrinks=("channels", "heads", "hidden"), parts={"qkv": (3, 1)})


@pytest.fixture
def attend() -> Elastic:
    return Elastic({}, widths=(0.25, 0.5, 1.0), network=ATTEND)


@pytest.fixture
def mixer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Elastic:
    """Of the page, pasted into a file."""
    (tmp_path / "own_mixer.py").write_text(re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.S)[-1])
    monkeypatch.syspath_prepend(str(tmp_path))
    module = importlib.import_module("own_mixer")
    made: Elastic = importlib.reload(module).mixer
    return made


def test_the_laws_hold(attend: Elastic, mixer: Elastic) -> None:
    grid, patterns = uniform(6), (Every(1), Every(2), Only(()))
    guided = Stepwise(attend, grid, equal(grid, 3), patterns=patterns, guidance=(None, 2.0))
    for net, space in ((attend, guided), (mixer, Stepwise(mixer, grid, equal(grid, 3), patterns=patterns))):
        check_space(space)
        check_supernet(net.initial(0), space)


def test_a_narrower_subnet_is_the_full_network_without_its_last_channels(mixer: Elastic) -> None:
    """A channel of this network whose weights are zero is zero throughout, so that the full network says what a subnet has to."""
    loaded = mixer.initial(0)
    x, t = torch.randn((3, 1, 8, 8), generator=torch.Generator().manual_seed(1)), torch.tensor([5, 50, 500])
    for width in (0.25, 0.5):
        kept = int(64 * width)
        masked = mixer.initial(0).full
        with torch.no_grad():
            masked.patches.weight[kept:] = 0
            masked.patches.bias[kept:] = 0
            for block in masked.blocks:
                for part in (slice(kept, 64), slice(64 + kept, 128)):
                    block.told.weight[part] = 0
                    block.told.bias[part] = 0
                block.across.bias[:] = 0
                block.up.weight[4 * kept :] = 0
                block.up.bias[4 * kept :] = 0
                block.down.weight[kept:] = 0
                block.down.bias[kept:] = 0
            for block in loaded.full.blocks:
                block.across.bias[:] = 0
        loaded.forget()
        with torch.no_grad():
            ours = loaded.forward(mixer.uniform(width), x, t)
            theirs = masked(x, t)[0]
        assert float((ours - theirs).abs().max()) <= 1e-5


def test_parts_keep_the_leading_channels_of_each(attend: Elastic) -> None:
    loaded = attend.initial(0)
    half, full = loaded.extract(attend.uniform(0.5)), loaded.full
    assert (half.config.channels, half.config.heads, list(half.config.hidden)) == (16, 2, [8, 16])
    kept = torch.cat([full.qkv.weight[start : start + 16, :16] for start in (0, 32, 64)])
    assert torch.equal(half.qkv.weight, kept)


class Joined(ModelMixin, ConfigMixin):
    """A shift and a scale from a table of classes, and a transposed convolution behind a join: of neither weight the first axis is the outputs'."""

    @register_to_config
    def __init__(self, sample_size: int = 8, in_channels: int = 1, channels: int = 16, num_class_embeds: int = 11):
        super().__init__()
        self.start = nn.Conv2d(in_channels, channels, 2, stride=2)
        self.told = nn.Embedding(num_class_embeds, 2 * channels)
        self.up = nn.ConvTranspose2d(2 * channels, in_channels, 2, stride=2)
        self.frequencies = nn.Parameter(torch.linspace(0.1, 1, 8), requires_grad=False)

    def forward(self, sample: Any, timestep: Any, class_labels: Any = None, return_dict: bool = True) -> Any:
        x = self.start(sample)
        shift, scale = self.told(class_labels)[..., None, None].chunk(2, dim=1)
        wave = torch.cos(timestep[:, None] * self.frequencies).mean(1)[:, None, None, None]
        return (self.up(torch.cat([x, x * scale + shift + wave], dim=1)),)


JOINED = Own(Joined, shrinks=("channels",), parts={"told": (2, 1), "up": (1, 2)})


def test_parts_are_those_of_outputs_and_inputs_whichever_axis_these_are() -> None:
    loaded = Elastic({}, widths=(0.5, 1.0), network=JOINED).initial(0)
    small, full = loaded.extract(loaded.recipe.uniform(0.5)), loaded.full
    places = [*range(8), *range(16, 24)]
    assert torch.equal(small.told.weight, full.told.weight[:, places])
    assert torch.equal(small.up.weight, full.up.weight[places])
    assert torch.equal(small.up.bias, full.up.bias)


def test_what_the_class_keeps_from_training_stays() -> None:
    loaded = Elastic({}, widths=(0.5, 1.0), network=JOINED).initial(0)
    before = {name: parameter.clone() for name, parameter in loaded.full.named_parameters()}
    for _ in Sandwich(steps=3, batch=8, warmup=1).fit(loaded, Digits().load(), 0):
        pass
    same = {name for name, parameter in loaded.full.named_parameters() if torch.equal(parameter, before[name])}
    assert same == {"frequencies"}


def test_a_class_that_inherits_from_a_stock_one_is_refused() -> None:
    class Mine(UNet2DModel):
        pass

    with pytest.raises(UserError, match="Mine inherits from UNet2DModel, whose layers are walked one by one"):
        Own(Mine, shrinks=("block_out_channels",))


def test_a_shallower_subnet_lacks_the_last_blocks(mixer: Elastic) -> None:
    loaded = mixer.initial(0)
    few = loaded.extract(Arch((1.0,), (2,)))
    assert len(few.blocks) == 2
    assert torch.equal(few.blocks[1].up.weight, loaded.full.blocks[1].up.weight)


def test_costs_are_those_that_fvcore_counts(attend: Elastic, mixer: Elastic) -> None:
    for net in (attend, mixer):
        loaded = net.initial(0)
        for arch in (net.uniform(width) for width in net.widths):
            model = loaded.extract(arch)
            labels = (torch.zeros(1, dtype=torch.long),) if net is attend else ()
            counted = FlopCountAnalysis(model, (torch.zeros(1, 1, 8, 8), torch.zeros(1, dtype=torch.long), *labels))
            counted.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
            # It leaves out the two products of attention.
            products = 2 * 64 * 64 * model.config.channels if net is attend else 0
            assert net.cost(arch).macs == counted.total() + products
            assert net.cost(arch).params == sum(parameter.numel() for parameter in model.parameters())


def test_a_study_of_it_runs(attend: Elastic, tmp_path: Path) -> None:
    """Trained, searched, and its subnets taken out, which samples come from; with labels, guidance, and steps that are held."""
    images, grid = Digits(), uniform(4)
    space = Stepwise(attend, grid, per_step(grid), Options((0.5, 1.0)), patterns=(Every(1), Only(())), guidance=(1.5,))
    study = Study(
        name="own",
        space=space,
        supernet=attend,
        images=images,
        training=Sandwich(steps=12, batch=8, warmup=2),
        evaluator=Frechet(images, rungs=(16, 32), conditions=Labels(images)),
        searchers={"evolution": Evolution(population=4)},
        limits={"macs_share": 0.8},
        trials=6,
        verified=2,
    )
    run = nas.open_run(study, tmp_path / "run")
    run.prepare(threads=1)
    run.search("evolution")
    chosen = run.best(macs_share=0.8, again=False)
    networks = run.networks(chosen)
    schedule = run.schedule(chosen)
    assert list(networks) == list(schedule.timesteps)
    for step in schedule.steps:
        assert networks[step.timestep].config.channels == 32 * step.arch.widths[0]
    assert run.sample(chosen, 4).shape == (4, 1, 8, 8)
    recommended = run.compare()["recommended"]
    assert recommended["command"].startswith("nas sample STUDY.py --out ")
    with pytest.raises(UserError, match="a Attend is no network of diffusers"):
        run.export(chosen, tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_what_it_says_of_itself_follows_the_code(mixer: Elastic, tmp_path: Path) -> None:
    assert mixer.network is not None
    said = mixer.network.describe()
    assert pickle.loads(pickle.dumps(mixer)).describe() == mixer.describe()
    half = mixer.uniform(0.5)
    assert pickle.loads(pickle.dumps(mixer.cost))(half) == mixer.cost(half)
    for text, same in (("a comment", True), ("return x + 2 * self.down", False)):
        path = tmp_path / "own_mixer.py"
        code = path.read_text()
        path.write_text(f"# {text}\n{code}" if same else code.replace("return x + self.down", text))
        importlib.invalidate_caches()
        inspect.linecache.clearcache()  # type: ignore[attr-defined]
        again = importlib.reload(importlib.import_module("own_mixer")).own.describe()
        assert (again == said) is same


class Plain(nn.Module):
    """No diffusers model."""


class Named(ModelMixin, ConfigMixin):
    """Has other parameters where it is narrower."""

    @register_to_config
    def __init__(self, sample_size: int = 8, in_channels: int = 1, channels: int = 32) -> None:
        super().__init__()
        setattr(self, f"layer_{channels}", nn.Linear(channels, 1))


class Odd(ModelMixin, ConfigMixin):
    """A network whose parts `kind` makes of a kind that no slice of parameters carries."""

    @register_to_config
    def __init__(
        self, sample_size: int = 8, in_channels: int = 1, channels: int = 32, depth: int = 2, kind: str = ""
    ) -> None:
        super().__init__()
        wide = max(16, channels) if kind == "least" else channels
        self.start, self.end = nn.Conv2d(in_channels, wide, 1), nn.Conv2d(wide, in_channels, 1)
        self.blocks = nn.ModuleList(nn.Conv2d(wide, wide, 1) for _ in range(depth))
        self.kind = kind
        if kind == "drawn":
            self.register_buffer("frequencies", torch.randn(8))
        if kind == "reckoned":
            self.register_buffer("frequencies", torch.arange(8.0))
        if kind == "tied":
            self.blocks[1].weight = self.blocks[0].weight
        if kind == "parametrized":
            nn.utils.parametrizations.spectral_norm(self.blocks[0])
        if kind == "by depth":
            self.scales = nn.Parameter(torch.ones(depth, wide))

    def forward(self, sample: Any, timestep: Any, class_labels: Any = None, return_dict: bool = True) -> Any:
        hidden = self.start(sample)
        for number, block in enumerate(self.blocks):
            scale = self.scales[number][:, None, None] if self.kind == "by depth" else 1
            hidden = hidden + scale * block(hidden)
        if self.kind == "on data":
            hidden = hidden * float(sample.mean())
        return (self.end(hidden),)


ODD = Own(Odd, shrinks=("channels",), blocks="blocks", depth="depth")


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("least", r"width 0.25, 1 blocks: .* is \(16, .*slice of the full network's \(8,"),
        ("drawn", "draws its buffer frequencies at random"),
        ("tied", "one parameter in two places"),
        ("parametrized", "computes parameters from others"),
        ("by depth", "scales is .*stand in the blocks"),
        ("on data", "cannot be called on the meta device"),
    ],
)
def test_what_no_slice_of_parameters_carries_is_refused(kind: str, words: str) -> None:
    def cost() -> Any:
        net = Elastic({"kind": kind}, widths=(0.25, 0.5, 1.0), depths=(1, 2), network=ODD)
        return Stepwise(net, uniform(4), (2, 2)).cost((0, 0, 0, 0))

    with pytest.raises(UserError, match=words):
        cost()


def test_buffers_that_are_reckoned_are_those_of_every_subnet() -> None:
    net = Elastic({"kind": "reckoned"}, widths=(0.25, 0.5, 1.0), depths=(1, 2), network=ODD)
    check_supernet(net.initial(0), Stepwise(net, uniform(4), (2, 2)))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Own(Plain, ("channels",)), "must be a ModelMixin and a ConfigMixin"),
        (lambda: Own(Attend, ("channels",), blocks="blocks"), "belong together"),
        (lambda: Elastic({}, network=Own(Attend, ("width",))), "has no width; it has .*channels"),
        (lambda: Elastic({"layers": 3}, network=ATTEND), "no Attend can be made of this config"),
        (lambda: Elastic({"extra": 8}, network=replace(ATTEND)), "axis 1 of out.weight has 40 channels"),
        (lambda: Elastic({"groups": 4}, network=ATTEND), "a convolution of 4 groups"),
        (lambda: Elastic({"batch_norm": True}, network=ATTEND), "running statistics in a BatchNorm2d"),
        (lambda: Elastic({"channels": 7}, network=ATTEND), "can be made at none of the widths"),
        (lambda: Elastic({}, network=Own(Named, ("channels",))), "has other parameters"),
        (lambda: Elastic({}, widths=(0.3, 1.0), network=ATTEND), "width 0.3"),
        (lambda: Elastic({}, depths=(1,), attention=True, network=ATTEND), "no attention to leave out|nothing is said"),
        (lambda: Elastic({}, network=ATTEND, middle=True), "has neither"),
        (lambda: Elastic({}, network=ATTEND, block_order=(0,)), "block_order=.* has no such choice"),
    ],
)
def test_what_it_cannot_be_is_said(make: Any, words: str) -> None:
    with pytest.raises(UserError, match=words):
        make().subnets(make().options)


class Idle(Attend):
    """With a layer that no output depends on."""

    def __init__(self, **given: Any) -> None:
        super().__init__(**given)
        self.idle = nn.Linear(3, 3)


def test_a_weight_without_a_gradient_is_kept_and_goes_on(tmp_path: Path) -> None:
    net = Elastic(
        {}, widths=(0.5, 1.0), network=Own(Idle, shrinks=("channels", "heads", "hidden"), parts={"qkv": (3, 1)})
    )
    training = Stages((Sandwich(steps=4, batch=8, warmup=1),), 2)
    whole = [tick.values for tick in training.run(net, Digits(), tmp_path / "whole", 0, "cpu")]
    stopped = training.run(net, Digits(), tmp_path / "parts", 0, "cpu")
    parts = [next(stopped).values for _ in range(3)]
    stopped.close()  # type: ignore[attr-defined]
    parts += [tick.values for tick in training.run(net, Digits(), tmp_path / "parts", 0, "cpu")]
    assert parts == whole


def test_blocks_that_cannot_run_again_are_refused_before_anything_is_trained(attend: Elastic) -> None:
    with pytest.raises(UserError, match="Attend cannot run its blocks again"):
        Sandwich(steps=2, checkpointing=True).check(attend, Digits().load())
    Sandwich(steps=2).check(attend, Digits().load())


def test_its_channels_are_not_put_in_order(attend: Elastic) -> None:
    with pytest.raises(UserError, match="leave it out of the training"):
        list(Order().fit(attend.initial(0), Digits().load(), 0))
