"""What this machine chooses, where a test does not care."""

from fp4fx.kernels.cpu import library


def first_kernel(*, freezing=False):
    """The kernel of an op that nothing special is asked of."""
    if library.load() is None:
        return "cpu"
    return "reference" if freezing else "inductor"
