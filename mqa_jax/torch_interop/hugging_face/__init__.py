"""Hugging Face models: what a config says of attention, and one layer of a checkpoint on disk."""
