"""GroupNorm + SiLU by Triton kernels: how a tensor is cut up, the kernels, and the operator that launches them."""
