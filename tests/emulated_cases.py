"""What the emulated GPUs compute in `make emulate`, judged as everything is: by the rule of `oracle.judge`."""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import covering
import jax
import jax.numpy as jnp
import numpy as np
import option_space
import oracle
import tangents
import ways

Options = Callable[[np.random.Generator], dict[str, Any]]


@dataclass(frozen=True)
class Case:
    """A call of attention, with the tiles of the table.

    Attributes:
      bits: of keys and values in 8 bits. These have no gradients.
      nan: whether there is NaN beyond the lengths.
      tf32: whether products are; the plain computation is then in float16, which has as many bits.
      exact: whether it is judged against float64.
    """

    name: str
    dtype: str
    sizes: dict[str, Any]
    options: Options = lambda rng: {}
    gradients: bool = True
    bits: str | None = None
    nan: bool = False
    tf32: bool = False
    exact: bool = False

    def __str__(self) -> str:
        size = dict(value="", **self.sizes)
        if "value_features" in size:
            size["value"] = f"/{size['value_features']}"
        shape = "B={batch[0]} {rows}x{columns} {heads}/{kv_heads} of {features}{value}".format(**size)
        kind = "tf32" if self.tf32 else self.dtype if self.bits is None else f"{self.dtype} {self.bits}"
        return f"{self.name}: {kind} {shape}{'' if self.gradients else ' forward'}"

    def runs_on(self, gpu: str) -> bool:
        return not (gpu == "a100" and self.bits == "float8_e4m3fn")

    def problem(self) -> oracle.Problem:
        rng = np.random.default_rng(0)
        options = self.options(rng)
        problem = oracle.random_problem(rng, **self.sizes, **options)
        if not self.nan:
            return problem
        return dataclasses.replace(problem, arrays=option_space.spoilt(problem.arrays, problem.options))

    def judge(self, implementation: str) -> None:
        problem = self.problem() if self.bits is None else oracle.quantized(self.problem(), self.bits)
        low = problem.astype(self.dtype)
        run, plain = (
            (oracle.results, oracle.plain_results) if self.gradients else (oracle.outputs, oracle.plain_outputs)
        )
        fast = jax.block_until_ready(run(low, implementation))
        reference = oracle.float64_results(low) if self.exact else run(low.astype("float32"), "reference")
        if self.tf32:
            expected = {name: x.astype(jnp.float32) for name, x in plain(low.astype("float16")).items()}
        else:
            expected = plain(low)
        oracle.judge(fast, expected, reference)


class Tangents(Case):
    """The tangents of output and log-sum-exp, where all operands have one, NaN in the padding."""

    def __str__(self) -> str:
        return super().__str__() + " tangents"

    def judge(self, implementation: str) -> None:
        problem = self.problem().astype(self.dtype)
        moving = tangents.random_tangents(problem)
        plain = problem.astype("float16") if self.tf32 else problem
        expected = tangents.of_plain(plain)(
            plain, {name: x.astype(plain.arrays[name].dtype) for name, x in moving.items()}
        )
        expected = {name: x.astype(jnp.float32) if self.tf32 else x for name, x in expected.items()}
        found = tangents.of_kernels(problem, interpret=False)(problem, moving)
        oracle.judge(found, expected, tangents.of_reference(problem)(problem, moving))


def sizes(
    rows: int, columns: int, heads: tuple[int, int], features: int, batch: int = 1, **more: int
) -> dict[str, Any]:
    """`heads` of queries, and of keys and values."""
    found = dict(rows=rows, columns=columns, heads=heads[0], kv_heads=heads[1], features=features, **more)
    return dict(found, batch=(batch,))


def _normal(rng: np.random.Generator, *shape: int) -> jax.Array:
    return jnp.asarray(rng.standard_normal(shape, dtype=np.float32))


def _numbers(rng: np.random.Generator, low: int, high: int, *shape: int) -> jax.Array:
    return jnp.asarray(rng.integers(low, high, shape), jnp.int32)


def _rows(*numbers: int) -> jax.Array:
    """One for each batch row."""
    return jnp.array(numbers, jnp.int32)


causal: Options = lambda rng: dict(is_causal=True)
_SIZES = sizes(97, 131, (6, 2), 64, batch=2)

OPTIONS: dict[str, Options] = {
    "no option": lambda rng: {},
    "causal": causal,
    "causal from 31": lambda rng: dict(is_causal=True, query_offset=31),
    "rows that see nothing": lambda rng: dict(is_causal=True, query_offset=-37),
    "offsets": lambda rng: dict(is_causal=True, query_offset=_rows(-7, 83)),
    "window": lambda rng: dict(local_window_size=(17, 9)),
    "causal window": lambda rng: dict(local_window_size=(40, 0), is_causal=True),
    "lengths": lambda rng: dict(query_seq_lengths=_rows(97, 41), key_value_seq_lengths=_rows(0, 131)),
    "segments": lambda rng: dict(
        query_segment_ids=jnp.sort(_numbers(rng, 0, 4, 2, 97)),
        key_value_segment_ids=jnp.sort(_numbers(rng, 0, 4, 2, 131)),
    ),
    "mask": lambda rng: dict(mask=_normal(rng, 2, 6, 97, 131) > -0.5),
    "mask of keys": lambda rng: dict(mask=_normal(rng, 2, 1, 1, 131) > 0),
    "bias": lambda rng: dict(bias=_normal(rng, 2, 6, 97, 131)),
    "bias of heads": lambda rng: dict(bias=_normal(rng, 1, 6, 97, 131)),
    "bias of keys": lambda rng: dict(bias=_normal(rng, 1, 6, 1, 131)),
    "bias of queries": lambda rng: dict(bias=_normal(rng, 2, 1, 97, 1)),
    "slopes": lambda rng: dict(alibi_slopes=_normal(rng, 6) / 8, is_causal=True),
    "soft cap": lambda rng: dict(logits_soft_cap=1.5),
    "sinks": lambda rng: dict(sinks=_normal(rng, 6), is_causal=True),
    "dropout": lambda rng: dict(dropout_rng=jax.random.key(8), dropout_rate=0.3),
    "negative scale": lambda rng: dict(scale=-0.3),
}


def everything(rows: int, columns: int, heads: int = 6) -> Options:
    """At once, for two batch rows."""
    return lambda rng: dict(
        is_causal=True,
        query_offset=_numbers(rng, -5, 20, 2),
        local_window_size=(60, 3),
        query_seq_lengths=_rows(rows, max(1, rows - 9)),
        key_value_seq_lengths=_rows(columns - 20, columns),
        query_segment_ids=jnp.sort(_numbers(rng, 0, 3, 2, rows)),
        key_value_segment_ids=jnp.sort(_numbers(rng, 0, 3, 2, columns)),
        mask=_normal(rng, 1, heads, 1, columns) > -1,
        bias=_normal(rng, 2, 1, rows, columns),
        alibi_slopes=_normal(rng, heads) / 8,
        sinks=_normal(rng, heads),
        logits_soft_cap=2.0,
        dropout_rate=0.2,
        dropout_rng=jax.random.key(rows),
    )


def lowest(whole_row: bool) -> Options:
    """A bias of finfo.min, in many places or in all of a row."""

    def options(rng: np.random.Generator) -> dict[str, Any]:
        hidden = rng.random((2, 1, 97, 131)) > 0.6
        hidden[:, :, 5] = whole_row
        return dict(bias=jnp.where(jnp.asarray(hidden), float(jnp.finfo(jnp.bfloat16).min), 0.0).astype(jnp.float32))

    return options


def ring(lengths: tuple[int, int], queries: int, window: int | None = None) -> Options:
    """A ring buffer through which that many tokens went, the queries last."""
    more = {} if window is None else dict(local_window_size=(window - 1, 0))

    options = dict(key_value_ring_lengths=_rows(*lengths), query_offset=_rows(*(max(0, x - queries) for x in lengths)))
    return lambda rng: dict(options, is_causal=True, **more)


def cases() -> Iterator[Case]:
    yield from _shapes()
    yield from _options()
    yield from _decoding()
    yield from _extremes()
    yield from _tangents()


def _shapes() -> Iterator[Case]:
    """Head sizes, groups and dtypes; lengths that are prime."""
    for features in (16, 64, 80, 128, 192, 256):
        yield Case("head size", "bfloat16", sizes(113, 203, (4, 2), features), causal)
    yield Case("head size", "float16", sizes(113, 203, (4, 2), 80), causal)
    for features in (16, 64, 80):
        yield Case("head size", "float32", sizes(61, 67, (4, 2), features), causal)
    yield Case("head size", "float32", sizes(31, 37, (2, 1), 256), causal)
    tf32: Options = lambda rng: dict(is_causal=True, precision="tensorfloat32")
    for features in (64, 80):
        yield Case("head size", "float32", sizes(61, 67, (4, 2), features), tf32, tf32=True)
    three: Options = lambda rng: dict(is_causal=True, precision="TF32_TF32_F32_X3")
    yield Case("three times tf32", "float32", sizes(61, 67, (4, 2), 64), three)
    yield Case("head sizes", "bfloat16", sizes(61, 67, (2, 1), 192, value_features=128), causal)
    yield Case("head sizes", "bfloat16", sizes(127, 131, (8, 1), 40, value_features=24), OPTIONS["soft cap"])
    yield Case("MHA", "bfloat16", sizes(139, 139, (4, 4), 64), causal)
    yield Case("MQA", "bfloat16", sizes(67, 131, (8, 1), 128), causal)
    yield Case("71 heads", "bfloat16", sizes(37, 61, (71, 1), 64), causal)
    yield Case("one head", "bfloat16", sizes(257, 67, (1, 1), 64), causal)
    yield Case("many keys", "float16", sizes(17, 1501, (4, 1), 64))
    yield Case("no gaps", "bfloat16", sizes(256, 256, (2, 1), 128), causal)


def _options() -> Iterator[Case]:
    for name, options in OPTIONS.items():
        yield Case(name, "bfloat16", _SIZES, options)
    yield Case("lengths, NaN beyond", "bfloat16", _SIZES, OPTIONS["lengths"], nan=True)
    yield Case("everything, NaN beyond", "bfloat16", _SIZES, everything(97, 131), nan=True)
    yield Case("everything", "float32", _SIZES, everything(97, 131))
    few = sizes(13, 131, (6, 2), 40, batch=2)
    yield Case("everything, few queries", "bfloat16", few, everything(13, 131), gradients=False)


def _decoding() -> Iterator[Case]:
    """Few queries on many keys: with splits that are merged, and without."""
    case = functools.partial(Case, gradients=False)
    for dtype in ("bfloat16", "float16", "float32"):
        yield case("step", dtype, sizes(1, 1501, (8, 1), 64))
    yield case("step, 71 heads", "bfloat16", sizes(1, 701, (71, 1), 64))
    draft: Options = lambda rng: dict(is_causal=True, query_offset=1000)
    for features in (16, 80, 128, 256):
        yield case("draft", "bfloat16", sizes(3, 1003, (6, 2), features, batch=2), draft)
    lengths: Options = lambda rng: dict(is_causal=True, query_offset=_rows(611, 4), key_value_seq_lengths=_rows(612, 5))
    heads = sizes(1, 1003, (32, 8), 128, batch=2)
    yield case("lengths, NaN beyond", "bfloat16", heads, lengths, nan=True)
    yield case("no splits", "bfloat16", sizes(2, 127, (8, 8), 64))
    for dtype in ("bfloat16", "float32"):
        yield case("everything", dtype, sizes(3, 1003, (6, 2), 64, batch=2), everything(3, 1003))
    old = ring((100, 1900), 1, window=400)
    yield case("ring", "bfloat16", sizes(1, 415, (32, 1), 128, batch=2), old)
    yield case("ring, chunk", "bfloat16", sizes(37, 203, (6, 2), 64, batch=2), ring((40, 500), 37))
    for bits in ("int8", "float8_e4m3fn"):
        for dtype in ("bfloat16", "float16"):
            yield case("step", dtype, sizes(2, 1501, (16, 1), 64), bits=bits)
        yield case("draft", "bfloat16", sizes(16, 203, (6, 2), 80, batch=2), bits=bits)
        yield case("chunk", "bfloat16", sizes(37, 203, (6, 2), 64, batch=2), causal, bits=bits)
        yield case("ring", "bfloat16", sizes(1, 415, (32, 1), 128, batch=2), old, bits=bits)
    yield case("everything", "bfloat16", sizes(3, 1003, (6, 2), 64, batch=2), everything(3, 1003), bits="int8")
    yield Case("draft with gradients", "bfloat16", sizes(5, 131, (6, 2), 64, batch=2), causal)


def _extremes() -> Iterator[Case]:
    shape = sizes(97, 131, (2, 1), 64, batch=2)
    yield Case("bias of finfo.min", "bfloat16", shape, lowest(whole_row=False))
    for dtype in ("bfloat16", "float32"):
        yield Case("rows of finfo.min", dtype, shape, lowest(whole_row=True))
        large: Options = lambda rng: dict(scale=8.0, is_causal=True)
        yield Case("large scores", dtype, shape, large, exact=dtype == "float32")


def _tangents() -> Iterator[Case]:
    yield Tangents("head size", "bfloat16", sizes(113, 203, (4, 2), 64), causal)
    yield Tangents("head size", "float16", sizes(61, 131, (4, 2), 80), causal)
    yield Tangents("MQA", "bfloat16", sizes(67, 131, (4, 1), 128), causal)
    yield Tangents("head sizes", "bfloat16", sizes(37, 67, (2, 1), 192, value_features=128), causal)
    yield Tangents("head size", "float32", sizes(61, 67, (2, 1), 64), causal)
    tf32: Options = lambda rng: dict(is_causal=True, precision="tensorfloat32")
    yield Tangents("head size", "float32", sizes(61, 67, (2, 1), 64), tf32, tf32=True)
    yield Tangents("few queries", "bfloat16", sizes(3, 131, (6, 2), 64), causal)
    shape = sizes(97, 131, (2, 1), 64, batch=2)
    yield Tangents("rows that see nothing", "bfloat16", shape, OPTIONS["rows that see nothing"])
    yield Tangents("rows of finfo.min", "bfloat16", shape, lowest(whole_row=True))
    yield Tangents("everything, NaN beyond", "bfloat16", shape, everything(97, 131, heads=2), nan=True)


# -- pairs of options, with small tiles -------------------------------------------------------------------------------


def pairs() -> list[tuple[str, covering.Row]]:
    return [(name, row) for name in ("triton", "triton, few queries") for row in ways.WAYS[name].table]
