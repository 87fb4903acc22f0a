"""Make stanford_codec.npz and stanford_plaid.npz with the original Stanford ColBERT package.

Run with Python 3.11, colbert-ai 0.2.22, torch 2.13.0 (CPU), transformers 4.57.6, faiss-cpu 1.15.1,
numpy 2.4.6, ninja and g++ (colbert-ai compiles four small C++ extensions at the first use):

    pip install torch==2.13.0
    pip install colbert-ai==0.2.22 faiss-cpu "transformers<5" ninja
    python make_stanford.py [output folder, by default this script's]

Everything that ends in the files is either made up here from fixed seeds (vectors, centroids,
queries) or is what the package answered on the CPU (bucket statistics, codes, packed residuals,
decompressed vectors, inverted lists, rankings).  It takes a minute after the compilation.
Repeated with one thread it gave the same arrays to the bit; elsewhere last bits may differ.
"""

import json
import os
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the package takes any GPU it sees

import numpy as np
import torch
from colbert.indexing.codecs.residual import ResidualCodec
from colbert.indexing.collection_indexer import CollectionIndexer
from colbert.indexing.utils import optimize_ivf
from colbert.infra.config import ColBERTConfig
from colbert.modeling.colbert import ColBERT
from colbert.search.index_storage import IndexScorer

DIM = 64
# (ncells, centroid_score_threshold, ndocs)
SETTINGS = [(1, 0.5, 256), (2, 0.45, 64), (4, 0.4, 32), (1, 0.5, 16)]
GAP = 1e-4  # no decision of a search may be closer than this


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def half(x):
    """Float32 values that float16 can hold."""
    return x.astype(np.float16).astype(np.float32)


def near(rng, vectors, noise):
    """Unit vectors around the given ones; noise is the length of the random part."""
    return unit(vectors + noise * unit(rng.standard_normal(vectors.shape)))


def official_codec(centroids, heldout, nbits):
    """The package's codec, its bucket statistics taken by the package from held-out vectors."""
    config = ColBERTConfig(dim=DIM, nbits=nbits)
    centroids, heldout = torch.from_numpy(centroids), torch.from_numpy(heldout).half()
    indexer = SimpleNamespace(config=config, use_gpu=False, verbose=0)
    cutoffs, weights, avg_residual = CollectionIndexer._compute_avg_residual(
        indexer, centroids, heldout
    )
    return ResidualCodec(config, centroids, avg_residual, cutoffs, weights)


def make_codec(seed):
    out = {}
    for nbits in (1, 2, 4, 8):
        rng = np.random.default_rng(seed + nbits)
        centroids = half(unit(rng.standard_normal((16, DIM))))
        inputs = half(near(rng, centroids[rng.integers(0, 16, 48)], 0.7))
        top = np.sort(inputs @ centroids.T, axis=1)
        assert (top[:, -1] - top[:, -2]).min() > GAP

        codec = official_codec(centroids, inputs, nbits)
        packed = codec.compress(torch.from_numpy(inputs).half())
        arrays = {
            "inputs": inputs,
            "centroids": centroids,
            "avg_residual": codec.avg_residual,
            "bucket_cutoffs": codec.bucket_cutoffs,
            "bucket_weights": codec.bucket_weights,
            "codes": packed.codes,
            "residuals": packed.residuals,
            "decompressed": codec.decompress(packed),
        }
        out |= {f"b{nbits}_{name}": np.array(array) for name, array in arrays.items()}

        if nbits == 2:  # the same again with cutoffs that some residual components hit exactly
            residuals = np.sort((inputs - centroids[out["b2_codes"]]).ravel())
            cutoffs = residuals[np.searchsorted(residuals, out["b2_bucket_cutoffs"])]
            codec.bucket_cutoffs = torch.from_numpy(cutoffs)
            out["b2tie_bucket_cutoffs"] = cutoffs
            out["b2tie_residuals"] = codec.compress(
                torch.from_numpy(inputs).half()
            ).residuals.numpy()
    return out


def make_documents(rng):
    """16 topics of 8 centroids; a shared direction gives unrelated tokens a cosine near 0.2."""
    shared, topics = rng.standard_normal(DIM), rng.standard_normal((16, DIM))
    own = unit(rng.standard_normal((16, 8, DIM)))
    centroids = 0.5 * unit(shared) + 0.3 * unit(topics)[:, None] + 0.9 * own
    centroids = half(unit(centroids.reshape(128, DIM)))
    unused = [40, 90, 127]  # no token is near these: their inverted lists stay empty
    centroids[unused] = half(unit(0.7 * unit(shared) + unit(rng.standard_normal((3, DIM)))))
    used = np.setdiff1d(np.arange(128), unused)

    doclens = rng.integers(3, 25, 400)
    homes = []
    for length in doclens:
        first, second = rng.choice(16, 2, replace=False)
        topic = rng.choice([first, second, -1], length, p=[0.6, 0.25, 0.15])
        topic = np.where(topic < 0, rng.integers(0, 16, length), topic)
        home = 8 * topic + rng.integers(0, 8, length)
        homes.append(np.where(np.isin(home, unused), rng.choice(used, length), home))
    tokens = half(near(rng, centroids[np.concatenate(homes)], 0.8))
    off_topic = np.stack([unit(shared), unit(shared), *centroids[unused]])
    return centroids, tokens, doclens, off_topic


def write_index(folder, centroids, tokens, doclens):
    """Write an index in the package's format; returns it as plain arrays."""
    heldout = np.random.default_rng(0).permutation(tokens)[:512]
    codec = official_codec(centroids, heldout, nbits=2)
    packed = codec.compress(torch.from_numpy(tokens).half())
    codec.save(folder)
    packed.save(f"{folder}/0")
    counts = {"num_chunks": 1, "num_partitions": 128, "num_embeddings": len(tokens)}
    counts |= {"config": {"dim": DIM, "nbits": 2}, "avg_doclen": len(tokens) / len(doclens)}
    Path(folder, "metadata.json").write_text(json.dumps(counts))
    Path(folder, "doclens.0.json").write_text(json.dumps(doclens.tolist()))
    per_centroid = torch.bincount(packed.codes, minlength=128)
    ivf, lengths = optimize_ivf(packed.codes.sort(stable=True).indices, per_centroid, folder)
    return {
        "centroids": centroids,
        "bucket_cutoffs": codec.bucket_cutoffs.numpy(),
        "bucket_weights": codec.bucket_weights.numpy(),
        "codes": packed.codes.numpy(),
        "residuals": packed.residuals.numpy(),
        "doclens": doclens.astype(np.int32),
        "ivf": ivf[: lengths.sum()].numpy(),
        "ivf_lengths": lengths.numpy(),
    }


def make_queries(rng, tokens, doclens, off_topic, distinct, noise):
    """An endless supply: six tokens around few distinct ones of one document, two off topic."""
    ends = np.cumsum(doclens)
    while True:
        doc = rng.integers(0, len(doclens))
        own = tokens[rng.integers(ends[doc] - doclens[doc], ends[doc], distinct)]
        own = np.repeat(own, 6 // distinct, axis=0)
        rows = [near(rng, own, noise), near(rng, rng.choice(off_topic, 2), 1)]
        yield np.concatenate(rows).astype(np.float32)


def gap_at(values, n):
    """Distance between the n-th and the next of the values in falling order, infinite if none."""
    values = np.sort(values)[::-1]
    return values[n - 1] - values[n] if n < len(values) else np.inf


def unambiguous(index, vectors, query, answers):
    """Whether no decision of the search hangs on rounding, on ties or on the floor at zero."""
    ends = np.cumsum(index["doclens"])
    spans = [slice(end - n, end) for end, n in zip(ends, index["doclens"], strict=True)]
    table = index["centroids"] @ query.T
    for (ncells, threshold, ndocs), (pids, scores, candidates, _) in zip(
        SETTINGS, answers, strict=True
    ):
        if min(gap_at(column, ncells) for column in table.T) < GAP:
            return False
        if abs(table.max(axis=1) - threshold).min() < GAP:
            return False
        kept = table.max(axis=1) >= threshold
        pruned, full = np.full(len(candidates), -9999.0 * len(query)), np.zeros(len(candidates))
        for row, pid in enumerate(candidates):
            codes = index["codes"][spans[pid]]
            full[row] = table[codes].max(axis=0).sum()
            if kept[codes].any():
                pruned[row] = table[codes[kept[codes]]].max(axis=0).sum()
        if gap_at(pruned, ndocs) < GAP:  # also where the cut falls among fully pruned documents
            return False
        survivors = np.argsort(-pruned)[:ndocs]
        if gap_at(full[survivors], ndocs // 4) < GAP:
            return False
        if any((vectors[spans[pid]] @ query.T).max(axis=0).min() < GAP for pid in pids):
            return False
        if np.diff(scores).max() > -GAP:
            return False
    return True


def make_plaid(seed):
    rng = np.random.default_rng(seed)
    centroids, tokens, doclens, off_topic = make_documents(rng)
    with tempfile.TemporaryDirectory() as folder:
        index = write_index(folder, centroids, tokens, doclens)
        ColBERT.try_load_torch_extensions(False)  # otherwise done when a checkpoint is loaded
        scorer = IndexScorer(folder, use_gpu=False)
    packed = scorer.embeddings
    total = len(tokens)  # the loader keeps 512 spare rows after the last token
    vectors = scorer.codec.decompress(type(packed)(packed.codes[:total], packed.residuals[:total]))

    def ask(query):
        """Per setting: pids, scores, candidates and whether centroid pruning changed the pids."""
        batch = torch.from_numpy(query)[None]
        for ncells, threshold, ndocs in SETTINGS:
            config = ColBERTConfig(ncells=ncells, ndocs=ndocs, query_maxlen=8)
            config.configure(centroid_score_threshold=-1.0)
            unpruned, _ = scorer.rank(config, batch)
            config.configure(centroid_score_threshold=threshold)
            candidates, _ = scorer.retrieve(config, batch)
            pids, scores = scorer.rank(config, batch)
            yield pids, scores, candidates.numpy(), pids != unpruned

    queries, answers = [], []
    wide = make_queries(rng, tokens, doclens, off_topic, distinct=6, noise=1.3)
    narrow = make_queries(rng, tokens, doclens, off_topic, distinct=2, noise=0.5)
    for supply, wanted in ((wide, 5), (narrow, 6)):
        while len(queries) < wanted:
            query = next(supply)
            answer = list(ask(query))
            telling = any(changed for *_, changed in answer)
            if supply is narrow:  # fewer candidates than ndocs // 4 of the first setting
                telling = len(answer[0][2]) < SETTINGS[0][2] // 4
            if telling and unambiguous(index, vectors.numpy(), query, answer):
                queries.append(query)
                answers.append(answer)

    out = {**index, "queries": np.stack(queries), "settings": np.array(SETTINGS)}
    for s in range(len(SETTINGS)):
        rows = [answer[s] for answer in answers]
        counts = np.array([len(pids) for pids, *_ in rows], np.int32)
        out[f"s{s}_pids"] = np.full((len(rows), counts.max()), -1, np.int32)
        out[f"s{s}_scores"] = np.full((len(rows), counts.max()), np.nan, np.float32)
        for row, (pids, scores, *_) in enumerate(rows):
            out[f"s{s}_pids"][row, : len(pids)] = pids
            out[f"s{s}_scores"][row, : len(pids)] = scores
        out[f"s{s}_counts"] = counts
        out[f"s{s}_candidates"] = np.array([len(c) for _, _, c, _ in rows], np.int32)
    return out


if __name__ == "__main__":
    target = Path(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parent)
    np.savez_compressed(target / "stanford_codec.npz", **make_codec(seed=100))
    np.savez_compressed(target / "stanford_plaid.npz", **make_plaid(seed=7))
