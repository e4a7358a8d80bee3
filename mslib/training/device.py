"""Where a network is computed, in which precision, and how its tensors lie in memory."""

import os
from contextlib import ExitStack

import torch
from torch import nn


def pick_device(device: str | torch.device = "auto") -> torch.device:
    """The device of that name. "auto": a GPU for each process of this machine, or the CPU."""
    if device != "auto":
        return torch.device(device)
    here = int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # processes that torchrun started here
    if torch.cuda.is_available() and torch.cuda.device_count() >= here:
        return torch.device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}")
    return torch.device("cpu")


def pick_precision(
    precision: str, device: torch.device, model: nn.Module, example: torch.Tensor
) -> str:
    """ "bf16" or "fp32". "auto" is bf16 where the device computes in it: GPUs, AVX-512 BF16, AMX.

    Not on a CPU where a strided convolution reads a map of one pixel: its bf16 gradients hold
    rubbish (seen in torch 2.15). `example`: float [1, C, H, W]. ValueError for another precision.
    """
    if precision not in ("auto", "bf16", "fp32"):
        raise ValueError(f"unknown precision {precision!r}; known: auto, bf16, fp32")
    if precision != "auto":
        return precision
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    bf16 = _cpu_computes_in_bf16() and not _strides_over_one_pixel(model, example)
    return "bf16" if bf16 else "fp32"


def _cpu_computes_in_bf16() -> bool:
    """Whether the processor does, and oneDNN: held to AVX2, that leaves bf16 to a slow loop."""
    on = torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled  # that is oneDNN
    known = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)()
    return known and on and torch.ops.mkldnn._is_mkldnn_bf16_supported()


@torch.no_grad()
def _strides_over_one_pixel(model, example):
    found: list[bool] = []
    with ExitStack() as stack:
        stack.callback(model.train, model.training)
        for m in model.modules():
            if isinstance(m, nn.Conv2d) and max(m.stride) > 1 and max(m.kernel_size) > 1:
                look = lambda _, inputs: found.append(min(inputs[0].shape[2:]) == 1)  # noqa: E731
                stack.enter_context(m.register_forward_pre_hook(look))
        # the network itself on the real image: it may branch on what it sees
        model.eval()(example.to(next(model.parameters()).device))
    return any(found)


def pick_layout(model: nn.Module, device: torch.device, precision: str) -> torch.memory_format:
    """Channels last; contiguous for bf16 on a CPU with widths that are no multiples of 8.

    Those oneDNN pads in its own layout only. Measured on two cores, ResNet-56 at batch 128:
    channels last 338 images/s against 299; pruned to odd widths, 337 against 438.
    """
    odd = any(m.out_channels % 8 for m in model.modules() if isinstance(m, nn.Conv2d))
    if odd and precision == "bf16" and device.type == "cpu":
        return torch.contiguous_format
    return torch.channels_last
