"""ECAD's setting (Aggarwal et al., ICLR 2026): PixArt-alpha of 256 pixels with frozen weights, 20 DPM-Solver++ steps guided at 4.5, and at each step but the
first a bit for each of the 84 branches of its 28 blocks, attention, text and feed-forward: a genetic search for all trade-offs of cost and agreement.

Data: a local copy of the pipeline in `pixart` (PixArtAlphaPipeline, safetensors, with a T5 encoder), prompts in `prompts.txt`, one in each line (the paper
calibrates with 100), a CLIP model in `clip`.
Hours: `nas run studies/pixart_ecad.py --dry-run --throughput MACS_A_SECOND` reckons them from the exact costs, hours = MACs / throughput / 3600; nothing is trained.
Differs: ECAD scores by ImageReward; here it is CLIP's score of the model that you bring. Its population is 72 of 500 generations; here 4,000 trials in all.
For comparison, the whole network's 20 guided steps are 5.71 TMACs without attention's products; ECAD reaches 2.58 times the speed where others have 2.35, at a
COCO FID better by 4.47 (its authors' numbers). Not run here.
"""

from evaluators.captions import TextsAlone
from evaluators.clip import ClipScore
from evaluators.conditions import Prompts
from evaluators.sampling import DPMSolver
from nas.searchers.evolution import Evolution
from nas.searchers.random import Random
from nas.study import Study
from search_spaces.branches import Branches
from search_spaces.codec import Autoencoder
from search_spaces.intervals import uniform
from search_spaces.noise import NoiseSchedule
from search_spaces.supernet import Elastic
from search_spaces.text import TextEncoder
from search_spaces.training import Stages

PIXART = {
    "_class_name": "PixArtTransformer2DModel",
    "sample_size": 32,
    "in_channels": 4,
    "out_channels": 8,
    "patch_size": 2,
    "num_attention_heads": 16,
    "attention_head_dim": 72,
    "num_layers": 28,
    "cross_attention_dim": 1152,
    "caption_channels": 4096,
    "use_additional_conditions": False,
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

noise = NoiseSchedule(beta_start=0.0001, beta_end=0.02, beta_schedule="linear")
codec = Autoencoder("pixart/vae", scale=0.18215, config=KL_F8)
text = TextEncoder("pixart", size=(256, 256), length=120)
net = Elastic(PIXART, widths=(1.0,), noise=noise, codec=codec, text=text, pretrained="pixart/transformer", tokens=120)

study = Study(
    name="pixart-ecad",
    space=Branches(net, uniform(20), guidance=4.5),
    supernet=net,
    images=TextsAlone("prompts.txt", size=(256, 256)),
    training=Stages(()),
    evaluator=ClipScore("clip", conditions=Prompts("prompts.txt", text), sampler=DPMSolver(), rungs=(100, 1_000)),
    searchers={"evolution": Evolution(population=72), "random": Random()},
    objectives=("clip_distance", "macs"),
    limits={"macs_share": 0.6},
    trials=4_000,
    verified=20,
)
