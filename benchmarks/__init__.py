"""Benchmarks of routehead_plugins, run as modules from the root of the repository."""
