"""Triton kernels and their plain-torch reference; one operation a file, torch and triton alone."""
