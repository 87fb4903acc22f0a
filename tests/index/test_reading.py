"""Reading an index that others replace, or that can't be opened: what is damage and what is not."""

import errno
import gc
import json
import os
import re
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
from support import unit_rows

from colbert_jax import Index
from colbert_jax.index import folder as folders
from colbert_jax.index import format as fmt
from colbert_jax.index.folder import building_folder, publish, state_name
from colbert_jax.index.format import IndexFiles, IndexFormatError
from colbert_jax.index.layouts.convert import convert_index

POSIX = pytest.mark.skipif(os.name != "posix", reason="opens files by their folder")


def ready(seed=0, n=20):
    rng = np.random.default_rng(seed)
    lengths = np.full(n, 4)
    values = unit_rows(rng, lengths.sum(), 16)
    return dict(embeddings=values, lengths=lengths, num_centroids=8)


@pytest.fixture
def path(tmp_path):
    return Index.build(tmp_path / "i", **ready(), ids=map("d{}".format, range(20))).path


def change_metadata(path: Path, **values) -> None:
    fields = json.loads((path / "metadata.json").read_text())
    (path / "metadata.json").write_text(json.dumps(fields | values))


def test_verify_reads_the_files_that_the_format_demands(path):
    """Not those that damaged metadata still names."""
    checksums = json.loads((path / "metadata.json").read_text())["checksums"]
    for left in ({}, {"codes.npy": checksums["codes.npy"]}, checksums | {"../x": 1}):
        change_metadata(path, checksums=left)
        with pytest.raises(IndexFormatError, match=r"metadata\.json: damaged: field 'checksums'"):
            Index.open(path)
    change_metadata(path, checksums=checksums, text_columns=[])
    with pytest.raises(IndexFormatError, match=r"differ in pid_offsets\.npy, pids\.npy"):
        Index.open(path)


def test_verify_names_what_is_missing(path):
    index = Index.open(path)
    (path / "residuals.npy").unlink()
    with pytest.raises(IndexFormatError, match=r"residuals\.npy: missing; the index is incomplete"):
        index.verify()
    shutil.rmtree(path)
    with pytest.raises(FileNotFoundError, match="no index there"):
        index.verify()


@pytest.mark.parametrize("times", [1, 3])
def test_verify_of_an_index_that_is_replaced(tmp_path, path, monkeypatch, times):
    """By another one of the same size, while it is read."""
    other = Index.build(tmp_path / "other", **ready(1), ids=map("d{}".format, range(20))).path
    index, left, original = Index.open(path), [times], IndexFiles.checksum

    def checksum(self, name, *spec):
        if name == "residuals.npy" and left[0]:
            left[0] -= 1
            publish(shutil.copytree(other, building_folder(path)), path)
        return original(self, name, *spec)

    monkeypatch.setattr(IndexFiles, "checksum", checksum)
    index.verify()
    assert left == [0]
    (path / "codes.npy").write_bytes(b"")
    with pytest.raises(IndexFormatError, match=r"codes\.npy: damaged"):
        index.verify()


@POSIX
@pytest.mark.parametrize("through", ["rename", "link"])
def test_replaced_and_brought_back(tmp_path, path, monkeypatch, through):
    """A, B and A again while it is opened: metadata are those of A before and after."""
    other = Index.build(tmp_path / "other", **ready(1), ids=map("d{}".format, range(20))).path
    opened, aside = path, tmp_path / "aside"
    wanted = np.load(path / "codes.npy"), np.load(path / "residuals.npy")
    assert not np.array_equal(wanted[1], np.load(other / "residuals.npy"))
    if through == "link":
        opened = tmp_path / "link"
        opened.symlink_to(path)
    original = fmt.open_array
    counts = []

    def swap(back):
        if through == "link":
            opened.unlink()
            opened.symlink_to(path if back else other)
            return
        steps = [(path, aside), (other, path)]
        for source, target in steps if not back else [(b, a) for a, b in reversed(steps)]:
            source.rename(target)

    def open_array(files, name, *spec):
        counts.append(name)
        if name != "residuals.npy" or counts.count(name) > 1:
            return original(files, name, *spec)
        swap(back=False)
        array = original(files, name, *spec)
        swap(back=True)
        return array

    monkeypatch.setattr(fmt, "open_array", open_array)
    _, _, arrays = fmt.open_arrays(opened)
    np.testing.assert_array_equal(arrays["codes"], wanted[0])
    np.testing.assert_array_equal(arrays["residuals"], wanted[1])
    assert counts.count("residuals.npy") >= 1


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EACCES])
def test_out_of_handles_or_memory_is_no_damage(path, monkeypatch, number):
    original = os.open

    def fail(file, *args, **kwargs):
        if str(file).endswith("codes.npy"):
            raise OSError(number, os.strerror(number))
        return original(file, *args, **kwargs)

    index = Index.open(path)
    monkeypatch.setattr(os, "open", fail)
    start = time.monotonic()
    for use in (lambda: Index.open(path), index.verify):
        with pytest.raises(OSError, match=os.strerror(number)) as caught:
            use()
        assert caught.value.errno == number and caught.value.filename == str(path / "codes.npy")
    assert time.monotonic() - start < 5


@POSIX
def test_really_out_of_handles(path):
    import resource

    before, taken = resource.getrlimit(resource.RLIMIT_NOFILE), []
    gc.collect()  # indexes of other tests may be garbage that still holds handles
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (512, before[1]))
        for free in range(8):
            gc.collect(1)  # what this test has left; all objects again would take seconds
            with pytest.raises(OSError):
                while True:
                    taken.append(os.open(os.devnull, os.O_RDONLY))
            for _ in range(free):
                os.close(taken.pop())
            with pytest.raises(OSError, match=r"Too many open files: '.*'"):
                Index.open(path)
    finally:
        for descriptor in taken:
            os.close(descriptor)
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    Index.open(path).verify()


def test_memory_of_a_map(path, monkeypatch):
    def fail(*args, **kwargs):
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))

    monkeypatch.setattr(np, "memmap", fail)
    with pytest.raises(OSError, match=r"Cannot allocate memory: '.*centroids\.npy'"):
        Index.open(path)


@POSIX
@pytest.mark.parametrize("kind", ["pipe", "folder", "device", "dangling", "circle"])
@pytest.mark.parametrize("name", ["codes.npy", "metadata.json", "pids.npy"])
def test_what_is_no_file(path, kind, name):
    file = path / name
    index = Index.open(path)
    file.unlink()
    if kind == "pipe":
        os.mkfifo(file)
    elif kind == "folder":
        file.mkdir()
    else:
        file.symlink_to({"device": "/dev/zero", "dangling": "nowhere", "circle": name}[kind])
    start = time.monotonic()
    for use in (lambda: Index.open(path), index.verify):
        with pytest.raises((IndexFormatError, OSError), match=name) as caught:
            use()
        if kind in ("pipe", "folder", "device"):
            assert "is no file but a folder, pipe or device" in str(caught.value)
    assert time.monotonic() - start < 5


@POSIX
def test_the_draft_of_a_mark_is_ours(tmp_path):
    """A kill while the mark of a building folder is written must not refuse it for ever."""
    place = building_folder(tmp_path / "i")
    place.mkdir()
    (place / f".{state_name(0)}.0123abcd.colbert_jax").write_text("{")
    Index.build(tmp_path / "i", **ready())
    assert [file.name for file in tmp_path.iterdir()] == ["i"]


DRAFT = re.compile(r"[0-9a-f]{8}(?=\.colbert_jax$)")


class Killed(BaseException):
    pass


@pytest.mark.parametrize("to", ["native", "stanford"])
def test_a_killed_conversion_leaves_nothing_for_ever(tmp_path, path, monkeypatch, to):
    """Killed at every rename, with the draft that is being written: the next one clears it."""
    source = path
    if to == "native":
        source = tmp_path / "theirs"
        convert_index(path, source, "stanford")
    before = sorted(tmp_path.iterdir())
    left = [0]

    def counted(function):
        def wrapper(source, target, *args):
            left[0] -= 1
            if left[0] < 0:
                if str(source).endswith(".colbert_jax"):  # as if it had not been deleted
                    Path(DRAFT.sub("ffffffff", str(source))).touch()
                raise Killed
            return function(source, target, *args)

        return wrapper

    place, step = tmp_path / "new", 0
    while True:
        with monkeypatch.context() as patch:
            for name in ("replace", "rename"):
                patch.setattr(os, name, counted(getattr(os, name)))
            patch.setattr("colbert_jax.index.layouts.convert.discard", lambda folder: None)
            left[0] = step
            try:
                convert_index(source, place, to, overwrite=True)
                break
            except Killed:
                pass
        convert_index(source, place, to, overwrite=True)
        assert sorted(tmp_path.iterdir()) == sorted([*before, place]), step
        assert not [file for file in place.iterdir() if file.name.startswith(".")]
        shutil.rmtree(place)
        step += 1
    assert step > 1


def test_a_source_that_is_replaced_while_it_is_converted(tmp_path, path, monkeypatch):
    other = Index.build(tmp_path / "other", **ready(1), ids=map("d{}".format, range(20))).path
    original = folders.write_json

    def write_json(file, value):
        publish(shutil.copytree(other, building_folder(path)), path)
        return original(file, value)

    monkeypatch.setattr("colbert_jax.index.layouts.stanford.write_json", write_json)
    with pytest.raises(RuntimeError, match="i: replaced while it was converted; convert it again"):
        convert_index(path, tmp_path / "new", "stanford")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["i", "other"]
