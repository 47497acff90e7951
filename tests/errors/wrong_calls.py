"""Calls of the function and of modules that the tables of errors change one thing of, and how a line is checked."""

import jax
import jax.numpy as jnp
import pytest

import mqa_jax

RNG = jax.random.key(0)
ones = jnp.ones
QUERY, KEY = ones((2, 5, 4, 8)), ones((2, 7, 2, 8))


def refused(error, case):
    """A line of a table: the wrong call, and a pattern of the message."""
    wrong, message = case
    with pytest.raises(error, match=r"(?s)" + message):
        wrong()


def attend(query=QUERY, key=KEY, value=None, *arguments, **options):
    return mqa_jax.dot_product_attention(query, key, key if value is None else value, *arguments, **options)


def layer(name="GroupedQueryAttention", *arguments, **settings):
    arguments = arguments or (16, 4)
    return getattr(mqa_jax, name)(*arguments, **settings)


def call(module, *arguments, **options):
    return module.init(RNG, *(arguments or (ones((2, 5, 16)),)), **options)
