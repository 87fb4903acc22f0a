"""The commands, run in this process as a person would type them."""

import errno
import json
import logging
import os
import shutil
import subprocess
import sys
import warnings
import zipfile

import pytest
import support
from safetensors import SafetensorError

from colbert_jax import ColBERT, Index, Retriever
from colbert_jax.checkpoints import read_checkpoint
from colbert_jax.cli import main
from colbert_jax.index.index import UnknownIdError
from colbert_jax.progress import LOGGER
from colbert_jax.retriever import rank_documents


@pytest.fixture(scope="module")
def files(tmp_path_factory, texts):
    folder = tmp_path_factory.mktemp("files")
    rows = [f"d{n}\t{text}\n" for n, text in enumerate(texts)]
    (folder / "passages.tsv").write_text("".join(rows))
    queries = [f"q{n}\t{texts[n]}\n" for n in range(12)]
    (folder / "queries.tsv").write_text("".join(queries))
    (folder / "qrels.tsv").write_text("".join(f"q{n}\t0\td{n}\t1\n" for n in range(12)))
    return folder


@pytest.fixture(scope="module")
def built(files, stanford_folder):
    path = files / "p.index"
    arguments = ["index", str(files / "passages.tsv"), str(path), "--checkpoint"]
    assert main([*arguments, str(stanford_folder), "--nbits", "4"]) == 0
    return path


def run(capsys, *arguments) -> str:
    assert main([str(a) for a in arguments]) == 0
    return capsys.readouterr().out


def fails(capsys, *arguments) -> str:
    assert main([str(a) for a in arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and "Traceback" not in captured.err
    return captured.err


def test_index_and_info(capsys, built):
    index = Index.open(built)
    assert len(index) == 120 and index.nbits == 4 and index.ids[5] == "d5"
    out = run(capsys, "info", built, "--verify")
    assert "documents    120 (0 without a token)" in out and "at 4 bits" in out
    assert "all files are whole" in out
    assert json.loads(run(capsys, "info", built, "--json"))["num_documents"] == 120


def test_search(capsys, built, texts):
    out = run(capsys, "search", built, texts[3], texts[4], "-k", "2")
    lines = out.splitlines()
    assert len(lines) == 6 and lines[0] == texts[3] and lines[3] == texts[4]
    assert lines[1].split()[0] == "1" and "d3" in lines[1]


def test_learned_candidates(capsys, built, files, stanford_folder, texts):
    path = files / "learned.index"
    command = ["index", files / "passages.tsv", path, "--checkpoint", stanford_folder]
    run(capsys, *command, "--learned-dim", 32)
    assert "learned      vectors of 32 bytes" in run(capsys, "info", path)
    search = ["search", path, texts[3], "-k", 2, "--candidates", "learned"]
    assert "d3" in run(capsys, *search, "--ndocs", 120).splitlines()[1]
    assert "learned_dim=512" in fails(capsys, "search", built, *search[2:])


def test_search_file_to_run(capsys, built, files):
    """In TREC's six columns, and in Stanford's four."""
    output = files / "run.txt"
    command = ["search", built, "--queries", files / "queries.tsv", "--output", output, "-k", 7]
    assert "12 queries, 84 results" in run(capsys, *command)
    rows = [line.split(" ") for line in output.read_text().splitlines()]
    assert len(rows) == 12 * 7
    assert {(row[0], row[1], row[5]) for row in rows[:7]} == {("q0", "Q0", "colbert_jax")}
    assert [row[3] for row in rows[:7]] == [str(n) for n in range(1, 8)]
    scores = [float(row[4]) for row in rows[:7]]
    assert scores == sorted(set(scores), reverse=True)
    run(capsys, *command, "--format", "stanford")
    tabbed = [line.split("\t") for line in output.read_text().splitlines()]
    assert tabbed == [[row[0], *row[2:5]] for row in rows]


def test_ids_for_a_run_file_are_checked_before_the_search(capsys, files, model, tmp_path):
    """Before the model is loaded: its checkpoint is named wrongly here."""
    path = Retriever.build(tmp_path / "i", model, [("a b", "heat"), ("c", "flow")]).index.path
    queries = tmp_path / "q.tsv"
    queries.write_text("q 1\theat\n")
    command = ["search", path, "--queries", queries, "--output", tmp_path / "run"]
    wrong = ["--checkpoint", tmp_path]
    assert "query id 'q 1' has white space" in fails(capsys, *command, *wrong)
    queries.write_text("q1\theat\n")
    assert "document id 'a b' has white space" in fails(capsys, *command, *wrong)
    run(capsys, *command, "--format", "stanford")
    assert "q1\ta b\t" in (tmp_path / "run").read_text()


def test_output_goes_where_it_is_named(capsys, built, files, tmp_path):
    """Through a link and into a pipe; what can't be written is named before the model is loaded."""
    command = ["search", built, "--queries", files / "queries.tsv", "-k", 1, "--output"]
    message = fails(capsys, *command, tmp_path / "no" / "run", "--checkpoint", tmp_path)
    assert "there is no folder" in message
    assert "is a folder" in fails(capsys, *command, tmp_path, "--checkpoint", tmp_path)
    (tmp_path / "link").symlink_to("target")
    run(capsys, *command, tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    os.mkfifo(tmp_path / "pipe")
    reader = subprocess.Popen(["cat", str(tmp_path / "pipe")], stdout=subprocess.PIPE, text=True)
    assert run(capsys, *command, tmp_path / "pipe") == ""  # it may be our own output
    assert reader.communicate()[0] == (tmp_path / "target").read_text()
    assert {file.name for file in tmp_path.iterdir()} == {"link", "target", "pipe"}


def test_evaluate(capsys, built, files, texts):
    judged = ["--queries", files / "queries.tsv", "--qrels", files / "qrels.tsv"]
    values = json.loads(run(capsys, "evaluate", built, *judged, "--json", "--mode", "exact"))
    assert values["queries"] == 12 and values["mode"] == "exact"
    index = Index.open(built)
    queries = Retriever.open(index).model.encode_queries(texts[:12])
    ids = index.search(queries, k=100, mode="exact").positions
    place = [row.tolist().index(n) if n in row else 999 for n, row in enumerate(ids)]
    assert values["Success@5"] == pytest.approx(sum(p < 5 for p in place) / 12)
    assert values["Recall@100"] == pytest.approx(sum(p < 100 for p in place) / 12)
    assert values["MRR@10"] == pytest.approx(sum(1 / (p + 1) for p in place if p < 10) / 12)
    short = files / "some.tsv"
    short.write_text("".join(files.joinpath("queries.tsv").read_text().splitlines(True)[:3]))
    main(["evaluate", str(built), "--queries", str(short), "--qrels", str(judged[-1]), "--json"])
    captured = capsys.readouterr()
    assert json.loads(captured.out)["queries"] == 3
    assert "9 queries judged but not given: left out" in captured.err
    out = run(capsys, "evaluate", built, *judged)
    assert "mode: accurate" in out
    assert all(f"\n{m} " in out for m in ("nDCG@10", "MRR@10", "Recall@100"))


def test_evaluate_says_which_judged_documents_are_not_there(capsys, built, files, tmp_path):
    """Before the model is loaded: its checkpoint is named wrongly here."""
    qrels = tmp_path / "qrels"
    judged = ["--queries", files / "queries.tsv", "--qrels", qrels]
    qrels.write_text("q0 0 MED-1 1\nq1 0 MED-2 1\n")
    message = fails(capsys, "evaluate", built, *judged, "--checkpoint", tmp_path)
    assert "2 of 2 judged documents are not in the index" in message
    assert "'MED-1'" in message and "'d0'" in message
    qrels.write_text("q0 0 d0 1\nq1 0 MED-2 1\n")
    assert main(["evaluate", str(built), *map(str, judged)]) == 0
    assert "1 of 2 judged documents are not in the index" in capsys.readouterr().err
    qrels.write_text("q0 0 d0 1\nq0 0 d0 0\n")
    assert "qrels, line 2: document 'd0' of query 'q0'" in fails(capsys, "evaluate", built, *judged)


def test_evaluate_without_the_queries_own_passages(capsys, built, texts, tmp_path):
    queries, qrels = tmp_path / "queries.tsv", tmp_path / "qrels"
    queries.write_text("".join(f"d{n}\t{texts[n]}\n" for n in range(4)))
    qrels.write_text("".join(f"d{n} 0 d{n} 1\nd{n} 0 d{n + 1} 1\n" for n in range(4)))
    command = ["evaluate", str(built), "--queries", str(queries), "--qrels", str(qrels), "--json"]
    assert main([*command, "--mode", "exact"]) == 0
    captured = capsys.readouterr()
    with_self = json.loads(captured.out)
    assert "4 of 4 queries find the document of their own id first" in captured.err
    assert main([*command, "--mode", "exact", "--ignore-self"]) == 0
    captured = capsys.readouterr()
    assert "own id" not in captured.err
    assert json.loads(captured.out)["MRR@10"] < with_self["MRR@10"] == 1


def test_changes(capsys, built, tmp_path):
    index = shutil.copytree(built, tmp_path / "i")
    more = tmp_path / "more.jsonl"
    more.write_text(
        '{"id": "x", "text": "heat flow", "year": 2001}\n{"id": "y", "text": "a bird"}\n'
    )
    before = len(Index.open(index))
    assert f"documents    {before + 2} (" in run(capsys, "add", index, more)
    assert "already has the document ids 'x', 'y'" in fails(capsys, "add", index, more)
    assert f"documents    {before + 2} (" in run(capsys, "upsert", index, more)
    assert "deleted      4, still in their place" in run(capsys, "update", index, more)
    found = run(capsys, "search", index, "heat flow", "--where", '{"year": {"gte": 2000}}')
    assert [line.split()[2] for line in found.splitlines()[1:]] == ["x"]
    assert "there are year (number)" in fails(
        capsys, "search", index, "heat", "--where", '{"yaer": 1}'
    )
    assert "not valid JSON" in fails(capsys, "search", index, "heat", "--where", "{year: 1}")
    assert "field        year: number" in run(capsys, "info", index, "--verify")
    assert "has no document id 'z'" in fails(capsys, "delete", index, "x", "z")
    (tmp_path / "ids.txt").write_text("x\n\ny\n")
    assert run(capsys, "delete", index, "--ids", tmp_path / "ids.txt").startswith("2 documents del")
    assert "give ids on the command line or --ids" in fails(capsys, "delete", index)
    assert f"documents    {before} (" in run(capsys, "compact", index)
    assert f"documents    {before} (" in run(capsys, "compact", index, "--retrain")
    assert "format       1" in run(capsys, "info", index)


def test_rank(capsys, files, stanford_folder, texts):
    out = run(
        capsys, "rank", "--checkpoint", stanford_folder, texts[9], files / "passages.tsv", "-k", 3
    )
    assert len(out.splitlines()) == 3 and "d9" in out.splitlines()[0]


def test_settings_of_a_checkpoint(capsys, built, files, tmp_path, stanford_folder):
    """Features cut off, token embeddings pooled; refused where an index has its own."""
    passages, load = files / "passages.tsv", ["--checkpoint", stanford_folder]
    settings = ["--truncate-dim", 8, "--pool-factor", 2]
    run(capsys, "index", passages, tmp_path / "i", *load, *settings)
    index = Index.open(tmp_path / "i")
    assert index.dim == 8 and index.metadata.num_tokens < Index.open(built).metadata.num_tokens
    known = index.metadata.model["load"]
    assert (known["truncate_dim"], known["pool_factor"]) == (8, 2)
    assert len(run(capsys, "search", tmp_path / "i", "a", "-k", 2).splitlines()) == 3
    texts = [line.split("\t")[1] for line in passages.read_text().splitlines()]
    ours = run(capsys, "rank", *load, *settings, texts[9], passages, "-k", 1)
    model = ColBERT.from_pretrained(stanford_folder, truncate_dim=8, pool_factor=2)
    (hit,) = rank_documents(model, texts[9], texts, 1)
    assert ours.split()[1] == f"{hit.score:.4f}"
    run(capsys, "convert", stanford_folder, tmp_path / "out", "--to", "native", *settings)
    assert read_checkpoint(tmp_path / "out").encoder.dim == 8
    (tmp_path / "run").write_text("q1 Q0 d1 1 9.5 x\n")
    queries, qrels = files / "queries.tsv", files / "qrels.tsv"
    for command in (
        ["rerank", tmp_path / "run", "--index", built, "--output", tmp_path / "o"],
        ["evaluate", built, "--qrels", qrels],
    ):
        said = fails(capsys, *command, "--queries", queries, "--pool-factor", 2)
        assert "--pool-factor is for a checkpoint to load, not for an index" in said
    said = fails(capsys, "rank", *load, "--truncate-dim", 99, "a", passages)
    assert "truncate_dim must be between 1" in said


def test_weights_of_other_models(capsys, files, stanford_folder):
    arguments = ["rank", "a", str(files / "passages.tsv"), "--checkpoint", str(stanford_folder)]
    assert "the three heads of bge-m3" in fails(capsys, *arguments, "--weights", "1,0.3,1")
    assert "three numbers of at least 0" in fails(capsys, *arguments, "--weights", "1,1")
    with pytest.raises(SystemExit):
        main([*arguments, "--weights", "1,a,1"])
    assert "--weights: invalid list of numbers value: '1,a,1'" in capsys.readouterr().err


def test_errors(capsys, built, files, tmp_path, stanford_folder):
    checkpoint = ["--checkpoint", stanford_folder]
    passages, queries = files / "passages.tsv", files / "queries.tsv"
    assert "pass --overwrite" in fails(capsys, "index", passages, built, *checkpoint)
    assert "No such file" in fails(
        capsys, "index", tmp_path / "no.tsv", tmp_path / "i", *checkpoint
    )
    assert "nbits must be" in fails(
        capsys, "index", passages, tmp_path / "i", *checkpoint, "--nbits", 3
    )
    assert "no index there" in fails(capsys, "search", tmp_path / "i", "query")
    assert "one of the two" in fails(capsys, "search", built)
    assert "one of the two" in fails(capsys, "search", built, "a", "--queries", queries)
    (tmp_path / "qrels.tsv").write_text("other\t0\td1\t1\n")
    message = fails(
        capsys, "evaluate", built, "--queries", queries, "--qrels", tmp_path / "qrels.tsv"
    )
    assert "no query of" in message
    (tmp_path / "twice.tsv").write_text("a\tx\na\ty\n")
    message = fails(capsys, "index", tmp_path / "twice.tsv", tmp_path / "i", *checkpoint)
    assert "duplicate document id 'a': documents 1 and 2" in message
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9\n")
    message = fails(capsys, "index", tmp_path / "latin.txt", tmp_path / "i", *checkpoint)
    assert "line 1: not UTF-8" in message
    assert not (tmp_path / "i").exists() and not (tmp_path / "i.building").exists()


def test_wrong_checkpoint_for_the_index(capsys, built, tmp_path):
    other = support.write_stanford(tmp_path / "other", seed=5)
    message = fails(capsys, "search", built, "heat", "--checkpoint", other)
    assert "not the checkpoint, or" in message


def test_blank_queries_are_refused(capsys, built, files, stanford_folder):
    assert "query 1 is empty or blank" in fails(capsys, "search", built, "heat", "")
    checkpoint = ["--checkpoint", stanford_folder]
    assert "query 0 is empty or blank" in fails(
        capsys, "rank", " ", files / "passages.tsv", *checkpoint
    )


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        (["index", "c.tsv", "i", "--checkpoint", "m"], "interrupted; run again, the build goes on"),
        (["search", "i", "query"], "interrupted\n"),
    ],
)
def test_interruption_says_what_is_kept(capsys, monkeypatch, command, expected):
    def interrupt(*arguments, **settings):
        raise KeyboardInterrupt

    monkeypatch.setattr(Retriever, "build", interrupt)
    monkeypatch.setattr(Retriever, "open", interrupt)
    assert main(command) == 130
    assert expected in capsys.readouterr().err


def test_traceback_on_request(built):
    with pytest.raises(ValueError, match="one of the two"):
        main(["search", str(built), "--traceback"])


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (FloatingPointError("at step 3, the loss is nan"), "error: at step 3, the loss is nan\n"),
        (OverflowError("int too large"), "error: OverflowError: int too large; if nothing"),
        (KeyError("load"), "error: KeyError: 'load'; if nothing explains it, --traceback shows"),
        (UnknownIdError("i: no document has the id 'x'"), "error: i: no document has the id 'x'\n"),
        (UnicodeDecodeError("utf-8", b"\xff", 0, 1, "bad"), "error: UnicodeDecodeError: 'utf-8'"),
        (zipfile.BadZipFile("no zip"), "error: BadZipFile: no zip; if nothing"),
        (SafetensorError("HeaderTooLarge"), "error: SafetensorError: HeaderTooLarge"),
        (MemoryError(), "error: not enough memory: ask for less at a time, or free some\n"),
        (RecursionError("too deep"), "error: nested too deeply (too deep): is a JSON file damaged"),
        (AssertionError(), "error: AssertionError: ; if nothing explains it"),
        (OSError(errno.ENOSPC, "No space left"), "No space left: the.index; make room, and run"),
        (OSError(errno.ENOSPC, "No space left", "a/file"), "No space left: 'a/file'\n"),
    ],
)
def test_every_error_is_one_message(capsys, monkeypatch, error, expected):
    def fail(*arguments, **settings):
        raise error

    monkeypatch.setattr(Index, "open", fail)
    assert expected in fails(capsys, "info", "the.index")
    with pytest.raises(type(error)):
        main(["info", "the.index", "--traceback"])


@pytest.mark.parametrize(
    ("message", "command", "expected"),
    [
        (
            "pass overwrite=True to replace it",
            "index c.tsv i --checkpoint m",
            "pass --overwrite to",
        ),
        ("no hub id; pass base=", "convert a b --to native", "no hub id; pass --base\n"),
        ("no hub id; pass base=", "search i query", "no hub id; pass base=\n"),
        ("(it was built with store_texts=False)", "search i query", "built with --no-texts)"),
        ('mode="exact" scores every', "search i query", "--mode exact scores every"),
        ("shard it, Index.open(path, mesh=...)", "search i query", "Index.open(path, mesh=...)"),
        ("/data/k=3/dim=4: exists", "search i query", "/data/k=3/dim=4: exists"),
        ("pass overwrite=True", "train colbertv1 --folder r", "pass --overwrite\n"),
    ],
)
def test_messages_name_flags(capsys, monkeypatch, message, command, expected):
    def fail(*arguments, **settings):
        raise ValueError(message)

    for place, name in ((Retriever, "build"), (Index, "open")):
        monkeypatch.setattr(place, name, fail)
    monkeypatch.setattr("colbert_jax.cli.convert_checkpoint", fail)
    monkeypatch.setattr("colbert_jax.cli.make", fail)
    assert expected in fails(capsys, *command.split())


def test_warnings_are_one_line(capsys, monkeypatch, built):
    def warn(args):
        warnings.warn("two\n  lines", stacklevel=1)

    monkeypatch.setattr(Index, "open", warn)
    monkeypatch.setattr("colbert_jax.cli._summary", lambda opened: 1 / 0)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        shown = warnings.showwarning
        message = fails(capsys, "info", built)
        assert warnings.showwarning is shown
    assert message.splitlines()[0] == "colbert-jax: warning: two lines"


@pytest.mark.parametrize(("flags", "level"), [([], logging.INFO), (["--quiet"], logging.WARNING)])
def test_log_lines_are_shown_unless_it_is_to_be_quiet(capsys, built, flags, level):
    run(capsys, "info", built, *flags)
    assert LOGGER.level == level
    run(capsys, *flags, "info", built)
    assert LOGGER.level == level


def test_what_the_terminal_can_not_show_is_escaped(built, tmp_path):
    (tmp_path / "c.tsv").write_text("d\u00e9\tcaf\u00e9\n", encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-m", "colbert_jax.cli", "search", str(built), "caf\u00e9", "-k", "1"],
        capture_output=True,
        env=os.environ | {"PYTHONIOENCODING": "ascii"},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(b"caf\\xe9\n")


def test_duplicate_ids_are_named_with_their_file(capsys, stanford_folder, tmp_path):
    file = tmp_path / "twice.tsv"
    file.write_text("a\tx\na\ty\n")
    message = fails(capsys, "index", file, tmp_path / "i", "--checkpoint", stanford_folder)
    assert f"{file}: duplicate document id 'a': documents 1 and 2" in message


def test_a_damaged_model_field_is_named(capsys, files, stanford_folder, tmp_path):
    path = tmp_path / "i"
    checkpoint = ["--checkpoint", stanford_folder]
    run(capsys, "index", files / "passages.tsv", path, *checkpoint)
    metadata = json.loads((path / "metadata.json").read_text())
    for damage in ({}, {"load": {}}, {"load": {"name_or_path": 3}}, {"load": {"x": 1}}):
        whole = metadata["model"]
        broken = metadata | {"model": {k: v for k, v in whole.items() if k != "load"} | damage}
        (path / "metadata.json").write_text(json.dumps(broken))
        for command in (["info", path], ["search", path, "heat"]):
            assert "metadata.json: field 'model' is damaged" in fails(capsys, *command)
    load = metadata["model"]["load"] | {"no_such_setting": 1}
    broken = metadata | {"model": metadata["model"] | {"load": load}}
    (path / "metadata.json").write_text(json.dumps(broken))
    assert "field 'model' is damaged" in fails(capsys, "search", path, "heat")


def test_inputs_may_be_pipes(capsys, built, files, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    source = subprocess.Popen(["cp", str(files / "queries.tsv"), str(tmp_path / "pipe")])
    out = run(capsys, "search", built, "--queries", tmp_path / "pipe", "-k", 1)
    assert source.wait() == 0 and len(out.splitlines()) == 24


def test_compiled_programs_may_have_no_place(capsys, built, monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "file" / "cache"))
    assert main(["info", str(built)]) == 0
    assert "compiled programs are not kept" in capsys.readouterr().err


@pytest.mark.slow
def test_demo(capsys, stanford_folder, tmp_path, monkeypatch):
    import colbert_jax.demo as demo

    documents = dict(list(demo.standard_library_documents().items())[:80])
    monkeypatch.setattr(demo, "standard_library_documents", lambda: documents)
    arguments = ["demo", "--folder", tmp_path, "--checkpoint", stanford_folder]
    first, second = run(capsys, *arguments), run(capsys, *arguments)
    assert "Indexing 80 docstrings" in first and "is there" in second
    for question in demo.QUESTIONS:
        assert question in first and question in second
    documents["re.sub"] = "another Python's"
    assert main(list(map(str, arguments))) == 2
    assert "an index of another collection: 80 documents, not these 81" in capsys.readouterr().err


@pytest.mark.slow
def test_the_demos_collection():
    from colbert_jax.demo import standard_library_documents

    documents = standard_library_documents()
    assert 2000 < len(documents) < 10_000
    assert documents["shutil.rmtree"].startswith("shutil.rmtree: Recursively delete")


def test_as_a_module_without_a_terminal(built, texts):
    """A process of its own: output is clean, no bar where nobody watches."""
    done = subprocess.run(
        [sys.executable, "-m", "colbert_jax.cli", "search", str(built), texts[3], "-k", "1"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 2 and "%|" not in done.stderr


def test_convert(capsys, stanford_folder, tmp_path):
    out = run(capsys, "convert", stanford_folder, tmp_path / "out", "--to", "pylate")
    assert out.splitlines() == [
        f"{stanford_folder}: stanford, bert, 16 dimensions",
        f"{tmp_path / 'out'}: pylate",
    ]
    assert (tmp_path / "out" / "1_Dense" / "model.safetensors").is_file()
    error = fails(capsys, "convert", stanford_folder, tmp_path / "out", "--to", "native")
    assert "exists and is not an empty folder" in error
    error = fails(capsys, "convert", tmp_path / "nowhere", tmp_path / "x", "--to", "native")
    assert "no such checkpoint folder" in error
    error = fails(
        capsys, "convert", stanford_folder, tmp_path / "x", "--to", "native", "--base", "b"
    )
    assert "base is for a .dnn file only" in error
