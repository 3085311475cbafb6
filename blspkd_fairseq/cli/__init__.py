"""The command ``blspkd``: a module for each of its commands, imported when it is asked for."""
