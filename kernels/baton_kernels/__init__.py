"""Ops over the paged KV cache; knows nothing of Baton.

`naive` defines every op, in plain torch. `native` has those that the CPU runs, `planned` is attention in plain torch
for where neither runs. Each other file is one op as a Triton kernel for NVIDIA GPUs, and `attend` what two of them
share. Only the kernels' files import Triton, so whoever imports none of them needs none.
"""
