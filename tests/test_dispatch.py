"""Which implementation runs: proved by what ran, not by what came out."""

import re
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cuda_programs import lowered_for_cuda

import mqa_jax
from mqa_jax import attention
from mqa_jax.kernels import platforms
from mqa_jax.kernels.online_softmax import Normalizer

HALF = [jnp.asarray(np.random.default_rng(0).standard_normal((2, 5, n, 8)), jnp.bfloat16) for n in (4, 2, 2)]


@pytest.fixture
def ran(monkeypatch):
    """Names of the implementations, in the order in which they run (not in which they are traced)."""
    names = []

    def watched(name, compute):
        def run(inputs):
            jax.debug.callback(lambda: names.append(name))
            return compute(inputs)

        return run

    for name, way in attention.IMPLEMENTATIONS.items():
        if isinstance(way.compute, platforms.Kernels):
            compute: Any = replace(way.compute, forward=watched(name, way.compute.forward))
        else:
            compute = watched(name, way.compute)
        monkeypatch.setitem(attention.IMPLEMENTATIONS, name, replace(way, compute=compute))
    return names


def test_none_is_xla_on_a_cpu(ran):
    mqa_jax.dot_product_attention(*HALF)
    mqa_jax.dot_product_attention(*HALF, sinks=jnp.ones(4), dropout_rate=0.1, dropout_rng=jax.random.key(0))
    jax.effects_barrier()
    assert ran == ["xla", "xla"]


@pytest.mark.parametrize("name", ["xla", "reference"])
def test_a_name_is_that_one(ran, name):
    mqa_jax.dot_product_attention(*HALF, implementation=name)
    jax.effects_barrier()
    assert ran == [name]


def _answer(number: float) -> platforms.Kernels:
    """Kernels that say who they are."""

    def forward(inputs):
        rows = jnp.zeros(inputs.operands.query.shape[:3], jnp.float32)
        return jnp.full_like(inputs.operands.query, number), Normalizer(rows, rows)

    return platforms.Kernels(
        forward, lambda inputs, *_: jax.tree.map(lambda x: jnp.full_like(x, number), inputs.operands)
    )


def test_none_takes_the_first_that_can_on_this_platform(monkeypatch):
    table = {
        "of Tuesday": attention.Implementation(_answer(1), cannot=lambda inputs: "it is Wednesday"),
        "elsewhere": attention.Implementation(_answer(2), platform="tpu"),
        "out of reach": attention.Implementation(_answer(7), platform="cpu", in_reach=lambda: False),
        "function": attention.Implementation(lambda inputs: (_answer(3).forward(inputs)[0], None)),
        "here": attention.Implementation(_answer(4), platform="cpu"),
        "later": attention.Implementation(_answer(5), platform="cpu"),
        "anywhere": attention.Implementation(_answer(6)),
    }
    monkeypatch.setattr(attention, "IMPLEMENTATIONS", table)
    attend = lambda query, name=None: mqa_jax.dot_product_attention(query, *HALF[1:], implementation=name)
    assert (attend(HALF[0]) == 4).all()
    assert (jax.grad(lambda query: attend(query).astype(jnp.float32).sum())(HALF[0]) == 4).all()
    assert (attend(HALF[0], "later") == 5).all()
    del table["here"], table["later"]
    assert (attend(HALF[0]) == 6).all()
    with pytest.raises(NotImplementedError, match="'of Tuesday' cannot compute this call: it is Wednesday"):
        attend(HALF[0], "of Tuesday")
    with pytest.raises(NotImplementedError, match="'elsewhere' runs only on tpu"):
        attend(HALF[0], "elsewhere")


@pytest.mark.parametrize(
    ("attn_impl", "name"),
    [("triton", "xla"), ("flash", "xla"), ("torch", "xla"), (None, "xla"), ("xla", "xla"), ("reference", "reference")],
)
def test_attn_impl_of_the_modules(ran, attn_impl, name):
    mqa_jax.MultiQueryAttention(16, 4, attn_impl=attn_impl).init_with_output(jax.random.key(0), jnp.ones((2, 5, 16)))
    jax.effects_barrier()
    assert ran == [name]


def test_cudnn_in_a_module(monkeypatch):
    """A module asks for the log-sum-exp, which cuDNN does not have, only where it has a key to merge in."""
    handed = []

    def on_xla(query, *_, implementation, **settings):
        handed.append(implementation)
        return query

    monkeypatch.setattr(jax.nn, "dot_product_attention", on_xla)
    settings: dict[str, Any] = dict(attn_impl="cudnn", head_dim=8, dtype=jnp.bfloat16)
    x = jnp.ones((2, 5, 16), jnp.bfloat16)
    mqa_jax.MultiQueryAttention(16, 4, **settings).init_with_output(jax.random.key(0), x)
    assert handed == ["cudnn"]
    with pytest.raises(NotImplementedError, match="'cudnn' has no differentiable float32 log-sum-exp"):
        mqa_jax.MultiQueryAttention(16, 4, add_bias_kv=True, **settings).init(jax.random.key(0), x)


def test_cudnn_is_what_a_module_is_lowered_to(monkeypatch):
    """As on a machine with cuDNN 9.12 and a Hopper GPU."""
    from jax._src.cudnn import fused_attention_stablehlo as of_jax

    monkeypatch.setattr(of_jax, "check_cudnn_version", lambda: 91200)
    monkeypatch.setattr(of_jax, "check_compute_capability", lambda _: True)
    module = mqa_jax.GroupedQueryAttention(32, 4, kv_heads=2, attn_impl="cudnn", dtype=jnp.bfloat16)
    x = jnp.ones((2, 16, 32), jnp.bfloat16)
    variables = jax.eval_shape(module.clone(attn_impl="xla").init, jax.random.key(0), x)
    loss = lambda variables, x: jnp.sum(module.apply(variables, x)[0].astype(jnp.float32))
    text = lowered_for_cuda(jax.grad(loss), variables, x).as_text()
    assert {*re.findall(r"@__cudnn[$](\w+)", text)} == {"fmhaSoftmax", "fmhaSoftmaxBackward"}


@pytest.mark.parametrize(("flash", "name"), [(True, "xla"), (False, "reference")])
def test_flash_of_flash_attention(ran, flash, name):
    mqa_jax.FlashAttention(flash=flash).apply({}, *[x.swapaxes(1, 2) for x in HALF])
    jax.effects_barrier()
    assert ran == [name]


CUDNN_OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal window": dict(is_causal=True, local_window_size=(2, 3)),
    "lengths": dict(query_seq_lengths=jnp.array([5, 3]), key_value_seq_lengths=jnp.array([0, 4])),
    "mask with an empty row": dict(mask=jnp.ones((2, 1, 5, 5), bool).at[0, 0, 2].set(False)),
    "bias": dict(bias=jnp.ones((1, 4, 5, 5), jnp.bfloat16), scale=0.5),
}


@pytest.mark.parametrize("name", CUDNN_OPTIONS)
def test_cudnn_is_handed_the_call_and_means_the_same(monkeypatch, name):
    """Here `jax.nn`'s own XLA path answers for cuDNN, which needs a GPU; what is handed over is the same."""
    options, handed = CUDNN_OPTIONS[name], []
    answer = jax.nn.dot_product_attention

    def on_xla(*arrays, implementation, **settings):
        handed.append(implementation)
        with jax.numpy_dtype_promotion("standard"):
            return answer(*arrays, **settings, implementation="xla")

    monkeypatch.setattr(jax.nn, "dot_product_attention", on_xla)
    actual = mqa_jax.dot_product_attention(*HALF, **options, implementation="cudnn")
    assert handed == ["cudnn"]
    expected = mqa_jax.dot_product_attention(*HALF, **options, implementation="reference")
    np.testing.assert_allclose(np.float32(actual), np.float32(expected), atol=0.02)
