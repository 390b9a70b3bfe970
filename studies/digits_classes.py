"""Real handwritten digits by class, 8x8 grey, ten DDIM steps: for each of five intervals a width, and whether and how strongly it is guided.

Run it:     nas run studies/digits_classes.py
Look:       nas report studies/digits_classes.py
Hand over:  nas export studies/digits_classes.py --within macs_share=0.4 --to exported
"""

from evaluators.agreement import Agreement
from evaluators.conditions import Labels
from evaluators.frechet import Frechet
from evaluators.images import Digits
from evaluators.scoring import Scores
from nas.searchers.evolution import Evolution
from nas.searchers.random import Random
from nas.study import Study
from search_spaces.intervals import equal, linspace
from search_spaces.stepwise import Stepwise
from search_spaces.supernet import Elastic
from search_spaces.training import Sandwich

UNET = {
    "sample_size": 8,
    "in_channels": 1,
    "out_channels": 1,
    "block_out_channels": (32, 64),
    "layers_per_block": 1,
    "down_block_types": ("DownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "UpBlock2D"),
    "norm_num_groups": 8,
    "num_class_embeds": 11,  # ten digits, and the label of none
}

images = Digits(holdout=0.2)
labels = Labels(images)
net = Elastic(UNET, widths=(0.25, 0.5, 0.75, 1.0), groups="size")
steps = linspace(10, first=999, last=20)

study = Study(
    name="digits-classes",
    space=Stepwise(net, timesteps=steps, intervals=equal(steps, 5), guidance=(None, 1.5, 3.0)),
    supernet=net,
    images=images,
    training=Sandwich(steps=1500),
    evaluator=Scores(
        (
            Frechet(images, rungs=(512, 2048), conditions=labels),
            Agreement(images, rungs=(512, 2048), conditions=labels),
        )
    ),
    searchers={"evolution": Evolution(population=20), "random": Random()},
    objectives=("fd", "disagreement", "macs"),
    limits={"macs_share": 0.5},
    trials=60,
    verified=10,
)
