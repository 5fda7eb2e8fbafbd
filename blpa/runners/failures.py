"""What an exception means to whoever started the run: an exit code and one line, or a bug."""

from blpa.errors import Diverged, Stopped, UserError

OUT_OF_MEMORY = ("out of memory",)
"""What torch, the CUDA driver and Triton say, each in words of its own around these."""

PERHAPS_OUT_OF_MEMORY = (
    "ALLOC_FAILED",  # cuBLAS and cuDNN without memory for themselves, or after an error of another kind
    "STATUS_NOT_INITIALIZED",  # the same, where they begin
    "unable to find an engine",  # cuDNN without memory for a workspace, or with no kernel for a tensor of that size
)
"""What is said for lack of memory, and for other reasons too."""


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether memory was what was missing, by the words of an exception or of those that led to it."""
    return _says(error, OUT_OF_MEMORY)


def may_be_out_of_memory(error: BaseException | None) -> bool:
    """Whether memory may have been what was missing, where nothing says so for certain."""
    return _says(error, PERHAPS_OUT_OF_MEMORY)


def _says(error: BaseException | None, words: tuple[str, ...]) -> bool:
    """Whether an exception has some words, or one that it was raised from or while it was handled.

    A CUDA graph that ran out of memory half recorded cannot be ended, and that is what is heard last.
    """
    while error is not None:
        if isinstance(error, RuntimeError) and any(some in str(error) for some in words):
            return True
        error = error.__cause__ or error.__context__
    return False


def first_line(error: BaseException) -> str:
    """What an exception says, on one line."""
    return next(iter(str(error).strip().splitlines()), "")


def judge(error: Exception) -> tuple[int | None, str]:
    """Tell the user's mistakes and misfortunes from bugs.

    Returns:
        The exit code, None for a bug; and one line.
    """
    if isinstance(error, OSError):
        return 1, f"{error.filename}: {error.strerror}" if error.filename else str(error)
    if isinstance(error, UserError | Stopped):
        return error.exit_code, f"{Diverged.PREFIX if isinstance(error, Diverged) else ''}{error}"
    said = first_line(error)
    if is_out_of_memory(error):
        return 1, f"does not fit: {said}"
    if may_be_out_of_memory(error):
        return 1, f"does not run, for want of memory or for the size of its tensors: {said}"
    if type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
        return 1, f"does not compile: {said}"
    return None, f"{type(error).__name__}: {said}"
