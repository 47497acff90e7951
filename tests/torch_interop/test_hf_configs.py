"""What the fields of a Hugging Face config say of attention, and which are refused."""

import re
from typing import Any

import numpy as np
import pytest

from mqa_jax import torch_interop
from mqa_jax.torch_interop.hugging_face import attention as hf_attention

LLAMA: dict[str, Any] = dict(hidden_size=24, num_attention_heads=6, num_hidden_layers=2)
BIGCODE: dict[str, Any] = dict(n_embd=24, n_head=6)
FIELDS: dict[str, tuple[dict[str, Any], type, str]] = {
    "fp8": (
        LLAMA | dict(model_type="llama", quantization_config=dict(quant_method="fp8")),
        NotImplementedError,
        "'fp8'",
    ),
    "window of Mistral": (
        LLAMA | dict(model_type="mistral", use_sliding_window=False),
        NotImplementedError,
        "sliding_window=4096, use_sliding_window=False",
    ),
    "kinds of layers": (
        LLAMA | dict(model_type="llama", layer_types=["sliding_attention"] * 2, sliding_window=3),
        NotImplementedError,
        r"ignores layer_types of model_type='llama': layer_types\[0\]='sliding_attention', sliding_window=3",
    ),
    "a kind that is not known": (
        LLAMA | dict(model_type="qwen2", layer_types=["full_attention", "chunked_attention"][::-1]),
        NotImplementedError,
        r"of 'full_attention' or 'sliding_attention': layer=0, layer_types=\['chunked_attention'",
    ),
    "unused window": (
        LLAMA | dict(model_type="qwen2", layer_types=["sliding_attention"] * 2),
        NotImplementedError,
        "sliding_window=4096, use_sliding_window=False",
    ),
    "no window": (
        LLAMA | dict(model_type="mistral", sliding_window=0),
        ValueError,
        "at least one key: sliding_window=0",
    ),
    "groups of Falcon": (
        LLAMA | dict(model_type="falcon", num_kv_heads=2, multi_query=False),
        NotImplementedError,
        "num_kv_heads=2, num_attention_heads=6, multi_query=False",
    ),
    "two names": (BIGCODE | dict(model_type="gpt_bigcode", hidden_size=8), ValueError, "n_embd=24, hidden_size=8"),
    "bigcode's groups": (
        BIGCODE | dict(model_type="gpt_bigcode", num_key_value_heads=2),
        NotImplementedError,
        "num_key_value_heads=2",
    ),
    "missing": (dict(model_type="llama", num_attention_heads=6), ValueError, "is missing: 'hidden_size'"),
    "two ropes": (
        LLAMA | dict(model_type="llama", rope_parameters=dict(rope_theta=3), rope_scaling=dict(rope_theta=4)),
        ValueError,
        "one field: rope_parameters=",
    ),
    "rope of kinds of layers": (
        LLAMA | dict(model_type="llama", rope_parameters=dict(full_attention=dict(rope_theta=3))),
        NotImplementedError,
        "does not support {'full_attention'",
    ),
    "rope factor": (
        LLAMA | dict(model_type="llama", rope_scaling=dict(type="linear")),
        ValueError,
        r"rope_type='linear' needs \['factor'\]",
    ),
}
for kind in ("dynamic", "longrope", "mrope", "proportional"):
    FIELDS[kind] = (
        LLAMA | dict(model_type="llama", rope_scaling=dict(rope_type=kind)),
        NotImplementedError,
        f"rope_type='{kind}'",
    )
UNREAD: list[tuple[str, dict[str, Any]]] = [
    ("llama", dict(attn_logit_softcapping=50.0)),
    ("llama", dict(query_pre_attn_scalar=64)),
    ("llama", dict(attention_multiplier=0.1)),
    ("llama", dict(no_rope_layers=[1, 0])),
    ("llama", dict(partial_rotary_factor=0.5)),
    ("llama", dict(sliding_window=8)),
    ("llama", dict(use_sliding_window=True)),
    ("llama", dict(clip_qkv=8.0)),
    ("llama", dict(is_causal=False)),
    ("llama", dict(qk_layernorm=True)),
    ("llama", dict(use_qk_norm=True)),
    ("llama", dict(rope_interleaved=True)),
    ("llama", dict(is_encoder_decoder=True)),
    ("llama", dict(attention_chunk_size=8)),
    ("llama", dict(alibi=True)),
    ("mistral", dict(attention_bias=True)),
    ("qwen2", dict(attention_bias=False) | dict(use_mrope=True)),
    ("falcon", dict(rotary_pct=0.5)),
    ("mpt", dict(no_bias=False)),
    ("bert", dict(position_embedding_type="relative_key")),
    ("bert", dict(is_causal=True)),
    ("bert", dict(rope_theta=1e4)),
]


@pytest.mark.parametrize("name", FIELDS)
def test_fields_that_are_refused(name):
    config, error, message = FIELDS[name]
    with pytest.raises(error, match=message):
        hf_attention.attention_of(config)


@pytest.mark.parametrize(("model_type", "fields"), UNREAD, ids=str)
def test_fields_that_nobody_reads(model_type, fields):
    """The message has the field and its value; null never changes anything."""
    sizes = dict(d_model=24, n_heads=6) if model_type == "mpt" else LLAMA
    sizes = sizes | ({"num_key_value_heads": 2} if model_type in ("mistral", "qwen2") else {})
    hf_attention.attention_of(sizes | dict(model_type=model_type) | dict.fromkeys(fields))
    *_, (name, value) = fields.items()
    with pytest.raises(NotImplementedError, match=rf"{name}={re.escape(repr(value))}.*GroupedQueryAttention yourself"):
        hf_attention.attention_of(sizes | dict(model_type=model_type) | fields)


def test_numbers_of_layers():
    for layer in (-1, 2):
        with pytest.raises(ValueError, match=rf"from 0 to num_hidden_layers - 1: layer={layer}, num_hidden_layers=2"):
            hf_attention.attention_of(LLAMA | dict(model_type="llama"), layer)
    assert hf_attention.layers_of(BIGCODE | dict(model_type="gpt_bigcode", num_hidden_layers=3)) == 3


@pytest.mark.torch
@pytest.mark.parametrize("model_type", hf_attention.FAMILIES)
def test_fields_that_a_file_leaves_out(model_type):
    """Their defaults are those of transformers."""
    import transformers

    full = transformers.AutoConfig.for_model(model_type).to_dict()
    sizes: dict[str, Any] = {
        name: full[name] for name in ("model_type", "hidden_size", "n_embd", "d_model") if name in full
    }
    sizes |= {name: full[name] for name in ("num_attention_heads", "n_head", "n_heads") if name in full}
    assert hf_attention.attention_of(sizes)[0] == hf_attention.attention_of(full)[0]


YARN = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=16)
LLAMA3 = dict(rope_type="llama3", factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0)
VALUES: list[tuple[str, dict[str, Any]]] = [
    ("llama", dict(attention_bias=True, head_dim=10, rope_theta=300.0)),
    ("llama", dict(rope_scaling=dict(type="linear", factor=3.0))),
    ("llama", dict(rope_scaling=LLAMA3 | dict(original_max_position_embeddings=16))),
    ("llama", dict(rope_scaling=LLAMA3, max_position_embeddings=32)),
    ("llama", dict(rope_scaling=YARN)),
    ("llama", dict(rope_scaling=YARN | dict(beta_fast=8, beta_slow=2, attention_factor=1.5, truncate=False))),
    ("mistral", dict(sliding_window=None)),
    ("mistral", dict(sliding_window=3, rope_scaling=YARN)),
    ("qwen2", dict(use_sliding_window=True, sliding_window=3, layer_types=["full_attention", "sliding_attention"])),
    ("falcon", dict(bias=True, rope_theta=300.0, rope_scaling=dict(type="linear", factor=2.0))),
    ("gpt_bigcode", dict(scale_attn_weights=False, multi_query=False)),
    ("bert", dict(is_decoder=True)),
    ("mpt", dict(attn_config=dict(clip_qkv=0.5, softmax_scale=0.2))),
]


@pytest.mark.torch
@pytest.mark.parametrize(("model_type", "fields"), VALUES, ids=str)
def test_values_of_fields(model_type, fields):
    """Outputs of the last layer of a live model, from what the model gives it: also its masks and positions."""
    import torch
    import transformers
    from hf_layers import CONFIGS

    torch.manual_seed(0)
    name = next(name for name, config in CONFIGS.items() if config["model_type"] == model_type)
    layers = {"gpt_bigcode": "n_layer", "mpt": "n_layers"}.get(model_type, "num_hidden_layers")
    settings = CONFIGS[name] | {layers: 2} | dict(vocab_size=31) | fields
    config: Any = transformers.AutoConfig.for_model(**settings)
    model: Any = transformers.AutoModel.from_config(config, attn_implementation="eager").eval()
    module, family = hf_attention.attention_of(settings, 1)
    assert module == hf_attention.attention_of(config.to_dict(), 1)[0]
    layer = model.get_submodule(family.prefix.format(1).rstrip(".").removeprefix("model.").removeprefix("transformer."))
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    seen: dict[str, Any] = {}
    get = lambda arguments, options: arguments[0] if arguments else options["hidden_states"]
    layer.register_forward_pre_hook(lambda _, *given: seen.update(x=get(*given)), with_kwargs=True)
    out = layer.output.dense if model_type == "bert" else layer
    out.register_forward_hook(lambda _, given, result: seen.update(out=result))
    with torch.no_grad():
        model(torch.arange(11)[None] % 7)
    expected = seen["out"][0] if isinstance(seen["out"], tuple) else seen["out"]
    options: dict[str, Any] = dict(heads=module.heads, kv_heads=module.kv_heads, layout=family.layout)
    params = torch_interop.from_state_dict(layer.state_dict(), **options)
    ours = module.apply({"params": params}, seen["x"].numpy(), deterministic=True)[0]
    np.testing.assert_allclose(ours, expected.numpy(), atol=1e-5)
