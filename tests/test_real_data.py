"""Real weights on real text: a small part of what benchmarks/quality.py measures."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from colbert_jax import ColBERT, Index
from colbert_jax.evaluation import read_collection, read_queries
from colbert_jax.search.arrays import RawArrays
from colbert_jax.search.exact import exact_search


@pytest.fixture(scope="module")
def encoded(shared_data, minilm_folder):
    model = ColBERT.from_pretrained(minilm_folder, doc_maxlen=128, devices=jax.devices()[:2])
    folder = shared_data / "eval" / "vaswani_npl"
    texts = [text for _, text in read_collection(folder / "collection.tsv")][:400]
    queries = list(read_queries(folder / "queries.tsv").values())[:40]
    return model.encode_documents(texts), model.encode_queries(queries)


@pytest.mark.parametrize(("nbits", "overlap"), [(2, 0.9), (4, 0.95)])
def test_plaid_agrees_with_uncompressed_scoring(encoded, tmp_path, nbits, overlap):
    documents, queries = encoded
    raw = RawArrays(jnp.asarray(documents.values), jnp.asarray(documents.offsets, jnp.int32))
    exact = exact_search(raw, documents.lengths, queries, 10).positions
    index = Index.build(
        tmp_path / "i", embeddings=documents.values, lengths=documents.lengths, nbits=nbits
    )

    def shared(**settings) -> float:
        ids = index.search(queries, k=10, **settings).positions
        return np.mean([len(set(a) & set(b)) / 10 for a, b in zip(ids, exact, strict=True)])

    assert shared(mode="exact") >= overlap
    assert shared(ncells=4, ndocs=1024) >= overlap
    assert shared() >= overlap - 0.1
