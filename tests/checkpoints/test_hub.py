"""Checkpoints by their hub id: huggingface_hub's own client against a hub on this machine.

The fake hub says what the real one says to the requests that the client makes: listings, HEAD and
GET of files, large files redirected to another host, errors with their codes, renamed repositories.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import huggingface_hub
import jax
import numpy as np
import pytest
import support
from huggingface_hub import constants, file_download, utils
from safetensors.numpy import load_file, save_file

from colbert_jax import ColBERT, Index, Retriever
from colbert_jax.checkpoints import hub, read_checkpoint, write_checkpoint
from colbert_jax.tensors.torch_file import write_torch_file

ID = "somebody/colbert"
TOKEN = "hf_of_somebody"
STANFORD = {
    "config.json",
    "artifact.metadata",
    "vocab.txt",
    "tokenizer_config.json",
    "model.safetensors",
}
# In a repository beside the checkpoint; nothing of it is wanted.
JUNK = (
    ".gitattributes",
    "README.md",
    "flax_model.msgpack",
    "onnx/config.json",
    "onnx/model.onnx",
    "optimizer.pt",
    "checkpoint-10/config.json",
    "checkpoint-10/model.safetensors",
    "a/b/config.json",
    "tf_model.h5",
)
_LARGE = (".safetensors", ".bin", ".dnn", ".msgpack", ".onnx", ".pt", ".h5")


class FakeHub:
    """A hub on 127.0.0.1; large files lie on `localhost`, another host to the client.

    requests: (method, repository, file or "", token), of listings the file is "".
    """

    def __init__(self):
        self.commits: dict[str, dict[str, bytes]] = {}  # the files of a commit
        self.revisions: dict[str, dict[str, str]] = {}  # repository, its branches and their commits
        self.renamed: dict[str, str] = {}
        self.private: set[str] = set()
        self.gated: set[str] = set()
        self.broken: set[str] = set()  # files that are listed and cannot be fetched; "tree"
        self.trouble: int | None = None  # a status that every request gets
        self.requests: list[tuple[str, str, str, str | None]] = []
        self.released = threading.Event()
        self.released.set()
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                hub.released.wait(10)
                status, headers, body = hub.answer(self.path, self.command, self.headers)
                self.send_response(status)
                for name, value in ({"Content-Length": str(len(body))} | headers).items():
                    self.send_header(name, value)
                self.end_headers()
                if self.command == "GET":
                    self.wfile.write(body)

            do_HEAD = do_GET

            def log_message(self, *arguments):
                pass

        class Server(ThreadingHTTPServer):
            request_queue_size = 64

            def handle_error(self, *arguments):
                """A client that went away is no error."""

        self.server = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.01,))
        self.thread.start()

    def stop(self):
        self.released.set()
        if self.thread.is_alive():
            self.server.shutdown()
            self.thread.join()
            self.server.server_close()

    def push(self, folder: Path, repository: str = ID, revision: str = "main") -> str:
        """Make a folder the newest state of a branch; the commit is told by the content."""
        files = {
            file.relative_to(folder).as_posix(): file.read_bytes()
            for file in sorted(folder.rglob("*"))
            if file.is_file()
        }
        commit = hashlib.sha1(repr(files).encode()).hexdigest()
        self.commits[commit] = files
        self.revisions.setdefault(repository, {}).update({revision: commit, commit: commit})
        return commit

    def answer(self, path, method, headers) -> tuple[int, dict[str, str], bytes]:
        path = unquote(urlsplit(path).path)
        token = (headers["Authorization"] or "").removeprefix("Bearer ") or None
        if path.startswith("/cdn/"):
            _, _, commit, name = path.split("/", 3)
            self.requests.append((method, "cdn", name, token))
            return 200, {}, self.commits[commit][name]
        api = path.startswith("/api/models/")
        path = path.removeprefix("/api/models/" if api else "/")
        known = [*self.revisions, *self.renamed]
        repository = next((r for r in known if f"{path}/".startswith(f"{r}/")), path)
        rest = path[len(repository) + 1 :]
        kind, _, rest = rest.partition("/")
        revision, name = rest or "main", ""
        if kind == "resolve":
            revision, _, name = rest.partition("/")
        self.requests.append((method, repository, name, token))

        def error(status, code=None, message=None):
            said = {"X-Error-Code": code, "X-Error-Message": message}
            return status, {k: v for k, v in said.items() if v}, b""

        if self.trouble:
            return error(self.trouble)
        if token not in (None, TOKEN):
            return error(401, message="Invalid credentials in Authorization header")
        if repository in self.renamed:
            new = path.replace(repository, self.renamed[repository], 1)
            return 307, {"Location": ("/api/models/" if api else "/") + new}, b""
        hidden = repository in self.private and token is None
        if repository not in self.revisions or hidden:
            return error(404 if token else 401, "RepoNotFound", "Repository not found")
        if revision not in self.revisions[repository]:
            return error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        commit = self.revisions[repository][revision]
        files = self.commits[commit]
        if kind == "tree":
            if "tree" in self.broken:
                return error(403)
            return self.json([self.entry(name, value) for name, value in files.items()])
        if kind != "resolve":
            siblings = [{"rfilename": name} for name in files]
            return self.json({"id": repository, "sha": commit, "siblings": siblings})
        if name not in files or name in self.broken:
            return error(404, "EntryNotFound", "Entry not found")
        if repository in self.gated:
            return error(
                403 if token else 401, "GatedRepo", "Access to this repository is restricted"
            )
        entry, found = self.entry(name, files[name]), {"X-Repo-Commit": commit}
        if "lfs" not in entry:
            return 200, found | {"ETag": f'"{entry["oid"]}"'}, files[name]
        found |= {
            "X-Linked-ETag": f'"{entry["lfs"]["oid"]}"',
            "X-Linked-Size": str(len(files[name])),
            "Location": f"{self.url.replace('127.0.0.1', 'localhost')}/cdn/{commit}/{name}",
        }
        return 302, found, b""

    @staticmethod
    def json(value):
        return 200, {"Content-Type": "application/json"}, json.dumps(value).encode()

    @staticmethod
    def entry(name: str, value: bytes) -> dict:
        fields = {"type": "file", "path": name, "size": len(value)}
        fields["oid"] = hashlib.sha1(b"blob %d\0" % len(value) + value).hexdigest()
        if name.endswith(_LARGE):
            oid = hashlib.sha256(value).hexdigest()
            fields["lfs"] = {"oid": oid, "size": len(value), "pointerSize": 134}
        return fields

    def asked(self, repository: str = ID) -> set[str]:
        """The files that were asked about or for."""
        return {name for _, r, name, _ in self.requests if r in (repository, "cdn") and name}

    def fetched(self, repository: str = ID) -> set[str]:
        """The files whose content was asked for."""
        small = {n for m, r, n, _ in self.requests if (m, r) == ("GET", repository) and n}
        large = {n for m, r, n, _ in self.requests if (m, r) == ("GET", "cdn")}
        return {n for n in small if not n.endswith(_LARGE)} | large


def reset_client():
    """Forget connections and what the client read from the environment."""
    for name in ("close_session", "reset_sessions"):
        getattr(utils, name, lambda: None)()


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """A fake hub with one Stanford checkpoint, an empty cache and no token."""
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.setenv(name, "127.0.0.1,localhost")
    reset_client()
    server = FakeHub()
    for name, value in {
        "ENDPOINT": server.url,
        "HUGGINGFACE_CO_URL_TEMPLATE": server.url + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_CACHE": str(tmp_path / "cache"),
        "HF_HUB_OFFLINE": False,
        "HF_TOKEN_PATH": str(tmp_path / "token"),
    }.items():
        monkeypatch.setattr(constants, name, value)
        if hasattr(file_download, name):  # versions before 1.0 import one by name
            monkeypatch.setattr(file_download, name, value)
    yield server
    server.stop()
    reset_client()


@pytest.fixture
def served(fake, stanford_folder, tmp_path) -> Path:
    """The folder that the fake hub serves as `ID`, with junk beside the checkpoint."""
    folder = shutil.copytree(stanford_folder, tmp_path / "served")
    scatter(folder)
    fake.push(folder)
    return folder


def scatter(folder: Path):
    for name in JUNK:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"{{}} {name}")


def files_of(folder: Path) -> set[str]:
    return {f.relative_to(folder).as_posix() for f in folder.rglob("*") if f.is_file()}


def offline(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


def assert_same(found, expected):
    assert found.config == expected.config and found.encoder == expected.encoder
    jax.tree.map(np.testing.assert_array_equal, found.params, expected.params)


# --- What is fetched ------------------------------------------------------------------------


def test_an_id_gives_the_embeddings_of_its_folder(fake, served, model, texts):
    found = ColBERT.from_pretrained(ID, dtype="float32", devices=jax.devices()[:1])
    assert found.fingerprint() == model.fingerprint() and found.load == {"name_or_path": ID}
    expected = model.encode_documents(texts[:20])
    assert (found.encode_documents(texts[:20]).values == expected.values).all()
    assert fake.fetched() == STANFORD


def shard(file: Path, name: str, write):
    """Two shards and their index in place of one safetensors file."""
    tensors, weight_map = load_file(file), {}
    stem, suffix = name.split(".")
    for n in (1, 2):
        part = f"{stem}-{n:05}-of-00002.{suffix}"
        keys = sorted(tensors)[n - 1 :: 2]
        write({key: tensors[key] for key in keys}, file.parent / part)
        weight_map |= dict.fromkeys(keys, part)
    file.unlink()
    index = json.dumps({"metadata": {}, "weight_map": weight_map})
    (file.parent / f"{name}.index.json").write_text(index)


def torch_writer(tensors, file):
    write_torch_file(file, tensors)


def stanford_and_torch(folder):
    torch_writer(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    return STANFORD


def sharded(folder):
    stanford_and_torch(folder)
    shard(folder / "model.safetensors", "model.safetensors", save_file)
    parts = {f"model-0000{n}-of-00002.safetensors" for n in (1, 2)}
    return STANFORD - {"model.safetensors"} | parts | {"model.safetensors.index.json"}


def only_torch(folder):
    stanford_and_torch(folder)
    (folder / "model.safetensors").unlink()
    return STANFORD - {"model.safetensors"} | {"pytorch_model.bin"}


def sharded_torch(folder):
    shard(folder / "model.safetensors", "pytorch_model.bin", torch_writer)
    parts = {f"pytorch_model-0000{n}-of-00002.bin" for n in (1, 2)}
    return STANFORD - {"model.safetensors"} | parts | {"pytorch_model.bin.index.json"}


def layout(name, *expected):
    def write(folder):
        checkpoint = read_checkpoint(folder)
        shutil.rmtree(folder)
        write_checkpoint(checkpoint, folder, name)
        assert set(expected) <= files_of(folder)
        return files_of(folder)

    write.__name__ = name
    return write


TOKENIZERS = [f"{side}_tokenizer/vocab.txt" for side in ("query", "context")]
DENSE = ["modules.json", "1_Dense/config.json", "1_Dense/model.safetensors"]


@pytest.mark.parametrize(
    "prepare",
    [
        stanford_and_torch,
        sharded,
        only_torch,
        sharded_torch,
        layout("flmr", *TOKENIZERS),
        layout("pylate", *DENSE),
        layout("sentence-transformers", *DENSE),
        layout("native", "colbert_jax.json"),
        layout("colbertv1", "colbert.dnn", "config.json"),
    ],
    ids=lambda f: f.__name__,
)
def test_only_what_the_readers_open_is_fetched(fake, stanford_folder, tmp_path, prepare):
    folder = shutil.copytree(stanford_folder, tmp_path / "folder")
    expected = prepare(folder)
    scatter(folder)
    fake.push(folder)
    found = hub.fetch(ID)
    assert files_of(found) == fake.asked() == expected
    assert_same(read_checkpoint(found), read_checkpoint(folder))


def test_the_base_model_of_a_file_is_fetched_without_weights(fake, plain_folder, tmp_path):
    """The file names `bert-base-uncased`, which the hub has renamed since."""
    base = shutil.copytree(plain_folder, tmp_path / "base")
    fake.push(base, "google-bert/bert-base-uncased")
    fake.renamed["bert-base-uncased"] = "google-bert/bert-base-uncased"
    file = tmp_path / "colbert.dnn"
    write_torch_file(file, {"arguments": {"dim": 8}, "model_state_dict": {}})
    path, folder = hub.resolve_checkpoint(file)
    assert path == file and files_of(folder) == {
        "config.json",
        "tokenizer_config.json",
        "vocab.txt",
    }
    assert fake.asked("google-bert/bert-base-uncased") == files_of(folder)
    assert hub.resolve_checkpoint(file, base=base) == (file, base)
    with pytest.raises(ValueError, match=r"base is for a \.dnn file only"):
        hub.resolve_checkpoint(ID, base=base)


def test_a_branch_or_a_commit(fake, served, tmp_path):
    other = support.write_stanford(tmp_path / "other", query_maxlen=20)
    only_torch(other)  # so that it has other files as well
    commit, first = fake.push(other, revision="v2"), fake.push(served)
    for revision, query_maxlen in ((None, 16), ("v2", 20), (commit, 20), (first, 16)):
        found = hub.fetch(ID, revision=revision)
        assert read_checkpoint(found).config.text.query_maxlen == query_maxlen, revision


def test_a_repository_without_a_checkpoint(fake, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "README.md").touch()
    fake.push(tmp_path / "empty")
    with pytest.raises(FileNotFoundError, match=r"holds no checkpoint\. .* config\.json"):
        hub.fetch(ID)


def test_an_index_remembers_the_revision(fake, served, tmp_path, texts):
    fake.push(served, revision="v1")
    fake.private.add(ID)
    arguments = dict(token=TOKEN, dtype="float32", devices=jax.devices()[:1])
    model = ColBERT.from_pretrained(ID, revision="v1", **arguments)
    assert model.load == {"name_or_path": ID, "revision": "v1"}
    index = Index.build(tmp_path / "i", model, texts[:30])
    assert TOKEN not in (index.path / "metadata.json").read_text()
    fake.push(support.write_stanford(tmp_path / "newer", seed=5))  # main goes on
    again = Retriever.open(index.path, **arguments).model
    assert again.load == model.load and again.fingerprint() == model.fingerprint()
    with pytest.raises(FileNotFoundError, match=r"no repository .* was built with it"):
        Retriever.open(index)  # without the token


# --- Tokens and refusals --------------------------------------------------------------------


def test_the_token_is_sent_to_the_hub_and_nowhere_else(fake, served, monkeypatch):
    fake.private.add(ID)
    with pytest.raises(FileNotFoundError, match=r"no repository .* pass token=, or set HF_TOKEN"):
        hub.fetch(ID)
    fake.requests.clear()
    hub.fetch(ID, token=TOKEN)
    assert {token for _, repository, _, token in fake.requests if repository == ID} == {TOKEN}
    assert {token for _, repository, _, token in fake.requests if repository == "cdn"} == {None}
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    hub.fetch(ID)
    with pytest.raises(FileNotFoundError, match="no repository"):
        hub.fetch(ID, token=False)


def test_a_wrong_token(fake, served):
    with pytest.raises(FileNotFoundError, match=r"401.*Unauthorized.* Check the token: token="):
        hub.fetch(ID, token="hf_of_nobody")


@pytest.mark.parametrize("token", [None, TOKEN])
def test_a_gated_repository(fake, served, token):
    fake.gated.add(ID)
    with pytest.raises(FileNotFoundError, match=r"is gated\. Accept its terms there"):
        hub.fetch(ID, token=token)
    fake.gated.clear()
    assert files_of(hub.fetch(ID, token=token)) == STANFORD


def test_what_the_hub_does_not_have(fake, served):
    with pytest.raises(FileNotFoundError, match=r"^some/thing: .* no repository .* spelling"):
        hub.fetch("some/thing")
    with pytest.raises(FileNotFoundError, match=rf"^{ID}@v9: .* has no revision 'v9'"):
        hub.fetch(ID, revision="v9")
    assert fake.fetched() == set()


# --- Names that never reach the hub ---------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("a/b/c", "no such checkpoint folder"),
        ("../x", "no such checkpoint folder"),
        ("~/x", "no such checkpoint folder"),
        ("/nowhere/x", "no such checkpoint folder"),
        ("no such folder", "neither a local folder nor a hub id"),
        ("a/b@v1", "neither a local folder nor a hub id"),
        ("a--b/c", "neither a local folder nor a hub id"),
        ("a/", "neither a local folder nor a hub id"),
    ],
)
def test_malformed_names(fake, tmp_path, monkeypatch, name, message):
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        with pytest.raises(FileNotFoundError, match=f"^{name}: {message}"):
            hub.resolve(name)
        offline(monkeypatch)
    assert fake.requests == []


def test_what_is_here_wins(fake, served, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(served, Path(ID))
    assert hub.resolve(ID, revision="v9", token=TOKEN) == Path(ID)
    assert hub.resolve(str(tmp_path / ID)) == tmp_path / ID
    Path("somebody/file").touch()
    for name in ("somebody/file", tmp_path / "somebody" / "file"):
        with pytest.raises(FileNotFoundError, match=r"a file; a checkpoint is a folder"):
            hub.resolve(name)
    assert fake.requests == []


# --- The cache ------------------------------------------------------------------------------


def test_nothing_is_fetched_twice(fake, served):
    first = hub.fetch(ID)
    fake.requests.clear()
    assert hub.fetch(ID) == first and fake.fetched() == set()
    metadata = json.loads((served / "artifact.metadata").read_text()) | {"query_maxlen": 20}
    (served / "artifact.metadata").write_text(json.dumps(metadata))
    fake.push(served)
    second = hub.fetch(ID)
    assert second != first and fake.fetched() == {"artifact.metadata"}
    assert read_checkpoint(second).config.text.query_maxlen == 20
    assert read_checkpoint(first).config.text.query_maxlen == 16


@pytest.mark.parametrize("revision", [None, "v1"])
@pytest.mark.parametrize("reason", ["down", "offline", "trouble", "silent"])
def test_the_cache_serves_where_the_hub_does_not(fake, served, monkeypatch, reason, revision):
    fake.push(served, revision="v1")
    first = hub.fetch(ID, revision=revision)
    fake.requests.clear()
    break_hub(fake, monkeypatch, reason)
    started = time.monotonic()
    assert hub.fetch(ID, revision=revision) == first
    assert time.monotonic() - started < 3
    assert_same(read_checkpoint(first), read_checkpoint(served))
    assert fake.fetched() == set() and (reason != "offline" or fake.requests == [])


def break_hub(fake, monkeypatch, reason):
    if reason == "down":
        fake.stop()
    elif reason == "offline":
        offline(monkeypatch)
    elif reason == "trouble":
        fake.trouble = 503
    else:  # it takes connections and says nothing
        fake.released.clear()
        monkeypatch.setattr(constants, "HF_HUB_ETAG_TIMEOUT", 0.3)


@pytest.mark.parametrize(
    ("reason", "message"),
    [
        ("down", "refused"),
        ("offline", "HF_HUB_OFFLINE is set"),
        ("trouble", "503.*Service Unavailable"),
        ("silent", "timed out"),
    ],
)
def test_without_hub_and_cache_the_alternative_is_named(fake, monkeypatch, reason, message):
    """At once, and not after the client's half a minute of retries."""
    break_hub(fake, monkeypatch, reason)
    started = time.monotonic()
    with pytest.raises(
        FileNotFoundError,
        match=rf"^{ID}: .* did not provide it \(.*{message}.*\) and it is not in the cache\. "
        "Without the hub, download the checkpoint elsewhere and pass its folder",
    ):
        ColBERT.from_pretrained(ID)
    assert time.monotonic() - started < 3


def test_another_revision_is_not_in_the_cache(fake, served, monkeypatch):
    fake.push(served, revision="v1")
    hub.fetch(ID)
    offline(monkeypatch)
    with pytest.raises(FileNotFoundError, match=rf"^{ID}@v1: .* and it is not in the cache"):
        hub.fetch(ID, revision="v1")


def test_the_environment_is_honoured(fake, served):
    """HF_HUB_OFFLINE and HF_HUB_CACHE, which the client reads when it is imported."""
    folder = hub.fetch(ID)
    fake.requests.clear()
    settings = {"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": constants.HF_HUB_CACHE}
    run = subprocess.run(
        [
            sys.executable,
            "-c",
            f"from colbert_jax.checkpoints import hub; print(hub.fetch({ID!r}))",
        ],
        env=os.environ | settings | {"HF_ENDPOINT": fake.url},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == str(folder) and fake.requests == []


# --- A cache that holds only a part ---------------------------------------------------------


def test_an_interrupted_download_is_not_read(fake, served, monkeypatch):
    fake.broken.add("model.safetensors")
    with pytest.raises(FileNotFoundError, match=r"did not provide it \(404"):
        read_checkpoint(hub.fetch(ID))
    offline(monkeypatch)
    # Of older clients, which keep no listing, the reader says it.
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors") as caught:
        read_checkpoint(hub.fetch(ID))
    if hasattr(huggingface_hub, "get_cached_repo_tree"):
        assert "; its copy in the cache lacks " in str(caught.value)
    fake.broken.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    assert_same(read_checkpoint(hub.fetch(ID)), read_checkpoint(served))


@pytest.mark.parametrize("names", [{"config.json"}, STANFORD - {"artifact.metadata"}])
def test_what_another_library_cached_is_not_taken_for_all(fake, served, monkeypatch, names):
    """Without its metadata a Stanford checkpoint would get other settings, in silence."""
    for name in names:
        folder = Path(huggingface_hub.hf_hub_download(ID, name)).parent
    offline(monkeypatch)
    with pytest.raises(
        FileNotFoundError, match=r"HF_HUB_OFFLINE is set\); .* may be incomplete"
    ) as e:
        hub.fetch(ID)
    assert f": {folder}. Without the hub" in str(e.value)
    assert hub.resolve(folder) == folder


def test_a_full_download_by_another_tool_serves(fake, served):
    folder = Path(huggingface_hub.snapshot_download(ID))
    assert len(files_of(folder)) == len(STANFORD) + len(JUNK)
    fake.stop()
    assert hub.fetch(ID) == folder


def test_a_full_download_by_an_older_client_serves(fake, plain_folder, tmp_path):
    """It kept no listing. A plain encoder has nothing else that tells it from a part of another."""
    folder = shutil.copytree(plain_folder, tmp_path / "plain")
    (folder / ".gitattributes").touch()
    fake.push(folder)
    for name in files_of(folder):
        huggingface_hub.hf_hub_download(ID, name)
    fake.stop()
    assert_same(read_checkpoint(hub.fetch(ID)), read_checkpoint(plain_folder))


def test_a_download_that_breaks_off_is_not_read(fake, served):
    """Where the listing fails, newer clients give what they have of a snapshot as if it were it."""
    huggingface_hub.hf_hub_download(ID, "config.json")
    fake.broken.add("tree")
    if hasattr(huggingface_hub, "get_cached_repo_tree"):
        with pytest.raises(
            FileNotFoundError, match=r"did not provide it \(.*\); .* lacks .* and 1"
        ):
            hub.fetch(ID)
        fake.broken.clear()
    assert files_of(hub.fetch(ID)) == STANFORD


def test_a_file_lost_from_the_cache(fake, served, monkeypatch):
    (hub.fetch(ID) / "vocab.txt").unlink()
    offline(monkeypatch)
    if hasattr(huggingface_hub, "get_cached_repo_tree"):
        with pytest.raises(FileNotFoundError, match=r"in the cache lacks vocab\.txt: "):
            hub.fetch(ID)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    assert files_of(hub.fetch(ID)) == STANFORD


def test_weights_that_are_neither_read_nor_fetched_are_named(fake, plain_folder, tmp_path):
    folder = shutil.copytree(plain_folder, tmp_path / "plain")
    for name in ("ema.pt", "projection.pt", "training_args.bin"):
        (folder / name).write_bytes(b"x")
    fake.push(folder)
    with pytest.warns(UserWarning, match=rf"{ID}: weights in ema\.pt are not read: "):
        found = hub.fetch(ID)
    assert files_of(found) == files_of(plain_folder) | {"projection.pt"}
    with pytest.raises(ValueError, match=r"projection\.pt: by its name a head"):
        read_checkpoint(found)
