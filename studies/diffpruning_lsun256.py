"""DiffPruning's setting (Ganjdanesh et al., ECCV 2024) in pixel space: experts of timestep clusters, elastic in width and depth, and the routing
agent that divides one budget among them. The paper works in latent space; its tables are not reproduced here.

Data: LSUN churches at 256 pixels as files in `data/church256`, and Inception features as a local file (`inception.pt`, see docs/bring-your-own.md).
Hours: `nas run studies/diffpruning_lsun256.py --dry-run --throughput MACS_A_SECOND` reckons them from the exact costs, hours = MACs / throughput / 3600.
`nas intervals` measures the clusters; put its boundaries in place of these.
For comparison, Diff-Pruning at 100 DDIM steps: FID 10.6 for the full network, 13.9 pruned.
"""

from evaluators.features import ExternalFeatures
from evaluators.frechet import Frechet
from evaluators.images import ImageFolder
from nas.searchers.evolution import Evolution
from nas.searchers.relaxation import Relaxation
from nas.searchers.routing import Routing
from nas.study import Study
from search_spaces.intervals import bounded, uniform
from search_spaces.stepwise import Stepwise
from search_spaces.supernet import Elastic
from search_spaces.training import Experts, Order, Sandwich, Stages

# The DDPM network of LSUN at 256 pixels (Ho et al. 2020): 113.7 M parameters.
UNET = {
    "sample_size": 256,
    "in_channels": 3,
    "out_channels": 3,
    "block_out_channels": (128, 128, 256, 256, 512, 512),
    "layers_per_block": 2,
    "down_block_types": (*("DownBlock2D",) * 4, "AttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "AttnUpBlock2D", *("UpBlock2D",) * 4),
    "attention_head_dim": None,
    "norm_num_groups": 32,
    "downsample_padding": 0,
}

images = ImageFolder("data/church256", size=(256, 256))
inception = ExternalFeatures("inception.pt", "inception-v3", size=299)
boundaries = (120, 300, 520, 760)
net = Elastic(UNET, widths=(0.5, 0.75, 1.0), depths=(1, 2), experts=boundaries)
steps = uniform(100)

study = Study(
    name="diffpruning-lsun256",
    space=Stepwise(net, steps, bounded(steps, boundaries)),
    supernet=net,
    images=images,
    training=Stages(
        (
            Sandwich(
                steps=500_000, batch=64, accumulate=4, learning_rate=2e-5, warmup=5_000, ema=0.9999, full_only=True
            ),
            Order("gradient", threshold=0.01, batch=2),
            Sandwich(steps=100_000, batch=64, accumulate=4, learning_rate=2e-5, warmup=0, distillation=0.5),
            Experts(Sandwich(steps=20_000, batch=64, accumulate=4, learning_rate=2e-5, warmup=0, distillation=0.5)),
        )
    ),
    evaluator=Frechet(images, features=inception, rungs=(2_048, 50_000)),
    searchers={"routing": Routing(warm_start=Relaxation(steps=5_000)), "evolution": Evolution()},
    limits={"macs_share": 0.6},
    trials=200,
    verified=5,
)
