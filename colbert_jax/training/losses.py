"""Losses of late-interaction training, over scores, and encoding in chunks.

Notation: s[b, w] is the student's score of query b and document w, t[b, w] the teacher's. Losses
are float32 means over the B queries.

A document without a token scores minus infinity. It takes no part: it is left out of softmaxes,
extremes and differences, the teacher's too, and gets no gradient. A query whose positive is such a
document adds 0 to the sum and still counts in the mean.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

# Stands for minus infinity where arithmetic follows: its exponential is 0 and its gradient finite.
_ABSENT = -1e30


def cross_entropy(scores: jax.Array) -> jax.Array:
    """-log softmax(s[b])[0]: the first document against the others of its query.

    With W = 2 this is the pairwise loss of ColBERT (Khattab and Zaharia, 2020, section 3.3).

    Args:
      scores: [B, W].

    Returns:
      float32[].
    """
    return contrastive(scores, jnp.zeros(scores.shape[0], jnp.int32))


def contrastive(
    all_scores: jax.Array, positives: jax.Array, *, temperature: float = 1.0
) -> jax.Array:
    """-log softmax(s[b] / temperature)[positives[b]]: one document against all others.

    Args:
      all_scores: [B, N].
      positives: int32[B], the column of each query's positive.

    Returns:
      float32[].
    """
    present = _present(all_scores)
    logits = jnp.where(present, all_scores.astype(jnp.float32) / temperature, _ABSENT)
    column = positives[:, None]
    chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), column, axis=1)
    return jnp.where(jnp.take_along_axis(present, column, axis=1), -chosen, 0.0).mean()


def in_batch_candidates(queries: int, ways: int) -> tuple[jax.Array, jax.Array]:
    """Stanford's in-batch candidates: a query's first document and every other query's documents.

    Documents are counted through the batch: document w of query b is b * W + w. The query's own
    other documents are left out.

    Returns:
      int32[B, B * W - W + 1] documents, ascending, and int32[B], where the first one is.
    """
    positions = jnp.arange(queries * ways - ways + 1, dtype=jnp.int32)
    labels = jnp.arange(queries, dtype=jnp.int32) * ways
    return positions + (ways - 1) * (positions > labels[:, None]), labels


def in_batch_negatives(all_scores: jax.Array, ways: int) -> jax.Array:
    """`contrastive` over `in_batch_candidates` (Santhanam et al., 2022, section 3.2).

    Args:
      all_scores: [B, B * W], every query with the documents of all.
      ways: W.

    Returns:
      float32[].

    Raises:
      ValueError: the columns are not W for each query.
    """
    queries, documents = all_scores.shape
    if documents != queries * ways:
        raise ValueError(
            f"scores of {queries} queries with {ways} documents each have {queries * ways} "
            f"columns, got {documents}"
        )
    candidates, labels = in_batch_candidates(queries, ways)
    return contrastive(jnp.take_along_axis(all_scores, candidates, axis=1), labels)


def distillation(
    scores: jax.Array,
    teacher: jax.Array,
    *,
    alpha: float = 1.0,
    student_temperature: float = 1.0,
    teacher_temperature: float = 1.0,
    normalize_teacher: bool = False,
    normalize_student: bool = False,
) -> jax.Array:
    """KL(p || q), p[b] = softmax(alpha t[b] / teacher_temperature), q[b] = softmax(s[b] /
    student_temperature): the sum over w of p (log p - log q) (Santhanam et al., 2022, section 3.2).

    Stanford's ColBERT sets `alpha` alone; PyLate normalises the student and takes teacher scores
    that its data has normalised.

    Args:
      scores, teacher: [B, W].
      normalize_teacher, normalize_student: (x - min) / (max - min) of each query's scores first;
        zeros where all are equal.

    Returns:
      float32[].

    Raises:
      ValueError: the shapes differ.
    """
    _require_alike(scores, teacher)
    present = _present(scores) & _present(teacher)

    def log_probabilities(x: jax.Array, normalize: bool, scale: float) -> jax.Array:
        x = jnp.where(present, x.astype(jnp.float32), 0.0)
        x = (_normalized(x, present) if normalize else x) * scale
        return jax.nn.log_softmax(jnp.where(present, x, _ABSENT))

    p = log_probabilities(teacher, normalize_teacher, alpha / teacher_temperature)
    q = log_probabilities(scores, normalize_student, 1 / student_temperature)
    return jnp.where(present, jnp.exp(p) * (p - q), 0.0).sum(axis=1).mean()


def margin_mse(scores: jax.Array, teacher: jax.Array) -> jax.Array:
    """((s[b, 0] - s[b, w]) - (t[b, 0] - t[b, w]))^2, the mean over queries and w = 1..W-1.

    Hofstätter et al., 2020, section 3.1. A pair of which one has no score counts as 0.

    Args:
      scores, teacher: [B, W], the first the positive's.

    Returns:
      float32[].

    Raises:
      ValueError: the shapes differ, or there is no negative.
    """
    _require_alike(scores, teacher)
    if scores.shape[1] < 2:
        raise ValueError("margin MSE needs a positive and at least one negative for each query")
    present = _present(scores) & _present(teacher)
    difference = jnp.where(present, scores.astype(jnp.float32) - teacher.astype(jnp.float32), 0.0)
    margin = jnp.where(present[:, :1] & present[:, 1:], difference[:, :1] - difference[:, 1:], 0.0)
    return jnp.square(margin).mean()


def token_matches(matches: jax.Array, teacher: jax.Array, *, temperature: float = 1.0) -> jax.Array:
    """How differently two models match the query tokens: half the sum over a query's tokens of the
    variance over documents of (m - t) / temperature, m[b, i, n] being the best similarity of token
    i of query b in document n.

    What shifts all documents alike changes no ranking and costs nothing. Where errors of tokens are
    independent and documents score alike, this is the divergence of the scores' softmaxes to second
    order, so that it adds to `distillation` in the same unit.

    Args:
      matches, teacher: [B, Lq, N]; zeros for query rows that are no token.

    Returns:
      float32[].

    Raises:
      ValueError: the shapes differ.
    """
    _require_alike(matches, teacher)
    present = _present(matches) & _present(teacher)
    count = jnp.maximum(present.sum(axis=-1, keepdims=True), 1)
    difference = jnp.where(present, matches.astype(jnp.float32) - teacher, 0.0) / temperature
    mean = difference.sum(axis=-1, keepdims=True) / count
    squares = jnp.where(present, jnp.square(difference - mean), 0.0) / count
    return 0.5 * squares.sum(axis=(1, 2)).mean()


def encode_chunked(encode: Callable[[Any, Any], Any], params: Any, rows: Any, chunk: int) -> Any:
    """`encode(params, rows)` with the activations of one chunk in memory at a time.

    The forward pass keeps the embeddings; the backward pass computes each chunk's activations
    again (GradCache: Gao et al., 2021, section 3.2). A chunk is every n-th row, so that rows
    sharded over devices stay where they are if the number of devices divides `chunk`.

    Args:
      encode: (params, rows) -> arrays whose leading axis is the rows'.
      rows: arrays of a leading axis N, such as `batch.TokenBatch`; for dropout, a key of each row
        too.
      chunk: rows of a chunk; what remains is one more.

    Returns:
      As `encode`, of all N rows in order.

    Raises:
      ValueError: chunk < 1.
    """
    if chunk < 1:
        raise ValueError(f"a chunk must have at least 1 row, got {chunk}")

    def encoded(params: Any, part: Any) -> Any:
        # A function of this call: jax.checkpoint keeps what it has traced by function, and with one
        # function for all calls a run's later steps got other gradients (jax 0.10.2).
        return encode(params, part)

    n = jax.tree.leaves(rows)[0].shape[0]
    steps = n // chunk
    whole = steps * chunk

    def strided(x: jax.Array) -> jax.Array:
        return x[:whole].reshape(chunk, steps, *x.shape[1:]).swapaxes(0, 1)

    def in_order(x: jax.Array) -> jax.Array:
        return x.swapaxes(0, 1).reshape(whole, *x.shape[2:])

    parts = []
    if steps:
        in_loop = jax.checkpoint(encoded, prevent_cse=False)
        out = jax.lax.map(lambda part: in_loop(params, part), jax.tree.map(strided, rows))
        parts.append(jax.tree.map(in_order, out))
    if whole < n:
        rest = jax.tree.map(lambda x: x[whole:], rows)
        parts.append(jax.checkpoint(encoded)(params, rest))
    return jax.tree.map(lambda *x: jnp.concatenate(x), *parts)


def _present(scores: jax.Array) -> jax.Array:
    return scores != -jnp.inf  # true of NaN, which must be seen


def _normalized(x: jax.Array, present: jax.Array) -> jax.Array:
    low = jnp.where(present, x, jnp.inf).min(axis=1, keepdims=True)
    high = jnp.where(present, x, -jnp.inf).max(axis=1, keepdims=True)
    spread = high - low
    return (x - low) / jnp.where(spread > 0, spread, 1.0)


def _require_alike(scores: jax.Array, teacher: jax.Array) -> None:
    if scores.shape != teacher.shape:
        raise ValueError(
            f"the student's scores are {scores.shape}, the teacher's {teacher.shape}: they must "
            "be of the same queries and documents"
        )
