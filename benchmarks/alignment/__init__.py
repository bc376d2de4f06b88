"""Training of the adapter for the embedded LLM, and its quality."""
