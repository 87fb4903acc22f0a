import json
from contextlib import contextmanager
from functools import wraps
from pathlib import Path

import jax
import numpy as np
import pytest
import support

from colbert_jax.data.examples import stanford_examples
from colbert_jax.training import flmr, step, trainer


@pytest.fixture(scope="session")
def files(tmp_path_factory) -> dict[str, Path]:
    """21 four-way examples with scores, over 60 passages."""
    folder = tmp_path_factory.mktemp("data")
    texts = support.passages(60, seed=1)
    rng = np.random.default_rng(2)
    lines = []
    for qid in range(21):
        pids = rng.choice(60, 4, replace=False)
        scores = np.sort(rng.normal(0, 3, 4))[::-1]
        lines.append([qid, *([int(p), float(s)] for p, s in zip(pids, scores, strict=True))])
    (folder / "collection.tsv").write_text("".join(f"{i}\t{t}\n" for i, t in enumerate(texts)))
    queries = support.passages(21, seed=3, longest=8)
    (folder / "queries.tsv").write_text("".join(f"{i}\t{t}\n" for i, t in enumerate(queries)))
    (folder / "examples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    qrels = "".join(f"{line[0]} 0 {line[1][0]} 1\n" for line in lines)
    (folder / "qrels.tsv").write_text(qrels)
    names = ("examples.jsonl", "queries.tsv", "collection.tsv", "qrels.tsv")
    return {name.split(".")[0]: folder / name for name in names}


@pytest.fixture(scope="session")
def source(files):
    return stanford_examples(files["examples"], files["queries"], files["collection"])


def made_once(function):
    """The function, which gives for the same arguments the same object."""
    made = {}

    @wraps(function)
    def find(*arguments):
        leaves, structure = jax.tree.flatten(arguments)
        key = structure, *leaves
        if key not in made:
            made[key] = function(*arguments)
        return made[key]

    return find


@pytest.fixture(scope="module")
def shared_programs():
    """Runs of a file that have the same settings share their programs: else each traces its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "make_loss", made_once(trainer.make_loss))
        patch.setattr(flmr._Loss, "make", made_once(flmr._Loss.make))
        for name in ("gradients_of", "make_update"):
            patch.setattr(step, name, made_once(getattr(step, name)))
        yield


class Stop(Exception):
    pass


@pytest.fixture
def stopped_after(monkeypatch):
    """A context for a run that ends with an error once it has made so many steps."""

    @contextmanager
    def context(steps: int):
        original, count = trainer.make_step, 0

        def stopping(*args):
            step = original(*args)

            def counted(*args):
                nonlocal count
                if count == steps:
                    raise Stop
                count += 1
                return step(*args)

            return counted

        with monkeypatch.context() as patch, pytest.raises(Stop):
            patch.setattr(trainer, "make_step", stopping)
            yield

    return context
