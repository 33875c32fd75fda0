"""Baton: disaggregated prefill/decode serving for Hugging Face causal language models.

`from baton import LLM, SamplingParams` is the engine in this process. Torch is imported when LLM is asked for and not
before, because the router imports this package and has no torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from baton.llm import LLM, RequestOutput
    from baton.request import SamplingParams

__version__ = "0.1.0"
__all__ = ["LLM", "RequestOutput", "SamplingParams"]

_MODULES = {"LLM": "baton.llm", "RequestOutput": "baton.llm", "SamplingParams": "baton.request"}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return getattr(importlib.import_module(_MODULES[name]), name)
    except ModuleNotFoundError as error:
        if error.name is not None and error.name.startswith("baton"):
            raise
        raise ImportError(f"{name} needs {error.name}: pip install 'baton-llm[worker]'") from error
