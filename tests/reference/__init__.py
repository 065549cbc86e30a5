"""Oracles and file writers for tests: numpy only, written without the engine's code."""
