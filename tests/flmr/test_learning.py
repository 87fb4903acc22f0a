"""Image queries learn to find captions: shapes and colours, drawn on the spot."""

import os

import jax
import numpy as np
import optax
import pytest
import support

from colbert_jax.flmr import FLMRConfig, FLMRModelForRetrieval

COLOURS = {
    "red": (1, 0, 0),
    "green": (0, 1, 0),
    "blue": (0, 0, 1),
    "yellow": (1, 1, 0),
    "white": (1, 1, 1),
    "violet": (1, 0, 1),
    "cyan": (0, 1, 1),
    "grey": (0.5, 0.5, 0.5),
}
PLACES = {
    "left": (10, 16),
    "right": (22, 16),
    "top": (16, 10),
    "bottom": (16, 22),
    "middle": (16, 16),
}
SHAPES = {
    "circle": lambda x, y, r: np.hypot(x, y) < r,
    "square": lambda x, y, r: np.maximum(abs(x), abs(y)) < 0.8 * r,
    "ring": lambda x, y, r: abs(np.hypot(x, y) - 0.78 * r) < 0.22 * r,
    "cross": lambda x, y, r: (
        (np.minimum(abs(x), abs(y)) < 0.3 * r) & (np.maximum(abs(x), abs(y)) < r)
    ),
    "bar": lambda x, y, r: (abs(y) < 0.35 * r) & (abs(x) < r),
}
CAPTIONS = [f"a {c} {s} {p}" for c in COLOURS for s in SHAPES for p in PLACES]
BATCH, STEPS = 64, 600


def picture(rng, caption):
    """float32[3, 32, 32]: a shape a little off its place, of any size, and noise."""
    _, colour, shape, place = caption.split()
    y, x = np.mgrid[:32, :32]
    dx, dy = rng.uniform(-1.5, 1.5, 2)
    inside = SHAPES[shape](x - PLACES[place][0] - dx, y - PLACES[place][1] - dy, rng.uniform(5, 7))
    image = rng.normal(-0.5, 0.1, (3, 32, 32))
    image[:, inside] += 2 * np.array(COLOURS[colour])[:, None]
    return image.astype(np.float32)


@pytest.mark.slow
@pytest.mark.skipif(not os.environ.get("COLBERT_JAX_LONG"), reason=support.LONG)
def test_image_queries_learn_to_find_their_captions(tmp_path):
    """From random weights; every picture is new, those of the end too."""
    assert len(CAPTIONS) == 200
    vision = dict(hidden_size=48, intermediate_size=96, num_attention_heads=4, num_hidden_layers=2)
    folder = support.write_preflmr(
        tmp_path / "c", config={"initializer_range": 0.05}, vision=vision
    )
    config = FLMRConfig.from_pretrained(
        folder, transformer_mapping_config_base=str(folder / "mapping")
    )
    tokenizers = FLMRModelForRetrieval.from_pretrained(folder)
    model = FLMRModelForRetrieval(
        config,
        tokenizers.query_tokenizer,
        tokenizers.context_tokenizer,
        dtype="float32",
        freeze_vision=False,
    )
    documents = model.context_tokenizer(CAPTIONS, padding="longest")
    ids, attended = documents["input_ids"], documents["attention_mask"]
    queries = model.query_tokenizer(["what is this"] * len(CAPTIONS))
    batch = {name: array[:BATCH] for name, array in queries.items()}
    rate = optax.warmup_cosine_decay_schedule(0, 2e-3, 50, STEPS)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(rate))

    @jax.jit
    def step(params, state, pixels, ids, attended):
        def loss(params):
            return model(
                *batch.values(), pixels, None, ids, attended, num_negative_examples=0, params=params
            ).loss

        value, gradients = jax.value_and_grad(loss)(params)
        updates, state = optimizer.update(gradients, state)
        return optax.apply_updates(params, updates), state, value

    rng = np.random.default_rng(0)
    params, state = model.params, optimizer.init(model.params)
    for _ in range(STEPS):
        chosen = rng.permutation(len(CAPTIONS))[:BATCH]
        pixels = np.stack([picture(rng, CAPTIONS[i]) for i in chosen])
        params, state, _ = step(params, state, pixels, ids[chosen], attended[chosen])

    model.params = params
    unseen = np.stack([picture(np.random.default_rng(99), caption) for caption in CAPTIONS])
    rows = model.query(**queries, pixel_values=unseen).late_interaction_output
    out = model.doc(ids, attended)
    scores = model.score_matrix(rows, out.late_interaction_output, out.context_mask)
    recall = (np.asarray(scores).argmax(axis=1) == np.arange(len(CAPTIONS))).mean()
    print(f"recall@1 {recall:.3f}")
    assert recall > 0.9
