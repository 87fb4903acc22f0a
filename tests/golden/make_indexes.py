"""Make stanford_index/ and fastplaid_index/ with the original packages, and ask them about others.

    python make_indexes.py stanford [output folder, by default this script's]
    python make_indexes.py fastplaid [output folder]
    python make_indexes.py search STANFORD_INDEX QUERIES.npz OUT.npz

The first and the last run with colbert-ai 0.2.22 (see make_stanford.py for its environment), the
second with fast-plaid 1.7.0.2110 and torch 2.11.0. The passages are made up from a fixed seed, the
checkpoint has random weights (tests/support.py makes both); everything in the folders but
`answers.npz` is what the package wrote, with the paths of the machine taken out of its settings.

`search` opens an index as colbert-ai's own search does. QUERIES.npz holds `queries` float32
[B, Lq, D] and `settings` [S, 3]: ncells, centroid_score_threshold, ndocs. OUT.npz gets for setting
s `s{s}_pids`, `s{s}_scores` [B, longest] (best first, padded with -1 and nan) and
`s{s}_candidates` [B, N], whether a document lies in the probed lists.
"""

import json
import os
import shutil
import sys
import tempfile
from pathlib import Path

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the packages take any GPU they see
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch

# (ncells, centroid_score_threshold, ndocs): wide enough that every candidate is scored in full
SETTINGS = [(1, 0.5, 512), (2, 0.45, 512), (4, -1.0, 512)]
GAP = 1e-4  # no decision of a search may be closer than this
CHUNK = 30  # passages; the package's own 25,000 would make one chunk
PATHS = ("root", "experiment", "index_root", "name", "index_path", "index_name", "collection")


def padded(rows, fill, dtype):
    out = np.full((len(rows), max(map(len, rows))), fill, dtype)
    for target, row in zip(out, rows, strict=True):
        target[: len(row)] = row
    return out


# --- colbert-ai ------------------------------------------------------------------------------


def make_stanford(folder):
    import support
    from colbert import Indexer, IndexUpdater, Searcher
    from colbert.data.collection import Collection
    from colbert.infra import ColBERTConfig, Run, RunConfig
    from colbert.modeling.checkpoint import Checkpoint

    Collection.get_chunksize = lambda self: CHUNK
    passages = support.passages(60)
    with tempfile.TemporaryDirectory() as place:
        checkpoint = str(support.write_stanford(Path(place, "checkpoint")))
        run = RunConfig(nranks=1, root=place, experiment="e", avoid_fork_if_possible=True)
        with Run().context(run):
            indexer = Indexer(checkpoint, config=ColBERTConfig(nbits=2), verbose=0)
            index = Path(indexer.index("built", passages))
            encoder = Checkpoint(checkpoint, colbert_config=ColBERTConfig(), verbose=0)
            queries = encoder.queryFromText(support.passages(40, seed=1, longest=9)).numpy()
            queries = unambiguous(index, queries)[:6]
            publish(index, folder / "built", queries)

            # The package's updater fails where the inverted lists end in padding.
            lists, lengths = torch.load(index / "ivf.pid.pt")
            torch.save((lists[: lengths.sum()].clone(), lengths), index / "ivf.pid.pt")
            searcher = Searcher(str(index), checkpoint, passages, verbose=0)
            updater = IndexUpdater(searcher.config, searcher, checkpoint)
            updater.remove([3, 40])
            updater.add(support.passages(5, seed=2))
            updater.persist_to_disk()
            publish(index, folder / "updated", queries)


def publish(index, folder, queries):
    """Copy an index without the machine's paths, and put the package's answers beside it."""
    folder.mkdir(parents=True)
    for file in sorted(index.iterdir()):
        shutil.copy(file, folder)
    for name in ("metadata.json", "plan.json"):
        values = json.loads((folder / name).read_text())
        values["config"] |= {key: None for key in PATHS}
        values["config"] |= {"checkpoint": "checkpoint"}
        (folder / name).write_text(json.dumps(values, indent=4) + "\n")
    np.savez_compressed(
        folder / "answers.npz", queries=queries, **search(folder, queries, SETTINGS)
    )


def search(folder, queries, settings):
    """What the package's search answers on the CPU."""
    from colbert.infra.config import ColBERTConfig
    from colbert.modeling.colbert import ColBERT
    from colbert.search.index_storage import IndexScorer

    ColBERT.try_load_torch_extensions(False)  # otherwise done when a checkpoint is loaded
    scorer = IndexScorer(str(folder), use_gpu=False)
    out = {"settings": np.array(settings, np.float64)}
    for s, (ncells, threshold, ndocs) in enumerate(settings):
        config = ColBERTConfig(ncells=int(ncells), ndocs=int(ndocs), query_maxlen=queries.shape[1])
        config.configure(centroid_score_threshold=float(threshold))
        pids, scores = [], []
        candidates = np.zeros((len(queries), len(scorer.doclens)), bool)
        for row, query in zip(candidates, torch.from_numpy(queries), strict=True):
            row[scorer.retrieve(config, query[None])[0].long().numpy()] = True
            ranked = scorer.rank(config, query[None])
            pids.append(ranked[0])
            scores.append(ranked[1])
        out[f"s{s}_pids"] = padded(pids, -1, np.int32)
        out[f"s{s}_scores"] = padded(scores, np.nan, np.float32)
        out[f"s{s}_candidates"] = candidates
    return out


def unambiguous(folder, queries):
    """The queries whose probes and rankings hang on no rounding, and on no floor at zero."""
    from colbert.indexing.codecs.residual import ResidualCodec
    from colbert.indexing.loaders import load_doclens

    codec = ResidualCodec.load(str(folder))
    doclens = load_doclens(str(folder))
    chunks = [codec.Embeddings.load(str(folder), i) for i in range(len(doclens) // CHUNK)]
    values = torch.cat([codec.decompress(chunk) for chunk in chunks]).numpy()
    ends = np.cumsum(doclens)
    kept = []
    for query, ranked in zip(queries, search(folder, queries, SETTINGS)["s2_scores"], strict=True):
        table = np.sort(codec.centroids.numpy() @ query.T, axis=0)[::-1]
        probes = min((table[n - 1] - table[n]).min() for n in (1, 2, 4))
        best = [(values[e - n : e] @ query.T).max(0) for n, e in zip(doclens, ends, strict=True)]
        ranked = ranked[~np.isnan(ranked)]
        if probes > GAP and np.min(best) > GAP and -np.diff(ranked).max() > GAP:
            kept.append(query)
    return np.stack(kept)


# --- fast-plaid ------------------------------------------------------------------------------


def make_fastplaid(folder):
    """One history, kept in the single-copy layout of 1.7 and in shards, and one that is new."""
    from fast_plaid import search as fast_plaid

    def documents(n, seed):
        rng = np.random.default_rng(seed)
        topics = np.random.default_rng(0).standard_normal((40, 16))
        for length in rng.integers(2, 14, n):
            x = topics[rng.integers(0, 40, length)] + rng.standard_normal((length, 16))
            yield torch.from_numpy(x / np.linalg.norm(x, axis=1, keepdims=True)).half()

    queries = torch.stack([d[:2] for d in documents(8, 3)])
    for name, keep in (("merged", "0"), ("sharded", "1"), ("compressed", "0")):
        os.environ["FAST_PLAID_KEEP_SHARDS"] = keep
        place = folder / name
        index = fast_plaid.FastPlaid(index=str(place), device="cpu")
        new = name == "compressed"
        size = dict(nbits=4 if new else 2, batch_size=25, start_from_scratch=10, compress_only=new)
        index.create(list(documents(12 if new else 60, 1)), **size)
        answers = {}
        if not new:
            index.update(list(documents(5, 2)), start_from_scratch=5)
            index.delete([3, 40])
            found = index.search(queries, top_k=10, n_ivf_probe=256, n_full_scores=1000)
            answers["queries"] = queries.float().numpy()
            answers["pids"] = np.array([[i for i, _ in hits] for hits in found], np.int32)
            answers["scores"] = np.array([[score for _, score in hits] for hits in found])
        n = json.loads((place / "metadata.json").read_text())["num_documents"]
        values = index.get_embeddings(list(range(n)))
        answers["lengths"] = np.array([len(v) for v in values])
        answers["values"] = torch.cat(values).float().numpy()
        index.close()
        (place / "plaid.lock").unlink(missing_ok=True)
        np.savez_compressed(place / "answers.npz", **answers)


if __name__ == "__main__":
    what, *rest = sys.argv[1:]
    if what == "search":
        source, asked, out = rest
        given = np.load(asked)
        np.savez_compressed(out, **search(source, given["queries"], given["settings"]))
    else:
        target = Path(rest[0] if rest else Path(__file__).parent) / f"{what}_index"
        shutil.rmtree(target, ignore_errors=True)
        {"stanford": make_stanford, "fastplaid": make_fastplaid}[what](target)
