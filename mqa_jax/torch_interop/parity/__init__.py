"""Compares a Flax module with the PyTorch layer that it was converted from: outputs, gradients, cached decoding.

Both are also compared with the torch layer in float64, which shows the rounding error of each. `python -m
mqa_jax.parity` does this for the layers of a checkpoint.
"""

from mqa_jax.torch_interop.parity.command import main as main
from mqa_jax.torch_interop.parity.comparison import TOLERANCES as TOLERANCES
from mqa_jax.torch_interop.parity.comparison import compare as compare
from mqa_jax.torch_interop.parity.comparison import tolerance_of as tolerance_of
from mqa_jax.torch_interop.parity.report import Difference as Difference
from mqa_jax.torch_interop.parity.report import Report as Report
