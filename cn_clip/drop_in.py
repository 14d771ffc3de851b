"""What lets this package stand in for Chinese-CLIP: where its names are here, and its modules under short names.

Chinese-CLIP's modules hand on what they import, and programs import it from there. Here a module hands such names on
when they are first asked for, so that they cost nothing to the commands.
"""

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

_EXTRACTION = "get_eval_img_dataset get_eval_txt_dataset"
_BUILDING = "_MODELS _MODEL_INFO _download available_models create_model image_transform"
_RECALL = "NUM_K compute_score dump_2_json read_reference read_submission report_error_msg report_score"
_TEMPLATES = (
    "aircraft_templates country211_templates eurosat_templates flower_templates food_templates openai_templates"
)

# Module -> the names that it has from the modules of `HOMES`.
NAMES: dict[str, str] = {
    "cn_clip.training.main": "CLIP convert_models_to_fp32 convert_state_dict convert_weights cosine_lr evaluate "
    "get_data is_master load parse_args resize_pos_embed setup_primary_logging setup_worker_logging train "
    "torch_version_str_compare_lessequal",
    "cn_clip.training.train": "convert_state_dict",
    "cn_clip.eval.evaluation": _RECALL,
    "cn_clip.eval.extract_features": f"CLIP convert_models_to_fp32 convert_weights {_EXTRACTION}",
    "cn_clip.eval.extract_features_onnx": _EXTRACTION,
    "cn_clip.eval.extract_features_tensorrt": f"TensorRTModel {_EXTRACTION}",
    "cn_clip.eval.zeroshot_evaluation": "CLIP _preprocess_text accuracy convert_models_to_fp32 convert_weights "
    f"get_zeroshot_dataset image_transform run tokenize zero_shot_classifier {_TEMPLATES}",
    "cn_clip.deploy.onnx_to_tensorrt": "TensorRTShape _MODEL_INFO build_engine",
    "cn_clip.deploy.pytorch_to_onnx": f"packing_small_onnx_files {_BUILDING}",
    "cn_clip.deploy.pytorch_to_coreml": f"ImageEncoder TextEncoder {_BUILDING}",
    "cn_clip.deploy.speed_benchmark": "_MODEL_INFO convert_models_to_fp32 convert_weights create_model image_transform "
    "prepare_pytorch_model print_timings track_infer_time",
}
# Module -> the names that are in it. A name means the same in every module of `NAMES`.
HOMES: dict[str, str] = {
    "cn_clip.clip": "convert_state_dict load tokenize",
    "cn_clip.clip.model": "CLIP convert_models_to_fp32 convert_weights resize_pos_embed",
    "cn_clip.clip.utils": _BUILDING,
    "cn_clip.training.data": "get_data",
    "cn_clip.training.train": "evaluate is_master torch_version_str_compare_lessequal train",
    "cn_clip.training.params": "parse_args",
    "cn_clip.training.scheduler": "cosine_lr",
    "cn_clip.training.logger": "setup_primary_logging setup_worker_logging",
    "cn_clip.eval.data": f"_preprocess_text accuracy get_zeroshot_dataset run zero_shot_classifier {_EXTRACTION}",
    "cn_clip.eval.cvinw_zeroshot_templates": _TEMPLATES,
    "cn_clip.evaluation.annotations": _RECALL,
    "cn_clip.deploy.tensorrt_utils": "TensorRTModel TensorRTShape build_engine",
    "cn_clip.deploy.benchmark_utils": "print_timings track_infer_time",
    "cn_clip.deploy.coreml_package": "ImageEncoder TextEncoder",
    "cn_clip.deploy.towers": "packing_small_onnx_files prepare_pytorch_model",
}
_HOME_OF = {name: home for home, names in HOMES.items() for name in names.split()}


def home_of(module: str, name: str) -> str | None:
    """The module that a name of another comes from; None for what is not handed on."""
    return _HOME_OF[name] if name in NAMES.get(module, "").split() else None


def names(module: str) -> Callable[[str], Any]:
    """The `__getattr__` of a module of `NAMES`."""

    def get(name: str) -> Any:
        home = home_of(module, name)
        if home is None:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        return getattr(importlib.import_module(home), name)

    return get


class _ShortNames(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds `clip.utils` as `cn_clip.clip.utils`: the very module, not a second copy with a state of its own."""

    def __init__(self) -> None:
        self.packages: set[str] = set()

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        package, _, rest = fullname.partition(".")
        if not rest or package not in self.packages or importlib.util.find_spec(f"cn_clip.{fullname}") is None:
            return None
        return importlib.machinery.ModuleSpec(fullname, self)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        module = importlib.import_module(f"cn_clip.{spec.name}")
        spec.loader_state = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        assert module.__spec__ is not None
        module.__spec__ = module.__spec__.loader_state  # importing it wrote the short name here


_short_names = _ShortNames()


def lead(package: str) -> None:
    """Makes `package` another name of `cn_clip.PACKAGE`.

    For the packages of `cn_clip/`, which Python finds as `clip` or `training` when `cn_clip/` itself is on its path, as
    in the guides of Chinese-CLIP.
    """
    if not _short_names.packages:
        sys.meta_path.insert(0, _short_names)
    _short_names.packages.add(package)
    sys.modules[package] = importlib.import_module(f"cn_clip.{package}")
