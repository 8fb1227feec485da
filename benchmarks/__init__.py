"""Benchmarks of sksoup: ``python -m benchmarks`` lists them."""
