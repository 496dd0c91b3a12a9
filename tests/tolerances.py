"""How close is equal: every tolerance of the suite, with what it bounds. None is loosened to make a test pass."""

# Against the reference implementation's numbers (tests/parity/golden/README.md), float32.
LOGITS = 1e-4
"""Largest absolute difference of logits and hidden states."""
LOSS = 1e-5
"""Relative difference of the loss."""
GRADIENT = 1e-3
"""||g - ref|| / ||ref|| of a gradient."""

# Of the model against itself on another way to the same numbers.
FLOAT64 = 1e-9
"""Largest absolute difference of hidden states in float64: the ways differ in the order of sums only."""
FLOAT64_LOGITS = 1e-5
"""The same of logits, which are float32 whatever the weights are."""
FLOAT32 = 1e-4
"""Largest absolute difference of logits in float32."""
FLOAT64_GRADIENT = 1e-8
"""||g - g'|| / ||g'|| in float64."""
BFLOAT16 = 0.12
"""Largest absolute difference of bfloat16 logits of unit scale: roundings that fall differently, layer after layer."""
OPERATOR = 1e-5
"""Largest difference between the scan's operator times its inputs and its output, float32, over the largest output (or
1 where that is smaller)."""

RELATIVE = 1e-4
"""||a - b|| / ||b|| of float32 logits of whatever scale on two ways through one quantised model."""
BFLOAT16_RELATIVE = 0.04
"""The same in bfloat16, whose roundings fall differently; `GPU_BFLOAT16` says what they come to."""
QUANTISED = {"int8": 0.06, "int4": 0.6}
"""||got - want|| / ||want|| of logits of a small random model, quantised against plain: a weight is off by 1/250 of the
largest of its row, or by up to 1/30 of its group's range, and every layer adds its own. Trained weights do better."""
PARALLEL = 2e-4
"""Relative difference of a training's losses and gradient norms between one process and several (DDP, FSDP2) over some
steps in float32: gradients are added in another order, and AdamW divides by their size."""

BFLOAT16_PARALLEL = 5e-3
"""The same under bfloat16 autocast, whose roundings DDP and FSDP2 share."""

# On a GPU (tests/gpu). TF32 is off, so float32 differs from the CPU by the order of sums only.
GPU_LOGITS = 2e-4
"""Largest absolute difference of logits and hidden states from the reference implementation's, float32."""
GPU_BFLOAT16 = 0.04
"""||got - want|| / ||want|| of bfloat16 logits against the reference implementation's float32 ones. The plain PyTorch
path in bfloat16 on a CPU measures 0.014, 0.017, 0.018 and 0.024 on the four golden cases."""
GPU_RELATIVE = 1e-4
"""||got - want|| / ||want|| of float32 logits on two ways through a model of the released width."""
AS_GOOD_AS_PLAIN = 1.25
"""Distance of bfloat16 logits from float32 ones, over the distance of the plain PyTorch path in bfloat16."""
