"""Which device a run uses."""

from __future__ import annotations

import torch

from engine import distributed
from engine.errors import UserError


def pick_device(name: str) -> torch.device:
    """ "auto" = a GPU where there is one; else as named. Of several processes on a machine each has the GPU of its number.

    Raises:
        UserError: no such device, or one GPU for several processes.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    remedy = "use device=auto or device=cpu"
    if distributed.world() > 1 and name != "cpu":
        if name != "cuda":
            raise UserError(f"device: '{name}' cannot be that of {distributed.world()} processes; {remedy}")
        name = f"cuda:{distributed.local_rank()}"
        remedy = "start as many processes on a machine as it has GPUs, or use device=cpu"
    try:
        device = torch.device(name)
        if device.type == "cuda":
            torch.cuda.get_device_properties(device)
            torch.cuda.set_device(device)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"device: '{name}' cannot be used ({reason}); {remedy}") from error
    return device
