"""The extension of flash-attn 2, which its Python functions call."""
