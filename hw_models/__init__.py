"""What a network would cost on a device. So far: measured on the CPU of this machine (`hw_models.latency.measure_latency`)."""
