"""Makes the environment of one SGLang for the CPU: sglang_environment.py VERSION FOLDER.

SGLang asks for gigabytes of GPU code that its CPU engine never imports, and its kernels need a GPU to be imported: it
is installed without what it asks for, beside what the engine imports, and two packages are replaced by names alone.
"""

from __future__ import annotations

import subprocess
import sys
import sysconfig
import venv
from pathlib import Path
from typing import Final

TORCH: Final = {"2.11.0": "0.26.0", "2.14.1": "0.29.1"}
"""torchvision by torch."""
TESTED: Final = {
    "0.5.14": ("2.11.0", "5.8.1"),
    "0.5.17": ("2.11.0", "5.12.1"),
    "0.5.23": ("2.14.1", "5.19.0"),
}
"""torch and transformers by SGLang: what it pins."""
IMPORTED: Final = (
    "aiohttp", "apache-tvm-ffi==0.1.11", "av==16.1.0", "compressed-tensors", "dill", "distro", "einops",
    "fastapi<0.120", "gguf", "interegular", "IPython", "loguru", "numba", "numpy<2.4", "nvidia-ml-py", "openai",
    "orjson", "partial-json-parser", "pillow", "prometheus-client", "psutil", "pybase64", "python-multipart", "scipy",
    "sentencepiece", "setproctitle", "tiktoken", "uvicorn", "zstandard",
)  # fmt: skip
TESTING: Final = ("hypothesis", "pytest", "pytest-timeout")

KERNELS: Final = '''"""Names of kernels that no CPU runs."""


def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)

    def absent(*_given, **_named):
        raise RuntimeError(f"sgl_kernel.{name} needs a GPU")

    return absent


import sgl_kernel.mamba  # noqa: E402  # adds its functions to torch.ops
'''
GRAMMAR: Final = '''"""Names of a package for constrained sampling, which specd does not use."""

from pydantic import BaseModel


class StructuralTag(BaseModel):
    pass


def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)
    return type(name, (), {})
'''
REPLACED: Final = {
    "sgl_kernel/__init__.py": KERNELS,
    "sgl_kernel/mamba.py": Path(__file__).with_name("sglang_cpu_kernels.py").read_text(),
    "xgrammar/__init__.py": GRAMMAR,
    "xgrammar/structural_tag.py": GRAMMAR,
}


def install(version: str, folder: Path) -> None:
    """Make the environment in `folder`. Raises CalledProcessError where pip cannot get something."""
    torch, transformers = TESTED[version]
    venv.create(folder, with_pip=True, clear=True)
    python = folder / "bin" / "python"
    hub = ["huggingface_hub<2"] if transformers < "5.13" else []
    pip = [str(python), "-m", "pip", "install", "-qq", "--disable-pip-version-check"]
    root = str(Path(__file__).parents[2])
    pinned = [f"torch=={torch}", f"torchvision=={TORCH[torch]}", f"transformers=={transformers}", *hub]
    subprocess.run([*pip, *pinned, *IMPORTED, *TESTING, "-e", root], check=True)
    subprocess.run([*pip, "--no-deps", f"sglang=={version}"], check=True)
    site = Path(sysconfig.get_path("purelib", vars={"base": str(folder)}))
    for name, text in REPLACED.items():
        (site / name).parent.mkdir(exist_ok=True)
        (site / name).write_text(text)


def main() -> None:
    version, folder = sys.argv[1], Path(sys.argv[2])
    if version not in TESTED:
        sys.exit(f"SGLANG={version}: expected one of {', '.join(TESTED)}")
    print(f"setting {folder} up (once; some minutes, 3 GB where torch is one for GPUs)", flush=True)
    try:
        install(version, folder)
    except subprocess.CalledProcessError as error:
        sys.exit(f"pip ended with {error.returncode}: no environment of SGLang {version} for {sys.version.split()[0]}")


if __name__ == "__main__":
    main()
