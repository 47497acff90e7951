"""What an attention module is and computes, whichever API of Flax holds its parameters.

`settings` says what can be chosen, `attention_layer` what a call computes from it, `calls` which arguments a call may
have, `cut_sequence` what changes where devices share a sequence, `upstream` what mqa's and zeta's modules call
differently. `mqa_jax.linen` and `mqa_jax.nnx` hold parameters, cache and random keys, and nothing else.
"""
