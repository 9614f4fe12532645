"""Grids, quantizers, recipes, and quantized networks as files."""
