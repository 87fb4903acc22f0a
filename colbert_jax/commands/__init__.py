"""Commands of `colbert-jax` that need a room of their own: each adds its flags and runs."""
