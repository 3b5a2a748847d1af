"""onnxruntime-web, which the measuring page runs models on: one version, found where it lies, else installed by npm into the user's cache.

    $EDGEKD_ORT_WEB                        a folder with it
    node_modules                           of the page's folder or one above it, and of a checkout's examples
    ~/.cache/edgekd/browser-VERSION        `edgekd doctor --install browser`; $EDGEKD_HOME in place of ~/.cache/edgekd

The version is that of page/package.json, and page/package-lock.json has the hashes that npm checks.
"""
from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from edgekd import console
from edgekd.errors import EdgekdError

PAGE = Path(__file__).resolve().parents[1] / "page"
PACKAGE = "onnxruntime-web"
NEEDED = ("ort.wasm.min.mjs", "ort-wasm-simd-threaded.mjs", "ort-wasm-simd-threaded.wasm")
"""Files of its `dist` that the page asks for."""
INSTALL = "edgekd doctor --install browser"
MINUTES = 10.0

Progress = Callable[[str], None]


def version() -> str:
    """The one that is measured with."""
    return str(json.loads((PAGE / "package.json").read_text(encoding="utf-8"))["dependencies"][PACKAGE])


def cache() -> Path:
    """Where it is installed."""
    given = os.environ.get("EDGEKD_HOME")
    return (Path(given) if given else Path.home() / ".cache" / "edgekd") / f"browser-{version()}"


def find() -> Path | None:
    """Its folder `dist`, or None where it is nowhere in the right version.

    Raises:
        EdgekdError: EDGEKD_ORT_WEB names a folder that does not hold it, or another version of it.
    """
    if given := os.environ.get("EDGEKD_ORT_WEB"):
        for folder in (Path(given), Path(given) / "node_modules" / PACKAGE):
            if (found := _version_of(folder)) is not None:
                if found != version():
                    raise EdgekdError(f"EDGEKD_ORT_WEB has {PACKAGE} {found}, and {version()} is measured with", where=given,
                                      hint=f"npm install {PACKAGE}@{version()}, or leave EDGEKD_ORT_WEB unset")
                return folder / "dist"
        raise EdgekdError(f"EDGEKD_ORT_WEB is no folder of {PACKAGE}", where=given, hint="name the folder that has its package.json and dist")
    return next((folder / "dist" for folder in _places() if _version_of(folder) == version()), None)


def require(*, offline: bool, progress: Progress = console.log) -> Path:
    """Its folder `dist`, installed now if need be.

    Raises:
        EdgekdError: it is missing and the network is forbidden, or npm fails.
    """
    found = find()
    if found is not None:
        return found
    if offline:
        raise EdgekdError(f"{PACKAGE} {version()}, which models run on in a browser, is missing, and nothing is installed offline",
                          hint=f"with a network: {INSTALL}; or `npm install {PACKAGE}@{version()}` anywhere and EDGEKD_ORT_WEB=THAT_FOLDER")
    progress(f"{PACKAGE} {version()} is missing; installing it into {cache()}")
    return install(progress)


def install(progress: Progress = console.log) -> Path:
    """Install it into the user's cache, whole or not at all; its folder `dist`.

    Raises:
        EdgekdError: there is no npm, or it fails, with its last words.
    """
    folder = cache()
    if _version_of(folder / "node_modules" / PACKAGE) == version():
        return folder / "node_modules" / PACKAGE / "dist"
    npm = shutil.which("npm")
    if npm is None:
        raise EdgekdError(f"npm is missing, which installs {PACKAGE}", hint="apt-get install npm, or node from nodejs.org")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temp = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".part", dir=folder.parent))
    except OSError as e:
        raise EdgekdError(f"the cache cannot be written: {e.strerror or e}", where=folder.parent, hint="set EDGEKD_HOME to another folder") from e
    try:
        for name in ("package.json", "package-lock.json"):
            shutil.copyfile(PAGE / name, temp / name)
        _run([npm, "ci", "--ignore-scripts", "--no-audit", "--no-fund", "--loglevel=error"], temp)
        if _version_of(temp / "node_modules" / PACKAGE) != version():
            raise EdgekdError(f"npm did not bring {PACKAGE} {version()}", where=folder, hint=f"look at `npm config list`, then again: {INSTALL}")
        shutil.rmtree(folder, ignore_errors=True)  # of an installation that is not whole
        os.replace(temp, folder)
    finally:
        shutil.rmtree(temp, ignore_errors=True)
    progress(f"{PACKAGE} {version()} is in {folder}")
    return folder / "node_modules" / PACKAGE / "dist"


def _places() -> Iterator[Path]:
    """Where it may lie, the nearest first."""
    for folder in (PAGE, *PAGE.parents):
        yield folder / "node_modules" / PACKAGE
    yield PAGE.parents[2] / "examples" / "consumers" / "node_modules" / PACKAGE  # of a checkout
    yield cache() / "node_modules" / PACKAGE


def _version_of(folder: Path) -> str | None:
    """Of what lies there whole; None where it does not."""
    try:
        about = json.loads((folder / "package.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    whole = about.get("name") == PACKAGE and all((folder / "dist" / name).is_file() for name in NEEDED)
    return str(about.get("version")) if whole else None


def _run(command: list[str], folder: Path) -> None:
    with tempfile.TemporaryFile() as said:
        child = subprocess.Popen(command, cwd=folder, stdin=subprocess.DEVNULL, stdout=said, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            code: int | None = child.wait(MINUTES * 60)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            if child.poll() is None:
                os.killpg(child.pid, signal.SIGKILL)
                child.wait()
        said.seek(0)
        last = " / ".join(line.strip() for line in said.read().decode("utf-8", "replace").splitlines()[-4:] if line.strip())[:500]
    if code != 0:
        raise EdgekdError(f"npm could not install {PACKAGE}: {last or 'it said nothing' if code is not None else f'stopped after {MINUTES:g} minutes'}",
                          hint=f"look at the network and npm's registry, then again: {INSTALL}")
