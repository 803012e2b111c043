"""Operators: one a file, a Triton kernel for GPUs and a PyTorch reference elsewhere behind one wrapper."""
