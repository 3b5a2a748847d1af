"""What every test shares: one torch thread, no caches or home of the user's, and where photos and the repository are."""
from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

# Before torch is imported by anything: more threads than cores make tiny models slower, not faster.
os.environ.setdefault("OMP_NUM_THREADS", "1")

ROOT = Path(__file__).resolve().parents[1]


def pytest_configure(config: pytest.Config) -> None:
    # A home of its own for the whole session, so that no test reads or leaves anything in the user's.
    home = tempfile.mkdtemp(prefix="edgekd-tests-")
    os.environ.update(HOME=home, XDG_CACHE_HOME=f"{home}/cache", HF_HOME=f"{home}/hf", HF_HUB_OFFLINE="1", NO_COLOR="1")


@pytest.fixture(autouse=True)
def _one_torch_thread() -> Iterator[None]:
    if "torch" in sys.modules:
        import torch

        torch.set_num_threads(1)
    yield


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository's root."""
    return ROOT


@pytest.fixture(scope="session")
def photos() -> Path:
    """The photos that come with the repository."""
    return ROOT / "examples/photos"


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The data pack beside the checkout; the test is skipped where there is none."""
    path = ROOT.parent / "shared/data"
    if not path.is_dir():
        pytest.skip("the shared data pack is not beside this checkout")
    return path


@pytest.fixture
def make_photos(tmp_path: Path) -> Callable[..., Path]:
    """`make_photos(count=3, size=(80, 60))` writes a folder of small seeded photos and returns it."""

    def make(count: int = 3, size: tuple[int, int] = (80, 60), name: str = "photos") -> Path:
        folder = tmp_path / name
        folder.mkdir()
        rng = np.random.default_rng(0)
        for i in range(count):
            small = rng.integers(0, 255, (6, 8, 3), dtype=np.uint8)
            Image.fromarray(small).resize(size, Image.Resampling.BICUBIC).save(folder / f"photo{i}.png")
        return folder

    return make


@pytest.fixture(scope="session")
def edgekd() -> Callable[..., subprocess.CompletedProcess[str]]:
    """`edgekd("list", "recipes")` runs the command line in a process of its own."""

    def run(*args: object, cwd: Path = ROOT, timeout: float = 600, **env: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "edgekd", *map(str, args)]
        return subprocess.run(command, capture_output=True, text=True, cwd=cwd, timeout=timeout, stdin=subprocess.DEVNULL, env={**os.environ, **env})

    return run
