"""Twenty optimiser steps beside torch: the real MiniLM, distillation and in-batch negatives."""

import jax
import numpy as np
import pytest

from colbert_jax import ColBERT
from colbert_jax.config import TrainingConfig
from colbert_jax.training.batch import ExampleBatch, TokenBatch
from colbert_jax.training.step import init_state, make_gradients, make_update

pytestmark = pytest.mark.slow

torch = pytest.importorskip("torch", reason="torch, the parity oracle, is not installed")


STEPS, QUERIES, WAYS, LENGTH, DOC_LENGTH = 20, 3, 4, 12, 24


def batches(rng: np.random.Generator) -> list[ExampleBatch]:
    """Random token ids, ragged, with dropped tokens among the documents."""

    def rows(count: int, length: int, drop: float) -> TokenBatch:
        attended = rng.integers(length // 2, length + 1, count).astype(np.int32)
        attended[0] = length
        there = np.arange(length) < attended[:, None]
        ids = np.where(there, rng.integers(1000, 20_000, (count, length)), 0).astype(np.int32)
        return TokenBatch(ids, attended, there & (rng.random((count, length)) >= drop))

    out = []
    for _ in range(STEPS):
        scores = rng.normal(0, 2, (QUERIES, WAYS)).astype(np.float32)
        order = np.arange(QUERIES * WAYS, dtype=np.int32)
        documents = (rows(QUERIES * WAYS, DOC_LENGTH, 0.1),)
        out.append(ExampleBatch(rows(QUERIES, LENGTH, 0.0), documents, order, scores))
    return out


def torch_losses(folder, projection: np.ndarray, config: TrainingConfig, batches) -> list[float]:
    """Stanford ColBERT's training step in torch."""
    transformers = pytest.importorskip("transformers")
    backbone = transformers.BertModel.from_pretrained(folder, attn_implementation="eager")
    for module in backbone.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    backbone.train()
    linear = torch.nn.Linear(*projection.shape, bias=False)
    linear.weight.data = torch.from_numpy(projection.T.copy())
    parameters = [*backbone.parameters(), *linear.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=config.lr, eps=1e-8, weight_decay=0.0)
    schedule = transformers.get_linear_schedule_with_warmup(
        optimizer, config.warmup, config.maxsteps
    )

    def encode(rows: TokenBatch):
        mask = torch.arange(rows.ids.shape[1]) < torch.from_numpy(rows.attended)[:, None]
        hidden = backbone(torch.from_numpy(rows.ids).long(), attention_mask=mask.long())
        x = linear(hidden.last_hidden_state) * torch.from_numpy(rows.kept)[..., None].float()
        return torch.nn.functional.normalize(x, dim=-1)

    losses = []
    for batch in batches:
        queries, documents = encode(batch.queries), encode(batch.documents[0])
        kept = torch.from_numpy(batch.documents[0].kept)
        similarity = torch.einsum("qid,njd->qnij", queries, documents)
        similarity = similarity.masked_fill(~kept[None, :, None], -9999.0)
        pairs = similarity.max(-1).values.sum(-1)
        own = torch.stack([pairs[b, b * WAYS : (b + 1) * WAYS] for b in range(QUERIES)])
        student = torch.log_softmax(own, -1)
        teacher = torch.log_softmax(config.distillation_alpha * torch.from_numpy(batch.scores), -1)
        loss = torch.nn.functional.kl_div(student, teacher, reduction="batchmean", log_target=True)
        for b in range(QUERIES):
            others = [n for n in range(QUERIES * WAYS) if n // WAYS != b]
            candidates = pairs[b, [b * WAYS, *others]][None]
            loss = (
                loss
                + torch.nn.functional.cross_entropy(candidates, torch.zeros(1, dtype=torch.long))
                / QUERIES
            )
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, config.max_grad_norm)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    return losses


def test_twenty_steps_follow_torch(minilm_folder):
    config = TrainingConfig(
        nway=WAYS, bsize=QUERIES, lr=5e-5, warmup=4, maxsteps=STEPS, dropout=0.0
    )
    devices = jax.devices()[:1]
    model = ColBERT.from_pretrained(minilm_folder, dim=32, dtype="float32", devices=devices)
    data = batches(np.random.default_rng(0))
    params = jax.tree.map(np.asarray, model.params)
    projection = params["head"][0]["linear"]["kernel"]
    expected = torch_losses(minilm_folder, projection, config, data)

    state = init_state(config, params)
    gradients = make_gradients(model.encoder_config, config, "float32")
    update = make_update(config)
    losses = []
    for number, batch in enumerate(data):
        grads, logged = gradients(
            state["params"], batch, np.int32(number), np.int32(0), trained=("backbone", "head")
        )
        state, _ = update(state, grads)
        losses.append(float(logged["loss"]))
    np.testing.assert_allclose(losses, expected, rtol=1e-3)
    # The losses differ from step to step by far more: the steps were taken.
    assert np.std(losses) > 0.05 and int(state["step"]) == STEPS
