"""Digits at 16x16 on a UNet of four levels: at each of 20 DDIM steps, which blocks run and which are reused from the step before.

Run it:     nas run studies/digits_reuse.py
Compare:    nas run studies/digits_reuse.py --searcher all
Hand over:  nas export studies/digits_reuse.py --within macs_share=0.35 --to exported
"""

from evaluators.frechet import Frechet
from evaluators.images import Digits
from nas.searchers.evolution import Evolution
from nas.searchers.gates import Gates
from nas.searchers.pruner import Pruner
from nas.searchers.random import Random
from nas.study import Study
from search_spaces.intervals import linspace, per_step
from search_spaces.options import Options
from search_spaces.patterns import legal
from search_spaces.stepwise import Stepwise
from search_spaces.supernet import Elastic
from search_spaces.training import Sandwich

UNET = {
    "sample_size": 16,
    "in_channels": 1,
    "out_channels": 1,
    "block_out_channels": (16, 32, 48, 64),
    "layers_per_block": 1,
    "down_block_types": ("DownBlock2D",) * 4,
    "up_block_types": ("UpBlock2D",) * 4,
    "norm_num_groups": 8,
    "add_attention": False,
}

images = Digits(size=16, holdout=0.2)
net = Elastic(UNET, widths=(0.5, 1.0))
steps = linspace(20, first=999, last=10)

study = Study(
    name="digits-reuse",
    space=Stepwise(net, steps, per_step(steps), Options((1.0,)), patterns=legal(levels=4)),
    supernet=net,
    images=images,
    training=Sandwich(steps=2500),
    evaluator=Frechet(images, rungs=(256, 2048)),
    searchers={
        "gates": Gates(),
        "plain_gates": Gates(Pruner(scores="plain", learning_rate=25.0)),
        "local_gates": Gates(Pruner(scope="step")),
        "evolution": Evolution(population=20),
        "random": Random(),
    },
    objectives=("fd", "macs"),
    limits={"macs_share": 0.7},
    trials=60,
    verified=10,
    seed=0,
)
