import contextlib
import json

import jax
import numpy as np
import pytest
import support

from colbert_jax import Index, Retriever
from colbert_jax.mining import stages
from colbert_jax.mining.stages import make_examples, mine, retrieve, score_ranking
from colbert_jax.mining.teacher import load_teacher

QUERIES = {str(n): text for n, text in enumerate(support.passages(7, seed=5, longest=6))}
QUERIES["last one"] = "heat flow"


class FakeTeacher:
    """Scores by the texts' letters, after `patience` pairs an error."""

    fingerprint = "fake"

    def __init__(self, patience=10**9, bad=None):
        self.patience, self.bad, self.pairs = patience, bad, []

    def score(self, queries, documents, *, progress=None):
        self.patience -= len(queries)
        if self.patience < 0:
            raise RuntimeError("killed")
        self.pairs += zip(queries, documents, strict=True)
        scores = [self.of(q, d) for q, d in zip(queries, documents, strict=True)]
        if self.bad is not None:
            scores[self.bad] = np.nan
        return np.array(scores, np.float32)

    @staticmethod
    def of(query, document):
        return (sum(map(ord, document)) * len(query)) % 97 / 7


@pytest.fixture(scope="module")
def collection(texts, tmp_path_factory):
    file = tmp_path_factory.mktemp("collection") / "collection.tsv"
    file.write_text("".join(f"{n}\t{text}\n" for n, text in enumerate(texts)))
    return file


@pytest.fixture(scope="module")
def bi(tmp_path_factory):
    folder = support.write_plain(tmp_path_factory.mktemp("bi"), dict(num_hidden_layers=1))
    return load_teacher(folder, maxlen=16, dtype="float32", devices=jax.devices()[:1])


@pytest.fixture(scope="module")
def ranking(model, index, tmp_path_factory):
    return retrieve(
        Retriever(model, index), QUERIES, tmp_path_factory.mktemp("run") / "r.tsv", k=9
    ).path


@pytest.fixture(scope="module")
def scored(ranking, collection):
    path = ranking.with_name("scores.jsonl")
    return score_ranking(ranking, QUERIES, collection, FakeTeacher(), path).path


def rows(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def names(folder):
    return sorted(file.name for file in folder.iterdir())


# --- Retrieval ------------------------------------------------------------------------------


def test_a_ranking_is_what_search_finds(model, index, ranking):
    hits = index.search(model.encode_queries(list(QUERIES.values())), k=9)
    lines = [line.split("\t") for line in ranking.read_text().splitlines()]
    assert [line[0] for line in lines] == [qid for qid in QUERIES for _ in range(9)]
    assert [line[1] for line in lines] == [str(i) for i in hits.positions.reshape(-1)]
    assert [line[2] for line in lines] == [str(rank) for rank in range(1, 10)] * len(QUERIES)
    found = [float(line[3]) for line in lines]
    np.testing.assert_allclose(found, hits.scores.reshape(-1), atol=1e-4)
    assert names(ranking.parent)[:2] == ["r.tsv", "r.tsv.meta"]


@pytest.mark.parametrize("after", [0, 1, 3])
def test_a_killed_retrieval_goes_on(model, index, tmp_path, monkeypatch, after):
    arguments = dict(k=5, batch=2)
    whole = retrieve(Retriever(model, index), QUERIES, tmp_path / "whole", **arguments)
    search, calls = Retriever.search, []

    def dying(self, *args, **kwargs):
        if len(calls) == after:
            raise RuntimeError("killed")
        calls.append(args)
        return search(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(Retriever, "search", dying)
        with pytest.raises(RuntimeError, match="killed"):
            retrieve(Retriever(model, index), QUERIES, tmp_path / "cut", **arguments)
        assert not (tmp_path / "cut").exists()
        if after:
            with pytest.raises(FileExistsError, match="left unfinished by a run with other"):
                retrieve(Retriever(model, index), QUERIES, tmp_path / "cut", k=6)
        calls.clear()
        patch.setattr(Retriever, "search", lambda *a, **b: (calls.append(a), search(*a, **b))[1])
        again = retrieve(Retriever(model, index), QUERIES, tmp_path / "cut", **arguments)
    assert len(calls) == 4 - after and again.queries == whole.queries == len(QUERIES)
    assert again.path.read_bytes() == whole.path.read_bytes()
    with pytest.raises(FileExistsError, match="k: 5, not 6"):
        retrieve(Retriever(model, index), QUERIES, tmp_path / "cut", k=6)


def test_retrieval_checks_its_input(model, index, tmp_path, plain_folder):
    for queries, message in (
        ({}, "there are no queries"),
        ({"1": "heat", "2": " "}, "query '2' is empty"),
        ({"a\tb": "heat"}, "the query id 'a.tb' has a tab"),
    ):
        with pytest.raises(ValueError, match=message):
            retrieve(Retriever(model, index), queries, tmp_path / "r")
    with pytest.raises(ValueError, match="batch must be >= 1, got 0"):
        retrieve(Retriever(model, index), QUERIES, tmp_path / "r", batch=0)
    with pytest.raises(ValueError, match="k must be a whole number"):
        retrieve(Retriever(model, index), QUERIES, tmp_path / "r", k=0)
    other = type(model).from_pretrained(plain_folder, devices=jax.devices()[:1])
    with pytest.raises(ValueError, match="built with another model"):
        retrieve(Retriever(other, index), QUERIES, tmp_path / "r")
    assert names(tmp_path) == []


# --- Scores ---------------------------------------------------------------------------------


def test_scores_are_the_teachers_best_first(ranking, scored, texts):
    by_query = {}
    for line in ranking.read_text().splitlines():
        qid, pid, *_ = line.split("\t")
        by_query.setdefault(qid, []).append(pid)
    lines = rows(scored)
    assert [line[0] for line in lines] == [0, 1, 2, 3, 4, 5, 6, "last one"]
    for qid, *pairs in lines:
        pids = by_query[str(qid)]
        own = {pid: np.float32(FakeTeacher.of(QUERIES[str(qid)], texts[int(pid)])) for pid in pids}
        expected = sorted(pids, key=lambda pid: -own[pid])  # stable: ties by rank
        assert pairs == [[int(pid), float(str(own[pid]))] for pid in expected]
        assert all(np.float32(score) == own[str(pid)] for pid, score in pairs)


@pytest.mark.parametrize("patience", [0, 20, 50])
def test_killed_scoring_goes_on(ranking, collection, scored, tmp_path, patience):
    output = tmp_path / "scores"
    block = dict(batch=18)  # two queries
    arguments = ranking, QUERIES, collection
    with pytest.raises(RuntimeError, match="killed"):
        score_ranking(*arguments, FakeTeacher(patience), output, **block)
    teacher = FakeTeacher()
    done = score_ranking(*arguments, teacher, output, **block)
    assert len(teacher.pairs) == 72 - patience // 18 * 18 and done.queries == 8
    assert output.read_bytes() == scored.read_bytes()
    assert score_ranking(*arguments, FakeTeacher(0), output).queries == 8  # kept
    other = FakeTeacher()
    other.fingerprint = "other"
    with pytest.raises(FileExistsError, match='teacher: "fake", not "other"'):
        score_ranking(*arguments, other, output)


def test_labelled_passages_are_scored_too(ranking, collection, scored, texts, tmp_path):
    in_ranking = [pid for pid, _ in rows(scored)[0][1:]]
    outside = next(n for n in range(len(texts)) if n not in in_ranking)
    positives = {"0": {str(outside), str(in_ranking[2])}, "not ranked": {"3"}}
    mapping = {str(n): text for n, text in enumerate(texts)}
    output = score_ranking(
        ranking, QUERIES, mapping, FakeTeacher(), tmp_path / "s", positives=positives
    ).path
    first, *others = rows(output)
    assert sorted(pid for pid, _ in first[1:]) == sorted([*in_ranking, outside])
    assert others == rows(scored)[1:]
    with pytest.raises(ValueError, match="'999', labelled for query '0', is not in the coll"):
        positives = {"0": ["999"]}
        score_ranking(ranking, QUERIES, mapping, FakeTeacher(), tmp_path / "t", positives=positives)
    with pytest.raises(TypeError, match="positives of query '0' must be a collection"):
        positives = {"0": "12"}
        score_ranking(ranking, QUERIES, mapping, FakeTeacher(), tmp_path / "t", positives=positives)


@pytest.mark.parametrize("stage", ["encode_documents", "similarity"])
def test_a_bi_encoder_embeds_each_passage_once(
    bi, ranking, collection, texts, tmp_path, monkeypatch, stage
):
    """Killed while it embeds passages, or while it scores pairs."""
    arguments = ranking, QUERIES, collection, bi
    whole = score_ranking(*arguments, tmp_path / "whole", batch=18).path
    embedded, real, calls = [], type(bi).encode_documents, []
    function = getattr(type(bi), stage)

    def note(self, documents, **keywords):
        embedded.extend(documents)
        return real(self, documents, **keywords)

    def dying(*given, **keywords):
        calls.append(given)
        if len(calls) == 2:
            raise RuntimeError("killed")
        return (note if stage == "encode_documents" else function)(*given, **keywords)

    with monkeypatch.context() as patch:
        patch.setattr(type(bi), "encode_documents", note)
        patch.setattr(type(bi), stage, dying)
        with pytest.raises(RuntimeError, match="killed"):
            score_ranking(*arguments, tmp_path / "cut", batch=18)
    monkeypatch.setattr(type(bi), "encode_documents", note)
    score_ranking(*arguments, tmp_path / "cut", batch=18)
    assert (tmp_path / "cut").read_bytes() == whole.read_bytes()
    assert names(tmp_path) == ["cut", "cut.meta", "whole", "whole.meta"]
    pids = {line.split("\t")[1] for line in ranking.read_text().splitlines()}
    assert sorted(embedded) == sorted(texts[int(pid)] for pid in pids)
    query = bi.encode_queries([QUERIES["0"], QUERIES["1"]])[0]
    pairs = rows(whole)[0][1:]
    expected = bi.encode_documents([texts[pid] for pid, _ in pairs]) @ query
    np.testing.assert_allclose([score for _, score in pairs], expected, atol=2e-6)


def test_vectors_of_somebody_else_are_left_alone(bi, ranking, collection, tmp_path):
    (tmp_path / "s.vectors").write_bytes(b"mine")
    with pytest.raises(FileExistsError, match=r"s\.vectors: exists, and is not of this stage"):
        score_ranking(ranking, QUERIES, collection, bi, tmp_path / "s")
    score_ranking(ranking, QUERIES, collection, FakeTeacher(), tmp_path / "s")
    assert (tmp_path / "s.vectors").read_bytes() == b"mine"


BAD_RANKINGS = [
    ("0\t1\t1\t5.0\n0\t2\n", "line 2: expected 'qid<TAB>pid<TAB>rank"),
    ("0\t1\t1\t5.0\n0\t2\tx\t1\n", "line 2: expected 'qid<TAB>pid<TAB>rank"),
    ("0\t1\t1\t5.0\n\n9\t2\t1\t1\n", "line 3: query '9' is not among the queries"),
    ("0\t1\t1\t5.0\n0\t500\t2\t1\n", "line 2: passage '500' is not in the collection"),
    ("0\t1\t1\t5.0\n0\t1\t2\t1\n", "line 2: passage '1' of query '0' appears twice"),
    ("0\t1\t2\t5.0\n0\t2\t2\t1\n", "line 2: rank 2 of query '0' after rank 2"),
    ("0\t1\t1\t5\n1\t2\t1\t1\n0\t3\t2\t1\n", "line 3: query '0' again, after another one"),
    ("\n", "the file is empty"),
]


@pytest.mark.parametrize(("text", "message"), BAD_RANKINGS)
def test_bad_rankings(collection, tmp_path, text, message):
    (tmp_path / "r.tsv").write_text(text)
    teacher = FakeTeacher()
    with pytest.raises(ValueError, match=message):
        score_ranking(tmp_path / "r.tsv", QUERIES, collection, teacher, tmp_path / "s")
    assert not teacher.pairs and names(tmp_path) == ["r.tsv"]


def test_bad_scores_name_the_pair(ranking, collection, tmp_path):
    pid = ranking.read_text().splitlines()[12].split("\t")[1]
    with pytest.raises(ValueError, match=f"gave query '1' and passage '{pid}' the score nan"):
        score_ranking(ranking, QUERIES, collection, FakeTeacher(bad=12), tmp_path / "s")
    teacher = FakeTeacher()
    teacher.score = lambda queries, documents, progress: np.zeros(3)
    with pytest.raises(ValueError, match=r"scores of shape \(3,\) for 72 pairs"):
        score_ranking(ranking, QUERIES, collection, teacher, tmp_path / "s")


# --- Examples -------------------------------------------------------------------------------

MANY = [
    [qid, *([f"p{n}", round(20 - n * 0.5, 3)] for n in range(30))] for qid in ("a", 7, "b", "c")
] + [["few", ["p1", 2.0], ["p2", 1]]]


@pytest.fixture
def many(tmp_path):
    file = tmp_path / "many.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in MANY))
    return file


def test_examples_have_the_best_first_and_a_sample(many, tmp_path):
    made = make_examples(many, tmp_path / "e", nway=8)
    assert (made.queries, made.left_out) == (4, 1)
    examples = rows(made.path)
    assert [row[0] for row in examples] == ["a", 7, "b", "c"]
    given = dict(map(tuple, MANY[0][1:]))
    for _, *pairs in examples:
        assert len(pairs) == 8 and pairs[0] == ["p0", 20.0]
        assert len({pid for pid, _ in pairs}) == 8
        assert all(given[pid] == score for pid, score in pairs)
    assert len({json.dumps(row[1:]) for row in examples}) == 4  # each query its own sample


def test_samples_depend_on_seed_and_ids_only(many, tmp_path):
    whole = rows(make_examples(many, tmp_path / "e", nway=8, seed=1).path)
    part = tmp_path / "part.jsonl"
    part.write_text("".join(json.dumps(MANY[n]) + "\n" for n in (3, 1)))
    assert rows(make_examples(part, tmp_path / "f", nway=8, seed=1).path) == [whole[3], whole[1]]
    assert rows(make_examples(many, tmp_path / "g", nway=8, seed=2).path) != whole
    # Every passage has the same chance: over 400 seeds each of 29 is drawn about 97 times.
    counts = np.zeros(30)
    for seed in range(400):
        line = stages._example(json.dumps(MANY[0]), 8, None, seed, None)
        for pid, _ in json.loads(line)[2:]:
            counts[int(pid[1:])] += 1
    assert counts[0] == 0 and counts[1:].min() > 60 and counts[1:].max() < 135


def test_labels_come_first_and_are_no_negatives(many, tmp_path):
    positives = {"a": {"p29", "p4", "p9"}, "7": {"p20"}, "b": set()}
    made = make_examples(many, tmp_path / "e", nway=20, positives=positives, depth=28)
    by_query = {row[0]: [pid for pid, _ in row[1:]] for row in rows(made.path)}
    assert [pids[0] for pids in by_query.values()] == ["p4", "p20", "p0", "p0"]
    assert not {"p29", "p9"} & set(by_query["a"])
    drawn = {pid for pids in by_query.values() for pid in pids}
    assert "p28" not in drawn and "p29" not in drawn  # beyond the depth
    made = make_examples(many, tmp_path / "f", nway=28, positives=positives)
    assert (made.queries, made.left_out) == (4, 1)
    made = make_examples(many, tmp_path / "g", nway=29, positives=positives)
    assert (made.queries, made.left_out) == (3, 2)  # two labels of "a" are no negatives


@pytest.mark.parametrize("after", [1, 3, 4])
def test_killed_examples_go_on(many, tmp_path, monkeypatch, after):
    whole = make_examples(many, tmp_path / "whole", nway=8, batch=1)
    made, example = [], stages._example

    def dying(*arguments):
        if len(made) == after:
            raise RuntimeError("killed")
        made.append(arguments)
        return example(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(stages, "_example", dying)
        with pytest.raises(RuntimeError, match="killed"):
            make_examples(many, tmp_path / "cut", nway=8, batch=1)
    again = make_examples(many, tmp_path / "cut", nway=8, batch=1)
    assert again[1:] == whole[1:] and again.path.read_bytes() == whole.path.read_bytes()
    assert make_examples(many, tmp_path / "cut", nway=8) == again
    with pytest.raises(FileExistsError, match="nway: 8, not 9"):
        make_examples(many, tmp_path / "cut", nway=9)
    assert make_examples(many, tmp_path / "cut", nway=9, overwrite=True).queries == 4


BAD_SCORES = [
    ('["a", ["p", 1.0], ["q"]]', r"expected pairs of a passage's id and a score, got \['q'\]"),
    ('["a", ["p", 1.0], ["q", NaN]]', "the score of passage 'q' must be a finite number, got nan"),
    ('["a", ["p", 1.0], ["q", "2"]]', "the score of passage 'q' must be a finite number, got '2'"),
    ('["a", ["p", 1.0], ["p", 2.0]]', "passage 'p' appears twice"),
    ('["a"]', r"expected '\[qid, \[pid, score\], ...\]'"),
    ("[1, ", "not valid JSON"),
]


@pytest.mark.parametrize(("line", "message"), BAD_SCORES)
def test_bad_scored_lines(tmp_path, line, message):
    file = tmp_path / "s"
    file.write_text('["ok", ["p", 1.0], ["q", 0.5]]\n' + line + "\n")
    with pytest.raises(ValueError, match=f"s, line 2: {message}"):
        make_examples(file, tmp_path / "e", nway=2)
    assert names(tmp_path) == ["s"]


def test_examples_check_their_input(many, tmp_path):
    with pytest.raises(ValueError, match="line 1: query 'a': none of its labelled passages"):
        make_examples(many, tmp_path / "e", nway=8, positives={"a": {"p99"}})
    with pytest.raises(ValueError, match="no query has 31 passages"):
        make_examples(many, tmp_path / "e", nway=31)
    with pytest.raises(ValueError, match="nway must be >= 2"):
        make_examples(many, tmp_path / "e", nway=1)
    with pytest.raises(ValueError, match="depth must be at least nway, 8, got 7"):
        make_examples(many, tmp_path / "e", nway=8, depth=7)
    assert names(tmp_path) == ["many.jsonl"]


# --- All of it ------------------------------------------------------------------------------


def test_mine_does_what_is_left_to_do(model, collection, tmp_path, monkeypatch):
    queries = tmp_path / "queries.tsv"
    queries.write_text("".join(f"{qid}\t{text}\n" for qid, text in QUERIES.items()))
    settings = dict(nway=4, k=9, positives={"0": {"3"}}, seed=2)

    def run(folder, teacher, **changes):
        return mine(model, collection, queries, folder, teacher, **(settings | changes))

    built, build = [], Index.build
    monkeypatch.setattr(Index, "build", lambda *a, **b: (built.append(a), build(*a, **b))[1])
    folder = tmp_path / "round1"
    with pytest.raises(RuntimeError, match="killed"):
        run(folder, FakeTeacher(0))
    assert (folder / "ranking.tsv").exists() and len(built) == 1
    made = run(folder, FakeTeacher())
    assert len(built) == 1 and made.queries == 8
    assert {"index", "ranking.tsv", "scores.jsonl", "examples.jsonl"} <= {*names(folder)}
    examples = rows(made.path)
    assert examples[0][1][0] == 3 and all(len(row) == 5 for row in examples)
    assert run(folder, FakeTeacher(0)) == made  # all there: nothing to score
    with pytest.raises(FileExistsError, match=r"scores.jsonl: was made .*positives"):
        run(folder, FakeTeacher(), positives=None)
    with pytest.raises(FileExistsError, match=r"index: was made .*nbits: null, not 4"):
        run(folder, FakeTeacher(), nbits=4)
    with pytest.raises(ValueError, match="passage 'x', labelled for query '0', is not in the"):
        run(tmp_path / "other", FakeTeacher(), positives={"0": ["x"]})
    assert not (tmp_path / "other").exists()
    with pytest.raises(ValueError, match="k must be at least nway, 4, got 3"):
        run(folder, FakeTeacher(), k=3)
    again = run(folder, FakeTeacher(), positives=None, overwrite=True)
    assert len(built) == 2 and rows(again.path)[1:] == examples[1:]
    assert Index.open(folder / "index").texts is None


def test_an_index_of_another_collection_is_refused(model, tmp_path, monkeypatch):
    """It keeps no texts: what it was made of lies beside it, from before the build on."""
    file, folder = tmp_path / "c.tsv", tmp_path / "r"
    passages = support.passages(40)

    def opened(**changes):
        passages_ = stages.Texts.passages(file)
        return stages._retriever(
            model,
            passages_,
            folder,
            **(dict(nbits=None, overwrite=False, progress=False) | changes),
        )

    def write(texts):
        file.write_text("".join(f"{i}\t{text}\n" for i, text in enumerate(texts)))

    write(passages)
    build = opened().index.metadata.build
    assert opened().index.metadata.build == build
    # One letter in the middle, and the same size.
    write([*passages[:20], passages[20][:-1] + "!", *passages[21:]])
    with pytest.raises(FileExistsError, match=r"index: was made with other settings \(collection:"):
        opened()
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(stages.Retriever, "build", interrupted)
        opened(overwrite=True)
    with pytest.raises(FileExistsError, match="the index that was to be replaced is still there"):
        opened()
    assert opened(overwrite=True).index.metadata.build != build
    opened()
    (folder / "index.meta").unlink()
    with pytest.raises(FileExistsError, match=r"index: index\.meta is missing, so nobody knows"):
        opened()
    (folder / "index" / "metadata.json").write_text("{")
    with pytest.raises(ValueError, match=r"metadata\.json: damaged"):
        opened()
    opened(overwrite=True)


def interrupted(*_, **__):
    raise KeyboardInterrupt


def test_other_processes_wait_for_the_first(many, tmp_path, monkeypatch):
    class Second:
        is_first = False

        def exchange(self, what, value):
            assert value is None
            return [["/elsewhere/e", 4, 1], None]

    monkeypatch.setattr(stages.processes, "group", lambda what: contextlib.nullcontext(Second()))
    made = make_examples(many, tmp_path / "e", nway=8)
    assert (str(made.path), made.queries, made.left_out) == ("/elsewhere/e", 4, 1)
    assert names(tmp_path) == ["many.jsonl"]
