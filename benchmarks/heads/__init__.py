"""Ranking quality of every way to choose heads."""
