"""Parameters of `llama.Llama` from the tensors of a file, however they are called there: all, and no others."""

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
    """A model and what its tokens mean; `metadata` is what `tokens.load_text` reads."""

    config: LlamaConfig
    params: Params
    metadata: dict[str, Any]


class Names(NamedTuple):
    """How a file calls the tensors of a Llama; `{}` is the number of the layer."""

    layer: str
    attention: dict[str, str]  # ours in `torch_interop`'s layout "llama" -> theirs
    mlp: dict[str, str]
    norms: dict[str, str]
    embed: str
    norm: str
    lm_head: str

    def within(self, prefix: str) -> "Names":
        """Of the model without its head, which is called so in the one with a head."""
        return self._replace(layer=prefix + self.layer, embed=prefix + self.embed, norm=prefix + self.norm)

    def all(self, config: LlamaConfig) -> Iterator[str]:
        """The names of all tensors that there have to be."""
        yield from (self.embed, self.norm, *(() if config.tied_embeddings else (self.lm_head,)))
        out_bias = config.attention_bias if config.attention_out_bias is None else config.attention_out_bias
        biases = dict.fromkeys(self.attention, config.attention_bias) | {"o_proj": out_bias}
        for prefix in (self.layer.format(i) for i in range(config.layers)):
            for ours, theirs in self.attention.items():
                yield from (f"{prefix}{theirs}.{part}" for part in ("weight", "bias")[: 1 + biases[ours]])
            for theirs in self.mlp.values():
                yield from (f"{prefix}{theirs}.{part}" for part in ("weight", "bias")[: 1 + config.mlp_bias])
            yield from (f"{prefix}{theirs}.weight" for theirs in self.norms.values())


class Source(NamedTuple):
    """Where tensors come from: a file or folder, the names of what is in it, one of them, and a layer's attention."""

    place: str
    present: set[str]
    read: Callable[[str], np.ndarray]  # float32, `[out, in]`
    attention: Callable[[int], Params]


def read_params(config: LlamaConfig, names: Names, source: Source) -> Params:
    """Parameters of `Llama`, tensor by tensor, with a progress bar."""
    check_names(config, names, source)
    read = source.read
    params: Params = {"embed": {"embedding": read(names.embed)}, "norm": {"scale": read(names.norm)}}
    if not config.tied_embeddings:
        params["lm_head"] = {"kernel": read(names.lm_head).T}
    for i in tqdm(range(config.layers), desc="loading", unit="layer", leave=False):
        prefix = names.layer.format(i)
        params[f"layer_{i}"] = {
            "attention": source.attention(i),
            "mlp": _mlp(config, {name: f"{prefix}{theirs}" for name, theirs in names.mlp.items()}, read),
            **{ours: {"scale": read(f"{prefix}{theirs}.weight")} for ours, theirs in names.norms.items()},
        }
    check_shapes(config, params, source.place)
    return params


def _mlp(config: LlamaConfig, names: dict[str, str], read: Callable[[str], np.ndarray]) -> Params:
    """Gate and up become one product."""
    joined = lambda part: np.concatenate([read(f"{names[name]}.{part}") for name in ("gate", "up")])
    params: Params = {"gate_up": {"kernel": joined("weight").T}, "down": {"kernel": read(f"{names['down']}.weight").T}}
    if config.mlp_bias:
        params["gate_up"]["bias"], params["down"]["bias"] = joined("bias"), read(f"{names['down']}.bias")
    return params


def check_names(config: LlamaConfig, names: Names, source: Source) -> None:
    """No tensor is missing, and none is left over."""
    wanted = dict.fromkeys(names.all(config))
    missing = [name for name in wanted if name not in source.present]
    if missing:
        head = f" Without {names.lm_head} embeddings have to be tied." if names.lm_head in missing else ""
        raise ValueError(
            f"Tensors are missing in {source.place!r}: {_some(missing)}. It has {_some(sorted(source.present))}.{head}"
        )
    unused = sorted(source.present - wanted.keys())
    if unused:
        raise NotImplementedError(f"Tensors that this model has no use for, in {source.place!r}: {_some(unused)}.")


def _some(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def check_shapes(config: LlamaConfig, params: Params, place: str) -> None:
    """Flax ignores parameters that a model does not ask for, so they are compared with those that it makes itself."""
    one = jax.eval_shape(Llama(replace(config, layers=1)).init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))[
        "params"
    ]
    layer = one.pop("layer_0")
    expected = _shapes({**one, **{f"layer_{i}": layer for i in range(config.layers)}})
    actual = _shapes(params)
    wrong = [name for name in sorted({*expected, *actual}) if expected.get(name) != actual.get(name)]
    if wrong:
        raise ValueError(
            f"The settings are not those of the tensors, in {place!r}: {_some(wrong)}; the first is "
            f"{actual.get(wrong[0])}, by the settings {expected.get(wrong[0])}."
        )


def _shapes(params: Params) -> dict[str, tuple[int, ...]]:
    leaves, _ = jax.tree_util.tree_flatten_with_path(params)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): x.shape for path, x in leaves}
