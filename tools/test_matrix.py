"""Run the quick tests on the oldest supported versions and on the newest: `make test-matrix`.

The oldest set is what pyproject.toml promises: every `name>=version` in it, pinned to that version. The newest is what
pip finds today. Each gets a virtual environment of its own in .matrix, some GB large, kept for the next run.

    python tools/test_matrix.py [oldest] [newest] [-- arguments of pytest]
"""

import re
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SETS = ("oldest", "newest")
#: Triton's interpreter takes minutes for the kernels, which these versions change little; ONNX Runtime for exports.
QUICK = ("tests", "--ignore=tests/kernels", "-m", "not slow and not onnx")


def pins(name: str) -> list[str]:
    if name == "newest":
        return []
    bounds = re.findall(r'"([\w.-]+)>=([\w.]+)', (ROOT / "pyproject.toml").read_text())
    # What these were made for. Triton 3.2's interpreter takes arrays of one number for numbers, as NumPy 2.4 does not;
    # torch 2.6 does not trace newer packaging, by which diffusers compares versions in its forwards.
    return [*(f"{package}=={version}" for package, version in bounds), "numpy<2.4", "packaging<25"]


def run(name: str, arguments: list[str]) -> int:
    folder = ROOT / ".matrix" / name
    python = folder / "bin" / "python"
    if not python.exists():
        venv.create(folder, with_pip=True)
    constraints = folder / "constraints.txt"
    constraints.write_text("\n".join(pins(name)) + "\n")
    upgrade = ["--upgrade", "--upgrade-strategy=eager"] if name == "newest" else []

    def pip(*command: str | Path) -> str:
        command = [python, "-m", "pip", *command, "--quiet", "--disable-pip-version-check"]
        return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout

    def pytest(*command: str) -> int:
        return subprocess.run([python, "-m", "pytest", "-q", "-p", "no:cacheprovider", *command], cwd=ROOT).returncode

    pip("install", *upgrade, "-c", constraints, "-e", f"{ROOT}[distill,export,test]")
    shown = re.findall(r"(?m)^(?:torch|triton|diffusers|transformers|accelerate|peft)==\S+", pip("freeze"))
    print(f"{name}: {', '.join(shown)}", flush=True)
    code = pytest(*QUICK, *arguments)
    if name == "newest":
        # Afterwards, and out again: diffusers imports them, which takes a second, and they have warnings to print.
        pip("install", "-c", constraints, f"{ROOT}[quant]")
        code = max(code, pytest("tests/plugins/test_quantized.py"))
        pip("uninstall", "-y", "torchao", "bitsandbytes")
    return code


def main(arguments: list[str]) -> int:
    if arguments[:1] in (["-h"], ["--help"]):
        print(__doc__)
        return 0
    names, _, more = " ".join(arguments).partition("--")
    names = names.split() or list(SETS)
    unknown = [name for name in names if name not in SETS]
    if unknown:
        sys.exit(f"got {unknown[0]!r}, expected oldest or newest")
    codes = {name: run(name, more.split()) for name in names}
    for name, code in codes.items():
        print(f"{name}: {'passed' if code == 0 else f'failed, pytest says {code}'}")
    return max(codes.values())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
