"""Hugging Face models: attention settings from a config, and single layers of a checkpoint on disk."""
