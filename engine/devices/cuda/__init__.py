"""CUDA as a device. Importing its modules loads Triton."""
