"""What is compiled: DeepSpeed's CPU communication op and our own C++, once, into the project's own cache.

python -m herd.run.extensions           compile it now (set-up does); exit code 3 without a compiler
extensions.prepare()                    at every start: load DeepSpeed's op, compile it if need be
extensions.compiled("bf16_products")    the library of herd/run/bf16_products.cpp
"""

import contextlib
import fcntl
import hashlib
import io
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from herd.run import cli, lean_deepspeed
from herd.run.errors import EnvironmentFault
from herd.run.files import source_root

VARIABLE = "TORCH_EXTENSIONS_DIR"
BUILDER = "ShareMemCommBuilder"
PATIENCE_S = 600.0
GLANCE_S = 0.5


def use_project_folder() -> Path:
    """Point torch at the project's cache unless the variable is set; child processes inherit it."""
    root = source_root()
    installed = "site-packages" in root.parts
    cache = Path.home() / ".cache" / "herd" if installed else root / ".cache"
    return Path(os.environ.setdefault(VARIABLE, str(cache / "torch_extensions")))


def choose_accelerator() -> None:
    """Tell DeepSpeed, before it is imported, what this machine has; else every rank warns that it looked in vain."""
    import torch

    if not torch.accelerator.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")


def prepare() -> None:
    """Load DeepSpeed's CPU op, compiling it first if it is not there; nothing on machines with an accelerator.

    Safe with any number of ranks at once: one builds, the others wait and load. A build lock that a killed process
    left behind is removed with a line on stderr. Raises EnvironmentFault when the op cannot be compiled.
    """
    folder = use_project_folder()
    choose_accelerator()
    lean_deepspeed.load()
    import deepspeed
    from deepspeed.accelerator import get_accelerator

    if get_accelerator().device_name() != "cpu":
        return
    builder = get_accelerator().create_op_builder(BUILDER)
    if builder is None or not deepspeed.ops.__compatible_ops__.get(builder.name, False):
        return  # not Linux: DeepSpeed goes without it too
    build_folder = folder / builder.name
    with _faults_told("DeepSpeed's CPU op", folder):
        build_folder.mkdir(parents=True, exist_ok=True)
        with one_at_a_time(folder / f"{builder.name}.flock"):
            clear_stale_lock(build_folder)
            if not (build_folder / f"{builder.name}.so").exists():
                require_compiler()
                say("building DeepSpeed's CPU op, about 40 s, once")
            _find_ninja()
            with contextlib.redirect_stdout(io.StringIO()):
                builder.load(verbose=False)


def compiled(name: str) -> Path:
    """The library of `name`.cpp beside this file, compiled first if it is not there for this source and this torch.

    Any number of processes may ask at once. Raises EnvironmentFault when it cannot be compiled.
    """
    import torch

    source = Path(__file__).with_name(f"{name}.cpp")
    digest = hashlib.sha256(source.read_bytes() + torch.__version__.encode()).hexdigest()[:16]
    folder = use_project_folder()
    library = folder / f"herd_{name}-{digest}.so"
    with _faults_told(source.name, folder):
        folder.mkdir(parents=True, exist_ok=True)
        with one_at_a_time(folder / f"herd_{name}.flock"):
            if not library.exists():
                require_compiler()
                say(f"building {source.name}, about half a minute, once")
                _compile(source, library)
    return library


def _compile(source: Path, library: Path) -> None:
    from torch.utils import cpp_extension

    _find_ninja()
    # In a folder of its own: a killed compiler leaves no half of a library under the name that is looked for.
    with tempfile.TemporaryDirectory(dir=library.parent) as place:
        with contextlib.redirect_stdout(io.StringIO()):
            cpp_extension.load(
                name=library.stem,
                sources=[str(source)],
                extra_cflags=["-O2"],
                build_directory=place,
                is_python_module=False,
            )
        os.replace(Path(place) / library.name, library)


@contextlib.contextmanager
def _faults_told(what: str, folder: Path) -> Iterator[None]:
    """Name what cannot be built in `folder`, and the mend."""
    try:
        yield
    except PermissionError as error:
        raise EnvironmentFault(f"{folder}: cannot be written; make it writable, or set {VARIABLE}") from error
    except RuntimeError as error:
        raise EnvironmentFault(
            f"{what} does not compile ({_first_error(str(error))}); on Debian or Ubuntu: apt install g++ python3-dev"
        ) from error


@contextlib.contextmanager
def one_at_a_time(path: Path) -> Iterator[None]:
    """Hold a lock that the kernel frees when its holder dies, however it dies."""
    with path.open("w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield


def clear_stale_lock(build_folder: Path, *, patience_s: float = PATIENCE_S) -> None:
    """Remove torch's `lock` file when no living process builds there; wait, saying for whom, while one does.

    torch keeps the file open while it builds, and its compilers run in the folder: both are visible for as long as
    they live. Raises EnvironmentFault when a builder takes longer than `patience_s` seconds.
    """
    lock, deadline, told = build_folder / "lock", time.monotonic() + patience_s, False
    while lock.exists():
        builders = living_builders(lock)
        if not builders:
            time.sleep(GLANCE_S)  # a builder closes the file just before it removes it
            if lock.exists() and not living_builders(lock):
                lock.unlink(missing_ok=True)
                say(f"removed {lock}: the process that was building is gone")
            continue
        if time.monotonic() > deadline:
            raise EnvironmentFault(
                f"{lock}: held for {patience_s:g} s by process {builders[0]}; end it, then start again"
            )
        if not told:
            say(f"waiting for process {builders[0]}, which is building DeepSpeed's CPU op in {build_folder}")
            told = True
        time.sleep(GLANCE_S)


def living_builders(lock: Path) -> list[int]:
    """Process ids that have the lock file open or run inside its folder (this machine, what we may look at)."""
    import psutil

    found, place, folder = [], str(lock.resolve()), str(lock.parent.resolve())
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if process.cwd() == folder or any(opened.path == place for opened in process.open_files()):
                found.append(process.pid)
    return found


def require_compiler() -> None:
    """Raise EnvironmentFault, naming the package, when there is no C++ compiler to build with."""
    compiler = os.environ.get("CXX", "c++")
    if shutil.which(compiler.split()[0]) is None:
        raise EnvironmentFault(
            f"no C++ compiler ({compiler}) on PATH, and some C++ must be compiled once; "
            "on Debian or Ubuntu: apt install g++, or set CXX"
        )


def _find_ninja() -> None:
    """Put this environment's scripts first on PATH: ninjas of two versions each rebuild what the other one built."""
    scripts = sysconfig.get_path("scripts")
    if (Path(scripts) / "ninja").exists() and not os.environ.get("PATH", "").startswith(scripts + os.pathsep):
        os.environ["PATH"] = os.pathsep.join([scripts, os.environ.get("PATH", os.defpath)])


def _first_error(text: str) -> str:
    """The compiler's first complaint, else the first line."""
    found = re.search(r"^.*\b(?:fatal )?error: .*$", text, re.MULTILINE)
    return (found.group(0) if found else text.partition("\n")[0]).strip()


def say(line: str) -> None:
    """One line on stderr."""
    print(line, file=sys.stderr, flush=True)


def prepare_all() -> None:
    """Everything this machine needs compiled, two at a time."""
    with subprocess.Popen([sys.executable, "-m", "herd.run.bf16_products"]) as ours:
        prepare()
    if ours.returncode:
        sys.exit(ours.returncode)


if __name__ == "__main__":
    sys.exit(cli.main_guard(prepare_all))
