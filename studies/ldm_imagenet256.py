"""Latent diffusion on ImageNet by class, 256 pixels (Rombach et al. 2022, `cin256-v2`): the network that Diff-Pruning, DeepCache and DiffPruning call LDM-4-G.
A class is a text of one token; for each of five intervals of 20 steps a width, what is reused, and how strongly it is guided.

Data: ImageNet's pictures in a folder for each class, `data/imagenet`, in the classes' order; the network, its autoencoder and its class embeddings (1,001
of 512 channels, the last of no class) as `cin256/unet`, `cin256/vqvae` and `cin256/classes.safetensors`, Inception features in `inception.pt` (see
docs/bring-your-own.md). The original's checkpoint has to be converted; its attention has one head.
Hours: `nas run studies/ldm_imagenet256.py --dry-run --throughput MACS_A_SECOND` reckons them from the exact costs, hours = MACs / throughput / 3600.
For comparison, MACs of one half of a guided step without attention's products and FID-50K, 250 steps: the original 99.80 G and 3.60, Diff-Pruning's
static network 52.71 G and 9.16, as remembered. Not run here.
"""

from evaluators.conditions import Captions
from evaluators.features import ExternalFeatures
from evaluators.frechet import Frechet
from evaluators.images import ImageFolder
from nas.searchers.evolution import Evolution
from nas.searchers.routing import Routing
from nas.study import Study
from search_spaces.codec import Autoencoder
from search_spaces.intervals import equal, uniform
from search_spaces.noise import NoiseSchedule
from search_spaces.patterns import Every
from search_spaces.stepwise import Stepwise
from search_spaces.supernet import Elastic
from search_spaces.text import ClassTable
from search_spaces.training import Order, Sandwich, Stages

UNET = {
    "sample_size": 64,
    "in_channels": 3,
    "out_channels": 3,
    "block_out_channels": (192, 384, 576, 960),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 2,
    "cross_attention_dim": 512,
    "attention_head_dim": 1,
}

VQ_F4 = {
    "_class_name": "VQModel",
    "in_channels": 3,
    "out_channels": 3,
    "block_out_channels": (128, 256, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 3,
    "up_block_types": ("UpDecoderBlock2D",) * 3,
    "layers_per_block": 2,
    "latent_channels": 3,
    "num_vq_embeddings": 8192,
}

images = ImageFolder("data/imagenet", size=(256, 256), resize="bicubic", labels="folders", holdout=0.02)
inception = ExternalFeatures("inception.pt", "inception-v3", size=299)
noise = NoiseSchedule(beta_start=0.0015, beta_end=0.0195, beta_schedule="scaled_linear")
codec = Autoencoder("cin256/vqvae", scale=1.0, config=VQ_F4)
classes = ClassTable("cin256/classes.safetensors")
# One head, which only grows thinner; 32 norm groups leave sixths of 192 channels and so of all levels alike.
net = Elastic(
    UNET,
    widths=(1 / 3, 2 / 3, 1.0),
    heads="slim",
    tokens=1,
    noise=noise,
    codec=codec,
    text=classes,
    pretrained="cin256/unet",
)
steps = uniform(20)
shallow = Every(2, ("d0", "u3"))

study = Study(
    name="ldm-imagenet256",
    space=Stepwise(net, steps, equal(steps, 5), patterns=(Every(1), shallow), guidance=(None, 1.5, 3.0)),
    supernet=net,
    images=images,
    training=Stages(
        (
            Order("gradient", batch=2),
            Sandwich(steps=100_000, batch=64, learning_rate=5e-5, warmup=0, ema=0.9999, distillation=0.5),
        )
    ),
    evaluator=Frechet(images, features=inception, conditions=Captions(images, classes), rungs=(2_048, 50_000)),
    searchers={"evolution": Evolution(population=50), "routing": Routing()},
    limits={"macs_share": 0.5},
    trials=200,
    verified=5,
)
