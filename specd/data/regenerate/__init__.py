"""Answers by the target itself: in this process, or at a server that speaks OpenAI's API."""
