"""Serves exported folders on CPUs with low-bit kernels; `quant.load` and `python -m quant generate` lead here."""
