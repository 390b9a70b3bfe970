"""DiT-XL/2 of 256 pixels with frozen weights, 20 DDIM steps guided at 1.5 as DiT's own sampler does it, three of four channels: which branches each second
step takes from the step before. The baseline is FORA, which takes all of them, and the whole network; beside it the router of Learning-to-Cache, DiP-GO's
gates and evolution. `STEPS = 50`, and `Router(sparsity=1e-6)`, for the row of 50 steps.

Data: a local copy of the pipeline in `dit` (DiTPipeline, safetensors), ImageNet's pictures in a folder for each class in `data/imagenet`, in the classes'
order, Inception features in `inception.pt` (see docs/bring-your-own.md).
Hours: `nas run studies/dit_xl2_reuse.py --dry-run --throughput MACS_A_SECOND` reckons them from the exact costs, hours = MACs / throughput / 3600; nothing is trained but router and gates.
For comparison, FID-50K of 20 steps: whole 3.48 in 2.87 s, Learning-to-Cache's router (lambda 5e-6, threshold 0.1) 3.46 in 2.26 s; of 50 steps 2.26 in 7.25 s
and 2.27 in 5.57 s (lambda 1e-6), its authors' measurements. Released routers are read by `search_spaces.layouts.learning_to_cache`, SmoothCache's
schedules by `smoothcache`: `space.genome(learning_to_cache("router.safetensors", 20))` is the router as a genome of this space. Not run here.
"""

from evaluators.conditions import Labels
from evaluators.features import ExternalFeatures
from evaluators.frechet import Frechet
from evaluators.images import ImageFolder
from evaluators.sampling import DDIM
from nas.searchers.evolution import Evolution
from nas.searchers.gates import Gates
from nas.searchers.pruner import Pruner
from nas.searchers.router import Router
from nas.study import Study
from search_spaces.branches import Branches
from search_spaces.codec import Autoencoder
from search_spaces.intervals import uniform
from search_spaces.noise import NoiseSchedule
from search_spaces.supernet import Elastic
from search_spaces.training import Stages

STEPS = 20
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
net = Elastic(DIT, widths=(1.0,), noise=noise, codec=codec, pretrained="dit/transformer", guided_channels=3)

study = Study(
    name=f"dit-xl2-reuse-{STEPS}",
    space=Branches(net, uniform(STEPS), guidance=1.5, whole=2),
    supernet=net,
    images=images,
    training=Stages(()),
    evaluator=Frechet(images, features=inception, conditions=Labels(images), sampler=DDIM(), rungs=(2_048, 50_000)),
    searchers={
        "learning-to-cache": Gates(Router(steps=50_000), choosing=("threshold",)),
        "gates": Gates(Pruner(scope="step", finer=True, steps=500, batch=1, clip=False), choosing=("bisection",)),
        "evolution": Evolution(population=50),
    },
    limits={"macs_share": 0.8},
    trials=200,
    verified=5,
)
