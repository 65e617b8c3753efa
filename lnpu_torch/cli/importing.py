"""Models of anyone's, by the name of the module that they are in, and the shapes of their inputs."""

from __future__ import annotations

import functools
import importlib
import os
import sys
from typing import TYPE_CHECKING, Any

from lnpu_torch.files import ConfigError

if TYPE_CHECKING:
    from torch import nn


def import_model(target: str) -> nn.Module:
    """The nn.Module that MODULE:ATTR names, or that calling it returns; the current folder is searched too.

    Raises:
        ConfigError: the module or attribute does not exist, importing or calling it fails, or it is no nn.Module.
    """
    from torch import nn

    module, colon, attribute = target.partition(":")
    if not (module and colon and attribute):
        raise ConfigError(f"{target!r}: a model is written MODULE:ATTR, such as torchvision.models:resnet18")
    found = _import_attribute(module, attribute)
    if not isinstance(found, nn.Module):
        found = _call(found, target)
    if not isinstance(found, nn.Module):
        kind = type(found).__name__
        raise ConfigError(f"{target}: an nn.Module is expected, or a function that returns one; got {kind}")
    return found


def _import_attribute(module: str, attribute: str) -> Any:
    if module.split(".")[0] == "torchvision":
        from lnpu_torch.recipes.torchvision_compat import import_torchvision

        import_torchvision()
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        return functools.reduce(getattr, attribute.split("."), importlib.import_module(module))
    except Exception as error:  # whatever the user's module raises
        raise ConfigError(f"{module}:{attribute}: cannot be imported: {type(error).__name__}: {error}") from error


def _call(found: Any, target: str) -> Any:
    try:
        return found()
    except Exception as error:  # whatever the user's function raises
        raise ConfigError(f"{target}: cannot be called without arguments: {type(error).__name__}: {error}") from error


def parse_shape(text: str) -> tuple[int, ...]:
    """The shape that "8,3,224,224" gives. Raises ConfigError unless it is positive integers between commas."""
    try:
        shape = tuple(int(part) for part in text.split(","))
    except ValueError:
        shape = ()
    if not shape or min(shape) < 1:
        raise ConfigError(f"--input-shape: {text!r} is not a shape such as 8,3,224,224")
    return shape
