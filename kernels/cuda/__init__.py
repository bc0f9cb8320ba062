"""The Triton kernels that a step launches, one operation a file."""
