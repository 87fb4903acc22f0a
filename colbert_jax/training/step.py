"""One training step: loss of a batch, its gradients, the optimiser's update.

The loss is written for the whole batch, on however many devices its rows are: XLA exchanges what
the devices need of each other, so a result does not depend on their number.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from colbert_jax.config import TrainingConfig
from colbert_jax.models.colbert import EncoderConfig, make_encoder
from colbert_jax.models.layers import TrainMode
from colbert_jax.scoring.gradient import all_pairs_scores, nway_scores
from colbert_jax.training import losses
from colbert_jax.training.batch import ExampleBatch, TokenBatch
from colbert_jax.training.optimizer import apply_gradients, init_moments, trainable, with_changes

State = dict[str, Any]  # params, moments, step


class CoupledTeacher(NamedTuple):
    """A coupled teacher on the devices.

    params: its parameters.
    ids: int32[V], its ids of the model's word pieces; None: they are the same.
    """

    params: dict
    ids: jax.Array | None


def init_state(config: TrainingConfig, params: dict) -> State:
    """Parameters, the optimiser's moments, and the number of steps done."""
    moments = init_moments(config, params)
    return {"params": params, "moments": moments, "step": jnp.zeros((), jnp.int32)}


def make_loss(
    encoder: EncoderConfig,
    config: TrainingConfig,
    dtype: Any,
    mesh: Mesh | None = None,
    teachers: Sequence[EncoderConfig] = (),
) -> Callable[..., tuple[jax.Array, dict[str, jax.Array]]]:
    """The loss of a batch as a function of (params, batch, key, coupled teachers).

    Args:
      dtype: of the dense layers' computation.
      mesh: of the devices that the batch is spread over; None: one device.
      teachers: the coupled ones, for a `coupled_weight`.

    Returns:
      a function giving the loss, float32[], and its parts by name.
    """
    embed_trained = _make_embed(encoder, config, dtype, mesh, training=True)
    embed_fixed = [_make_embed(t, config, dtype, mesh, training=False) for t in teachers]

    def loss(
        params: dict, batch: ExampleBatch, key: jax.Array, fixed: Sequence[CoupledTeacher] = ()
    ):
        embedded = embed_trained(params, batch, key)
        coupled = None
        if config.coupled_weight:
            seen = [
                embed(own.params, _with_teacher_ids(batch, own.ids), key)
                for embed, own in zip(embed_fixed, fixed, strict=True)
            ]
            coupled = matches(config, *_concatenated(seen), mesh)
        return score_loss(config, *embedded, batch.scores, mesh, coupled)

    return loss


def _concatenated(
    seen: Sequence[tuple[jax.Array, jax.Array, jax.Array]],
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Embeddings whose similarity is the mean of the teachers', of the same tokens."""
    queries, documents, masks = zip(*seen, strict=True)
    scale = len(seen) ** -0.5
    return (
        scale * jnp.concatenate(queries, -1),
        scale * jnp.concatenate(documents, -1),
        masks[0],
    )


def matches(
    config: TrainingConfig,
    queries: jax.Array,
    documents: jax.Array,
    mask: jax.Array,
    mesh: Mesh | None = None,
) -> jax.Array:
    """Scores of every query with every document, as the coupled part of a loss compares them.

    Args:
      queries: float32[B, Lq, D], rows of zeros where there is no token.
      documents, mask: float32[N, Ld, D] and bool[N, Ld].

    Returns:
      float32[B, Lq, N], the best similarity of each query token, or float32[B, 1, N], their sum,
      where the loss does not look at tokens.
    """
    if not (config.coupled_weight and config.coupled_tokens):
        return all_pairs_scores(queries, documents, mask, mesh=mesh)[:, None]
    batch, length, dim = queries.shape
    tokens = queries.reshape(batch * length, 1, dim)
    return all_pairs_scores(tokens, documents, mask, mesh=mesh).reshape(batch, length, -1)


def _with_teacher_ids(batch: ExampleBatch, ids: jax.Array | None) -> ExampleBatch:
    """The batch in a teacher's ids."""
    if ids is None:
        return batch
    queries, *documents = (
        rows._replace(ids=ids[rows.ids]) for rows in (batch.queries, *batch.documents)
    )
    return batch._replace(queries=queries, documents=tuple(documents))


def _make_embed(
    encoder: EncoderConfig, config: TrainingConfig, dtype: Any, mesh: Mesh | None, training: bool
) -> Callable[[dict, ExampleBatch, jax.Array], tuple[jax.Array, jax.Array, jax.Array]]:
    """A function of (params, batch, key) that gives embeddings float32[B, Lq, D] of the queries and
    float32[B * W, Ld, D] of the documents, and bool[B * W, Ld], which of the latter are tokens.
    """

    def embed_rows(params: dict, rows: TokenBatch, keys: jax.Array) -> jax.Array:
        def run(params: dict, part: tuple[TokenBatch, jax.Array]) -> jax.Array:
            rows, keys = part
            train = TrainMode(keys, config.dropout, config.remat) if training else None
            return make_encoder(encoder, params, dtype)(*rows, train=train)

        if config.chunk is None or config.chunk >= len(rows.ids):
            return run(params, (rows, keys))
        return losses.encode_chunked(run, params, (rows, keys), config.chunk)

    spread = embed_rows
    if mesh is not None and mesh.devices.size > 1:
        # Every device runs the program of one device on its rows.
        each = PartitionSpec("data")
        spread = jax.shard_map(
            embed_rows, mesh=mesh, in_specs=(PartitionSpec(), each, each), out_specs=each
        )

    def embed_groups(params: dict, groups: tuple[TokenBatch, ...], keys: jax.Array):
        """float32[N, L, D] and bool[N, L] of groups laid end to end; L is the longest group's."""
        longest = max(rows.ids.shape[1] for rows in groups)
        parts, masks, start = [], [], 0
        for rows in groups:
            x = spread(params, rows, keys[start : start + len(rows.ids)])
            start += len(rows.ids)
            fill = longest - rows.ids.shape[1]
            parts.append(jnp.pad(x, [(0, 0), (0, fill), (0, 0)]))
            masks.append(jnp.pad(rows.kept, [(0, 0), (0, fill)]))
        return jnp.concatenate(parts), jnp.concatenate(masks)

    def embed(params: dict, batch: ExampleBatch, key: jax.Array):
        keys = jax.random.split(jax.random.fold_in(key, 0), len(batch.queries.ids))
        queries, _ = embed_groups(params, (batch.queries,), keys)
        # A document's random numbers go with it, whichever group it is in.
        keys = jax.random.split(jax.random.fold_in(key, 1), len(batch.order))
        documents, mask = embed_groups(params, batch.documents, keys[jnp.argsort(batch.order)])
        return queries, documents[batch.order], mask[batch.order]

    return embed


def score_loss(
    config: TrainingConfig,
    queries: jax.Array,
    documents: jax.Array,
    mask: jax.Array,
    teacher: jax.Array | None,
    mesh: Mesh | None = None,
    coupled: jax.Array | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The loss as a function of token embeddings.

    Args:
      queries: float32[B, Lq, D].
      documents, mask: float32[B * W, Ld, D] and bool[B * W, Ld], W documents a query in turn.
      teacher: float32[B, W]; None where the loss does not need it.
      coupled: float32[B, Lq or 1, B * W], the coupled teacher's `matches`; None: there is none.

    Returns:
      the loss, float32[], and its parts by name.
    """
    batch, ways = queries.shape[0], documents.shape[0] // queries.shape[0]
    every = config.use_ib_negatives or config.loss == "contrastive" or coupled is not None
    if every:
        matched = matches(config, queries, documents, mask, mesh)
        pairs = matched.sum(axis=1)
        own = pairs.reshape(batch, batch, ways)[jnp.arange(batch), jnp.arange(batch)]
    else:
        split = (batch, ways, *documents.shape[1:])
        own = nway_scores(queries, documents.reshape(split), mask.reshape(split[:3]), mesh=mesh)
    if config.loss == "distillation":
        assert teacher is not None
        main = losses.distillation(
            own,
            teacher,
            alpha=config.distillation_alpha,
            student_temperature=config.student_temperature,
            teacher_temperature=config.teacher_temperature,
            normalize_teacher=config.normalize_teacher,
            normalize_student=config.normalize_student,
        )
    elif config.loss == "margin-mse":
        assert teacher is not None
        main = losses.margin_mse(own, teacher)
    elif config.loss == "cross-entropy":
        main = losses.cross_entropy(own)
    else:
        positives = jnp.arange(batch) * ways
        main = losses.contrastive(pairs, positives, temperature=config.temperature)
    parts = {config.loss: main, "positive_score": own[:, 0].mean()}
    if ways > 1:
        parts["negative_score"] = own[:, 1:].mean()
    total = main
    if config.use_ib_negatives:
        parts["in_batch"] = losses.in_batch_negatives(pairs, ways)
        total = total + parts["in_batch"]
    if coupled is not None:
        parts["coupled"] = losses.distillation(
            pairs,
            coupled.sum(axis=1),
            student_temperature=config.temperature,
            teacher_temperature=config.temperature,
        )
        learned = parts["coupled"]
        if config.coupled_tokens:
            parts["coupled_tokens"] = losses.token_matches(
                matched, coupled, temperature=config.temperature
            )
            learned = learned + config.coupled_tokens * parts["coupled_tokens"]
        total = (1 - config.coupled_weight) * total + config.coupled_weight * learned
    return total, parts


def make_gradients(
    encoder: EncoderConfig,
    config: TrainingConfig,
    dtype: Any,
    mesh: Mesh | None = None,
    shardings: Any = None,
    teachers: Sequence[EncoderConfig] = (),
) -> Callable[..., tuple[dict, dict[str, jax.Array]]]:
    """Gradients of a micro-batch: a jitted function of (params, batch, step, number, trained) and
    the coupled teachers.

    `number` counts the micro-batches of a step, `trained` is a tuple of the parts of the parameters
    that the gradients are wanted of; the others are left out of the computation, and of these what
    is not `trainable`. Gradients and the parts of the loss come divided by `accumsteps`, to be
    added up. `shardings` are the parameters' and become the gradients'.
    """
    loss = make_loss(encoder, config, dtype, mesh, teachers)

    @partial(jax.jit, static_argnames="trained")
    def gradients(
        params: dict,
        batch: ExampleBatch,
        step,
        number,
        trained: tuple[str, ...],
        fixed: Sequence[CoupledTeacher] = (),
    ):
        key = jax.random.fold_in(jax.random.key(config.seed), step)
        key = jax.random.fold_in(key, number)

        def of(part: dict):
            return loss(with_changes(params, part), batch, key, fixed)

        def trainable_params(tree: dict) -> dict:
            kept = trainable(config, tree)
            return {name: kept[name] for name in trained}

        (total, parts), grads = jax.value_and_grad(of, has_aux=True)(trainable_params(params))
        if shardings is not None:
            wanted = trainable_params(shardings)
            grads = jax.lax.with_sharding_constraint(grads, wanted)
        return jax.tree.map(lambda x: x / config.accumsteps, (grads, {"loss": total} | parts))

    return gradients


def make_update(
    config: TrainingConfig, shardings: Any = None
) -> Callable[[State, dict], tuple[State, dict]]:
    """The optimiser's step: a jitted function of (state, gradients) that takes over the state.

    `shardings` are the state's.
    """
    keep = {} if shardings is None else {"out_shardings": (shardings, None)}

    @partial(jax.jit, donate_argnums=0, **keep)
    def update(state: State, gradients: dict) -> tuple[State, dict]:
        params, moments, logged = apply_gradients(
            config, state["params"], state["moments"], gradients, state["step"]
        )
        return {"params": params, "moments": moments, "step": state["step"] + 1}, logged

    return update
