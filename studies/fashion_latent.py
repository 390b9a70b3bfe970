"""Garments by class in the latents of an autoencoder of its own: Fashion-MNIST, 15 DDIM steps; for each of five intervals a width, and whether and
how strongly it is guided. `make fashion` runs it from nothing.

Data: 60,000 images to train on and 10,000 that nothing is trained on (`apt-get install dataset-fashion-mnist`, or torchvision's files).

Run it:     nas run studies/fashion_latent.py
Look:       nas report studies/fashion_latent.py
Hand over:  nas export studies/fashion_latent.py --within macs_share=0.4 --to exported
"""

from evaluators.agreement import Agreement
from evaluators.conditions import Labels
from evaluators.fashion import FashionMNIST
from evaluators.features import SmallClassifier
from evaluators.frechet import Frechet
from evaluators.scoring import Scores
from nas.searchers.evolution import Evolution
from nas.searchers.random import Random
from nas.study import Study
from search_spaces.intervals import equal, uniform
from search_spaces.stepwise import Stepwise
from search_spaces.supernet import Elastic
from search_spaces.training import Sandwich, TrainAutoencoder

UNET = {
    "sample_size": 8,  # latents of 32x32 pixels
    "in_channels": 3,
    "out_channels": 3,
    "block_out_channels": (32, 64),
    "layers_per_block": 2,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "attention_head_dim": 8,
    "norm_num_groups": 8,
    "num_class_embeds": 11,  # ten garments, and the label of none
}

images = FashionMNIST()
labels = Labels(images)
judge = SmallClassifier(steps=3000)
codec = TrainAutoencoder(in_channels=1, latent_channels=3, channels=(16, 32, 32), steps=6000)
net = Elastic(UNET, widths=(0.5, 0.75, 1.0), codec=codec)
steps = uniform(15)

study = Study(
    name="fashion-latent",
    space=Stepwise(net, timesteps=steps, intervals=equal(steps, 5), guidance=(None, 1.5, 2.0)),
    supernet=net,
    images=images,
    training=Sandwich(steps=6000, learning_rate=1e-3),
    evaluator=Scores(
        (
            Frechet(images, features=judge, rungs=(512, 2048), conditions=labels),
            Agreement(images, judge=judge, rungs=(512, 2048), conditions=labels),
        )
    ),
    searchers={"evolution": Evolution(population=20), "random": Random()},
    objectives=("fd", "disagreement", "macs"),
    limits={"macs_share": 0.5},
    trials=60,
    verified=10,
)
