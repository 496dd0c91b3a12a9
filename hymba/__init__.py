"""Hymba in PyTorch: attention heads and Mamba heads in parallel, meta tokens, shared keys and values.

Importing the package registers it with transformers' Auto classes, so that a checkpoint in the released layout loads
through them without remote code.
"""

from hymba import _notices
from hymba.cache import HymbaCache
from hymba.config import HymbaConfig
from hymba.hub import register
from hymba.model import HymbaForCausalLM, HymbaModel

assert _notices
__version__ = "0.1.0"
__all__ = ["HymbaCache", "HymbaConfig", "HymbaForCausalLM", "HymbaModel", "__version__"]

register(HymbaConfig, HymbaModel, HymbaForCausalLM)
