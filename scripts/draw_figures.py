#!/usr/bin/env python3
"""Draw the figures of docs/concepts.md into docs/figures.

    scripts/draw_figures.py [--config FILE] [--output FOLDER]

The widths, layers and bytes are those of the configuration (default: the release); the masks are of a small one, in
which single cells can be seen. `hymba inspect --figures FOLDER` draws those of a checkpoint.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import yaml

from hymba import HymbaConfig
from hymba.analysis import drawings
from hymba.analysis.architecture import layer_memory, masks

ROOT = Path(__file__).resolve().parents[1]
LENGTH = 8192

# Windowed layers between three global ones, as in the release.
SMALL = {
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 5,
    "num_memory_tokens": 4,
    "sliding_window": 6,
    "global_attn_idx": [0, 2, 4],
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=ROOT / "configs" / "model" / "hymba-1.5b.yaml", help="YAML file")
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "figures", help="folder")
    options = parser.parse_args()

    config = HymbaConfig(**yaml.safe_load(options.config.read_text("utf-8")))
    figures = {
        "state": drawings.draw_state(config),
        "hybrid-head": drawings.draw_hybrid_head(config),
        "masks": drawings.draw_masks(masks(HymbaConfig(**SMALL), tokens=20), documents=[9, 11]),
        "layers": drawings.draw_layers(layer_memory(config, LENGTH), length=LENGTH, name=f"{options.config.stem}:"),
    }
    for path in drawings.save(figures, options.output, kinds=("svg",)):
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
