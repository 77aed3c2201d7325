"""What the processor is: kernels are chosen by it, and by nothing else that is known of a machine."""

from __future__ import annotations

import re
from typing import Literal, get_args

import torch

Processor = Literal["amx", "zen4", "zen5", "other"]
"""`amx`: an Intel Xeon that multiplies tiles of bfloat16. `zen4`, `zen5`: AMD's with AVX-512, which is
256 bits wide inside of Zen 4. `other`: any without these.
"""

PROCESSORS: tuple[Processor, ...] = get_args(Processor)


def detect_processor() -> Processor:
    """Asked of PyTorch, which obeys ATEN_CPU_CAPABILITY, and of Linux."""
    if torch.cpu._is_amx_tile_supported():
        return "amx"
    if not torch.backends.mkldnn.is_available() or torch.backends.cpu.get_cpu_capability() != "AVX512":
        return "other"
    try:
        with open("/proc/cpuinfo") as file:
            facts = dict(re.findall(r"^(vendor_id|cpu family)\s*: (\w+)$", file.read(), re.MULTILINE))
    except OSError:
        return "other"
    if facts.get("vendor_id") != "AuthenticAMD":
        return "other"
    return "zen4" if facts["cpu family"] == "25" else "zen5"


HERE: Processor = detect_processor()
"""Asked once, for the compiler cannot trace the questions. Only tests put another in its place."""


def has_bfloat16() -> bool:
    """Whether it has instructions that multiply numbers in bfloat16."""
    return HERE != "other" or torch.cpu._is_avx512_bf16_supported()
