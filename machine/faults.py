"""Faults of a GPU, told apart by what they leave behind."""

import torch

OUT_OF_MEMORY = (  # as CUDA and its libraries say it, where PyTorch's allocator is not the one who asked
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUBLAS_STATUS_NOT_INITIALIZED",  # no room for cuBLAS's own workspace
    "CUDNN_STATUS_ALLOC_FAILED",
)


def is_unusable() -> bool:
    """Whether CUDA fails at everything in this process from now on, as after an illegal access, an assert or an Xid."""
    try:
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
    except RuntimeError as error:
        return not is_out_of_memory(error)
    return False


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a GPU's memory ran out: for a tensor, for a library's workspace, or for the process's own context."""
    return isinstance(error, torch.OutOfMemoryError) or any(sign in str(error) for sign in OUT_OF_MEMORY)
