"""A page where one speaks, sees what is heard, and reads the answers. Served beside the API; asks no other machine."""
