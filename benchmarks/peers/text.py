"""Text of the language model in examples/, against `generate` of transformers: the same weights, prompt and tokens.

Greedy, float32, one row. The decode speed of both counts from the first new token to the last.
"""

import functools
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import environment
from benchmarks.candidate import Candidate

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))  # imported where they are used: they need more packages


@dataclass(frozen=True)
class Text:
    """Attributes: model, a GGUF file or a folder, by default SmolLM2-135M."""

    prompt: str = "The capital of France is"
    new_tokens: int = 32
    model: Path | None = None

    def __str__(self) -> str:
        return f"{self.new_tokens} tokens after {self.prompt!r}"

    def small(self) -> "Text":
        return replace(self, new_tokens=8)


@functools.lru_cache(maxsize=1)
def load(problem: Text) -> tuple[Any, list[int]]:
    """Our generator, and the tokens of the prompt for everybody."""
    from checkpoints import load_checkpoint
    from generate import Generator
    from tokens import load_text

    config, params, metadata = load_checkpoint(problem.model)
    return Generator(config, params), load_text(metadata).encode(problem.prompt)


def ours(problem: Text) -> Candidate:
    """Costs seconds a token."""
    from generate import Sampling

    generator, prompt = load(problem)
    run = lambda: generator(prompt, Sampling(problem.new_tokens))
    return Candidate(lambda: [np.asarray(run().tokens)], lambda least: run().decode_seconds / (problem.new_tokens - 1))


class Clock:
    """A streamer that notes when the prompt and each token come."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, tokens: Any) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


def transformers_generate(problem: Text) -> Candidate:
    """Costs seconds a token."""
    import torch
    from checkpoints import default_model
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(environment.usable_cores())
    path = problem.model or default_model()
    where = {"gguf_file": path.name} if path.suffix == ".gguf" else {}
    model: Any = AutoModelForCausalLM.from_pretrained(path.parent if where else path, dtype=torch.float32, **where)
    _, prompt = load(problem)
    tokens = torch.tensor([prompt])
    options = dict(attention_mask=torch.ones_like(tokens), do_sample=False, eos_token_id=None, pad_token_id=0)

    def run() -> tuple[list[np.ndarray], float]:
        clock = Clock()
        text = model.generate(tokens, max_new_tokens=problem.new_tokens, streamer=clock, **options)
        return [text[0, len(prompt) :].numpy()], (clock.times[-1] - clock.times[1]) / (problem.new_tokens - 1)

    return Candidate(lambda: run()[0], lambda least: run()[1])


def reference(problem: Text) -> list[np.ndarray]:
    """The greedy text without a cache: the fixed point of "each token is the best one after those before it".

    Each round puts at least one more token right; it starts from our text, so one round should do.
    """
    generator, prompt = load(problem)
    apply = jax.jit(generator.model.apply)
    (guess,) = ours(problem).outputs()
    while True:
        logits = apply({"params": generator.params}, jnp.array([[*prompt, *guess[:-1]]]))
        best = np.asarray(jnp.argmax(logits[0, len(prompt) - 1 :], axis=-1))
        if np.array_equal(best, guess):
            return [best]
        guess = best


PEERS = {"ours": ours, "transformers": transformers_generate}
