"""C++ kernels for the CPU: the scan of each cell over time, and softmax cross-entropy.

One header per cell (`lstm.h`) and one loop over time for all of them (`driver.h`), compiled once
for each instruction set (`native.cpp`) when lmtrain is installed.
"""
