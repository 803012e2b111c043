"""miinb: make Hugging Face models fast, serve them from a notebook, and show the gain."""

__version__ = "0.1.0"
