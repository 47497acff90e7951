"""Derivatives of any order in both modes, and under `jax.vmap`, against those of the reference.

`test_tangent` judges the forward-mode passes; here JAX combines them with the others.
"""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import jax.test_util
import numpy as np
import pytest
from flax import nnx
from skins import needs_modes

import mqa_jax
from mqa_jax.kernels import row_blocks

RNG = np.random.default_rng(0)
normal = lambda *shape: jnp.asarray(RNG.standard_normal(shape), jnp.float32)
ARRAYS = normal(2, 13, 4, 8), normal(2, 17, 2, 8), normal(2, 17, 2, 4)
ARRAYS_1 = tuple(x[:1] for x in ARRAYS)
MOVED = tuple(normal(*x.shape) for x in ARRAYS)
OPTIONS: dict[str, dict[str, Any]] = {
    "causal": dict(is_causal=True, query_offset=3),
    "everything": dict(
        bias=normal(1, 4, 13, 17),
        mask=normal(2, 1, 13, 17) > -1,
        sinks=normal(4),
        alibi_slopes=normal(4) / 8,
        logits_soft_cap=2.0,
        query_seq_lengths=np.array([13, 7]),
        key_value_seq_lengths=np.array([9, 17]),
        query_segment_ids=np.arange(26).reshape(2, 13) // 9,
        key_value_segment_ids=np.arange(34).reshape(2, 17) // 9,
        dropout_rate=0.2,
        dropout_rng=jax.random.key(0),
    ),
}


@pytest.fixture(autouse=True)
def several_blocks(monkeypatch):
    """Of queries, in second derivatives: the last one is not full."""
    monkeypatch.setattr(row_blocks, "MAX_SCORES", 5 * 2 * 4 * 17)


def attend(implementation, options=OPTIONS["causal"]):
    return functools.partial(
        mqa_jax.dot_product_attention, **options, implementation=implementation, return_residual=True
    )


def total(function):
    """A loss whose derivatives of every order are not zero."""
    return lambda *arrays: sum(jnp.sum(jnp.sin(jnp.where(jnp.isinf(x), 0, x))) for x in function(*arrays))


gradient = lambda function: jax.grad(total(function), argnums=(0, 1, 2))
moved = lambda function: lambda *arrays: jax.jvp(function, arrays, MOVED)[1]
first = lambda function: lambda *arrays: function(*(x[:1, :3] for x in arrays))
one_row = lambda x: x[:, None]

DERIVATIVES = {
    "jvp": lambda f: jax.jvp(f, ARRAYS, MOVED),
    "jvp of the query": lambda f: jax.jvp(lambda query: f(query, *ARRAYS[1:]), ARRAYS[:1], MOVED[:1]),
    "jvp of the value": lambda f: jax.jvp(lambda value: f(*ARRAYS[:2], value), ARRAYS[2:], MOVED[2:]),
    "linearize": lambda f: jax.linearize(f, *ARRAYS)[1](*MOVED),
    "gradient": lambda f: gradient(f)(*ARRAYS),
    "gradient of a jvp": lambda f: gradient(moved(f))(*ARRAYS),
    "jvp of a gradient": lambda f: jax.jvp(gradient(f), ARRAYS, MOVED),
    "gradient of a gradient": lambda f: gradient(gradient(f))(*ARRAYS),
    "jvp of a jvp": lambda f: jax.jvp(moved(f), ARRAYS, MOVED),
    "third": lambda f: jax.jvp(lambda *a: jax.jvp(gradient(f), a, MOVED)[1], ARRAYS, MOVED)[1],
    "in the cotangent": lambda f: jax.grad(lambda c: sum(map(jnp.sum, jax.vjp(f, *ARRAYS)[1](f_like(f, c)))))(1.0),
    "checkpoint": lambda f: jax.jit(jax.grad(jax.checkpoint(total(f)), argnums=(0, 1, 2)))(*ARRAYS),
    "jvp of a checkpoint": lambda f: jax.jvp(jax.checkpoint(f), ARRAYS, MOVED),
}
# Of functions of smaller arrays, or mapped: options with a batch of two do not fit.
MAPPED = {
    "jacfwd": lambda f: first(jax.jacfwd(f, argnums=(0, 1, 2)))(*ARRAYS),
    "jacrev": lambda f: first(jax.jacrev(f, argnums=(0, 1, 2)))(*ARRAYS),
    "hessian": lambda f: first(jax.hessian(total(f), argnums=(0, 1)))(*ARRAYS),
    "all mapped": lambda f: jax.vmap(gradient(f))(*map(one_row, ARRAYS)),
    "all mapped, second": lambda f: jax.vmap(gradient(gradient(f)))(*map(one_row, ARRAYS)),
    "keys shared": lambda f: jax.vmap(gradient(f), in_axes=(0, None, None))(one_row(ARRAYS[0]), *ARRAYS_1[1:]),
    "keys shared, second": lambda f: jax.vmap(gradient(gradient(f)), in_axes=(0, None, None))(
        one_row(ARRAYS[0]), *ARRAYS_1[1:]
    ),
    "keys alone": lambda f: jax.vmap(gradient(f), in_axes=(None, 1, None))(ARRAYS_1[0], ARRAYS[1][None], ARRAYS_1[2]),
    "twice": lambda f: jax.vmap(jax.vmap(gradient(f), in_axes=(0, None, 0)), in_axes=(None, 0, 0))(
        one_row(ARRAYS[0]), one_row(ARRAYS[1]), jnp.stack([ARRAYS[2][:, None]] * 2)
    ),
    "gradient of mapped": lambda f: gradient(jax.vmap(f, in_axes=(0, None, None)))(one_row(ARRAYS[0]), *ARRAYS_1[1:]),
    "jvp of mapped": lambda f: jax.jvp(jax.vmap(f), tuple(map(one_row, ARRAYS)), tuple(map(one_row, MOVED))),
}


def f_like(function, number):
    """Cotangents of the results that depend on a number."""
    return jax.tree.map(lambda x: jnp.full(x.shape, number, x.dtype), jax.eval_shape(function, *ARRAYS))


def close(actual, expected):
    for x, y in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(
            x, y, rtol=1e-4, atol=1e-4 * max(1.0, float(jnp.max(jnp.abs(jnp.where(jnp.isinf(y), 0, y)))))
        )


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("name", DERIVATIVES)
def test_derivatives(name, options):
    """In float32, of sums over a few keys: a wrong term is of the order of 1."""
    close(*(DERIVATIVES[name](attend(way, OPTIONS[options])) for way in ("xla", "reference")))


@pytest.mark.parametrize("name", MAPPED)
def test_mapped(name):
    close(*(MAPPED[name](attend(way)) for way in ("xla", "reference")))


@pytest.mark.parametrize("pair", ["mapped", "shared"])
def test_mapped_bias_and_slopes(pair):
    """Slopes that differ along the mapped axis, and a bias that one batch row of two has."""
    bias, slopes, axes = normal(2, 1, 4, 13, 17), normal(2, 4), {"mapped": 0, "shared": None}[pair]
    bias = bias if pair == "mapped" else bias[0]
    arrays = *(jnp.stack([x, 2 * x]) for x in ARRAYS), bias, slopes

    def results(way):
        function = lambda query, key, value, bias, slopes: mqa_jax.dot_product_attention(
            query, key, value, bias, alibi_slopes=slopes, implementation=way
        )
        loss = lambda *arrays: jnp.sum(function(*arrays) ** 2)
        return jax.vmap(jax.grad(loss, argnums=range(5)), in_axes=(0, 0, 0, axes, 0))(*arrays)

    close(results("xla"), results("reference"))


def test_numerical_derivatives():
    function = lambda *arrays: attend("xla", dict(logits_soft_cap=2.0, sinks=jnp.ones(4)))(*arrays)[0]
    jax.test_util.check_grads(function, ARRAYS, order=2, modes=["fwd", "rev"], rtol=2e-2, atol=2e-2)


def test_precision_that_is_set_within_a_traced_function_counts():
    """The kernels are traced when they are lowered, after the block has ended."""

    def function(*arrays):
        with jax.default_matmul_precision("highest"):
            return mqa_jax.dot_product_attention(*arrays, implementation="xla")

    text = jax.jit(jax.grad(lambda *arrays: function(*arrays).sum())).lower(*ARRAYS).as_text()
    products = [line for line in text.splitlines() if "stablehlo.dot_general" in line]
    assert products
    assert all("precision = [HIGHEST, HIGHEST]" in line for line in products)


# -- MeanFlow ---------------------------------------------------------------------------------------------------------
# u, du = jvp(f); the loss is |u - stop_gradient(target(du))|^2, differentiated with respect to parameters (Geng et al.
# 2025, arXiv 2505.13447, algorithm 1).


class Layer(nn.Module):
    implementation: str

    @nn.compact
    def __call__(self, x, _=None):
        attention = mqa_jax.GroupedQueryAttention(32, 4, kv_heads=2, attn_impl=self.implementation)
        return x + attention(nn.LayerNorm()(x))[0], None


class Scanned(nn.Module):
    implementation: str

    @nn.compact
    def __call__(self, x):
        layer = nn.remat(Layer, prevent_cse=False)
        layers = nn.scan(layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=2)
        return layers(self.implementation)(x, None)[0]


class OneLayer(nn.Module):
    implementation: str

    @nn.compact
    def __call__(self, x):
        return Layer(self.implementation)(x)[0]


def meanflow(function, x, stop=jax.lax.stop_gradient):
    def loss(parameters):
        u, du = jax.jvp(lambda x: function(parameters, x), (x,), (jnp.cos(x),))
        return jnp.mean((u - stop(x - du)) ** 2)

    return loss


@pytest.mark.parametrize("network", [OneLayer, Scanned])
def test_meanflow_step(network):
    x = normal(2, 19, 32)
    parameters = network("xla").init(jax.random.key(0), x)
    step = lambda way: jax.jit(jax.value_and_grad(meanflow(network(way).apply, x)))(parameters)
    close(step("xla"), step("reference"))


@needs_modes
def test_meanflow_step_in_nnx():
    x = normal(2, 19, 32)

    def step(way):
        graph, state = nnx.split(mqa_jax.nnx.GroupedQueryAttention(32, 4, kv_heads=2, attn_impl=way, rngs=nnx.Rngs(0)))
        return jax.jit(jax.value_and_grad(meanflow(lambda state, x: nnx.merge(graph, state)(x)[0], x)))(state)

    close(step("xla"), step("reference"))


@pytest.mark.slow
@pytest.mark.parametrize("network", [OneLayer, Scanned])
def test_what_stop_gradient_cuts_is_not_computed(network):
    """Memory and work of the step are linear in the length, and only first derivatives remain in the program."""

    def compiled(length, stop=jax.lax.stop_gradient):
        x = jax.ShapeDtypeStruct((1, length, 32), jnp.float32)
        parameters = jax.eval_shape(network("xla").init, jax.random.key(0), x)
        step = lambda parameters, x: jax.grad(meanflow(network("xla").apply, x, stop))(parameters)
        return jax.jit(step).lower(parameters, x).compile()

    memory = [compiled(length).memory_analysis().temp_size_in_bytes for length in (2048, 4096)]
    assert memory[1] < 2.2 * memory[0]
    assert memory[1] < 4096 * 4096 * 4
    work = lambda program: program.as_text().count("while(")
    assert work(compiled(512)) < work(compiled(512, stop=lambda x: x))
