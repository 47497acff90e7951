"""The GPU that a program is traced for: the one of this machine, or an assumed one, to compile for another machine."""

import contextlib
import functools
from collections.abc import Iterator

import jax

ARCHITECTURES = ("sm80", "sm89", "sm90", "sm100")  # A100; L40S, RTX 40; H100, H200; B200

_assumed = jax.make_user_context(None)  # an architecture; part of jit's cache key


@contextlib.contextmanager
def assuming(architecture: str) -> Iterator[None]:
    """Traces for this architecture instead of the GPU of this machine, to compile for another machine."""
    if architecture not in ARCHITECTURES:
        raise ValueError(f"architecture must be one of {ARCHITECTURES}: architecture={architecture!r}.")
    with _assumed(architecture):
        yield


def is_assumed() -> bool:
    return _assumed.value is not None


def architecture_at_hand() -> str:
    """The assumed one, or that of the first GPU, or else the one with the least memory, whose tiles fit all others."""
    return _assumed.value or nearest_architecture(capability_at_hand() or 89)


def capability() -> int | None:
    """Compute capability x 10 of the GPU that is compiled for: the assumed one, or that of this machine."""
    return capability_at_hand() if _assumed.value is None else int(_assumed.value[2:])


@functools.cache
def capability_at_hand() -> int | None:
    """Compute capability x 10 of the first NVIDIA GPU; None without one."""
    if jax.default_backend() != "gpu":
        return None
    capability = getattr(jax.local_devices()[0], "compute_capability", "")
    return round(10 * float(capability)) if capability.replace(".", "").isdigit() else None


def nearest_architecture(capability: int) -> str:
    """The newest in the table that is not newer and has no more shared memory: RTX 30 (8.6), RTX 50 (12.0) use sm89."""
    if capability == 86 or capability >= 120:
        return "sm89"
    return [name for name in ARCHITECTURES if int(name[2:]) <= capability][-1]
