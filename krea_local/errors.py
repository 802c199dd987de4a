"""Everything that krea_local raises or warns with, in one tree.

    KreaError
    ├── InvalidRequest (ValueError)          a parameter is missing, unknown or out of range
    │   └── InvalidImage                     the input image cannot be read or is too large
    ├── UnknownEndpoint (LookupError)        the hosted API has it, or not; this library does not
    ├── WeightsError
    │   ├── WeightsNotFound (FileNotFoundError)   a model, component or file is not there
    │   ├── WeightsInvalid (ValueError)           a file is truncated, mismatched or a pickle
    │   ├── UnsupportedModel (ValueError)         a checkpoint of another architecture
    │   └── LicenceRequired (PermissionError)     gated: accept the licence, then pass a token
    ├── DeviceError (RuntimeError)
    │   ├── DeviceUnavailable                no such GPU, or this GPU cannot do it
    │   └── OutOfMemory                      the GPU's memory does not suffice
    ├── GenerationFailed (ArithmeticError)   the model produced NaN or infinity
    ├── OutputFailed (OSError)               a picture or a model could not be written
    └── Cancelled                            the call was cancelled

    KreaWarning (UserWarning)                the request was honoured, but not to the letter

Each message names the value, the rule and the way out. Knows nothing of the rest of the package.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence


class KreaError(Exception):
    """Base of every error that krea_local raises on purpose."""


class InvalidRequest(KreaError, ValueError):
    """A parameter is missing, unknown, of the wrong type or out of range.

    Attributes:
        errors: one mapping per fault with `loc`, `msg`, `type` and `input`, as pydantic reports
            them, which is also the form of the hosted API's HTTP 422 body.
    """

    def __init__(self, message: str, errors: Sequence[Mapping[str, object]] = ()) -> None:
        super().__init__(message)
        self.errors = tuple(errors)


class InvalidImage(InvalidRequest):
    """The input image cannot be found, fetched, decoded, or is larger than allowed."""


class UnknownEndpoint(KreaError, LookupError):
    """No endpoint of that name is here, or its model is not loaded."""


class WeightsError(KreaError):
    """Something about the model's files."""


class WeightsNotFound(WeightsError, FileNotFoundError):
    """A model, one of its components, or a file of it is not where it was looked for."""


class WeightsInvalid(WeightsError, ValueError):
    """A weight file is truncated, holds the wrong tensors, or is a pickle."""


class UnsupportedModel(WeightsError, ValueError):
    """The checkpoint is of another architecture than FLUX.1 [dev]."""


class LicenceRequired(WeightsError, PermissionError):
    """The hub wants its licence accepted and a token."""


class DeviceError(KreaError, RuntimeError):
    """Something about the GPU."""


class DeviceUnavailable(DeviceError):
    """The device asked for is not there, or cannot run what was asked."""


class OutOfMemory(DeviceError):
    """The GPU's memory does not suffice for this call."""


class GenerationFailed(KreaError, ArithmeticError):
    """The model produced NaN or infinity, so there is no picture."""


class OutputFailed(KreaError, OSError):
    """A picture or a model could not be written: disk full, folder missing or not writable."""


class Cancelled(KreaError):
    """The call was cancelled; the model is ready for the next one."""


class KreaWarning(UserWarning):
    """The request was honoured, but not to the letter; the text says what was done instead."""
