"""What segkit raises when something from outside cannot be used: its message names the file and says what to do."""


class SegkitError(ValueError):
    """Bad input, a bad setting or a damaged file. The message says what was expected, what was found and what to do."""


class SubjectError(SegkitError):
    """One subject cannot be used. Work on many subjects reports it and goes on with the others."""
