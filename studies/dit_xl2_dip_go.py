"""DiP-GO's setting for transformers (Zhu et al., NeurIPS 2024): DiT-XL/2 of 256 pixels with frozen weights, 250 ancestral steps; at each step every
branch of its 28 blocks, attention or feed-forward, runs or adds what it added at the step before.

Data: a local copy of the pipeline in `dit` (DiTPipeline, safetensors), ImageNet's pictures in a folder for each class in `data/imagenet`, in the classes'
order, Inception features in `inception.pt` (see docs/bring-your-own.md).
Hours: `nas run studies/dit_xl2_dip_go.py --dry-run --throughput MACS_A_SECOND` reckons them from the exact costs, hours = MACs / throughput / 3600; nothing is trained but gates.
Differs: which gates the paper has for a transformer is not said; these are one for each branch and step, which keep what it adds before the timestep's gate.
Guidance is not said either; without it here, as 250 x 118.64 G are the 29.66 T that its table begins with. The gates are learned by steps of their own
(`scope="step"`): 250 steps of gradients through the trajectory take more memory than a card has.
The paper, MACs and FID-50K: 250 steps 29.66 T 2.97 (as it measured; DiT's own 2.27 is guided), 110 steps 13.05 T 3.06, 70 steps 8.30 T 3.35; DiP-GO with 0.60
of it saved 11.86 T 3.01, with 0.75 7.40 T 3.14. Compare with fewer steps before calling it reuse. Not run here.
"""

from evaluators.conditions import Labels
from evaluators.features import ExternalFeatures
from evaluators.frechet import Frechet
from evaluators.images import ImageFolder
from evaluators.sampling import DDPM
from nas.searchers.gates import Gates
from nas.searchers.pruner import Pruner
from nas.searchers.random import Random
from nas.study import Study
from search_spaces.branches import Branches
from search_spaces.codec import Autoencoder
from search_spaces.intervals import uniform
from search_spaces.noise import NoiseSchedule
from search_spaces.supernet import Elastic
from search_spaces.training import Stages

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
net = Elastic(DIT, widths=(1.0,), noise=noise, codec=codec, pretrained="dit/transformer")

study = Study(
    name="dit-xl2-dip-go",
    space=Branches(net, uniform(250)),
    supernet=net,
    images=images,
    training=Stages(()),
    evaluator=Frechet(
        images,
        features=inception,
        conditions=Labels(images),
        sampler=DDPM(variance="learned_range"),
        rungs=(2_048, 50_000),
        reuse_precision="bfloat16",
    ),
    searchers={
        "gates": Gates(Pruner(scope="step", finer=True, steps=1000, batch=1, learning_rate=10.0, clip=False)),
        "random": Random(),
    },
    limits={"macs_share": 0.4},
    trials=50,
    verified=3,
)
