"""PTX of single kernels, for a GPU that is not there.

A kernel is exported here, where it was traced, and compiled by XLA in a process that has the plugin for CUDA from its
start. What comes back is kept on disk by what was exported, so that a kernel is compiled once for all tests.
"""

import contextlib
import functools
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

from benchmarks import gpu_compile

CACHE = Path(os.environ.get("PTX_CACHE") or Path(tempfile.gettempdir(), "mqa_jax_ptx"))
TRITON = jax.export.DisabledSafetyCheck.custom_call("__gpu$xla.gpu.triton")


@dataclass(frozen=True)
class Compiled:
    """A kernel, and how XLA's program starts it. `shared_bytes`: of dynamic shared memory."""

    ptx: str
    grid: tuple[int, ...]
    threads: int
    shared_bytes: int


class CompilerError(Exception):
    """What XLA says of a kernel that it cannot compile."""


def compile_kernel(gpu: str, name: str, launch: Callable[..., Any], arguments: tuple[Any, ...]) -> Compiled:
    """`launch` is a `pallas_call`, `arguments` are trees of shapes; their leaves, then the results', are operands."""
    leaves, tree = jax.tree.flatten(arguments)

    def flat(*leaves: Any) -> list[Any]:  # as what is exported knows no trees of ours
        return jax.tree.leaves(launch(*jax.tree.unflatten(tree, leaves)))

    with gpu_compile.lowering_for(gpu_compile.TARGETS[gpu]), _without_locations():
        exported = jax.export.export(jax.jit(flat), platforms=["cuda"], disabled_checks=[TRITON])(*leaves)
    text = f"{gpu} {jax.__version__} {name}\n{exported.mlir_module()}"
    kept = CACHE / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.json"
    if not kept.exists():
        answer = _worker(gpu).compile(name, bytes(exported.serialize()))
        if "error" in answer:
            raise CompilerError(f"{name} for {gpu}: {answer['error']}")
        CACHE.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=CACHE, delete=False) as file:
            json.dump(answer, file)
        os.replace(file.name, kept)  # other processes see all of it, or nothing
    found = json.loads(kept.read_text())
    return Compiled(**{**found, "grid": tuple(found["grid"])})


@contextlib.contextmanager
def _without_locations() -> Iterator[None]:
    """The same kernel, called from another line, is the same program."""
    before = jax.config.jax_traceback_in_locations_limit  # type: ignore[attr-defined]
    jax.config.update("jax_traceback_in_locations_limit", 0)
    try:
        yield
    finally:
        jax.config.update("jax_traceback_in_locations_limit", before)


# -- the process that compiles ----------------------------------------------------------------------------------------

WORKER = "from ptx_emulator import compiler; compiler.work()"


class _Worker:
    """Answers one order after the other, until this process ends."""

    def __init__(self, gpu: str) -> None:
        environment = gpu_compile.worker_environment()
        paths = [str(gpu_compile.ROOT / "tests"), environment["PYTHONPATH"]]
        self.log = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115 # for as long as the process
        self.process = subprocess.Popen(
            [sys.executable, "-c", WORKER, gpu],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
            cwd=gpu_compile.ROOT,
            env={**environment, "PYTHONPATH": os.pathsep.join(paths)},
        )

    def compile(self, name: str, exported: bytes) -> dict[str, Any]:
        assert self.process.stdin is not None  # for mypy: they are pipes
        assert self.process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(json.dumps({"name": name, "exported": exported.hex()}) + "\n")
            self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            self.log.seek(0)
            _worker.cache_clear()
            return {"error": f"the compiler ended: {self.log.read().strip().rpartition(chr(10))[2]}"}
        return json.loads(answer)


_worker = functools.cache(_Worker)


def work() -> None:
    """The worker: a line of JSON for each that it reads."""
    gpu = sys.argv[1]
    for line in sys.stdin:
        order = json.loads(line)
        try:
            answer = asdict(_compile(gpu, order["name"], bytes.fromhex(order["exported"])))
        except Exception as error:  # whatever a compiler raises is the answer
            answer = {"error": f"{type(error).__name__}: {error}".partition("\n")[0]}
        print(json.dumps(answer), flush=True)


def _compile(gpu: str, name: str, serialized: bytes) -> Compiled:
    exported = jax.export.deserialize(bytearray(serialized))
    mesh = jax.experimental.topologies.make_mesh(gpu_compile.topology_of(gpu), (1,), ("x",))
    sharding = NamedSharding(mesh, PartitionSpec())
    arguments = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding) for x in exported.in_avals]
    lowered = jax.jit(exported.call).trace(*arguments).lower(lowering_platforms=("cuda",))
    with tempfile.TemporaryDirectory() as folder:
        options = {"xla_dump_to": folder, "xla_dump_emitter_re": "ptx", "xla_gpu_autotune_level": 0}
        options["xla_gpu_ptx_compiler_extra_flags"] = "-O0"  # nobody looks at what comes after PTX
        lowered.compile(compiler_options=options)
        (thunks,) = Path(folder).glob("*.thunk_sequence.txt")
        found = [fields for fields in gpu_compile.LAUNCH.findall(thunks.read_text()) if fields[0] == name]
        texts = [text for path in Path(folder).glob("*.ptx") if ".entry" in (text := path.read_text())]
    if len(found) != 1 or len(texts) != 1:
        raise ValueError(f"XLA dumped {len(texts)} kernels and {len(found)} launches of {name}")
    _, grid, threads, shared = found[0]
    volume = lambda sides: [int(side) for side in sides.split(",")]
    return Compiled(texts[0], tuple(volume(grid)), volume(threads)[0], int(shared))
