"""Parts of `python -m benchmarks.cpu_kernels`: the rows (`layers`), the engines, the clock (`protocol`), the tables (`report`)."""
