"""Measurements of time, each a module that prints ratios from interleaved runs."""
