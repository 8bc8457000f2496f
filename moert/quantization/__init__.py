"""Weights in fewer bits: the packed layouts that kernels read, and how they are made."""
