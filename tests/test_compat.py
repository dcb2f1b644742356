"""d2ssl.compat: each repair in a process of its own, since it changes the libraries."""

import subprocess
import sys
import textwrap

import pytest
import torch

from d2ssl.compat import has_bf16


def run(code: str, *, cwd=None) -> subprocess.CompletedProcess:
    code = textwrap.dedent(code)
    return subprocess.run([sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True)


def test_importing_it_imports_neither_torch_nor_detectron2():
    done = run("import sys, d2ssl.compat; print({'torch', 'detectron2'} & set(sys.modules))")
    assert done.stdout == "set()\n", done.stderr


@pytest.mark.parametrize("hip, major, has", [(None, 7, False), (None, 8, True), ("6.2", 7, True)])
def test_which_gpus_compute_in_bf16(monkeypatch, hip, major, has):
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (major, 0))
    assert has_bf16("cuda") is has and has_bf16("cpu")


def test_a_missing_detectron2_gives_one_line_with_the_command():
    done = run(
        """
        import importlib.util
        importlib.util.find_spec = lambda name: None
        from d2ssl.compat import require_detectron2
        from d2ssl.errors import exit_on_error
        with exit_on_error():
            require_detectron2()
        """
    )
    assert done.returncode == 2 and done.stdout == ""
    assert "tools/install_detectron2.py" in done.stderr and done.stderr.count("\n") == 1


def test_a_build_that_does_not_fit_torch_gives_one_line(tmp_path):
    layers = tmp_path / "detectron2" / "layers"
    layers.mkdir(parents=True)
    (tmp_path / "detectron2" / "__init__.py").write_text("")
    (layers / "__init__.py").write_text("raise ImportError('_C.so: undefined symbol: _Z9')")
    done = run(
        f"""
        import sys
        sys.path.insert(0, {str(tmp_path)!r})
        from d2ssl.compat import require_detectron2
        from d2ssl.errors import exit_on_error
        with exit_on_error():
            require_detectron2()
        """
    )
    assert done.returncode == 2 and "undefined symbol: _Z9" in done.stderr
    assert "build it anew" in done.stderr and done.stderr.count("\n") == 1


def test_old_names_are_restored_and_new_ones_left_alone():
    done = run(
        """
        import sys
        import numpy as np
        from PIL import Image
        had_bool = vars(np).get("bool")
        from d2ssl import compat
        compat._restore_pillow_name()
        compat._restore_numpy_aliases()
        assert Image.LINEAR == Image.BILINEAR == 2
        assert (np.int, np.float, np.str) == (int, float, str)
        assert np.bool is (had_bool or bool)
        assert np.zeros(2, dtype=np.int).dtype.kind == "i"
        """
    )
    assert done.returncode == 0, done.stderr


def test_without_pkg_resources_a_packaged_file_is_found(tmp_path):
    (tmp_path / "zoo").mkdir()
    (tmp_path / "zoo" / "__init__.py").write_text("")
    done = run(
        f"""
        import importlib.util, sys
        sys.path.insert(0, {str(tmp_path)!r})
        find = importlib.util.find_spec
        importlib.util.find_spec = lambda n: None if n == "pkg_resources" else find(n)
        from d2ssl import compat
        compat._restore_pkg_resources()
        import pkg_resources
        print(pkg_resources.resource_filename("zoo", "configs/a.yaml"))
        """
    )
    assert done.stdout.strip() == str(tmp_path / "zoo" / "configs" / "a.yaml"), done.stderr
