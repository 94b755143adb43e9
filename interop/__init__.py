"""PyTorch in and out. Importing this package imports neither PyTorch nor safetensors.

apply, variables, info = from_torch("resnet32.th")
state_dict = to_torch(variables)
"""

from interop.forms import CheckpointError
from interop.from_torch import CheckpointInfo, from_torch
from interop.to_torch import to_torch

__all__ = ["CheckpointError", "CheckpointInfo", "from_torch", "to_torch"]
