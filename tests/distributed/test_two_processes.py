"""Two real processes on loopback under `jax.distributed`, one device each."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from support import passages, unit_rows, write_stanford

from colbert_jax import ColBERT, Index
from colbert_jax.compression.sharding import data_mesh
from colbert_jax.config import IndexConfig, TrainingConfig
from colbert_jax.index import format as fmt
from colbert_jax.index import sources
from colbert_jax.index.build import build_index
from colbert_jax.training import Task, stanford_examples, train
from colbert_jax.training.loader import TASK_SETTINGS

pytestmark = pytest.mark.slow

ARRAYS = ("centroids", "bucket_cutoffs", "bucket_weights", "codes", "residuals", "offsets")
ARRAYS += ("lists", "list_offsets")

TRIES = 4
HANGING = 1800.0  # seconds after which two processes are stuck, however busy the machine is
GRACE = 60.0  # seconds in which a process notices that the other has failed
# What Gloo and the coordination service say where a process is too slow to answer.
CONNECTION = re.compile(
    r"Gloo [\w -]+ failed|DEADLINE_EXCEEDED|UNAVAILABLE|heartbeat|"
    r"[Tt]imed out|Connection (closed|refused|reset)"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, shallow_folder) -> Path:
    """What the two processes of `worker.py` leave behind."""
    for _ in range(TRIES):
        folder = tmp_path_factory.mktemp("job")
        write_job(folder, shallow_folder)
        codes = launch(folder)
        if not lost_connection(folder, codes):
            break
    assert codes == [0, 0], "\n".join(log.read_text() for log in sorted(folder.glob("log.*")))
    return folder


def lost_connection(folder: Path, codes: list[int]) -> bool:
    """Whether nothing went wrong but a connection between the two, as on a busy machine."""
    if codes == [0, 0]:
        return any(CONNECTION.search(file.read_text()) for file in folder.glob("report.*.json"))
    ended = [n for n, code in enumerate(codes) if code not in (0, -signal.SIGKILL)]
    return bool(ended) and all(CONNECTION.search((folder / f"log.{n}").read_text()) for n in ended)


GLOO = "jax.errors.JaxRuntimeError: UNKNOWN: Gloo context initialization failed: timed out"
WRONG = "AssertionError: 3 is not 4"


@pytest.mark.parametrize(
    ("codes", "logs", "report", "lost"),
    [
        ([0, 0], ["", ""], "{}", False),
        ([0, 0], ["", ""], GLOO, True),  # a build ended so, and the process went on
        ([1, 1], [GLOO, GLOO], None, True),
        ([1, -9], [GLOO, ""], None, True),
        ([1, -6], [WRONG, GLOO], None, False),  # who fails leaves the other without a peer
        ([1, -9], [WRONG, ""], None, False),
        ([-9, -9], ["", ""], None, False),
    ],
)
def test_only_a_lost_connection_is_tried_again(tmp_path, codes, logs, report, lost):
    for n, log in enumerate(logs):
        (tmp_path / f"log.{n}").write_text(log)
    if report is not None:
        (tmp_path / "report.1.json").write_text(report)
    assert lost_connection(tmp_path, codes) == lost


def launch(folder: Path) -> list[int]:
    """Run both processes to their end; their exit codes.

    They may take as long as they need; one that waits for the other's end is killed after a while.
    """
    with socket.socket() as reserved:
        # Bound and not listening: kept from everybody but the coordinator, which shares ports.
        reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        reserved.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{reserved.getsockname()[1]}"
        # One process is told its place, the other finds it as under Slurm.
        told = {"COORDINATOR": address, "NUM_PROCESSES": "2", "PROCESS_ID": "0"}
        slurm = {f"SLURM_{name}": "1" for name in ("JOB_ID", "PROCID", "STEP_NUM_NODES")}
        slurm |= {"SLURM_LOCALID": "0", "SLURM_NTASKS": "2", "SLURM_STEP_NODELIST": "localhost"}
        found = slurm | {"JAX_COORDINATOR_ADDRESS": address}
        script = Path(__file__).with_name("worker.py")
        processes = []
        for n, place in enumerate((told, found)):
            with (folder / f"log.{n}").open("w") as stream:
                processes.append(
                    subprocess.Popen(
                        [sys.executable, str(script)],
                        cwd=folder,
                        env=os.environ | {"JAX_COORDINATOR_BIND_ADDRESS": address} | place,
                        stdout=stream,
                        stderr=subprocess.STDOUT,
                    )
                )
        try:
            end = time.monotonic() + HANGING
            while None in (codes := [process.poll() for process in processes]):
                if any(codes):
                    end = min(end, time.monotonic() + GRACE)
                if time.monotonic() > end:
                    break
                time.sleep(0.1)
        finally:
            for process in processes:
                process.kill()
                process.wait()
    return [process.returncode for process in processes]


def write_job(folder: Path, checkpoint: Path) -> None:
    """What the two processes start from."""
    (folder / "checkpoint").symlink_to(checkpoint)
    write_stanford(folder / "teacher", {"num_hidden_layers": 1}, seed=5)
    (folder / "passages.txt").write_text("\n".join(passages(200, longest=6)))
    rng = np.random.default_rng(0)
    lengths = rng.integers(0, 12, 500)
    lengths[-1] = 3
    np.save(folder / "values.npy", unit_rows(rng, lengths.sum(), 16))
    np.save(folder / "lengths.npy", lengths)
    write_examples(folder)


def write_examples(folder: Path) -> None:
    """The files that the guide trains on."""
    rng = np.random.default_rng(1)
    lines = []
    for qid in range(20):
        pids = rng.choice(50, 4, replace=False).tolist()
        lines.append(json.dumps([qid, *([pid, float(-n)] for n, pid in enumerate(pids))]))
    (folder / "examples.jsonl").write_text("\n".join(lines))
    for name, texts in (("queries", passages(20, 2, 8)), ("collection", passages(50, 3))):
        rows = (f"{i}\t{text}\n" for i, text in enumerate(texts))
        (folder / f"{name}.tsv").write_text("".join(rows))


@pytest.fixture(scope="module")
def reports(folder) -> list[dict]:
    return [json.loads((folder / f"report.{n}.json").read_text()) for n in range(2)]


@pytest.fixture(scope="module")
def model(shallow_folder) -> ColBERT:
    return ColBERT.from_pretrained(shallow_folder, dtype="float32", devices=jax.devices()[:1])


@pytest.fixture(scope="module")
def alone(folder, tmp_path_factory) -> Path:
    """The same index by one process with two devices."""
    path = tmp_path_factory.mktemp("alone") / "plain"
    data = {name: np.load(folder / f"{name}.npy") for name in ("values", "lengths")}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "CHUNK_TOKENS", 256)
        build_index(
            path,
            lambda: sources.EmbeddingSource(**data),
            IndexConfig(learned_dim=8),
            mesh=data_mesh(jax.devices()[:2]),
        )
    return path


def test_same_index_as_one_process(folder, reports, alone):
    assert [report["plain"] for report in reports] == ["", ""]
    ours, expected = fmt.open_arrays(folder / "plain")[2], fmt.open_arrays(alone)[2]
    for name in ARRAYS:
        np.testing.assert_array_equal(ours[name], expected[name], err_msg=name)
    for name in fmt.PREDICTOR:
        np.testing.assert_allclose(ours[name], expected[name], rtol=1e-4, atol=1e-5, err_msg=name)
    # Documents were taken in other blocks, so a unit may be rounded otherwise.
    vectors = (arrays["learned_vectors"].astype(int) for arrays in (ours, expected))
    assert np.abs(np.subtract(*vectors)).max() <= 1
    np.testing.assert_allclose(ours["learned_scales"], expected["learned_scales"], rtol=1e-3)
    Index.open(folder / "plain").verify()
    assert {f.name for f in (folder / "plain").iterdir()} == {f.name for f in alone.iterdir()}


def test_the_guides_script(folder, reports, model, tmp_path):
    """From passages: process 0 alone reads them, each encodes its share."""
    texts = passages(200, longest=6)
    assert [report["guide"] for report in reports] == [[200, texts[3]]] * 2
    index = Index.open(folder / "wiki.index")
    index.verify()
    assert list(index.texts) == texts
    for process in range(2):
        assert f"process {process} of 2: Index(" in (folder / f"log.{process}").read_text()
    # The embeddings are those of one process: every passage finds itself, with a score near Lq.
    documents = model.encode_documents(texts[::20], progress=False)
    hits = index.search(documents.padded(48)[0], k=1, mode="exact")
    assert hits.positions[:, 0].tolist() == list(range(0, 200, 20))
    assert (hits.scores[:, 0] > 0.9 * documents.lengths).all()


def test_searching_over_both_ranks_as_one_process(folder, reports, model):
    """The guide's search, with documents spread over the two processes."""
    assert reports[0]["hits"] == reports[1]["hits"]
    ids, scores = map(np.array, reports[0]["hits"])
    mesh = data_mesh(jax.devices()[:1])
    index = Index.open(folder / "wiki.index", mesh=mesh)
    expected = index.search(model.encode_queries(["who wrote Dune?", "heat flow"]), k=10)
    np.testing.assert_allclose(scores, expected.scores, rtol=1e-5)
    apart = np.abs(np.diff(expected.scores, axis=1, prepend=np.inf)) > 1e-4
    apart &= np.abs(np.diff(expected.scores, axis=1, append=-np.inf)) > 1e-4
    assert apart.mean() > 0.5
    np.testing.assert_array_equal(ids[apart], expected.positions[apart])


def test_an_error_reaches_both_and_the_build_resumes(folder, reports, alone):
    assert reports[0]["failed"] == "PeerError('process 1 failed: OSError: no space left')"
    assert reports[1]["failed"] == "OSError('no space left')"
    assert 0 < reports[1]["committed"] < 500  # its first chunk
    assert [report["resumed"] for report in reports] == ["", ""]
    whole, resumed = (fmt.open_arrays(folder / name)[2] for name in ("plain", "resumed"))
    for name in ARRAYS:
        np.testing.assert_array_equal(whole[name], resumed[name], err_msg=name)


def test_faults_of_one_process(folder, reports):
    first, second = reports
    for name, error in (
        ("k-means", "OSError('no space left')"),
        ("bad row", "has length 2; token embeddings must have unit length"),
        ("other settings", "process 1 builds with another settings than process 0"),
        ("not shared", "process 1 does not see it"),
    ):
        assert error in second[name], second[name]
        assert first[name].startswith("PeerError('process 1 failed: "), first[name]
    assert "FileExistsError" in first["taken"] and "process 0 failed" in second["taken"]
    assert not first["left behind"]


def run_losses(folder: Path) -> list[dict]:
    """Of each step the losses that it learned from, by name."""
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    named = ("loss", "coupled/loss", "coupled/coupled")
    return [{name: line[name] for name in named if name in line} for line in lines]


def test_training_as_in_one_process(folder, reports, shallow_folder, one_length, tmp_path):
    """SIGTERM to one process saves in both; they go on, and have the losses of one process, those
    of a task with a coupled teacher among them."""
    assert [report["stopped"] for report in reports] == ["terminated", "terminated"]
    assert [report["resumed run"] for report in reports] == ["12", "12"]
    names = (folder / f"{name}.tsv" for name in ("queries", "collection"))
    examples = stanford_examples(folder / "examples.jsonl", *names)
    run = json.loads((folder / "runs" / "stopped" / "run.json").read_text())
    (task,) = run["tasks"]
    settings = {name: task[name] for name in TASK_SETTINGS}
    devices = jax.devices()[:1]
    model, teacher = (
        ColBERT.from_pretrained(place, dtype="float32", devices=devices)
        for place in (shallow_folder, folder / "teacher")
    )
    train(
        model,
        examples,
        tmp_path,
        TrainingConfig(**run["training"]),
        tasks=[Task(task["name"], examples, task["share"], settings)],
        teacher=teacher,
        devices=devices,
    )
    two, one = run_losses(folder / "runs" / "stopped"), run_losses(tmp_path)
    assert len(two) == 12
    assert sum("coupled/coupled" in losses for losses in two) == 3
    for ours, expected in zip(two, one, strict=True):
        assert ours == pytest.approx(expected, rel=1e-3)
    assert (folder / "runs" / "colbert" / "last").is_dir()
