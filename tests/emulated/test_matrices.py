"""Matrix products of the emulator, and the copies and fences around them."""

import importlib.util

import numpy as np
import pytest

if importlib.util.find_spec("numba") is None:
    pytest.skip("the extra `emulate` (numba) is not installed", allow_module_level=True)
import ml_dtypes
from ptx_emulator import wgmma
from ptx_emulator.launch import KernelFault
from small_kernels import BARRIER, emulate, load, store, wide

# -- matrices ----------------------------------------------------------------------------------------------------------
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
    expected = wide(a) @ wide(b).T + BEFORE
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_a_product_of_tf32():
    """8 x 4 words look like 16 x 16 halves to ldmatrix; bits that tf32 does not have are not seen."""
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((16, 8)).astype(np.float32), rng.standard_normal((8, 8)).astype(np.float32)
    text = MMA.replace("INSTRUCTION", "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32")
    found = emulate(text, a, b, shape=(16, 8), dtype=np.float32, threads=32)
    cut = lambda x: wide((x.view(np.uint32) & 0xFFFFE000).view(np.float32))
    np.testing.assert_allclose(found, cut(a) @ cut(b).T + BEFORE, rtol=1e-5, atol=1e-5)
    assert np.abs(found - (wide(a) @ wide(b).T + BEFORE)).max() > 1e-4


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


# -- wgmma -------------------------------------------------------------------------------------------------------------


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
PRODUCT = wide(NUMBERS[:64]) @ wide(NUMBERS[64:]).T


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
