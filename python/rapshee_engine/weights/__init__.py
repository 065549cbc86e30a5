"""Checkpoint files: headers are parsed here, bytes are read and repacked by the native module."""
