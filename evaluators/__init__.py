"""How good a schedule is: images, features, distances and the sampler that makes what they compare."""

import nas  # noqa: F401  before torch, whose threads are told how to wait
