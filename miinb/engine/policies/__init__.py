"""Injection policies: one file a model family, data and name maps only."""
