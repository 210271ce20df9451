"""Folders of a training run: checked before it, kept with its settings, written whole after it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from planner.documents import digest_of, of_format, read_json
from planner.files import check_folder, output_folder, whole_folder, write_text
from planner.ir.errors import InputError
from planner.training.config import RunConfig
from planner.training.trainer import last_checkpoint

# Of a run's own folder: what it was begun with. Of an export: what training wrote into it.
SETTINGS, MARK = "settings.json", "training.json"
_FORMAT = 1
# Settings that a run may go on without, since they do not change what is learned.
ASIDE = frozenset({
    "output_dir", "export_dir", "changes_dir", "packages", "image_folder", "label_images",
    "save_steps", "logging_steps", "dataloader_workers", "on_error", "export_half",
    "activation_checkpointing", "fsdp", "fsdp_layer", "deepspeed",
})  # fmt: skip
# Settings that may name files or folders, of which contents count and not names.
INPUTS = frozenset({"model", "decoder", "start", "labels", "label_prompts", "conversations"})
# Of a folder with a model, what is computed with.
_COMPUTED_WITH = {".safetensors", ".bin", ".json", ".jinja", ".model"}


@contextmanager
def begun(config: RunConfig) -> Iterator[None]:
    """Check a run's folders and settings before anything is loaded, and keep the settings.

    They stay if there is a checkpoint in the end. Runs that were begun by versions that kept none
    go on. Raises InputError: a folder cannot be written, or would be lost, or the run was begun
    with other settings.
    """
    run = Path(config.output_dir)
    check_folder(run)
    for number, folder in enumerate(config.made):
        for other in (run, *config.made[:number], *config.made[number + 1 :]):
            if other.resolve().is_relative_to(folder.resolve()):
                raise InputError(
                    f"'{folder}' would be written over '{other}': name a folder for each"
                )
        check_folder(folder)
        check_folder(folder.parent)
        _check_export(folder)
    settings, path = _settings(config), run / SETTINGS
    if _has_checkpoint(run):
        if path.is_file():
            _check_same(config, _read(path), settings)
        yield
        return
    made = [place for place in (run, *run.parents) if not place.exists()]
    told = {"format": _FORMAT, "settings": settings}
    write_text(output_folder(run) / SETTINGS, json.dumps(told, indent=1) + "\n")
    try:
        yield
    finally:
        if not _has_checkpoint(run):
            path.unlink(missing_ok=True)
            with suppress(OSError):
                for place in made:
                    place.rmdir()


def _has_checkpoint(run: Path) -> bool:
    """Whether a run, or one of its parts, can go on."""
    parts = [path for path in run.iterdir() if path.is_dir()] if run.is_dir() else []
    # One that was cut short while it was written lies in a folder of its own.
    return any(last_checkpoint(path) for path in (run, *parts) if path.name != "incomplete")


def _read(path: Path) -> dict[str, Any]:
    told = of_format(read_json(path, "settings"), "format", _FORMAT, path, "file of settings")
    known = told.get("settings")
    if not isinstance(known, dict):
        raise InputError(f"the settings '{path}' are broken: there are none")
    return known


def _check_same(config: RunConfig, known: dict[str, Any], settings: dict[str, Any]) -> None:
    defaults = {name: field.default for name, field in type(config).model_fields.items()}
    for name, value in settings.items():
        # Settings that came later had their defaults.
        before = known.get(name, defaults[name])
        if before == value:
            continue
        if name in INPUTS:
            what = f"another {name} than '{getattr(config, name)}' is now"
        else:
            what = f"{name}={json.dumps(before)}, not {json.dumps(value)}"
        raise InputError(
            f"the run in '{config.output_dir}' was begun with {what}: go on with the same "
            "settings, or name another output_dir"
        )


def _settings(config: RunConfig) -> dict[str, Any]:
    """By name, all settings that change what is learned; of files, digests of their contents."""
    told = config.model_dump(mode="json", exclude=set(ASIDE))
    return {name: contents_told(value) if name in INPUTS else value for name, value in told.items()}


def contents_told(value: str | None) -> str | None:
    """A digest of what a file or a folder with a model holds; where there is none, the value."""
    if value is None:
        return None
    path = Path(value)
    try:
        if path.is_dir():
            files = [each for each in sorted(path.iterdir()) if each.suffix in _COMPUTED_WITH]
            return digest_of([[each.name, _digest(each)] for each in files if each.is_file()])
        return _digest(path) if path.is_file() else value
    except OSError:
        # Whoever loads it says why it cannot be read.
        return value


def _digest(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _check_export(folder: Path) -> None:
    """Raise InputError where a folder has what an export of training has not."""
    found = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    if not found:
        return
    if MARK not in found:
        raise InputError(
            f"'{folder}' is there already, not empty, and no export of planner train: name a new "
            "folder"
        )
    mark = folder / MARK
    told = of_format(read_json(mark, "export"), "format", _FORMAT, mark, "mark of an export")
    files = told.get("files")
    if foreign := sorted(found - {MARK, *(files if isinstance(files, list) else ())}):
        raise InputError(
            f"'{folder}' has files that planner train did not write, such as {foreign[0]}: name a "
            "new folder"
        )


@contextmanager
def exporting(folder: Path, config: RunConfig) -> Iterator[Path]:
    """A temporary folder that takes its name when all is written, in place of an earlier export.

    Raises InputError: it cannot be written, or has other files.
    """
    _check_export(folder)
    with whole_folder(folder, replaces=True) as made:
        yield made
        files = sorted(p.relative_to(made).as_posix() for p in made.rglob("*") if p.is_file())
        told = {"format": _FORMAT, "recipe": config.recipe, "files": files}
        write_text(made / MARK, json.dumps(told, indent=1) + "\n")
