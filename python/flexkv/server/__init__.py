"""The engine's side of a node: its workers' memory, and clients of a daemon."""
