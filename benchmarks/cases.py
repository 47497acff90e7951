"""The table of what is measured, and against whom: one for every device, with sizes that each can hold."""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from benchmarks import judge
from benchmarks.candidate import Candidate
from benchmarks.model_shapes import SHAPES, ModelShape, shape_of
from benchmarks.peers import jax_attention, layers, text, torch_attention, train_step
from benchmarks.peers.layers import Layer
from benchmarks.peers.text import Text
from benchmarks.peers.train_step import TrainStep
from benchmarks.problems import BOTH, FORWARD, Problem, attention_of

Peers = Mapping[str, Callable[[Any], Candidate]]


@dataclass(frozen=True)
class Case:
    """One problem for several peers.

    Attributes:
      unit: what a cost is shown in, a name in `table.UNITS`.
      peers: name -> how to build it from a problem. "ours" comes first; ratios are to it.
      reference: the outputs that are right.
      direction: whether gradients are computed, too; "" where that is no question.
      checked: the problem on which outputs are compared, if not `problem` itself.
      allowed: by how much each output of a peer, by name, may differ there; if None, by `measure.TOLERANCE`.
    """

    name: str
    unit: str
    problem: Any
    peers: Peers
    reference: Callable[[Any], list[np.ndarray]]
    direction: str = ""
    checked: Any = None
    allowed: Callable[[str, Any], Sequence[float]] | None = None


@dataclass(frozen=True)
class Line:
    """One name of the table.

    Attributes:
      problems: by device, "cpu" or "gpu"; without gradients.
      cases: a problem, and whether it is small, on a device, to what is measured.
      directions: what is asked of the problem: FORWARD, BOTH or "".
    """

    name: str
    problems: Mapping[str, Any]
    case: Callable[["Line", Any, str, bool], Case]
    directions: Sequence[str] = (FORWARD, BOTH)
    with_flex: bool = False

    def problem(self, device: str, quick: bool = False) -> Any:
        return self.problems[device].small() if quick else self.problems[device]

    def cases(self, device: str, quick: bool = False) -> list[Case]:
        problem = self.problem(device, quick)
        problems = [replace(problem, gradients=True) if way == BOTH else problem for way in self.directions]
        found = [self.case(self, problem, device, quick) for problem in problems]
        return [replace(case, direction=way) for case, way in zip(found, self.directions)]


# -- kinds of lines ----------------------------------------------------------------------------------------------------

CHECKED_LENGTH = 512 + 62  # no multiple of any tile, even for cuDNN, and all scores fit


def attention_case(line: Line, problem: Problem, device: str, quick: bool) -> Case:
    """On a CPU outputs are compared on the problem itself; on a GPU, where all its scores may not fit, on a shorter."""
    peers = {**jax_attention.peers_for(problem, device), **torch_attention.peers_for(problem, device, line.with_flex)}
    if device == "cpu":
        return Case(line.name, "ms", problem, peers, judge.exact)
    checked = None if quick else problem.at_length(CHECKED_LENGTH)
    return Case(line.name, "ms", problem, peers, judge.exact, checked=checked, allowed=judge.allowed)


def memory_case(line: Line, problem: Problem, device: str, quick: bool) -> Case:
    """Compiled at its length, and compared on a shorter one."""
    names = ("ours", "jax.nn", "tokamax chunked")
    peers = {name: functools.partial(jax_attention.measured_by_memory, name) for name in names}
    return Case(line.name, "MiB", problem, peers, judge.exact, checked=problem.small())


def layer_case(line: Line, layer: Layer, device: str, quick: bool) -> Case:
    return Case(line.name, "ms", layer, layers.PEERS, layers.exact, allowed=layers.allowed)


def train_case(line: Line, step: TrainStep, device: str, quick: bool) -> Case:
    return Case(line.name, "ms", step, train_step.PEERS, train_step.exact, allowed=train_step.allowed)


def demo_case(line: Line, problem: Text, device: str, quick: bool) -> Case:
    return Case(line.name, "tokens/s", problem, text.PEERS, text.reference)


Sizes = tuple[int, ...]  # batch, queries, and keys if they are more


def attention(
    name: str,
    shape: ModelShape,
    cpu: Sizes | None = None,
    gpu: Sizes | None = None,
    directions: Sequence[str] = (FORWARD, BOTH),
    with_flex: bool = False,
    gpu_dtype: str = "bfloat16",
    case: Callable[[Line, Any, str, bool], Case] = attention_case,
    **options: Any,
) -> Line:
    """A line of attention of one shape. What only continues a cache has no gradients."""
    problems = {}
    if cpu is not None:
        problems["cpu"] = attention_of(shape, *cpu, **options)
    if gpu is not None:
        problems["gpu"] = attention_of(shape, *gpu, **{"dtype": gpu_dtype, **options})
    return Line(name, problems, case, directions, with_flex)


decode = functools.partial(attention, directions=(FORWARD,))
LLAMA, MISTRAL, FALCON = SHAPES["Llama-3-8B"], SHAPES["Mistral-7B"], SHAPES["Falcon-7B"]
MQA, MHA = shape_of(8, 1, 64), shape_of(16, 16, 128)
GPT_2 = BERT = shape_of(12, 12, 64)  # their base models

# -- the table ---------------------------------------------------------------------------------------------------------

LINES = (
    # Layers of models, in training.
    attention("Llama-3-8B", LLAMA, cpu=(1, 512), gpu=(4, 4096)),
    attention("Falcon-7B", FALCON, cpu=(1, 512), gpu=(2, 4096)),
    attention("StarCoder", SHAPES["StarCoder"], cpu=(1, 512), gpu=(4, 4096)),
    attention("Gemma-2B", SHAPES["Gemma-2B"], cpu=(1, 512), gpu=(4, 4096)),
    attention("SmolLM2-135M", SHAPES["SmolLM2-135M"], cpu=(1, 1024), gpu=(8, 4096)),
    attention("GPT-2", GPT_2, cpu=(4, 640)),
    attention("BERT", BERT, cpu=(8, 512), is_causal=False),
    attention("BERT-sentences", BERT, cpu=(16, 128), is_causal=False),
    attention("MPT-7B", SHAPES["MPT-7B"], cpu=(1, 512), gpu=(4, 4096), with_flex=True),
    attention("Mistral-7B", MISTRAL, gpu=(1, 16384), with_flex=True),
    attention("Phi-2", SHAPES["Phi-2"], gpu=(4, 4096)),
    attention("Phi-3-mini", SHAPES["Phi-3-mini"], gpu=(4, 4096)),
    attention("documents", LLAMA, cpu=(1, 1024), gpu=(2, 8192), with_flex=True, documents=4),
    # Lengths that are no multiple of anything, and features of no power of two.
    attention("awkward-777", shape_of(6, 6, 80), cpu=(2, 777)),
    attention("awkward-301", FALCON, cpu=(1, 301)),
    # One shape at several lengths.
    *(attention(f"length-{length}", MQA, cpu=(1, length)) for length in (512, 1024, 2048, 4096)),
    *(
        attention(f"memory-{length}", MQA, cpu=(1, length), directions=(BOTH,), case=memory_case)
        for length in (8192, 16384)
    ),
    attention("length-1024", LLAMA, gpu=(16, 1024)),
    attention("length-16384", LLAMA, gpu=(1, 16384)),
    # What FlashAttention's own benchmarks measure, and more.
    attention("full", MHA, gpu=(4, 4096), is_causal=False),
    attention("causal", MHA, gpu=(4, 4096)),
    attention("dropout", LLAMA, gpu=(4, 4096), dropout=0.1),
    attention("float16", LLAMA, gpu=(4, 4096), gpu_dtype="float16"),
    attention("float32", MHA, gpu=(4, 2048), gpu_dtype="float32"),
    # Prompts that continue a cache.
    decode("Llama-3-8B-prefill", LLAMA, cpu=(1, 256, 2048), gpu=(4, 1024, 8192)),
    decode("Mistral-7B-prefill", MISTRAL, cpu=(1, 256, 8192), gpu=(1, 2048, 16384)),
    # Steps of decoding. What we aim at on an H100, and in brackets the best that others have published there.
    *(decode(f"Llama-3-8B-decode-{batch}", LLAMA, cpu=(batch, 1, 2048), gpu=(batch, 1, 8192)) for batch in (1, 4, 16)),
    decode("Falcon-7B-decode", FALCON, cpu=(8, 1, 2048), gpu=(32, 1, 8192)),
    decode("Mistral-7B-decode", MISTRAL, cpu=(1, 1, 8192), gpu=(8, 1, 32768)),
    decode("decode-16/1", shape_of(16, 1, 64), cpu=(8, 1, 4096)),
    decode("decode-16/4", shape_of(16, 4, 64), cpu=(8, 1, 4096)),
    decode("decode-16/16", shape_of(16, 16, 64), cpu=(8, 1, 4096)),
    decode("decode-mqa", shape_of(8, 1, 128), gpu=(8, 1, 32768)),  # 2.2 TB/s (1.63)
    decode("decode-one", shape_of(8, 1, 128), gpu=(1, 1, 32768)),  # 1.0 TB/s (0.50)
    decode("decode-mha", shape_of(8, 8, 128), gpu=(32, 1, 32768)),
    # 1.6 times as fast as decode-mha. 131072 keys would make arrays of 4 GiB, which JAX cannot reach byte by byte.
    decode("decode-int8", shape_of(8, 8, 128), gpu=(32, 1, 32768), key_dtype="int8"),
    decode("decode-long", shape_of(8, 8, 128), gpu=(32, 1, 131072)),  # 2.9 TB/s (3.16)
    decode("decode-window", shape_of(8, 8, 128), gpu=(8, 1, 131072), window=4096),  # 0.2 ms (0.196)
    # Layers, steps of training, text.
    Line(
        "layer",
        {"cpu": Layer(1, 512, 1024, 16), "gpu": Layer(4, 2048, 2048, 16, dtype="bfloat16")},
        layer_case,
    ),
    Line(
        "layer-decode",
        {"cpu": Layer(8, 2048, 1024, 16, decode=True), "gpu": Layer(32, 4096, 4096, 32, decode=True, dtype="bfloat16")},
        layer_case,
        (FORWARD,),
    ),
    Line(
        "train-step",
        {"cpu": TrainStep(2, 512, 256, 4, 2), "gpu": TrainStep(4, 1024, 1024, 16, 8, dtype="bfloat16")},
        train_case,
        ("",),
    ),
    Line("demo", {"cpu": Text()}, demo_case, ("",)),
)


def lines_of(device: str) -> dict[str, Line]:
    """By name, those that the table has for "cpu" or "gpu"."""
    return {line.name: line for line in LINES if device in line.problems}
