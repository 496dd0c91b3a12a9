"""int8 and int4 weights through transformers' `quantization_config`, with what is sensitive kept as it is.

    from hymba.quantization import quantization_config
    model = HymbaForCausalLM.from_pretrained(folder, quantization_config=quantization_config("int8"))

Weights are rounded while they are read; activations, the meta state and the cache stay in the model's dtype. Only the
large projections of the mixers and the MLPs are quantised. A_log, D, step-size biases, norms, the convolution, meta
tokens and embeddings are no linear layers and are never touched; the head and the two narrow projections of the Mamba
heads are left out by name (`KEEP`). docs/quantization.md has the measurements.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import importlib.util
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hymba.config import HymbaConfig
from hymba.hub import plain_tensors

KINDS = ("int8", "int4")
"""int8: one symmetric scale per output row. int4: scale and zero point per group of inputs."""

BACKENDS = ("torchao", "bitsandbytes")
GROUP_SIZES = (32, 64, 128)

KEEP = (r"lm_head", r".*\.x_proj", r".*\.dt_proj")
"""Linear layers that keep their dtype, as regular expressions over module names.

The head is tied to the embeddings. x_proj and dt_proj, through which step size, B and C of the selective scan go, are
2.5% of the weights, and few of their shapes fit the int4 kernels; rounding them costs little (docs/quantization.md).
"""

_FEW_ROWS = 4
"""Up to so many tokens the kernel that reads int8 codes is quicker than one that writes the weight out first."""
_CODES_AT_ONCE = 16
"""That kernel reads whole blocks of so many inputs: with another width it takes what lies behind the row."""


class QuantizationError(ValueError):
    """Weights that cannot be quantised, loaded or saved as asked; the message says what can."""


def quantization_config(
    kind: str,
    *,
    config: HymbaConfig | None = None,
    device: str | torch.device = "cpu",
    backend: str = "torchao",
    group_size: int = 32,
    keep: Sequence[str] = KEEP,
) -> Any:
    """What `from_pretrained(..., quantization_config=)` takes, for a Hymba model.

    Args:
        kind: `"int8"` or `"int4"`.
        config: of the model; with it, int4 refuses when no layer is of a width that the groups divide.
        device: where the model will run. int4 weights are laid out for one kind of device: load with
            `device_map={"": device}` for a GPU.
        backend: `"torchao"`, or on CUDA `"bitsandbytes"` (int8 with outliers in 16 bit; int4 as NF4).
        group_size: of torchao's int4: inputs that share scale and zero point: 32, 64 or 128. Layers whose input width
            it does not divide keep their dtype (`unquantised` names them).
        keep: modules to leave alone, as regular expressions over their names.

    Returns:
        a `transformers.TorchAoConfig` or `transformers.BitsAndBytesConfig`.

    Raises:
        QuantizationError: an unknown kind or backend, a group size that no kernel has.
        ImportError: the backend's package is not installed.
    """
    if kind not in KINDS:
        raise QuantizationError(f"quantization={kind!r}: allowed: {', '.join(KINDS)}")
    if backend not in BACKENDS:
        raise QuantizationError(f"backend={backend!r}: allowed: {', '.join(BACKENDS)}")
    where = torch.device(device).type
    if backend == "bitsandbytes":
        return _bitsandbytes(kind, where, keep)
    if importlib.util.find_spec("torchao") is None:
        raise ImportError(f"quantization={kind!r}: torchao is not installed; pip install 'hymba[quantization]'")
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    # torchao would also set inductor and the precision of float32 products for the whole process.
    if kind == "int8":
        quantiser: Any = Int8WeightOnlyConfig(set_inductor_config=False)
    else:
        if group_size not in GROUP_SIZES:
            raise QuantizationError(f"group_size={group_size}: allowed: {', '.join(map(str, GROUP_SIZES))}")
        if config is not None and not any(width % group_size == 0 for width in _input_widths(config)):
            raise QuantizationError(
                f"group_size={group_size}: divides the input width of no layer ({_widths_text(config)}); allowed: a "
                "group size that divides one, or int8, which needs none"
            )
        quantiser = _int4(where, group_size)
    return TorchAoConfig(quantiser, modules_to_not_convert=list(keep))


def completed(given: Any) -> Any:
    """The `quantization_config` that a user hands to `from_pretrained`, with `KEEP` where it names no modules.

    One that lists modules to leave alone, or names those to round one by one, stays as it is.

    Raises:
        QuantizationError: torchao's plain int4, which needs mslk (and a GPU), where that is missing.
    """
    quantiser = getattr(given, "quant_type", None)
    packing = getattr(getattr(quantiser, "int4_packing_format", None), "value", None)
    if _kind(quantiser) == "Int4WeightOnlyConfig" and packing == "plain" and importlib.util.find_spec("mslk") is None:
        raise QuantizationError(
            "quantization_config: torchao's Int4WeightOnlyConfig needs mslk and a GPU; allowed on this machine: "
            'hymba.quantization.quantization_config("int4"), or int8'
        )
    if _kind(quantiser).endswith("FqnToConfig") or getattr(given, "include_input_output_embeddings", False):
        return given
    for field in ("modules_to_not_convert", "llm_int8_skip_modules"):
        if hasattr(given, field) and getattr(given, field) is None:
            given = copy.copy(given)
            setattr(given, field, list(KEEP))
    return given


def _int4(device: str, group_size: int) -> Any:
    """torchao's configuration of int4 weights for one kind of device."""
    if device == "cpu":
        from torchao.prototype.quantization.int4.inference_workflow import PrototypeInt4WeightOnlyConfig

        # Half-quadratic quantisation has 3% less error in the weights and takes 80 times as long: 20 minutes for 1.5B.
        return PrototypeInt4WeightOnlyConfig(group_size=group_size, set_inductor_config=False)
    from torchao.quantization import Int4WeightOnlyConfig  # pragma: gpu

    return Int4WeightOnlyConfig(  # pragma: gpu
        group_size=group_size,
        int4_packing_format="tile_packed_to_4d",
        set_inductor_config=False,
    )


def _bitsandbytes(kind: str, device: str, keep: Sequence[str]) -> Any:
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ImportError("backend='bitsandbytes': bitsandbytes is not installed; pip install bitsandbytes")
    if device != "cuda":
        raise QuantizationError(f"backend='bitsandbytes' on {device}: allowed: cuda; torchao runs on any device")
    from transformers import BitsAndBytesConfig  # pragma: gpu

    if kind == "int8":  # pragma: gpu
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=list(keep))
    return BitsAndBytesConfig(  # pragma: gpu
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.bfloat16,
        llm_int8_skip_modules=list(keep),
    )


def _input_widths(config: HymbaConfig) -> list[int]:
    """Input widths of the projections that are quantised."""
    return [config.hidden_size, config.d_inner, config.intermediate_size]


def _widths_text(config: HymbaConfig) -> str:
    return ", ".join(map(str, _input_widths(config)))


@dataclass(frozen=True)
class Report:
    """What of a model is quantised.

    Attributes:
        quantised, unquantised: names of linear layers, in order. `unquantised` are those kept and those whose width
            the groups do not divide.
        bytes: of all parameters and buffers as they are stored, tied ones counted once.
        kinds: number of quantised layers by class of weight or module.
    """

    quantised: tuple[str, ...]
    unquantised: tuple[str, ...]
    bytes: int
    kinds: dict[str, int]


def report(model: nn.Module) -> Report:
    """Say which linear layers of a model are quantised, and what its weights take up."""
    quantised, unquantised, kinds = [], [], dict[str, int]()
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear):
            continue
        weight = type(module.weight)
        kind = type(module) if weight in (nn.Parameter, Tensor) else weight
        if kind is nn.Linear:
            unquantised.append(name)
        else:
            quantised.append(name)
            kinds[kind.__name__] = kinds.get(kind.__name__, 0) + 1
    return Report(tuple(quantised), tuple(unquantised), weight_bytes(model), kinds)


def weight_bytes(model: nn.Module) -> int:
    """Bytes of parameters and buffers as they are stored: codes, scales and zero points of quantised ones."""
    parts = {}
    for tensor in (*model.parameters(), *model.buffers()):
        for part in plain_tensors(tensor):
            parts[part.data_ptr(), part.nbytes] = part.nbytes
    return sum(parts.values())


def method(config: Any) -> str | None:
    """Name of the quantiser (`"torchao"`) whose weights a configuration's checkpoint holds; `None` for plain ones."""
    given = getattr(config, "quantization_config", None)
    if given is None:
        return None
    named = given.get("quant_method") if isinstance(given, dict) else getattr(given, "quant_method", None)
    return str(getattr(named, "value", named))


def require(method: str | None) -> None:
    """Refuse files of a quantiser whose package is missing.

    Raises:
        ImportError: says what to install.
    """
    if method == "torchao" and importlib.util.find_spec("torchao") is None:
        raise ImportError(
            "the checkpoint's weights are quantised by torchao, which is not installed; "
            "pip install 'hymba[quantization]'"
        )


class Int8Linear(nn.Linear):
    """A linear layer over torchao's int8 weight, quick for single tokens in 16 bit on a CPU.

    torchao's own product writes the whole weight out in the activations' dtype first, which takes twice as long as
    the product with a bfloat16 weight; oneDNN's reads the codes, in a fifth to a half of that time. Long inputs,
    gradients and GPUs take torchao's.
    """

    def forward(self, x: Tensor) -> Tensor:
        weight: Any = self.weight
        if x.dtype is not torch.bfloat16 or x.device.type != "cpu" or not self._takes(x, weight):
            return super().forward(x)
        scale = weight.scale.flatten().to(x.dtype)
        y = torch.ops.aten._weight_int8pack_mm(x.reshape(-1, x.shape[-1]).contiguous(), weight.qdata, scale)
        y = y.view(*x.shape[:-1], y.shape[-1])
        return y if self.bias is None else y + self.bias

    @staticmethod
    def _takes(x: Tensor, weight: Any) -> bool:
        return (
            0 < x.numel() <= _FEW_ROWS * x.shape[-1]
            and x.shape[-1] % _CODES_AT_ONCE == 0
            and _kind(weight) == "Int8Tensor"
            and weight.scale.numel() == weight.shape[0]
            and weight.act_quant_kwargs is None
            and weight.act_pre_scale is None
            and not (torch.is_grad_enabled() and x.requires_grad)
            and not torch.compiler.is_compiling()
        )


# Files.


@contextlib.contextmanager
def saveable(model: Any) -> Iterator[None]:
    """A scope in which transformers can save a model whose weights torchao has quantised; others pass through.

    int4 weights for the CPU, whose layout depends on the processor, stand in torchao's plain layout (`Int4Tensor`)
    inside, with the same codes, scales and zero points. Nothing else of the model changes.
    """
    if method(model.config) != "torchao":
        yield
        return
    held: list[tuple[nn.Module, nn.Parameter]] = []
    conversions = getattr(model, "_weight_conversions", None)
    config = model.hf_quantizer.quantization_config
    quantiser = config.quant_type
    try:
        for module in model.modules():
            weight = module._parameters.get("weight")
            if _kind(weight) == "Int4OpaqueTensor":
                held.append((module, weight))
                module._parameters["weight"] = nn.Parameter(_to_plain(weight), requires_grad=False)
        if held:
            from torchao.quantization import Int4WeightOnlyConfig

            config.quant_type = Int4WeightOnlyConfig(group_size=quantiser.group_size, set_inductor_config=False)
        if conversions is not None:
            # How torchao's tensors were put together while loading has no inverse; saving takes them apart by itself.
            model._weight_conversions = [entry for entry in conversions if _has_inverse(entry)]
        yield
    finally:
        for module, weight in held:
            module._parameters["weight"] = weight
        _order.cache_clear()
        config.quant_type = quantiser
        if conversions is not None:
            model._weight_conversions = conversions


def _has_inverse(conversion: Any) -> bool:
    try:
        conversion.reverse_transform()
    except NotImplementedError:
        return False
    return True


def settle(model: nn.Module) -> None:
    """Give weights that torchao has quantised or read the form in which this machine runs them best.

    On a CPU, int4 weights in torchao's plain layout are laid out for its kernel, and int8 layers get a kernel for
    single tokens.

    Raises:
        QuantizationError: weights that were laid out for a GPU are on a CPU, or plain ones on a GPU without mslk.
    """
    for name, module in model.named_modules():
        weight = module._parameters.get("weight")
        kind = _kind(weight)
        if kind == "Int4TilePackedTo4dTensor" and weight is not None and weight.device.type == "cpu":
            raise QuantizationError(
                f"{name}: int4 weights that were saved on a GPU run on GPUs only; allowed: a GPU "
                '(device_map={"": "cuda"}), or quantise the original checkpoint here'
            )
        if kind == "Int8Tensor" and type(module) is nn.Linear:
            module.__class__ = Int8Linear
        if kind != "Int4Tensor" or weight is None:
            continue
        if weight.device.type == "cpu":
            module._parameters["weight"] = nn.Parameter(_to_packed(weight), requires_grad=False)
        elif importlib.util.find_spec("mslk") is None:  # pragma: gpu
            raise QuantizationError(
                f"{name}: int4 weights in torchao's plain layout need mslk on a GPU; allowed: pip install mslk, or "
                "quantise the original checkpoint on the GPU"
            )


def _kind(thing: Any) -> str:
    return type(thing).__name__


@functools.lru_cache(maxsize=4)
def _order(rows: int, columns: int) -> Tensor:
    """Where each code of a packed (rows, columns) int4 matrix comes from: flat indices, (rows * columns,) int64.

    The kernel's layout is a permutation that PyTorch does not document. It is found by packing the digits of the
    indices themselves, four bits at a time.
    """
    index = torch.arange(rows * columns)
    found = torch.zeros_like(index)
    for shift in range(0, max(1, (rows * columns - 1).bit_length()), 4):
        digit = ((index >> shift) & 15).to(torch.int32).view(rows, columns)
        found |= _nibbles(torch.ops.aten._convert_weight_to_int4pack_for_cpu(digit, 1)).long() << shift
    return found


def _nibbles(packed: Tensor) -> Tensor:
    """The two codes of each byte, low one first, flat."""
    flat = packed.reshape(-1).view(torch.uint8)
    return torch.stack((flat & 15, flat >> 4), dim=-1).reshape(-1)


def _to_plain(weight: Any) -> Tensor:
    """torchao's `Int4Tensor` with the codes, scales and zero points of an `Int4OpaqueTensor`."""
    from torchao.quantization import Int4Tensor

    rows, columns = weight.shape
    codes = torch.empty(rows * columns, dtype=torch.uint8)
    codes[_order(rows, columns)] = _nibbles(weight.qdata)
    # Signed codes in two's complement, as that class has them: 8 less, which flips the highest of four bits.
    codes = codes.view(rows, columns) ^ 8
    packed = codes[:, ::2] | (codes[:, 1::2] << 4)
    scale, zero = (part.contiguous() for part in weight.scale_and_zero.unbind(-1))
    return Int4Tensor(packed.view(torch.int8), scale, zero, list(weight.block_size), weight.shape)


def _to_packed(weight: Any) -> Tensor:
    """The inverse of `_to_plain`, in this CPU's layout."""
    from torchao.prototype.quantization.int4.int4_opaque_tensor import Int4OpaqueTensor

    rows, columns = weight.shape
    codes = (_nibbles(weight.qdata).view(rows, columns) ^ 8).to(torch.int32)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
    scale_and_zero = torch.stack((weight.scale, weight.zero_point), dim=-1).contiguous()
    return Int4OpaqueTensor(packed, scale_and_zero, list(weight.block_size), weight.shape)
