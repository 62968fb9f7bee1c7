"""One-shot searches: supernets that hold all architectures of a space at once, and what trains them.

Start with `supernet.Supernet`, `algorithm.Algorithm` and `darts.Darts`.
"""
