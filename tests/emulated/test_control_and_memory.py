"""Threads, blocks and memory of the emulator: what they compute, and which misuse is a fault."""

import importlib.util
from typing import Any

import numpy as np
import pytest

if importlib.util.find_spec("numba") is None:
    pytest.skip("the extra `emulate` (numba) is not installed", allow_module_level=True)
from ptx_emulator.faults import MEANINGS, OUTSIDE
from ptx_emulator.launch import KernelFault, run
from ptx_emulator.parser import PtxError, parse
from small_kernels import BARRIER, WORDS, emulate, faults, kernel, load, store

# -- control -----------------------------------------------------------------------------------------------------------


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


# -- global memory -----------------------------------------------------------------------------------------------------


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


# -- shared memory -----------------------------------------------------------------------------------------------------
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
