"""TDC's groups on CIFAR-10 (arXiv 2312.13307): five groups of timesteps of equal width in SNR, a fixed budget for each, (i/5 + (5-i)/5 x 0.5) of the full
network, and multi-round proposals for each group's widths, by the router beside them. A group's budget is the space's: both searchers keep to it.

Data: CIFAR-10's training images as files in `data/cifar10`, and Inception features as a local file (`inception.pt`, see docs/bring-your-own.md).
Hours: `nas run studies/tdc_cifar10.py --dry-run --throughput MACS_A_SECOND` reckons them from the exact costs, hours = MACs / throughput / 3600.
The abstract: about 80 % of the compute at a better FID; absolute numbers are not known to us.
"""

from evaluators.features import ExternalFeatures
from evaluators.frechet import Frechet
from evaluators.images import ImageFolder
from nas.searchers.rounds import Rounds
from nas.searchers.routing import Routing
from nas.study import Study
from search_spaces.intervals import bounded, equal_snr, linear_budgets, merged, uniform
from search_spaces.noise import NoiseSchedule
from search_spaces.stepwise import Stepwise
from search_spaces.supernet import Elastic
from search_spaces.training import Experts, Order, Sandwich, Stages

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
steps = uniform(100)
groups = merged(steps, equal_snr(5, NoiseSchedule().alphas_cumprod))
net = Elastic(UNET, widths=(0.5, 0.75, 1.0), per_level=("width",), experts=groups)

study = Study(
    name="tdc-cifar10",
    space=Stepwise(net, steps, bounded(steps, groups), budgets=linear_budgets(len(groups) + 1, least=0.5)),
    supernet=net,
    images=images,
    training=Stages(
        (
            Sandwich(steps=400_000, batch=128, learning_rate=2e-4, warmup=5_000, ema=0.9999, full_only=True),
            Order("gradient"),
            Sandwich(steps=100_000, batch=128, learning_rate=2e-4, warmup=0, distillation=0.5),
            Experts(Sandwich(steps=20_000, batch=128, learning_rate=1e-4, warmup=0, distillation=0.5)),
        )
    ),
    evaluator=Frechet(images, features=inception, rungs=(4_096, 50_000)),
    searchers={"rounds": Rounds(budgets=1), "routing": Routing()},
    trials=100,
    verified=5,
)
