"""Compiles programs for GPUs that are not there, each target in a process of its own.

JAX has to be set up for them from its start.
"""

import contextlib
import math
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jax
from jax.experimental import topologies
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, NamedSharding, PartitionSpec, use_abstract_mesh

from benchmarks import processes
from benchmarks.gpu_compile.kernels import Kernel, dumped_kernels, plugin
from benchmarks.gpu_compile.programs import Case
from benchmarks.gpu_compile.targets import TARGETS, Target
from benchmarks.measure import LOCATION
from benchmarks.model_shapes import ModelShape
from mqa_jax.kernels import gpu

WORKER = (
    "from benchmarks import processes; from benchmarks.gpu_compile import compiler; processes.serve(compiler.answer)"
)


@dataclass(frozen=True)
class Result:
    """What became of one case: `error` says why there are no kernels. Attributes: temporaries, bytes at the peak."""

    target: str
    case: str
    temporaries: int | None = None
    kernels: tuple[Kernel, ...] = ()
    error: str | None = None


def compile_cases(target: str, cases: Sequence[Case]) -> Iterator[Result]:
    """A result for each case, in their order. A case that ends the compiler's process is one result, too."""
    for fields, found in results_of(WORKER, target, [asdict(case) for case in cases]):
        if isinstance(found, str):
            yield Result(target, str(case_of(fields)), error=found)
        else:
            yield Result(**{**found, "kernels": tuple(Kernel(**kernel) for kernel in found["kernels"])})


def results_of(worker: str, target: str, orders: Sequence[Any]) -> Iterator[tuple[Any, Any]]:
    """Each order with what a process of this program finds for it, or, if that is its end, how it ended."""
    return processes.results_of(worker, [target], orders, "the compiler", worker_environment())


def worker_environment() -> dict[str, str]:
    """XLA reads its flags once; those of this process, if any, are for another platform."""
    inherited = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    path = os.pathsep.join(filter(None, [str(plugin()), os.environ.get("PYTHONPATH")]))
    return {
        **inherited,
        "PYTHONPATH": path,
        "JAX_PLATFORMS": "cpu,cuda",  # arrays are on the first; the second is compiled for
        "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",  # or the plugin insists on cuDNN
        "JAX_ENABLE_COMPILATION_CACHE": "0",  # what comes from a cache is not compiled
    }


def answer(target: str, fields: dict[str, Any]) -> dict[str, Any]:
    """What a process finds for a case: the fields of a result."""
    case = case_of(fields)
    try:
        result = compile_case(target, case)
    except Exception as error:  # whatever a compiler raises is the result
        message = LOCATION.sub("", f"{type(error).__name__}: {error}".partition("\n")[0])
        result = Result(target, str(case), error=message)
    return asdict(result)


def case_of(fields: dict[str, Any]) -> Case:
    return Case(**{**fields, "shape": ModelShape(**fields["shape"])})


def compile_case(name: str, case: Case) -> Result:
    with tempfile.TemporaryDirectory() as folder:
        # "ptx" is all of Triton's that has to be dumped: its passes take twenty times as long as compiling.
        options = {"xla_dump_to": folder, "xla_dump_emitter_re": "ptx"}
        compiled = compile_program(name, case.program(), (), case.arguments(), options)
        prefix = "mqa_" if case.implementation == "triton" else ""  # else XLA's own kernels are what is asked about
        kernels = tuple(dumped_kernels(Path(folder), prefix))
    return Result(name, str(case), compiled.memory_analysis().temp_size_in_bytes, kernels)


def compile_program(
    name: str,
    function: Callable[..., Any],
    arguments: Sequence[Any] = (),
    named: Mapping[str, Any] = MappingProxyType({}),
    options: Mapping[str, Any] = MappingProxyType({}),
) -> Any:  # a compiled program, as JAX has it
    """For a GPU that is not there, for arguments of these shapes."""
    target = TARGETS[name]
    sharding = NamedSharding(topologies.make_mesh(topology_of(name), (1,), ("x",)), PartitionSpec())
    arguments, named = jax.tree.map(lambda x: x.update(sharding=sharding), (arguments, dict(named)))
    size = sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves((arguments, named)))
    if size > target.memory << 30:
        raise ValueError(f"its arguments take {size / 2**30:.0f} GiB; the GPU has {target.memory}.")
    with gpu.assuming(target.architecture), lowering_for(target):
        lowered = jax.jit(function).trace(*arguments, **named).lower(lowering_platforms=("cuda",))
        return lowered.compile(compiler_options={**options, "xla_gpu_autotune_level": 0})


def topology_of(name: str) -> topologies.TopologyDescription:
    return topologies.get_topology_desc(platform="cuda", target_config=TARGETS[name].config(), topology="1x1x1")


def lowering_for(target: Target) -> contextlib.AbstractContextManager[Any]:
    """JAX asks an abstract device which GPU it lowers for, from 0.11 on."""
    if jax.__version_info__ < (0, 11):
        return contextlib.nullcontext()
    device = AbstractDevice(device_kind=target.kind, num_cores=None, platform="cuda")
    return use_abstract_mesh(AbstractMesh((1,), ("x",), (AxisType.Auto,), abstract_device=device))
