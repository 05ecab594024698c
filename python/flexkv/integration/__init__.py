"""Adapters for inference engines, one package each. Nothing is imported before it is asked for."""
