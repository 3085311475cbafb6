"""Metrics: no model is imported here."""
