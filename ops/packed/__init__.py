"""Packed weights, one file per format; import them from `ops.formats`."""
