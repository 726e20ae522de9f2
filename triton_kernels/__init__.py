"""Triton kernels of the ops, installed as `perexample.triton_kernels`: one module for each one of `perexample.ops`.

Importing a module here imports Triton. Each holds its kernels, which read top to bottom, and for every op one function
of the op's name and schema that chooses, launches and allocates. See docs/triton.md.
"""
