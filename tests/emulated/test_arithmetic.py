"""Integers, floats and conversions of the emulator against Python's integers, numpy and ml_dtypes."""

import importlib.util
from typing import Any

import numpy as np
import pytest

if importlib.util.find_spec("numba") is None:
    pytest.skip("the extra `emulate` (numba) is not installed", allow_module_level=True)
import ml_dtypes
from ptx_emulator import formats
from small_kernels import FLOATS, OTHER, WORDS, emulate, load, store, wide

# -- integers ----------------------------------------------------------------------------------------------------------
ALL = (1 << 32) - 1


def signed(x: int) -> int:
    return x - (1 << 32) if x >> 31 else x


def toward_zero(a: int, b: int) -> int:
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


def extracted(a: int, first: int, count: int) -> int:
    """bfe.s32, as the PTX manual defines it: bits beyond the top are the sign."""
    bit = lambda n: a >> min(n, 31) & 1
    bits = [bit(first + n) for n in range(count)]
    sign = bits[-1] if count else 0
    return sum(b << n for n, b in enumerate(bits + [sign] * (32 - count)))


def bytes_chosen(a: int, b: int, selector: int) -> int:
    eight = (b << 32 | a).to_bytes(8, "little")
    chosen = [(selector >> 4 * n & 15) for n in range(4)]
    return int.from_bytes([(255 * (eight[c & 7] >> 7) if c & 8 else eight[c & 7]) for c in chosen], "little")


INTEGERS: dict[str, Any] = {
    "add.s32": lambda a, b: a + b,
    "sub.s32": lambda a, b: a - b,
    "mul.lo.s32": lambda a, b: a * b,
    "mul.hi.s32": lambda a, b: signed(a) * signed(b) >> 32,
    "mul.hi.u32": lambda a, b: a * b >> 32,
    "min.s32": lambda a, b: min(signed(a), signed(b)),
    "min.u32": min,
    "max.s32": lambda a, b: max(signed(a), signed(b)),
    "and.b32": lambda a, b: a & b,
    "or.b32": lambda a, b: a | b,
    "xor.b32": lambda a, b: a ^ b,
    "shl.b32": lambda a, b: a << b if b < 32 else 0,
    "shr.u32": lambda a, b: a >> b if b < 32 else 0,
    "shr.s32": lambda a, b: signed(a) >> min(b, 31),
    "div.s32": lambda a, b: toward_zero(signed(a), signed(b)) if b else None,
    "rem.s32": lambda a, b: signed(a) - signed(b) * toward_zero(signed(a), signed(b)) if b else None,
    "div.u32": lambda a, b: a // b if b else None,
    "rem.u32": lambda a, b: a % b if b else None,
}
OPERANDS: dict[str, Any] = {
    "mad.lo.s32 %r3, %r1, %r2, -5": lambda a, b: a * b - 5,
    "abs.s32 %r3, %r1": lambda a, b: abs(signed(a)),
    "neg.s32 %r3, %r1": lambda a, b: -a,
    "not.b32 %r3, %r1": lambda a, b: ~a,
    "bfe.u32 %r3, %r1, 3, 7": lambda a, b: a >> 3 & 127,
    "bfe.u32 %r3, %r1, 28, 9": lambda a, b: a >> 28,
    "bfe.s32 %r3, %r1, 5, 8": lambda a, b: extracted(a, 5, 8),
    "bfe.s32 %r3, %r1, 27, 30": lambda a, b: extracted(a, 27, 30),
    "bfe.s32 %r3, %r1, 9, 0": lambda a, b: 0,
    "prmt.b32 %r3, %r1, %r2, 0x5410": lambda a, b: bytes_chosen(a, b, 0x5410),
    "prmt.b32 %r3, %r1, %r2, 0xbbb3U": lambda a, b: bytes_chosen(a, b, 0xBBB3),
    "prmt.b32 %r3, %r1, 0x43, 0x4140": lambda a, b: bytes_chosen(a, 0x43, 0x4140),
    "setp.lt.s32 %p1, %r1, %r2; selp.b32 %r3, 7, %r2, %p1": lambda a, b: 7 if signed(a) < signed(b) else b,
    "setp.ge.u32 %p1, %r1, %r2; @!%p1 mov.b32 %r1, 9; mov.b32 %r3, %r1": lambda a, b: a if a >= b else 9,
    "setp.ne.b32 %p1, %r1, %r2; not.pred %p2, %p1; selp.b32 %r3, 1, 0, %p2": lambda a, b: a == b,
    "cvt.u64.u32 %d1, %r1; shl.b64 %d1, %d1, 5; shr.u64 %d1, %d1, 20; cvt.u32.u64 %r3, %d1": lambda a, b: a << 5 >> 20,
    "mul.wide.s32 %d1, %r1, %r2; shr.u64 %d1, %d1, 16; cvt.u32.u64 %r3, %d1": lambda a, b: signed(a) * signed(b) >> 16,
    "cvt.s64.s32 %d1, %r1; mov.b64 {%r4, %r3}, %d1": lambda a, b: -1 if a >> 31 else 0,
    "cvt.s8.s32 %h1, %r1; cvt.s32.s8 %r3, %h1": lambda a, b: (a & 127) - (a & 128),
    "mov.b32 {%h1, %h2}, %r1; mul.wide.u16 %r3, %h1, %h2": lambda a, b: (a & 0xFFFF) * (a >> 16),
    "mov.b32 {%h1, %h2}, %r1; mov.b32 %r3, {%h2, %h1}": lambda a, b: a >> 16 | a << 16,
    "cvt.u16.u32 %h1, %r1; mul.hi.u16 %h2, %h1, 40503; cvt.u32.u16 %r3, %h2": lambda a, b: (a & 0xFFFF) * 40503 >> 16,
    "{ .reg .b32 %r1; mov.b32 %r1, 5; } mov.b32 %r3, %r1": lambda a, b: a,  # a scope has registers of its own
}
OPERANDS |= {f"{name} %r3, %r1, %r2": function for name, function in INTEGERS.items()}


@pytest.mark.parametrize("text", OPERANDS)
def test_integers(text):
    found = emulate(load("%r1", 0) + load("%r2", 1) + text + ";" + store("%r3", 2), WORDS, OTHER)
    for a, b, result in zip(WORDS.tolist(), OTHER.tolist(), found.tolist()):
        expected = OPERANDS[text](a, b)
        assert expected is None or result == int(expected) & ALL, (a, b)


# -- floats ------------------------------------------------------------------------------------------------------------


def flushed(x: np.ndarray) -> np.ndarray:
    return np.where(np.abs(x) < np.finfo(np.float32).tiny, x * np.float32(0), x)


def bf16(x: np.ndarray) -> np.ndarray:
    return x.astype(ml_dtypes.bfloat16).view(np.uint16).astype(np.uint32)


FLOATING: dict[str, Any] = {
    "add.rn.f32 %f3, %f1, %f2": lambda a, b: a + b,
    "sub.rn.f32 %f3, %f1, %f2": lambda a, b: a - b,
    "mul.rn.f32 %f3, %f1, %f2": lambda a, b: a * b,
    "mul.rn.ftz.f32 %f3, %f1, %f2": lambda a, b: flushed(flushed(a) * flushed(b)),
    "div.full.f32 %f3, %f1, %f2": lambda a, b: a / b,
    "max.f32 %f3, %f1, %f2": np.fmax,
    "min.f32 %f3, %f1, %f2": np.fmin,
    "max.NaN.f32 %f3, %f1, %f2": np.maximum,
    "neg.f32 %f3, %f1": lambda a, b: -a,
    "abs.f32 %f3, %f1": lambda a, b: np.abs(a),
    "copysign.f32 %f3, %f1, %f2": lambda a, b: np.copysign(b, a),
    "cvt.sat.f32.f32 %f3, %f1": lambda a, b: np.where(np.isnan(a), 0, np.clip(a, 0, 1)),
    "cvt.rni.f32.f32 %f3, %f1": lambda a, b: np.rint(a),
    "cvt.rmi.f32.f32 %f3, %f1": lambda a, b: np.floor(a),
    "mov.b32 %r1, %f1; cvt.rn.f32.s32 %f3, %r1": lambda a, b: a.view(np.int32).astype(np.float32),
    "mov.b32 %r1, %f1; cvt.rn.f32.u32 %f3, %r1": lambda a, b: a.view(np.uint32).astype(np.float32),
    "setp.lt.f32 %p1, %f1, %f2; selp.f32 %f3, %f1, %f2, %p1": lambda a, b: np.where(a < b, a, b),
    "setp.geu.f32 %p1, %f1, %f2; selp.f32 %f3, %f1, %f2, %p1": lambda a, b: np.where(~(a < b), a, b),
    "setp.ne.f32 %p1, %f1, %f1; selp.f32 %f3, 0f3F800000, 0f00000000, %p1": lambda a, b: np.zeros_like(a),
    "setp.neu.f32 %p1, %f1, %f1; selp.f32 %f3, 0f3F800000, 0f00000000, %p1": lambda a, b: np.isnan(a),
    "cvt.rn.bf16.f32 %h1, %f1; cvt.f32.bf16 %f3, %h1": lambda a, b: a.astype(ml_dtypes.bfloat16),
    "cvt.rn.f16.f32 %h1, %f1; cvt.f32.f16 %f3, %h1": lambda a, b: a.astype(np.float16),
}
BITWISE: dict[str, Any] = {
    "cvt.rn.bf16x2.f32 %r3, %f1, %f2": lambda a, b: bf16(a) << 16 | bf16(b),
    "cvt.rn.f16x2.f32 %r3, %f1, %f2": lambda a, b: (
        a.astype(np.float16).view(np.uint16).astype(np.uint32) << 16 | b.astype(np.float16).view(np.uint16)
    ),
    "cvt.rna.tf32.f32 %r3, %f1": lambda a, b: (a.view(np.uint32) + 4096) & 0xFFFFE000,  # finite ones
    "cvt.rzi.s32.f32 %r3, %f1": lambda a, b: np.clip(np.trunc(wide(a)), -(2**31), 2**31 - 1).astype(np.int64),
    "mov.b32 %r1, %f1; cvt.u16.u32 %h1, %r1; cvt.rn.f16x2.e4m3x2 %r3, %h1": lambda a, b: (
        a.view(np.uint8)
        .reshape(-1, 4)[:, :2]
        .copy()
        .view(ml_dtypes.float8_e4m3fn)
        .astype(np.float16)
        .view(np.uint32)[:, 0]
    ),
}


@pytest.mark.parametrize("text", FLOATING)
def test_floats(text):
    other = np.roll(FLOATS, 5)
    with np.errstate(all="ignore"):
        expected = np.asarray(FLOATING[text](FLOATS, other)).astype(np.float32)
    found = emulate(load("%f1", 0) + load("%f2", 1) + text + ";" + store("%f3", 2), FLOATS, other, dtype=np.float32)
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(np.signbit(found[expected == 0]), np.signbit(expected[expected == 0]))


@pytest.mark.parametrize("text", BITWISE)
def test_conversions_to_bits(text):
    numbers = FLOATS[np.isfinite(FLOATS)][: 128 - 16]
    numbers = np.resize(numbers, 128)
    other = np.roll(numbers, 5)
    with np.errstate(all="ignore"):
        expected = np.asarray(BITWISE[text](numbers, other)) & ALL
    found = emulate(load("%f1", 0) + load("%f2", 1) + text + ";" + store("%r3", 2), numbers, other)
    nan = expected.view(np.uint32) if expected.dtype == np.uint32 else expected.astype(np.uint32)
    differ = found != nan
    assert not differ.any() or ("e4m3" in text and _both_nan(found[differ], nan[differ]))


def _both_nan(a: np.ndarray, b: np.ndarray) -> bool:
    halves = [np.isnan(x.view(np.float16)) for x in (a, b)]
    same = a.view(np.uint16) == b.view(np.uint16)
    return bool((same | (halves[0] & halves[1])).all())


@pytest.mark.parametrize(("direction", "expected"), [("rn", 1 + 2**-23), ("rm", 1.0)])
def test_fma_rounds_once_in_each_direction(direction, expected):
    """1 + 0.75 ulp; and -(1 + e)(1 - e) + 1 = e^2, which two roundings would make 0."""
    a = np.full(128, 1.5 * 2**-12, np.float32)
    text = load("%f1") + f"mov.b32 %f2, 0f39800000; fma.{direction}.f32 %f3, %f1, %f2, 0f3F800000;" + store("%f3", 1)
    np.testing.assert_array_equal(emulate(text, a, dtype=np.float32), np.float32(expected))
    text = load("%f1") + f"mov.b32 %f2, 0fBF7FF000; fma.{direction}.f32 %f3, %f1, %f2, 0f3F800000;" + store("%f3", 1)
    exact = emulate(text, np.full(128, 1 + 2**-12, np.float32), dtype=np.float32)
    np.testing.assert_array_equal(exact, np.float32(2**-24))


def test_packed_bfloat16():
    a, b = (x.view(ml_dtypes.bfloat16) for x in (WORDS, OTHER))
    with np.errstate(all="ignore"):
        expected = (a.astype(np.float32) - b.astype(np.float32)).astype(ml_dtypes.bfloat16).astype(np.float32)
    text = load("%r1", 0) + load("%r2", 1) + "sub.bf16x2 %r3, %r1, %r2;" + store("%r3", 2)
    found = emulate(text, WORDS, OTHER).view(ml_dtypes.bfloat16).astype(np.float32)
    np.testing.assert_array_equal(found, expected)


def test_functions_that_a_gpu_approximates():
    x = np.abs(FLOATS[15:]).repeat(2)[:128]
    for name, function in {
        "ex2": np.exp2,
        "lg2": np.log2,
        "rcp": np.reciprocal,
        "tanh": np.tanh,
    }.items():
        found = emulate(load("%f1") + f"{name}.approx.ftz.f32 %f3, %f1;" + store("%f3", 1), x, dtype=np.float32)
        with np.errstate(all="ignore"):
            np.testing.assert_allclose(found, function(wide(x)).astype(np.float32), rtol=3e-7, err_msg=name)


# -- wgmma -------------------------------------------------------------------------------------------------------------


def test_rounding_to_bfloat16_is_that_of_ml_dtypes():
    bits = np.random.default_rng(0).integers(0, 1 << 32, 1 << 16, dtype=np.uint32)
    x = bits.view(np.float32)
    x = x[~np.isnan(x)]
    with np.errstate(all="ignore"):
        np.testing.assert_array_equal(formats.narrow("bf16", x), x.astype(ml_dtypes.bfloat16).view(np.uint16))
