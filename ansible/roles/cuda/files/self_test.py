"""Does torch compute right on every GPU of this host? Exit code 1 and a last line why not.

Reads nothing, writes nothing; runs in the training environment. An import proves nothing:
kernels are looked up when they are launched.
"""

import sys

import bitsandbytes.functional
import torch


def check(index):
    """Return why GPU `index` cannot be used, or None."""
    name = torch.cuda.get_device_name(index)
    major, minor = torch.cuda.get_device_capability(index)
    codes = [arch.partition("_")[2] for arch in torch.cuda.get_arch_list()]
    numbers = [(int(code[:-1]), int(code[-1])) for code in codes if code.isdigit()]
    if not any(code[0] == major and code[1] <= minor for code in numbers):
        return f"{name}: no code for compute capability {major}.{minor} in {' '.join(codes)}"
    torch.manual_seed(0)
    left, right = torch.randn(256, 512), torch.randn(512, 128)
    expected = left @ right
    kinds = [torch.float32, torch.float16]
    # Emulated and slow before Ampere, and not used there.
    kinds += [torch.bfloat16] if major >= 8 else []
    for kind in kinds:
        ours = left.to(index, kind).requires_grad_()
        product = ours @ right.to(index, kind)
        product.float().pow(2).sum().backward()
        if far(product.detach(), expected):
            return f"{name}: a product in {kind} is wrong"
        if far(ours.grad, 2 * expected @ right.T):
            return f"{name}: a gradient in {kind} is wrong"
    quantized = bitsandbytes.functional.quantize_4bit(right.to(index), quant_type="nf4")
    if far(bitsandbytes.functional.dequantize_4bit(*quantized), right, limit=0.2):
        return f"{name}: bitsandbytes' 4-bit numbers are wrong"
    return None


def far(found, expected, limit=0.05):
    """Tell whether the largest difference is more than `limit` of the largest value."""
    difference = (found.float().cpu() - expected).abs().max() / expected.abs().max()
    return not difference < limit  # NaN is far


def check_together(count):
    """Return why several GPUs cannot work together, or None."""
    ones = [torch.ones(1024, device=index) for index in range(count)]
    torch.cuda.nccl.all_reduce(ones)
    if any(bool((tensor != count).any()) for tensor in ones):
        return f"NCCL adds up wrongly over {count} GPUs"
    return None


def main():
    """Return why not, or None."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if count == 0:
        return "torch sees no GPU though nvidia-smi does"
    for index in range(count):
        why = check(index)
        if why:
            return why
    return check_together(count) if count > 1 else None


sys.exit(main())
