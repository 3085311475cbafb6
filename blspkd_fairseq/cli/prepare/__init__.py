"""Corpora to manifests: a module for each layout."""
