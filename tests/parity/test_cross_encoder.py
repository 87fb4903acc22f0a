"""Cross-encoder scores and tokenised pairs against transformers, on weights made on the spot."""

import jax
import numpy as np
import pytest
import support

from colbert_jax.mining.teacher import CrossEncoder, load_teacher

torch = pytest.importorskip("torch", reason="torch, the parity oracle, is not installed")

MINILM = dict(  # as wide as cross-encoder/ms-marco-MiniLM-L6-v2, a third as deep
    hidden_size=384,
    num_hidden_layers=2,
    num_attention_heads=12,
    intermediate_size=1536,
    max_position_embeddings=512,
    initializer_range=0.05,
)
QUERIES = [
    "heat flow",
    "what? (who)",
    "",
    "Zürich naïve 東京 “curly”",
    " ".join(support.WORDS[:40]),
]
DOCUMENTS = ["a river bank of money; water & wind", "", " ".join(support.WORDS[30:70])]
PAIRS = [(query, document) for query in QUERIES for document in DOCUMENTS]
LENGTHS = {"tiny": [30, 7], "minilm": [48]}


@pytest.fixture(scope="module", params=LENGTHS)
def folder(request, tmp_path_factory):
    place = tmp_path_factory.mktemp("cross") / request.param
    return support.write_cross_encoder(place, MINILM if request.param == "minilm" else None, 5)


def test_pairs_and_scores_are_those_of_transformers(folder):
    transformers = pytest.importorskip("transformers")
    original = transformers.BertForSequenceClassification.from_pretrained(folder).eval()
    theirs = transformers.BertTokenizerFast.from_pretrained(folder)
    for maxlen in LENGTHS[folder.name]:
        teacher = load_teacher(folder, maxlen=maxlen, dtype="float32", devices=jax.devices()[:1])
        assert isinstance(teacher, CrossEncoder)
        ids, types = teacher._tokenize(PAIRS)
        expected = []
        for pair, row, kinds in zip(PAIRS, ids, types, strict=True):
            encoded = theirs(
                [pair],  # in a list: alone, an empty document would be taken for none
                truncation="longest_first",
                max_length=maxlen,
                return_tensors="pt",
            )
            assert encoded["input_ids"][0].tolist() == row.tolist()
            assert encoded["token_type_ids"][0].tolist() == kinds.tolist()
            with torch.inference_mode():
                expected.append(original(**encoded).logits[0, 0].item())
        assert max(map(len, ids)) == maxlen
        assert np.std(expected) > 0.01
        scores = teacher.score(*zip(*PAIRS, strict=True))
        np.testing.assert_allclose(scores, expected, atol=1e-5)
