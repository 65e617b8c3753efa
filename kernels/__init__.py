"""Triton kernels. Importing this package imports no Triton; `lnpu_torch.ops.quantize.torch_ops` imports what it needs."""
