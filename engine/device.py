"""Which device a run uses."""

from __future__ import annotations

import torch

from engine.errors import UserError


def pick_device(name: str) -> torch.device:
    """ "auto" = a GPU where there is one; else as named.

    Raises:
        UserError: no such device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        if device.type == "cuda":
            torch.cuda.get_device_properties(device)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"device: '{name}' cannot be used ({reason}); use device=auto or device=cpu") from error
    return device
