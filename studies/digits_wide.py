"""Real handwritten digits with more to choose from: each of five intervals chooses width and depth for each level of a UNet of two
residual blocks per level, whose channels stand in order of importance. About a quarter of an hour on two CPU cores.

Run it:     nas run studies/digits_wide.py --searcher all
Look:       nas compare runs/digits-wide
"""

from evaluators.frechet import Frechet
from evaluators.images import Digits
from nas.searchers.evolution import Evolution
from nas.searchers.knapsack import Knapsack
from nas.study import Study
from search_spaces.intervals import equal, linspace
from search_spaces.stepwise import Stepwise
from search_spaces.supernet import Elastic
from search_spaces.training import Order, Sandwich, Stages

UNET = {
    "sample_size": 8,
    "in_channels": 1,
    "out_channels": 1,
    "block_out_channels": (32, 64),
    "layers_per_block": 2,
    "down_block_types": ("DownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "UpBlock2D"),
    "norm_num_groups": 8,
}

images = Digits(holdout=0.2)
net = Elastic(UNET, widths=(0.25, 0.5, 0.75, 1.0), depths=(1, 2), per_level=("width", "depth"))
steps = linspace(10, first=999, last=20)

study = Study(
    name="digits-wide",
    space=Stepwise(net, timesteps=steps, intervals=equal(steps, 5)),
    supernet=net,
    images=images,
    training=Stages((Sandwich(steps=800, full_only=True), Order(stride=10), Sandwich(steps=1600, learning_rate=1e-3))),
    evaluator=Frechet(images, rungs=(512, 2048)),
    searchers={"knapsack": Knapsack(options=6), "evolution": Evolution()},
    limits={"macs_share": 0.6},
    trials=160,
    verified=16,
)
