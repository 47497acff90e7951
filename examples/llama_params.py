"""Parameters of `llama.Llama` from the tensors of a file; a missing tensor and an unused one are errors."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from llama import Llama, LlamaConfig
from tqdm import tqdm

Params = dict[str, Any]


class Checkpoint(NamedTuple):
    """A model and the metadata from which `tokens.load_text` makes its tokenizer."""

    config: LlamaConfig
    params: Params
    metadata: dict[str, Any]


class Names(NamedTuple):
    """The names of a Llama's tensors in a file; `{}` is the number of the layer."""

    layer: str
    attention: dict[str, str]  # from the names of `torch_interop`'s layout "llama" to those of the file
    mlp: dict[str, str]
    norms: dict[str, str]
    embed: str
    norm: str
    lm_head: str

    def within(self, prefix: str) -> "Names":
        """The names in a model with a head, where `prefix` is the name of the model without it."""
        return self._replace(layer=prefix + self.layer, embed=prefix + self.embed, norm=prefix + self.norm)

    def all(self, config: LlamaConfig) -> Iterator[str]:
        """The names of all required tensors."""
        yield from (self.embed, self.norm, *(() if config.tied_embeddings else (self.lm_head,)))
        out_bias = config.attention_bias if config.attention_out_bias is None else config.attention_out_bias
        biases = dict.fromkeys(self.attention, config.attention_bias) | {"o_proj": out_bias}
        for prefix in (self.layer.format(i) for i in range(config.layers)):
            for projection, name in self.attention.items():
                yield from (f"{prefix}{name}.{part}" for part in ("weight", "bias")[: 1 + biases[projection]])
            for name in self.mlp.values():
                yield from (f"{prefix}{name}.{part}" for part in ("weight", "bias")[: 1 + config.mlp_bias])
            yield from (f"{prefix}{name}.weight" for name in self.norms.values())


class Source(NamedTuple):
    """A file or folder, the names of its tensors, and functions that read a tensor and a layer's attention."""

    place: str
    present: set[str]
    read: Callable[[str], np.ndarray]  # float32, `[out, in]`
    attention: Callable[[int], Params]


def read_params(config: LlamaConfig, names: Names, source: Source) -> Params:
    """Reads the parameters of `Llama`, with a progress bar."""
    check_names(config, names, source)
    read = source.read
    params: Params = {"embed": {"embedding": read(names.embed)}, "norm": {"scale": read(names.norm)}}
    if not config.tied_embeddings:
        params["lm_head"] = {"kernel": read(names.lm_head).T}
    for i in tqdm(range(config.layers), desc="loading", unit="layer", leave=False):
        prefix = names.layer.format(i)
        params[f"layer_{i}"] = {
            "attention": source.attention(i),
            "mlp": _mlp(config, {part: f"{prefix}{name}" for part, name in names.mlp.items()}, read),
            **{norm: {"scale": read(f"{prefix}{name}.weight")} for norm, name in names.norms.items()},
        }
    check_shapes(config, params, source.place)
    return params


def _mlp(config: LlamaConfig, names: dict[str, str], read: Callable[[str], np.ndarray]) -> Params:
    """The parameters of the MLP; gate and up are joined into one kernel."""
    joined = lambda part: np.concatenate([read(f"{names[name]}.{part}") for name in ("gate", "up")])
    params: Params = {"gate_up": {"kernel": joined("weight").T}, "down": {"kernel": read(f"{names['down']}.weight").T}}
    if config.mlp_bias:
        params["gate_up"]["bias"], params["down"]["bias"] = joined("bias"), read(f"{names['down']}.bias")
    return params


def check_names(config: LlamaConfig, names: Names, source: Source) -> None:
    """Raises if a tensor is missing or unused."""
    required = dict.fromkeys(names.all(config))
    missing = [name for name in required if name not in source.present]
    if missing:
        head = f" Without {names.lm_head} the embeddings must be tied." if names.lm_head in missing else ""
        raise ValueError(
            f"Tensors are missing in {source.place!r}: {_some(missing)}. It has {_some(sorted(source.present))}.{head}"
        )
    unused = sorted(source.present - required.keys())
    if unused:
        raise NotImplementedError(f"Tensors that this model does not use, in {source.place!r}: {_some(unused)}.")


def _some(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def check_shapes(config: LlamaConfig, params: Params, place: str) -> None:
    """Compares with the parameters that the model initialises, because Flax ignores those that it does not use."""
    one = jax.eval_shape(Llama(replace(config, layers=1)).init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))[
        "params"
    ]
    layer = one.pop("layer_0")
    expected = _shapes({**one, **{f"layer_{i}": layer for i in range(config.layers)}})
    actual = _shapes(params)
    wrong = [name for name in sorted({*expected, *actual}) if expected.get(name) != actual.get(name)]
    if wrong:
        raise ValueError(
            f"The shapes of tensors do not fit the settings, in {place!r}: {_some(wrong)}; the first is "
            f"{actual.get(wrong[0])}, by the settings {expected.get(wrong[0])}."
        )


def _shapes(params: Params) -> dict[str, tuple[int, ...]]:
    leaves, _ = jax.tree_util.tree_flatten_with_path(params)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): x.shape for path, x in leaves}
