"""Rebuild the pool of redistributable photos and cut-outs that the bundled weights were trained on.

    python benchmarks/training_pool.py --output pool

Packages come through their ordinary clients and are unpacked, not installed; one that cannot be had is skipped, by name.
Writes photos/*.jpg (long side <= 640), cutouts/*.png (RGBA, long side <= 256) and SOURCES.json (source, licence, count).
"""

from __future__ import annotations

import argparse
import bz2
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from PIL import Image, ImageDraw, ImageFont, ImageStat


class Source(NamedTuple):
    package: str
    kind: str  # pip, npm or apt
    version: str  # apt takes the one that the distribution has
    into: str  # photos or cutouts
    want: str  # regular expression, searched in the path inside the package
    licence: str
    limit: int = 10_000


SKY_CC0 = (  # from Unsplash, public domain according to the package's copyright file
    r"land/(badlands[0578]|beach[023456]|canyon[07]|city([4689]|1[012])|desert[12]|fields[125679]|fog[024]|forest[1-5]|"
    r"hills2|lava[126]|mountain[13-9]|sea[38]|sky[023789]|snow([0123467]|10)|water[08])\.jpg"
)
SKY_STATE = r"images/(land/(lava0|desert0|earthrise|nasa\d|space\d|station\d|loc\d)|scene/(engine2?|loc\d|army\d))\.jpg"
SKY_REST = rf"^(?!.*({SKY_CC0}|{SKY_STATE}|land/(bwerner|myrabella|dmottl|mfield|lava5)|-(sfiera|striker|harro|iridium|spfld)|scene/(geoscan|eso|lobby|tempest))).*images/(land|scene)/"
CLIPART = r"png/(animals|food|plants|electronics|buildings|transportation/(boating|vehicles)|office/telephone|recreation/(holiday|music|party|sports|toys|games/chess))/"
# Tux Paint's stamps are GPL-2 as a whole; these are the ones its contributor list names as NASA's or public domain.
STAMPS = r"stamps/(space/.*|town/(cartoon|houses)/.*|clothes/t_[a-z]+|.*/(basketball|cricketball|tennis_(ball|racket)|traffic_cone|candy_?canes?|guitar2))\.png"
SOURCES = (
    Source("scikit-image", "pip", "0.16.2", "photos", r"data/(astronaut|moon|hubble_deep_field|rocket)\.", "public domain (NASA); CC0 (SpaceX)"),
    Source("scikit-image", "pip", "0.16.2", "photos", r"data/(chelsea|coffee|brick|grass|gravel|retina|motorcycle_left)\.", "CC0"),
    Source("scikit-image", "pip", "0.16.2", "photos", r"data/(coins|ihc)\.", "BSD-3-Clause (as distributed)"),
    Source("scikit-learn", "pip", "1.2.2", "photos", r"images/(china|flower)\.jpg", "CC-BY-2.0"),
    Source("scipy", "pip", "1.5.4", "photos", r"misc/face\.dat", "public domain"),
    Source("matplotlib", "pip", "3.5.3", "photos", r"sample_data/grace_hopper\.jpg", "public domain (US Navy)"),
    Source("endless-sky-data", "apt", "", "photos", SKY_CC0, "public domain (Unsplash)"),
    Source("endless-sky-data", "apt", "", "photos", SKY_STATE, "public domain (US government)"),
    Source("endless-sky-data", "apt", "", "photos", SKY_REST, "public domain (morgueFile)"),
    Source("lomiri-wallpapers-16.04", "apt", "", "photos", r"(aitzgorri|friends|life|picosdeeuropa|Picture_|sunset|Wine).*\.jpg", "CC-BY-4.0"),
    Source("lomiri-wallpapers-16.04", "apt", "", "photos", r"seeding.*\.jpg", "CC0"),
    Source("opencv-doc", "apt", "", "photos", r"examples/data/(aero1|aloeL|apple|board|building|butterfly|chicky_512|ela_original|fruits|graf1|home|leuvenA|orange|rubberwhale1|smarties|stuff)\.", "Apache-2.0 AND BSD-3-Clause (as distributed)"),
    # File names carry Unsplash's numbers; those below 250000 are taken to be from before June 2017, when all were CC0.
    Source("tabler-ui", "npm", "0.0.32", "photos", r"package/src/demo/photos/[a-z-]+-(\d{1,5}|1\d{5}|2[0-4]\d{4})-500\.jpg", "CC0"),
    Source("startbootstrap-agency", "npm", "4.0.0-beta", "photos", r"img/(portfolio/\d+-full|team/[23])\.jpg", "MIT (as distributed)"),
    Source("startbootstrap-business-casual", "npm", "4.0.0-beta.2", "photos", r"img/(about|bg|intro|products-\d+)\.jpg", "MIT (as distributed)"),
    Source("startbootstrap-creative", "npm", "4.0.0-alpha", "photos", r"img/portfolio/fullsize/\d\.jpg", "MIT (as distributed)"),
    Source("material-kit", "npm", "2.0.4", "photos", r"examples/(studio-[1-4]|olu-eletu|clem-.*|cynthia.*|mariya.*)\.jpg", "MIT (as distributed)"),
    Source("fonts-noto-color-emoji", "apt", "", "cutouts", r"NotoColorEmoji\.ttf", "OFL-1.1"),
    Source("openclipart-png", "apt", "", "cutouts", CLIPART + r".*\.png", "public domain", limit=400),
    Source("tuxpaint-stamps-default", "apt", "", "cutouts", STAMPS, "public domain"),
)


def fetch(source: Source, cache: Path) -> Path:
    """Download and unpack a package once; return its folder. Raises CalledProcessError or OSError when it cannot be had."""
    folder = cache / f"{source.kind}-{source.package}"
    done, download = folder / ".done", folder / ".download"
    if done.exists():
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    download.mkdir(parents=True)
    command = {
        "pip": [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:", "--python-version=3.8"],
        "npm": ["npm", "pack", "--silent"],
        "apt": ["apt-get", "download", "-q"],
    }[source.kind]
    name = source.package + {"pip": "==", "npm": "@", "apt": ""}[source.kind] + source.version
    subprocess.run([*command, name], cwd=download, check=True, stdout=subprocess.DEVNULL)
    archive = next(download.iterdir())
    if source.kind == "apt":
        subprocess.run(["dpkg", "-x", str(archive), str(folder)], check=True)
    else:
        shutil.unpack_archive(archive, folder, "zip" if source.kind == "pip" else "gztar")
    done.write_text(archive.name)
    shutil.rmtree(download)
    return folder


def emoji(font_file: Path) -> Iterator[tuple[str, Image.Image]]:
    """Yield (code point in hex, RGBA glyph) for every single-code-point emoji; flags and skin tones take several and drop out."""
    font = ImageFont.truetype(str(font_file), 109)  # the only size that the bitmap font has
    for code in (*range(0x203C, 0x3300), *range(0x1F000, 0x1F1E6), *range(0x1F200, 0x1F3FB), *range(0x1F400, 0x1FB00)):
        glyph = Image.new("RGBA", (136, 128))
        ImageDraw.Draw(glyph).text((0, 0), chr(code), font=font, embedded_color=True)
        if glyph.getbbox():
            yield f"{code:x}", glyph


def pictures(source: Source, folder: Path) -> Iterator[tuple[str, Image.Image]]:
    """Yield (name, picture) for the files of `source` in path order."""
    paths = sorted(path for f in folder.rglob("*") if f.is_file() and re.search(source.want, path := f.relative_to(folder).as_posix()))
    for file in (folder / path for path in paths[:: -(-len(paths) // source.limit) or 1]):
        if file.suffix == ".ttf":
            yield from emoji(file)
        elif file.suffix == ".dat":  # scipy keeps its raccoon as bzip2-compressed raw RGB
            yield file.stem, Image.frombytes("RGB", (1024, 768), bz2.decompress(file.read_bytes()))
        else:
            yield f"{file.parent.name}_{file.stem}", Image.open(file).convert("RGB" if source.into == "photos" else "RGBA")


def save(source: Source, name: str, picture: Image.Image, output: Path) -> bool:
    """Write one picture under a name made of package and `name`; False for a cut-out that is empty, tiny or (nearly) a full box."""
    target = output / source.into / f"{source.package}_{re.sub(r'[^A-Za-z0-9]+', '_', name)}"
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.into == "cutouts":
        alpha = picture.getchannel("A").point(lambda a: 255 if a > 127 else 0)
        left, top, right, bottom = box = alpha.getbbox() or (0, 0, 0, 0)
        if min(right - left, bottom - top) < 24 or ImageStat.Stat(alpha.crop(box)).mean[0] > 0.97 * 255:
            return False
        picture = picture.crop(box)
    side, suffix = (640, "jpg") if source.into == "photos" else (256, "png")
    picture.thumbnail((side, side), Image.Resampling.LANCZOS)
    picture.save(f"{target}.{suffix}", quality=88)
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description="Rebuild the pool of photos and cut-outs that the bundled weights were trained on.")
    parser.add_argument("--output", type=Path, default=Path("pool"), help="folder to write; packages unpack under its src/")
    output = parser.parse_args().output.resolve()
    rows = []
    for source in SOURCES:
        try:
            folder = fetch(source, output / "src")
        except (subprocess.CalledProcessError, OSError) as error:
            print(f"skipped: {source.package}: {error}", file=sys.stderr)
            continue
        count = sum(save(source, name, picture, output) for name, picture in pictures(source, folder))
        rows.append({"source": (folder / ".done").read_text().strip(), "into": source.into, "licence": source.licence, "count": count})
        print(f"{count:5d} {source.into:8s} {source.package:26s} {source.licence}")
    (output / "SOURCES.json").write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
