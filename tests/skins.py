"""The modules of both APIs behind the calls of one, so that every test of modules runs on either.

`Module` has the constructor, `init`, `apply` and `clone` of a linen module and computes with one of `mqa_jax.nnx`: it
puts `variables` into a new module, calls it, and takes the cache out of it. The fixture `skin` (in `conftest.py`) puts
it in place of `mqa_jax.GroupedQueryAttention` and the other modules.
"""

import contextlib
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import mqa_jax
from mqa_jax import nnx as mqa_nnx
from mqa_jax.cache import layout
from mqa_jax.layer.flash import FlashMHASettings

KINDS = "GroupedQueryAttention", "MultiQueryAttention", "MultiHeadAttention", "Attention", "FlashAttention", "FlashMHA"
FIELDS: dict[type, type] = {mqa_nnx.FlashMHA: FlashMHASettings}
HAS_MODES = hasattr(nnx, "set_graph_updates")  # from Flax 0.12.6 on; views from 0.12.4 on
needs_modes = pytest.mark.skipif(not HAS_MODES, reason="Flax before 0.12.6 has neither nnx.view nor tree mode")
SKINS = ("linen", "nnx", "nnx, tree mode") if HAS_MODES else ("linen", "nnx")


@contextlib.contextmanager
def mode(tree: bool):
    """Tree mode as Flax will have it by default."""
    with contextlib.ExitStack() as stack:
        if HAS_MODES:
            stack.enter_context(nnx.set_graph_mode(not tree))
            stack.enter_context(nnx.set_graph_updates(not tree))
        yield


class Module:
    """Hashable by what it was made with, as linen's, so that it may be a static argument."""

    kind: type
    tree: bool

    def __init__(self, *arguments: Any, **settings: Any):
        names = [field.name for field in dataclasses.fields(FIELDS.get(self.kind, self.kind))]
        self.settings = {**dict(zip(names, arguments)), **settings}
        self._key = type(self), tuple((name, str(x)) for name, x in sorted(self.settings.items()))
        with mode(self.tree):
            self.model = self._new()

    def __hash__(self) -> int:
        return hash(self._key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Module) and self._key == other._key

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["model"], name)

    def _new(self, **more: Any) -> Any:
        with jax.ensure_compile_time_eval():
            return self.kind(**self.settings, **more, rngs=nnx.Rngs(0))

    @functools.cache  # noqa: B019
    def _for(self, key: int | None, value: int | None, has_keys: bool) -> Any:
        """A module for inputs of these widths."""
        if issubclass(self.kind, mqa_nnx.FlashAttention):
            return self.model
        more = {} if has_keys else {"key_value_projections": False}
        return self._new(in_kv_features=key, in_v_features=value, **more)

    def clone(self, **changes: Any) -> "Module":
        return type(self)(**{**self.settings, **changes})

    def init(self, rngs: Any, *arguments: Any, **options: Any) -> dict[str, Any]:
        return self.init_with_output(rngs, *arguments, **options)[1]

    def init_with_output(self, rngs: Any, *arguments: Any, **options: Any) -> tuple[Any, dict[str, Any]]:
        width = lambda name: None if options.get(name) is None else jnp.shape(options[name])[-1]
        with mode(self.tree):
            model = self._for(width("inputs_k"), width("inputs_v"), options.get("prev_layer_key_value") is None)
            params = mqa_nnx.to_linen(model)
        rngs = rngs if isinstance(rngs, dict) else {"dropout": rngs}
        out = self.apply({"params": params}, *arguments, rngs=rngs, **options)
        return out, {"params": params} if params else {}

    def apply(self, variables: Any, *arguments: Any, mutable: Any = (), rngs: Any = None, **options: Any) -> Any:
        params, cache = variables.get("params", {}), variables.get("cache", {})
        with mode(self.tree):
            width = lambda name: params[name]["kernel"].shape[0] if name in params else None
            model = nnx.clone(self._for(width("key"), width("value"), not params or "key" in params))
            if params:
                mqa_nnx.to_nnx(model, params)
            if cache:
                model._hold_cache(_variables(cache))
            dropout = {} if not rngs or "dropout" not in rngs else {"rngs": nnx.Rngs(dropout=rngs["dropout"])}
            out = model(*arguments, **options, **dropout)
            new = nnx.to_pure_dict(nnx.state(model, nnx.Cache))
        if not mutable:
            return out
        if layout.OTHER_CALLS in new:
            new[layout.OTHER_CALLS] = tuple(new[layout.OTHER_CALLS].values())
        return out, {"cache": new} if new else {}

    def init_cache(self, batch: Any, max_length: Any, dtype: Any = None) -> dict[str, Any]:
        with mode(self.tree):
            model = nnx.clone(self.model)
            model.init_cache(batch, max_length, dtype)
            return nnx.to_pure_dict(nnx.state(model, nnx.Cache))


def _variables(cache: Any) -> dict[str, Any]:
    """As a module holds them."""
    others = tuple({name: nnx.Cache(x) for name, x in other.items()} for other in cache.get(layout.OTHER_CALLS, ()))
    own = {name: nnx.Cache(jnp.asarray(x)) for name, x in cache.items() if name != layout.OTHER_CALLS}
    return {**own, layout.OTHER_CALLS: others}


def put_on(skin: str, monkeypatch: Any) -> None:
    """Replaces the linen modules in `mqa_jax` by those of this skin."""
    if skin == "linen":
        return
    tree = skin.endswith("tree mode")
    for name in KINDS:
        made = type(name, (Module,), dict(kind=getattr(mqa_nnx, name), tree=tree))
        monkeypatch.setattr(mqa_jax, name, made)
    of_linen = mqa_jax.init_cache

    def init_cache(model: Any, batch: int, max_length: int, *inputs: Any, dtype: Any = None, **options: Any) -> Any:
        if isinstance(model, Module):
            return model.init_cache(batch, max_length, dtype)
        return of_linen(model, batch, max_length, *inputs, dtype=dtype, **options)

    monkeypatch.setattr(mqa_jax, "init_cache", init_cache)
