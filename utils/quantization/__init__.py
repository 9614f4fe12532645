"""Quantization parameters, quantizers, recipes, and quantized networks as files."""
