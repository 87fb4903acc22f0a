"""Flax NNX modules: the backbones, and the projection on top of them."""
