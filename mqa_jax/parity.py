"""`python -m mqa_jax.parity`, and a shorter import path for the names of `mqa_jax.torch_interop.parity`."""

from mqa_jax.torch_interop.parity import Difference as Difference
from mqa_jax.torch_interop.parity import Report as Report
from mqa_jax.torch_interop.parity import compare as compare
from mqa_jax.torch_interop.parity import main as main

if __name__ == "__main__":
    main()
