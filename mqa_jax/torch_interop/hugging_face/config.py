"""The fields of a `config.json`, with a record of reads: a field about attention that no code reads is an error."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

CONCERNS_ATTENTION = re.compile(
    r"attn|attention|rope|rotary|sliding|window|alibi|causal|qkv|qk_|kv|query|quant|compression|softcap|^bias$|use_bias"
    r"|layer_types|position_embedding_type|heads?$|head_dim|head_size|n_head|is_encoder_decoder|prefix_lm|no_bias"
)
# Fields that select an implementation or additional results, and do not change the output. Softmax is always float32.
HARMLESS = {
    "_attn_implementation",
    "_attn_implementation_autoset",
    "_attn_implementation_internal",
    "_flash_attn_2_enabled",
    "attn_implementation",
    "attention_softmax_in_fp32",
    "max_window_layers",  # only has a meaning for families that read it
    "output_attentions",
    "pre_allocate_kv_cache",
    "scale_attention_softmax_in_fp32",
    "use_flash_attn",
    "use_flash_attention",
}
# Values with which fields that no family here reads do not change the output. None never changes it.
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
    """A config, and the set of its fields that have been read.

    Args:
      config: the contents of `config.json`.
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
        """Fields whose names concern attention, that have not been read, and that may change the output.

        Args:
          harmless: fields that never change the output.
          neutral: values of fields that do not change the output.
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
