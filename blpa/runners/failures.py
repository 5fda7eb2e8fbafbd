"""What an exception means to whoever started the run: an exit code and one line, or a bug."""

from blpa.errors import Diverged, Stopped, UserError

OUT_OF_MEMORY = (
    "out of memory",  # torch, the CUDA driver and Triton, each in words of its own around these
    "ALLOC_FAILED",  # cuBLAS and cuDNN
    "unable to find an engine",  # cuDNN where no workspace could be had
)


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether memory was what was missing, by the words of an exception or of those that led to it.

    They led to it too if it was raised while they were handled: a CUDA graph that ran out of memory half recorded
    cannot be ended, and that is what is heard last.
    """
    while error is not None:
        if isinstance(error, RuntimeError) and any(words in str(error) for words in OUT_OF_MEMORY):
            return True
        error = error.__cause__ or error.__context__
    return False


def judge(error: Exception) -> tuple[int | None, str]:
    """Tell the user's mistakes and misfortunes from bugs.

    Returns:
        The exit code, None for a bug; and one line.
    """
    if isinstance(error, OSError):
        return 1, f"{error.filename}: {error.strerror}" if error.filename else str(error)
    if isinstance(error, UserError | Stopped):
        return error.exit_code, f"{Diverged.PREFIX if isinstance(error, Diverged) else ''}{error}"
    said = next(iter(str(error).strip().splitlines()), "")
    if is_out_of_memory(error):
        return 1, f"does not fit: {said}"
    if type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
        return 1, f"does not compile: {said}"
    return None, f"{type(error).__name__}: {said}"
