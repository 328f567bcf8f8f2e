"""Cells over time on CUDA, in Triton."""
