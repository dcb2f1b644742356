#!/usr/bin/env python
"""Fetch the Balloon set (39 MB), or take it from a folder or zip, check it and put it in place."""

import argparse
import hashlib
import http.client
import os
import re
import tempfile
import urllib.request
import zipfile
import zlib

from tqdm import tqdm

from d2ssl.atomic import atomic_folder
from d2ssl.errors import D2SSLError, exit_on_error

URL = "https://github.com/matterport/Mask_RCNN/releases/download/v2.1/balloon_dataset.zip"
CHECKSUM = "138409e5cce48ae88141067baae59024d79cfcfacbe5151c18c1e11b2cdf6cb8"
NUM_FILES = 76  # 61 + 13 photos, 2 annotation files
LARGEST_FILE = 64 * 2**20  # bytes; the largest of the set has some 2 MiB
_MEMBER = re.compile(r"(?:^|/)(train|val)/([^/]+\.jpg|via_region_data\.json)$")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--root",
        default=os.path.expanduser(os.getenv("DETECTRON2_DATASETS", "datasets")),
        help="folder of data sets; writes ROOT/balloon (default: $DETECTRON2_DATASETS, else "
        "datasets)",
    )
    parser.add_argument(
        "--from",
        dest="source",
        metavar="PATH",
        help="a folder or a zip that has train/ and val/, instead of the download",
    )
    return parser.parse_args()


def prepare(root: str, source: str | None = None) -> str:
    """
    Put the verified set into ``root/balloon``; returns that folder.

    Raises:
        D2SSLError: the source cannot be had or is not the published set, or ``root/balloon``
            holds something else or cannot be written.
    """
    target = os.path.join(root, "balloon")
    if os.path.isdir(target) and os.listdir(target):
        _verify(_read_folder(target), target, "move it away to prepare the set anew")
        return target
    with atomic_folder(target) as folder:  # first, or it would be downloaded and then not written
        files = _read(source)
        _verify(files, source or URL, "get it again")
        for name, content in files.items():
            path = os.path.join(folder, *name.split("/"))
            os.makedirs(os.path.dirname(path), exist_ok=True)
            with open(path, "wb") as f:
                f.write(content)
    return target


def _read(source: str | None) -> dict[str, bytes]:
    if source is None:
        with tempfile.TemporaryDirectory() as folder:
            archive = os.path.join(folder, "balloon_dataset.zip")
            _download(URL, archive)
            return _read_zip(archive)
    try:
        return _read_folder(source) if os.path.isdir(source) else _read_zip(source)
    except OSError as error:
        raise D2SSLError(f"{source}: cannot be read ({error.strerror or error})") from error


def checksum(files: dict[str, bytes]) -> str:
    """sha256 over name, length and content of each file, names sorted."""
    digest = hashlib.sha256()
    for name in sorted(files):
        digest.update(f"{name}\0{len(files[name])}\0".encode())
        digest.update(files[name])
    return digest.hexdigest()


def _verify(files: dict[str, bytes], source: str, fix: str) -> None:
    if checksum(files) != CHECKSUM:
        raise D2SSLError(
            f"{source}: is not the published Balloon set ({len(files)} of {NUM_FILES} files, or "
            f"other content); {fix}"
        )


def _read_folder(folder: str) -> dict[str, bytes]:
    """Name such as train/photo.jpg -> content, other files left out."""
    if not any(os.path.isdir(os.path.join(folder, split)) for split in ("train", "val")):
        folder = os.path.join(folder, "balloon")
    files = {}
    for split in ("train", "val"):
        inside = os.path.join(folder, split)
        for file in sorted(os.listdir(inside)) if os.path.isdir(inside) else ():
            if _MEMBER.search(f"{split}/{file}"):
                with open(os.path.join(inside, file), "rb") as f:
                    files[f"{split}/{file}"] = f.read()
    return files


def _read_zip(archive: str) -> dict[str, bytes]:
    """As :func:`_read_folder`. Nothing is extracted: no name in the zip becomes a path."""
    files = {}
    try:
        with zipfile.ZipFile(archive) as opened:
            for member in tqdm(opened.infolist(), "unpacking", unit="file"):
                found = _MEMBER.search(member.filename)
                if not found or member.filename.startswith("__MACOSX"):
                    continue
                if member.file_size > LARGEST_FILE:
                    raise D2SSLError(f"{archive}: {member.filename} is too large to be a photo")
                files["/".join(found.groups())] = opened.read(member)
    except FileNotFoundError as error:
        raise D2SSLError(f"{archive}: no such folder or zip; check the path") from error
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError, RuntimeError) as error:
        raise D2SSLError(f"{archive}: is no intact zip ({error}); get it again") from error
    return files


def _download(url: str, file: str) -> None:
    try:
        with urllib.request.urlopen(url, timeout=60) as response, open(file, "wb") as f:
            total = int(response.headers.get("Content-Length") or 0)
            with tqdm(
                desc="download", total=total or None, unit="B", unit_scale=True, unit_divisor=1024
            ) as bar:
                while block := response.read(2**18):
                    f.write(block)
                    bar.update(len(block))
            if total and f.tell() != total:
                raise OSError(f"the connection ended after {f.tell()} of {total} bytes")
    except (OSError, http.client.HTTPException) as error:
        raise D2SSLError(
            f"{url}: cannot be downloaded ({error}); download it by other means and give it "
            "with --from"
        ) from error


if __name__ == "__main__":
    args = parse_args()
    with exit_on_error():
        print(f"{prepare(args.root, args.source)}: the Balloon set, verified")
