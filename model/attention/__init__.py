"""Attention of both towers: masks of packed rows, T5's relative bias, and the kernels."""
