"""The systems that an evaluation puts side by side, and their answers."""
