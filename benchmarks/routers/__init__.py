"""Gain in ranking quality from choosing heads per query."""
