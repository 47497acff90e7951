"""The attention layers of a Hugging Face `config.json`: the Flax module, and the names of the weights.

Every field that may concern attention and that is not read is an error (`mqa_jax.torch_interop.hugging_face.config`).
"""

from mqa_jax.linen import GroupedQueryAttention
from mqa_jax.torch_interop.hugging_face.config import Fields
from mqa_jax.torch_interop.hugging_face.families import FAMILIES, Config, Family
from mqa_jax.torch_interop.hugging_face.rope import rope_of as rope_of


def attention_of(config: Config, layer: int = 0) -> tuple[GroupedQueryAttention, Family]:
    """The Flax module for a layer of a model, and its family.

    Dropout is only that of the attention weights, without GPTBigCode's and BERT's dropout of the layer's output.

    Args:
      config: the contents of `config.json`, or `transformers.PretrainedConfig.to_dict()`.
      layer: its number; some models have windows only in some of their layers.

    Raises:
      NotImplementedError: the model's type, or the value of a field, is not supported.
      ValueError: a field is missing, or there is no such layer.
    """
    family, model_type = _family_of(config), config["model_type"]
    fields = Fields(config, family.aliases)
    count = fields.get(family.layers)
    if not 0 <= layer < (layer + 1 if count is None else count):
        raise ValueError(f"Layers are numbered from 0 to {family.layers} - 1: layer={layer}, {family.layers}={count}.")
    if config.get("quantization_config"):
        method = config["quantization_config"].get("quant_method")
        raise NotImplementedError(
            f"Quantised weights are not read: quantization_config has quant_method={method!r}. Save the model with "
            "weights in a float dtype, by transformers' model.dequantize() and model.save_pretrained."
        )
    try:
        settings = family.settings(fields, layer)
    except KeyError as error:
        raise ValueError(
            f"A required field of model_type={model_type!r} is missing: {error}. Add it to the config."
        ) from None
    unread = fields.unread(harmless=family.harmless, neutral=family.neutral)
    if unread:
        listed = ", ".join(f"{name}={value!r}" for name, value in unread.items())
        raise NotImplementedError(
            f"These fields may change what attention computes, and are not read here for model_type={model_type!r}: "
            f"{listed}. Set up GroupedQueryAttention yourself, and convert the weights with "
            f"torch_interop.from_state_dict(..., layout={family.layout!r}); or remove fields that have no effect."
        )
    return GroupedQueryAttention(**{"use_bias": False, **settings}), family


def layers_of(config: Config) -> int:
    """The number of layers of a model."""
    family = _family_of(config)
    count = Fields(config, family.aliases).get(family.layers)
    if count is None:
        raise ValueError(f"The config does not have the number of layers: {family.layers}=None.")
    return count


def _family_of(config: Config) -> Family:
    model_type = config.get("model_type")
    if model_type not in FAMILIES:
        raise NotImplementedError(f"No known attention layer: model_type={model_type!r}, known are {sorted(FAMILIES)}.")
    return FAMILIES[model_type]
