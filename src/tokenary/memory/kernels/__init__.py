"""Attention kernels that compute a part of the matrix, for methods whose point is not to compute the rest.

On the CPU each is gathered products of torch, on a GPU a kernel in Triton, imported only when tensors lie there.
"""
