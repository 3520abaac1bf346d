"""Make any text safe to show and to keep. Pure; imports nothing, because every command uses it."""


def printable(text: str) -> str:
    """Return ``text`` without control characters, which could move the cursor; line ends stay."""
    return "".join(letter if letter.isprintable() or letter == "\n" else " " for letter in text)


def one_line(text: str) -> str:
    """Return ``text`` as a single printable line."""
    return " ".join(printable(text).split())


def printable_values(value: object) -> object:
    """Return ``value``, JSON from somebody else, with every text in it printable; names of fields stay."""
    match value:
        case str():
            return printable(value)
        case dict():
            return {name: printable_values(part) for name, part in value.items()}
        case list():
            return [printable_values(part) for part in value]
    return value
