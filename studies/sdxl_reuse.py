"""Stable Diffusion XL with frozen weights, 30 DPM-Solver++ steps of 1024 pixels: what each of ten intervals reuses of the step before, and how strongly it
is guided. Five block patterns, from the whole network to the outermost level alone, as DeepCache (Ma et al. 2024) has them.

Data: a local copy of the base pipeline in `sdxl` (StableDiffusionXLPipeline, safetensors), prompts in `prompts.txt`, a CLIP model in `clip`.
Hours: `nas run studies/sdxl_reuse.py --dry-run --throughput MACS_A_SECOND` reckons them from the exact costs, hours = MACs / throughput / 3600; nothing is trained.
For comparison, DiP-GO's row is of XL distilled to 4 steps: 11.95 TMACs and a CLIP score of 31.92 become 11.58 and 31.30, hardly anything saved. Not
run here.
"""

from evaluators.captions import TextsAlone
from evaluators.clip import ClipScore
from evaluators.conditions import Prompts
from evaluators.sampling import DPMSolver
from nas.searchers.evolution import Evolution
from nas.searchers.knapsack import Knapsack
from nas.study import Study
from search_spaces.codec import Autoencoder
from search_spaces.intervals import equal, leading
from search_spaces.noise import NoiseSchedule
from search_spaces.options import Options
from search_spaces.patterns import ALL, Every, Only
from search_spaces.stepwise import Stepwise
from search_spaces.supernet import Elastic
from search_spaces.text import TextEncoder
from search_spaces.training import Stages

UNET = {
    "sample_size": 128,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 2,
    "transformer_layers_per_block": (1, 2, 10),
    "cross_attention_dim": 2048,
    "attention_head_dim": (5, 10, 20),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
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

noise = NoiseSchedule(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
codec = Autoencoder("sdxl/vae", scale=0.13025, config=KL_F8)
text = TextEncoder("sdxl", size=(1024, 1024))
net = Elastic(UNET, widths=(1.0,), noise=noise, codec=codec, text=text, pretrained="sdxl/unet")
steps = leading(30, offset=1)
shallow, middle = ("d0", "u2"), ("d0", "d1", "u1", "u2")
patterns = (Only(ALL), Every(2, shallow), Every(3, shallow), Every(2, middle), Only(shallow))

study = Study(
    name="sdxl-reuse",
    space=Stepwise(
        net,
        steps,
        equal(steps, 10),
        Options((1.0,)),
        patterns=patterns,
        deterministic=False,
        guidance=(None, 5.0, 7.5),
    ),
    supernet=net,
    images=TextsAlone("prompts.txt", size=(1024, 1024)),
    training=Stages(()),
    evaluator=ClipScore("clip", conditions=Prompts("prompts.txt", text), sampler=DPMSolver(), rungs=(128, 1_000)),
    searchers={"evolution": Evolution(population=50), "knapsack": Knapsack()},
    objectives=("clip_distance", "macs"),
    limits={"macs_share": 0.5},
    trials=100,
    verified=5,
)
