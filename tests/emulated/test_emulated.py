"""The library's own kernels, compiled for GPUs that are not there and executed: a few of them (all: `make emulate`)."""

import dataclasses
import json
from collections.abc import Iterator
from typing import Any

import broken_ptx
import emulate
import emulated_cases
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
import ways
from ptx_emulator import emulation
from ptx_emulator.emulation import Emulation, emulated

import mqa_jax
from mqa_jax.kernels.triton import io, tile_config
from mqa_jax.kernels.triton.program import Program

reason = emulation.missing()
if reason is not None:
    pytest.skip(reason, allow_module_level=True)

SMALL: dict[str, Any] = dict(batch=(1,), rows=37, columns=67, heads=2, kv_heads=1, features=64)


@pytest.fixture
def a100() -> Iterator[Emulation]:
    with emulated("a100") as emulation:
        yield emulation


def problem(**changes: Any) -> oracle.Problem:
    return oracle.random_problem(np.random.default_rng(0), **SMALL | changes).astype("bfloat16")


def judge(small: oracle.Problem) -> None:
    found = oracle.results(small, "triton")
    oracle.judge(found, oracle.plain_results(small), oracle.results(small.astype("float32"), "reference"))


@pytest.mark.parametrize("gpu", ["a100", "h100"])
def test_output_and_gradients(gpu):
    with emulated(gpu) as emulation:
        judge(problem(is_causal=True))
    assert emulation.names() == ["mqa_forward", "mqa_dkv", "mqa_dq"] or emulation.names()[1:] == ["mqa_dq", "mqa_dkv"]
    ptx = emulation.ran[0].compiled.ptx
    assert ("wgmma.mma_async" in ptx) == (gpu == "h100")
    assert ("mma.sync" in ptx) == (gpu == "a100")


@pytest.mark.slow
def test_one_row_of_the_table_of_pairs(a100):
    way = ways.compiled("triton")
    row = next(row for row in way.table if row["segments"] and row["is_causal"])
    way.judge(way.results(row), way.expected(row))
    assert "mqa_forward" in a100.names()


# -- the library around them ------------------------------------------------------------------------------------------


def test_a_module_decodes_with_its_cache(a100):
    """A prompt of more than 16 tokens, and two steps, on the implementation that modules take unasked."""
    layer = mqa_jax.GroupedQueryAttention(64, heads=4, kv_heads=2, causal=True)
    x = jax.random.normal(jax.random.key(0), (1, 23, 64))
    params = layer.init(jax.random.key(1), x)["params"]
    full, *_ = layer.apply({"params": params}, x)
    a100.ran.clear()
    variables, outs = {"params": params, "cache": layer.init_cache(1, 32)}, []
    for part in (x[:, :21], x[:, 21:22], x[:, 22:]):
        (out, *_), changed = layer.apply(variables, part, mutable=["cache"])
        variables = {"params": params, **changed}
        outs.append(out)
    np.testing.assert_allclose(jnp.concatenate(outs, axis=1), full, rtol=2e-5, atol=2e-5)
    assert a100.names()[0] == "mqa_forward"
    assert a100.names()[1:].count("mqa_decode") == 2


def test_vmap_of_gradients_under_jit(a100):
    def loss(query, key):
        out = mqa_jax.dot_product_attention(query, key, key, implementation="triton")
        return jnp.sum(out.astype(jnp.float32) ** 2)

    query = jax.random.normal(jax.random.key(0), (3, 1, 17, 2, 16), jnp.bfloat16)
    key = jax.random.normal(jax.random.key(1), (3, 1, 19, 1, 16), jnp.bfloat16)
    gradient = jax.jit(jax.vmap(jax.grad(loss, (0, 1))))(query, key)
    for n in range(3):
        alone = jax.jit(jax.grad(loss, (0, 1)))(query[n], key[n])
        jax.tree.map(lambda x, y, n=n: np.testing.assert_array_equal(x[n], y), gradient, alone)


def test_nothing_of_it_remains_afterwards():
    attend = jax.jit(lambda x: mqa_jax.dot_product_attention(x, x, x))
    x = jnp.ones((1, 17, 2, 16), jnp.bfloat16)
    with emulated("a100") as emulation:
        attend(x)
        assert emulation.names() == ["mqa_forward"]
    attend(x)
    assert emulation.names() == ["mqa_forward"]
    with pytest.raises(Exception, match="implementation='triton'"):
        jax.block_until_ready(mqa_jax.dot_product_attention(x, x, x, implementation="triton"))


# -- what is wrong is noticed -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("gpu", ["a100", "h100"])
def test_compiled_kernels_that_lack_an_instruction(gpu):
    """Of each kind that a kernel has, at least one; `python tests/emulate.py --broken` tries more of them."""
    with emulated(gpu, keep=True) as emulation:
        jax.block_until_ready(oracle.outputs(problem(columns=131), "triton"))
    noticed: dict[str, list[bool]] = {}
    for ran in emulation.ran:
        for one in broken_ptx.broken(ran, most=3):
            noticed.setdefault(one.kind, []).append(bool(one.noticed))
    wanted = set(broken_ptx.KINDS) - ({"no wait for products", "no fence"} if gpu == "a100" else set())
    assert set(noticed) == wanted
    assert {kind for kind, found in noticed.items() if any(found)} == wanted, noticed


@pytest.mark.parametrize("forgotten", ["ragged_rows", "ragged_columns"])
def test_a_kernel_that_forgets_where_an_array_ends(monkeypatch, a100, forgotten):
    monkeypatch.setattr(Program, forgotten, lambda self: False)
    with pytest.raises(Exception, match=r"out of bounds .* of the \d+ of argument"):
        judge(problem())


@pytest.mark.slow
def test_a_kernel_that_writes_beyond_its_array(monkeypatch, a100):
    monkeypatch.setattr(io, "_inside", lambda start, tile, limit, piece: None)
    with pytest.raises(Exception, match=r"st\.global"):
        judge(problem())


def test_a_wrong_entry_of_the_tile_table(monkeypatch, a100):
    """More stages than shared memory has room for."""
    table = json.loads(tile_config.TABLE.read_text())["entries"]
    wrong = [dict(entry, stages=16) if entry["direction"] == "forward" else entry for entry in table]
    monkeypatch.setattr(tile_config, "table", lambda: sorted(wrong, key=lambda entry: entry["head_dim"]))
    with pytest.raises(Exception, match=r"mqa_forward for a100: .*[Ss]hared memory"):
        judge(problem(columns=4096, rows=512, features=128))


@pytest.mark.slow
def test_the_command_counts_what_is_wrong(monkeypatch, capsys):
    case = emulated_cases.Case("small", "bfloat16", SMALL, gradients=False)
    monkeypatch.setattr(emulated_cases, "cases", lambda: iter([case]))
    monkeypatch.setattr(emulate, "outcomes", lambda orders, jobs: map(emulate.run, orders))
    monkeypatch.setattr(emulate, "prepare", lambda: None)
    arguments = ["--gpu", "a100", "--kinds", "table"]
    assert emulate.main(arguments) == 0
    assert "a100: 1 calls, 1 launches executed, 0 calls wrong" in capsys.readouterr().out
    monkeypatch.setattr(Program, "ragged_columns", lambda self: False)
    assert emulate.main(arguments) == 1
    assert "a100: 1 calls, 1 launches executed, 1 calls wrong" in capsys.readouterr().out


def test_float8_is_not_tried_on_a_gpu_that_has_none():
    case = dataclasses.replace(next(emulated_cases.cases()), bits="float8_e4m3fn")
    assert [case.runs_on(gpu) for gpu in emulation.GPUS] == [False, True, True]
