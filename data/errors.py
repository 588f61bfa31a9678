"""What goes wrong with the user's text, tokenizer or prepared data."""


class DataError(ValueError):
    """A sentence for the user: what was given, what is possible and which config key to change.

    The `farspan` command prints the message as one line and exits with 2.
    """


class TooLittleTextError(DataError):
    """There is not one row of text, or no text at all yet; all else could be right."""
