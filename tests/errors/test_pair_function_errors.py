"""What a function of scores or masks must not be: each with the rule, the values and the remedy."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mqa_jax
from mqa_jax import functions
from mqa_jax.attention import inputs_of
from mqa_jax.kernels.triton import implementation as triton

QUERY, KEY = jnp.ones((2, 5, 4, 8)), jnp.ones((2, 7, 2, 8))
attend = functools.partial(mqa_jax.dot_product_attention, QUERY, KEY, KEY)
TABLE = jnp.ones((32, 4))


class Unhashable:
    __hash__ = None  # type: ignore[assignment]

    def __call__(self, score, *_):
        return score


def reads_an_array_of_its_module(score, batch, head, query, key):
    return score + TABLE[0, head]


def makes_an_array(batch, head, query, key):
    return key < jnp.array([1, 2, 3])[batch]


def sums(score, *_):
    return score - jnp.sum(score)


def sums_an_axis(score, *_):
    return score.sum(-1)


def halves(score, *_):
    return score.astype(jnp.bfloat16)


def integers(batch, head, query, key):
    return (key <= query).astype(jnp.int32)


def three(batch, head):
    return head < 3


def two(score, *_):
    return score, score


REFUSED: dict[str, Any] = {
    "no function": (dict(score_fn=3), r"score_fn must be a function \(score, batch, head, .*score_fn=3 \(int\).*table"),
    "no arrays": (dict(mask_fn=()), "mask_fn must be a function"),
    "an array first": (dict(score_fn=(TABLE, functions.t5)), "score_fn must be a function"),
    "not hashable": (dict(score_fn=Unhashable()), "hashable"),
    "an array of its module": (
        dict(score_fn=reads_an_array_of_its_module),
        r"score_fn reads arrays that it is not passed: reads_an_array_of_its_module\(score, .* has float32\[32, 4\]. "
        r"Pass them as score_fn=\(function, array, ...\)",
    ),
    "an array that it makes": (dict(mask_fn=makes_an_array), r"mask_fn reads arrays that it is not passed.*int32\[3\]"),
    "another shape": (dict(score_fn=sums_an_axis), r"of the shape and dtype.*float32\[5\] for float32\[5, 7\]"),
    "another dtype": (dict(score_fn=halves), r"returns bfloat16\[5, 7\] for float32\[5, 7\]. Cast with .astype\(score"),
    "no bools": (
        dict(mask_fn=integers),
        r"mask_fn must return bools.*integers\(batch.*int32\[5, 7\] for a tile \[5, 7\]",
    ),
    "too few arguments": (
        dict(mask_fn=three),
        r"mask_fn failed on a tile: three\(batch, head, query position.*TypeError",
    ),
    "two results": (dict(score_fn=two), r"score_fn must return one array: two\(score.* returns 2"),
    "too few arrays": (dict(score_fn=functions.t5), "score_fn failed on a tile: t5.*missing 1 required positional"),
    "complex": (dict(score_fn=(functions.scaled, jnp.ones(4, complex))), r"score_fn\[1\] must hold.*complex64\[4\]"),
    "words": (dict(score_fn=(functions.scaled, "abc")), r"score_fn\[1\] must be an array of numbers"),
    "more than 32 bits": (
        dict(mask_fn=(functions.dilated, np.int64(1 << 40))),
        r"mask_fn\[1\] must fit 32 bits: mask_fn\[1\]=1099511627776",
    ),
}


@pytest.mark.parametrize(("options", "message"), REFUSED.values(), ids=REFUSED)
def test_refused(options: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        attend(**options)


@pytest.mark.parametrize("transformation", [jax.jit, jax.grad, jax.vmap, lambda f: lambda x: jax.jvp(f, (x,), (x,))])
def test_a_closure_over_a_traced_array_is_refused_with_the_way_to_pass_it(transformation):
    def loss(table):
        closed = lambda score, batch, head, query, key: functions.t5(score, batch, head, query, key, table)
        return attend(score_fn=closed).sum()

    table = TABLE[None] if transformation is jax.vmap else TABLE
    message = r"score_fn reads arrays that it is not passed.*a traced float32\[32, 4\].*score_fn=\(function, array"
    with pytest.raises(ValueError, match=message):
        transformation(loss)(table)


def test_a_python_number_may_stay():
    halved = functools.partial(lambda factor, score, *_: factor * score, 0.5)
    np.testing.assert_allclose(attend(score_fn=halved), attend(scale=0.5 / math.sqrt(8)), atol=1e-6)


def takes(score, batch, head, query, key, table):
    return score + jnp.take(table, head, axis=1)[0]


def whole(score, batch, head, query, key, table):
    return score + jnp.sum(table)


def no_rule(score, *_):
    return jax.lax.erf(score)


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (takes, "TypeError"),
        (whole, "TypeError"),
        (no_rule, "no rule for erf in Pallas-Triton"),
    ],
)
def test_what_cannot_be_part_of_a_kernel_is_left_to_plain_xla(function, reason):
    arrays = () if function is no_rule else (TABLE,)
    refusal = triton.cannot(inputs_of(QUERY, KEY, KEY, score_fn=(function, *arrays)))
    assert refusal is not None
    assert "a score_fn of elementwise operations that reads arrays by integers in brackets only" in refusal
    assert reason in refusal
    with pytest.raises(NotImplementedError, match="implementation='triton' cannot compute this call: a score_fn of"):
        attend(score_fn=(function, *arrays), implementation="triton")
    right = attend(score_fn=(function, *arrays), implementation="reference")
    np.testing.assert_allclose(attend(score_fn=(function, *arrays)), right, atol=1e-6)


@pytest.mark.parametrize("name", ["scaled", "t5", "t5_causal"])
def test_ready_scores_can_be_part_of_a_kernel(name):
    table = TABLE[0] if name == "scaled" else TABLE
    assert triton.cannot(inputs_of(QUERY, KEY, KEY, score_fn=(getattr(functions, name), table))) is None


@pytest.mark.parametrize("option", ["score_fn", "mask_fn"])
def test_cudnn_has_no_functions(option):
    given: Any = (functions.scaled, jnp.ones(4)) if option == "score_fn" else (functions.dilated, 2)
    with pytest.raises(NotImplementedError, match=f"{option}"):
        attend(**{option: given, "implementation": "cudnn"})
