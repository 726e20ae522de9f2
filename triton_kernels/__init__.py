"""Triton kernels of the ops, installed as `perexample.triton_kernels`."""
