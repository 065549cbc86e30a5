"""Endpoints, one family a module."""
