"""Late interaction: MaxSim, as defined and in jitted forms."""

from colbert_jax.scoring.maxsim import maxsim, maxsim_all_pairs, maxsim_nway, maxsim_ragged

__all__ = ["maxsim", "maxsim_all_pairs", "maxsim_nway", "maxsim_ragged"]
