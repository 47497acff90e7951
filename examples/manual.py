"""Python's own manual, `pydoc_data.topics`, as bytes to train on; the end of each topic is held out."""

import zlib
from pydoc_data.topics import topics
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, UInt8

HELD_OUT = 0.07  # of each topic


class Text(NamedTuple):
    """Bytes, as tokens."""

    train: UInt8[Array, " bytes"]
    held_out: UInt8[Array, " bytes"]

    @property
    def checksum(self) -> int:
        return zlib.crc32(np.asarray(self.train).tobytes())


def load_text() -> Text:
    train, held_out = [], []
    for name in sorted(topics):
        cut = round(len(topics[name]) * (1 - HELD_OUT))
        train.append(topics[name][:cut])
        held_out.append(topics[name][cut:])
    encode = lambda parts: jnp.asarray(np.frombuffer("\n\n".join(parts).encode(), np.uint8))
    return Text(encode(train), encode(held_out))
