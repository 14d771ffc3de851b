"""Read by Python at its start on the pretend GPU: what stands in for what it cannot do, and the meter.

Its kernels do nothing, so rows come out as zeros, searches find nothing and fits never end. Where the project rightly
refuses that, values that it takes are put in place, and nowhere else.
"""

import ctypes
import importlib.abc
import importlib.util
import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import pretend_meter


def without_cudnn(_: ModuleType) -> None:
    """There is no cuDNN to answer; PyTorch's own kernels are launched instead."""
    import torch

    torch._C._set_cudnn_enabled(False)
    torch._C._set_sdp_use_cudnn(False)


def gloo_for_nccl(distributed: Any) -> None:
    """Gloo exchanges for the processes of all devices."""
    begin = distributed.init_process_group

    def init_process_group(backend: str | None = None, *args: Any, **settings: Any) -> None:
        print("pretend GPU: gloo in place of", backend, file=sys.stderr)
        begin("gloo", *args, **settings)

    distributed.init_process_group = init_process_group


def unit_rows(base: Any) -> None:
    """Rows of unit length for those that come from zeros, and so have no direction."""
    import numpy as np

    check = base.checked_rows

    def checked_rows(rows_BD: Any) -> Any:
        if not np.isfinite(rows_BD).all():
            rows_BD = np.random.default_rng(len(rows_BD)).standard_normal(rows_BD.shape).astype(np.float32)
            rows_BD /= np.linalg.norm(rows_BD, axis=1, keepdims=True)
        return check(rows_BD)

    base.checked_rows = checked_rows


def better_recall(recall: Any) -> None:
    """Rows that are better matched each time a process validates, so that there is a best checkpoint."""
    import numpy as np

    real = recall.recall_from_features
    calls: list[None] = []

    def recall_from_features(images_ND: Any, texts_TD: Any, pairs_P2: Any, *args: Any, **settings: Any) -> Any:
        rows = np.concatenate([images_ND, texts_TD])
        if not np.allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-3):
            calls.append(None)
            draw = np.random.default_rng(1)
            images_ND = draw.standard_normal(images_ND.shape).astype(np.float32)
            texts_TD = draw.standard_normal(texts_TD.shape).astype(np.float32)
            image_P, text_P = np.array(pairs_P2).T
            texts_TD[text_P] += 0.1 * len(calls) * images_ND[image_P]
        return real(images_ND, texts_TD, pairs_P2, *args, **settings)

    recall.recall_from_features = recall_from_features


def some_found(_: ModuleType) -> None:
    """How many elements are not zero is a value of the device: the first 32 of a row are said to be."""
    import torch

    real: Callable[..., Any] = torch.Tensor.nonzero

    def nonzero(self: Any, *args: Any, **settings: Any) -> Any:
        if not self.is_cuda:
            return real(self, *args, **settings)
        self.flatten()[:1].cpu()  # waits, as it would there
        return real((torch.arange(self.shape[-1]) < 32).expand(self.shape)).to(self.device)

    torch.Tensor.nonzero = nonzero  # type: ignore[method-assign, assignment]


def short_fits(logistic: Any) -> None:
    """A fit to zeros never converges."""
    logistic.MOST_ITERATIONS = 3


# Done once the module has been loaded.
CHANGES: dict[str, Callable[[ModuleType], None]] = {
    "torch.backends.cudnn": without_cudnn,
    "torch.distributed": gloo_for_nccl,
    "cn_clip.clip.backends.base": unit_rows,
    "cn_clip.retrieval.recall": better_recall,
    "cn_clip.retrieval.flat": some_found,
    "cn_clip.evaluation.logistic": short_fits,
    "cn_clip.training.trainer": pretend_meter.watch_training,
    "cn_clip.clip.backends.pytorch": pretend_meter.watch_extraction,
}


class Changed(importlib.abc.MetaPathFinder):
    """Finds the modules of CHANGES where they are, and has them changed."""

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        """The spec that the others find, for a module to be changed; None for all others."""
        change = CHANGES.pop(fullname, None)
        spec = None if change is None else importlib.util.find_spec(fullname)
        if change is None or spec is None or spec.loader is None:
            return None
        load = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            load(module)
            change(module)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


if hasattr(ctypes.CDLL(None), "pretend_counts"):  # else this Python was started without the pretend GPU
    sys.meta_path.insert(0, Changed())
    pretend_meter.report_at_exit()
