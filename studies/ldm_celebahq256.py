"""Latent diffusion on CelebA-HQ at 256 pixels (Rombach et al. 2022): widths for each of five intervals of the published LDM-4 network, on the latents
of its VQ autoencoder, searched by DDSM's evolution, as its paper says it can be, and by the agent of DiffPruning.

Data: CelebA-HQ as files in `data/celebahq256`, the autoencoder as a diffusers folder in `vqvae` (of a local copy of ldm-celebahq-256), and Inception
features as a local file (`inception.pt`, see docs/bring-your-own.md). Who has the pretrained network too takes `Elastic.from_pretrained(folder,
channels=..., codec=codec)` for `net`, and leaves the first stage of training out.
Hours: `nas run studies/ldm_celebahq256.py --dry-run --throughput MACS_A_SECOND` reckons them from the exact costs, hours = MACs / throughput / 3600.
For comparison, the LDM paper's FID 5.11 with 200 DDIM steps at 274 M parameters; 101.2 GMACs a call, 96.0 without attention products, and
335 GMACs to decode an image, which is as much as 3.3 calls. Batch, learning rate and iterations are the paper's as remembered; all multiply-adds
together weigh 1.6 times that FID, as they do in DDSM's on CIFAR-10. Not run here.
"""

from evaluators.features import ExternalFeatures
from evaluators.frechet import Frechet
from evaluators.images import ImageFolder
from nas.searchers.ddsm import DDSM
from nas.searchers.routing import Routing
from nas.study import Study
from search_spaces.codec import Autoencoder
from search_spaces.intervals import equal, uniform
from search_spaces.noise import NoiseSchedule
from search_spaces.stepwise import Stepwise
from search_spaces.supernet import Elastic
from search_spaces.training import Order, Sandwich, Stages

UNET = {
    "sample_size": 64,
    "in_channels": 3,
    "out_channels": 3,
    "block_out_channels": (224, 448, 672, 896),
    "layers_per_block": 2,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    "attention_head_dim": 32,
    "norm_num_groups": 32,
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

images = ImageFolder("data/celebahq256", size=(256, 256))
inception = ExternalFeatures("inception.pt", "inception-v3", size=299)
noise = NoiseSchedule(beta_start=0.0015, beta_end=0.0195, beta_schedule="scaled_linear")
codec = Autoencoder("vqvae", scale=1.0, config=VQ_F4)
# 32 norm groups and heads of 32 leave sevenths of the widths: 34, 52, 74 and 100 % of the multiply-adds.
net = Elastic(
    UNET,
    channels=tuple(tuple(c * k // 7 for k in (4, 5, 6, 7)) for c in (224, 448, 672, 896)),
    noise=noise,
    codec=codec,
)
steps = uniform(200)

study = Study(
    name="ldm-celebahq256",
    space=Stepwise(net, steps, equal(steps, 5)),
    supernet=net,
    images=images,
    training=Stages(
        (
            Sandwich(steps=410_000, batch=48, learning_rate=9.6e-5, warmup=0, ema=0.9999, full_only=True),
            Order("gradient", batch=2),
            Sandwich(steps=100_000, batch=48, learning_rate=9.6e-5, warmup=0, ema=0.9999, distillation=0.5),
        )
    ),
    evaluator=Frechet(images, features=inception, rungs=(2_048, 50_000)),
    searchers={"ddsm": DDSM(macs_weight=8.2), "routing": Routing()},
    limits={"macs_share": 0.6},
    trials=200,
    verified=5,
)
