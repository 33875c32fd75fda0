"""Ops over the paged KV cache; knows nothing of Baton.

`naive` is what runs on the CPU, in plain torch. Each other file is one op as a Triton kernel for NVIDIA GPUs, `attend`
what two of them share, and `reference` defines them all in plain torch. Only the kernels' files import Triton, so
whoever imports none of them needs none.
"""
