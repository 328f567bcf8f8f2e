"""Kernels and their dispatch: the scan of a cell over time, and softmax cross-entropy."""
