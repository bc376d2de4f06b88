"""What is learned offline, from signals of the frozen LLM: nothing here runs at query time."""
