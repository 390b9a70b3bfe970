"""Families of stock networks: what they are made of, which slices a smaller one takes, and what it costs."""
