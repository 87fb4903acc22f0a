"""Recall of image queries on M2KR (Lin et al., 2024), as FLMR's own script measures it.

Recall@K of a question is 1 if one of the K best passages is a positive of it, by its id.
Pseudo Recall@K is 1 if one of them contains an answer: the answer stripped, and both in lower case.
Both are averaged over all questions.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from colbert_jax.data.m2kr import M2KR, Question
from colbert_jax.files import writing
from colbert_jax.flmr.modeling import FLMRModelForRetrieval
from colbert_jax.flmr.retrieval import (
    create_searcher,
    index_custom_collection,
    search_custom_collection,
)
from colbert_jax.images import ImageConfig, ImageError, pixel_blocks
from colbert_jax.progress import progress_bar

KS = (1, 5, 10, 20, 50, 100)
RECALL, PSEUDO_RECALL = "Recall", "Pseudo Recall"
_BLACK = np.zeros((336, 336, 3), np.uint8)  # of the size that FLMR's script has


@dataclass(frozen=True)
class M2KRReport:
    """What questions found.

    questions: by id, in their order: `retrieved_passage`, a list of {passage_id, score}, best
      first; "Recall@K" and "Pseudo Recall@K" for each K; and `error` where the image could not be
      used, which counts as having found nothing.
    """

    questions: dict[str, dict[str, Any]]

    @property
    def measures(self) -> dict[str, float]:
        """The mean of each measure over all questions."""
        rows = list(self.questions.values())
        names = [name for name in rows[0] if "Recall@" in name]
        return {name: sum(row[name] for row in rows) / len(rows) for name in names}

    @property
    def failed(self) -> dict[str, str]:
        """Why images could not be used, by the question's id."""
        return {qid: row["error"] for qid, row in self.questions.items() if "error" in row}

    def save(self, path: str | Path) -> None:
        """Write `questions` as JSON, in the form of FLMR's script."""
        with writing(path) as stream:
            json.dump(self.questions, stream, indent=4, ensure_ascii=False)
            stream.write("\n")


def recall(found: Sequence[bool], ks: Sequence[int]) -> list[float]:
    """For each K, 1 if one of the first K of `found` is true, else 0."""
    first = next((place for place, hit in enumerate(found) if hit), len(found))
    return [float(first < min(k, len(found))) for k in ks]


def has_answer(passage: str, answers: Sequence[str]) -> bool:
    """Whether a passage contains one of the answers; a blank one is in none."""
    text = passage.lower()
    return any(answer.strip() and answer.strip().lower() in text for answer in answers)


def evaluate_m2kr(
    model: FLMRModelForRetrieval,
    data: M2KR,
    *,
    ks: Sequence[int] = KS,
    index_root_path: str | Path = ".",
    index_experiment_name: str = "default_experiment",
    index_name: str = "index",
    nbits: int = 8,
    doc_maxlen: int = 512,
    overwrite: bool = False,
    batch_size: int = 32,
    black_images: bool = False,
    image_config: ImageConfig | None = None,
    progress: bool | None = None,
) -> M2KRReport:
    """Index the passages, search them with all questions, measure.

    A question without an image is searched with the token embeddings of its text. An image that
    cannot be used is named in a warning; its question counts as having found nothing.

    Args:
      ks: the Ks. Up to the largest passages are retrieved, at FLMR's settings for that number.
      index_root_path, index_experiment_name, index_name, nbits, doc_maxlen, overwrite: see
        `index_custom_collection`; an index of the same passages and model is used again.
      batch_size: questions encoded at a time.
      black_images: give a question without an image a black one, as FLMR's script does.
      image_config: if None, the model's own.
      progress: whether to show a bar; if None, on a terminal.

    Raises:
      ValueError: no image is there, or the model has no vision encoder.
    """
    ks = sorted(set(ks))
    if not ks or ks[0] < 1 or batch_size < 1:
        raise ValueError(f"ks and batch_size must be at least 1, got {ks} and {batch_size}")
    data = data.with_instruction_end(model.text_tokenizer.config.mask_instruction_token)
    seen, alone = _by_kind(data, black_images)
    if seen and model.images is None:
        raise ValueError(
            f"{len(seen)} of {len(data)} questions have an image, and the model has no vision "
            "encoder: evaluate a checkpoint of PreFLMR or FLMR, or leave img_path out of the data"
        )
    _check_missing(data, seen)
    place: dict[str, Any] = dict(
        index_root_path=index_root_path,
        index_experiment_name=index_experiment_name,
        index_name=index_name,
        nbits=nbits,
    )
    index_custom_collection(
        data.passages, model, **place, doc_maxlen=doc_maxlen, overwrite=overwrite
    )
    searcher = create_searcher(**place)
    if image_config is None and seen:
        image_config = model.image_config
    rows: dict[int, dict[str, Any]] = {}
    with progress_bar(len(data), "questions", "question", progress) as bar:
        for part in _encoded(model, data, seen, alone, image_config, batch_size):
            asked = {i: data[i] for i in part.numbers}
            texts = {i: question.text for i, question in asked.items()}
            found = search_custom_collection(searcher, texts, part.rows, ks[-1]).todict()
            for i, hits in found.items():
                rows[i] = _measured(data, asked[i], hits, ks)
            for i, error in part.failed.items():
                rows[i] = {"error": str(error)} | _measured(data, data[i], [], ks)
            bar.update(len(part.numbers) + len(part.failed))
    report = M2KRReport({data[i].id: rows[i] for i in sorted(rows)})
    if report.failed:
        qid, first = next(iter(report.failed.items()))
        warnings.warn(
            f"{len(report.failed)} of {len(seen)} images could not be used, and count as having "
            f"found nothing: question {qid!r:.80}: {first}",
            stacklevel=2,
        )
    return report


def _by_kind(data: M2KR, black_images: bool) -> tuple[list[int], list[int]]:
    """The questions with an image, and those of text alone."""
    seen: list[int] = []
    alone: list[int] = []
    for i, question in enumerate(data):
        (alone if question.image is None and not black_images else seen).append(i)
    return seen, alone


def _check_missing(data: M2KR, seen: Sequence[int]) -> None:
    missing = data.missing_images(seen)
    if not missing:
        return
    message = data.name_missing(missing)
    if len(missing) == sum(data[i].image is not None for i in seen):
        raise ValueError(f"{message}\nGive the folder that img_path begins in (images)")
    warnings.warn(message, stacklevel=3)


class _Encoded(NamedTuple):
    """A batch of queries.

    numbers: of the questions. rows: float32[B, Lq, D]. failed: errors by question.
    """

    numbers: list[int]
    rows: np.ndarray
    failed: dict[int, ImageError]


def _encoded(
    model: FLMRModelForRetrieval,
    data: M2KR,
    seen: Sequence[int],
    alone: Sequence[int],
    config: ImageConfig | None,
    size: int,
) -> Iterator[_Encoded]:
    """Token embeddings of all questions, a batch at a time."""
    images = ((_BLACK if (image := data[i].image) is None else image) for i in seen)
    for block in pixel_blocks(images, config, rows=size, on_error="keep") if seen else ():
        numbers = seen[block.start : block.start + len(block.pixels)]
        fill = [(0, size - len(numbers)), (0, 0), (0, 0), (0, 0)]
        rows = _query(model, data, numbers, size, np.pad(block.pixels, fill))
        good = [k for k in range(len(numbers)) if block.start + k not in block.failed]
        failed = {seen[place]: error for place, error in block.failed.items()}
        yield _Encoded([numbers[k] for k in good], rows[good], failed)
    for start in range(0, len(alone), size):
        numbers = alone[start : start + size]
        yield _Encoded(list(numbers), _query(model, data, numbers, size, None), {})


def _query(
    model: FLMRModelForRetrieval,
    data: M2KR,
    numbers: Sequence[int],
    size: int,
    pixels: np.ndarray | None,
) -> np.ndarray:
    """float32[n, Lq, D] of n questions; filled up to `size`, so that one program does for all."""
    assert model.query_tokenizer is not None
    texts = [data[i].text for i in numbers]
    texts += texts[-1:] * (size - len(texts))
    tokens = model.query_tokenizer(texts)
    encoded = model.query(tokens["input_ids"], tokens["attention_mask"], pixels)
    return np.asarray(encoded.late_interaction_output)[: len(numbers)]


def _measured(
    data: M2KR, question: Question, hits: Sequence[tuple[int, int, float]], ks: Sequence[int]
) -> dict[str, Any]:
    """What is written of a question, of its hits: passage number, rank, score."""
    ids = [data.passages.id(number) for number, _, _ in hits]
    found = {RECALL: [pid in question.positives for pid in ids]}
    if data.has_answers:
        texts = (data.passages[number] for number, _, _ in hits)
        found[PSEUDO_RECALL] = [has_answer(text, question.answers) for text in texts]
    retrieved = [
        {"passage_id": pid, "score": float(score)}
        for pid, (_, _, score) in zip(ids, hits, strict=True)
    ]
    measures = {
        f"{name}@{k}": value
        for name, row in found.items()
        for k, value in zip(ks, recall(row, ks), strict=True)
    }
    return {"retrieved_passage": retrieved} | measures
