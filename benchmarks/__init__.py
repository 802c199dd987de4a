"""Scripts that measure krea_local; run them as `python -m benchmarks.NAME`."""
