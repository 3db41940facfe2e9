"""Measured times of one GPU of each card in ms, for the planner; None: not measured.

Made by `python -m bench.report --times` from the newest file of each card in bench/results, not by hand.
steps: one block-step with a full ring by what is in FP8, as a whole, captured, and by part, launch by launch
(products with text and sound, self-attention, element-wise kernels, the rest); measured: else the whole is
that of a line less its video. The 14B model at 704x384.
"""

from __future__ import annotations

from typing import Any

NEWEST = "h200"  # the card with the latest results
CARDS: dict[str, dict[str, Any]] = {
    "h100": {
        "model": "NVIDIA H100 80GB HBM3",
        "memory": 85017493504,
        "results": "h100-2026-11-24",
        "steps": {
            "": {"whole_ms": 199.97, "parts_ms": (118.97, 68.566, 12.422, 2.7513), "measured": True},
            "products": {"whole_ms": 146.36, "parts_ms": (63.958, 66.424, 16.063, 5.2386), "measured": True},
            "all": {"whole_ms": 166.06, "parts_ms": (63.077, 87.133, 16.552, 3.4958), "measured": True},
        },
        "vae_ms": None,
        "encode_ms": None,
        "prefill_ms": None,
        "prime_ms": None,
    },
    "h200": {
        "model": "NVIDIA H200",
        "memory": 150109880320,
        "results": "h200-2026-11-28",
        "steps": {
            "": {"whole_ms": 201.9, "parts_ms": (116.77, 67.733, 10.013, 2.6449), "measured": True},
            "products": {"whole_ms": 146.98, "parts_ms": (59.032, 67.733, 14.981, 2.3317), "measured": False},
            "all": {"whole_ms": 142.17, "parts_ms": (59.032, 67.119, 14.981, 2.3317), "measured": True},
        },
        "vae_ms": 98.206,
        "encode_ms": 321.0,
        "prefill_ms": None,
        "prime_ms": 140.0,
    },
}
