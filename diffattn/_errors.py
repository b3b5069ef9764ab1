"""Other libraries' errors, cut down to quote in one of ours."""

#: What diffusers raises of a folder or hub id that it cannot load: AttributeError of a pipeline's class that it lacks.
CANNOT_LOAD = (OSError, ValueError, KeyError, AttributeError)


def first_line(error: Exception) -> str:
    """An error in one line, its type's name where it says nothing. Of a list, which begins on the second line, three
    entries and how many there are."""
    first, *more = (str(error).strip() or type(error).__name__).splitlines()
    if first.endswith(":") and more:
        rest = f" and {len(more) - 3} more" if more[3:] else ""
        return f"{first} {', '.join(line.strip() for line in more[:3])}{rest}"
    return first.rstrip(".")
