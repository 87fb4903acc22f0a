"""Losses against numpy definitions; what absent documents, devices and chunks change: nothing."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from colbert_jax.training import losses

B, W = 8, 4
POSITIVES = np.arange(B) * W


@pytest.fixture(scope="module")
def data():
    """Scores of the queries' own documents, the teacher's, scores of every document."""
    rng = np.random.default_rng(0)
    shapes = ((B, W), (B, W), (B, B * W))
    return tuple(rng.normal(20, 4, shape).astype(np.float32) for shape in shapes)


def log_softmax(x):
    x = np.asarray(x, np.float64)
    return x - x.max() - np.log(np.exp(x - x.max()).sum())


def kl(teacher, student):
    p, q = log_softmax(teacher), log_softmax(student)
    return (np.exp(p) * (p - q)).sum()


def min_max(x):
    x = np.asarray(x, np.float64)
    return (x - x.min()) / (x.max() - x.min())


def candidates(query, queries, ways):
    """Stanford's, as one says it: own first passage, all passages of the others."""
    return [b * ways + w for b in range(queries) for w in range(ways) if b != query or w == 0]


ALL = {
    "cross-entropy": lambda own, teacher, every: losses.cross_entropy(own),
    "contrastive": lambda own, teacher, every: losses.contrastive(
        every, POSITIVES, temperature=0.5
    ),
    "in-batch": lambda own, teacher, every: losses.in_batch_negatives(every, W),
    "distillation": lambda own, teacher, every: losses.distillation(
        own, teacher, alpha=0.5, student_temperature=2.0, teacher_temperature=3.0
    ),
    "normalised": lambda own, teacher, every: losses.distillation(
        own, teacher, student_temperature=0.5, normalize_student=True, normalize_teacher=True
    ),
    "margin MSE": lambda own, teacher, every: losses.margin_mse(own, teacher),
}
# Loss and its gradients by the scores of own documents and of all, as one program each.
PROGRAMS = {name: jax.jit(jax.value_and_grad(loss, argnums=(0, 2))) for name, loss in ALL.items()}
EXPECTED = {
    "cross-entropy": lambda b, s, t, e: -log_softmax(s)[0],
    "contrastive": lambda b, s, t, e: -log_softmax(e / 0.5)[b * W],
    "in-batch": lambda b, s, t, e: -log_softmax(e[candidates(b, B, W)])[b * W],
    "distillation": lambda b, s, t, e: kl(0.5 * t / 3.0, s / 2.0),
    "normalised": lambda b, s, t, e: kl(min_max(t), min_max(s) / 0.5),
    "margin MSE": lambda b, s, t, e: np.mean(((s[0] - s[1:]) - (t[0] - t[1:])) ** 2),
}


@pytest.mark.parametrize("name", ALL)
def test_definitions(data, name):
    expected = np.mean([EXPECTED[name](b, *row) for b, row in enumerate(zip(*data, strict=True))])
    loss, _ = PROGRAMS[name](*data)
    assert loss.dtype == jnp.float32 and loss.shape == ()
    np.testing.assert_allclose(loss, expected, rtol=1e-5)


def test_two_equal_scores():
    """Of two alike, each has probability one half."""
    np.testing.assert_allclose(losses.cross_entropy(jnp.full((3, 2), 7.0)), np.log(2), rtol=1e-6)


def test_golden_in_batch_candidates():
    """Stanford's own construction for 4 queries of 3 passages, as it ran."""
    ids, labels = losses.in_batch_candidates(4, 3)
    assert ids.shape == (4, 10)
    assert ids[1].tolist() == [0, 1, 2, 3, 6, 7, 8, 9, 10, 11]
    assert labels.tolist() == [0, 3, 6, 9]
    assert ids.tolist() == [candidates(b, 4, 3) for b in range(4)]


def dropped(name, own, teacher, every, b, absent):
    """The loss of query b without the documents in `absent`, counted from 0 to B * W."""
    kept = [w for w in range(W) if b * W + w not in absent]
    others = [n for n in range(B * W) if n not in absent]
    if name == "contrastive":
        return -log_softmax(every[b, others] / 0.5)[others.index(b * W)]
    if name == "in-batch":
        columns = [n for n in candidates(b, B, W) if n not in absent]
        return -log_softmax(every[b, columns])[columns.index(b * W)]
    value = EXPECTED[name](b, own[b, kept], teacher[b, kept], None)
    return value * (len(kept) - 1) / (W - 1) if name == "margin MSE" else value


@pytest.mark.parametrize("name", ALL)
def test_absent_documents_take_no_part(data, name):
    """As if they were not there: in the loss, in its gradient."""
    own, teacher, every = (x.copy() for x in data)
    absent = [1, 3, 2 * W + 2]
    own.reshape(-1)[absent] = -np.inf
    every[:, absent] = -np.inf
    expected = np.mean([dropped(name, *data, b, absent) for b in range(B)])
    loss, gradients = PROGRAMS[name](own, teacher, every)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    for gradient in gradients:
        assert np.isfinite(gradient).all()
    assert not np.asarray(gradients[0]).reshape(-1)[absent].any()
    assert not np.asarray(gradients[1])[:, absent].any()


@pytest.mark.parametrize("name", ALL)
def test_absent_positives(data, name):
    """Of one query, of a query without any document, and in the teacher's scores."""
    own, teacher, every = (x.copy() for x in data)
    own[0, 0] = -np.inf
    own[1] = -np.inf
    every[:, : 2 * W][:, [0, 4, 5, 6, 7]] = -np.inf
    every[2] = -np.inf
    teacher[3, 1] = -np.inf
    teacher[4] = -np.inf
    loss, gradients = PROGRAMS[name](own, teacher, every)
    assert np.isfinite(loss)
    assert all(np.isfinite(gradient).all() for gradient in gradients)


@pytest.mark.parametrize("name", ALL)
def test_not_a_number_is_not_hidden(data, name):
    own, teacher, every = (x.copy() for x in data)
    own[1, 2] = every[1, 2] = np.nan
    assert np.isnan(PROGRAMS[name](own, teacher, every)[0])


def test_equal_scores_normalise():
    """To zeros: the softmax of either side is even, the loss nothing, the gradient finite."""
    scores = jnp.full((2, 5), 3.0)
    student = partial(losses.distillation, normalize_student=True)
    loss, gradient = jax.jit(jax.value_and_grad(student))(scores, jnp.zeros((2, 5)))
    np.testing.assert_allclose(loss, 0, atol=1e-6)
    assert np.isfinite(gradient).all()
    teacher = jax.jit(partial(losses.distillation, normalize_teacher=True))
    np.testing.assert_allclose(teacher(jnp.zeros((2, 5)), scores), 0, atol=1e-6)


def test_a_small_step_changes_the_loss_by_the_gradient(data):
    """Central differences, in float32 and therefore coarse."""
    rng = np.random.default_rng(1)
    for name, program in PROGRAMS.items():
        _, gradients = program(*data)
        steps = [rng.normal(0, 0.02, x.shape).astype(np.float32) for x in gradients]
        own, teacher, every = data
        above, _ = program(own + steps[0], teacher, every + steps[1])
        below, _ = program(own - steps[0], teacher, every - steps[1])
        expected = sum((2 * g * s).sum() for g, s in zip(gradients, steps, strict=True))
        np.testing.assert_allclose(above - below, expected, rtol=0.02, atol=2e-5, err_msg=name)


@jax.jit
def everything(own, teacher, every):
    return [loss(own, teacher, every) for loss in ALL.values()]


def one_by_one(*data):
    return [program(*data)[0] for program in PROGRAMS.values()]


def test_half_precision_scores_are_reduced_in_float32(data):
    low = [jnp.asarray(x, jnp.bfloat16) for x in data]
    exact = [x.astype(jnp.float32) for x in low]
    got = everything(*low)
    assert all(loss.dtype == jnp.float32 for loss in got)
    np.testing.assert_allclose(got, one_by_one(*exact), rtol=1e-6)


@pytest.mark.parametrize("devices", [2, 8])
def test_devices_change_nothing(data, eight_devices, devices):
    mesh = jax.make_mesh((devices,), ("data",), (AxisType.Auto,), devices=eight_devices[:devices])
    spread = jax.device_put(data, NamedSharding(mesh, P("data")))
    np.testing.assert_allclose(everything(*spread), one_by_one(*data), rtol=1e-5)


def test_token_matches():
    """Of each query token the variance over documents of the difference, absent ones left out."""
    rng = np.random.default_rng(2)
    student, teacher = (rng.normal(0, 1, (B, 5, 7)).astype(np.float32) for _ in range(2))
    student[:, :, 3] = teacher[:, :, 3] = -np.inf
    student[4] = -np.inf
    expected = 0.0
    for b in range(B):
        for s, t in zip(student[b], teacher[b], strict=True):
            both = np.isfinite(s) & np.isfinite(t)
            expected += np.var(s[both] - t[both]) / 0.5**2 / 2 / B if both.any() else 0
    program = jax.jit(jax.value_and_grad(partial(losses.token_matches, temperature=0.5)))
    loss, gradient = program(student, teacher)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    assert np.isfinite(gradient).all()
    shifted = student + rng.normal(0, 1, (B, 5, 1)).astype(np.float32)
    np.testing.assert_allclose(program(shifted, teacher)[0], loss, rtol=1e-5)
    with pytest.raises(ValueError, match="the same queries and documents"):
        losses.token_matches(student, teacher[:, :4])


def test_token_matches_add_in_the_unit_of_the_divergence():
    """Where documents score alike: half the variance is the divergence, to second order."""
    student = np.random.default_rng(3).normal(0, 0.02, (B, 1, 6)).astype(np.float32)
    teacher = np.zeros_like(student)
    tokens = losses.token_matches(student, teacher, temperature=0.5)
    scores = losses.distillation(
        student[:, 0], teacher[:, 0], student_temperature=0.5, teacher_temperature=0.5
    )
    np.testing.assert_allclose(tokens, scores, rtol=0.1)


def test_bad_arguments(data):
    own, teacher, every = data
    with pytest.raises(ValueError, match=r"\(8, 4\), the teacher's \(8, 3\)"):
        losses.distillation(own, teacher[:, :3])
    with pytest.raises(ValueError, match="at least one negative"):
        losses.margin_mse(own[:, :1], teacher[:, :1])
    with pytest.raises(ValueError, match="40 columns, got 32"):
        losses.in_batch_negatives(every, 5)
    with pytest.raises(ValueError, match="at least 1 row, got 0"):
        losses.encode_chunked(lambda params, rows: rows, None, own, 0)


def encoder(params, rows):
    """Two outputs, one of them of more axes; a hidden layer as wide as memory is to be measured."""
    x, y = rows
    hidden = jnp.tanh(x @ params["in"]) * y[:, None, None]
    return {"tokens": hidden @ params["out"], "sum": hidden.sum(axis=(1, 2))}


def encoder_inputs(n, length=3, width=4, hidden=6):
    rng = np.random.default_rng(2)
    shapes = {"in": (width, hidden), "out": (hidden, width)}
    params = {k: rng.normal(size=s).astype(np.float32) for k, s in shapes.items()}
    x = rng.normal(size=(n, length, width)).astype(np.float32)
    return params, (x, rng.normal(size=n).astype(np.float32))


def total(encode, params, rows):
    out = encode(params, rows)
    place = 1 + jnp.arange(len(out["sum"])) / len(out["sum"])  # the order of the rows matters
    loss = jnp.sin(out["tokens"] * place[:, None, None]).sum() + (out["sum"] * place).sum()
    return loss, out


def loss_and_gradients(encode, params, rows):
    """And what `encode` gives."""
    return jax.jit(jax.value_and_grad(partial(total, encode), has_aux=True))(params, rows)


def in_chunks(chunk):
    return lambda params, rows: losses.encode_chunked(encoder, params, rows, chunk)


def assert_alike(got, wanted):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * np.abs(b).max())


@pytest.mark.parametrize("chunk", [1, 4, 5, 12, 50])
def test_chunks_change_nothing(chunk):
    """Of 12 rows, also where chunks do not divide them."""
    params, rows = encoder_inputs(12)
    wanted = loss_and_gradients(encoder, params, rows)
    assert_alike(loss_and_gradients(in_chunks(chunk), params, rows), wanted)


def test_rows_of_keys_stay_with_their_rows():
    """Random numbers depend on a row's key, not on its chunk."""
    keys = jax.random.split(jax.random.key(0), 10)

    def draw(params, rows):
        return jax.vmap(lambda key: jax.random.normal(key, (3,)))(rows[0])

    chunked = jax.jit(lambda keys: losses.encode_chunked(draw, None, (keys,), 4))
    np.testing.assert_array_equal(chunked(keys), draw(None, (keys,)))


def test_chunks_of_sharded_rows(eight_devices):
    """The same gradients, and no row changes its device: nothing is gathered."""
    mesh = jax.make_mesh((8,), ("data",), (AxisType.Auto,), devices=eight_devices)
    params, rows = encoder_inputs(32)
    spread = jax.device_put(rows, NamedSharding(mesh, P("data")))
    step = jax.jit(jax.value_and_grad(partial(total, in_chunks(8)), has_aux=True))
    program = step.lower(params, spread).compile()
    assert "all-reduce" in program.as_text()
    assert not any(name in program.as_text() for name in ("all-gather", "all-to-all", "permute("))
    assert_alike(program(params, spread), loss_and_gradients(encoder, params, rows))


def test_memory_of_chunks():
    """64 rows in chunks of 4 keep a tenth of the activations, which are all the memory here."""
    params, rows = encoder_inputs(64, 32, 8, 512)

    def temporary(encode):
        step = jax.jit(jax.grad(partial(total, encode), has_aux=True))
        return step.lower(params, rows).compile().memory_analysis().temp_size_in_bytes

    assert temporary(in_chunks(4)) * 5 < temporary(encoder)
