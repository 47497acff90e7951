"""Small attention layers of transformers, by model type."""

from typing import Any

from mqa_jax.torch_interop.hugging_face.attention import FAMILIES

_LLAMA = dict(hidden_size=24, num_attention_heads=6, num_key_value_heads=2, intermediate_size=8)
_FALCON = dict(hidden_size=24, num_attention_heads=6)
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": dict(model_type="llama", **_LLAMA),
    "mistral": dict(model_type="mistral", **_LLAMA, sliding_window=4, head_dim=8),
    "qwen2": dict(model_type="qwen2", **_LLAMA),
    "gpt_bigcode multi-query": dict(model_type="gpt_bigcode", n_embd=24, n_head=6),
    "gpt_bigcode multi-head": dict(model_type="gpt_bigcode", n_embd=24, n_head=6, multi_query=False),
    "falcon 7B": dict(model_type="falcon", **_FALCON),
    "falcon 40B": dict(model_type="falcon", **_FALCON, new_decoder_architecture=True, num_kv_heads=2, bias=True),
    "falcon multi-head": dict(model_type="falcon", **_FALCON, multi_query=False),
    "falcon with ALiBi": dict(model_type="falcon", **_FALCON, multi_query=False, alibi=True),
    "mpt": dict(model_type="mpt", d_model=24, n_heads=6, max_seq_len=32),
    "bert": dict(model_type="bert", hidden_size=24, num_attention_heads=6, intermediate_size=8),
}
_COMMON = dict(vocab_size=9, bos_token_id=0, eos_token_id=0)


def hf_layer(name: str) -> Any:
    """The attention of the first layer, with random weights and biases, in evaluation mode."""
    import torch
    import transformers

    torch.manual_seed(0)
    settings = dict(CONFIGS[name])
    family = FAMILIES[settings["model_type"]]
    config = transformers.AutoConfig.for_model(**settings, **_COMMON)  # type: ignore[arg-type]
    model: Any = transformers.AutoModel.from_config(config, attn_implementation="eager").eval()
    prefix = family.prefix.format(0).rstrip(".")
    path = next(p for p in (prefix, prefix.partition(".")[2]) if any(n == p for n, _ in model.named_modules()))
    layer = model.get_submodule(path)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return layer
