"""Damage small checkpoints of every layout and load them.

    python tests/campaigns/damaged_checkpoints.py --count 2000 --seed 0

Each trial damages one file (or exchanges two) of one checkpoint and reads it. Right is an error
that names a file of the folder, or the undamaged model: the same parameters, settings and token
ids. A warning that names the folder makes another model right too; without one only damage that no
reader can see, changed bytes inside a value, may give one. Everything else is a fault: a crash, a
hang, an error of another kind, another model in silence. A trial depends on the seed and its
number alone.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
import tempfile
import warnings
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import support  # noqa: E402
from campaigns.common import (  # noqa: E402
    Campaign,
    Damage,
    delete,
    flip,
    junk,
    replace,
    swap,
    truncate,
    unreadable,
    wrong_type,
    zeros,
)

TEXTS = ["What is the CAPITAL of Paris, 42nd?", "fish", "", "the river runs. " * 20]


# --- Checkpoints ----------------------------------------------------------------------------


def write_sources(root: Path) -> None:
    """One folder for each layout, and for each form of weights and tokenizer."""
    from safetensors.numpy import load_file, save_file
    from tokenizers import BertWordPieceTokenizer

    from colbert_jax.checkpoints import convert_checkpoint
    from colbert_jax.tensors.torch_file import write_torch_file

    stanford = support.write_stanford(root / "stanford", nbits=4)
    support.write_plain(root / "huggingface")
    support.write_flmr(root / "flmr")
    support.write_flmr(root / "flmr-two", separate=True)
    for layout in ("native", "pylate", "sentence-transformers", "colbertv1"):
        convert_checkpoint(stanford, root / layout, layout)

    single = support.write_plain(root / "single-vector")
    BertWordPieceTokenizer(str(single / "vocab.txt")).save(str(single / "tokenizer.json"))
    entries = [("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Dense", "Dense")]
    modules = [
        {"path": path, "type": f"sentence_transformers.models.{kind}"} for path, kind in entries
    ]
    (single / "modules.json").write_text(json.dumps(modules))
    (single / "1_Pooling").mkdir()
    (single / "1_Pooling" / "config.json").write_text('{"pooling_mode_mean_tokens": true}')
    shutil.copytree(root / "pylate" / "1_Dense", single / "2_Dense")
    settings = {"prompts": {"query": "query: ", "document": "passage: "}}
    (single / "config_sentence_transformers.json").write_text(json.dumps(settings))
    (single / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 40}))

    plain = shutil.copytree(single, root / "single-vector-plain")
    shutil.rmtree(plain / "2_Dense")
    (plain / "modules.json").write_text(json.dumps(modules[:2]))

    cased = shutil.copytree(root / "huggingface", root / "cased")
    (cased / "tokenizer_config.json").write_text('{"do_lower_case": false}')

    tensors = load_file(stanford / "model.safetensors")
    torch = shutil.copytree(stanford, root / "torch")
    (torch / "model.safetensors").unlink()
    write_torch_file(torch / "pytorch_model.bin", tensors)

    shards = shutil.copytree(stanford, root / "shards")
    (shards / "model.safetensors").unlink()
    names, places = sorted(tensors), {}
    for part, some in enumerate((names[::2], names[1::2]), 1):
        shard = f"model-{part:05}-of-00002.safetensors"
        save_file({name: tensors[name] for name in some}, shards / shard)
        places |= dict.fromkeys(some, shard)
    index = {"metadata": {}, "weight_map": places}
    (shards / "model.safetensors.index.json").write_text(json.dumps(index))


# Bytes changed inside a value leave a valid file of other values, which no reader can tell.
UNSEEN: tuple[Damage, ...] = (flip, zeros)
KINDS: tuple[Damage, ...] = (
    truncate, flip, zeros, junk, replace, delete, unreadable, swap, wrong_type, wrong_type,
)  # fmt: skip


# --- A trial --------------------------------------------------------------------------------


def load(path: Path) -> str:
    """Read a checkpoint: a hash of all that embeddings depend on."""
    import jax

    from colbert_jax.checkpoints import read_checkpoint

    checkpoint = read_checkpoint(path)
    tokenizer = checkpoint.text_tokenizer()
    digest = hashlib.sha256(repr((checkpoint.encoder, checkpoint.config.text)).encode())
    for role in ("queries", "documents"):
        ids, attended = getattr(tokenizer, role)(TEXTS)
        digest.update(repr([[row.tolist() for row in ids], attended.tolist()]).encode())
        digest.update(repr([tokenizer.kept(row).tolist() for row in ids]).encode())
    for where, array in jax.tree.leaves_with_path((checkpoint.params, checkpoint.query_params)):
        digest.update(f"{where}{array.shape}".encode() + np.asarray(array).tobytes())
    return digest.hexdigest()


def trial(sources: Path, seed: int, number: int, expected: dict[str, str]) -> dict[str, str]:
    """Damage a copy and read it: what was done, and the verdict; one that begins with "fault"."""
    rng = np.random.default_rng([seed, number])
    names = sorted(expected)
    name = names[int(rng.integers(len(names)))]
    damage = KINDS[int(rng.integers(len(KINDS)))]
    with tempfile.TemporaryDirectory() as place:
        folder = shutil.copytree(sources / name, Path(place) / name)
        files = sorted(file for file in folder.rglob("*") if file.is_file())
        known = {file.name for file in files} | {file.parent.name for file in files} - {name}
        known.add("model.safetensors")  # which is asked for where no weights are left
        done = f"{name}: {damage(folder, files, rng)}"
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            try:
                got = load(folder)
                said = [w for w in warned if str(folder) in str(w.message)]
                if got == expected[name]:
                    verdict = "the same model"
                elif said:
                    verdict = "another model, with a warning"
                elif damage in UNSEEN:
                    verdict = "other values"
                else:
                    verdict = "fault: another model in silence"
            except (ValueError, OSError) as error:
                message = str(error)
                rest = message.replace(str(folder), "")
                named = str(folder) in message and any(known_ in rest for known_ in known)
                if named and len(message) < 2000:
                    verdict = "an error"
                else:
                    verdict = f"fault: names no file: {message[:300]!r}"
            except BaseException as error:  # a Rust panic is no Exception
                verdict = f"fault: {type(error).__name__}: {str(error)[:300]!r}"
    return {"done": done, "verdict": verdict}


def load_all(sources: Path) -> dict[str, str]:
    return {folder.name: load(folder) for folder in sorted(sources.iterdir())}


CAMPAIGN = Campaign(__file__, write_sources, load_all, trial)

if __name__ == "__main__":
    sys.exit(CAMPAIGN.main(__doc__.split("\n")[0], 2000))
