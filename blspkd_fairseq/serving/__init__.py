"""An OpenAI-compatible server of a trained model. Needs the extra ``serve``."""
