"""Target backends: the frozen LLM whose hidden states specd serves."""
