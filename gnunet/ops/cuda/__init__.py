"""The operator as kernels in CUDA C++, compiled as they are needed. See README.md in the folder above."""
