"""How good a schedule is: images, features, distances and the sampler that makes what they compare."""
