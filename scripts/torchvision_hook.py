"""Make `import torchvision` work beside a CPU build of torch when only torchvision's CUDA build
could be installed.

Its compiled operators then cannot load, and its Python part dies with `operator torchvision::nms
does not exist`. Declaring the two operators first is all that image transforms need. vLLM inspects
models in a subprocess, so this must act in every interpreter of the
environment: a `.pth` file installs an import hook that waits for `torchvision` and only then looks
    at torch. Where torch and torchvision
match, nothing is written.
"""

import subprocess
import sys
import sysconfig
from pathlib import Path

HOOK = """\
import importlib.abc
import importlib.machinery
import sys


class _DeclareOperators(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name == "torchvision":
            sys.meta_path.remove(self)
            import torch

            if torch.version.cuda is None:
                library = torch.library.Library("torchvision", "DEF")
                library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
                library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
                torch._rlfr_torchvision_library = library  # keeps the definitions alive
        return None


sys.meta_path.insert(0, _DeclareOperators())
"""


def imports_cleanly() -> bool:
    """Whether a fresh interpreter can import torchvision as it stands."""
    return (
        subprocess.run([sys.executable, "-c", "import torchvision"], capture_output=True).returncode
        == 0
    )


def main() -> None:
    """Write the hook where torchvision does not import without it, and check that it then does."""
    site = Path(sysconfig.get_path("purelib"))
    if imports_cleanly():
        return
    (site / "_rlfr_torchvision_hook.py").write_text(HOOK)
    (site / "rlfr_torchvision_hook.pth").write_text("import _rlfr_torchvision_hook\n")
    if not imports_cleanly():
        sys.exit(
            "torchvision does not import, also with its operators declared: install a build that "
            "matches this torch"
        )
    print(
        "torchvision: operators declared by a hook, since its build does not match this CPU torch"
    )


if __name__ == "__main__":
    main()
