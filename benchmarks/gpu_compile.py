"""What the compilers for NVIDIA GPUs make of attention, on a machine that needs no GPU: nothing is executed.

python -m benchmarks.gpu_compile
python -m benchmarks.gpu_compile --targets h100 --only Llama-3-8B Falcon --out compiled.json

XLA's compiler for GPUs runs whole, so memory is exact; `ptxas` says what a kernel takes. `make cuda-compiler` installs
both. They want a JAX that is set up for them from its start, so each target has a process of its own.
"""

import argparse
import contextlib
import json
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, NamedSharding, PartitionSpec, use_abstract_mesh
from jaxtyping import Array
from tqdm import tqdm

import mqa_jax
from benchmarks import environment
from benchmarks.measure import LOCATION
from benchmarks.model_shapes import MODEL_SHAPES, MULTI_QUERY, ModelShape, shape_of
from mqa_jax.kernels import tile_config

# -- what is compiled, and for what -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Target:
    """A GPU.

    Attributes:
      kind: what JAX calls it.
      architecture: what `kernels/tile_table.json` calls it.
      shared_memory: KiB of a multiprocessor.
      memory, bandwidth, l2_cache, clock: GiB, 10^9 bytes a second, MiB, GHz.
    """

    kind: str
    architecture: str
    compute_capability: tuple[int, int]
    multiprocessors: int
    shared_memory: int
    memory: int
    bandwidth: int
    l2_cache: int
    clock: float

    @property
    def block_shared_memory(self) -> int:
        """Bytes that one thread block may ask for: the system takes 1 KiB."""
        return (self.shared_memory - 1) << 10

    def resident(self, kernel: "Kernel") -> int:
        """Thread blocks of a kernel that a multiprocessor holds at once, as registers and shared memory go."""
        registers = 65536 // (kernel.threads * 8 * -(-kernel.registers // 8))
        return min(registers, (self.shared_memory << 10) // (kernel.shared_memory + 1024))

    def config(self) -> str:
        """XLA's GpuTargetConfigProto. The versions of cuDNN and CUDA have to be there; our kernels use neither."""
        major, minor = self.compute_capability
        return f"""
            gpu_device_info {{
              cuda_compute_capability {{ major: {major} minor: {minor} }}
              core_count: {self.multiprocessors} fpus_per_core: 128 clock_rate_ghz: {self.clock}
              threads_per_warp: 32 threads_per_block_limit: 1024 threads_per_core_limit: 2048
              block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
              registers_per_core_limit: 65536 registers_per_block_limit: 65536
              shared_memory_per_core: {self.shared_memory << 10} shared_memory_per_block: {48 << 10}
              shared_memory_per_block_optin: {self.block_shared_memory}
              device_memory_size: {self.memory << 30} memory_bandwidth: {self.bandwidth}000000000
              l2_cache_size: {self.l2_cache << 20}
            }}
            platform_name: "CUDA" device_description_str: "{self.kind}"
            dnn_version_info {{ major: 9 minor: 12 }} runtime_version {{ major: 13 minor: 0 patch: 0 }}"""


TARGETS = {
    "a100": Target("NVIDIA A100-SXM4-80GB", "sm80", (8, 0), 108, 164, 80, 2039, 40, 1.41),
    "h100": Target("NVIDIA H100 80GB HBM3", "sm90", (9, 0), 132, 228, 80, 3352, 50, 1.98),
    # JAX 0.12 knows the capability of an L40 without having one, not that of an L40S. Both are the same chip.
    "l40s": Target("NVIDIA L40", "sm89", (8, 9), 142, 100, 45, 864, 96, 2.52),
    "b200": Target("NVIDIA B200", "sm100", (10, 0), 148, 228, 178, 8000, 126, 1.965),
}


@dataclass(frozen=True)
class Case:
    """One program.

    Attributes:
      direction: "forward"; "backward", the gradients alone, for a cotangent that comes from outside; or "decode", a
        step with a cache, where each row of the batch is as long as an argument says.
      key_dtype: of keys and values, if not `dtype`; in 8 bits they come with scales.
      precision: of the products, as `dot_product_attention` takes it.
      added: whether a bias, slopes and a soft cap take part in the scores, in decoding a mask as well. Bias and mask
        have an entry for each query and key, and are shared by the heads.
    """

    shape: ModelShape
    direction: str
    dtype: str = "bfloat16"
    batch: int = 1  # B
    queries: int = 2048  # T
    keys: int = 2048  # S
    is_causal: bool = True
    implementation: str = "triton"
    key_dtype: str | None = None
    precision: str | None = None
    added: bool = False

    def __str__(self) -> str:
        dtypes = self.dtype if self.key_dtype is None else f"{self.dtype}/{self.key_dtype}"
        dtypes += f" {self.precision}" if self.precision else ""
        dtypes += " added" if self.added else ""
        sizes = f"B={self.batch} T={self.queries} S={self.keys}{' causal' if self.is_causal else ''}"
        return f"{self.shape.name} {dtypes} {self.direction} {sizes}"

    def arguments(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Of `program`, by name."""
        value_dim = self.shape.value_dim or self.shape.head_dim
        query = (self.batch, self.queries, self.shape.heads)
        key = (self.batch, self.keys, self.shape.kv_heads)
        key_dtype = self.key_dtype or self.dtype
        arguments = {
            "query": jax.ShapeDtypeStruct((*query, self.shape.head_dim), self.dtype),
            "key": jax.ShapeDtypeStruct((*key, self.shape.head_dim), key_dtype),
            "value": jax.ShapeDtypeStruct((*key, value_dim), key_dtype),
        }
        if self.direction == "backward":
            arguments["cotangent"] = jax.ShapeDtypeStruct((*query, value_dim), self.dtype)
        if self.direction == "decode":
            arguments |= dict.fromkeys(STEP, jax.ShapeDtypeStruct((self.batch,), "int32"))
        if self.key_dtype is not None:
            arguments |= dict.fromkeys(SCALES, jax.ShapeDtypeStruct(key, "float32"))
        if self.added:
            pairs = (self.batch, 1, self.queries, self.keys)
            arguments["bias"] = jax.ShapeDtypeStruct(pairs, self.dtype)
            if self.direction == "decode":
                arguments["mask"] = jax.ShapeDtypeStruct(pairs, "bool")
        return arguments

    def program(self) -> Callable[..., Any]:
        return self.gradients if self.direction == "backward" else self.output

    def output(self, query: Array, key: Array, value: Array, **options: Any) -> Array:
        return mqa_jax.dot_product_attention(
            query,
            key,
            value,
            is_causal=self.is_causal,
            local_window_size=None if self.shape.window is None else (self.shape.window - 1, 0),
            logits_soft_cap=20.0 if self.added else self.shape.soft_cap,
            alibi_slopes=mqa_jax.alibi_slopes(self.shape.heads) if self.shape.alibi or self.added else None,
            precision=self.precision,
            implementation=self.implementation,
            **options,
        )

    def gradients(self, cotangent: Array, **arguments: Array) -> dict[str, Array]:
        _, pull_back = jax.vjp(lambda arguments: self.output(**arguments), arguments)
        (gradients,) = pull_back(cotangent)
        return gradients


STEP = "key_value_seq_lengths", "query_offset"  # how long each row is, and where its query stands
SCALES = "key_scale", "value_scale"

DIRECTIONS = ("forward", "backward")
TF32 = "TF32_TF32_F32", "TF32_TF32_F32_X3"

DECODE_SHAPES = tuple(
    shape_of(heads, kv_heads, head_dim)
    for heads, kv_heads in ((8, 8), (32, 8), (32, 1), (71, 1))
    for head_dim in (64, 128, 256)
)
DECODE_CASES = (
    *(
        Case(shape, "decode", batch=batch, queries=1, keys=keys, key_dtype=key_dtype)
        for shape in DECODE_SHAPES
        for batch in (1, 8, 64)
        for keys in (2048, 32768, 131072)
        for key_dtype in (None, "int8")
    ),
    # In a kernel these differ from int8 by how a number is converted.
    *(Case(shape, "decode", batch=8, queries=1, keys=32768, key_dtype="float8_e4m3fn") for shape in DECODE_SHAPES),
)
CASES = (
    *(Case(shape, direction) for shape in MODEL_SHAPES for direction in DIRECTIONS),
    *(
        Case(shape, direction, dtype)
        for shape in MODEL_SHAPES
        if shape.name in ("Llama-3-8B", "SmolLM2-135M")
        for dtype in ("float16", "float32")
        for direction in DIRECTIONS
    ),
    *(
        Case(shape_of(8, 2, head_dim), "backward", "float32", queries=1024, keys=1024, precision=precision, added=added)
        for head_dim in (64, 128, 256)
        for precision in TF32
        for added in (False, True)
    ),
    *(
        Case(shape_of(8, 2, head_dim), "decode", "float32", queries=8, keys=8192, precision=precision, added=added)
        for head_dim in (64, 128, 256)
        for precision in TF32
        for added in (False, True)
    ),
    # A mask and a bias that heads share, of the verification of a draft.
    Case(shape_of(64, 8, 128), "decode", batch=16, queries=16, keys=32768, added=True),
    Case(MULTI_QUERY, "backward", batch=4, queries=4096, keys=4096),
    Case(MULTI_QUERY, "backward", queries=32768, keys=32768),
    *DECODE_CASES,
)


# -- what comes out ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Kernel:
    """One kernel, as the compilers report it.

    Attributes:
      programs: thread blocks that are started.
      threads: of a thread block.
      registers: of a thread.
      spills: bytes that a thread stores and loads because it has no register for them.
      shared_memory: bytes of a thread block.
      wgmma, tcgen05, mma_sync: instructions for the tensor cores: those of Hopper, of Blackwell, of any.
      serialized: whether `ptxas` makes each wgmma wait for the one before, which costs most of their speed.
      async_copies: instructions that copy into shared memory in the background, by threads or by TMA.
    """

    name: str
    programs: int
    threads: int
    registers: int
    spills: int
    shared_memory: int
    wgmma: int
    tcgen05: int
    mma_sync: int
    serialized: bool
    async_copies: int


@dataclass(frozen=True)
class Result:
    """What became of one case: `error` says why there are no kernels. Attributes: temporaries, bytes at the peak."""

    target: str
    case: str
    temporaries: int | None = None
    kernels: tuple[Kernel, ...] = ()
    error: str | None = None


class Launch(NamedTuple):
    """How XLA's program starts a kernel: thread blocks, threads of each, and bytes of dynamic shared memory."""

    programs: int
    threads: int
    shared_memory: int


LAUNCH = re.compile(r"(\w+) grid: \[([\d, ]+)\] threads: \[([\d, ]+)\] +shared_memory: (\d+) bytes")


def launches(thunks: str) -> dict[str, Launch]:
    """By the name of the kernel, in the order in which XLA's program launches them."""
    volume = lambda sides: math.prod(map(int, sides.split(",")))
    return {
        name: Launch(volume(grid), volume(threads), int(size)) for name, grid, threads, size in LAUNCH.findall(thunks)
    }


def read_kernel(name: str, launch: Launch, ptx: str, report: str) -> Kernel:
    """`report` is what `ptxas -v` says of `ptx`, which holds one kernel."""
    spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", report)
    registers = re.search(r"Used (\d+) registers", report)
    if spills is None or registers is None:
        raise ValueError(f"ptxas reports neither spills nor registers of {name}: {report!r}")
    static = re.search(r"(\d+) bytes smem", report)
    return Kernel(
        name=name,
        programs=launch.programs,
        threads=launch.threads,
        registers=int(registers[1]),
        spills=int(spills[1]) + int(spills[2]),
        shared_memory=launch.shared_memory + (int(static[1]) if static else 0),
        wgmma=ptx.count("wgmma.mma_async"),
        tcgen05=ptx.count("tcgen05.mma"),
        mma_sync=ptx.count("mma.sync"),
        serialized="wgmma.mma_async instructions are serialized" in report,
        # Not those that only start and await groups of copies, or bring something into the cache.
        async_copies=len(re.findall(r"cp\.async\.(?:c[ag]|bulk)\.(?!commit|wait|prefetch)", ptx)),
    )


# -- the process that compiles ----------------------------------------------------------------------------------------

ROOT = Path(__file__).parents[1]
WORKER = "from benchmarks import gpu_compile; gpu_compile.work()"


def plugin() -> Path:
    """The folder that `make cuda-compiler` fills, or another one."""
    return Path(os.environ.get("MQA_JAX_CUDA_PLUGIN") or Path(sys.prefix, "cuda"))


def ptxas() -> str | None:
    installed = sorted(plugin().glob("nvidia/*/bin/ptxas"))
    return str(installed[-1]) if installed else shutil.which("ptxas")


def missing() -> str | None:
    """Why nothing can be compiled, or None if it can."""
    if not any(plugin().glob("jax_plugins/xla_cuda*")):
        return "JAX's compiler for CUDA is not installed: `make cuda-compiler`"
    if ptxas() is None:
        return "ptxas is not installed: `make cuda-compiler`"
    return None


def compile_cases(target: str, cases: Sequence[Case]) -> Iterator[Result]:
    """A result for each case, in their order. A case that ends the compiler's process is one result, too."""
    for fields, found in results_of(WORKER, target, [asdict(case) for case in cases]):
        if isinstance(found, str):
            yield Result(target, str(case_of(fields)), error=found)
        else:
            yield Result(**{**found, "kernels": tuple(Kernel(**kernel) for kernel in found["kernels"])})


def results_of(worker: str, target: str, orders: Sequence[Any]) -> Iterator[tuple[Any, dict[str, Any] | str]]:
    """Each order with what a process of this program prints for it: JSON, or, if that is its end, how it ended."""
    remaining = list(orders)
    while remaining:
        command = [sys.executable, "-c", worker, target, json.dumps(remaining)]
        with (
            tempfile.TemporaryFile("w+", errors="replace") as log,
            subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=log, text=True, cwd=ROOT, env=worker_environment()
            ) as process,
        ):
            assert process.stdout is not None  # for mypy: it is a pipe
            for line in process.stdout:
                yield remaining.pop(0), json.loads(line)
            status = process.wait()
            log.seek(0)
            last_words = log.read().strip().rpartition("\n")[2]
        if remaining:
            yield remaining.pop(0), LOCATION.sub("", f"the compiler ended with status {status}: {last_words}")


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


def work() -> None:
    """The worker: prints a result as a line of JSON for each case. Its arguments are a target and the cases."""
    target, cases = sys.argv[1], json.loads(sys.argv[2])
    for fields in cases:
        case = case_of(fields)
        try:
            result = compile_case(target, case)
        except Exception as error:  # whatever a compiler raises is the result
            message = LOCATION.sub("", f"{type(error).__name__}: {error}".partition("\n")[0])
            result = Result(target, str(case), error=message)
        print(json.dumps(asdict(result)), flush=True)


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
    with tile_config.assuming(target.architecture), lowering_for(target):
        lowered = jax.jit(function).trace(*arguments, **named).lower(lowering_platforms=("cuda",))
        return lowered.compile(compiler_options={**options, "xla_gpu_autotune_level": 0})


def topology_of(name: str) -> topologies.TopologyDescription:
    return topologies.get_topology_desc(platform="cuda", target_config=TARGETS[name].config(), topology="1x1x1")


def dumped_kernels(folder: Path, prefix: str) -> Iterator[Kernel]:
    """Those that XLA dumped for one program, compiled once more for their report."""
    texts = {path: path.read_text() for path in folder.glob("*.ptx")}  # a file holds one kernel, or none
    paths = {entry[1]: path for path, text in texts.items() if (entry := re.search(r"\.entry (\w+)", text))}
    (thunks,) = folder.glob("*.thunk_sequence.txt")
    for name, launch in launches(thunks.read_text()).items():
        if name.startswith(prefix):
            yield read_kernel(name, launch, texts[paths[name]], ptxas_report(paths[name], texts[paths[name]]))


def ptxas_report(path: Path, ptx: str) -> str:
    architecture = re.search(r"\.target (\w+)", ptx)
    assert architecture is not None, path.name
    command = [str(ptxas()), "-v", "-arch", architecture[1], str(path), "-o", os.devnull]
    run = subprocess.run(command, capture_output=True, text=True)
    if run.returncode:
        raise RuntimeError(f"ptxas: {run.stderr}")
    return run.stderr


def lowering_for(target: Target) -> contextlib.AbstractContextManager[Any]:
    """JAX asks an abstract device which GPU it lowers for, from 0.11 on."""
    if jax.__version_info__ < (0, 11):
        return contextlib.nullcontext()
    device = AbstractDevice(device_kind=target.kind, num_cores=None, platform="cuda")
    return use_abstract_mesh(AbstractMesh((1,), ("x",), (AxisType.Auto,), abstract_device=device))


# -- the command ------------------------------------------------------------------------------------------------------

COLUMNS: dict[str, Callable[[Kernel], object]] = {
    "kernel": lambda kernel: kernel.name,
    "programs": lambda kernel: kernel.programs,
    "threads": lambda kernel: kernel.threads,
    "registers": lambda kernel: kernel.registers,
    "spilled bytes": lambda kernel: kernel.spills,
    "shared KiB": lambda kernel: f"{kernel.shared_memory / 2**10:.1f}",
    "wgmma": lambda kernel: f"{kernel.wgmma}{' serialized' if kernel.serialized else ''}",
    "tcgen05": lambda kernel: kernel.tcgen05,
    "mma.sync": lambda kernel: kernel.mma_sync,
    "cp.async": lambda kernel: kernel.async_copies,
}


def aligned(results: Sequence[Result]) -> str:
    """A line for each kernel, with the temporaries of its whole program; what did not compile comes last."""
    lines: list[tuple[str, ...]] = [("target", "case", *COLUMNS, "resident", "temporary MiB")]
    for result in results:
        temporaries = "" if result.temporaries is None else f"{result.temporaries / 2**20:.1f}"
        for kernel in result.kernels:
            columns = (str(column(kernel)) for column in COLUMNS.values())
            resident = str(TARGETS[result.target].resident(kernel))
            lines.append((result.target, result.case, *columns, resident, temporaries))
    widths = [max(map(len, column)) for column in zip(*lines)]
    sides = "<<<" + ">" * (len(widths) - 3)  # names, then numbers
    text = ["  ".join(f"{cell:{side}{width}}" for cell, side, width in zip(line, sides, widths)) for line in lines]
    return "\n".join(text + [f"{result.target}  {result.case}: {result.error}" for result in results if result.error])


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_compile",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS), metavar="TARGET")
    parser.add_argument("--only", nargs="+", metavar="SUBSTRING", help="cases whose names have one of these in them")
    parser.add_argument("--out", type=Path, help="results as JSON")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    options = parse_arguments(arguments)
    reason = missing()
    if reason is not None:
        raise SystemExit(reason)
    cases = [case for case in CASES if any(part in str(case) for part in options.only or [""])]
    if not cases:
        raise SystemExit(f"no case has any of {options.only} in its name")
    results: list[Result] = []
    with tqdm(total=len(options.targets) * len(cases), unit="program", leave=False) as progress:
        for target in options.targets:
            progress.set_description(target)
            for result in compile_cases(target, cases):
                results.append(result)
                progress.update()
    print(aligned(results))
    words = ["python -m benchmarks.gpu_compile", "--targets", *options.targets]
    words += ["--only", shlex.join(options.only)] if options.only else []
    described = environment.describe(" ".join(words))
    written = {
        "command": described["command"],
        "date": described["date"],
        "versions": {**described["versions"], "ptxas": ptxas_version()},
        "rows": [asdict(result) for result in results],
    }
    if options.out is not None:
        options.out.write_text(json.dumps(written, indent=2) + "\n")
    return written


def ptxas_version() -> str:
    text = subprocess.run([str(ptxas()), "--version"], capture_output=True, text=True, check=True).stdout
    found = re.search(r"V([\d.]+)", text)
    return found[1] if found else "unknown"


if __name__ == "__main__":
    main()
