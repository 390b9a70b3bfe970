"""DiP-GO's setting (Zhu et al., NeurIPS 2024): Stable Diffusion 1.5 with frozen weights, 50 DDIM steps, guided at 7.5 or not at all; at each step one
of the 47 legal sets of its 9 blocks runs, of which the empty one leaves the step out.

Data: a local copy of the pipeline in `sd15` (StableDiffusionPipeline, safetensors), prompts in `prompts.txt`, one in each line (the paper's are
PartiPrompts, or the first captions of COCO 2017's 5,000 validation images), others to learn the gates of in `learning.txt`, those images in `data/coco`, a CLIP model in `clip` (the paper's is
OpenCLIP's ViT-g/14), Inception features in `inception.pt` (see docs/bring-your-own.md).
Hours: `nas run studies/sd15_dip_go.py --dry-run --throughput MACS_A_SECOND` reckons them from the exact costs, hours = MACs / throughput / 3600; nothing is trained but gates.
Differs: MACs here are of both halves of a guided step, with attention's products: 50 steps are 40.2 TMACs, the paper's 16.94 are of one half without
them (`macs_share_without_attention` is the share as it counts). The gates' loss compares latents where the paper's compares decoded images, its noises
are new at every step, DDIM samples where its rows are of PLMS, and the score is CLIP's of the model that you bring.
The paper, MACs and CLIP score, PLMS 50 steps: 16.94 T 30.30; DiP-GO with 0.80 of it saved 3.38 T 30.29, with 0.85 2.54 T 29.84. Its released solution
is nearly ten whole steps: compare with ten steps before calling it reuse. Not run here.
"""

from evaluators.captions import TextsAlone
from evaluators.clip import ClipScore
from evaluators.conditions import Prompts
from evaluators.features import ExternalFeatures
from evaluators.frechet import Frechet
from evaluators.images import ImageFolder
from evaluators.sampling import DDIM
from evaluators.scoring import Scores
from nas.searchers.evolution import Evolution
from nas.searchers.gates import Gates
from nas.searchers.pruner import Pruner
from nas.study import Study
from search_spaces.codec import Autoencoder
from search_spaces.intervals import leading, per_step
from search_spaces.noise import NoiseSchedule
from search_spaces.options import Options
from search_spaces.patterns import legal
from search_spaces.stepwise import Stepwise
from search_spaces.supernet import Elastic
from search_spaces.text import TextEncoder
from search_spaces.training import Stages

UNET = {
    "sample_size": 64,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": (320, 640, 1280, 1280),
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    "layers_per_block": 2,
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
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

noise = NoiseSchedule(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", final_alpha="first")
codec = Autoencoder("sd15/vae", scale=0.18215, config=KL_F8)
text = TextEncoder("sd15", size=(512, 512))
net = Elastic(UNET, widths=(1.0,), noise=noise, codec=codec, text=text, pretrained="sd15/unet")
steps = leading(50, offset=1)

prompts = Prompts("prompts.txt", text)
coco = ImageFolder("data/coco", size=(512, 512), resize="bicubic")
inception = ExternalFeatures("inception.pt", "inception-v3", size=299)

study = Study(
    name="sd15-dip-go",
    space=Stepwise(net, steps, per_step(steps), Options((1.0,)), patterns=legal(levels=4), guidance=(None, 7.5)),
    supernet=net,
    images=TextsAlone("learning.txt", size=(512, 512)),
    training=Stages(()),
    evaluator=Scores(
        (
            ClipScore("clip", conditions=prompts, sampler=DDIM(), rungs=(256, 5_000)),
            Frechet(coco, features=inception, conditions=prompts, sampler=DDIM(), rungs=(256, 5_000)),
        )
    ),
    searchers={
        "gates": Gates(Pruner(steps=500, batch=1, dimension=512, learning_rate=0.1)),
        "evolution": Evolution(population=50),
    },
    objectives=("clip_distance", "fd", "macs"),
    limits={"macs_share": 0.5},
    trials=100,
    verified=5,
)
