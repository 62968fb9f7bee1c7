"""This machine's peak, which every figure of the benchmark stands beside; it is measured in `hw_models.roofs`."""

from hw_models.roofs import fma_peak_gflops

__all__ = ["fma_peak_gflops"]
