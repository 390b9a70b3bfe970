"""The elastic network with its weights: subnets of their slices, for training and for inference.

The architecture is an argument of every call. In training a subnet is `functional_call` on a weightless skeleton with
slices of the shared weights, so gradients reach them; in evaluation it is a materialised network kept in a small cache, until the weights change.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from torch.func import functional_call

from nas.base.memory import keep_freed_memory
from nas.contracts import Condition, Denoiser, Finer, Gated, Guidance, ImageSet, Step, UserError
from search_spaces.codec import LoadedCodec
from search_spaces.networks.anatomy import StockNet, predict, skeleton, unset
from search_spaces.networks.slices import Arch, take
from search_spaces.shipped.reuse import as_noise, first_rows, guided, null_of, run
from search_spaces.shipped.walks import arguments
from search_spaces.text import ClassTable, LoadedText

if TYPE_CHECKING:
    from search_spaces.supernet import Elastic


class LoadedElastic:
    """The supernet with its weights. `full` is a stock model and holds all of them, `experts` further copies by name.

    `trained_macs` counts the multiply-adds of `forward`, thrice where gradients are wanted: forward and backward.
    `cache_size` materialised subnets are kept, of at most `cache_bytes` in all or those of the last step alone, least recently used first out.
    """

    def __init__(
        self,
        recipe: Elastic,
        full: StockNet,
        codec: LoadedCodec,
        experts: Mapping[str, StockNet] = MappingProxyType({}),
        cache_size: int = 32,
        cache_bytes: int = 2**32,
        text: LoadedText | None = None,
    ) -> None:
        self.recipe = recipe
        self.full = full
        self.codec = codec
        self.text = text
        self.experts = dict(experts)
        self.device = next(full.parameters()).device
        if self.device.type == "cpu":
            keep_freed_memory()
        self.alphas_cumprod = recipe.noise.alphas_cumprod
        self.final_alpha = recipe.noise.end
        self.scheduler = recipe.noise.scheduler
        self.state_shape, self.image_shape = recipe.state_shape, recipe.image_shape
        self.in_pixels = codec.in_pixels
        self.learned_variance = recipe.learned_variance
        self.guided_channels = recipe.guided_channels
        self.full_arch = recipe.anatomy.full
        self.smallest_arch = recipe.subnets(recipe.options).flat(0)
        self.version = 0
        self.trained_macs = 0
        self._cache_size = cache_size
        self._cache_bytes = cache_bytes
        self._subnets: OrderedDict[Arch, Any] = OrderedDict()
        self._adopted: dict[Arch, torch.nn.Module] = {}
        self._form = (False, False)
        self._skeletons: OrderedDict[Arch, Any] = OrderedDict()
        self._kept: dict[Arch, dict[str, int]] = {}

    def forward(self, arch: Arch, x: torch.Tensor, t: torch.Tensor, condition: Condition | None = None) -> torch.Tensor:
        """The subnet's prediction, whatever it predicts, differentiable in the shared weights. x: (batch, channels, h, w); t: (batch,)."""
        net = self._skeleton(arch)
        inputs = arguments(net, x, t, condition)
        self.trained_macs += (3 if torch.is_grad_enabled() else 1) * len(x) * self.recipe.cost.macs(arch)
        prediction: torch.Tensor = functional_call(net, self._slices(arch), inputs, {"return_dict": False})[0]
        return prediction

    @contextmanager
    def lent(
        self, arch: Arch, checkpointing: bool = False
    ) -> Iterator[Callable[[torch.Tensor, torch.Tensor, Condition | None], torch.Tensor]]:
        """`forward`, of one subnet, for calls and their backward passes. With `checkpointing` its slices stay in place meanwhile, so that a backward
        pass may run blocks again, of which only the inputs are kept."""
        net = self._skeleton(arch)
        if not checkpointing:
            yield partial(self.forward, arch)
            return
        slices = self._slices(arch)
        # Leaves, so that several backward passes add up in them before the sum goes back through the slices, once.
        leaves = {name: tensor.detach().requires_grad_(tensor.requires_grad) for name, tensor in slices.items()}
        empty = {}
        for name, leaf in leaves.items():
            parameters, last = _owner(net, name)
            empty[name] = parameters[last]
            parameters[last] = leaf

        def call(x: torch.Tensor, t: torch.Tensor, condition: Condition | None = None) -> torch.Tensor:
            self.trained_macs += 4 * len(x) * self.recipe.cost.macs(arch)
            return predict(net, x, t, condition)

        net.enable_gradient_checkpointing()
        try:
            yield call
        finally:
            net.disable_gradient_checkpointing()
            for name, parameter in empty.items():
                parameters, last = _owner(net, name)
                parameters[last] = parameter
        found = [(slices[name], leaf.grad) for name, leaf in leaves.items() if leaf.grad is not None]
        if found:
            torch.autograd.backward([tensor for tensor, _ in found], [gradient for _, gradient in found])

    def begin_expert(self, name: str) -> None:
        """Gives the expert weights of its own, a copy of the shared ones, where it has none yet. Nothing for the empty name, which the shared ones have.
        Raises UserError for an expert that the supernet does not have."""
        if name and name not in self.recipe.expert_names:
            known = ", ".join(self.recipe.expert_names) or "none; give it experts="
            raise UserError(f"the supernet has no expert {name!r}; it has {known}")
        if name and name not in self.experts:
            self.experts[name] = copy.deepcopy(self.full)

    @property
    def frozen(self) -> tuple[str, ...]:
        """Parameters that no training changes."""
        return self.recipe.anatomy.frozen

    def weights(self, expert: str) -> StockNet:
        """The full network of an expert, or the shared one where the name is empty. Raises UserError for a name it lacks."""
        if expert and expert not in self.experts:
            raise UserError(f"no expert is called {expert!r}; there are {', '.join(self.experts) or 'none'}")
        return self.experts[expert] if expert else self.full

    def denoiser(self, step: Step, keep: Sequence[str] = ()) -> Denoiser:
        """Inference with the step's subnet, materialised at its first use. Compiled only where nothing is
        reused or kept."""
        net, guidance = self._materialised(Arch(*step.arch), len(step.archs)), step.guidance
        stock = getattr(net, "_orig_mod", net)
        other = self._materialised(Arch(*step.archs[1]), len(step.archs)) if len(step.archs) > 1 else None
        held = bool(step.reuse) and not self.recipe.macs(step)

        def call(
            x: torch.Tensor, t: int, cache: Any = None, condition: Condition | None = None
        ) -> tuple[torch.Tensor, Any]:
            def own(x: torch.Tensor, cache: Any, condition: Condition | None) -> tuple[torch.Tensor, Any]:
                answer = partial(self._answer, x=x, t=t)
                if step.reuse or keep:
                    return run(stock, x, t, step.reuse, keep, cache, condition, answer=answer)
                return answer(predict(net, x, t, condition)), None

            def plain(x: torch.Tensor, null: Condition) -> torch.Tensor:
                return self._answer(predict(other, x, t, null), x, t)

            if held:  # the prediction as it was guided; what is handed on keeps all its rows
                return own(x, cache, condition)
            if guidance is None:
                return own(x, first_rows(cache, len(x)), condition)
            if condition is None:
                raise ValueError("a guided step needs the samples' conditions")
            null = self.null_condition(condition)
            by = plain if other is not None else None
            return guided(own, by, x, guidance.scale, cache, condition, null, self.guided_channels)

        return call

    def gated(self, arch: Arch) -> Gated:
        net = self._materialised(Arch(*arch))
        stock = getattr(net, "_orig_mod", net)

        def call(
            x: torch.Tensor,
            t: int,
            gates: Mapping[str, torch.Tensor],
            cache: Any = None,
            condition: Condition | None = None,
            guidance: Guidance | None = None,
        ) -> tuple[torch.Tensor, Any]:
            def own(x: torch.Tensor, cache: Any, condition: Condition | None) -> tuple[torch.Tensor, Any]:
                answer = partial(self.noise_in, x=x, t=t)
                return run(stock, x, t, cache=cache, condition=condition, gates=gates, answer=answer)

            if guidance is None:
                return own(x, first_rows(cache, len(x)), condition)
            if condition is None:
                raise ValueError("a guided step needs the samples' conditions")
            other = self._materialised(Arch(*guidance.arch), 2) if guidance.arch else None

            def plain(x: torch.Tensor, null: Condition) -> torch.Tensor:
                return self.noise_in(predict(other, x, t, null), x, t)

            null = self.null_condition(condition)
            by = None if other is None else plain
            return guided(own, by, x, guidance.scale, cache, condition, null, self.guided_channels)

        return call

    def noise_by(self, model: Any, x: torch.Tensor, t: int, condition: Condition | None = None) -> torch.Tensor:
        return self.noise_in(predict(model, x, t, condition), x, t)

    def noise_in(self, prediction: torch.Tensor, x: torch.Tensor, t: int) -> torch.Tensor:
        """What the output of a stock subnet says of the noise in x."""
        return self._answer(prediction[:, : x.shape[1]], x, t)

    def _answer(self, prediction: torch.Tensor, x: torch.Tensor, t: int) -> torch.Tensor:
        """The noise, and behind it what the network says of the variance."""
        return as_noise(prediction, x, float(self.alphas_cumprod[t]), self.recipe.noise.prediction)

    def blocks(self, arch: Arch, finer: Finer = False) -> tuple[str, ...]:
        return self.recipe.cost.graph(Arch(*arch)).names(finer)

    def expanded(self, arch: Arch, names: Sequence[str], finer: Finer = False) -> tuple[str, ...]:
        graph = self.recipe.cost.graph(Arch(*arch))
        branches = graph.expand(names)
        return tuple(name for name in graph.names(finer) if graph.expand([name]) <= branches)

    def reused(self, arch: Arch, wanted: Sequence[str], finer: Finer = False) -> tuple[str, ...]:
        graph = self.recipe.cost.graph(Arch(*arch))
        return graph.collapse(graph.expand(graph.blocks) - graph.live(wanted, finer), finer)

    def kept_numbers(self, arch: Arch, names: Sequence[str]) -> int:
        """How many a call keeps of one sample where the next one reuses these blocks or branches."""
        key = Arch(*arch).replace(expert="")
        if key not in self._kept:
            self._kept[key] = self.recipe.kept_numbers(key)
        outputs = self.recipe.cost.graph(key).outputs(names)
        return sum(self._kept[key][name] for name in outputs)

    @property
    def autoencoder(self) -> torch.nn.Module | None:
        return self.codec.network

    @property
    def posterior(self) -> str:
        return str(getattr(self.codec, "posterior", ""))

    def to_images(self, x: torch.Tensor) -> torch.Tensor:
        return self.codec.decode(x)

    def to_states(self, images: torch.Tensor) -> torch.Tensor:
        return self.codec.encode(images)

    def null_condition(self, condition: Condition) -> Condition:
        return null_of(condition, self.recipe.anatomy.null_label)

    def conditions_of(self, data: ImageSet) -> Callable[[torch.Tensor], Condition] | None:
        wanted = self.recipe.anatomy.some_condition(1)
        sources: list[Callable[[torch.Tensor], Condition]] = []
        if "class_labels" in wanted:
            if data.labels is None:
                raise UserError("the network takes class labels, but the images have none; use images with labels")
            labels = torch.from_numpy(data.labels)
            sources.append(lambda chosen: {"class_labels": labels[chosen]})
        if "encoder_hidden_states" in wanted:
            if self.text is None:
                raise UserError('the network reads texts; give it text=TextEncoder("folder of a pipeline")')
            if data.texts is None:
                raise UserError("the network reads captions, but the images have none; use images with captions")
            sources.append(self.text.rows(data.texts))

        def draw(chosen: torch.Tensor) -> Condition:
            found = [source(chosen.cpu()).items() for source in sources]
            return {name: rows.to(self.device) for items in found for name, rows in items}

        return draw if sources else None

    @property
    def text_components(self) -> Mapping[str, Any]:
        return {} if self.text is None else self.text.components

    @property
    def text_shape(self) -> dict[str, Any] | None:
        anatomy = self.recipe.anatomy
        text = self.recipe.text
        if not anatomy.text_channels or isinstance(text, ClassTable):
            return None
        size, zeros = getattr(text, "size", self.image_shape[1:]), getattr(text, "zeros", False)
        return {"tokens": anatomy.tokens, "size": list(size), **({"zeros": True} if zeros else {})}

    def some_condition(self, count: int) -> Condition | None:
        return self.recipe.anatomy.some_condition(count) or None

    def extract(self, arch: Arch) -> StockNet:
        return self._copy(Arch(*arch), torch.device("cpu"))

    def macs(self, step: Step) -> int:
        return self.recipe.macs(step)

    @property
    def pipeline_files(self) -> tuple[Path, ...]:
        here = Path(__file__).parent / "shipped"
        return tuple(
            here / f"{name}.py"
            for name in (
                "pipeline",
                "reuse",
                "stepping",
                "graph",
                "walks",
                "latents",
                "texts",
                "train_data",
                "train_diffusers",
            )
        )

    @property
    def training_settings(self) -> dict[str, Any]:
        from search_spaces.shipped.train_diffusers import Settings

        return asdict(Settings())

    def adopt(self, arch: Arch, model: torch.nn.Module) -> None:
        # Of many, those that do not run now lie in main memory.
        self._adopted[Arch(*arch)] = model.cpu().eval().requires_grad_(False)
        self.forget()

    def apart(self, arch: Arch, name: str) -> Arch:
        own = Arch(*arch)
        other = f"{own.expert}/{name}"
        self.experts.setdefault(other, self.weights(own.expert))
        return own.replace(expert=other)

    def forget(self) -> None:
        """Drops the materialised subnets and starts a new version; for whoever has changed the weights."""
        self._subnets.clear()
        self.version += 1

    def run_as(self, channels_last: bool, compiled: bool) -> tuple[bool, bool]:
        before = self._form
        if (channels_last, compiled) != self._form:
            self._form = (channels_last, compiled)
            self._subnets.clear()
        if compiled:
            # All subnets are of one class, and torch counts what it compiles for it in one place.
            torch._dynamo.config.recompile_limit = max(256, torch._dynamo.config.recompile_limit)
        return before

    def _skeleton(self, arch: Arch) -> Any:
        key = arch.replace(expert="")
        if key not in self._skeletons:
            self._skeletons[key] = _on(skeleton(self.recipe.anatomy, key), self.device)
            if len(self._skeletons) > 4 * self._cache_size:
                self._skeletons.popitem(last=False)
        return self._skeletons[key]

    def _materialised(self, arch: Arch, at_once: int = 1) -> Any:
        """`at_once`: how many a step runs, which stay however large they are."""
        if arch in self._subnets:
            self._subnets.move_to_end(arch)
        else:
            channels_last, compiled = self._form
            net: Any = self._adopted.get(arch)
            if net is None:
                net = self._of_slices(arch)
            elif self.device.type != "cpu":
                net = copy.deepcopy(net).to(self.device)
            net = net.to(memory_format=torch.channels_last) if channels_last else net
            self._subnets[arch] = torch.compile(net) if compiled else net
            while len(self._subnets) > at_once and (len(self._subnets) > self._cache_size or self._too_large()):
                self._subnets.popitem(last=False)
        return self._subnets[arch]

    def _too_large(self) -> bool:
        return 4 * sum(self.recipe.cost(kept.replace(expert="")).params for kept in self._subnets) > self._cache_bytes

    def _copy(self, arch: Arch, device: torch.device) -> StockNet:
        # Copies may be asked for while inference is on, and are used with gradients later.
        with torch.inference_mode(False), torch.no_grad():
            net = unset(skeleton(self.recipe.anatomy, arch), device)
            slices = self._slices(arch)
            for name, parameter in net.named_parameters():
                parameter.copy_(slices[name])
        return net.requires_grad_(False)

    def _of_slices(self, arch: Arch) -> StockNet:
        """A subnet that has tensors of its own where these are less than the full network's, and else that one's: of a large network no second copy stands
        beside it. Whoever changes the weights forgets all subnets."""
        net = _on(skeleton(self.recipe.anatomy, arch), self.device)
        full = dict(self.weights(arch.expert).named_parameters())
        with torch.inference_mode(False), torch.no_grad():
            for name, source in self.recipe.anatomy.segments(arch).items():
                tensor = take(full, source)
                whole = source.name is not None and tensor is full[source.name]
                own = tensor.detach() if whole else tensor.detach().clone(memory_format=torch.contiguous_format)
                parameters, last = _owner(net, name)
                parameters[last] = torch.nn.Parameter(own, requires_grad=False)
        return net

    def _slices(self, arch: Arch) -> dict[str, torch.Tensor]:
        full = dict(self.weights(arch.expert).named_parameters())
        return {name: take(full, source) for name, source in self.recipe.anatomy.segments(arch).items()}


def _on(net: Any, device: torch.device) -> Any:
    """A skeleton with its tables on the device; its parameters stay where they are, and are given with each call."""
    for module in net.modules():
        for name, buffer in module._buffers.items():
            module._buffers[name] = None if buffer is None else buffer.to(device)
    return net


def _owner(net: Any, name: str) -> tuple[Any, str]:
    """The parameters of the module that has this one, and what it calls it."""
    module, _, last = name.rpartition(".")
    return net.get_submodule(module)._parameters, last
