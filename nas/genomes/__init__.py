"""Pure functions of genomes, costs and scores: drawing and changing them, fronts, and the allocation of a budget."""
