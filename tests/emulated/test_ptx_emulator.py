"""The emulator, instruction by instruction, against Python's integers, numpy and ml_dtypes; and what it refuses."""

import importlib.util
from typing import Any

import numpy as np
import pytest

if importlib.util.find_spec("numba") is None:
    pytest.skip("the extra `emulate` (numba) is not installed", allow_module_level=True)

import ml_dtypes
from ptx_emulator import formats, wgmma
from ptx_emulator.faults import MEANINGS, OUTSIDE
from ptx_emulator.launch import KernelFault, run
from ptx_emulator.parser import PtxError, parse

WORDS = np.random.default_rng(0).integers(0, 1 << 32, 128, dtype=np.uint32)
WORDS[:8] = 0, 1, 0xFFFFFFFF, 0x80000000, 0x7FFFFFFF, 31, 32, 0xFF
OTHER = np.roll(WORDS, 7)
with np.errstate(all="ignore"):
    FLOATS = np.array(
        [0, -0.0, 1, -1.5, 2.5, 1e-40, -1e-40, 3e38, np.inf, -np.inf, np.nan, 1 + 2**-23, 65519, 0.5, 449],
        np.float32,
    )
    FLOATS = np.concatenate([FLOATS, np.random.default_rng(1).standard_normal(113).astype(np.float32) * 100])


def _wide(x: Any) -> np.ndarray:
    return np.asarray(x, np.float64)


def kernel(body: str, arguments: int, threads: int = 128) -> str:
    """%a0, %a1 ... point at the arguments; %i is the thread, %o four times that; %r, %f, %h, %d, %p are free."""
    names = [f"k_param_{n}" for n in range(arguments)]
    return f"""
    .version 8.7
    .target sm_90a
    .extern .shared .align 16 .b8 smem[];
    .visible .entry k({", ".join(f".param .u64 .ptr .align 16 {name}" for name in names)})
    .reqntid {threads}, 1, 1
    {{
        .reg .pred %p<9>; .reg .b16 %h<9>; .reg .b32 %r<99>; .reg .f32 %f<99>; .reg .b64 %d<9>; .reg .b64 %a<9>;
        .reg .b32 %i; .reg .b64 %o; .reg .b32 %s;
        {" ".join(f"ld.param.b64 %a{n}, [{name}];" for n, name in enumerate(names))}
        mov.u32 %i, %tid.x; mul.wide.u32 %o, %i, 4; mov.b32 %s, smem;
        {body}
        ret;
    }}"""


def emulate(
    body: str, *inputs: np.ndarray, shape: Any = 128, dtype: Any = np.uint32, grid=(1,), **more: Any
) -> np.ndarray:
    threads, together = more.get("threads", 128), more.get("together", 4096)
    text = kernel(body, len(inputs) + 1, threads)
    (result,) = run(text, grid, 4096, list(inputs), [(np.atleast_1d(shape), np.dtype(dtype))], together)
    return result


def load(register: str, argument: int = 0) -> str:
    return f"add.s64 %d8, %a{argument}, %o; ld.global.b32 {register}, [%d8];"


def store(register: str, argument: int) -> str:
    return f"add.s64 %d8, %a{argument}, %o; st.global.b32 [%d8], {register};"


def faults(body: str, *inputs: np.ndarray, **more: Any) -> set[str]:
    with pytest.raises(KernelFault) as caught:
        emulate(body, *inputs, **more)
    return caught.value.faults.kinds()


# -- integers ---------------------------------------------------------------------------------------------------------

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


# -- floats -----------------------------------------------------------------------------------------------------------


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
    "cvt.rzi.s32.f32 %r3, %f1": lambda a, b: np.clip(np.trunc(_wide(a)), -(2**31), 2**31 - 1).astype(np.int64),
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
            np.testing.assert_allclose(found, function(_wide(x)).astype(np.float32), rtol=3e-7, err_msg=name)


# -- control ----------------------------------------------------------------------------------------------------------


def test_threads_that_part_meet_again():
    """Odd threads add up all numbers below theirs; a warp vote after the loop wants all of them."""
    body = """
    and.b32 %r1, %i, 1; setp.eq.s32 %p1, %r1, 0; mov.b32 %r2, 0; mov.b32 %r3, 0;
    @%p1 bra $DONE;
    $LOOP:
    add.s32 %r2, %r2, %r3; add.s32 %r3, %r3, 1; setp.lt.s32 %p2, %r3, %i;
    @%p2 bra $LOOP;
    $DONE:
    shfl.sync.bfly.b32 %r4, %r2, 0, 31, -1;
    """
    expected = [sum(range(n)) if n % 2 else 0 for n in range(128)]
    np.testing.assert_array_equal(emulate(body + store("%r4", 0)), expected)


def test_a_vote_of_half_a_warp_is_refused():
    body = "and.b32 %r1, %i, 1; setp.eq.s32 %p1, %r1, 0; @%p1 bra $END; shfl.sync.bfly.b32 %r2, %i, 1, 31, -1; $END:"
    with pytest.raises(PtxError, match="not all of 32 threads take part in line"):
        emulate(body + store("%r2", 0))


@pytest.mark.parametrize("together", [128, 384, 4096])
def test_blocks_know_their_place(together):
    body = """
    mov.u32 %r1, %ctaid.x; mov.u32 %r2, %ctaid.y; mov.u32 %r3, %ctaid.z; mov.u32 %r4, %nctaid.x; mov.u32 %r5, %nctaid.y;
    mad.lo.s32 %r6, %r3, %r5, %r2; mad.lo.s32 %r6, %r6, %r4, %r1; shl.b32 %r6, %r6, 7; add.s32 %r6, %r6, %i;
    mul.wide.u32 %o, %r6, 4;
    """
    found = emulate(body + store("%r6", 0), shape=12 * 128, grid=(3, 2, 2), together=together)
    np.testing.assert_array_equal(found, np.arange(12 * 128))


@pytest.mark.parametrize(
    ("text", "source"),
    [
        ("bfly.b32 %r3, %i, 5, 31", lambda n: n ^ 5),
        ("idx.b32 %r3, %i, 9, 31", lambda n: 9),
        ("up.b32 %r3, %i, 3, 0", lambda n: n - 3 if n >= 3 else n),
        ("down.b32 %r3, %i, 3, 31", lambda n: n + 3 if n < 29 else n),
        ("idx.b32 %r3, %i, 1, 0x181f", lambda n: n // 8 * 8 + 1),  # segments of eight
    ],
)
def test_shuffles(text, source):
    found = emulate(f"shfl.sync.{text}, -1;" + store("%r3", 0))
    np.testing.assert_array_equal(found, [n // 32 * 32 + source(n % 32) for n in range(128)])


def test_registers_hold_no_zeros_before_they_are_written():
    assert (emulate(store("%r77", 0)) != 0).all()


@pytest.mark.parametrize(
    "text",
    [
        "tex.1d.v4.f32.s32 {%f1, %f2, %f3, %f4}, [%a0, {%r1}]",
        "cp.async.bulk.tensor.2d.shared::cluster.global.tile [%r1], [%a0, {%r2, %r3}], [%r4]",
        "mbarrier.init.shared::cta.b64 [%r1], 1",
        "tcgen05.mma.cta_group::1.kind::f16 [%r1], %d1, %d2, %r2, %p1",
        "bar.sync 1, 64",
        "red.global.add.f32 [%a0], %f1",
        "setp.lt.and.s32 %p1, %r1, %r2, %p2",
        "wgmma.mma_async.sync.aligned.m64n8k32.f32.e4m3.e4m3 {%f1, %f2, %f3, %f4}, %d1, %d2, 0, 1, 1",
    ],
)
def test_what_is_not_modelled_is_refused_with_its_text(text):
    with pytest.raises(PtxError) as caught:
        emulate(text + ";" + store("%r1", 0))
    assert text.replace("shared::cta", "shared::cta") in str(caught.value)
    assert "not modelled: line " in str(caught.value)


@pytest.mark.parametrize("text", [".local .b8 x[8];", "mov.b32 %r1, %r1 +;", "ld.global.b32 %r1, [%a0 * 2];"])
def test_what_cannot_be_read_is_refused_with_its_line(text):
    with pytest.raises(PtxError, match="line "):
        parse(kernel(text, 1))


# -- global memory ----------------------------------------------------------------------------------------------------


def test_accesses_beyond_an_array():
    beyond = "add.s64 %d1, %a0, %o; ld.global.b32 %r1, [%d1+4];"
    assert faults(beyond + store("%r1", 1), WORDS) == {MEANINGS[OUTSIDE]}
    guarded = "setp.lt.s32 %p1, %i, 127; mov.b32 %r1, 0; add.s64 %d1, %a0, %o; @%p1 ld.global.b32 %r1, [%d1+4];"
    np.testing.assert_array_equal(emulate(guarded + store("%r1", 1), WORDS), [*WORDS[1:], 0])
    assert faults("add.s64 %d1, %a1, %o; st.global.b32 [%d1+-4], %i;", WORDS) == {"out of bounds", "output not written"}


def test_a_fault_says_where_it_is():
    with pytest.raises(KernelFault, match=r"out of bounds \(1x\) in line \d+: ld.global.b32 %r1, \[%d1\+4\]; first: "
                       r"byte 512 of the 512 of argument 0, block \[0, 0, 0\], thread 127"):  # fmt: skip
        emulate("add.s64 %d1, %a0, %o; ld.global.b32 %r1, [%d1+4];" + store("%r1", 1), WORDS)


def test_other_misuse_of_global_memory():
    assert faults("ld.global.v2.b32 {%r1, %r2}, [%a0+4];" + store("%r1", 1), WORDS) == {"misaligned"}
    assert faults(store("%i", 0) + store("%i", 1), WORDS) == {"an input is overwritten"}
    assert faults(load("%r1", 0) + store("%r1", 0)) == {"read before it is written"}
    assert faults("setp.lt.s32 %p1, %i, 9; @!%p1 bra $E;" + store("%i", 0) + "$E:") == {"output not written"}
    assert faults(store("%i", 0) + "add.s32 %r1, %i, 1;" + store("%r1", 0)) == {"written twice"}
    np.testing.assert_array_equal(emulate(store("%i", 0) + store("%i", 0)), np.arange(128))  # the same value
    assert faults(store("%i", 0), grid=(2,)) == {"written twice"}  # by two blocks, be it the same value
    assert faults("mov.u32 %r1, %ctaid.x; setp.eq.s32 %p1, %r1, 0; @!%p1 bra $E;" + store("%i", 0) + "ret; $E:"
                  + load("%r2", 0), grid=(2,)) == {"race"}  # fmt: skip


# -- shared memory ----------------------------------------------------------------------------------------------------

EXCHANGE = (
    load("%r1")
    + """
    shl.b32 %r5, %i, 2; add.s32 %r6, %s, %r5; st.shared.b32 [%r6], %r1;
    {first}
    mov.b32 %r7, 127; sub.s32 %r7, %r7, %i; shl.b32 %r7, %r7, 2; add.s32 %r7, %r7, %s; ld.shared.b32 %r3, [%r7];
    {second}
    st.shared.b32 [%r6], %i;
    """
    + store("%r3", 1)
)
BARRIER = "bar.sync 0;"


def test_barriers():
    found = emulate(EXCHANGE.format(first=BARRIER, second=BARRIER), WORDS)
    np.testing.assert_array_equal(found, WORDS[::-1])
    assert "race" in faults(EXCHANGE.format(first="", second=BARRIER), WORDS)
    assert faults(EXCHANGE.format(first=BARRIER, second=""), WORDS) == {"race"}


def test_a_barrier_that_some_never_reach():
    body = "setp.lt.s32 %p1, %i, 32; @%p1 bra $END; bar.sync 0; $END:"
    np.testing.assert_array_equal(emulate(body + store("%i", 0)), np.arange(128))  # those that have ended do not count
    with pytest.raises(PtxError, match="ran past its last instruction"):
        run(kernel("", 1).replace("ret;", ""), (1,), 0, [], [((128,), np.dtype("u4"))])


def test_other_misuse_of_shared_memory():
    assert faults("ld.shared.b32 %r3, [%s];" + store("%r3", 0)) == {"read before it is written"}
    assert faults("add.s32 %r5, %s, 4096; st.shared.b32 [%r5], %i;" + store("%i", 0)) == {"out of bounds"}
    assert faults("st.shared.v2.b32 [%s+4], {%i, %i};" + store("%i", 0)) >= {"misaligned"}
    assert faults("st.shared.b32 [%s], %i;" + store("%i", 0)) == {"race"}
    np.testing.assert_array_equal(emulate("st.shared.b32 [%s], 7;" + store("%i", 0)), np.arange(128))  # the same value


def test_bytes_in_shared_memory_are_watched_one_by_one():
    """Four threads, of different warps, share a word."""
    body = """
    and.b32 %r1, %i, 31; shl.b32 %r1, %r1, 2; shr.u32 %r2, %i, 5; add.s32 %r1, %r1, %r2; add.s32 %r1, %r1, %s;
    cvt.u16.u32 %h1, %i; st.shared.b8 [%r1], %h1; ld.shared.b8 %h2, [%r1]; cvt.u32.u16 %r3, %h2;
    """
    np.testing.assert_array_equal(emulate(body + store("%r3", 0)), np.arange(128))


COPY = """
    shl.b32 %r5, %i, 4; add.s32 %r6, %s, %r5; cvt.u64.u32 %d1, %r5; add.s64 %d2, %a0, %d1;
    cp.async.cg.shared.global [%r6], [%d2], 16, {size}; cp.async.commit_group;
    {more}
    {wait}
    {barrier}
    xor.b32 %r7, %r5, {other}; add.s32 %r7, %r7, %s; ld.shared.b32 %r3, [%r7];
    """ + store("%r3", 1)
MORE = "cp.async.cg.shared.global [%r6+2048], [%d2], 16; cp.async.commit_group;"
FLYING = "touched before a copy has arrived"


def copied(**changes: Any) -> str:
    return COPY.format(
        **{"size": 16, "more": "", "wait": "cp.async.wait_group 0;", "barrier": BARRIER, "other": 1024, **changes}
    )


def test_copies_arrive_when_they_are_waited_for():
    words = np.arange(512, dtype=np.uint32)
    np.testing.assert_array_equal(emulate(copied(), words), 4 * (np.arange(128) ^ 64))
    np.testing.assert_array_equal(emulate(copied(size=0), words), 0)
    assert "race" in faults(copied(barrier=""), words)
    emulate(copied(barrier="", other=0), words)  # a thread sees its own
    assert faults(copied(wait=""), words) == {FLYING}
    emulate(copied(more=MORE, wait="cp.async.wait_group 1;"), words)
    assert faults(copied(more=MORE, wait="cp.async.wait_group 2;"), words) == {FLYING}
    assert faults(copied(more="st.shared.b32 [%r6], %i;"), words) == {FLYING}


def test_a_copy_into_what_others_still_read():
    again = "{} cp.async.cg.shared.global [%r6], [%d2], 16; cp.async.commit_group; cp.async.wait_group 0;"
    words = np.arange(512, dtype=np.uint32)
    emulate(copied() + again.format(BARRIER), words)
    assert faults(copied() + again.format(""), words) == {"race"}


def test_a_copy_that_reads_beyond_its_array():
    words = np.arange(510, dtype=np.uint32)
    assert faults(copied(), words) == {"out of bounds"}
    np.testing.assert_array_equal(emulate(copied(size=8), words), emulate(copied(), np.arange(512, dtype=np.uint32)))


# -- matrices ---------------------------------------------------------------------------------------------------------

MMA = """
    .reg .b32 %m<4>; .reg .b32 %n<2>; .reg .f32 %c<4>;
    shl.b32 %r5, %i, 4; add.s32 %r6, %s, %r5; cvt.u64.u32 %d1, %r5; add.s64 %d2, %a0, %d1; add.s64 %d3, %a1, %d1;
    ld.global.v4.b32 {%r10, %r11, %r12, %r13}, [%d2]; st.shared.v4.b32 [%r6], {%r10, %r11, %r12, %r13};
    setp.lt.u32 %p1, %i, 16; @%p1 ld.global.v4.b32 {%r10, %r11, %r12, %r13}, [%d3];
    @%p1 st.shared.v4.b32 [%r6+512], {%r10, %r11, %r12, %r13}; bar.sync 0;
    and.b32 %r20, %i, 15; shl.b32 %r20, %r20, 5; and.b32 %r21, %i, 16; add.s32 %r20, %r20, %r21; add.s32 %r20, %r20, %s;
    ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%m0, %m1, %m2, %m3}, [%r20];
    and.b32 %r20, %i, 7; shl.b32 %r20, %r20, 5; and.b32 %r21, %i, 8; shl.b32 %r21, %r21, 1; add.s32 %r20, %r20, %r21;
    add.s32 %r20, %r20, %s; ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%n0, %n1}, [%r20+512];
    mov.b32 %c0, 0f3F800000; mov.b32 %c1, 0f40000000; mov.b32 %c2, %c0; mov.b32 %c3, %c1;
    INSTRUCTION {%c0, %c1, %c2, %c3}, {%m0, %m1, %m2, %m3}, {%n0, %n1}, {%c0, %c1, %c2, %c3};
    shl.b32 %r22, %i, 3; cvt.u64.u32 %d4, %r22; add.s64 %d4, %d4, %a2;
    st.global.v2.b32 [%d4], {%c0, %c1}; st.global.v2.b32 [%d4+256], {%c2, %c3};
"""
BEFORE = np.array([1, 2] * 4, np.float32)  # by column


@pytest.mark.parametrize(
    ("kinds", "dtype"),
    [("m16n8k16.row.col.f32.bf16.bf16.f32", ml_dtypes.bfloat16), ("m16n8k16.row.col.f32.f16.f16.f32", np.float16)],
)
def test_a_product_of_16_bit_numbers(kinds, dtype):
    """Rows of A, then rows of B transposed, of 16 numbers each, by way of shared memory."""
    both = np.random.default_rng(0).standard_normal((24, 16)).astype(dtype)
    a, b = both[:16], both[16:]
    text = MMA.replace("INSTRUCTION", f"mma.sync.aligned.{kinds}")
    found = emulate(text, a, b, shape=(16, 8), dtype=np.float32, threads=32)
    expected = _wide(a) @ _wide(b).T + BEFORE
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_a_product_of_tf32():
    """8 x 4 words look like 16 x 16 halves to ldmatrix; bits that tf32 does not have are not seen."""
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((16, 8)).astype(np.float32), rng.standard_normal((8, 8)).astype(np.float32)
    text = MMA.replace("INSTRUCTION", "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32")
    found = emulate(text, a, b, shape=(16, 8), dtype=np.float32, threads=32)
    cut = lambda x: _wide((x.view(np.uint32) & 0xFFFFE000).view(np.float32))
    np.testing.assert_allclose(found, cut(a) @ cut(b).T + BEFORE, rtol=1e-5, atol=1e-5)
    assert np.abs(found - (_wide(a) @ _wide(b).T + BEFORE)).max() > 1e-4


@pytest.mark.parametrize("transposed", ["", ".trans"])
def test_matrices_come_back_as_they_were_stored(transposed):
    body = f"""
    and.b32 %r5, %i, 31; shl.b32 %r5, %r5, 4; and.b32 %r6, %i, 96; shl.b32 %r6, %r6, 4; add.s32 %r5, %r5, %r6;
    add.s32 %r5, %r5, %s; add.s32 %r1, %i, 1000; add.s32 %r2, %i, 2000; add.s32 %r3, %i, 3000;
    stmatrix.sync.aligned.m8n8.x4{transposed}.shared.b16 [%r5], {{%i, %r1, %r2, %r3}};
    ldmatrix.sync.aligned.m8n8.x4{transposed}.shared.b16 {{%r11, %r12, %r13, %r14}}, [%r5];
    sub.s32 %r12, %r12, %r11; sub.s32 %r14, %r14, %r13; add.s32 %r15, %r12, %r14; add.s32 %r15, %r15, %r11;
    """
    np.testing.assert_array_equal(emulate(body + store("%r15", 0)), np.arange(128) + 2000)


def test_a_transposed_load():
    body = """
    shl.b32 %r5, %i, 2; add.s32 %r5, %r5, %s; st.shared.b32 [%r5], %r1; bar.sync 0;
    and.b32 %r6, %i, 7; shl.b32 %r6, %r6, 4; add.s32 %r6, %r6, %s;
    ldmatrix.sync.aligned.m8n8.x1.trans.shared.b16 {%r3}, [%r6];
    """
    matrix = np.arange(64, dtype=np.uint16).reshape(8, 8)
    found = emulate(load("%r1") + body + store("%r3", 1), matrix, shape=32, threads=32)
    np.testing.assert_array_equal(found.view(np.uint16).reshape(8, 8), matrix.T)


# -- wgmma ------------------------------------------------------------------------------------------------------------


def descriptor(start: int, leading: int, stride: int, swizzle: int) -> int:
    return start >> 4 | leading >> 4 << 16 | stride >> 4 << 32 | {16: 0, 128: 1, 64: 2, 32: 3}[swizzle] << 62


@pytest.mark.parametrize("swizzle", [32, 64, 128])
def test_descriptors_of_tiles_with_features_side_by_side(swizzle):
    """Rows of as many bytes as are swizzled; 16 bytes c of row r lie at c ^ r, within its pattern."""
    (places,) = wgmma.places_of(np.array([descriptor(2048 + 1024, 0, 8 * swizzle, swizzle)], np.uint64), 64, False)
    chunks = swizzle // 16
    for row in range(64):
        for chunk in range(2):
            byte = row * swizzle + 16 * (chunk ^ (row * swizzle // 128 % chunks))
            assert places[row, chunk] == 2048 + byte


@pytest.mark.parametrize("swizzle", [32, 64, 128])
def test_descriptors_of_tiles_with_rows_side_by_side(swizzle):
    """As many rows side by side as are swizzled; the next rows are `leading` on, the next eight k `stride`."""
    leading, stride = 16 * swizzle, 8 * swizzle
    (places,) = wgmma.places_of(np.array([descriptor(1024, leading, stride, swizzle)], np.uint64), 64, True)
    chunks = swizzle // 16
    for k in range(16):
        for piece in range(8):
            byte = piece // chunks * leading + k // 8 * stride + k % 8 * swizzle
            byte += 16 * (piece % chunks ^ (k * swizzle // 128 % chunks))
            assert places[k, piece] == byte


def test_descriptors_without_swizzling():
    """Core matrices of 8 rows of 16 bytes: `leading` apart along k, `stride` along the rows."""
    (places,) = wgmma.places_of(np.array([descriptor(1024, 128, 256, 16)], np.uint64), 64, False)
    assert all(places[r, c] == r % 8 * 16 + r // 8 * 256 + c * 128 for r in range(64) for c in range(2))


WGMMA = """
    .reg .f32 %c<4>; .reg .b64 %left; .reg .b64 %right;
    {copy}
    {wait}
    {barrier}
    {fence}
    mov.b32 %c0, 0f3F800000; mov.b32 %c1, %c0; mov.b32 %c2, %c0; mov.b32 %c3, %c0;
    mov.b64 %left, LEFT; mov.b64 %right, RIGHT;
    wgmma.fence.sync.aligned;
    wgmma.mma_async.sync.aligned.m64n8k16.f32.f16.f16 {{%c0, %c1, %c2, %c3}}, %left, %right, {keep}, 1, 1, 0, 0;
    wgmma.commit_group.sync.aligned;
    {before}
    {finish}
    {after}
    and.b32 %r22, %i, 31; shl.b32 %r22, %r22, 3; shr.u32 %r23, %i, 5; shl.b32 %r23, %r23, 9; add.s32 %r22, %r22, %r23;
    cvt.u64.u32 %d4, %r22; add.s64 %d4, %d4, %a1;
    st.global.v2.b32 [%d4], {{%c0, %c1}}; st.global.v2.b32 [%d4+256], {{%c2, %c3}};
"""
# 64 rows of A and 8 of B transposed, 16 numbers each, lie one after the other, swizzled by 32 bytes as they come.
WGMMA = WGMMA.replace("LEFT", str(descriptor(1024, 0, 256, 32))).replace(
    "RIGHT", str(descriptor(1024 + 2048, 0, 256, 32))
)
STORED = """
    shl.b32 %r5, %i, 4; add.s32 %r6, %s, %r5; cvt.u64.u32 %d1, %r5; add.s64 %d2, %a0, %d1;
    ld.global.v4.b32 {%r10, %r11, %r12, %r13}, [%d2]; st.shared.v4.b32 [%r6], {%r10, %r11, %r12, %r13};
    setp.lt.u32 %p1, %i, 16; @%p1 ld.global.v4.b32 {%r10, %r11, %r12, %r13}, [%d2+2048];
    @%p1 st.shared.v4.b32 [%r6+2048], {%r10, %r11, %r12, %r13};
"""
COPIED = """
    shl.b32 %r5, %i, 4; add.s32 %r6, %s, %r5; cvt.u64.u32 %d1, %r5; add.s64 %d2, %a0, %d1;
    cp.async.cg.shared.global [%r6], [%d2], 16; setp.lt.u32 %p1, %i, 16;
    @%p1 cp.async.cg.shared.global [%r6+2048], [%d2+2048], 16; cp.async.commit_group;
"""
FENCE, UNFENCED = "fence.proxy.async.shared::cta;", "read by a wgmma without a fence after the write"


def multiplied(**changes: str) -> np.ndarray:
    parts = dict(copy=STORED, wait="", barrier=BARRIER, fence=FENCE, keep="1", before="", after="")
    parts |= dict(finish="wgmma.wait_group.sync.aligned 0;")
    return emulate(WGMMA.format(**parts | changes), MATRIX, shape=(64, 8), dtype=np.float32)


def swizzled(rows: np.ndarray) -> np.ndarray:
    """Rows of two chunks, which trade places in every other four rows."""
    chunks = rows.reshape(-1, 2, 8)
    return np.where((np.arange(len(rows)) // 4 % 2 == 1)[:, None, None], chunks[:, ::-1], chunks).reshape(rows.shape)


NUMBERS = np.random.default_rng(0).standard_normal((72, 16)).astype(np.float16)
MATRIX = swizzled(NUMBERS)
PRODUCT = _wide(NUMBERS[:64]) @ _wide(NUMBERS[64:]).T


def kinds(**changes: str) -> set[str]:
    with pytest.raises(KernelFault) as caught:
        multiplied(**changes)
    return caught.value.faults.kinds()


def test_wgmma():
    np.testing.assert_allclose(multiplied(), PRODUCT + 1, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(multiplied(keep="0"), PRODUCT, rtol=1e-5, atol=1e-5)
    wait = dict(copy=COPIED, wait="cp.async.wait_group 0;")
    np.testing.assert_allclose(multiplied(**wait), PRODUCT + 1, rtol=1e-5, atol=1e-5)


def test_wgmma_comes_late_where_nobody_waits():
    np.testing.assert_array_equal(multiplied(finish=""), 1)
    np.testing.assert_array_equal(multiplied(finish="wgmma.wait_group.sync.aligned 1;"), 1)


def test_wgmma_wants_barriers_fences_and_waits():
    assert kinds(fence="") == {UNFENCED}
    assert kinds(barrier=FENCE, fence=BARRIER.replace("bar.sync 0;", "")) == {"race"}
    np.testing.assert_allclose(
        multiplied(barrier=FENCE, fence=BARRIER), PRODUCT + 1, rtol=1e-5, atol=1e-5
    )  # by writers
    assert kinds(barrier="", fence=FENCE) == {"race"}
    assert kinds(fence=FENCE + "st.shared.v4.b32 [%r6], {%r10, %r11, %r12, %r13};") >= {UNFENCED}
    assert "touched before a copy has arrived" in kinds(copy=COPIED)
    over = "st.shared.v4.b32 [%r6], {%r10, %r11, %r12, %r13};"
    assert "overwritten before a wgmma has read it" in kinds(before=BARRIER + over)
    assert kinds(after=over) == {"race"}  # with other warps, which may wait longer
    multiplied(after=BARRIER + over)


def test_wgmma_with_registers_on_the_left():
    """The same rows, as mma.sync wants them."""
    fragments = (
        NUMBERS[:64].reshape(4, 2, 8, 2, 4, 2).transpose(0, 2, 4, 3, 1, 5)
    )  # warp, row, piece, k half, half, pair
    words = np.ascontiguousarray(fragments).view(np.uint32).reshape(128, 4)
    both = np.concatenate([words.view(np.float16).reshape(64, 16), MATRIX[64:]])
    text = WGMMA.replace("%left,", "{{%r30, %r31, %r32, %r33}},").replace("1, 1, 0, 0", "1, -1, 0")
    text = text.format(
        copy=STORED, wait="", barrier=BARRIER, fence=FENCE, keep="1", before="", after="",
        finish="wgmma.wait_group.sync.aligned 0;",
    )  # fmt: skip
    text = text.replace("mov.b64 {%r30, %r31, %r32, %r33},", "mov.b64 %left,")
    text = text.replace("wgmma.fence", "ld.global.v4.b32 {%r30, %r31, %r32, %r33}, [%d2]; wgmma.fence")
    found = emulate(text, both, shape=(64, 8), dtype=np.float32)
    np.testing.assert_allclose(found, 1 - PRODUCT, rtol=1e-5, atol=1e-5)


def test_rounding_to_bfloat16_is_that_of_ml_dtypes():
    bits = np.random.default_rng(0).integers(0, 1 << 32, 1 << 16, dtype=np.uint32)
    x = bits.view(np.float32)
    x = x[~np.isnan(x)]
    with np.errstate(all="ignore"):
        np.testing.assert_array_equal(formats.narrow("bf16", x), x.astype(ml_dtypes.bfloat16).view(np.uint16))
