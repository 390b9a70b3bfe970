"""Real handwritten digits, 8x8 grey, ten DDIM steps, one width for each step. Minutes on two CPU cores.

Run it:     nas run studies/digits.py
Compare:    nas run studies/digits.py --searcher all --seeds 3
Look:       nas compare runs/digits          nas dashboard runs/digits
Hand over:  nas export studies/digits.py --within macs_share=0.5 --to exported
"""

from evaluators.frechet import Frechet, KernelDistance
from evaluators.images import Digits
from evaluators.proxies import Additive, DenoisingLoss, TeacherDistance, TeacherFrechet, TrajectoryDistance
from nas.searchers.ddsm import DDSM
from nas.searchers.evolution import Evolution
from nas.searchers.knapsack import Knapsack
from nas.searchers.nevergrad import Nevergrad
from nas.searchers.optuna_sampler import OptunaSampler
from nas.searchers.random import Random
from nas.searchers.rounds import Rounds
from nas.searchers.routing import Routing
from nas.study import Study
from search_spaces.intervals import linspace, per_step
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
}

images = Digits(holdout=0.2)
net = Elastic(UNET, widths=(0.25, 0.5, 0.75, 1.0), groups="size")
steps = linspace(10, first=999, last=20)

study = Study(
    name="digits",
    space=Stepwise(net, timesteps=steps, intervals=per_step(steps)),
    supernet=net,
    images=images,
    training=Sandwich(steps=1500),
    evaluator=Frechet(images, rungs=(512, 2048)),
    searchers={
        "evolution": Evolution(population=20),
        "random": Random(),
        "knapsack": Knapsack(around="full"),
        "rounds": Rounds(),
        "routing": Routing(),
        "tpe": OptunaSampler("TPESampler"),
        "nevergrad": Nevergrad("DE", budget=60),
        "ddsm": DDSM(population=20),
    },
    objectives=("fd", "macs"),
    limits={"macs_share": 0.6},
    trials=60,
    verified=10,
    seed=0,
    proxies={
        "fd@256": Frechet(images, rungs=(256,)),
        "fd@64": Frechet(images, rungs=(64,)),
        "kid@256": KernelDistance(images, rungs=(256,)),
        "fd to teacher@256": TeacherFrechet(images, rungs=(256,)),
        "fd to teacher@64": TeacherFrechet(images, rungs=(64,)),
        "distance to teacher@64": TeacherDistance(images, rungs=(64,)),
        "distance along trajectory@64": TrajectoryDistance(images, rungs=(64,)),
        "denoising loss@512": DenoisingLoss(images, rungs=(512,)),
        "additive fd@512": Additive(Frechet(images, rungs=(512,)), per_step(steps), around="both"),
        "additive fd to teacher@256": Additive(TeacherFrechet(images, rungs=(256,)), per_step(steps), around="both"),
    },
)
