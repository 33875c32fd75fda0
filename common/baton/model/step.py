"""What a worker computes with on its device: decided once, at load."""

import logging

import torch
from torch import nn

from baton.model.attention import PagedLayer, Planner
from baton.model.exact import ExactPlanner
from baton.model.layers import LayerSpec
from baton.model.naive_step import NaivePlanner
from baton.model.native_step import NativePlanner, native_covers
from baton_kernels import native as native_ops
from baton_kernels.native import Native
from baton_kernels.native_build import Unavailable

_log = logging.getLogger(__name__)

MAX_KERNEL_DIM = 256  # of a head: what the attention kernels are compiled and checked for


def load_native() -> Native | None:
    """The native ops, where they work."""
    try:
        return native_ops.load()
    except Unavailable as error:
        _log.warning("plain torch instead of the native CPU ops, which are several times as fast: %s", error)
        return None


def planner_for(
    layers: tuple[PagedLayer, ...], block_size: int, native: Native | None = None, *, bit_exact: bool = False
) -> Planner:
    """The Triton kernels on a GPU, the native ops on the CPU; plain torch where there are none, and on a GPU for
    latent attention, whose heads are wider than the kernels take."""
    if bit_exact:
        return ExactPlanner(layers, block_size)
    k_cache = layers[0].k_cache
    if native is not None and all(native_covers(native, layer) for layer in layers):
        _log.info("attention by native ops, %s", k_cache.dtype)
        return NativePlanner(native, layers, block_size)
    if k_cache.device.type != "cuda" or not all(map(kernels_cover, layers)):
        return NaivePlanner(layers, block_size, k_cache.dtype)
    from baton.model.triton_step import TritonPlanner  # Triton is there with CUDA builds of torch only

    properties = torch.cuda.get_device_properties(k_cache.device)
    return TritonPlanner(layers, block_size, properties.multi_processor_count)


def with_graphs(
    model: nn.Module,
    layers: tuple[PagedLayer, ...],
    planner: Planner,
    *,
    max_num_seqs: int,
    max_model_len: int,
) -> nn.Module:
    """What stands for the model: on a GPU its decode steps are CUDA graphs."""
    if layers[0].k_cache.device.type != "cuda":
        return model
    from baton.model.graphs import graphed

    return graphed(model, layers, planner, max_num_seqs, max_model_len)


def on_kernels(model: nn.Module, device: torch.device) -> None:
    """On a GPU, modules of the model that the kernels can do are swapped for them."""
    if device.type == "cuda":
        from baton.model.triton_fuse import fuse

        fuse(model)


def attention_on_kernels(model: nn.Module, layers: tuple[LayerSpec, ...], device: torch.device) -> None:
    """The same for its attention, where `planner_for` will choose the kernels. Once the layers are learned: what they
    ask for is fixed by it."""
    if device.type == "cuda" and all(_fits(layer.shape.k_dim, layer.shape.v_dim) for layer in layers):
        from baton.model.triton_attention import fuse_attention

        fuse_attention(model)


def kernels_cover(layer: PagedLayer) -> bool:
    return _fits(layer.k_cache.shape[-1], layer.v_cache.shape[-1])


def _fits(k_dim: int, v_dim: int) -> bool:
    return 0 < v_dim <= MAX_KERNEL_DIM and k_dim <= MAX_KERNEL_DIM
