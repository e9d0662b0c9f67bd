"""Puts the files of the exporting stage into the job folder, so that a folder with a config.json is always a whole model."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path, PurePosixPath

from algorithms.modeling.files import file_digest
from configs.errors import DataError
from configs.names import EXPORTS
from jobs.manifest import ManifestFile, Publication
from jobs.results.artifacts import FileRecord, check_files

logger = logging.getLogger(__name__)

CONFIG = "config.json"
_MODEL_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".engine")


def format_folder(name: str, formats: tuple[str, ...]) -> str:
    """Where a format stands below the exporting stage's folder and below the job folder; the first one in the folder itself."""
    return "" if name == formats[0] else f"{EXPORTS}/{name}"


def check_target(job_dir: Path, published: Publication | None) -> None:
    """Refuse a job folder that holds a model of someone else's, before any work is done.

    MODEL_PATH is where the result goes; that its name suggests the opposite has cost people the model they meant to read.

    Raises:
        DataError: the folder has model files that no earlier run of this job put there.
    """
    if not job_dir.is_dir():
        return
    ours = published.files if published else {}
    present = (path.name for path in job_dir.iterdir() if path.name == CONFIG or path.suffix in _MODEL_SUFFIXES)
    foreign = sorted(name for name in present if name not in ours and not name.startswith("."))
    if foreign:
        raise DataError(
            f"{job_dir} already holds a model that this job did not write ({', '.join(foreign[:3])}). Choose another JOB_ID "
            "or MODEL_PATH (the folder that the result goes to), or move those files away."
        )


def publish(
    folder: Path, job_dir: Path, manifest: ManifestFile, publication: Publication, *, withheld: Collection[str] = ()
) -> None:
    """Link the publication's files from ``folder`` into ``job_dir``, each config.json last, and remove an earlier one's.

    Files are hard links, or copies where the file system has none. The manifest lists old and new files while the work is
    going on, so that a kill leaves nothing behind that the next run would not clean up. ``withheld`` are folders (as
    :func:`format_folder` names them) whose format failed its certificate: their files are there, but for config.json or GGUF.
    """
    earlier = manifest.current.published
    old = earlier.files if earlier else {}
    _remove_configs(job_dir, old)
    manifest.update(published=Publication(key="", files={**old, **publication.files}))
    _remove_stale(job_dir, [name for name in old if name not in publication.files])
    for name in sorted(publication.files, key=_config_last):
        if not _is_withheld(name, withheld):
            place_file(folder / name, job_dir / name)
    manifest.update(published=publication)


def is_published(
    folder: Path, job_dir: Path, published: Publication | None, publication: Publication, withheld: Collection[str] = ()
) -> bool:
    """Whether the job folder already holds the publication: all its files, with the content that the stage gave them.

    A file that is the very same as its twin in ``folder`` is not read again; a difference is said.
    """
    if published is None or published.key != publication.key:
        return False
    expected = {name: record for name, record in publication.files.items() if not _is_withheld(name, withheld)}
    # A card that was written over since is no longer the stage's.
    theirs = {name: record for name, record in expected.items() if published.files.get(name) == record}
    own = {name: record for name, record in theirs.items() if not _is_same_file(folder / name, job_dir / name)}
    state = check_files(job_dir, own, full=True)
    if own and not state.intact:
        problems = state.problems or [f"{name} is missing" for name in own]
        logger.warning("%s is not what was published (%s); its files are put there again", job_dir, "; ".join(problems[:5]))
        return False
    return True


def _is_same_file(first: Path, second: Path) -> bool:
    return first.is_file() and second.is_file() and first.samefile(second)


def count_files(number: int) -> str:
    """So many files, in words."""
    return f"{number} file{'' if number == 1 else 's'}"


def place_file(source: Path, target: Path) -> None:
    """Make ``target`` the same file as ``source``: a hard link, or a copy. A reader sees the old file or the new one.

    It becomes readable for whoever may enter its folder: some writers leave files that only their owner can open.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.exists() and target.samefile(source):
        return
    partial = target.with_name(f".{target.name}.partial")
    partial.unlink(missing_ok=True)
    try:
        os.link(source, partial)
    except OSError:
        shutil.copyfile(source, partial)
    partial.chmod(target.parent.stat().st_mode & 0o666)
    partial.replace(target)


def write_extra(path: Path, text: str, manifest: ManifestFile, job_dir: Path) -> None:
    """Write a text file beside the published ones (the model card) and list it with them.

    It replaces a link, never the file behind it: what the stage wrote keeps its content.
    """
    partial = path.with_name(f".{path.name}.partial")
    path.parent.mkdir(parents=True, exist_ok=True)
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)
    published = manifest.current.published
    name = path.relative_to(job_dir).as_posix()
    if published is not None:
        record = FileRecord(size=path.stat().st_size, digest=file_digest(path))
        manifest.update(published=Publication(key=published.key, files={**published.files, name: record}))


def _remove_configs(job_dir: Path, files: Mapping[str, FileRecord]) -> None:
    for name in files:
        if PurePosixPath(name).name == CONFIG:
            (job_dir / name).unlink(missing_ok=True)


def _remove_stale(job_dir: Path, names: list[str]) -> None:
    for name in names:
        path = job_dir / name
        path.unlink(missing_ok=True)
        for folder in path.parents:
            if folder == job_dir or not folder.is_dir() or any(folder.iterdir()):
                break
            folder.rmdir()
    if names:
        logger.info("Removed %s of an earlier result from %s", count_files(len(names)), job_dir)


def _config_last(name: str) -> tuple[bool, bool, str]:
    """Configs after everything else, the job folder's own after those of the exports."""
    path = PurePosixPath(name)
    return path.name == CONFIG, path.name == CONFIG and len(path.parts) == 1, name


def _is_withheld(name: str, folders: Collection[str]) -> bool:
    """Whether a file is what makes a model of one of ``folders`` (see :func:`format_folder`): its config.json or GGUF file."""
    path = PurePosixPath(name)
    return (path.name == CONFIG or path.suffix == ".gguf") and path.parent in map(PurePosixPath, folders)
