"""One training step: the loss of a batch, its gradients, the optimiser's update.

The loss is written for the whole batch, on however many devices its rows are: XLA exchanges what
the devices need of each other, so a result does not depend on their number.

The optimiser is AdamW with linear warm-up and decay, in two parts: the backbone and the head. Each
part has moments and a step count of its own, so that a backbone that was frozen for a while starts
as torch's does when it first gets a gradient. The gradient's norm is cut over both together.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from colbert_jax.config import TrainingConfig
from colbert_jax.models.colbert import EncoderConfig, make_encoder
from colbert_jax.models.layers import TrainMode
from colbert_jax.scoring.gradient import all_pairs_scores, nway_scores
from colbert_jax.training import losses
from colbert_jax.training.batch import ExampleBatch, Passages, TokenBatch
from colbert_jax.training.memory import Room, check_memory

State = dict[str, Any]  # params, moments, step
Logged = dict[str, jax.Array]  # float32[] each
# The loss, float32[], and its parts by name, of (params, batch, key, fixed): `fixed` are parameters
# that are not trained.
Loss = Callable[[dict, ExampleBatch, jax.Array, Any], tuple[jax.Array, Logged]]
Embed = Callable[[dict, Any], jax.Array]  # of (params, rows)
EPSILON = 1e-8  # AdamW's; torch's default
_SMALLEST_SHARDED = 1 << 14  # values; smaller arrays are kept whole on every device
_AFTER_LAYERS = ("final_norm",)  # of a backbone; all else but the layers comes before them


class CoupledTeacher(NamedTuple):
    """A coupled teacher on the devices.

    params: its parameters.
    ids: int32[V], its ids of the model's word pieces. If None, they are the same.
    """

    params: dict
    ids: jax.Array | None


def make_step(
    make_loss: Callable[[TrainingConfig, Mesh], Loss],
    configs: Sequence[TrainingConfig],
    mesh: Mesh,
    shardings: Any,
    fixed: Any = (),
    room: Room | None = None,
) -> Callable[[State, int, int, Sequence[ExampleBatch]], tuple[State, Logged, Logged]]:
    """A function that makes an optimiser step of one or several micro-batches.

    Args:
      make_loss: gives the loss of a task's settings, over the devices of a mesh.
      configs: the settings of each task; those of the first are the run's.
      shardings: the state's.
      fixed: what the loss takes beside the parameters, on the devices.
      room: what there is for a step. If None, no step is held against it.

    Returns:
      a function of (state, number of the step, task, micro-batches with this process's rows), which
      takes over the state. It gives the new state, the loss and its parts, and what
      `apply_gradients` logs. It raises ValueError, before it makes the first step of a task,
      where that does not fit into memory.
    """
    config = configs[0]

    @cache
    def gradients(own: TrainingConfig) -> Any:
        return gradients_of(make_loss(own, mesh), own, shardings["params"])

    update = make_update(config, shardings)
    add = jax.jit(lambda a, b: jax.tree.map(jnp.add, a, b), donate_argnums=0)
    rows = NamedSharding(mesh, PartitionSpec("data"))

    def put(batch: ExampleBatch) -> ExampleBatch:
        return jax.tree.map(lambda x: jax.make_array_from_process_local_data(rows, x), batch)

    checked = set()

    def check(params: dict, batch: ExampleBatch, task: int, trained: tuple[str, ...]) -> None:
        if room is None or (task, trained) in checked:
            return
        checked.add((task, trained))
        zero = np.int32(0)

        def compiled(own: TrainingConfig, batch: ExampleBatch):  # once: the call finds it again
            function = gradients(own)
            return function.lower(params, batch, zero, zero, trained=trained, fixed=fixed).compile()

        check_memory(configs[task], batch, mesh.devices.flatten().tolist(), room, compiled)

    def step(state: State, number: int, task: int, batches: Sequence[ExampleBatch]):
        params = state["params"]
        parts = tuple(part for part, values in params.items() if jax.tree.leaves(values))
        trained = ("head",) if number < config.warmup_bert else parts
        total = None
        for micro, batch in enumerate(batches):
            batch = put(batch)
            check(params, batch, task, trained)
            if config.warmup_bert < config.steps:  # what takes more, before days of the other
                check(params, batch, task, parts)
            numbers = np.int32(number), np.int32(micro)
            part = gradients(configs[task])(params, batch, *numbers, trained=trained, fixed=fixed)
            total = part if total is None else add(total, part)
        assert total is not None
        grads, measured = total
        state, rates = update(state, grads)
        return state, measured, rates

    return step


# --- Where arrays are -----------------------------------------------------------------------


def parameter_sharding(mesh: Mesh, tree: Any, *, fsdp: bool) -> Any:
    """A sharding for every array: whole on every device, or cut along its longest axis.

    Args:
      tree: arrays, or what `jax.eval_shape` gives.
      fsdp: cut arrays that are large enough along the longest axis that divides by the number of
        devices; XLA gathers them where they are used.
    """
    count = mesh.devices.size

    def one(leaf: Any) -> NamedSharding:
        axes: list[str | None] = [None] * len(leaf.shape)
        if fsdp and np.prod(leaf.shape) >= _SMALLEST_SHARDED:
            fitting = [i for i, size in enumerate(leaf.shape) if size % count == 0]
            if fitting:
                axes[max(fitting, key=lambda i: leaf.shape[i])] = "data"
        return NamedSharding(mesh, PartitionSpec(*axes))

    return jax.tree.map(one, tree)


def put_teacher(params: dict, ids: np.ndarray | None, mesh: Mesh, *, fsdp: bool) -> CoupledTeacher:
    """Put a coupled teacher onto the devices, spread over them as the model is."""
    where = parameter_sharding(mesh, params, fsdp=fsdp)
    on_devices = jax.device_put(jax.tree.map(np.asarray, params), where)
    everywhere = NamedSharding(mesh, PartitionSpec())
    return CoupledTeacher(on_devices, None if ids is None else jax.device_put(ids, everywhere))


def make_gather(mesh: Mesh) -> Callable[[dict], dict]:
    """A function that gives parameters as NumPy arrays, in every process."""
    gather = jax.jit(lambda tree: tree, out_shardings=NamedSharding(mesh, PartitionSpec()))

    def to_host(params: dict) -> dict:
        return jax.tree.map(lambda x: np.asarray(x.addressable_data(0)), gather(params))

    return to_host


# --- The loss -------------------------------------------------------------------------------


def make_loss(
    encoder: EncoderConfig,
    config: TrainingConfig,
    dtype: Any,
    mesh: Mesh | None = None,
    teachers: Sequence[EncoderConfig] = (),
) -> Loss:
    """The loss of a batch of texts as a function of (params, batch, key, coupled teachers).

    Args:
      dtype: of the dense layers' computation.
      mesh: of the devices that the batch is spread over. If None, one device.
      teachers: the coupled ones, for a `coupled_weight`.

    Returns:
      a function giving the loss, float32[], and its parts by name.
    """
    embed_student = _make_embed(encoder, config, dtype, mesh, training=True)
    embed_teachers = [_make_embed(t, config, dtype, mesh, training=False) for t in teachers]

    def loss(
        params: dict,
        batch: ExampleBatch,
        key: jax.Array,
        coupled: Sequence[CoupledTeacher] = (),
    ):
        embedded = embed_student(params, batch, key)
        taught = None
        if config.coupled_weight:
            seen = [
                embed(teacher.params, _with_teacher_ids(batch, teacher.ids), key)
                for embed, teacher in zip(embed_teachers, coupled, strict=True)
            ]
            taught = matches(config, *_concatenated(seen), mesh)
        alike = None if batch.passages is None else no_negatives(batch.passages)
        return score_loss(config, *embedded, batch.scores, mesh, taught, alike)

    return loss


def no_negatives(passages: Passages) -> jax.Array:
    """bool[B, B * W]: documents of the batch that are positives of a query, under whichever number,
    its own positive left out.

    Positives of a query are those of its example, those that its source names, and those of every
    example of the batch with the same query.
    """
    queries, documents, labelled = passages
    batch, columns = len(queries), len(documents)
    positives = documents.reshape(batch, -1, 2)[:, 0]

    def same(a: jax.Array, b: jax.Array) -> jax.Array:
        return (a[..., :, None, :] == b).all(-1)

    known = same(labelled, documents).any(axis=1)
    # A product, so that no array is larger than the scores.
    counts = same(queries, queries).astype(jnp.float32) @ same(positives, documents).astype(
        jnp.float32
    )
    own = jnp.arange(batch)[:, None] * (columns // batch) == jnp.arange(columns)
    return (known | (counts > 0)) & ~own


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
    spread = embed_tokens(encoder, config, dtype, mesh, training)

    def embed(params: dict, batch: ExampleBatch, key: jax.Array):
        queries = spread(params, (batch.queries, query_keys(batch, key)))
        return queries, *embed_documents(spread, params, batch, key)

    return embed


def embed_tokens(
    encoder: EncoderConfig,
    config: TrainingConfig,
    dtype: Any,
    mesh: Mesh | None,
    training: bool = True,
) -> Embed:
    """A function of (params, (TokenBatch, keys)) that gives token embeddings float32[N, L, D]."""

    def run(params: dict, part: tuple[TokenBatch, jax.Array]) -> jax.Array:
        rows, keys = part
        train = TrainMode(keys, config.dropout, config.remat) if training else None
        return make_encoder(encoder, params, dtype)(*rows, train=train)

    return spread_rows(run, config, mesh)


def spread_rows(run: Embed, config: TrainingConfig, mesh: Mesh | None) -> Embed:
    """The function itself, over the devices of a mesh and a chunk of `config.chunk` at a time.

    Args:
      run: of (params, rows), arrays whose leading axis is the rows'.
    """

    def in_chunks(params: dict, rows: Any) -> jax.Array:
        if config.chunk is None or config.chunk >= len(jax.tree.leaves(rows)[0]):
            return run(params, rows)
        return losses.encode_chunked(run, params, rows, config.chunk)

    if mesh is None or mesh.devices.size == 1:
        return in_chunks
    # Every device runs the program of one device on its rows. Unchecked, as jax 0.12's check
    # refuses the derivative of erf (findings/erf_gradient_in_shard_map.sh), thus of exact GELU.
    each = PartitionSpec("data")
    return jax.shard_map(
        in_chunks,
        mesh=mesh,
        in_specs=(PartitionSpec(), each),
        out_specs=each,
        check_vma=False,
    )


def query_keys(batch: ExampleBatch, key: jax.Array) -> jax.Array:
    """[B], the random keys of queries."""
    return jax.random.split(jax.random.fold_in(key, 0), len(batch.queries.ids))


def embed_documents(
    embed: Embed, params: dict, batch: ExampleBatch, key: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Token embeddings of a batch's documents.

    Args:
      embed: of (params, (TokenBatch, keys)).

    Returns:
      float32[B * W, Ld, D] and bool[B * W, Ld]; Ld is the longest group's.
    """
    # A document's random numbers go with it, whichever group it is in.
    keys = jax.random.split(jax.random.fold_in(key, 1), len(batch.order))
    keys = keys[jnp.argsort(batch.order)]
    longest = max(rows.ids.shape[1] for rows in batch.documents)
    parts, masks, start = [], [], 0
    for rows in batch.documents:
        x = embed(params, (rows, keys[start : start + len(rows.ids)]))
        start += len(rows.ids)
        fill = longest - rows.ids.shape[1]
        parts.append(jnp.pad(x, [(0, 0), (0, fill), (0, 0)]))
        masks.append(jnp.pad(rows.kept, [(0, 0), (0, fill)]))
    return jnp.concatenate(parts)[batch.order], jnp.concatenate(masks)[batch.order]


def score_loss(
    config: TrainingConfig,
    queries: jax.Array,
    documents: jax.Array,
    mask: jax.Array,
    teacher: jax.Array | None,
    mesh: Mesh | None = None,
    coupled: jax.Array | None = None,
    alike: jax.Array | None = None,
) -> tuple[jax.Array, Logged]:
    """The loss as a function of token embeddings.

    Args:
      queries: float32[B, Lq, D].
      documents, mask: float32[B * W, Ld, D] and bool[B * W, Ld], W documents a query in turn.
      teacher: float32[B, W]; None where the loss does not need it.
      coupled: float32[B, Lq or 1, B * W], the coupled teacher's `matches`, if there is one.
      alike: bool[B, B * W], documents that are no negatives of a query (`no_negatives`). They take
        no part in what contrasts documents. Where a teacher scores them they stay: it knows better.

    Returns:
      the loss, float32[], and its parts by name.
    """
    batch, ways = queries.shape[0], documents.shape[0] // queries.shape[0]
    every = config.in_batch or config.loss == "contrastive" or coupled is not None
    if every:
        matched = matches(config, queries, documents, mask, mesh)
        pairs = matched.sum(axis=1)
        own = _own(pairs, ways)
        contrasted = pairs if alike is None else jnp.where(alike, -jnp.inf, pairs)
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
        told = own if alike is None else jnp.where(_own(alike, ways), -jnp.inf, own)
        main = losses.cross_entropy(told)
    else:
        positives = jnp.arange(batch) * ways
        main = losses.contrastive(contrasted, positives, temperature=config.temperature)
    parts = {config.loss: main, "positive_score": own[:, 0].mean()}
    if ways > 1:
        parts["negative_score"] = own[:, 1:].mean()
    total = main
    if config.in_batch:
        parts["in_batch"] = losses.in_batch_negatives(contrasted, ways)
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


def _own(pairs: jax.Array, ways: int) -> jax.Array:
    """[B, W] of [B, B * W]: each query's own documents."""
    batch = jnp.arange(len(pairs))
    return pairs.reshape(len(batch), len(batch), ways)[batch, batch]


# --- Gradients and update -------------------------------------------------------------------


def make_gradients(
    encoder: EncoderConfig,
    config: TrainingConfig,
    dtype: Any,
    mesh: Mesh | None = None,
    shardings: Any = None,
    teachers: Sequence[EncoderConfig] = (),
) -> Callable[..., tuple[dict, Logged]]:
    """`gradients_of` the loss of texts, see `make_loss`."""
    return gradients_of(make_loss(encoder, config, dtype, mesh, teachers), config, shardings)


def gradients_of(
    loss: Loss, config: TrainingConfig, shardings: Any = None
) -> Callable[..., tuple[dict, Logged]]:
    """A jitted function of (params, batch, step, number, trained, fixed) that gives gradients.

    `number` counts the micro-batches of a step; `trained` is a tuple of the parts of the parameters
    to give gradients of: the others are left out of the computation, and so is what is not
    `trainable` in these. Gradients, the loss and its parts come divided by `accumsteps`, to be
    added up. `shardings` are the parameters' and become the gradients'.
    """

    @partial(jax.jit, static_argnames="trained")
    def gradients(
        params: dict,
        batch: ExampleBatch,
        step,
        number,
        trained: tuple[str, ...],
        fixed: Any = (),
    ):
        key = jax.random.fold_in(jax.random.key(config.seed), step)
        key = jax.random.fold_in(key, number)

        def loss_of(part: dict):
            return loss(with_changes(params, part), batch, key, fixed)

        def trained_of(tree: dict) -> dict:
            kept = trainable(config, tree)
            return {name: kept[name] for name in trained}

        (total, parts), grads = jax.value_and_grad(loss_of, has_aux=True)(trained_of(params))
        if shardings is not None:
            grads = jax.lax.with_sharding_constraint(grads, trained_of(shardings))
        return jax.tree.map(lambda x: x / config.accumsteps, (grads, {"loss": total} | parts))

    return gradients


def make_update(
    config: TrainingConfig, shardings: Any = None
) -> Callable[[State, dict], tuple[State, Logged]]:
    """A jitted function of (state, gradients) that makes the optimiser's step; it takes over state.

    `shardings` are the state's.
    """
    keep = {} if shardings is None else {"out_shardings": (shardings, None)}

    @partial(jax.jit, donate_argnums=0, **keep)
    def update(state: State, gradients: dict) -> tuple[State, Logged]:
        params, moments, logged = apply_gradients(
            config, state["params"], state["moments"], gradients, state["step"]
        )
        return {"params": params, "moments": moments, "step": state["step"] + 1}, logged

    return update


# --- The optimiser --------------------------------------------------------------------------


def init_state(config: TrainingConfig, params: dict) -> State:
    """Parameters, the optimiser's moments, and the number of steps done."""
    moments = init_moments(config, params)
    return {"params": params, "moments": moments, "step": jnp.zeros((), jnp.int32)}


def schedule(config: TrainingConfig, peak: float) -> Callable[[jax.Array], jax.Array]:
    """Learning rate of a step, counted from 0: linear up from 0, linear down to 0 at `maxsteps`."""
    warmup = config.warmup_steps
    if warmup is None:
        return optax.constant_schedule(peak)
    up = optax.linear_schedule(0.0, peak, max(warmup, 1))
    down = optax.linear_schedule(peak, 0.0, max(config.steps - warmup, 1))
    return optax.join_schedules([up, down], [warmup]) if warmup else down


def _adamw(config: TrainingConfig) -> optax.GradientTransformation:
    """AdamW (Loshchilov and Hutter, 2019) for a learning rate of 1."""
    return optax.chain(
        optax.scale_by_adam(eps=EPSILON), optax.add_decayed_weights(config.weight_decay)
    )


def trainable(config: TrainingConfig, tree: dict) -> dict:
    """What is not frozen for all of the training, of the parameters or of a tree like theirs."""
    if not config.freeze_layers:
        return tree
    backbone = tree["backbone"]
    layers = {i: x for i, x in backbone["layers"].items() if int(i) >= config.freeze_layers}
    after = {name: backbone[name] for name in _AFTER_LAYERS if name in backbone}
    return tree | {"backbone": {"layers": layers} | after}


def with_changes(tree: Any, changed: Any) -> Any:
    """A copy of the tree with the leaves of `changed`, which has some of its branches."""
    if not isinstance(tree, dict):
        return changed
    return tree | {name: with_changes(tree[name], branch) for name, branch in changed.items()}


def init_moments(config: TrainingConfig, params: dict) -> dict:
    """The optimiser's state: one for each part of the parameters, of what is trained in it."""
    selected = trainable(config, params)
    return {part: _adamw(config).init(values) for part, values in selected.items()}


def apply_gradients(
    config: TrainingConfig, params: dict, moments: dict, gradients: dict, step: jax.Array
) -> tuple[dict, dict, Logged]:
    """Make one step of the optimiser.

    Args:
      params, moments: by part, "backbone" and "head"; or others, which all have the first's rate.
      gradients: of the parts that are trained in this step, of what is `trainable` in them.
      step: int32[], from 0.

    Returns:
      new parameters, new moments, and what to log: the gradient's norm before it was cut, and the
      learning rates.
    """
    norm = optax.tree.norm(gradients)
    factor = jnp.minimum(1.0, config.max_grad_norm / jnp.maximum(norm, 1e-12))
    gradients = jax.tree.map(lambda g: g * factor, gradients)
    params, moments, rates = dict(params), dict(moments), {}
    selected = trainable(config, params)
    for part, gradient in gradients.items():
        peak = config.lr if part != "head" else config.head_lr or config.lr
        rate = schedule(config, peak)(step)
        updates, moments[part] = _adamw(config).update(gradient, moments[part], selected[part])
        updates = jax.tree.map(lambda u, rate=rate: -rate * u, updates)
        params[part] = with_changes(params[part], optax.apply_updates(selected[part], updates))
        rates["head_lr" if part == "head" else "lr"] = rate
    return params, moments, {"grad_norm": norm} | rates
