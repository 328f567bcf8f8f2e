"""Triton kernels for CUDA: the scan of each cell over time, and softmax cross-entropy."""
