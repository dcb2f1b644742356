#!/usr/bin/env python
"""Install Detectron2 v0.6 so that it runs on current PyTorch, NumPy and Pillow, without a compiler.

Detectron2's last release is v0.6 (2021). Its Python code is on the Python package index as the
source package pb1-detectron2 0.6; the C++ part (`detectron2._C`) is not in that package. Mask R-CNN
does not need it: RoIAlign and NMS come from torchvision. This script

  1. lets pip fetch that source package from whatever index pip is configured with, checks its hash,
  2. applies the short list of replacements in PATCH, each of which must match exactly,
  3. adds a stand-in for `detectron2._C` that says what is missing when something asks for it,
  4. installs the result with pip as the distribution "detectron2", version 0.6.

Where a `detectron2` can already be imported, it does nothing. Undo with `pip uninstall detectron2`.
Exit code 0: installed, or was there already; 2: stopped, with one line on stderr saying why.
"""

import argparse
import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

SDIST = "pb1-detectron2"
VERSION = "0.6"
SHA256 = "5d2e9e51e523ec72f6a31cca04b0a515492e9514b773a3d134cedc0677170b29"
MIN_PYTHON = (3, 10)

_ALIAS = "NumPy 1.24 removed the aliases of Python's own types"
_MESHGRID = "torch warns about meshgrid without indexing; 'ij' is what it does today"
_AMP = "torch.cuda.amp is deprecated"
_PKG_RESOURCES = "setuptools 82 removed pkg_resources"

# (file, how often, old, new, why). `old` is literal text that no further word character follows.
PATCH = [
    ("detectron2/data/transforms/transform.py", 1, "Image.LINEAR", "Image.BILINEAR",
     "Pillow 10 removed the old name"),
    ("detectron2/model_zoo/model_zoo.py", 1, "import pkg_resources", "", _PKG_RESOURCES),
    ("detectron2/model_zoo/model_zoo.py", 1,
     'pkg_resources.resource_filename(\n        "detectron2.model_zoo", os.path.join(',
     'os.path.join(\n        os.path.dirname(os.path.abspath(__file__)), os.path.join(',
     _PKG_RESOURCES),
    ("detectron2/data/build.py", 2, "np.int", "int", _ALIAS),
    ("detectron2/data/datasets/pascal_voc.py", 1, "np.str", "str", _ALIAS),
    ("detectron2/evaluation/pascal_voc_evaluation.py", 2, "np.bool", "bool", _ALIAS),
    ("detectron2/evaluation/sem_seg_evaluation.py", 2, "np.int", "int", _ALIAS),
    ("detectron2/evaluation/sem_seg_evaluation.py", 5, "np.float", "float", _ALIAS),
    ("detectron2/structures/masks.py", 3, "np.bool", "bool", _ALIAS),
    ("detectron2/utils/video_visualizer.py", 1, "np.bool", "bool", _ALIAS),
    ("detectron2/utils/visualizer.py", 3, "np.bool", "bool", _ALIAS),
    ("detectron2/modeling/anchor_generator.py", 1, "torch.meshgrid(shifts_y, shifts_x)",
     'torch.meshgrid(shifts_y, shifts_x, indexing="ij")', _MESHGRID),
    ("projects/Panoptic-DeepLab/panoptic_deeplab/post_processing.py", 1,
     "torch.arange(width, dtype=offsets.dtype, device=offsets.device),",
     'torch.arange(width, dtype=offsets.dtype, device=offsets.device), indexing="ij",',
     _MESHGRID),
    ("detectron2/engine/train_loop.py", 1, "from torch.cuda.amp import GradScaler",
     "from torch.amp import GradScaler", _AMP),
    ("detectron2/engine/train_loop.py", 1, "grad_scaler = GradScaler()",
     'grad_scaler = GradScaler("cuda")', _AMP),
    ("detectron2/engine/train_loop.py", 1, "from torch.cuda.amp import autocast",
     "from torch.amp import autocast", _AMP),
    ("detectron2/engine/train_loop.py", 1, "with autocast():", 'with autocast("cuda"):', _AMP),
    ("detectron2/evaluation/coco_evaluation.py", 1, "self._use_fast_impl = use_fast_impl",
     "self._use_fast_impl = False", "the fast COCO evaluation is in _C; pycocotools is the same"),
]  # fmt: skip

STAND_IN = '''"""In place of Detectron2's operators, by d2ssl's tools/install_detectron2.py."""


def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)
    raise RuntimeError(
        f"detectron2._C.{name} is not compiled in this build: deformable convolution, rotated "
        "boxes and the fast COCO evaluation need an official build; see d2ssl's README"
    )


def get_compiler_version():  # these three are asked for by detectron2.utils.collect_env
    return "not compiled (stand-in)"


def get_cuda_version():
    return "not compiled (stand-in)"


def has_cuda():
    return False
'''

# Replaces v0.6's setup.py, which imports torch and compiles. Dependencies as in v0.6, less what
# only its Caffe2 export needs (future, pydot) and a formatter pinned to 2021 (black), which only
# prettifies saved LazyConfigs. Like v0.6, it leaves torch, torchvision and OpenCV to the user.
SETUP = """from setuptools import find_packages, setup

PROJECTS = {
    "detectron2.projects.point_rend": "projects/PointRend/point_rend",
    "detectron2.projects.deeplab": "projects/DeepLab/deeplab",
    "detectron2.projects.panoptic_deeplab": "projects/Panoptic-DeepLab/panoptic_deeplab",
}
setup(
    name="detectron2",
    version="0.6",
    author="FAIR",
    license="Apache-2.0",
    description="Detectron2 v0.6, patched by d2ssl for current PyTorch; without compiled operators",
    packages=find_packages(include=["detectron2", "detectron2.*"]) + list(PROJECTS),
    package_dir=PROJECTS,
    package_data={"detectron2.model_zoo": ["configs/**/*.yaml", "configs/**/*.py"]},
    python_requires=">=3.10",
    install_requires=[
        "Pillow>=7.1", "matplotlib", "pycocotools>=2.0.2", "termcolor>=1.1", "yacs>=0.1.8",
        "tabulate", "cloudpickle", "tqdm>4.29.0", "tensorboard", "fvcore>=0.1.5,<0.1.6",
        "iopath>=0.1.7,<0.1.10", "omegaconf>=2.1,<2.4", "hydra-core>=1.1,<1.4",
    ],
)
"""

# v0.6's setup.py cannot run here, and even `pip download` would run it, to read the name and the
# dependencies. So pip is given this build backend in place of setuptools (through PYTHONPATH and
# --no-build-isolation, which every pip since 19 honours): it answers with the name alone, and not
# a line of the package runs before its hash is checked.
BACKEND = """import os, sys

__legacy__ = sys.modules[__name__]


def prepare_metadata_for_build_wheel(directory, config_settings=None):
    name = "pb1_detectron2-0.6.dist-info"
    os.mkdir(os.path.join(directory, name))
    with open(os.path.join(directory, name, "METADATA"), "w") as f:
        f.write("Metadata-Version: 2.1\\nName: pb1-detectron2\\nVersion: 0.6\\n")
    return name
"""


class InstallError(Exception):
    """Something that the user must hear about, in one line."""


def run_pip(*args, pythonpath=None):
    """Run pip quietly; raise InstallError with pip's own error if it fails."""
    env = dict(os.environ, PIP_DISABLE_PIP_VERSION_CHECK="1")
    if pythonpath is not None:
        env["PYTHONPATH"] = str(pythonpath)
    done = subprocess.run(
        [sys.executable, "-m", "pip", *args], env=env, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, universal_newlines=True,
    )  # fmt: skip
    if done.returncode == 0:
        return
    lines = [line.strip() for line in done.stdout.splitlines() if line.strip()]
    network = [line for line in lines if "connection broken" in line]
    errors = [line for line in lines if line.lower().startswith("error:")]
    reason = (network or errors or lines or ["no output"])[0]
    raise InstallError(f"pip {args[0]} failed: {reason}")


def download(folder):
    """Fetch the source package with pip into `folder` and return its path."""
    backend = Path(folder, "backend", "setuptools")
    backend.mkdir(parents=True)
    (backend / "__init__.py").write_text("")
    (backend / "build_meta.py").write_text(BACKEND)
    run_pip(
        "download", f"{SDIST}=={VERSION}", "--quiet", "--dest", str(folder), "--no-deps",
        "--no-binary", SDIST, "--no-build-isolation", "--use-pep517", pythonpath=backend.parent,
    )  # fmt: skip
    return next(Path(folder).glob("*.tar.gz"))


def check_hash(path, expected=SHA256):
    """Raise InstallError unless the file's SHA-256 is `expected`."""
    found = hashlib.sha256(Path(path).read_bytes()).hexdigest()
    if found != expected:
        raise InstallError(f"{Path(path).name}: sha256 is {found}, expected {expected}")


def apply_patch(root, patch=PATCH):
    """Apply the replacements to the tree at `root`; raise InstallError where one does not match."""
    for name, count, old, new, why in patch:
        path = Path(root, name)
        text = path.read_text(encoding="utf-8") if path.is_file() else ""
        text, found = re.subn(re.escape(old) + r"(?!\w)", lambda match: new, text)
        if found != count:
            raise InstallError(f"{name}: {old!r} occurs {found} times, expected {count} ({why})")
        path.write_text(text, encoding="utf-8")


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.parse_args(argv)
    try:
        if sys.version_info < MIN_PYTHON:
            raise InstallError("Python {}.{} or newer is needed".format(*MIN_PYTHON))
        present = importlib.util.find_spec("detectron2")
        if present is not None and present.origin:
            print(f"detectron2 is already installed: {os.path.dirname(present.origin)}")
            return 0
        with tempfile.TemporaryDirectory() as folder:
            sdist = download(folder)
            check_hash(sdist)
            shutil.unpack_archive(str(sdist), folder)
            root = Path(folder, f"{SDIST}-{VERSION}")
            apply_patch(root)
            (root / "detectron2" / "_C.py").write_text(STAND_IN)
            (root / "setup.py").write_text(SETUP)
            run_pip("install", "--quiet", str(root))
    except InstallError as error:
        print(f"install_detectron2: {error}", file=sys.stderr)
        return 2
    print(f"installed detectron2 {VERSION} (patched, without compiled operators)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
