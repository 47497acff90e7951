"""The functions of `mqa_jax.functions` with arrays and options, and a problem for them."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import oracle

from mqa_jax import functions

T, S, B, N, K = 61, 83, 2, 4, 2
RNG = np.random.default_rng(0)
normal = lambda *shape: jnp.asarray(RNG.standard_normal(shape, dtype=np.float32))
IDS = jnp.asarray(np.sort(RNG.integers(0, 5, (B, S)), axis=1), jnp.int32)
PARENTS = jnp.asarray(np.tril(RNG.random((T, T)) < 0.3) | np.eye(T, dtype=bool))
READY: dict[str, dict[str, Any]] = {
    "scaled": {"score_fn": functions.scaled, "score_fn[1]": 1 + normal(N) / 4},
    "t5": {"score_fn": functions.t5, "score_fn[1]": normal(32, N)},
    "t5 causal": {"score_fn": functions.t5_causal, "score_fn[1]": normal(32, N), "is_causal": True, "query_offset": 22},
    "prefix": {"mask_fn": functions.prefix, "mask_fn[1]": jnp.asarray([37, 0])},
    "documents": {"mask_fn": functions.documents, "mask_fn[1]": IDS},
    "dilated": {"mask_fn": functions.dilated, "mask_fn[1]": jnp.int32(7)},
    "neighbourhood": {"mask_fn": functions.neighbourhood, "mask_fn[1]": jnp.int32(11), "mask_fn[2]": jnp.int32(2)},
    "sink and window": {
        "mask_fn": functions.sink_and_window,
        "mask_fn[1]": jnp.int32(3),
        "mask_fn[2]": jnp.int32(13),
        "query_offset": 22,
    },
    "tree": {
        "mask_fn": functions.tree,
        "mask_fn[1]": jnp.asarray([19, 22]),
        "mask_fn[2]": PARENTS,
        "query_offset": jnp.asarray([19, 22]),
    },
}


def problem(options: dict[str, Any], rows: int = T, batch: tuple[int, ...] = (B,), **more: Any) -> oracle.Problem:
    sizes: dict[str, Any] = dict(rows=rows, columns=S, heads=N, kv_heads=K, features=8)
    return oracle.random_problem(np.random.default_rng(1), batch=batch, **sizes, **options, **more)
