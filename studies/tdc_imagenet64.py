"""TDC's groups (arXiv 2312.13307) on ImageNet at 64 pixels: the class-conditional network of IDDPM (Nichol & Dhariwal 2021), five groups of equally
many timesteps, a fixed budget for each, (i/5 + (5-i)/5 x 0.5) of the full network, and multi-round proposals for each group's widths, by the router
beside them. A group's budget is the space's: both searchers keep to it. Groups of equal width in SNR, as on CIFAR-10, would leave a single sampler's
step to each of the two noisiest: cosine betas end at -98 dB.

Data: ImageNet at 64 pixels, a folder for each of its 1,000 classes, in `data/imagenet64`, and Inception features as a local file (`inception.pt`,
see docs/bring-your-own.md).
Hours: `nas run studies/tdc_imagenet64.py --dry-run --throughput MACS_A_SECOND` reckons them from the exact costs, hours = MACs / throughput / 3600.
For comparison, IDDPM's FID 2.92 with 250 of 4,000 steps at 273 M parameters and 89.1 GMACs a call (88.5 without attention products); of TDC an FID
better by 1.5 at about 80 % of the compute, absolute numbers are not known to us, nor whether this was its network. Cosine betas,
learned variance, one label more than IDDPM has, that of no class. Parameters and multiply-adds are the published network's but for that label; its
four heads are not: a UNet2DModel has one size of heads for all levels. Trained for a sixth of IDDPM's 250,000 steps of 2,048. Not run here.
"""

from evaluators.conditions import Labels
from evaluators.features import ExternalFeatures
from evaluators.frechet import Frechet
from evaluators.images import ImageFolder
from evaluators.sampling import DDPM
from nas.searchers.rounds import Rounds
from nas.searchers.routing import Routing
from nas.study import Study
from search_spaces.intervals import bounded, even, linear_budgets, uniform
from search_spaces.noise import NoiseSchedule
from search_spaces.stepwise import Stepwise
from search_spaces.supernet import Elastic
from search_spaces.training import Experts, Order, Sandwich, Stages

UNET = {
    "sample_size": 64,
    "in_channels": 3,
    "out_channels": 6,
    "block_out_channels": (192, 384, 576, 768),
    "layers_per_block": 3,
    "down_block_types": ("DownBlock2D", "DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
    "resnet_time_scale_shift": "scale_shift",
    "attention_head_dim": 48,
    "norm_num_groups": 32,
    "attn_norm_num_groups": 32,
    "num_class_embeds": 1001,
}

images = ImageFolder("data/imagenet64", size=(64, 64), labels="folders")
inception = ExternalFeatures("inception.pt", "inception-v3", size=299)
noise = NoiseSchedule(timesteps=4000, beta_schedule="squaredcos_cap_v2")
steps = uniform(250, 4000)
groups = even(5, 4000)
net = Elastic(
    UNET,
    channels=((96, 128, 192), (192, 256, 384), (288, 384, 576), (384, 576, 768)),
    per_level=("width",),
    noise=noise,
    experts=groups,
)

study = Study(
    name="tdc-imagenet64",
    space=Stepwise(net, steps, bounded(steps, groups), budgets=linear_budgets(len(groups) + 1, least=0.5)),
    supernet=net,
    images=images,
    training=Stages(
        (
            Sandwich(steps=40_000, batch=2048, accumulate=16, learning_rate=3e-4, warmup=0, ema=0.9999, full_only=True),
            Order("gradient"),
            Sandwich(
                steps=10_000, batch=2048, accumulate=16, learning_rate=3e-4, warmup=0, ema=0.9999, distillation=0.5
            ),
            Experts(Sandwich(steps=2_000, batch=2048, accumulate=16, learning_rate=1e-4, warmup=0, distillation=0.5)),
        )
    ),
    evaluator=Frechet(
        images,
        features=inception,
        rungs=(4_096, 50_000),
        sampler=DDPM("learned_range"),
        conditions=Labels(images),
    ),
    searchers={"rounds": Rounds(budgets=1), "routing": Routing()},
    trials=100,
    verified=5,
)
