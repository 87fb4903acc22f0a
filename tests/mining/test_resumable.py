import errno
import itertools
import json
import os

import pytest

from colbert_jax.mining import resumable
from colbert_jax.mining.resumable import BlockFile

BLOCKS = [b"one\n", b"two, longer\n", b"", b"four\n"]


class Killed(BaseException):
    pass


def write(path, settings=None, **arguments):
    with BlockFile(path, settings or {"a": 1}, **arguments) as file:
        if not file.finished:
            for block in BLOCKS[file.counts.get("blocks", 0) :]:
                file.append(block, blocks=1, bytes=len(block))
            file.publish()
    return file


def names(folder):
    return sorted(file.name for file in folder.iterdir())


def die_before(patch, moment):
    """Raise before system call number `moment`, and clean up nothing, as a kill does."""
    calls = itertools.count()

    def dying(function):
        def call(*arguments):
            if next(calls) == moment:
                raise Killed
            return function(*arguments)

        return call

    patch.setattr(resumable.os, "fsync", dying(os.fsync))
    patch.setattr(resumable.os, "replace", dying(os.replace))
    patch.setattr(BlockFile, "__exit__", lambda self, *_: self._stream.close())


@pytest.mark.parametrize("replaces", [False, True], ids=["new", "replacing"])
def test_a_kill_at_any_moment_changes_nothing(tmp_path, monkeypatch, replaces):
    """Die before every system call in turn; what the next run makes is what one run makes."""
    for moment in itertools.count():
        path = tmp_path / str(moment) / "out"
        path.parent.mkdir()
        if replaces:
            path.write_bytes(b"the former")
            path.with_name("out.meta").write_text(json.dumps({"settings": {"a": 0}}))
        with monkeypatch.context() as patch:
            die_before(patch, moment)
            try:
                write(path, overwrite=replaces)
            except Killed:
                assert not path.exists() or path.read_bytes() in (b"the former", b"".join(BLOCKS))
            else:
                break
        if path.with_name("out.partial.json").exists():  # half a block, not committed
            with path.with_name("out.partial").open("ab") as stream:
                stream.write(b"hal")
        if path.exists() and path.read_bytes() == b"".join(BLOCKS):
            path.with_name("out.partial").unlink(missing_ok=True)
        again = write(path, overwrite=replaces)
        assert path.read_bytes() == b"".join(BLOCKS)
        assert again.counts == {"blocks": 4, "bytes": sum(map(len, BLOCKS))}
        assert names(path.parent) == ["out", "out.meta"]
    assert moment > 3 * len(BLOCKS)


def test_it_goes_on_behind_the_last_block(tmp_path):
    path = tmp_path / "out"
    with pytest.raises(Killed), BlockFile(path, {"a": 1}) as file:
        file.append(BLOCKS[0], blocks=1)
        raise Killed
    assert names(tmp_path) == ["out.partial", "out.partial.json"]
    with BlockFile(path, {"a": 1}) as file:
        assert not file.finished and file.counts == {"blocks": 1}
        file.append(b"x")
        file.publish()
    assert path.read_bytes() == BLOCKS[0] + b"x"


def test_other_settings_are_refused(tmp_path):
    path = tmp_path / "out"
    with pytest.raises(Killed), BlockFile(path, {"a": 1, "b": [2]}) as file:
        file.append(b"x")
        raise Killed
    with pytest.raises(FileExistsError, match=r"partial: was left unfinished .*\(a: 1, not 3\)"):
        BlockFile(path, {"a": 3, "b": [2]})
    write(path, {"a": 3}, overwrite=True)
    with pytest.raises(
        FileExistsError, match=r"out: was made with .*\(a: 3, not 4\); name another"
    ):
        write(path, {"a": 4})
    assert write(path, {"a": 3}).counts["blocks"] == 4
    path.write_bytes(b"my own")
    path.with_name("out.meta").unlink()
    assert write(path, {"a": 4}).finished and path.read_bytes() == b"my own"


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_file_that_no_run_left_is_not_touched(tmp_path, overwrite):
    (tmp_path / "out.partial").write_bytes(b"my own")
    with pytest.raises(FileExistsError, match=r"out\.partial: exists, and was not left by a run"):
        BlockFile(tmp_path / "out", {}, overwrite=overwrite)
    assert names(tmp_path) == ["out.partial"]
    assert (tmp_path / "out.partial").read_bytes() == b"my own"


def test_nothing_is_left_of_a_run_that_wrote_nothing(tmp_path):
    with pytest.raises(ValueError, match="bad input"), BlockFile(tmp_path / "out", {}):
        raise ValueError("bad input")
    assert names(tmp_path) == []


def test_one_writer(tmp_path):
    with (
        BlockFile(tmp_path / "out", {}) as file,
        pytest.raises(RuntimeError, match="out: another process is writing it"),
    ):
        file.append(b"x")
        BlockFile(tmp_path / "out", {})


def test_a_full_disk_loses_nothing(tmp_path, monkeypatch):
    path, fsync = tmp_path / "out", os.fsync
    with BlockFile(path, {}) as file:
        file.append(b"first", blocks=1)

        def full(descriptor):
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(resumable.os, "fsync", full)
        with pytest.raises(OSError, match=r"No space left.*goes on from it.*out\.partial"):
            file.append(b"second", blocks=1)
    monkeypatch.setattr(resumable.os, "fsync", fsync)
    with BlockFile(path, {}) as file:
        assert file.counts == {"blocks": 1}
        file.append(b" and third")
        file.publish()
    assert path.read_bytes() == b"first and third"
