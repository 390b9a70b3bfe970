"""DiP-GO's setting (Zhu et al., NeurIPS 2024) on a network in pixel space: at each of 50 DDIM steps one of the 47 legal sets of blocks runs; gates
learned through the unrolled sampler, weights frozen.

Data: CIFAR-10's training images as files in `data/cifar10`, and the pretrained network as a diffusers folder in `data/ddpm-cifar10`, and Inception features as a local file (`inception.pt`, see docs/bring-your-own.md).
Hours: `nas run studies/dip_go_cifar10.py --dry-run --throughput MACS_A_SECOND` reckons them from the exact costs, hours = MACs / throughput / 3600.
The paper, Stable Diffusion 1.5 at 50 steps: CLIP score 30.30 at 16.94 TMACs, 30.29 at 3.38. Its released solution runs ten whole steps; compare
with a subset of steps (`patterns=(Only(ALL), Only(()))`) before calling it reuse.
"""

from evaluators.features import ExternalFeatures
from evaluators.frechet import Frechet
from evaluators.images import ImageFolder
from nas.searchers.evolution import Evolution
from nas.searchers.gates import Gates
from nas.searchers.pruner import Pruner
from nas.study import Study
from search_spaces.intervals import per_step, uniform
from search_spaces.options import Options
from search_spaces.patterns import legal
from search_spaces.stepwise import Stepwise
from search_spaces.supernet import Elastic
from search_spaces.training import Sandwich

# The DDPM network of CIFAR-10 (Ho et al. 2020): 35.7 M parameters, 6.05 GMACs and 0.17 of attention products.
UNET = {
    "sample_size": 32,
    "in_channels": 3,
    "out_channels": 3,
    "block_out_channels": (128, 256, 256, 256),
    "layers_per_block": 2,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    "attention_head_dim": None,
    "norm_num_groups": 32,
    "downsample_padding": 0,
}

images = ImageFolder("data/cifar10", size=(32, 32))
inception = ExternalFeatures("inception.pt", "inception-v3", size=299)
net = Elastic(
    UNET, widths=(1.0,)
)  # or Elastic.from_pretrained("data/ddpm-cifar10", widths=(1.0,)) with training=Stages(())
steps = uniform(50)

study = Study(
    name="dip-go-cifar10",
    space=Stepwise(net, steps, per_step(steps), Options((1.0,)), patterns=legal(levels=4)),
    supernet=net,
    images=images,
    training=Sandwich(
        steps=800_000, batch=128, learning_rate=2e-4, warmup=5_000, ema=0.9999, flip=True, full_only=True
    ),
    evaluator=Frechet(images, features=inception, rungs=(4_096, 50_000)),
    searchers={
        "gates": Gates(Pruner(steps=1_000, batch=1, dimension=512)),
        "plain_gates": Gates(Pruner(scores="plain", steps=1_000, batch=1, learning_rate=25.0)),
        "evolution": Evolution(population=50),
    },
    limits={"macs_share": 0.5},
    trials=100,
    verified=5,
)
