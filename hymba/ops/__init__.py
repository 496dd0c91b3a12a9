"""Sequence operations: a plain PyTorch reference and faster versions of each, behind one seam (`ops.backend`)."""

from .backend import BackendError, available, use_backend
from .causal_conv1d import causal_conv1d, causal_conv1d_ref, causal_conv1d_update
from .selective_scan import selective_scan, selective_scan_ref, selective_state_update
from .ssd import ssd_scan, ssd_scan_ref, ssd_state_update

__all__ = [
    "BackendError",
    "available",
    "causal_conv1d",
    "causal_conv1d_ref",
    "causal_conv1d_update",
    "selective_scan",
    "selective_scan_ref",
    "selective_state_update",
    "ssd_scan",
    "ssd_scan_ref",
    "ssd_state_update",
    "use_backend",
]
