"""Triton kernels. Importing this package imports no Triton; `lnpu_torch.ops` imports what it needs."""
