"""Which virtual environments do the tests and the demo run in, and how is each of them made?

    python3 tools/environment.py NAME     makes or reuses NAME; the last line on stdout is the path of its python

NAME is `engines` (Mooncake without SGLang) or `sglang-RELEASE` (what real servers of that release need, on a CPU),
and either with `+VERSION` for another version of Mooncake, e.g. engines+0.3.10.post2; or `bench` (engines, and what
draws plots), `dist` (engines, and what checks packages) or `router-VERSION` (the stock router alone).
Standard library only: this runs before anything is installed.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import functools
import hashlib
import importlib.util
import os
import pathlib
import platform
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
import venv
from collections.abc import Iterator

HERE = pathlib.Path(__file__).resolve().parent
VENVS = pathlib.Path(os.environ.get("FAILED_SESSION_PROBE_VENVS") or HERE.parent / ".venvs").absolute()
SHARED_RELEASE = "0.5.23"
MOONCAKE = "mooncake-transfer-engine-non-cuda"
MOONCAKE_VERSION = "0.3.13.post1"
# Of a version that has no wheel for machines without CUDA, one of these is installed, and made to run without CUDA.
MOONCAKE_FOR_CUDA = ("mooncake-transfer-engine-cuda13", "tokenspeed-mooncake")
CUDA_RUNTIME = "nvidia-cuda-runtime==13.*"
BEFORE_ENGINES = ("bench", "dist")  # `engines` with the packages of a file of their own in front of it
ROUTER = "sglang-router"
STAMP = "recipe.sha256"
DEADLINE_S = 1800.0
_VERSION = r"(\d+(?:\.\d+)+(?:\.?(?:post|rc)\d+)?)"

# What Mooncake's shared library is linked against, by Debian package.
MOONCAKE_LIBRARIES = {
    "libibverbs1": "libibverbs.so.1",
    "librdmacm1": "librdmacm.so.1",
    "libnuma1": "libnuma.so.1",
    "libcurl4": "libcurl.so.4",
}
# What its wheel for CUDA needs besides, and what makes it run without a driver.
CUDA_MOONCAKE_LIBRARIES = {"ibverbs-providers": "libmlx5.so.1"}
COMPILER = {"gcc": "gcc", "binutils": "nm"}
# The packages which a release of SGLang wants in its own version; all others it takes from the shared environment.
COMPANIONS = ("transformers", "xgrammar", "openai", "openai-harmony")
# What these releases import from triton is gone from later versions of it.
OLD_TRITON = "triton==3.3.1"
WITH_OLD_TRITON = ("0.4.7", "0.4.8")


class CannotMake(Exception):
    """An environment cannot be made here; the message says why and what to do."""


def say(text: str) -> None:
    """Print a line of progress to stderr, where it does not mix with the answer on stdout."""
    print(f"environment: {text}", file=sys.stderr, flush=True)


def python(name: str) -> pathlib.Path:
    """Make the environment `name` unless it is there already, and return the path of its python.

    Raises CannotMake for a name that is none, a missing Debian package or a failed download. Safe to call from several
    processes at once: the second waits for the first, half an hour at most.
    """
    _need_debian_packages()
    return _made(name)


def with_wheel(name: str, wheel: pathlib.Path, folder: pathlib.Path) -> pathlib.Path:
    """Install `wheel` without its dependencies in a new thin environment at `folder`, in front of environment `name`.

    Returns the path of its python. The wheel is really installed, so its .pth file and its entry points are live; the
    environment behind stays as it was. Raises CannotMake as python() does, or when pip fails.
    """
    path = in_front_of(name, folder)
    _pip_install(path, "--no-deps", str(wheel))
    return path


def built_wheel(name: str, checkout: pathlib.Path, folder: pathlib.Path) -> pathlib.Path:
    """Build the wheel of the project at `checkout` with the environment `name`; it is the only one in the new `folder`.

    Raises CannotMake as python() does, or when pip fails.
    """
    _pip("wheel", python(name), "--no-deps", "--wheel-dir", str(folder), str(checkout))
    (wheel,) = folder.glob("*.whl")
    return wheel


def in_front_of(name: str, folder: pathlib.Path) -> pathlib.Path:
    """Make a new, empty environment at `folder` that sees all of the environment `name` behind its own packages.

    Returns the path of its python; `python -m pip install` there leaves the environment behind as it was. Raises
    CannotMake as python() does.
    """
    return _new_in_front(python(name), folder)


def _made(name: str) -> pathlib.Path:
    folder = _folder(name)
    recipe = _recipe(name)
    with locked(name):
        if not _is_finished(folder, recipe):
            say(f"making {folder}")
            started = time.monotonic()
            _make(name, folder)
            (folder / STAMP).write_text(recipe)
            say(f"{name} is ready after {time.monotonic() - started:.0f} s")
    return folder / "bin" / "python"


def _folder(name: str) -> pathlib.Path:
    """Where the environment is.

    pip takes a package for one of its own environment if the path of that is the beginning of the package's path, and
    then removes it to install another version: sglang-0.5.2 must not stand in front of sglang-0.5.23 by that name.
    """
    if _router(name):
        return VENVS / name
    release, mooncake = _parts(name)
    is_in_front = name in BEFORE_ENGINES or mooncake or release not in (None, SHARED_RELEASE)
    return VENVS / (f"{name}.front" if is_in_front else name)


def _is_finished(folder: pathlib.Path, recipe: str) -> bool:
    stamp = folder / STAMP
    return (folder / "bin" / "python").exists() and stamp.exists() and stamp.read_text() == recipe


def _parts(name: str) -> tuple[str | None, str | None]:
    """The release of SGLang and the version of Mooncake that an environment's name asks for; None for the usual one."""
    if name in BEFORE_ENGINES:
        return None, None
    match = re.fullmatch(rf"(?:engines|sglang-{_VERSION})(?:\+{_VERSION})?", name)
    if not match:
        raise CannotMake(
            f"there is no environment {name!r}: say engines, sglang-RELEASE, one of them with +MOONCAKE, "
            f"router-VERSION, {' or '.join(BEFORE_ENGINES)}"
        )
    return match.group(1), match.group(2)


def _router(name: str) -> str | None:
    """The version of the router that an environment's name asks for; None if it asks for something else."""
    match = re.fullmatch(f"router-{_VERSION}", name)
    return match and match[1]


def _requirements(what: str) -> pathlib.Path:
    return HERE / "requirements" / f"{what}.txt"


def _recipe(name: str) -> str:
    """What the environment consists of, as one hash: its requirements and the python that it is made for."""
    if _router(name):
        return hashlib.sha256("\n".join((name, platform.python_version(), sys.base_prefix)).encode()).hexdigest()
    release, _ = _parts(name)
    made_for = [name, MOONCAKE_VERSION, SHARED_RELEASE, platform.python_version(), sys.base_prefix]
    if name in BEFORE_ENGINES:
        made_for.append(_requirements(name).read_text())
    behind = _requirements("server" if release else "engines").read_text()
    return hashlib.sha256("\n".join((*made_for, behind)).encode()).hexdigest()


def _make(name: str, folder: pathlib.Path) -> None:
    if version := _router(name):
        say("download: 30 MB, on disk: 140 MB")
        _pip_install(_new_venv(folder), f"{ROUTER}=={version}", pip=_bundled_pip())
        return
    release, mooncake = _parts(name)
    if name in BEFORE_ENGINES:
        say(_size(_requirements(name)))
        _pip_install(_new_in_front(_made("engines"), folder), "-r", str(_requirements(name)))
    elif mooncake:
        path = _new_in_front(_made(name.removesuffix(f"+{mooncake}")), folder)
        say("download: 50 MB")
        try:
            _pip_install(path, "--no-deps", f"{MOONCAKE}=={mooncake}")
        except CannotMake:
            _need_debian_packages(for_cuda=True)
            _install_for_cuda(path, mooncake)
            _run_without_cuda(_site_packages(folder))
    elif release in (None, SHARED_RELEASE):
        _make_from_requirements(release, folder)
    else:
        path = _new_in_front(_made(f"sglang-{SHARED_RELEASE}"), folder)
        old = release.startswith(WITH_OLD_TRITON)
        say("download: 220 MB, on disk: 770 MB" if old else "download: 70 MB, on disk: 230 MB")
        _pip_install(path, "--no-deps", f"sglang=={release}")
        _pip_install(path, *_companions(folder), *([OLD_TRITON] if old else []))


def _size(requirements: pathlib.Path) -> str:
    """What the first line of the file says of the size of its packages."""
    return requirements.read_text().splitlines()[0].removeprefix("# ")


def _make_from_requirements(release: str | None, folder: pathlib.Path) -> None:
    requirements = _requirements("server" if release else "engines")
    say(_size(requirements))
    path = _new_venv(folder)
    _pip_install(path, "pip", pip=_bundled_pip())
    _pip_install(path, "--no-deps", f"{MOONCAKE}=={MOONCAKE_VERSION}")
    _pip_install(path, "-r", str(requirements))
    if release:
        _pip_install(path, "--no-deps", f"sglang=={release}")
        _check_torch(path)
        _mute_torchvision_extension(folder)


def _install_for_cuda(path: pathlib.Path, mooncake: str) -> None:
    for package in MOONCAKE_FOR_CUDA:
        with contextlib.suppress(CannotMake):
            _pip_install(path, "--no-deps", f"{package}=={mooncake}", CUDA_RUNTIME)
            return
    raise CannotMake(f"of Mooncake {mooncake} pip finds no wheel that can be run without a GPU")


def _run_without_cuda(packages: pathlib.Path) -> None:
    """Lets the engine of a wheel for CUDA be imported on a machine that has none, and use the CPU's memory.

    It looks for libraries beside itself first: there are the CUDA runtime, which is a package, and a driver of our own
    in which every function says that there is no device.
    """
    engine = packages / "mooncake"
    (runtime,) = packages.glob("nvidia/*/lib/libcudart.so.*")
    (engine / runtime.name).symlink_to(runtime)
    symbols = run(["nm", "--dynamic", "--undefined-only", *map(str, engine.glob("*.so"))]).stdout
    functions = sorted(set(re.findall(r" U (cu[A-Z]\w*)$", symbols, re.MULTILINE)))
    source = engine / "no_driver.c"
    source.write_text(
        "".join(f"int {function}(void) {{ return 100; }}  // CUDA_ERROR_NO_DEVICE\n" for function in functions)
    )
    done = run(["gcc", "-shared", "-fPIC", "-o", str(engine / "libcuda.so.1"), str(source)])
    if done.returncode:
        raise CannotMake(f"gcc cannot build a driver for no device:\n{done.stdout[-2000:]}")


def _companions(folder: pathlib.Path) -> list[str]:
    """The versions of COMPANIONS that the installed sglang asks for."""
    (metadata,) = _site_packages(folder).glob("sglang-*.dist-info/METADATA")
    pins = re.findall(r"^Requires-Dist: ([\w-]+)==([\w.]+)", metadata.read_text(), re.MULTILINE)
    return sorted({f"{package}=={version}" for package, version in pins if package in COMPANIONS})


def _new_venv(folder: pathlib.Path) -> pathlib.Path:
    shutil.rmtree(folder, ignore_errors=True)
    venv.EnvBuilder(symlinks=True).create(folder)
    return folder / "bin" / "python"


def _new_in_front(behind: pathlib.Path, folder: pathlib.Path) -> pathlib.Path:
    """Make a new environment that sees the packages of the environment of the python `behind` after its own.

    addsitedir, because a plain path line would leave the .pth files of `behind` unread. The name sorts first, so that
    the .pth files of packages installed in `folder` can already import what lies behind.
    """
    path = _new_venv(folder)
    line = f"import site; site.addsitedir({str(_site_packages(behind.parent.parent))!r})\n"
    (_site_packages(folder) / "00-behind.pth").write_text(line)
    return path


def _bundled_pip() -> pathlib.Path | None:
    """The wheel of the pip that comes with this python (Debian has it in python3-venv).

    It runs from its wheel to install the newest pip: a new environment with that is 8 s sooner there than one made
    with_pip, and the newest pip reads the registry's long lists in a third of the time that older ones take.
    """
    spec = importlib.util.find_spec("ensurepip")
    bundled = pathlib.Path(spec.origin).with_name("_bundled") if spec and spec.origin else None
    for folder in (sysconfig.get_config_var("WHEEL_PKG_DIR"), bundled):
        wheels = sorted(pathlib.Path(folder).glob("pip-*.whl")) if folder else []
        if wheels:
            return wheels[-1]
    return None


def _site_packages(folder: pathlib.Path) -> pathlib.Path:
    return folder / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"


def _pip_install(path: pathlib.Path, *arguments: str, pip: pathlib.Path | None = None) -> None:
    """Install `arguments` in the environment of the python `path`, with the pip in it or with the wheel `pip`."""
    _pip("install", path, "--no-compile", *arguments, pip=pip)


def _pip(what: str, path: pathlib.Path, *arguments: str, pip: pathlib.Path | None = None) -> None:
    command = [str(path), "-m", "pip", what, "--quiet", "--disable-pip-version-check", *arguments]
    done = run(command, **({"PYTHONPATH": str(pip)} if pip else {}))
    if done.returncode:
        raise CannotMake(f"pip {what} {' '.join(arguments)} failed:\n{done.stdout[-2000:]}")


def _check_torch(path: pathlib.Path) -> None:
    done = run([str(path), "-c", "import torch; print(torch.__version__)"])
    if not done.stdout.strip().endswith("+cpu"):
        raise CannotMake(f"torch is not a CPU build: {done.stdout[-500:]}")


def run(command: list[str], **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a command with no input and both of its outputs in `stdout`; an interrupt ends it with all its children."""
    process = subprocess.Popen(
        command,
        env={**os.environ, **variables},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=DEADLINE_S)
    except BaseException:
        try:
            os.killpg(process.pid, signal.SIGINT)  # pip then removes its temporary folders
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(5)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        raise
    return subprocess.CompletedProcess(command, process.returncode, output)


def _mute_torchvision_extension(folder: pathlib.Path) -> None:
    """Let torchvision be imported beside a CPU torch.

    The registry's build is one for CUDA: its extension does not load, so the operators that the extension would have
    declared must not be registered either.
    """
    registrations = _site_packages(folder) / "torchvision" / "_meta_registrations.py"
    registrations.write_text("import torchvision.extension  # noqa: F401\n")


def _missing_debian_packages(for_cuda: bool) -> list[str]:
    libraries = {**MOONCAKE_LIBRARIES, **(CUDA_MOONCAKE_LIBRARIES if for_cuda else {})}
    missing = [package for package, library in libraries.items() if not _loads(library)]
    missing += [package for package, program in COMPILER.items() if for_cuda and not shutil.which(program)]
    if _bundled_pip() is None:
        missing.append("python3-venv")
    return missing


def _loads(library: str) -> bool:
    try:
        ctypes.CDLL(library)
    except OSError:
        return False
    return True


@functools.cache
def _need_debian_packages(for_cuda: bool = False) -> None:
    missing = _missing_debian_packages(for_cuda)
    if not missing:
        return
    if os.geteuid() == 0 and shutil.which("apt-get"):
        say(f"installing Debian packages: {' '.join(missing)}")
        # Whether this did what was needed is looked at afterwards: one dead source among many does no harm.
        run(["apt-get", "update"])
        run(["apt-get", "install", "-y", "--no-install-recommends", *missing], DEBIAN_FRONTEND="noninteractive")
        missing = _missing_debian_packages(for_cuda)
    if missing:
        raise CannotMake(f"please install what Mooncake and Python need: apt-get install {' '.join(missing)}")


@contextlib.contextmanager
def locked(name: str) -> Iterator[None]:
    """Keep other processes from making `name` meanwhile. Raises CannotMake if one of them takes half an hour."""
    VENVS.mkdir(parents=True, exist_ok=True)
    with open(VENVS / f"{name}.lock", "w") as lock:
        deadline = time.monotonic() + DEADLINE_S
        told = False
        while not _lock_is_ours(lock.fileno()):
            if time.monotonic() > deadline:
                raise CannotMake(f"another process has been making {name} for {DEADLINE_S:.0f} s")
            if not told:
                say(f"another process is making {name}; waiting for it")
                told = True
            time.sleep(0.2)
        yield


def _lock_is_ours(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def main(arguments: list[str]) -> int:
    """Make the environment named on the command line; print its python, or why it cannot be made."""
    if len(arguments) != 1:
        print(__doc__, file=sys.stderr)
        return 2
    try:
        print(python(arguments[0]))
    except CannotMake as error:
        say(str(error))
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
