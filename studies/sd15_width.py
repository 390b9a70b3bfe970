"""Stable Diffusion 1.5 as an elastic network: channels by level, residual blocks, and its middle, for each of five intervals of 25 steps, trained by
distillation from the frozen original. BK-SDM's Base and Small (Kim et al. 2023) are among its subnets: one residual block everywhere, 261.5
GMACs, and that without a middle, 255.4.

Data: a local copy of the pipeline in `sd15` (StableDiffusionPipeline, safetensors), pictures of 512 pixels with their captions beside them as text
files in `data/captioned`, prompts in `prompts.txt`, a CLIP model in `clip`, Inception features in `inception.pt` (see docs/bring-your-own.md).
Hours: `nas run studies/sd15_width.py --dry-run --throughput MACS_A_SECOND` reckons them from the exact costs, hours = MACs / throughput / 3600.
For comparison, BK-SDM's Base (0.58 B parameters) and Small (0.49 B): FID 15.76 and 16.98 on MS-COCO's 30,000 where the original has 13.05, CLIP
score 0.2878 and 0.2677 against 0.2958, as remembered; 50,000 iterations of batch 256, learning rate 5e-5. Not run here.
"""

from evaluators.clip import ClipScore
from evaluators.conditions import Prompts
from evaluators.features import ExternalFeatures
from evaluators.frechet import Frechet
from evaluators.images import ImageFolder
from evaluators.sampling import DPMSolver
from evaluators.scoring import Scores
from nas.searchers.evolution import Evolution
from nas.searchers.knapsack import Knapsack
from nas.study import Study
from search_spaces.codec import Autoencoder
from search_spaces.intervals import equal, leading
from search_spaces.noise import NoiseSchedule
from search_spaces.stepwise import Stepwise
from search_spaces.supernet import Elastic
from search_spaces.text import TextEncoder
from search_spaces.training import Sandwich

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
# Whole heads of 40 channels in 32 norm groups leave the outermost level its half and its whole, the next one quarters, the others eighths.
net = Elastic(
    UNET,
    channels=((160, 320), (320, 480, 640), (640, 960, 1280), (640, 960, 1280)),
    depths=(1, 2),
    per_level=("width",),
    middle=True,
    noise=noise,
    codec=codec,
    text=text,
    pretrained="sd15/unet",
)
steps = leading(25, offset=1)

prompts = Prompts("prompts.txt", text)
images = ImageFolder("data/captioned", size=(512, 512), resize="bicubic", captions="txt", holdout=0.1)
inception = ExternalFeatures("inception.pt", "inception-v3", size=299)

study = Study(
    name="sd15-width",
    space=Stepwise(net, steps, equal(steps, 5), guidance=(7.5,)),
    supernet=net,
    images=images,
    training=Sandwich(
        steps=50_000,
        batch=256,
        learning_rate=5e-5,
        warmup=500,
        ema=0.9999,
        distillation=0.5,
        accumulate=8,
        precision="bfloat16",
        snr_cap=5.0,
    ),
    evaluator=Scores(
        (
            Frechet(images, features=inception, conditions=prompts, sampler=DPMSolver(), rungs=(1_024, 5_000)),
            ClipScore("clip", conditions=prompts, sampler=DPMSolver(), rungs=(1_024, 5_000)),
        )
    ),
    searchers={"evolution": Evolution(population=50), "knapsack": Knapsack()},
    objectives=("fd", "clip_distance", "macs"),
    limits={"macs_share": 0.6},
    trials=200,
    verified=5,
)
