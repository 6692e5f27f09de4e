"""Serving engines to others: the OpenAI-compatible HTTP server. Needs the extra ``serve``."""
