"""Fine-tuning on TRL and PEFT: SFT and DPO, whole or with adapters (`hymba finetune`).

Importing this package imports neither TRL nor PEFT.
"""

from hymba.adapters import PROJECTIONS


def default_target_modules() -> list[str]:
    """The linear layers that an adapter is put on by default: every projection of the mixers and the MLP.

    `peft.LoraConfig(task_type="CAUSAL_LM")` without `target_modules` takes the same ones for a model of this library.
    """
    return list(PROJECTIONS)


__all__ = ["default_target_modules"]
