"""DDSM's search on CIFAR-10 (Yang et al., ICLR 2024): one of four widths of the whole network at each of 1,000 ancestral steps.

Data: CIFAR-10's training images as files in `data/cifar10`, and Inception features as a local file (`inception.pt`, see docs/bring-your-own.md).
Hours: `nas run studies/ddsm_cifar10.py --dry-run --throughput MACS_A_SECOND` reckons them from the exact costs, hours = MACs / throughput / 3600.
The paper: FID 3.713 at 12.14 GFLOPs a step for the full network, 3.552 at 6.20 for the schedule it found (49 % saved), one seed.
What differs here:
- skips are sliced apart from the trunk; groups keep their number at every width, as theirs do;
- no dropout, which would make a resumed training another one; the learning rate falls on a cosine after its warm-up instead of staying; the
  average's decay rises to 0.9999 instead of starting there;
- candidates share their noises, 4,096 of them, and leaders are verified on 50,000 others, where the paper draws 4,096 fresh ones for each;
- the published weight of 0.001 a MMAC is given as 6.07 for all of the full net's; a limit of 55 % is kept, which the paper's search has not: what
  exceeds it is repaired;
- 1,000 ancestral steps with the clipped prediction; the paper's clip has no effect before the last step.
"""

from evaluators.features import ExternalFeatures
from evaluators.frechet import Frechet
from evaluators.images import ImageFolder
from evaluators.sampling import DDPM
from nas.searchers.ddsm import DDSM
from nas.searchers.evolution import Evolution
from nas.searchers.knapsack import Knapsack
from nas.study import Study
from search_spaces.intervals import linspace, per_step
from search_spaces.stepwise import Stepwise
from search_spaces.supernet import Elastic
from search_spaces.training import Sandwich

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
net = Elastic(UNET, widths=(0.25, 0.5, 0.75, 1.0))
steps = linspace(1000, first=999, last=0)

study = Study(
    name="ddsm-cifar10",
    space=Stepwise(net, steps, per_step(steps)),  # or equal(steps, 16), which holds nearly all of the saving
    supernet=net,
    images=images,
    training=Sandwich(steps=450_000, batch=256, learning_rate=4e-4, warmup=5_000, ema=0.9999, flip=True),
    evaluator=Frechet(images, features=inception, rungs=(4_096, 50_000), sampler=DDPM("fixed_large")),
    searchers={
        "ddsm": DDSM(macs_weight=6.07),
        "evolution": Evolution(population=50),
        "knapsack": Knapsack(around="both"),
    },
    limits={"macs_share": 0.55},
    trials=500,
    verified=5,
)
