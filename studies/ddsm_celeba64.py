"""DDSM's search on CelebA at 64 pixels (Yang et al., ICLR 2024), with 100 DDIM steps in 20 intervals.

Data: CelebA, aligned, cropped and resized to 64 pixels, as files in `data/celeba64`, and Inception features as a local file (`inception.pt`, see docs/bring-your-own.md).
Hours: `nas run studies/ddsm_celeba64.py --dry-run --throughput MACS_A_SECOND` reckons them from the exact costs, hours = MACs / throughput / 3600.
The paper, 100 DDIM steps: FID 7.912 at 4.988 TFLOPs for the full network, 7.132 at 2.384 for its schedule (52 % saved).
The weight of the multiply-adds is 0.001 a MMAC, as published for CIFAR-10, of this network's 24,051.
"""

from evaluators.features import ExternalFeatures
from evaluators.frechet import Frechet
from evaluators.images import ImageFolder
from nas.searchers.ddsm import DDSM
from nas.searchers.evolution import Evolution
from nas.searchers.knapsack import Knapsack
from nas.study import Study
from search_spaces.intervals import equal, uniform
from search_spaces.stepwise import Stepwise
from search_spaces.supernet import Elastic
from search_spaces.training import Sandwich

# The DDIM network of CelebA at 64 pixels (Song et al. 2021): 78.7 M parameters, 23.9 GMACs.
UNET = {
    "sample_size": 64,
    "in_channels": 3,
    "out_channels": 3,
    "block_out_channels": (128, 256, 256, 256, 512),
    "layers_per_block": 2,
    "down_block_types": ("DownBlock2D", "DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
    "attention_head_dim": None,
    "norm_num_groups": 32,
    "downsample_padding": 0,
}

images = ImageFolder("data/celeba64", size=(64, 64))
inception = ExternalFeatures("inception.pt", "inception-v3", size=299)
net = Elastic(UNET, widths=(0.25, 0.5, 0.75, 1.0))
steps = uniform(100)

study = Study(
    name="ddsm-celeba64",
    space=Stepwise(net, steps, equal(steps, 20)),
    supernet=net,
    images=images,
    training=Sandwich(steps=450_000, batch=128, learning_rate=2e-4, warmup=5_000, ema=0.9999, flip=True),
    evaluator=Frechet(images, features=inception, rungs=(4_096, 50_000)),
    searchers={"ddsm": DDSM(macs_weight=24.05), "knapsack": Knapsack(), "evolution": Evolution(population=50)},
    limits={"macs_share": 0.5},
    trials=300,
    verified=5,
)
