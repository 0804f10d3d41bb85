"""Upload of a checkpoint folder to the Hub, in one commit: other people see the old files or all of the new ones."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from mmx.config.environment import cache_folder
from mmx.errors import CheckpointError
from mmx.hub.client import hub_endpoint, hub_errors
from mmx.hub.model_card import CARD, is_generated, model_card
from mmx.models.checkpoint import (
    CHECKPOINT_FILES,
    HF_CONFIG,
    PICKLED_FILES,
    PROVENANCE,
    SOURCES,
    WEIGHTS,
    load_model,
    open_checkpoint,
)

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd, CommitOperationCopy, CommitOperationDelete, HfApi

    Operation = CommitOperationAdd | CommitOperationCopy | CommitOperationDelete

NAME = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)
FURTHER_FILES = (CARD, "LICENSE", "LICENSE.*")
ADVICE = "check the name and the network."


@dataclass(frozen=True)
class PushOptions:
    """Options of a push.

    Args:
        private: create the repository as a private one. An existing one keeps its visibility.
        revision: branch to push to, created if it is missing. Default: main.
        license_name: license in a generated model card, such as apache-2.0.
    """

    private: bool = False
    revision: str | None = None
    license_name: str | None = None


class RepositoryHead(NamedTuple):
    """The newest commit of a branch, and the paths of its files."""

    commit: str | None
    files: frozenset[str]


def push_checkpoint(folder: str | Path, name: str, options: PushOptions | None = None) -> str:
    """Upload a checkpoint to a repository, which is created if it is missing, and return the address of the commit.

    The checkpoint is loaded first, so that no damaged one is uploaded. A README.md of the folder is uploaded; if there
    is none, a model card is generated, unless the repository has one that its owner wrote.

    Args:
        folder: the checkpoint, or `bundled`.
        name: public name, `user/name`.

    Raises:
        CheckpointError: the folder is no checkpoint of this version of mmx, the name has no user, there is no token, or
            the Hub refuses. The repository then has the files that it had before.
    """
    options = options or PushOptions()
    check_name(name)
    place = open_checkpoint(folder)
    files = _files(place)
    model = load_model(place)
    token = _token(name)
    from huggingface_hub import HfApi

    api = HfApi(endpoint=hub_endpoint(), token=token, library_name="mmx")
    with hub_errors(name, f"{name!r} could not be pushed", ADVICE, options.revision):
        if not api.repo_exists(name):
            api.create_repo(name, private=options.private or None, exist_ok=True)
        if options.revision is not None:
            api.create_branch(name, branch=options.revision, exist_ok=True)
        head = _read_head(api, name, options.revision)
        _check_replaceable(name, head)
        operations: list[Operation] = [*_additions(place, files), *_deletions(head, files)]
        if CARD not in files and not _has_own_card(api, name, head):
            operations.append(_generated_card(model_card(name, place, model, options.license_name)))
        commit = api.create_commit(
            name,
            operations,
            commit_message="Upload a checkpoint of mmx",
            revision=options.revision,
            parent_commit=head.commit,  # refused if somebody else pushes meanwhile: files of two models never mix
        )
    return str(commit.commit_url)


def check_name(name: str) -> None:
    """Raise CheckpointError unless this is a public name with its user or organization."""
    if not (isinstance(name, str) and NAME.fullmatch(name)):
        raise CheckpointError(
            f"{name!r} is no public name; expected user/name, such as anna/captions.", code="hub.name", name=name
        )


def _files(folder: Path) -> list[str]:
    """The files of a checkpoint that are uploaded, as paths within it. Raises CheckpointError for a pickle."""
    found = []
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and _matches(name, (*CHECKPOINT_FILES, *FURTHER_FILES)):
            found.append(name)
    pickled = [name for name in found if _matches(name, PICKLED_FILES)]
    if pickled:
        raise CheckpointError(
            f"{folder / pickled[0]} is a pickle by its name, which may run code and which mmx.load does not download; "
            "save it in another format.",
            code="hub.pickle",
            path=str(folder / pickled[0]),
        )
    return found


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _token(name: str) -> str:
    """The access token of this machine. Raises CheckpointError if there is none."""
    from huggingface_hub import get_token

    token = get_token()
    if not token:
        raise CheckpointError(
            f"{name!r} could not be pushed, because there is no access token; log in with: hf auth login, or set "
            "HF_TOKEN.",
            code="hub.no_token",
            name=name,
        )
    return token


def _read_head(api: HfApi, name: str, revision: str | None) -> RepositoryHead:
    info = api.model_info(name, revision=revision)
    return RepositoryHead(info.sha, frozenset(sibling.rfilename for sibling in info.siblings or ()))


def _check_replaceable(name: str, head: RepositoryHead) -> None:
    """Raise CheckpointError if the repository has a model that is no checkpoint of mmx."""
    if PROVENANCE not in head.files and (WEIGHTS in head.files or HF_CONFIG in head.files):
        raise CheckpointError(
            f"{name!r} has a model that is no checkpoint of mmx, and nothing was replaced; give a new name.",
            code="hub.not_replaceable",
            name=name,
        )


def _additions(folder: Path, files: Sequence[str]) -> list[CommitOperationAdd]:
    from huggingface_hub import CommitOperationAdd

    return [CommitOperationAdd(path_in_repo=file, path_or_fileobj=folder / file) for file in files]


def _deletions(head: RepositoryHead, files: Sequence[str]) -> list[CommitOperationDelete]:
    """Deletion of files that only encoders of an earlier checkpoint had."""
    from huggingface_hub import CommitOperationDelete

    stale = [file for file in sorted(head.files - set(files)) if file.startswith(f"{SOURCES}/")]
    return [CommitOperationDelete(path_in_repo=file) for file in stale]


def _generated_card(text: str) -> CommitOperationAdd:
    from huggingface_hub import CommitOperationAdd

    return CommitOperationAdd(path_in_repo=CARD, path_or_fileobj=text.encode())


def _has_own_card(api: HfApi, name: str, head: RepositoryHead) -> bool:
    """Whether the repository has a model card that was not generated here."""
    if CARD not in head.files:
        return False
    path = api.hf_hub_download(name, CARD, revision=head.commit, cache_dir=cache_folder())
    return not is_generated(Path(path).read_text(encoding="utf-8", errors="replace"))
