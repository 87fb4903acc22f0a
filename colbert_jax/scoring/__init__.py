"""Late interaction: MaxSim, its definition and its jitted forms."""

from colbert_jax.scoring.maxsim import maxsim, maxsim_all_pairs, maxsim_nway, maxsim_ragged

__all__ = ["maxsim", "maxsim_all_pairs", "maxsim_nway", "maxsim_ragged"]
