"""Flax NNX modules: backbones, and the encoders that are built on them."""
