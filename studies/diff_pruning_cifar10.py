"""Diff-Pruning's setting on CIFAR-10 (Fang et al., NeurIPS 2023): one network for all of 100 quadratic DDIM steps, its channels in order of
importance, each level's width free.

Data: CIFAR-10's training images as files in `data/cifar10`, and the pretrained network as a diffusers folder in `data/ddpm-cifar10`, to be
named as `Elastic.from_pretrained` where it is at hand, and Inception features as a local file (`inception.pt`, see docs/bring-your-own.md).
Hours: `nas run studies/diff_pruning_cifar10.py --dry-run --throughput MACS_A_SECOND` reckons them from the exact costs, hours = MACs / throughput / 3600.
The paper: FID 4.19 at 6.1 GMACs for the full network; 5.29 at 3.4 after pruning and 100,000 steps of fine-tuning, one seed.
"""

import numpy as np

from evaluators.features import ExternalFeatures
from evaluators.frechet import Frechet
from evaluators.images import ImageFolder
from nas.searchers.enumerate import Enumerate
from nas.searchers.evolution import Evolution
from nas.study import Study
from search_spaces.intervals import free
from search_spaces.stepwise import Stepwise
from search_spaces.supernet import Elastic
from search_spaces.training import Order, Sandwich, Stages

# The DDPM network of CIFAR-10 (Ho et al. 2020): 35.7 M parameters, 6.05 GMACs and 0.17 of attention products.
UNET = {
    "sample_size": 32,
    "in_channels": 3,
    "out_channels": 3,
    "block_out_channels": (128, 256, 256, 256),
    "layers_per_block": 2,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    "attention_head_dim": None,
    "norm_num_groups": 32,
    "downsample_padding": 0,
}

images = ImageFolder("data/cifar10", size=(32, 32))
inception = ExternalFeatures("inception.pt", "inception-v3", size=299)
net = Elastic(UNET, widths=(0.5, 0.75, 1.0), per_level=("width",))
steps = free(*sorted({round(t) for t in np.linspace(0, 800**0.5, 100) ** 2}, reverse=True))  # the first ones coincide

study = Study(
    name="diff-pruning-cifar10",
    space=Stepwise(net, steps, (len(steps),)),
    supernet=net,
    images=images,
    training=Stages(
        (
            Sandwich(steps=800_000, batch=128, learning_rate=2e-4, warmup=5_000, ema=0.9999, full_only=True),
            Order("gradient", threshold=0.05, squared=True),
            Sandwich(steps=100_000, batch=128, learning_rate=2e-4, warmup=0, ema=0.9999, distillation=0.5),
        )
    ),
    evaluator=Frechet(images, features=inception, rungs=(4_096, 50_000)),
    searchers={"evolution": Evolution(), "enumerate": Enumerate()},
    limits={"macs_share": 0.56},  # 3.4 of 6.1 GMACs
    trials=60,
    verified=5,
)
