"""DiffPruning's setting (Ganjdanesh et al., ECCV 2024) on latents: LSUN churches at 256 pixels, the published LDM-8 network, experts of timestep clusters
and the routing agent that divides one budget among them.

Data: LSUN churches as files in `data/church256`, the KL-f8 autoencoder as a diffusers folder in `vae`, and Inception features as a local file
(`inception.pt`, see docs/bring-your-own.md). `scale` is a buffer of the published checkpoint ("scale_by_std"), one over the deviation of its latents: put it
in place of the one below, which is Stable Diffusion's.
Hours: `nas run studies/ldm_church256.py --dry-run --throughput MACS_A_SECOND` reckons them from the exact costs, hours = MACs / throughput / 3600.
`nas intervals` measures the clusters; put its boundaries in place of these.
For comparison, the LDM paper's FID 4.02 with 200 to 400 DDIM steps at 295 M parameters; 20.9 GMACs a call, 18.6 without attention products, and 311
GMACs to decode an image, which is as much as 15 calls. Parameters and multiply-adds are the published network's; its eight heads are not: a
UNet2DModel has one size of heads for all levels. DiffPruning's tables are not known to us. Batch, learning rate and iterations are the LDM paper's
as remembered. Not run here.
"""

from evaluators.features import ExternalFeatures
from evaluators.frechet import Frechet
from evaluators.images import ImageFolder
from nas.searchers.evolution import Evolution
from nas.searchers.relaxation import Relaxation
from nas.searchers.routing import Routing
from nas.study import Study
from search_spaces.codec import Autoencoder
from search_spaces.intervals import bounded, uniform
from search_spaces.noise import NoiseSchedule
from search_spaces.stepwise import Stepwise
from search_spaces.supernet import Elastic
from search_spaces.training import Experts, Order, Sandwich, Stages

UNET = {
    "sample_size": 32,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": (192, 384, 384, 768, 768),
    "layers_per_block": 2,
    "down_block_types": (*("AttnDownBlock2D",) * 4, "DownBlock2D"),
    "up_block_types": ("ResnetUpsampleBlock2D", *("AttnUpBlock2D",) * 4),
    "downsample_type": "resnet",
    "upsample_type": "resnet",
    "resnet_time_scale_shift": "scale_shift",
    "attention_head_dim": 24,
    "norm_num_groups": 32,
    "attn_norm_num_groups": 32,
}

KL_F8 = {
    "_class_name": "AutoencoderKL",
    "in_channels": 3,
    "out_channels": 3,
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
}

images = ImageFolder("data/church256", size=(256, 256))
inception = ExternalFeatures("inception.pt", "inception-v3", size=299)
noise = NoiseSchedule(beta_start=0.0015, beta_end=0.0155, beta_schedule="scaled_linear")
codec = Autoencoder("vae", scale=0.18215, config=KL_F8)
boundaries = (120, 300, 520, 760)
net = Elastic(UNET, widths=(0.5, 1.0), depths=(1, 2), noise=noise, codec=codec, experts=boundaries)
steps = uniform(200)

study = Study(
    name="ldm-church256",
    space=Stepwise(net, steps, bounded(steps, boundaries)),
    supernet=net,
    images=images,
    training=Stages(
        (
            Sandwich(steps=500_000, batch=96, learning_rate=5e-5, warmup=0, ema=0.9999, full_only=True),
            Order("gradient", batch=2),
            Sandwich(steps=100_000, batch=96, learning_rate=5e-5, warmup=0, ema=0.9999, distillation=0.5),
            Experts(Sandwich(steps=20_000, batch=96, learning_rate=5e-5, warmup=0, distillation=0.5)),
        )
    ),
    evaluator=Frechet(images, features=inception, rungs=(2_048, 50_000)),
    searchers={"routing": Routing(warm_start=Relaxation(steps=5_000)), "evolution": Evolution()},
    limits={"macs_share": 0.6},
    trials=200,
    verified=5,
)
