"""Kernels in C++ for the processor: the scan of each cell over time, softmax cross-entropy.

A page a cell (`lstm.h`), one driver for all (`driver.h`), compiled once for each instruction set
(`native.cpp`) when lmtrain is installed.
"""
