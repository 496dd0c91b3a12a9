"""Hymba in PyTorch: attention heads and Mamba heads in parallel, meta tokens, shared keys and values.

Importing the package registers it with transformers' Auto classes, so that a checkpoint in the released layout loads
through them without remote code.
"""

import sys
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["HymbaCache", "HymbaConfig", "HymbaForCausalLM", "HymbaModel", "__version__"]

# The `hymba` command imports this file on its way to every subcommand, `--help` included, and torch takes seconds.
# It says itself when it wants the classes; everybody else has them, registered, from the import on.
_is_command = PurePath((getattr(sys, "argv", None) or [""])[0]).stem == "hymba" and "torch" not in sys.modules

if TYPE_CHECKING or not _is_command:
    from hymba.cache import HymbaCache
    from hymba.config import HymbaConfig
    from hymba.hub import register
    from hymba.model import HymbaForCausalLM, HymbaModel

    register()
else:

    def __getattr__(name: str) -> Any:
        if name not in __all__:
            raise AttributeError(f"module 'hymba' has no attribute {name!r}")
        from hymba import cache, config, hub, model

        hub.register()
        globals().update(
            HymbaCache=cache.HymbaCache,
            HymbaConfig=config.HymbaConfig,
            HymbaForCausalLM=model.HymbaForCausalLM,
            HymbaModel=model.HymbaModel,
        )
        return globals()[name]
