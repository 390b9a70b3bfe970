"""What can be chosen, and the network that can be all of it."""

import nas  # noqa: F401  before torch, whose threads are told how to wait
