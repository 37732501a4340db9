"""Attention kernels that compute a part of the matrix, for methods whose point is not to compute the rest.

Each is compiled for the CPU and, in Triton, for a GPU; Triton is imported only when tensors lie on one.
"""
