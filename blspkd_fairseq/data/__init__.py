"""Manifests, audio, prompts and chat formats: nothing in this folder imports a model."""
