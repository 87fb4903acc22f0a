"""What long work says: a bar where somebody watches, lines in the log elsewhere."""

import io
import logging
import subprocess
import sys

import jax
import numpy as np
import pytest
from support import passages, unit_rows, write_stanford

from colbert_jax import ColBERT, Index, progress
from colbert_jax.config import TrainingConfig
from colbert_jax.data.examples import stanford_examples
from colbert_jax.progress import LOGGER, LogLines, Pace, log_to_stderr, progress_bar
from colbert_jax.training.trainer import train


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def lines(caplog, monkeypatch):
    """What the log has heard, as a function."""
    monkeypatch.setattr(LOGGER, "propagate", True)  # where caplog listens; a command ends it
    caplog.set_level(logging.INFO, "colbert_jax")
    return lambda: [record.getMessage() for record in caplog.records]


@pytest.fixture
def clean_logger():
    handlers, level, propagate = LOGGER.handlers[:], LOGGER.level, LOGGER.propagate
    LOGGER.handlers.clear()
    yield
    LOGGER.handlers[:] = handlers
    LOGGER.setLevel(level)
    LOGGER.propagate = propagate


def test_short_work_is_silent(clock, lines):
    with progress_bar(100, "encoding", "doc", pace=Pace(clock=clock)) as bar:
        for _ in range(100):
            clock.now += 0.099
            bar.update()
    assert lines() == []


def test_a_program_that_logs_warnings_only_has_no_bars_either(clean_logger, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    log_to_stderr(logging.WARNING)
    assert progress_bar(100, "encoding", "doc").disable
    log_to_stderr(logging.INFO)
    assert not progress_bar(100, "encoding", "doc").disable


def test_long_work_logs_now_and_then_and_its_end(clock, lines):
    """Ten seconds after it began, then every thirty, each with the rate since the last."""
    with progress_bar(10_000, "encoding", "doc", pace=Pace(clock=clock)) as bar:
        for rate in [10] * 10 + [100] * 69:
            clock.now += 1
            bar.update(rate)
        bar.update(3000)
    assert lines() == [
        "encoding: 100/10,000 (1 %), 10.0 doc/s, 16:30 left",
        "encoding: 3,100/10,000 (31 %), 100 doc/s, 1:09 left",
        "encoding: 6,100/10,000 (61 %), 100 doc/s, 0:39 left",
        "encoding: 10,000/10,000 (100 %), done after 1:19, 127 doc/s",
    ]


def test_slow_work_of_unknown_size(clock, lines):
    with progress_bar(None, "reading", "part", pace=Pace(clock=clock)) as bar:
        for _ in range(2):
            clock.now += 20
            bar.update()
    assert lines() == ["reading: 1, 20.0 s/part", "reading: 2, done after 0:40, 20.0 s/part"]


def test_rates_leave_out_what_an_earlier_run_did(clock, lines):
    bar = progress_bar(200, "training", "step", initial=100, pace=Pace(clock=clock))
    bar.set_postfix({"loss": "0.5000"}, refresh=False)
    clock.now += 10
    bar.update(20)
    clock.now += 3600
    bar.close()
    bar.close()
    assert lines() == [
        "training: 120/200 (60 %), 2.0 step/s, 0:40 left, loss 0.5000",
        "training: 120/200 (60 %), done after 1:00:10, 180.5 s/step, loss 0.5000",
    ]


def test_an_error_is_no_end(clock, lines):
    bar = progress_bar(4, "scoring", "pair", pace=Pace(clock=clock))
    with pytest.raises(KeyError), bar:
        clock.now += 10
        bar.update()
        raise KeyError
    assert lines()[-1] == "scoring: 1/4 (25 %), stopped after 0:10, 10.0 s/pair"


def test_nothing_to_do(clock, lines):
    with progress_bar(0, "scoring", "pair", pace=Pace(0, clock=clock)) as bar:
        bar.update(0)
    assert lines() == ["scoring: 0", "scoring: 0, done after 0:00"]


@pytest.mark.parametrize("watched", ["terminal", "notebook"])
@pytest.mark.parametrize("show", [None, True, False])
def test_a_bar_where_somebody_watches(watched, show, monkeypatch, lines):
    stderr = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stderr)
    if watched == "terminal":
        monkeypatch.setattr(stderr, "isatty", lambda: True)
    else:
        monkeypatch.setattr(progress, "_in_notebook", lambda: True)
    with progress_bar(2, "encoding", "doc", show, pace=Pace(0)) as bar:
        bar.update(2)
    assert ("encoding: 100%" in stderr.getvalue()) == (show is not False)
    assert lines() == []


def test_elsewhere(capsys, lines):
    for show, drawn, logged in ((True, True, 0), (False, False, 0), (None, False, 2)):
        with progress_bar(2, "encoding", "doc", show, pace=Pace(0)) as bar:
            bar.update(2)
        assert ("encoding: 100%" in capsys.readouterr().err) == drawn
        assert len(lines()) == logged
    assert isinstance(bar, LogLines)


def test_what_the_command_line_shows(clean_logger, capsys, monkeypatch):
    # absl adds such a handler to the root logger on its own when Orbax is imported.
    monkeypatch.setattr(logging.root, "handlers", [logging.StreamHandler()])
    LOGGER.info("not yet")
    log_to_stderr()
    log_to_stderr()
    LOGGER.info("once")
    log_to_stderr(logging.WARNING)
    LOGGER.info("not any more")
    shown = capsys.readouterr().err.splitlines()
    assert [line.split(" ", 1)[1] for line in shown] == ["once"]


NOTEBOOK = """
import logging, sys, types, warnings
import IPython
from flax import nnx
assert "tqdm.auto" not in sys.modules
sys.modules |= {"ipykernel.zmqshell": types.ModuleType("zmqshell"), "ipywidgets": None}
warnings.simplefilter("error")
from colbert_jax.progress import progress_bar
with progress_bar(3, "encoding", "doc", True) as bar:
    bar.update(3)
logger = logging.getLogger("colbert_jax")
print(logger.handlers, logger.level)
"""


def test_importing_adds_no_handler_and_needs_no_widgets():
    """In a notebook without ipywidgets, with warnings as errors, the bar is of text."""
    pytest.importorskip("IPython")
    done = subprocess.run([sys.executable, "-c", NOTEBOOK], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[] 0"
    assert "encoding: 100%" in done.stderr


@pytest.fixture
def at_once(monkeypatch):
    monkeypatch.setattr(progress, "PACE", Pace(0, 0))


def test_building_says_how_far_it_is(tmp_path, lines, at_once):
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 9, 60)
    Index.build(tmp_path / "i", embeddings=unit_rows(rng, lengths.sum(), 16), lengths=lengths)
    ends = [line for line in lines() if "(100 %), done after " in line]
    assert [line.split(":")[0] for line in ends] == [
        "encoding the sample",
        "k-means, 256 centroids",
        "compressing",
    ]


def test_training_says_how_far_it_is(tmp_path, lines, at_once):
    texts = passages(8, longest=4)
    for name in ("queries", "collection"):
        rows = (f"{i}\t{text}\n" for i, text in enumerate(texts))
        (tmp_path / f"{name}.tsv").write_text("".join(rows))
    (tmp_path / "triples.jsonl").write_text("".join(f"[{i}, {i}, {7 - i}]\n" for i in range(8)))
    names = (tmp_path / name for name in ("triples.jsonl", "queries.tsv", "collection.tsv"))
    config = TrainingConfig(
        loss="cross-entropy", nway=2, bsize=2, maxsteps=2, log_every=1, length_groups=1, warmup=1
    )
    checkpoint = write_stanford(tmp_path / "checkpoint", {"num_hidden_layers": 1})
    devices = jax.devices()[:1]
    model = ColBERT.from_pretrained(checkpoint, dtype="float32", devices=devices)
    train(model, stanford_examples(*names), tmp_path / "run", config, devices=devices)
    said = [line for line in lines() if line.startswith("training: ")]
    assert [line.split(",")[0] for line in said] == [
        "training: 1/2 (50 %)",
        "training: 2/2 (100 %)",
        "training: 2/2 (100 %)",
    ]
    assert "left, loss " in said[1] and "examples/s " in said[1]
