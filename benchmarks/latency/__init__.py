"""Parts of `python -m benchmarks.latency_accuracy`: the networks, their records, the splits (`splits`), the scores (`tables`)."""
