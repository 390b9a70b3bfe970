"""DiT-XL/2 of 256 pixels, elastic in width and depth: for each of ten intervals of 25 DDIM steps, how many heads and how many blocks, guided at 1.5 as DiT's
own sampler does it. DyDiT's question (Zhao et al., ICLR 2025): should the network be smaller at some timesteps?

Data: a local copy of the pipeline in `dit` (DiTPipeline, safetensors), ImageNet's pictures in a folder for each class in `data/imagenet`, in the classes'
order, Inception features in `inception.pt` (see docs/bring-your-own.md).
Hours: `nas run studies/dit_width.py --dry-run --throughput MACS_A_SECOND` reckons them from the exact costs, hours = MACs / throughput / 3600.
Differs from DyDiT, whose heads and feed-forward channels are chosen for each block and for each token: here a step runs an ordinary stock network, narrower by
whole heads everywhere, or of fewer blocks. 75,000 steps of 256, distilled from the original by half; DyDiT takes 200,000 of 256. Timesteps are DDIM's 250.
For comparison, MACs of a call and FID-50K at 250 ancestral steps, guided at 1.5: the original 118.69 G and 2.27, DyDiT 84.33 G and 2.12, 57.88 G and 2.07; TinyFusion's
static network of 14 blocks 59.34 G and 3.73 (its authors' numbers; others found 21 and more of it). Not run here.
"""

from evaluators.conditions import Labels
from evaluators.features import ExternalFeatures
from evaluators.frechet import Frechet
from evaluators.images import ImageFolder
from evaluators.sampling import DDIM
from nas.searchers.evolution import Evolution
from nas.searchers.knapsack import Knapsack
from nas.study import Study
from search_spaces.codec import Autoencoder
from search_spaces.intervals import equal, uniform
from search_spaces.noise import NoiseSchedule
from search_spaces.stepwise import Stepwise
from search_spaces.supernet import Elastic
from search_spaces.training import Sandwich

DIT = {
    "_class_name": "DiTTransformer2DModel",
    "sample_size": 32,
    "in_channels": 4,
    "out_channels": 8,
    "patch_size": 2,
    "num_attention_heads": 16,
    "attention_head_dim": 72,
    "num_layers": 28,
    "num_embeds_ada_norm": 1000,
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

images = ImageFolder("data/imagenet", size=(256, 256), resize="bicubic", labels="folders", holdout=0.02)
inception = ExternalFeatures("inception.pt", "inception-v3", size=299)
noise = NoiseSchedule(beta_start=0.0001, beta_end=0.02, beta_schedule="linear")
codec = Autoencoder("dit/vae", scale=0.18215, config=KL_F8)
# Blocks are left out evenly spread; `block_order` in search_spaces/training/importance.py measures another order, for `block_order=`.
net = Elastic(
    DIT,
    widths=(0.5, 0.75, 1.0),
    depths=(14, 21, 28),
    noise=noise,
    codec=codec,
    pretrained="dit/transformer",
    guided_channels=3,
)
steps = uniform(250)

study = Study(
    name="dit-width",
    space=Stepwise(net, steps, equal(steps, 10), guidance=(1.5,)),
    supernet=net,
    images=images,
    training=Sandwich(
        steps=75_000,
        batch=256,
        learning_rate=1e-4,
        warmup=0,
        ema=0.9999,
        distillation=0.5,
        flip=True,
        accumulate=8,
        checkpointing=True,
        precision="bfloat16",
    ),
    evaluator=Frechet(images, features=inception, conditions=Labels(images), sampler=DDIM(), rungs=(2_048, 50_000)),
    searchers={"evolution": Evolution(population=50), "knapsack": Knapsack()},
    limits={"macs_share": 0.5},
    trials=200,
    verified=5,
)
