"""Random attention problems, the plain low-precision computation, and the rule that judges a fast implementation.

The rule is FlashAttention's (its tests/test_flash_attn.py): against a float32 reference, a fast implementation may err
twice as much as a plain computation in its own precision does, plus a floor of a few units in the last place.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import mqa_jax

FACTOR = 2  # times the error of the plain computation
# Units in the last place of the largest expected entry: rounding the result itself, and, in float32, where the plain
# computation errs hardly more than that, summing in another order.
FLOOR_ULPS = {"float32": 8, "bfloat16": 0.5, "float16": 0.5}

DIFFERENTIABLE = ("query", "key", "value", "bias", "alibi_slopes", "sinks")


@dataclass(frozen=True)
class Problem:
    """Arrays and options of one `dot_product_attention` call, and cotangents for its two results."""

    arrays: dict[str, Any]  # the differentiable ones
    options: dict[str, Any] = field(default_factory=dict)
    cotangents: tuple[Any, Any] = (None, None)

    def astype(self, dtype: Any) -> "Problem":
        cast = {name: x.astype(dtype) for name, x in self.arrays.items()}
        return dataclasses.replace(self, arrays=cast)


def random_problem(
    rng: np.random.Generator,
    *,
    batch: tuple[int, ...] = (2,),
    rows: int,
    columns: int,
    heads: int,
    kv_heads: int,
    features: int,
    value_features: int | None = None,
    **options: Any,
) -> Problem:
    """Options that are arrays with gradients (bias, alibi_slopes, sinks) may be given among the options."""
    value_features = features if value_features is None else value_features
    normal = lambda *shape: jnp.asarray(rng.standard_normal(shape, dtype=np.float32))
    arrays = {
        "query": normal(*batch, rows, heads, features),
        "key": normal(*batch, columns, kv_heads, features),
        "value": normal(*batch, columns, kv_heads, value_features),
    }
    arrays |= {name: options.pop(name) for name in DIFFERENTIABLE if name in options}
    cotangents = normal(*batch, rows, heads, value_features), normal(*batch, rows, heads)
    return Problem(arrays, options, cotangents)


def results(problem: Problem, implementation: str | None) -> dict[str, Any]:
    """Output, log-sum-exp and every gradient, computed by one implementation."""
    return program(problem, implementation)(problem.arrays)


def outputs(problem: Problem, implementation: str | None) -> dict[str, Any]:
    """Output and log-sum-exp alone."""
    attend = lambda arrays: mqa_jax.dot_product_attention(
        **arrays, **problem.options, implementation=implementation, return_residual=True
    )
    return dict(zip(("out", "log_sum_exp"), jax.jit(attend)(problem.arrays)))


def quantized(problem: Problem, dtype: str) -> Problem:
    """The same with keys and values in 8 bits."""
    key, key_scale = mqa_jax.quantize(problem.arrays["key"], dtype)
    value, value_scale = mqa_jax.quantize(problem.arrays["value"], dtype)
    return dataclasses.replace(
        problem,
        arrays=problem.arrays | {"key": key, "value": value},
        options=problem.options | {"key_scale": key_scale, "value_scale": value_scale},
    )


def plain_results(problem: Problem) -> dict[str, Any]:
    """The same, plainly computed in the precision of the arrays and in another order than the reference."""
    return _differentiated(problem, lambda arrays: plain_attention(arrays, problem.options))(problem.arrays)


def program(problem: Problem, implementation: str | None) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """Compiled `results` for other arrays of the same shapes."""
    return _differentiated(
        problem,
        lambda arrays: mqa_jax.dot_product_attention(
            **arrays, **problem.options, implementation=implementation, return_residual=True
        ),
    )


def _differentiated(problem: Problem, attend: Callable) -> Callable[[dict[str, Any]], dict[str, Any]]:
    def loss(arrays):
        out, log_sum_exp = attend(arrays)
        seen = log_sum_exp > -jnp.inf
        weighed = jnp.where(seen, log_sum_exp, 0.0) * problem.cotangents[1]
        total = jnp.sum(out.astype(jnp.float32) * problem.cotangents[0]) + jnp.sum(weighed)
        return total, {"out": out, "log_sum_exp": log_sum_exp}

    def every_result(arrays):
        gradients, outputs = jax.grad(loss, has_aux=True)(arrays)
        return outputs | {f"d_{name}": gradient for name, gradient in gradients.items()}

    return jax.jit(every_result)


def plain_attention(arrays: dict[str, Any], options: dict[str, Any]) -> tuple[Any, Any]:
    """Every intermediate in the precision of the arrays except the softmax; keys in reverse order."""
    reverse = lambda x, axis: jnp.flip(x, axis) if x.shape[axis] > 1 else x
    stored = arrays | {name: _restored(arrays, options, name) for name in ("key", "value")}
    query, key, value = arrays["query"], reverse(stored["key"], -3), reverse(stored["value"], -3)
    group = query.shape[-2] // key.shape[-2]
    key, value = jnp.repeat(key, group, axis=-2), jnp.repeat(value, group, axis=-2)
    scale = options.get("scale") or query.shape[-1] ** -0.5
    score = jnp.einsum("...tnh,...snh->...nts", query, key).astype(jnp.float32) * scale
    if "logits_soft_cap" in options:
        score = options["logits_soft_cap"] * jnp.tanh(score / options["logits_soft_cap"])
    if "bias" in arrays:
        score = score + reverse(arrays["bias"], -1).astype(jnp.float32)
    if "alibi_slopes" in arrays:
        rows, columns = (jnp.arange(n, dtype=jnp.float32) for n in score.shape[-2:])
        distance = jnp.abs(columns[::-1] - rows[:, None] - options.get("query_offset", 0))
        score = score - arrays["alibi_slopes"].astype(jnp.float32)[:, None, None] * distance
    if options.get("is_causal"):
        rows, columns = score.shape[-2:]
        visible = jnp.tri(rows, columns, options.get("query_offset", 0), dtype=bool)
        score = jnp.where(jnp.flip(visible, 1), score, -jnp.inf)
    if "sinks" in arrays:  # one more score, whose value is 0
        sinks = jnp.broadcast_to(arrays["sinks"].astype(jnp.float32)[:, None, None], (*score.shape[:-1], 1))
        score = jnp.concatenate([sinks, score], axis=-1)
        value = jnp.concatenate([jnp.zeros_like(value[..., :1, :, :]), value], axis=-3)
    weight = jax.nn.softmax(score, axis=-1).astype(value.dtype)
    return jnp.einsum("...nts,...snv->...tnv", weight, value), jnp.moveaxis(jax.nn.logsumexp(score, axis=-1), -1, -2)


def _restored(arrays: dict[str, Any], options: dict[str, Any], name: str) -> Any:
    """Keys or values in the dtype of the query, whether they are stored in 8 bits or not."""
    scale = options.get(f"{name}_scale")
    return arrays[name] if scale is None else mqa_jax.dequantize(arrays[name], scale).astype(arrays["query"].dtype)


def plain_outputs(problem: Problem) -> dict[str, Any]:
    return dict(zip(("out", "log_sum_exp"), plain_attention(problem.arrays, problem.options)))


def judge_8_bits(problem: Problem, dtype: Any, bits: str, *implementations: str) -> None:
    """By the same rule, output and log-sum-exp of keys and values in 8 bits, to queries in `dtype`."""
    stored = quantized(problem, bits)
    low = dataclasses.replace(stored, arrays=stored.arrays | {"query": stored.arrays["query"].astype(dtype)})
    same = dataclasses.replace(low, arrays=low.arrays | {"query": low.arrays["query"].astype(jnp.float32)})
    for implementation in implementations:
        judge(outputs(low, implementation), plain_outputs(low), outputs(same, "reference"))


def judge(fast: dict[str, Any], plain: dict[str, Any], reference: dict[str, Any]) -> None:
    """Fails with the worst coordinate of the first result that breaks the rule."""
    assert set(fast) == set(reference)
    for name, expected in reference.items():
        assert fast[name].dtype == plain[name].dtype, f"{name}: {fast[name].dtype=!s}, {plain[name].dtype=!s}"
        _judge_one(name, np.float64(fast[name]), np.float64(plain[name]), np.float64(expected), fast[name].dtype.name)


def judge_float32(fast: dict[str, Any], reference: dict[str, Any]) -> None:
    """For float32 options that `plain_attention` does not know: only the floor, scaled by the number of terms."""
    for name, expected in reference.items():
        expected = np.float64(expected)
        _judge_one(name, np.float64(fast[name]), expected, expected, "float32", factor=4)


def _judge_one(name, fast, plain, expected, dtype: str, factor: int = 1) -> None:
    assert fast.shape == expected.shape, f"{name}: {fast.shape=}, {expected.shape=}"
    np.testing.assert_array_equal(np.isneginf(fast), np.isneginf(expected), err_msg=f"{name}: -inf elsewhere")
    finite = np.isfinite(expected)
    assert np.isfinite(fast[finite]).all(), f"{name}: not finite"
    largest = np.abs(expected[finite]).max(initial=0.0)
    floor = factor * FLOOR_ULPS[dtype] * float(jnp.finfo(dtype).eps) * largest
    error = np.where(finite, np.abs(np.where(finite, fast, 0) - np.where(finite, expected, 0)), 0)
    plain_error = np.where(finite, np.abs(np.where(finite, plain, 0) - np.where(finite, expected, 0)), 0)
    allowed = FACTOR * plain_error.max(initial=0.0) + floor
    if error.size and error.max() > allowed:
        worst = np.unravel_index(error.argmax(), error.shape)
        raise AssertionError(
            f"{name}: error {error.max():.3g} at {tuple(map(int, worst))} is more than {allowed:.3g} = {FACTOR} * "
            f"{plain_error.max():.3g} (plain) + {floor:.3g}; got {fast[worst]:.8g}, expected {expected[worst]:.8g}"
        )
