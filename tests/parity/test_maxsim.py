"""MaxSim and its gradient-free forms against torch, mixed lengths, 1e-4 relative."""

import numpy as np
import pytest
from support import unit_rows

from colbert_jax.embeddings import DocumentEmbeddings
from colbert_jax.scoring import maxsim_all_pairs

torch = pytest.importorskip("torch", reason="torch, the parity oracle, is not installed")


def test_all_pairs_equals_torch():
    rng = np.random.default_rng(1)
    lengths = rng.integers(1, 180, 40)
    documents = DocumentEmbeddings.from_lengths(unit_rows(rng, lengths.sum(), 128), lengths)
    queries = unit_rows(rng, 8, 32, 128)
    block, mask = documents.padded()
    similarity = torch.einsum("bqd,nld->bnlq", torch.from_numpy(queries), torch.from_numpy(block))
    similarity[:, ~torch.from_numpy(mask)] = -9999
    expected = similarity.max(dim=2).values.sum(dim=-1).numpy()
    np.testing.assert_allclose(maxsim_all_pairs(queries, block, mask), expected, rtol=1e-4)
