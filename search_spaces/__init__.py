"""What can be chosen, and the network that can be all of it."""
