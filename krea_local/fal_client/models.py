"""Which model draws for the endpoints of this process: by endpoint, by name, or one that is there.

Knows nothing of requests.
"""

from __future__ import annotations

import os
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING

from krea_local import api
from krea_local.api import LoadOptions
from krea_local.errors import InvalidRequest, KreaError
from krea_local.safety import THRESHOLD
from krea_local.weights import MODEL_VARIABLE, SAFETY_CHECKER_REPO

if TYPE_CHECKING:
    import torch

    from krea_local.endpoints import Endpoint
    from krea_local.loading import EngineName
    from krea_local.pipeline import Krea


@dataclass
class _Choice:
    krea: Krea | None = None
    model: str | os.PathLike[str] | None = None
    options: LoadOptions | None = None


# Of the process, like the GPU: `fal_client`'s functions have no argument for it.
_choice = _Choice()
_choosing = threading.Lock()


def use(krea: Krea) -> None:
    """Draw with this loaded model from the next request on, whatever the endpoint.

    Raises:
        InvalidRequest: it is none.
    """
    if not callable(getattr(krea, "run", None)):
        raise InvalidRequest(f"use({type(krea).__name__}): should be what krea_local.load returned")
    with _choosing:
        _choice.krea, _choice.model, _choice.options = krea, None, None


def configure(
    model: str | os.PathLike[str] | None = None,
    *,
    transformer: str | os.PathLike[str] | None = None,
    text_encoder_2: str | os.PathLike[str] | None = None,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    memory: str | None = None,
    offload: str | None = None,
    packed: bool | None = None,
    acceleration: str = "none",
    engine: EngineName = "native",
    compile: bool = False,
    safety_checker: str | os.PathLike[str] = SAFETY_CHECKER_REPO,
    safety_threshold: float = THRESHOLD,
    batch_size: int = 1,
    progress: bool = True,
    token: str | None = None,
) -> None:
    """Say how models are loaded from the next request on; the parameters are `krea_local.load`'s.

    Nothing is loaded before a request needs it. Without a `model`, each endpoint draws with the
    one that KREA_LOCAL_MODEL names, else with its own: "krea", "dev" or "srpo". Called without
    anything, it undoes what it and `use` did before.
    """
    given = LoadOptions(
        transformer=transformer,
        text_encoder_2=text_encoder_2,
        device=device,
        dtype=dtype,
        memory=memory,
        offload=offload,
        packed=packed,
        acceleration=acceleration,
        engine=engine,
        compile=compile,
        safety_checker=safety_checker,
        safety_threshold=safety_threshold,
        batch_size=batch_size,
        progress=progress,
        token=token,
    )
    with _choosing:
        _choice.krea, _choice.model = None, model
        # With nothing but defaults as `txt2img` loads it, so that both share one model.
        defaults = configure.__kwdefaults__
        _choice.options = None if given == defaults else given


def model_for(endpoint: Endpoint) -> Krea:
    """The model that draws for `endpoint`, loaded if need be.

    Raises:
        KreaError: as `krea_local.load` does, but never as if the request were wrong.
    """
    with _choosing:
        krea, model, options = _choice.krea, _choice.model, _choice.options
    if krea is not None:
        return krea
    if model is None and not os.environ.get(MODEL_VARIABLE):
        model = endpoint.model
    try:
        return api.kept(model, options)
    except InvalidRequest as error:
        raise KreaError(f"the model cannot be loaded as configured: {error}") from error
