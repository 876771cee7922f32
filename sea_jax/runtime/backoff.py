"""How long is waited before something that failed is tried again."""

FIRST_S, LONGEST_S = 1.0, 60.0


def wait_s(failures: int, first_s: float = FIRST_S, longest_s: float = LONGEST_S) -> float:
    """Returns the seconds to wait after so many failures in a row, at least 1: twice as many each time, up to the longest."""
    return min(first_s * 2.0 ** min(failures - 1, 60), longest_s)
