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
from mqa_jax import dropout, masks, reference
from mqa_jax.attention import inputs_of
from mqa_jax.batch_axes import over_flat_batch
from mqa_jax.inputs import Inputs

FACTOR = 2  # times the error of the plain computation
# Units in the last place of the largest expected entry: rounding the result itself, and, in float32, where the plain
# computation errs hardly more than that, summing in another order.
FLOOR_ULPS = {"float32": 8, "bfloat16": 0.5, "float16": 0.5}

DIFFERENTIABLE = ("query", "key", "value", "bias", "alibi_slopes", "sinks", "score_fn[1]", "score_fn[2]")


@dataclass(frozen=True)
class Problem:
    """Arrays and options of one `dot_product_attention` call, and cotangents for its two results.

    `score_fn[1]` is the first array of score_fn, and so on; `arguments` makes a tuple of a function and its arrays.
    """

    arrays: dict[str, Any]  # the differentiable ones
    options: dict[str, Any] = field(default_factory=dict)
    cotangents: tuple[Any, Any] = (None, None)

    def astype(self, dtype: Any) -> "Problem":
        """What is in 8 bits stays so."""
        cast = {name: x if x.dtype.itemsize == 1 else x.astype(dtype) for name, x in self.arrays.items()}
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
        **arguments(arrays, problem.options), implementation=implementation, return_residual=True
    )
    return dict(zip(("out", "log_sum_exp"), jax.jit(attend)(problem.arrays)))


def arguments(arrays: dict[str, Any], options: dict[str, Any]) -> dict[str, Any]:
    """Of `dot_product_attention`."""
    given = arrays | options
    for name in ("score_fn", "mask_fn"):
        parts = [given.pop(key) for key in sorted(given) if key.partition("[")[0] == name]
        if parts:
            given[name] = tuple(parts)
    return given


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
    return plain_program_for_values(problem)(problem)


def program(problem: Problem, implementation: str | None) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """Compiled `results` for other arrays of the same shapes."""
    compute = program_for_values(problem, implementation)
    return lambda arrays: compute(dataclasses.replace(problem, arrays=arrays))


def program_for_values(
    problem: Problem, implementation: str | None, differentiated: bool = True
) -> Callable[[Problem], dict[str, Any]]:
    """Compiled `results`, or `outputs`, of problems that differ in the values of arrays: lengths, masks, seeds too."""
    attend = lambda arrays, options: mqa_jax.dot_product_attention(
        **arguments(arrays, options), implementation=implementation, return_residual=True
    )
    return compiled(problem, attend, differentiated)


def plain_program_for_values(problem: Problem, differentiated: bool = True) -> Callable[[Problem], dict[str, Any]]:
    return compiled(problem, plain_attention, differentiated)


def compiled(problem: Problem, attend: Callable, differentiated: bool = True) -> Callable[[Problem], dict[str, Any]]:
    """What is an array is an argument of the program, everything else a part of it."""
    traced = lambda options: {name: x for name, x in options.items() if isinstance(x, jax.Array)}
    static = {name: x for name, x in problem.options.items() if not isinstance(x, jax.Array)}

    def loss(arrays, options, cotangents):
        out, log_sum_exp = attend(arrays, static | options)
        seen = log_sum_exp > -jnp.inf
        weighed = jnp.where(seen, log_sum_exp, 0.0).astype(jnp.float32) * cotangents[1]
        total = jnp.sum(out.astype(jnp.float32) * cotangents[0]) + jnp.sum(weighed)
        return total, {"out": out, "log_sum_exp": log_sum_exp}

    @jax.jit
    def compute(arrays, options, cotangents):
        if not differentiated:
            return dict(zip(("out", "log_sum_exp"), attend(arrays, static | options)))
        gradients, outputs = jax.grad(loss, has_aux=True)(arrays, options, cotangents)
        return outputs | {f"d_{name}": gradient for name, gradient in gradients.items()}

    def for_values(other: Problem) -> dict[str, Any]:
        assert {name: x for name, x in other.options.items() if name in static} == static, "another program"
        return compute(other.arrays, traced(other.options), other.cotangents)

    return for_values


def plain_attention(arrays: dict[str, Any], options: dict[str, Any]) -> tuple[Any, Any]:
    """Every intermediate in the precision of the arrays except the softmax; keys in reverse order."""
    return over_flat_batch(_plain_attention, inputs_of(**arguments(arrays, options)))


def _plain_attention(inputs: Inputs) -> tuple[Any, Any]:
    operands, size, dtype = inputs.operands, inputs.sizes, inputs.dtype
    rows, columns = jnp.arange(size.T), jnp.arange(size.S)
    reverse = lambda x, axis: jnp.flip(x, axis) if x.shape[axis] > 1 else x
    key, value = (
        _restored(operands.key, operands.key_scale, dtype),
        _restored(operands.value, operands.value_scale, dtype),
    )
    key, value = (reverse(_without_padding(x, inputs.mask.key_lengths), 1) for x in (key, value))
    query = _without_padding(operands.query, inputs.mask.query_lengths)
    key, value = jnp.repeat(key, size.G, axis=2), jnp.repeat(value, size.G, axis=2)
    score = jnp.einsum("btnh,bsnh->bnts", query, key).astype(jnp.float32) * inputs.scale
    if inputs.logits_soft_cap is not None:
        score = inputs.logits_soft_cap * jnp.tanh(score / inputs.logits_soft_cap)
    query_positions, key_positions = masks.of_pairs(inputs.mask, rows, columns)
    heads = jnp.arange(size.N)
    if inputs.score_fn is not None:
        score_fn = inputs.score_fn.joined(operands.score_arrays)
        score = score_fn.of_pairs(score, head=heads, query=query_positions, key=reverse(key_positions, 3))
    if operands.bias is not None:
        score = score + reverse(operands.bias, 3).astype(jnp.float32)
    if operands.alibi_slopes is not None:
        distance = masks.apart(query_positions, key_positions).astype(jnp.float32)
        score = score - operands.alibi_slopes.astype(jnp.float32)[:, None, None] * reverse(distance, 3)
    visible = masks.visible(inputs.mask, rows, columns, heads)
    if visible is not None:
        score = jnp.where(reverse(visible, 3), score, -jnp.inf)
    sinks = reference.sinks_of_rows(inputs)
    if sinks is not None:
        sinks = jnp.broadcast_to(sinks, (*score.shape[:3], 1))
        score = jnp.concatenate([score, sinks], axis=-1)
    empty = jnp.max(score, axis=-1, initial=-jnp.inf, keepdims=True) == -jnp.inf
    score = jnp.where(empty, 0.0, score)
    weight = jnp.where(empty, 0.0, jax.nn.softmax(score, axis=-1))[..., : size.S]
    if inputs.dropout is not None:
        index = inputs.dropout.batch[:, None, None, None], *jnp.ogrid[: size.N, : size.T, : size.S]
        weight = jnp.where(reverse(dropout.keep(inputs.dropout, *index), 3), weight * inputs.dropout.scale, 0.0)
    out = jnp.einsum("bnts,bsnv->btnv", weight.astype(dtype), value)
    log_sum_exp = jnp.where(empty[..., 0], -jnp.inf, jax.nn.logsumexp(score, axis=-1))
    return out, jnp.moveaxis(log_sum_exp, -1, -2)


def float64_results(problem: Problem) -> dict[str, Any]:
    """`results` in float64, of causal problems without other options but a scale.

    With scores of some hundreds float32 is no truth: its own gradients err as much as those of a fused kernel do.
    """
    assert set(problem.options) == {"is_causal", "scale"}, problem.options
    scale, group = problem.options["scale"], problem.arrays["query"].shape[-2] // problem.arrays["key"].shape[-2]

    def attend(arrays, options):
        key, value = (jnp.repeat(arrays[name], group, axis=-2) for name in ("key", "value"))
        score = scale * jnp.einsum("btnh,bsnh->bnts", arrays["query"], key)
        score = jnp.where(jnp.tril(jnp.ones(score.shape[-2:], bool)), score, -jnp.inf)
        out = jnp.einsum("bnts,bsnv->btnv", jax.nn.softmax(score), value)
        return out, jnp.moveaxis(jax.nn.logsumexp(score, axis=-1), -1, -2)

    with jax.enable_x64(True):
        exact = problem.astype(jnp.float64)
        return jax.tree.map(np.asarray, compiled(exact, attend)(exact))


def _restored(x: Any, scale: Any, dtype: Any) -> Any:
    """Keys or values in the dtype of the query, whether they are stored in 8 bits or not."""
    return x if scale is None else mqa_jax.dequantize(x, scale).astype(dtype)


def _without_padding(x: Any, lengths: Any) -> Any:
    exist = masks.exist(lengths, jnp.arange(x.shape[1]))
    return x if exist is None else jnp.where(exist[..., None, None], x, jnp.zeros((), x.dtype))


def plain_outputs(problem: Problem) -> dict[str, Any]:
    return dict(zip(("out", "log_sum_exp"), plain_attention(problem.arrays, problem.options)))


def judge_8_bits(problem: Problem, dtype: Any, bits: str, *implementations: str) -> None:
    """By the same rule, output and log-sum-exp of keys and values in 8 bits, to queries in `dtype`."""
    stored = quantized(problem, bits)
    low = dataclasses.replace(stored, arrays=stored.arrays | {"query": stored.arrays["query"].astype(dtype)})
    same = dataclasses.replace(low, arrays=low.arrays | {"query": low.arrays["query"].astype(jnp.float32)})
    for implementation in implementations:
        judge(outputs(low, implementation), plain_outputs(low), outputs(same, "reference"))


def judge(fast: dict[str, Any], plain: dict[str, Any], reference: dict[str, Any], lenience: int = 1) -> None:
    """Fails with the worst coordinate of the first result that breaks the rule; `lenience`: times what it allows."""
    assert set(fast) == set(reference)
    for name, expected in reference.items():
        assert fast[name].dtype == plain[name].dtype, f"{name}: {fast[name].dtype=!s}, {plain[name].dtype=!s}"
        found, plainly, right = (np.float64(x) for x in (fast[name], plain[name], expected))
        _judge_one(name, found, plainly, right, fast[name].dtype.name, lenience, lenience * FACTOR)


def judge_float32(fast: dict[str, Any], reference: dict[str, Any], factor: int = 4) -> None:
    """For float32 options that `plain_attention` does not know: only the floor, scaled by the number of terms."""
    for name, expected in reference.items():
        expected = np.float64(expected)
        _judge_one(name, np.float64(fast[name]), expected, expected, "float32", factor)


def _judge_one(name, fast, plain, expected, dtype: str, of_floor: int = 1, of_plain: int = FACTOR) -> None:
    assert fast.shape == expected.shape, f"{name}: {fast.shape=}, {expected.shape=}"
    np.testing.assert_array_equal(np.isneginf(fast), np.isneginf(expected), err_msg=f"{name}: -inf elsewhere")
    finite = np.isfinite(expected)
    assert np.isfinite(fast[finite]).all(), f"{name}: not finite"
    largest = np.abs(expected[finite]).max(initial=0.0)
    floor = of_floor * FLOOR_ULPS[dtype] * float(jnp.finfo(dtype).eps) * largest
    error = np.where(finite, np.abs(np.where(finite, fast, 0) - np.where(finite, expected, 0)), 0)
    assert np.isfinite(plain[finite]).all(), (
        f"{name}: the plain computation, which says how far off is allowed, is not finite"
    )
    plain_error = np.where(finite, np.abs(np.where(finite, plain, 0) - np.where(finite, expected, 0)), 0)
    allowed = of_plain * plain_error.max(initial=0.0) + floor
    if error.size and error.max() > allowed:
        worst = np.unravel_index(error.argmax(), error.shape)
        raise AssertionError(
            f"{name}: error {error.max():.3g} at {tuple(map(int, worst))} is more than {allowed:.3g} = {of_plain} * "
            f"{plain_error.max():.3g} (plain) + {floor:.3g}; got {fast[worst]:.8g}, expected {expected[worst]:.8g}"
        )
