"""Encoder tasks in the frontend: texts to token ids, a model's numbers to answers. One module a task."""
