"""The choice of a kernel for attention, against the conditions written out one by one, for each processor."""

import itertools

import pytest
import torch

from scantling.model.kernels import choose_kernel

H, K, E = 4, 2, 16


def choice(processor, *, T, S, B=2, dtype=torch.float32, device="cpu", **facts):
    usual = {"plain": True, "softcap": None, "cached": False, "dropout": 0.0} | facts
    q, k = torch.Size((B, H, T, E)), torch.Size((B, K, S, E))
    return choose_kernel(q, k, dtype, device, processor=processor, **usual)


def test_of_each_processor_the_kernels_of_a_whole_sequence(processor):
    """Up to 64 keys the formula, but on Zen 4; in bfloat16 without AMX up to 8·E queries too, then a cast."""
    for T in (2, 64, 65, 8 * E, 8 * E + 1, 1024):
        in_float32 = "formula" if T <= 64 and processor != "zen4" else "sdpa"
        assert choice(processor, T=T, S=T) == in_float32
        if processor == "amx":
            in_bfloat16 = "formula" if T <= 64 else "sdpa"
        else:
            in_bfloat16 = "formula" if T <= 8 * E else "sdpa in float32"
        assert choice(processor, T=T, S=T, dtype=torch.bfloat16) == in_bfloat16


def test_of_each_processor_the_kernels_of_one_more_token(processor):
    """The formula for many rows; in bfloat16 always without AMX."""
    for dtype, many in ((torch.float32, 2**19), (torch.bfloat16, 2**16)):
        always = dtype == torch.bfloat16 and processor != "amx"
        for B in (many // (K * 32 * E), many // (K * 32 * E) + 1):
            expected = "formula" if always or many < B * K * 32 * E else "sdpa"
            assert choice(processor, T=1, S=32, B=B, dtype=dtype, cached=True) == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_cap_is_written_out_and_a_gpu_asks_no_processor(processor, dtype):
    for T, plain, cached, dropout in itertools.product(
        (1, 32, 999), (True, False), (True, False), (0.0, 0.1)
    ):
        facts = {"T": T, "S": 999 if cached else T, "dtype": dtype, "cached": cached, "dropout": dropout}
        assert choice(processor, **facts, plain=False, softcap=3.0) == "formula"
        bare = plain or cached or dropout > 0
        assert choice(processor, **facts, device="cuda", plain=plain) == ("sdpa" if bare else "flex")
        capped = choice(processor, **facts, device="cuda", plain=False, softcap=3.0)
        assert capped == ("formula" if cached or dropout else "flex")
        assert choice(processor, **facts, device="meta", plain=plain) == "sdpa"
