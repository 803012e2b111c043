"""The default models and the two-command demonstration."""
