"""Make any text safe to show. Pure; imports nothing, because every command uses it."""


def printable(text: str) -> str:
    """Return ``text`` without control characters, which could move the cursor; line ends stay."""
    return "".join(letter if letter.isprintable() or letter == "\n" else " " for letter in text)


def one_line(text: str) -> str:
    """Return ``text`` as a single printable line."""
    return " ".join(printable(text).split())
