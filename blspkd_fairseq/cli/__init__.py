"""The command ``blspkd``: a module for each of its commands, imported when it is asked for."""


def sentence(error: Exception) -> str:
    """What a command says of an error."""
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return str(error) or type(error).__name__
