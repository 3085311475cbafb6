"""A page to speak to a model, see what it hears, and read its answers. Served beside the API; asks no other machine."""
