"""Check that nothing goes silently wrong: `make trust`, or `python -m benchmarks.trust`."""
