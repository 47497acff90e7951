"""The GPUs that are compiled for."""

from dataclasses import dataclass

from benchmarks.gpu_compile.kernels import Kernel


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

    def resident(self, kernel: Kernel) -> int:
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
