"""Executes the compiled Triton kernels on a CPU: see README.md."""
