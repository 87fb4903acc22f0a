"""Writing: whole or not at all, and nothing of the user's is taken over for its name."""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest

from colbert_jax import Hit, files
from colbert_jax.evaluation import write_run
from colbert_jax.tensors.torch_file import read_torch_file, write_torch_file


class Killed(BaseException):
    pass


def tree(folder):
    return {str(f.relative_to(folder)): f.read_text() for f in folder.rglob("*") if f.is_file()}


def fill(draft, text):
    (draft / "inner").mkdir()
    (draft / "inner" / "a.txt").write_text(text)
    (draft / "b.txt").write_text(text)


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    file = tmp_path / "a.json"
    files.write_json(file, {"é": [1, None]})
    assert file.read_bytes() == '{\n  "é": [\n    1,\n    null\n  ]\n}\n'.encode()
    with pytest.raises(TypeError):
        files.write_json(file, object())
    with pytest.raises(Killed), files.replacing(file, "wb") as stream:
        stream.write(b"half")
        raise Killed
    assert files.read_json(file) == {"é": [1, None]}
    assert [f.name for f in tmp_path.iterdir()] == ["a.json"]


@pytest.mark.skipif(os.name != "posix", reason="POSIX permissions")
def test_permissions_are_those_of_any_new_file(tmp_path):
    (tmp_path / "plain").write_text("")
    files.write_json(tmp_path / "a.json", 1)
    with files.publishing(tmp_path / "folder"):
        pass
    mode = (tmp_path / "plain").stat().st_mode
    assert (tmp_path / "a.json").stat().st_mode == mode
    (tmp_path / "mkdir").mkdir()
    assert (tmp_path / "folder").stat().st_mode == (tmp_path / "mkdir").stat().st_mode


def test_a_folder_is_published_whole_or_not_at_all(tmp_path, monkeypatch):
    folder = tmp_path / "deep" / "model"
    with pytest.raises(Killed), files.publishing(folder) as draft:
        fill(draft, "half")
        raise Killed
    assert list(folder.parent.iterdir()) == []
    with files.publishing(folder) as draft:
        fill(draft, "1")
    assert tree(folder) == {"inner/a.txt": "1", "b.txt": "1"}
    with pytest.raises(FileExistsError, match="not an empty folder"), files.publishing(folder):
        raise AssertionError("nothing is written")
    (tmp_path / "file").write_text("mine")
    for replace in (False, True):
        with pytest.raises(FileExistsError), files.publishing(tmp_path / "file", replace=replace):
            raise AssertionError("nothing is written")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    with files.publishing(type(tmp_path)("empty")) as draft:
        fill(draft, "2")
    assert (tmp_path / "empty" / "b.txt").read_text() == "2"


def test_a_folder_is_replaced_wherever_a_kill_comes(tmp_path, monkeypatch):
    """Stop before the nth sync, rename or deletion, without any clean-up, as SIGKILL does."""
    folder, left = tmp_path / "best", [10**9]

    def counted(function):
        def wrapper(*args, **kwargs):
            left[0] -= 1
            if left[0] <= 0:  # whatever would clean up is dead too
                raise Killed
            return function(*args, **kwargs)

        return wrapper

    for module, name in [(os, "fsync"), (os, "rename"), (shutil, "rmtree")]:
        monkeypatch.setattr(module, name, counted(getattr(module, name)))
    for step in range(1, 100):
        left[0] = 10**9
        with files.publishing(folder, replace=True) as draft:
            fill(draft, "old")
        left[0] = step
        try:
            with files.publishing(folder, replace=True) as draft:
                fill(draft, "new")
        except Killed:
            left[0] = 10**9
        else:
            break
        files.recover(folder)
        assert set(tree(folder).values()) in ({"old"}, {"new"}) and len(tree(folder)) == 2
        assert [f.name for f in tmp_path.iterdir()] == ["best"]
    assert step > 8 and set(tree(folder).values()) == {"new"}


def test_files_are_replaced_one_by_one_in_a_folder(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "b.txt").write_text("old")
    with pytest.raises(Killed), files.replacing_files(tmp_path) as draft:
        fill(draft, "half")
        raise Killed
    assert tree(tmp_path) == {"notes.txt": "mine", "b.txt": "old"}
    with files.replacing_files(tmp_path) as draft:
        fill(draft, "new")
    assert tree(tmp_path) == {"notes.txt": "mine", "b.txt": "new", "inner/a.txt": "new"}


def test_recover_keeps_to_its_own(tmp_path):
    own = [
        ".best.0123abcd.colbert_jax",
        ".best.previous.colbert_jax",
        "..best.0123abcd.colbert_jax.4567cdef.colbert_jax",  # published into a draft
    ]
    others = [".best.x.0123abcd.colbert_jax", ".bes.0123abcd.colbert_jax", "best.old", "best.new"]
    for name in ["best", *own, *others]:
        (tmp_path / name).mkdir()
        (tmp_path / name / "a").write_text(name)
    files.recover(tmp_path / "best")
    assert {f.name for f in tmp_path.iterdir()} == {"best", *others}
    assert (tmp_path / "best" / "a").read_text() == "best"


def run_file(file):
    write_run(file, {"q": [Hit("d", 1.0, None, 0)]}, "stanford")
    return file.read_text() == "q\td\t1\t1.0\n"


def torch_file(file):
    write_torch_file(file, np.arange(3))
    return read_torch_file(file).read().tolist() == [0, 1, 2]


def json_file(file):
    files.write_json(file, 1)
    return files.read_json(file) == 1


@pytest.mark.parametrize("write", [run_file, torch_file, json_file])
def test_files_of_similar_names_stay(tmp_path, write):
    """What other programs call the file that they are writing may be a file of the user's."""
    names = [f"{name}{end}" for name in ("a", ".a") for end in (".tmp", ".new", ".old", "~")]
    for name in names:
        (tmp_path / name).write_text("mine")
    assert write(tmp_path / "a") and write(tmp_path / "a")
    assert {f.name for f in tmp_path.iterdir()} == {"a", *names}
    assert {(tmp_path / name).read_text() for name in names} == {"mine"}


posix = pytest.mark.skipif(os.name != "posix", reason="no such files")


def test_writing_a_file_that_a_user_has_named(tmp_path):
    file = tmp_path / "run"
    with files.writing(file) as stream:
        stream.write("new")
        assert not file.exists()
    assert file.read_text() == "new" and files.output_place(file) == file
    with pytest.raises(Killed), files.writing(str(file)) as stream:
        stream.write("half")
        raise Killed
    assert tree(tmp_path) == {"run": "new"}


@posix
@pytest.mark.parametrize("there", [True, False])
def test_writing_behind_a_link(tmp_path, there):
    (tmp_path / "far").mkdir()
    target, link = tmp_path / "far" / "run", tmp_path / "link"
    if there:
        target.write_text("old")
    (tmp_path / "between").symlink_to(target)
    link.symlink_to("between")
    with files.writing(link) as stream:
        stream.write("new")
    assert link.is_symlink() and not target.is_symlink() and target.read_text() == "new"


@posix
def test_writing_into_a_pipe(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = subprocess.Popen(["cat", str(pipe)], stdout=subprocess.PIPE, text=True)
    with files.writing(pipe) as stream:
        stream.write("new")
    assert reader.communicate()[0] == "new" and pipe.is_fifo()


TO_STDOUT = """
import sys
from colbert_jax import files
print("before", flush=True)
with files.writing(sys.argv[1]) as stream:
    stream.write("new\\n")
print("after")
"""


@posix
@pytest.mark.parametrize("name", ["/dev/stdout", "/dev/fd/1", "/proc/self/fd/1", "link"])
@pytest.mark.slow
def test_writing_into_our_own_output(tmp_path, name):
    """A pipe, and a file that the shell appends to: nothing before it is lost."""
    if name == "link":
        name = str(tmp_path / "link")
        os.symlink("/dev/stdout", name)
    elif not os.path.exists(name):
        pytest.skip(f"no {name}")
    command = [sys.executable, "-c", TO_STDOUT, name]
    piped = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    assert piped.stdout == "before\nnew\nafter\n"
    out = tmp_path / "out"
    out.write_text("mine\n")
    with out.open("a") as stream:
        subprocess.run(command, stdout=stream, check=True)
    assert out.read_text() == "mine\nbefore\nnew\nafter\n"


@posix
def test_places_that_can_not_be_written(tmp_path, monkeypatch):
    with pytest.raises(IsADirectoryError, match="is a folder; name a file in it"):
        files.output_place(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"there is no folder .*nowhere; make it first"):
        files.output_place(tmp_path / "nowhere" / "run")
    (tmp_path / "file").touch()
    with pytest.raises(FileNotFoundError, match=r"there is no folder .*file; make it first"):
        files.output_place(tmp_path / "file" / "run")
    (tmp_path / "circle").symlink_to("circle")
    with pytest.raises(OSError, match="leads back to itself"):
        files.output_place(tmp_path / "circle")
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path / "file")
    with pytest.raises(PermissionError, match="is there and may not be written"):
        files.output_place(tmp_path / "file")
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path)
    with pytest.raises(PermissionError, match=f"no permission to write in {tmp_path}"):
        files.output_place(tmp_path / "new")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
def test_no_room_is_named():
    full = pytest.raises(OSError, match="No space left on device: '/dev/full'")
    with full, files.writing("/dev/full") as stream:
        stream.write("new")


@pytest.mark.skipif(files.fcntl is None, reason="no locks")
def test_locks(tmp_path):
    file = tmp_path / "lock"
    held = files.lock_file(file)
    with pytest.raises(BlockingIOError):
        files.lock_file(file, shared=True)
    files.lock(held, shared=True)
    other = files.lock_file(file, shared=True)
    files.unlock_file(file, held)
    assert file.exists()
    files.unlock_file(file, other)
    assert list(tmp_path.iterdir()) == []


HOLDER = """
import sys
from pathlib import Path
from colbert_jax import Hit, files
held = files.lock_file(Path(sys.argv[1]))
print("held", flush=True)
sys.stdin.read()
"""


@pytest.mark.skipif(files.fcntl is None, reason="no locks")
def test_a_lock_dies_with_its_process(tmp_path):
    file = tmp_path / "lock"
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    with subprocess.Popen([sys.executable, "-c", HOLDER, str(file)], **pipes) as process:
        assert process.stdout.readline() == "held\n"
        with pytest.raises(BlockingIOError):
            files.lock_file(file)
        process.kill()
        process.wait()
        files.unlock_file(file, files.lock_file(file))
    assert json.dumps([f.name for f in tmp_path.iterdir()]) == "[]"


@pytest.mark.parametrize("kind", ["pipe", "folder", "link", "circle"])
def test_what_lies_in_place_of_a_json_object_is_named(tmp_path, kind):
    """A pipe that nobody writes into was called missing."""
    file = tmp_path / "s.json"
    with pytest.raises(FileNotFoundError, match=r"s\.json is missing"):
        files.read_object(file)
    if kind == "pipe":
        os.mkfifo(file)
    elif kind == "folder":
        file.mkdir()
    else:
        file.symlink_to("gone" if kind == "link" else file)
    said = {
        "pipe": "a pipe or a device in place",
        "folder": "a folder in place",
        "link": "a link to",
    }
    with pytest.raises(ValueError, match=rf"s\.json: {said.get(kind, 'cannot be read')}"):
        files.read_object(file)


def test_json_that_is_not_utf8_names_the_line(tmp_path):
    (tmp_path / "s.json").write_bytes(b'{\n "a": "\xff"}')
    with pytest.raises(ValueError, match=r"s\.json, line 2: not UTF-8"):
        files.read_object(tmp_path / "s.json")
