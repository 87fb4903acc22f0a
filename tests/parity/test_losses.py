"""Losses and their gradients through MaxSim against torch, in float32."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import unit_rows

from colbert_jax.scoring.gradient import all_pairs_scores, nway_scores
from colbert_jax.training import losses

torch = pytest.importorskip("torch", reason="torch, the parity oracle, is not installed")

B, W, LQ, LD, D = 4, 3, 8, 20, 16


@pytest.fixture(scope="module")
def data():
    """Query and document embeddings, masks of mixed lengths, the teacher's scores."""
    rng = np.random.default_rng(3)
    queries, documents = unit_rows(rng, B, LQ, D), unit_rows(rng, B * W, LD, D)
    queries[1, 5:] = 0
    lengths = rng.integers(1, LD + 1, B * W)
    mask = rng.permuted(np.arange(LD) < lengths[:, None], axis=1)
    return queries, documents, mask, rng.normal(0, 3, (B, W)).astype(np.float32)


def torch_pairs(queries, documents, mask):
    """Every query with every document, masked as Stanford's ColBERT does."""
    similarity = torch.einsum("bqd,nld->bnlq", queries, documents)
    similarity = similarity.masked_fill(~mask[None, :, :, None], -9999)
    return similarity.max(dim=2).values.sum(dim=-1)


def torch_own(pairs):
    return torch.stack([pairs[b, b * W : b * W + W] for b in range(B)])


def torch_kl(student, teacher):
    loss = torch.nn.KLDivLoss(reduction="batchmean", log_target=True)
    return loss(torch.log_softmax(student, dim=1), torch.log_softmax(teacher, dim=1))


def torch_min_max(x):
    """PyLate's normalisation."""
    low, high = x.min(dim=1, keepdim=True).values, x.max(dim=1, keepdim=True).values
    return (x - low) / (high - low + 1e-8)


def torch_in_batch(pairs):
    """Stanford's: own first passage against all passages of the other queries."""
    rows = []
    for b in range(B):
        own = set(range(b * W + 1, b * W + W))
        rows.append(pairs[b, [n for n in range(B * W) if n not in own]])
    labels = torch.arange(B) * W
    return torch.nn.functional.cross_entropy(torch.stack(rows), labels)


def torch_margin_mse(own, teacher):
    student = own[:, :1] - own[:, 1:]
    return torch.nn.functional.mse_loss(student, teacher[:, :1] - teacher[:, 1:])


# Loss -> (ours of the scores, torch's of the scores of all pairs and the teacher's).
ON_OWN = {
    "cross-entropy": (
        lambda own, teacher: losses.cross_entropy(own),
        lambda pairs, teacher: torch.nn.functional.cross_entropy(
            torch_own(pairs), torch.zeros(B, dtype=torch.long)
        ),
    ),
    "pairwise": (
        lambda own, teacher: losses.cross_entropy(own[:, :2]),
        lambda pairs, teacher: torch.nn.functional.cross_entropy(
            torch_own(pairs)[:, :2], torch.zeros(B, dtype=torch.long)
        ),
    ),
    "distillation": (
        losses.distillation,
        lambda pairs, teacher: torch_kl(torch_own(pairs), teacher),
    ),
    "distillation, alpha and temperatures": (
        partial(losses.distillation, alpha=0.7, student_temperature=0.25, teacher_temperature=2.0),
        lambda pairs, teacher: torch_kl(torch_own(pairs) / 0.25, 0.7 * teacher / 2.0),
    ),
    "PyLate's distillation": (
        partial(losses.distillation, normalize_student=True, normalize_teacher=True),
        lambda pairs, teacher: torch_kl(torch_min_max(torch_own(pairs)), torch_min_max(teacher)),
    ),
    "margin MSE": (
        losses.margin_mse,
        lambda pairs, teacher: torch_margin_mse(torch_own(pairs), teacher),
    ),
}
ON_PAIRS = {
    "in-batch": (
        lambda pairs: losses.in_batch_negatives(pairs, W),
        lambda pairs, teacher: torch_in_batch(pairs),
    ),
    "contrastive": (
        lambda pairs: losses.contrastive(pairs, jnp.arange(B) * W, temperature=0.5),
        lambda pairs, teacher: torch.nn.functional.cross_entropy(pairs / 0.5, torch.arange(B) * W),
    ),
}


def compare(ours, theirs, data):
    teacher = torch.tensor(data[3])
    compare_scores(ours, lambda q, d, mask: theirs(torch_pairs(q, d, mask), teacher), data)


def compare_scores(ours, theirs, data):
    queries, documents, mask, _ = data
    value, gradients = jax.jit(jax.value_and_grad(ours, argnums=(0, 1)))(queries, documents)
    q, d = (torch.tensor(x, requires_grad=True) for x in (queries, documents))
    expected = theirs(q, d, torch.tensor(mask))
    expected.backward()
    np.testing.assert_allclose(value, expected.item(), rtol=1e-5)
    for got, want in zip(gradients, (q.grad.numpy(), d.grad.numpy()), strict=True):
        assert np.abs(want).max() > 1e-3
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5 * np.abs(want).max())


@pytest.mark.parametrize("name", ON_OWN)
def test_of_own_documents(data, name):
    loss, theirs = ON_OWN[name]
    _, _, mask, teacher = data

    def ours(queries, documents):
        ways = documents.reshape(B, W, LD, D)
        return loss(nway_scores(queries, ways, mask.reshape(B, W, LD)), teacher)

    compare(ours, theirs, data)


@pytest.mark.parametrize("name", ON_PAIRS)
def test_of_every_document(data, name):
    loss, theirs = ON_PAIRS[name]

    def ours(queries, documents):
        return loss(all_pairs_scores(queries, documents, data[2]))

    compare(ours, theirs, data)


def test_of_every_query_token(data):
    """The best similarities of the tokens of queries one by one, as the sums of all of them."""
    mask = data[2]
    rng = np.random.default_rng(4)
    teacher = rng.normal(0, 1, (B, LQ, B * W)).astype(np.float32)

    def ours(queries, documents):
        tokens = all_pairs_scores(queries.reshape(B * LQ, 1, D), documents, mask)
        matches = tokens.reshape(teacher.shape)
        return losses.token_matches(matches, teacher, temperature=0.5)

    def theirs(queries, documents, mask):
        pairs = torch_pairs(queries.reshape(B * LQ, 1, D), documents, mask)
        difference = (pairs.reshape(teacher.shape) - torch.tensor(teacher)) / 0.5
        return difference.var(dim=-1, correction=0).sum(dim=1).mean() / 2

    compare_scores(ours, theirs, data)
