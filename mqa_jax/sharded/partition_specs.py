"""How the parameters and caches of attention modules are cut over a mesh, found by their names and shapes."""

from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import PartitionSpec

from mqa_jax.cache import layout

AxisNames = str | tuple[str, ...] | None
Path = tuple[Any, ...]
Shape = tuple[int, ...]

# The axes of each array in the letters of `mqa_jax.shapes`, without those along which layers are stacked; "N" and "K"
# are N H and K H features in one axis, or H of them where the heads share a norm.
LETTERS = {
    "query/kernel": "dnh",
    "query/bias": "nh",
    "key/kernel": "dkh",
    "key/bias": "kh",
    "value/kernel": "dkh",
    "value/bias": "kh",
    "out/kernel": "nhd",
    "out/bias": "d",
    "q_ln/scale": "N",
    "q_ln/bias": "N",
    "k_ln/scale": "K",
    "k_ln/bias": "K",
    "sinks": "n",
    "bias_k": "kh",
    "bias_v": "kh",
    layout.KEY: "bskh",
    layout.VALUE: "bskh",
    layout.KEY_SCALE: "bsk",
    layout.VALUE_SCALE: "bsk",
    layout.INDEX: "b",
    layout.RING_INDEX: "b",
}
KERNELS = {"query/kernel", "key/kernel", "value/kernel"}
INDICES = {layout.INDEX, layout.RING_INDEX}
WHOLE = ("rngs",)  # what NNX modules hold beside arrays with these letters


def partition_specs(
    variables: Any,
    *,
    batch: AxisNames = None,
    heads: AxisNames = None,
    kv_heads: AxisNames = None,
    embed: AxisNames = None,
    sequence: AxisNames = None,
) -> Any:
    """How mesh axes cut the arrays of this library's attention modules; arrays of anything else are left whole.

    A module is found by the names of its arrays, if their shapes agree: `query` with kernel `[D, N, H]`, `out` with
    `[N, H, D]`, cached keys `[B, S, K, H]`. Layers may be stacked along leading axes, which are not cut (`nn.scan` with
    `variable_axes={"params": 0, "cache": 0}`, `nnx.scan`).

    Args:
      variables: variables of linen, `nnx.state(model)`, or what has their structure, such as gradients and the state of
        an optimizer; of arrays or shapes.
      batch: names of the mesh axes that cut B, of caches: a name, a tuple of them, or None, which leaves it whole.
      heads: of N: `query`, `out`, sinks, the norm of all query heads together.
      kv_heads: of K: `key`, `value`, caches, `bias_k`, `bias_v`, the norm of all key/value heads together. None where
        the mesh axis has more devices than there are key/value heads.
      embed: of D: kernels, and the bias of `out`.
      sequence: of S, of caches of modules with this `sequence_axis`. Ring buffers stay whole, because their slots are
        not in the order of positions.

    Returns:
      The same tree, with a `jax.sharding.PartitionSpec` for each array. JAX checks names and sizes against the mesh.

    Raises:
      ValueError: there is no attention module, or one of them holds an array that it does not know, or is no more than
        three kernels that may as well be those of stacked dense layers.

    Example:
      >>> import jax, jax.numpy as jnp, mqa_jax
      >>> from jax.sharding import PartitionSpec as P
      >>> model = mqa_jax.GroupedQueryAttention(64, 8, kv_heads=2)
      >>> variables = jax.eval_shape(model.init, jax.random.key(0), jnp.ones((1, 5, 64)))
      >>> specs = mqa_jax.partition_specs(variables, heads="model", embed="data")
      >>> specs["params"]["query"]["kernel"] == P("data", "model", None)
      True
      >>> specs["params"]["out"]["kernel"] == P("model", None, "data")
      True
    """
    axes = {"b": batch, "n": heads, "k": kv_heads, "d": embed, "s": sequence}
    leaves, structure = jax.tree.flatten_with_path(variables)
    arrays = {_names(path): tuple(getattr(x, "shape", ())) for path, x in leaves}
    modules = _modules(arrays)
    if not modules:
        raise ValueError(
            "This holds no attention module of mqa_jax, which has a query/kernel [D, N, H] or a cached_key "
            f"[B, S, K, H], and other arrays that agree with it: {[_joined(path) for path in arrays][:4]}. Pass "
            "variables of linen, or nnx.state(model), with layers stacked along leading axes."
        )
    return jax.tree.unflatten(structure, [_spec(path, shape, modules, axes) for path, shape in arrays.items()])


# -- where the modules are --------------------------------------------------------------------------------------------


def _names(path: Path) -> Path:
    """Without the box around an array, such as `nn.Partitioned` or `nnx.Param`."""
    if path and getattr(path[-1], "name", None) == "value":
        path = path[:-1]
    return tuple(getattr(key, "key", getattr(key, "name", getattr(key, "idx", None))) for key in path)


def _joined(path: Path) -> str:
    return "/".join(map(str, path))


def _modules(arrays: Mapping[Path, Shape]) -> dict[Path, dict[str, Any]]:
    """The sizes of each attention module, by its path."""
    found: dict[Path, dict[str, Shape]] = {}
    for path, shape in arrays.items():
        for depth in (1, 2):
            if len(path) >= depth and _joined(path[-depth:]) in LETTERS:
                found.setdefault(path[:-depth], {})[_joined(path[-depth:])] = shape
    sizes = {path: _sizes(path, named) for path, named in found.items()}
    return {path: each for path, each in sizes.items() if each is not None}


def _sizes(path: Path, arrays: Mapping[str, Shape]) -> dict[str, Any] | None:
    """The size of each letter, the axes of stacked layers as "*"; None if these are no arrays of an attention module.

    Plain dense layers of the same names, stacked, have kernels of three axes, too; but they do not agree.
    """
    sizes: dict[str, Any] = {"ring": layout.RING_INDEX in arrays}
    for name, shape in arrays.items():
        stacked = len(shape) - len(LETTERS[name])
        pairs = [*zip(LETTERS[name], shape[max(stacked, 0) :]), ("*", shape[: max(stacked, 0)])]
        if stacked < 0 or any(sizes.setdefault(x, size) != size for x, size in pairs if x not in "dNK"):
            return None
    if "query/kernel" not in arrays:
        return sizes if {layout.KEY, layout.VALUE} <= arrays.keys() and INDICES & arrays.keys() else None
    heads, kv_heads = sizes["n"], sizes.get("k", sizes["n"])
    if heads % kv_heads == 0 and _is_told(path, arrays, heads, kv_heads):
        return sizes
    return None


def _is_told(path: Path, arrays: Mapping[str, Shape], heads: int, kv_heads: int) -> bool:
    """Whether these cannot be kernels [layers, in, out] of stacked dense layers: there are others that agree."""
    if arrays.keys() - KERNELS or heads == 1 or heads != kv_heads:
        return True
    *_, embed, _, features = arrays["query/kernel"]
    if embed == heads * features:
        return True
    if arrays.keys() == KERNELS:
        raise ValueError(
            "These may be kernels [D, N, H] of attention without biases, norms and output projection, or [layers, in, "
            f"out] of dense layers, since D is not N * H: {_joined((*path, 'query/kernel'))}, "
            f"shape={arrays['query/kernel']}. Leave them out and write their specs: of attention PartitionSpec(embed, "
            "heads, None), with kv_heads for key and value; of dense layers PartitionSpec()."
        )
    return False


# -- how they are cut -------------------------------------------------------------------------------------------------


def _spec(
    path: Path, shape: Shape, modules: Mapping[Path, Mapping[str, Any]], axes: Mapping[str, AxisNames]
) -> PartitionSpec:
    owner = next((path[:i] for i in reversed(range(len(path))) if path[:i] in modules), None)
    if owner is None or path[len(owner)] in WHOLE:
        return PartitionSpec()
    name, sizes = _joined(path[len(owner) :]), modules[owner]
    if name not in LETTERS:
        raise ValueError(
            f"An attention module of mqa_jax holds no array of this name: {_joined(path)}, shape={shape}. What a model "
            "adds to it needs a scope, or an attribute, of its own beside the module; where the module is another "
            "library's, pass the rest of the tree."
        )
    stacked = [None] * len(sizes["*"])
    return PartitionSpec(*stacked, *(_axis(x, shape[-1], sizes, axes) for x in LETTERS[name]))


def _axis(letter: str, size: int, sizes: Mapping[str, Any], axes: Mapping[str, AxisNames]) -> AxisNames:
    if letter in "NK":  # of a norm
        heads = sizes.get(letter.lower(), 1)
        return axes[letter.lower()] if heads > 1 and size == heads * sizes["h"] else None
    return None if letter == "s" and sizes["ring"] else axes.get(letter)
