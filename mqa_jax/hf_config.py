"""The fields of a `config.json`. They note who reads them: what concerns attention and nobody reads is refused."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

CONCERNS_ATTENTION = re.compile(
    r"attn|attention|rope|rotary|sliding|window|alibi|causal|qkv|qk_|kv|query|quant|compression|softcap|^bias$|use_bias"
    r"|layer_types|position_embedding_type|heads?$|head_dim|head_size|n_head|is_encoder_decoder|prefix_lm|no_bias"
)
# How attention is computed or what else is returned, not what comes out. Softmax is float32 here in any case.
HARMLESS = {
    "_attn_implementation",
    "_attn_implementation_autoset",
    "_attn_implementation_internal",
    "_flash_attn_2_enabled",
    "attn_implementation",
    "attention_softmax_in_fp32",
    "max_window_layers",  # says something where a family reads it
    "output_attentions",
    "pre_allocate_kv_cache",
    "scale_attention_softmax_in_fp32",
    "use_flash_attn",
    "use_flash_attention",
}
# Values of fields that no family here reads, with which they change nothing. None never does.
NEUTRAL: Mapping[str, Any] = {
    "attention_bias": False,
    "attention_dropout": 0,
    "attn_pdrop": 0,
    "bias": False,
    "is_causal": True,
    "is_encoder_decoder": False,
    "partial_rotary_factor": 1,
    "qk_layernorm": False,
    "qkv_bias": False,
    "quantization_config": {},
    "rope_interleaved": False,
    "use_bias": False,
    "use_mrope": False,
    "use_qk_norm": False,
    "use_sliding_window": False,
}


class Fields(Mapping[str, Any]):
    """A config, and which of its fields have been read.

    Args:
      config: what is in `config.json`.
      aliases: other names for fields, as transformers' `attribute_map`.
    """

    def __init__(self, config: Mapping[str, Any], aliases: Mapping[str, str] | None = None):
        aliases = aliases or {}
        self._values = {name: value for name, value in config.items() if name not in aliases}
        for alias, name in aliases.items():
            if config.get(alias) is not None and self._values.setdefault(name, config[alias]) != config[alias]:
                raise ValueError(f"These are one field: {name}={config[name]!r}, {alias}={config[alias]!r}.")
        self._read: set[str] = set()

    def __getitem__(self, name: str) -> Any:
        self._read.add(name)
        return self._values[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def unread(self, *, harmless: frozenset[str], neutral: Mapping[str, Any]) -> dict[str, Any]:
        """What concerns attention by its name, has been read by nobody, and may change something.

        Args:
          harmless: fields of which no value does.
          neutral: values of fields that do not.
        """
        neutral = {**NEUTRAL, **neutral}
        known = self._read | HARMLESS | harmless
        suspects = {
            name: x for name, x in self._values.items() if CONCERNS_ATTENTION.search(name) and name not in known
        }
        return {
            name: value
            for name, value in sorted(suspects.items())
            if value is not None and not (name in neutral and value == neutral[name])
        }
