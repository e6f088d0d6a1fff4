"""What a user can do wrong."""


class BenchError(Exception):
    """A request that cannot be carried out; the message is one line for the user."""
