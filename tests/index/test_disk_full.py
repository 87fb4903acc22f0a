"""A disk that runs full while an index is written: an error that names it, and no lost work."""

import errno
import os
import stat
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from support import unit_rows

from colbert_jax import Index
from colbert_jax.index import sources
from colbert_jax.index.folder import DiskFullError, building_folder
from colbert_jax.index.format import ArrayWriter
from colbert_jax.index.layouts.convert import convert_index


def ready(n=60, dim=16):
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 9, n)
    ids = [f"document {i}" for i in range(n)]
    return dict(embeddings=unit_rows(rng, lengths.sum(), dim), lengths=lengths, ids=ids)


def contents(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in path.iterdir() if file.suffix != ".json"}


class Full:
    """Lets so many operations through, and fails all that would take room from then on."""

    def __init__(self, monkeypatch):
        self.left, self.number = 10**9, errno.ENOSPC
        original = Path.open

        def opened(path, mode="r", *args, **kwargs):
            stream = original(path, mode, *args, **kwargs)
            return Stream(stream, self) if set(mode) & set("w+") else stream

        monkeypatch.setattr(Path, "open", opened)
        fsync, full_fsync = os.fsync, self.counted(os.fsync)

        def sync(fd):
            (fsync if stat.S_ISDIR(os.fstat(fd).st_mode) else full_fsync)(fd)

        monkeypatch.setattr(os, "fsync", sync)
        monkeypatch.setattr(os, "posix_fallocate", self.counted(os.posix_fallocate))

    def counted(self, function):
        def wrapper(*args):
            self.left -= 1
            if self.left < 0:
                raise OSError(self.number, os.strerror(self.number))
            return function(*args)

        return wrapper


class Stream:
    def __init__(self, stream, disk):
        self._stream = stream
        self.write, self.writelines = disk.counted(stream.write), disk.counted(stream.writelines)

    def __getattr__(self, name):
        return getattr(self._stream, name)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self._stream.close()


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="counts it")
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_build_goes_on_when_there_is_room(tmp_path, monkeypatch, number):
    """Full from the nth write on, for every fifth n."""
    monkeypatch.setattr(sources, "CHUNK_TOKENS", 64)
    data, path = ready(30), tmp_path / "i"
    expected = contents(Index.build(tmp_path / "whole", **data).path)
    disk = Full(monkeypatch)
    disk.number = number
    step = number % 5
    while True:
        step, disk.left = step + 5, step
        try:
            Index.build(path, **data)
        except DiskFullError as error:
            assert error.errno == number and not path.exists()
            assert str(building_folder(path)) in str(error).split(": ")[0]
            assert os.strerror(number) in str(error)
            assert f"MiB are free in {tmp_path}; make room and run the same again" in str(error)
        else:
            break
        disk.left = 10**9
        assert contents(Index.build(path, **data).path) == expected, step
        assert sorted(file.name for file in tmp_path.iterdir()) == ["i", "whole"]
        Index.open(path).verify()
        for file in path.iterdir():
            file.unlink()
        path.rmdir()
    assert step > 60 and contents(path) == expected


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="counts it")
@pytest.mark.parametrize("to", ["native", "stanford"])
def test_conversions(tmp_path, monkeypatch, to):
    source = Index.build(tmp_path / "source", **ready()).path
    if to == "native":
        source = tmp_path / "theirs"
        convert_index(tmp_path / "source", source, "stanford")
    before = sorted(tmp_path.iterdir())
    disk, step = Full(monkeypatch), 0
    while True:
        disk.left = step
        try:
            convert_index(source, tmp_path / "i", to)
        except DiskFullError as error:
            assert str(tmp_path / "i.building") in str(error)
            assert sorted(tmp_path.iterdir()) == before
        else:
            break
        step += 3
    assert step > 20


def test_lists_have_their_room_before_they_are_mapped(tmp_path, monkeypatch):
    for fallocate in (True, False):
        if not fallocate:  # as on macOS
            monkeypatch.delattr(os, "posix_fallocate", raising=False)
        with ArrayWriter(tmp_path / "x.npy", np.int32) as writer:
            writer.append(np.arange(3))
            writer.reserve(3_000_000)
            writer.append(np.arange(2))
        assert (tmp_path / "x.npy").stat().st_blocks * 512 > 12_000_000
        array = np.load(tmp_path / "x.npy")
        assert array[:3].tolist() == [0, 1, 2] and array[-2:].tolist() == [0, 1]
        assert len(array) == 3_000_005 and not array[3:-2].any()


SMALL = """
import gc, os, shutil, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
import jax
jax.config.update("jax_platforms", "cpu")
import numpy as np
from colbert_jax import Index
from colbert_jax.index import sources
from colbert_jax.index.layouts.convert import convert_index
from support import unit_rows

small = Path(sys.argv[1])
sources.CHUNK_TOKENS = 2048
rng = np.random.default_rng(0)
lengths = rng.integers(1, 12, 3000)
data = dict(embeddings=unit_rows(rng, lengths.sum(), 32), lengths=lengths, num_centroids=64)

def build():
    Index.build(small / "i", **data, ids=(f"doc{{i}}" for i in range(3000)))

def convert():
    convert_index(sys.argv[2] + "/stanford", small / "i")

def convert_back():
    convert_index(sys.argv[2] + "/native", small / "i", "stanford")

Index.build(sys.argv[2] + "/native", **data)
convert_index(sys.argv[2] + "/native", sys.argv[2] + "/stanford", "stanford")
for make in (build, convert, convert_back):
    failed = 0
    for room in (int(2_000_000 * 0.8**n) for n in range(24)):
        gc.collect()  # deleted files that are mapped take room
        for left in small.iterdir():
            shutil.rmtree(left) if left.is_dir() else left.unlink()
        space = os.statvfs(small)
        (small / "ballast").write_bytes(bytes(space.f_bavail * space.f_frsize - room))
        try:
            make()
        except OSError as error:
            assert "MiB are free in" in str(error), repr(error)
            failed += 1
            (small / "ballast").unlink()
            make()
        if make is not convert_back:
            Index.open(small / "i").verify()
    assert failed > 10, failed
print("done")
"""


@pytest.mark.slow
def test_a_small_file_system(tmp_path):
    """A real disk that runs full at any place: never SIGBUS, always the error."""
    small = tmp_path / "small"
    small.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", str(small)]
    try:
        subprocess.run(mount, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("may not mount a small file system")
    try:
        script = SMALL.format(tests=str(Path(__file__).parents[1]))
        command = [sys.executable, "-c", script, str(small), str(tmp_path)]
        done = subprocess.run(command, capture_output=True, text=True)
    finally:
        subprocess.run(["umount", str(small)], check=True)
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr[-2000:]
