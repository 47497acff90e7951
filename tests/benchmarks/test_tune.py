"""The search for tiles finds what runs and is right, and rewrites one entry of the table."""

import json

import jax.numpy as jnp
import pytest

from benchmarks import tile_space, tune
from benchmarks.timing import QUICK
from mqa_jax.attention import inputs_of
from mqa_jax.kernels.gpu import assuming
from mqa_jax.kernels.triton import tile_config
from mqa_jax.kernels.triton.tile_config import TileConfig

pytestmark = pytest.mark.slow


def test_a_quick_search_writes_an_entry_and_nothing_else(tmp_path, capsys):
    file, before = tmp_path / "tiles.json", tile_config.TABLE.read_text()
    tune.main(["--quick", "--out", str(file), "--directions", "dscore", "--dtypes", "float32", "--head-dims", "128"])
    assert tile_config.TABLE.read_text() == before
    old, new = (json.loads(text)["entries"] for text in (before, file.read_text()))
    entry = tune.Entry("dscore", "float32", 128)
    changed = [x for x in new if x not in old]
    assert [x.items() >= entry.key.items() for x in changed] == [True]
    assert tile_config.config_of(changed[0]) in tune.TINY
    assert changed[0]["reason"].startswith("fastest of 2 at B=1 T=32 S=32 N=1 K=1 H=128 causal float32: ")
    assert "2 measured" in capsys.readouterr().out


TABLE = [
    {"architecture": architecture, "direction": "forward", "dtype": "16-bit", "head_dim": head_dim, **more}
    for architecture in ("sm80", "sm90")
    for head_dim in (64, 128)
    for more in ({"rows": 128, "plain": True}, {"rows": 64})
]
SAME = {"columns": 64, "warps": 4, "stages": 1, "reason": "of old"}


def test_only_this_entry_of_this_architecture_is_rewritten(tmp_path, monkeypatch):
    """And the new one is found: that for plain calls before that for all."""
    file, config = tmp_path / "tiles.json", TileConfig(32, 32, warps=4, stages=3, defer_values=True)
    entry, array = tune.Entry("forward", "16-bit", 128), jnp.zeros((1, 4096, 1, 128), jnp.bfloat16)
    monkeypatch.setattr(tile_config, "TABLE", file)
    for removed in (None, 6):  # the predecessor
        old = [{**x, **SAME} for number, x in enumerate(TABLE) if number != removed]
        file.write_text(json.dumps({"entries": old}))
        tile_config.table.cache_clear()
        try:
            with assuming("sm90"):
                tune.write(file, entry, config, "fast")
                plain = inputs_of(array, array, array)
                capped = inputs_of(array, array, array, logits_soft_cap=1.0)
                assert tile_config.choose("forward", plain) == config
                assert tile_config.choose("forward", capped).rows == 64
        finally:
            tile_config.table.cache_clear()
        new = json.loads(file.read_text())["entries"]
        assert [x["reason"] for x in new] == ["of old"] * 6 + ["fast", "of old"]
        assert [x for x in new if x["reason"] == "of old"] == [x for x in old if not (x.get("plain") and x == old[6])]


def test_tiles_that_fail_or_differ_are_counted_and_not_chosen(monkeypatch):
    """The first ones say what is right."""

    def kernel(inputs, saved, config, interpret):
        if config.rows == 64:
            raise RuntimeError(f"shared memory: {config.columns} KiB")
        return inputs * (2 if config.rows == 32 else 1) + (jnp.nan if config.rows == 128 else 0)

    monkeypatch.setitem(tune.KERNELS, "forward", kernel)
    monkeypatch.setattr(tune.Entry, "arguments", lambda entry, interpret: (jnp.ones(4), jnp.ones(4)))
    configs = [TileConfig(rows, 16, warps=4, stages=1) for rows in (16, 32, 64, 128, 256)]
    entry = tune.Entry("forward", "float32", 64)
    rows, best = tune.tune(entry, configs, True, [QUICK, QUICK], None)
    assert [row.status for row in rows] == ["measured", "wrong", "raised", "wrong", "measured"]
    assert {row.peer for row in best} == {tune.describe(configs[0]), tune.describe(configs[4])}
    reason = tune.reason_of(entry, best[0], rows)
    assert reason.startswith("fastest of 2 at B=4 T=4096 S=4096 N=9 K=3 H=64 causal float32: ")
    assert "  1 raised: RuntimeError: shared memory: # KiB\n" in tune.report(entry, rows, best)


def test_the_search_starts_from_the_table_and_stays_within_the_registers():
    for direction in tune.KERNELS:
        for dtype in tune.DTYPES:
            for head_dim in (64, 128, 256):
                entry = tune.Entry(direction, dtype, head_dim)
                first, *others = tune.candidates(entry)
                array = jnp.zeros((1, 4096, 1, head_dim), tune.DTYPES[dtype])
                inputs = inputs_of(array, array, array, precision=tile_space.PRECISIONS.get(dtype))
                assert first == tile_config.choose(direction, inputs)
                assert others
                assert all(tile_space.numbers_of_a_thread(entry, config) <= tile_space.MAX_NUMBERS for config in others)
