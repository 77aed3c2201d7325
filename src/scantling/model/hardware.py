"""What the machine can do, and how to get it: precision, memory, peak speed, a line that describes it."""

from __future__ import annotations

import ctypes
import os
import platform
import re
import time

import torch

from scantling.model.linear import linear
from scantling.model.processors import has_bfloat16

LIGHTNING_PRECISION = {"fp32": "32-true", "bf16": "bf16-mixed", "fp16": "16-mixed", "fp8": "bf16-mixed"}


def device_of(accelerator: str) -> torch.device:
    """The kind of device a run will use. Raises ValueError when a GPU is asked for and there is none."""
    if accelerator == "gpu" and not torch.cuda.is_available():
        raise ValueError("trainer=gpu, but PyTorch finds no CUDA device here: use trainer=cpu")
    use_gpu = accelerator != "cpu" and torch.cuda.is_available()
    return torch.device("cuda" if use_gpu else "cpu")


def resolved_precision(precision: str, device: torch.device) -> str:
    """One of `LIGHTNING_PRECISION`; `auto` is bf16 where the hardware has instructions for it, else fp32."""
    if precision == "auto":
        if device.type == "cuda":
            return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
        return "bf16" if has_bfloat16() else "fp32"
    if precision not in LIGHTNING_PRECISION:
        raise ValueError(
            f"trainer.precision={precision} is unknown: use auto, {', '.join(LIGHTNING_PRECISION)}"
        )
    if precision == "fp16" and device.type == "cpu":
        raise ValueError("trainer.precision=fp16 needs a GPU: use bf16 or fp32 on the CPU")
    return precision


def ran_out_of_memory(error: BaseException) -> bool:
    """Whether memory was refused: by CUDA's allocator, by PyTorch's on the CPU, or by C++ itself."""
    said = ("DefaultCPUAllocator", "std::bad_alloc", "CUDA out of memory")
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(text in str(error) for text in said)


def keep_freed_memory() -> None:
    """Let glibc keep freed blocks instead of handing them back to the kernel.

    A training step frees and asks again for the same hundreds of megabytes, and every return costs
    a page fault per 4 KiB: `benchmarks/throughput.py --plain-malloc` shows how much. With another
    C library it does nothing.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL("libc.so.6")
        M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3
        libc.mallopt(M_MMAP_THRESHOLD, 2**30)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
        libc.mallopt(M_TOP_PAD, 2**26)


def describe(device: torch.device) -> str:
    """The device in words, for a run's record: GPU × number, or the CPU's model and PyTorch's threads."""
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name()} × {torch.cuda.device_count()}"
    return f"{cpu_name()}, {torch.get_num_threads()} threads"


def cpu_name() -> str:
    """The model name that Linux gives, else what Python knows of the processor."""
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.split(":")[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


SPEC_SHEET_FLOPS = {
    "B200": 2250e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "A10G": 70e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
    "V100": 125e12,
}
"""Dense bf16 (V100: fp16) matrix FLOP/s with float32 accumulation, from NVIDIA's data sheets."""


def peak_flops(device: torch.device, half_precision: bool) -> tuple[float, str]:
    """FLOP/s that a model FLOPs utilisation is stated against, and where the number comes from.

    For listed GPUs in half precision it is the data sheet's; elsewhere a product of square matrices is
    measured here, of side 8192 on a GPU and 2048 on a CPU: the best of four, or of those that begin within
    a second.
    """
    n = 2048
    if device.type == "cuda":
        n, device = 8192, torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        if half_precision:
            name = torch.cuda.get_device_name(device)
            for model, flops in SPEC_SHEET_FLOPS.items():
                if re.search(rf"\b{model}\b", name):
                    return flops, f"{model} data sheet, dense bf16"
    dtype = torch.bfloat16 if half_precision else torch.float32
    a = torch.ones(n, n, dtype=dtype, device=device)
    best, first = float("inf"), time.perf_counter()
    for _ in range(4):
        start = time.perf_counter()
        if start - first > 1:
            break
        linear(a, a)[0, 0].item()
        best = min(best, time.perf_counter() - start)
    return 2 * n**3 / best, f"{n}³ matrix product measured here, {dtype}".replace("torch.", "")
