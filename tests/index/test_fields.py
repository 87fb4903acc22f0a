"""The fields of documents on disk, and filters on them."""

import concurrent.futures
import contextlib
import datetime
import errno
import os
import pickle
import random
import resource
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import textwrap
import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from colbert_jax.index import fields as fields_module
from colbert_jax.index.fields import (
    FIELDS,
    FieldStore,
    FieldsWriter,
    companions,
    copy_fields,
    delete_fields,
    verify_fields,
)
from colbert_jax.index.filters import FilterError
from colbert_jax.index.format import IndexFormatError

UTC, CET = datetime.UTC, datetime.timezone(datetime.timedelta(hours=1))
SAMPLE = [
    {"year": 2019, "lang": "en", "tags": ["x", "y"], "score": 0.5, "seen": True},
    {"year": 2020.0, "lang": "de", "tags": [], "when": datetime.date(2020, 5, 1)},
    None,
    {"year": "2021", "lang": "en", "when": datetime.datetime(2021, 1, 1, 0, 30, tzinfo=CET)},
    {"seen": 1, "tags": ["y", "y"], "lang": "é\0"},
    {},
]


def write(file, documents, first=0):
    with FieldsWriter(file, first) as writer:
        writer.extend(documents)
    return writer


@contextlib.contextmanager
def opened(file, n):
    with contextlib.closing(FieldStore(file, n)) as store:
        yield store


@pytest.fixture
def file(tmp_path):
    return tmp_path / FIELDS


@pytest.fixture
def sample(file):
    assert write(file, SAMPLE).has_fields
    with opened(file, len(SAMPLE)) as store:
        yield store


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(fields_module, "_BLOCK_BITS", 2)
    monkeypatch.setattr(fields_module, "_WRITTEN", 3)


def test_fields_come_back_as_they_were(sample):
    found = [sample.fields(i) for i in range(len(SAMPLE))]
    expected = [one or {} for one in SAMPLE]
    assert found == expected
    types = [{name: type(value) for name, value in one.items()} for one in found]
    assert types == [{name: type(value) for name, value in one.items()} for one in expected]
    assert [list(one) for one in found] == [list(one) for one in expected]
    with pytest.raises(IndexError):
        sample.fields(len(SAMPLE))


@pytest.mark.parametrize(
    ("where", "positions"),
    [
        ({}, [0, 1, 2, 3, 4, 5]),
        ({"year": 2020}, [1]),
        ({"year": {"gte": 2020}}, [1]),
        ({"year": {"gte": "2020"}}, [3]),
        ({"year": {"gt": 2018, "lt": 2020}}, [0]),
        ({"year": {"gt": 1, "lt": "x"}}, []),
        ({"year": {"in": [2019, "2021", 7]}}, [0, 3]),
        ({"year": {"in": []}}, []),
        ({"lang": "en"}, [0, 3]),
        ({"lang": {"ne": "en"}}, [1, 2, 4, 5]),
        ({"not": {"lang": "en"}}, [1, 2, 4, 5]),
        ({"lang": "é\0"}, [4]),
        ({"lang": {"lt": "e"}}, [1]),
        ({"tags": {"contains": "y"}}, [0, 4]),
        ({"tags": "y"}, []),
        ({"lang": {"contains": "en"}}, []),
        ({"tags": {"exists": True}}, [0, 1, 4]),
        ({"tags": {"exists": False}}, [2, 3, 5]),
        ({"nothing": {"exists": True}}, []),
        ({"nothing": {"exists": False}}, [0, 1, 2, 3, 4, 5]),
        ({"seen": True}, [0]),
        ({"seen": 1}, [4]),
        ({"seen": False}, []),
        ({"when": {"gte": "2020-05-01"}}, [1, 3]),
        ({"when": datetime.date(2020, 5, 1)}, [1]),
        ({"when": datetime.datetime(2020, 12, 31, 23, 30, tzinfo=UTC)}, [3]),
        ({"when": {"lt": datetime.datetime(2021, 1, 1, tzinfo=UTC)}}, [1, 3]),
        ({"or": [{"year": 2019}, {"and": [{"seen": 1}, {"tags": {"contains": "y"}}]}]}, [0, 4]),
        ({"not": {"or": [{"year": 2019}, {"lang": "de"}]}, "lang": {"exists": True}}, [3, 4]),
    ],
)
def test_filters(sample, where, positions):
    found = sample.matching(where)
    assert found.tolist() == positions and found.dtype == np.int64
    assert np.flatnonzero(sample.allowed(where)).tolist() == positions


def test_a_field_that_no_document_has(sample):
    known = r"where\['or'\]\[0\]\['yaer'\]: no document has a field 'yaer'; there are lang "
    known += r"\(string\), score \(number\), seen \(number, bool\), tags \(list\), when \(string\)"
    for operand in (1, {"ne": 1}, {"gt": 1}, {"in": [1]}, {"in": []}, {"contains": "x"}):
        with pytest.raises(FilterError, match=known):
            sample.matching({"or": [{"yaer": operand}, {"year": 2019}]})
    assert sample.names()["year"] == ["number", "string"]


def test_a_filter_knows_only_its_generation(file):
    write(file, [{"a": 1}])
    with opened(file, 1) as old:
        write(file, [{"a": "x", "new": 1}], first=1)
        assert old.names() == {"a": ["number"]} and old.matching({"a": {"exists": True}}) == [0]
        with pytest.raises(FilterError, match="no document has a field 'new'; there are a"):
            old.matching({"new": 1})
        with pytest.raises(IndexError):
            old.fields(1)


# --- Against Python ---------------------------------------------------------------------------

NAMES = ["a", "b", "and ", "é'\"; --"]
texts = st.sampled_from(["", "a", "B", "é", "2020", "2020-01-01", "\U0001f600", "\uffff", "a\0"])
numbers = st.sampled_from([0, 1, -1, 2020, 2**53, 2**53 + 1, -(2**63), 2**63 - 1])
floats = st.sampled_from([0.0, -0.0, 1.0, 0.5, 2.0**53, 2.0**63, -1e300])
dates = st.sampled_from(
    [
        datetime.date(2020, 1, 1),
        datetime.datetime(2020, 1, 1),
        datetime.datetime(2020, 1, 1, 0, 0, 0, 5),
        datetime.datetime(2020, 1, 1, 1, tzinfo=CET),
        datetime.datetime(2020, 1, 1, tzinfo=UTC),
    ]
)
scalars = st.one_of(texts, numbers, floats, st.booleans(), dates)
ordered = st.one_of(texts, numbers, floats, dates)
lists = st.lists(texts, max_size=3)
records = st.dictionaries(st.sampled_from(NAMES), st.one_of(st.none(), scalars, lists))
documents = st.lists(st.one_of(st.none(), records), max_size=14)
operators = st.one_of(
    st.fixed_dictionaries({}, optional={"gt": ordered, "gte": ordered, "lt": ordered}),
    st.fixed_dictionaries({}, optional={"lte": ordered, "ne": scalars, "eq": scalars}),
    st.fixed_dictionaries({}, optional={"in": st.lists(scalars, max_size=4)}),
    st.fixed_dictionaries({}, optional={"contains": texts, "exists": st.booleans()}),
).filter(bool)
conditions = st.dictionaries(st.sampled_from(NAMES), st.one_of(scalars, operators), max_size=2)
filters = st.recursive(
    conditions,
    lambda inner: st.one_of(
        st.fixed_dictionaries({}, optional={"and": st.lists(inner, min_size=1, max_size=3)}),
        st.fixed_dictionaries({"or": st.lists(inner, min_size=1, max_size=3)}),
        st.fixed_dictionaries({"not": inner}),
    ),
    max_leaves=6,
)


def comparable(value):
    """A scalar's kind, and what is compared."""
    if isinstance(value, bool):
        return "bool", value
    if isinstance(value, int | float):
        return "number", value
    if isinstance(value, datetime.datetime) and value.tzinfo:
        value = value.astimezone(UTC)
    return "string", value if isinstance(value, str) else value.isoformat()


def compare(value, operand, operator):
    if isinstance(value, list) or value is None:
        return False
    (kind, one), (other_kind, other) = comparable(value), comparable(operand)
    if kind != other_kind:
        return False
    return {
        "eq": one == other,
        "gt": one > other,
        "gte": one >= other,
        "lt": one < other,
        "lte": one <= other,
    }[operator]


def holds(where, document):
    return all(holds_entry(name, value, document) for name, value in where.items())


def holds_entry(name, value, document):
    if name == "and":
        return all(holds(part, document) for part in value)
    if name == "or":
        return any(holds(part, document) for part in value)
    if name == "not":
        return not holds(value, document)
    own = document.get(name)
    for operator, operand in (value if isinstance(value, dict) else {"eq": value}).items():
        if operator == "ne":
            right = not compare(own, operand, "eq")
        elif operator == "in":
            right = any(compare(own, item, "eq") for item in operand)
        elif operator == "contains":
            right = isinstance(own, list) and operand in own
        elif operator == "exists":
            right = (own is not None) == operand
        else:
            right = compare(own, operand, operator)
        if not right:
            return False
    return True


def mentioned(where):
    """The fields that must be known."""
    for name, value in where.items():
        if name in ("and", "or"):
            for part in value:
                yield from mentioned(part)
        elif name == "not":
            yield from mentioned(value)
        elif not isinstance(value, dict) or set(value) - {"exists"}:
            yield name


@pytest.mark.usefixtures("small_blocks")
@settings(max_examples=150, deadline=None)
@given(documents, filters, st.integers(0, 14), st.sampled_from([2, 500]))
def test_filters_are_what_python_says(documents, where, n, sought):
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(fields_module, "_SOUGHT", sought)
        file = Path(folder) / FIELDS
        n = min(n, len(documents))
        write(file, documents[:n])
        write(file, documents[n:], first=n)
        if not file.exists():
            assert not any(v is not None for d in documents for v in (d or {}).values())
            return
        verify_fields(file, len(documents))
        for count in {n, len(documents)}:
            with opened(file, count) as store:
                plain = [
                    {k: v for k, v in (d or {}).items() if v is not None} for d in documents[:count]
                ]
                assert [store.fields(i) for i in range(count)] == plain
                known = {name for document in plain for name in document}
                assert set(store.names()) == known
                if set(mentioned(where)) <= known:
                    expected = [i for i, d in enumerate(plain) if holds(where, d)]
                    assert store.matching(where).tolist() == expected
                else:
                    with pytest.raises(FilterError, match="no document has a field"):
                        store.matching(where)


@pytest.mark.usefixtures("small_blocks")
@settings(max_examples=50, deadline=None)
@given(documents, st.data())
def test_copies_keep_the_fields(documents, data):
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder) / FIELDS, Path(folder) / "fields-2.sqlite"
        target.write_text("left by a killed run")
        if not write(source, documents).has_fields:
            return
        kept = [i for i in range(len(documents)) if data.draw(st.booleans())]
        expected = [{k: v for k, v in (documents[i] or {}).items() if v is not None} for i in kept]
        has_fields = copy_fields(source, target, np.array(kept, np.int64)) is not None
        assert has_fields == any(expected) == target.exists()
        if has_fields:
            verify_fields(target, len(kept))
            with opened(target, len(kept)) as store:
                assert [store.fields(i) for i in range(len(kept))] == expected


def test_many_values(file):
    write(file, [{"n": n, "s": f"v{n}"} for n in range(0, 3000)])
    with opened(file, 3000) as store:
        wanted = [*range(1, 200_001, 2), *(f"v{n}" for n in range(100))]
        assert store.matching({"n": {"in": wanted}}).tolist() == list(range(1, 3000, 2))
        assert store.matching({"s": {"in": wanted}}).tolist() == list(range(100))


# --- What a field may be ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bad", "error", "message"),
    [
        ({"and": 1}, ValueError, "field 'and': 'and' is a word of the language of filters"),
        ({"": 1}, ValueError, "field '': a field's name may not be empty"),
        ({1: 1}, TypeError, "field 1: a field's name is a string"),
        ({"a\ud800": 1}, ValueError, r"field 'a.ud800': not valid Unicode"),
        ({"a": "\ud800"}, ValueError, "field 'a': not valid Unicode"),
        ({"a": float("nan")}, ValueError, "field 'a': a number must be finite, got nan"),
        ({"a": float("inf")}, ValueError, "field 'a': a number must be finite"),
        ({"a": 1 << 63}, ValueError, "field 'a': a whole number beyond 64 bits"),
        ({"a": {"b": 1}}, TypeError, "field 'a': a value must be a string, .* got dict"),
        ({"a": [1, 2]}, TypeError, "field 'a': a list must hold strings only, got 1"),
        ({"a": ["x", None]}, TypeError, "field 'a': a list must hold strings only, got None"),
        ({"a": b"x"}, TypeError, "field 'a': a value must be a string"),
        ({"a": {"x"}}, TypeError, "field 'a': a value must be"),
        ([("a", 1)], TypeError, "fields must be a dict, got list"),
    ],
)
def test_what_no_field_can_be(file, bad, error, message):
    named = rf"document 1 \(id 'd1'\): {message}"
    with pytest.raises(error, match=named), FieldsWriter(file) as writer:
        writer.extend([{"a": 1}, bad], ids=["d0", "d1"])
    assert list(file.parent.iterdir()) == []


def test_numpy_values_become_plain(file):
    pandas = pytest.importorskip("pandas")
    given = {
        "i": np.int32(3),
        "f": np.float32(0.5),
        "b": np.bool_(True),
        "s": np.str_("x"),
        "d": np.datetime64("2020-01-01T00:00:00.000000000"),
        "p": pandas.Timestamp("2020-01-01 00:00:00.123456789"),
        "t": ("x", np.str_("y")),
    }
    write(file, [given])
    with opened(file, 1) as store:
        assert store.fields(0) == {
            "i": 3,
            "f": 0.5,
            "b": True,
            "s": "x",
            "d": datetime.datetime(2020, 1, 1),
            "p": datetime.datetime(2020, 1, 1, 0, 0, 0, 123456),
            "t": ["x", "y"],
        }
        assert store.matching({"i": np.int64(3), "b": np.bool_(True)}) == [0]
    with pytest.raises(ValueError, match="field 'a': not a date"):
        write(file, [{"a": pandas.NaT}], first=1)


# --- Writers ----------------------------------------------------------------------------------


def test_documents_without_fields_make_no_file(file):
    writer = write(file, [None, {}, {"a": None}])
    assert writer.num_documents == 3 and not writer.has_fields and writer.fingerprint is None
    assert list(file.parent.iterdir()) == []


def test_a_log_without_its_file_is_not_read(file):
    companions(file)[0].write_bytes(b"left" * 1000)
    write(file, [{"a": 1}])
    assert list(file.parent.iterdir()) == [file]
    verify_fields(file, 1)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("first", [0, 3, 4, 7])
def test_the_next_writer_removes_what_a_killed_one_left(file, first):
    write(file, [{"a": n} for n in range(10)])  # published up to `first` only
    write(file, [], first)
    write(file, [{"a": "new"}], first)
    verify_fields(file, first + 1)
    with opened(file, first + 1) as store:
        assert [store.fields(n)["a"] for n in range(first + 1)] == [*range(first), "new"]
        assert store.matching({"a": {"gte": 0}}).tolist() == list(range(first))
    connection = sqlite3.connect(file)
    assert connection.execute("SELECT count(*) FROM search").fetchone() == (first + 1,)
    connection.close()


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("is_new", [True, False])
@pytest.mark.parametrize("statements", range(12))
def test_an_error_in_the_middle_leaves_nothing(file, is_new, statements, monkeypatch):
    first = 0 if is_new else 5
    if not is_new:
        write(file, [{"a": n} for n in range(7)])
    names = {path.name for path in file.parent.iterdir()}
    connect, left = sqlite3.connect, statements

    class Connection(sqlite3.Connection):
        def step(self):
            nonlocal left
            left -= 1
            if left == 0:
                raise KeyboardInterrupt

        def execute(self, *args):
            self.step()
            return super().execute(*args)

        def executemany(self, *args):
            self.step()
            return super().executemany(*args)

    with monkeypatch.context() as patch:
        patch.setattr(sqlite3, "connect", lambda *a, **kw: connect(*a, factory=Connection, **kw))
        with contextlib.suppress(KeyboardInterrupt):
            write(file, [{"a": "x"}] * 8, first)
    if left > 0:
        return
    assert {path.name for path in file.parent.iterdir()} >= names
    write(file, [{"a": "y"}], first)
    verify_fields(file, first + 1)
    with opened(file, first + 1) as store:
        assert [store.fields(n)["a"] for n in range(first + 1)] == [*range(first), "y"]


def run_python(code, *arguments, **kwargs):
    command = [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, **kwargs)


def test_a_killed_writer(file):
    write(file, [{"a": n} for n in range(5)])
    code = """
        import os, signal, sys
        from pathlib import Path
        from colbert_jax.index.fields import FieldsWriter

        with FieldsWriter(Path(sys.argv[1]), 5) as writer:
            writer._connection.execute("PRAGMA cache_size = 1")
            writer.extend({"a": "x" * 1000, "b": n} for n in range(5000))
            os.kill(os.getpid(), signal.SIGKILL)
        """
    assert run_python(code, file).returncode == -9
    assert companions(file)[0].stat().st_size > 0
    for _ in range(2):
        with opened(file, 5) as store:
            assert store.matching({"a": {"gte": 0}}).tolist() == [0, 1, 2, 3, 4]
            assert store.names() == {"a": ["number"]}
        write(file, [], 5)
    verify_fields(file, 5)


def test_fingerprints(file, tmp_path):
    def fingerprint(documents):
        delete_fields(file)
        return write(file, documents).fingerprint

    one = fingerprint([{"a": 1}, None])
    assert one == fingerprint([{"a": 1, "b": None}])
    others = [[None, {"a": 1}], [{"a": 1.0}], [{"a": True}], [{"a": "1"}], [{"b": 1}]]
    assert len({one, *map(fingerprint, others)}) == 6


# --- Readers beside writers -------------------------------------------------------------------


def test_readers_keep_their_generation(file):
    """Threads and another process look for the same while a writer adds, 60 times."""
    write(file, [{"n": n, "even": n % 2 == 0} for n in range(50)])
    code = """
        import sys
        from pathlib import Path
        from colbert_jax.index.fields import FieldStore

        store, rounds = FieldStore(Path(sys.argv[1]), 50), 0
        print("open", flush=True)
        import select
        while not select.select([sys.stdin], [], [], 0)[0]:
            assert store.matching({"even": True}).tolist() == list(range(0, 50, 2))
            assert store.fields(49) == {"n": 49, "even": False}
            rounds += 1
        print(rounds)
        """
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code), str(file)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "open\n"
    done = threading.Event()
    with opened(file, 50) as store, concurrent.futures.ThreadPoolExecutor(4) as pool:

        def read():
            while not done.is_set():
                assert len(store.matching({"n": {"gte": 0}})) == 50
                assert store.fields(7) == {"n": 7, "even": False}
                assert store.names() == {"even": ["bool"], "n": ["number"]}

        readers = [pool.submit(read) for _ in range(4)]
        for n in range(50, 110):
            write(file, [{"n": n, "even": n % 2 == 0, "new": "x"}], first=n)
            with opened(file, n + 1) as fresh:
                assert len(fresh.matching({"n": {"gte": 0}})) == n + 1
        done.set()
        for reader in readers:
            reader.result()
    rounds, _ = process.communicate("\n")
    assert process.returncode == 0 and int(rounds) > 0
    verify_fields(file, 110)


def test_the_log_is_empty_after_a_writer(file):
    write(file, [{"a": 1}])
    with opened(file, 1) as store:
        store.matching({"a": 1})
        write(file, [{"a": 2}], first=1)
        assert companions(file)[0].stat().st_size == 0
        alone = file.with_name("copied.sqlite")
        shutil.copyfile(file, alone)
    with opened(alone, 2) as store:
        assert store.matching({"a": {"gt": 0}}).tolist() == [0, 1]


def test_a_deleted_file_is_still_read(file):
    write(file, [{"a": n, "s": "x" * 500} for n in range(5000)])
    with opened(file, 5000) as store:
        delete_fields(file)
        write(file, [{"a": "other"}])
        assert len(store.matching({"a": {"gte": 2500}})) == 2500
        assert store.fields(4999)["a"] == 4999


@pytest.mark.filterwarnings("ignore:.*fork.*")
def test_after_a_fork(sample):
    expected = sample.matching({"lang": "en"}).tolist()
    read, written = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.write(written, pickle.dumps(sample.matching({"lang": "en"}).tolist()))
        finally:
            os._exit(0)
    os.close(written)
    with os.fdopen(read, "rb") as stream:
        assert pickle.load(stream) == expected
    os.waitpid(pid, 0)
    assert sample.matching({"lang": "en"}).tolist() == expected


def test_a_file_that_is_gone_after_a_fork_is_named(file, monkeypatch):
    """Twice: the parent's connection is never used."""
    write(file, [{"a": 1}])
    with opened(file, 1) as store:
        delete_fields(file)
        assert store.fields(0) == {"a": 1}
        monkeypatch.setattr(store, "_pid", -1)
        for _ in range(2):
            with pytest.raises(FileNotFoundError, match="gone since this process was forked"):
                store.fields(0)
        write(file, [{"a": 1}])
        assert store.fields(0) == {"a": 1}


@contextlib.contextmanager
def unwritable(folder):
    """Take the right to write in a folder away, from root too."""
    folder.chmod(0o555)
    is_root = os.geteuid() == 0
    if is_root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if is_root:
            os.seteuid(0)
        folder.chmod(0o755)


@pytest.fixture
def anywhere():
    """A folder that everybody may enter."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        yield folder


@pytest.mark.parametrize("left", [False, True])
def test_a_folder_that_may_not_be_written(anywhere, left):
    """With and without the empty log that a reader with more rights has left."""
    file = anywhere / FIELDS
    write(file, SAMPLE)
    if left:
        with opened(file, 1):
            pass
    with unwritable(anywhere):
        assert not os.access(anywhere, os.W_OK, effective_ids=True)
        store = FieldStore(file, len(SAMPLE))
        assert store.matching({"lang": "en"}).tolist() == [0, 3]
        with pytest.raises(PermissionError) as caught:
            write(file, [{"a": 1}], len(SAMPLE))
        assert caught.value.filename == str(file)
    # Somebody who may, writes: the reader without locks notices.
    code = """
        import sys
        from pathlib import Path
        from colbert_jax.index.fields import FieldsWriter

        for first in map(int, sys.stdin):
            with FieldsWriter(Path(sys.argv[1]), first) as writer:
                writer.extend([{"lang": "en", "new": "x" * 3000}] * 5)
            print(first, flush=True)
        """
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code), str(file)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    for first in range(len(SAMPLE), 70, 5):
        process.stdin.write(f"{first}\n")
        process.stdin.flush()
        assert process.stdout.readline() == f"{first}\n"
        with unwritable(anywhere):
            assert store.matching({"lang": "en"}).tolist() == [0, 3]
            assert store.fields(0) == SAMPLE[0]
    process.communicate()
    store.close()
    verify_fields(file, 71)


def test_a_folder_that_may_not_be_written_with_a_log_that_counts(anywhere):
    file = anywhere / FIELDS
    write(file, SAMPLE)
    companions(file)[0].write_bytes(b"x" * 5000)
    with unwritable(anywhere), pytest.raises(PermissionError, match="a writer was killed"):
        FieldStore(file, 1)


# --- Damage -----------------------------------------------------------------------------------


def test_what_is_no_file_of_fields(file):
    with pytest.raises(FileNotFoundError) as caught:
        FieldStore(file, 1)
    assert caught.value.filename == str(file)
    for content in (b"", b"x" * 5000, b"SQLite format 3\0" + b"x" * 5000):
        file.write_bytes(content)
        with pytest.raises(IndexFormatError, match=f"{file}: damaged"):
            FieldStore(file, 1)
    file.unlink()
    os.mkfifo(file)
    with pytest.raises(IndexFormatError, match=f"{file}: is no file"):
        FieldStore(file, 1)
    file.unlink()
    connection = sqlite3.connect(file)
    connection.execute("CREATE TABLE documents (position)")
    connection.close()
    with pytest.raises(IndexFormatError, match="no file of an index's fields"):
        write(file, [{"a": 1}])


WHERE = [
    {"lang": "en"},
    {"year": {"gte": 2000, "lt": 2010}},
    {"tags": {"contains": "t1"}},
    {"n": {"in": list(range(0, 2000, 3))}},
    {"url": {"exists": True}},
]


def answers(store, n):
    return [
        [store.matching(where).tolist() for where in WHERE],
        [store.fields(i) for i in range(n)],
        store.names(),
    ]


@pytest.mark.parametrize("kind", ["bit", "page", "cut"])
def test_damage_is_named(file, tmp_path, kind):
    """A right answer, or an error that names the file; and `verify` finds what is left."""
    draw, n = random.Random(kind), 300
    documents = [
        {
            "lang": draw.choice(["en", "de"]),
            "year": draw.randrange(1990, 2025),
            "score": draw.random(),
            "tags": draw.sample(["t1", "t2", "t3"], 2),
            "url": f"http://{draw.randrange(10**9)}.example.org",
            "n": i,
        }
        for i in range(n)
    ]
    write(file, documents)
    with opened(file, n) as store:
        expected = answers(store, n)
    whole, found = file.read_bytes(), {"open": 0, "answer": 0, "verify": 0, "right": 0}
    for _ in range(100):
        data = bytearray(whole)
        at = draw.choice([draw.randrange(len(data)), draw.randrange(110)])
        if kind == "bit":
            data[at] ^= 1 << draw.randrange(8)
        elif kind == "page":
            page = at // 4096 * 4096
            other = draw.randrange(len(data) // 4096) * 4096
            data[page : page + 4096] = whole[other : other + 4096]
        else:
            del data[at:]
        delete_fields(file)
        file.write_bytes(data)
        stage = "open"
        try:
            with opened(file, n) as store:
                stage = "answer"
                same = answers(store, n) == expected
                stage = "verify"
                store.verify()
            assert same
            stage = "right"
        except (ValueError, OSError) as error:
            assert str(file) in str(error), error
        found[stage] += 1
    assert found["open"] and (found["answer"] or kind == "cut"), found
    assert found["right"] <= (70 if kind == "bit" else 40), found


def test_values_that_do_not_belong_to_their_documents(file):
    write(file, [{"a": n} for n in range(100)])
    changes = [
        "UPDATE search SET position = 101 WHERE position = 7",
        "UPDATE search SET position = 'x' WHERE position = 7",
        "UPDATE search SET position = 7.5 WHERE position = 7",
        "UPDATE search SET position = -1 WHERE position = 7",
        "UPDATE search SET value = 9 WHERE position = 7",
        "UPDATE search SET block = 1 WHERE position = 7",
        "UPDATE search SET kind = 9 WHERE position = 7",
        "DELETE FROM search WHERE position = 7",
        "DELETE FROM documents WHERE position = 99",
        "UPDATE documents SET position = 100 WHERE position = 7",
        "UPDATE documents SET fields = '{}' WHERE position = 7",
        "UPDATE documents SET fields = x'00' WHERE position = 7",
        "UPDATE documents SET position = -1 WHERE position = 7",
        "DELETE FROM search",
        "CREATE TRIGGER t AFTER INSERT ON documents BEGIN DELETE FROM search; END",
    ]
    whole = file.read_bytes()
    for change in changes:
        connection = sqlite3.connect(file)
        connection.execute(change)
        connection.commit()
        connection.close()
        with pytest.raises(IndexFormatError, match=f"{file}: damaged"):
            verify_fields(file, 100)
        with contextlib.suppress(IndexFormatError), opened(file, 100) as store:
            assert set(store.matching({"a": {"exists": True}})) <= set(range(100))
        delete_fields(file)
        file.write_bytes(whole)


def test_a_locked_file(file, monkeypatch):
    write(file, [{"a": 1}])
    monkeypatch.setattr(fields_module, "_PATIENCE", 0.01)
    with FieldsWriter(file, 1), pytest.raises(RuntimeError, match=f"{file}: another process"):
        FieldsWriter(file, 1)


def test_out_of_handles(file):
    write(file, [{"a": 1}])
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    taken = os.open(os.devnull, os.O_RDONLY)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (taken, hard))
        for use in (lambda: FieldStore(file, 1), lambda: FieldsWriter(file, 1)):
            with pytest.raises(OSError, match="Too many open files") as caught:
                use()
            assert caught.value.errno == errno.EMFILE and caught.value.filename == str(file)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        os.close(taken)


def test_no_room(file):
    """A limit on the size of files; a full disk is SQLITE_FULL."""
    write(file, [{"a": 1}])
    code = """
        import resource, sys
        from pathlib import Path
        from colbert_jax.index.fields import FieldsWriter, FieldStore
        from colbert_jax.index.folder import DiskFullError, naming_space

        file, size = Path(sys.argv[1]), int(sys.argv[2])
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
        try:
            with naming_space(file.parent), FieldsWriter(file, 1) as writer:
                writer.extend({"b": "x" * 1000, "n": n} for n in range(3000))
        except DiskFullError as error:
            print(error)
        print(FieldStore(file, 1).matching({"a": 1}))
        """
    for size in (40_000, 1_000_000):
        done = run_python(code, file, size)
        assert done.returncode == 0, done.stderr
        message, found = done.stdout.splitlines()
        assert message.startswith(f"{file}: ") and "MiB are free" in message
        assert found == "[0]"
    write(file, [{"a": 2}], 1)
    verify_fields(file, 2)


def test_a_full_disk_is_that(file):
    error = sqlite3.OperationalError("database or disk is full")
    error.sqlite_errorcode = sqlite3.SQLITE_FULL
    with pytest.raises(OSError) as caught, fields_module._naming(file):
        raise error
    assert caught.value.errno == errno.ENOSPC and caught.value.filename == str(file)
