"""How a supernet's weights are made: stages, each a recipe, and what they share."""

from search_spaces.training.autoencoder import TrainAutoencoder
from search_spaces.training.importance import Order
from search_spaces.training.sandwich import Experts, FineTune, Sandwich
from search_spaces.training.stages import Stage, Stages
from search_spaces.training.zero_init import ZeroInit

__all__ = ["Experts", "FineTune", "Order", "Sandwich", "Stage", "Stages", "TrainAutoencoder", "ZeroInit"]
