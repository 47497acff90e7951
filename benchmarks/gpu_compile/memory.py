"""Peak temporary memory on NVIDIA GPUs, ours and that of each peer that lowers, on a machine that needs no GPU.

XLA's compiler for GPUs runs whole, so `memory_analysis().temp_size_in_bytes` is what it would be there. What a call
takes in all is that and its arguments and results, which are the same for everybody. It is part of `python -m
benchmarks` where `make cuda-compiler` has installed the compiler.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from typing import Any

import jax

from benchmarks import environment, gpu_compile
from benchmarks.measure import failure_of
from benchmarks.model_shapes import MULTI_QUERY, SHAPES
from benchmarks.peers import jax_attention
from benchmarks.problems import FORWARD, Problem, attention_of
from benchmarks.progress import progress_bar

GRADIENTS = "gradients"  # alone, for a cotangent that comes from outside
GPUS = ("a100", "h100", "b200")
TRAINING = {
    "multi-query": attention_of(MULTI_QUERY, 4, 4096, dtype="bfloat16"),
    "Mistral-7B": attention_of(SHAPES["Mistral-7B"], 1, 16384, dtype="bfloat16"),
}
DECODING = {"Llama-3-8B-decode": attention_of(SHAPES["Llama-3-8B"], 64, 1, 8192, dtype="bfloat16")}
PROBLEMS = {
    **{name: replace(problem, gradients=True) for name, problem in TRAINING.items()},
    **DECODING,
}


@dataclass(frozen=True)
class Row:
    """What became of one peer. Attributes: gpu, one of GPUS; temporaries, bytes at the peak; others as in `measure`."""

    gpu: str
    case: str
    problem: str
    direction: str
    peer: str
    status: str
    temporaries: int | None = None
    message: str = ""


WORKER = "from benchmarks import processes; from benchmarks.gpu_compile import memory; processes.serve(memory.answer)"


def main(quick: bool = False) -> dict[str, Any]:
    """Why nothing was compiled, or None, as "missing", and the rows. Two GPUs are compiled for at once."""
    reason = gpu_compile.missing()
    if reason is not None or quick:
        return {"missing": reason or "--quick", "rows": []}
    with (
        progress_bar(len(GPUS) * len(pairs()), "memory on GPUs", "program") as progress,
        ThreadPoolExecutor(min(len(GPUS), environment.usable_cores())) as pool,
    ):

        def rows_for(gpu: str) -> list[dict[str, Any]]:
            found = []
            for row in compile_for(gpu):
                found.append(asdict(row))
                progress.update()
            return found

        return {"missing": None, "rows": [row for rows in pool.map(rows_for, GPUS) for row in rows]}


def pairs() -> list[tuple[str, str]]:
    """Cases with their peers."""
    peers = lambda problem: [*jax_attention.names_for(problem, "cpu"), "flax.linen"]
    return [(name, peer) for name, problem in PROBLEMS.items() for peer in peers(problem)]


def compile_for(gpu: str) -> Iterator[Row]:
    """A row for each case and peer. One that ends the compiler's process is its row."""
    for pair, found in gpu_compile.results_of(WORKER, gpu, pairs()):
        yield row_of(gpu, *pair, status="raised", message=found) if isinstance(found, str) else Row(**found)


def row_of(gpu: str, case: str, peer: str, **fields: Any) -> Row:
    problem = PROBLEMS[case]
    return Row(gpu, case, str(problem), GRADIENTS if problem.gradients else FORWARD, peer, **fields)


def answer(gpu: str, pair: tuple[str, str]) -> dict[str, Any]:
    """What a process finds for a case and a peer: the fields of a row."""
    case, peer = pair
    try:
        row = row_of(gpu, case, peer, status="measured", temporaries=temporaries(gpu, peer, PROBLEMS[case]))
    except Exception as error:  # whatever a compiler raises is the result
        row = row_of(gpu, case, peer, **failure_of(error))
    return asdict(row)


def temporaries(gpu: str, peer: str, problem: Problem) -> int:
    """Of the output, or of the gradients alone."""
    program = jax_attention.program_of(jax_attention.PEERS[jax_attention.program_name(peer, "gpu")], problem)
    wanted = slice(1, None) if problem.gradients else slice(None)
    device = gpu_compile.topology_of(gpu).devices[0]  # tokamax asks the default device whether it is a GPU
    with jax.default_device(device):
        structs = jax_attention.structs(problem)
        compiled = gpu_compile.compile_program(gpu, lambda *arrays: program(*arrays)[wanted], structs)
    return compiled.memory_analysis().temp_size_in_bytes
