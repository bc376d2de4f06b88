"""Time per query and peak memory of every way to re-rank with an LLM."""
