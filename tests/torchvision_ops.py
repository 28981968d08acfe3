"""Make PyPI's torchvision importable with the CPU build of torch.

Its compiled operators want CUDA; the reference needs only its Python code (resizing), which asks that the
operators' names be declared. Import this before torchvision, transformers' processors or qwen_omni_utils.
"""

import importlib.util
import re
from pathlib import Path

import torch

_folder = importlib.util.find_spec("torchvision").submodule_search_locations[0]
_text = Path(_folder, "_meta_registrations.py").read_text()
_library = torch.library.Library("torchvision", "DEF")  # kept: the names live as long as it does
for _name in set(re.findall(r'register_(?:meta|fake)\("(?:torchvision::)?(\w+)"\)', _text)):
    _library.define(f"{_name}(Tensor x) -> Tensor")
