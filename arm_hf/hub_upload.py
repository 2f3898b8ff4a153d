"""Put a folder into a model repository of the Hub in one commit, or say in one line why that did not happen."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

STALE_ENDINGS = (".safetensors", ".safetensors.index.json", ".py", ".bin", ".bin.index.json")
"""Files of an older publication that a loader would still read: they go when the new folder lacks them."""

OF_THE_HUB = (".gitattributes",)
"""What the Hub itself puts into a new repository."""


class UploadError(OSError):
    """Nothing was published; the text is one line for the user, without the token."""


@dataclass(frozen=True)
class Destination:
    """Where a folder goes.

    Attributes:
        repo_id: `"organisation/name"`, or `"name"` for the owner of the token.
        revision: Branch; it is made if the repository lacks it.
        private: True makes the repository private; an existing public one is then refused.
        update: Allow a further commit to a branch that holds files already.
    """

    repo_id: str
    revision: str = "main"
    private: bool = False
    update: bool = False

    def __post_init__(self) -> None:
        from huggingface_hub.utils import validate_repo_id

        validate_repo_id(self.repo_id)
        if not self.revision or self.revision != self.revision.strip():
            raise ValueError(f"the revision must be the name of a branch, got {self.revision!r}")


def files_of(folder: Path) -> list[Path]:
    """All files of a folder that is about to be published, sorted by their path in it.

    Raises:
        ValueError: One of them is a pickle, or a link that leaves the folder.
    """
    found = sorted(path for path in folder.rglob("*") if path.is_file())
    for path in found:
        if path.suffix in (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt"):
            raise ValueError(f"{path.name} may be a pickle, which runs code when it is read; publish safetensors only")
        if path.is_symlink() and not path.resolve().is_relative_to(folder.resolve()):
            raise ValueError(f"{path.name} is a link to a file outside the folder")
    return found


def require_token(token: str | None = None) -> str:
    """The access token, given or of this machine.

    Raises:
        UploadError: There is none.
    """
    from huggingface_hub import get_token

    token = token or get_token()
    if not token:
        raise UploadError(
            "there is no access token: make one with write access at https://huggingface.co/settings/tokens, then run "
            "`hf auth login` or set HF_TOKEN"
        )
    return token


def upload(
    folder: Path, destination: Destination, message: str, token: str | None = None, endpoint: str | None = None
) -> str:
    """Publish a folder in one commit.

    The Hub shows a commit whole or not at all, so an upload that breaks off publishes nothing. Large files that arrived
    before are not sent again when the same call is repeated.

    Args:
        folder: What to publish.
        destination: Where to.
        message: Title of the commit.
        token: Access token; by default the one of `hf auth login` or `HF_TOKEN`.
        endpoint: Address of the Hub; by default `HF_ENDPOINT`.

    Returns:
        Address of the commit.

    Raises:
        UploadError: Nothing was published: no token, no network, missing rights, a repository with other content, ...
        ValueError: The folder holds what must not be published.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    paths = files_of(folder)
    token = require_token(token)
    api = HfApi(endpoint=endpoint, token=token)
    with _one_line(destination, token, api.endpoint):
        repo_id, is_new = _create(api, destination)
        head, there = (None, ()) if is_new else _content(api, repo_id, destination)
        if destination.revision != "main":
            api.create_branch(repo_id, branch=destination.revision, exist_ok=True)
        names = {path.relative_to(folder).as_posix(): path for path in paths}
        stale = [name for name in there if name not in names and "/" not in name and name.endswith(STALE_ENDINGS)]
        operations: list[Any] = [CommitOperationAdd(name, str(path)) for name, path in names.items()]
        operations += [CommitOperationDelete(name) for name in stale]
        commit = api.create_commit(
            repo_id, operations, commit_message=message, revision=destination.revision, parent_commit=head
        )
    return str(commit.commit_url)


def _create(api: Any, destination: Destination) -> tuple[str, bool]:
    """Make the repository; give its full id, and whether it is new."""
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return api.create_repo(destination.repo_id, private=destination.private or None).repo_id, True
    except HfHubHTTPError as error:
        if error.response.status_code != 409:
            raise
    return api.model_info(destination.repo_id).id, False


def _content(api: Any, repo_id: str, destination: Destination) -> tuple[str | None, Sequence[str]]:
    """Newest commit and files of the branch in an existing repository, if it may be written to."""
    from huggingface_hub.errors import RevisionNotFoundError

    if destination.private and not api.model_info(repo_id).private:
        raise UploadError(f"{repo_id} exists and is public; make it private on the Hub, or leave out --private")
    try:
        info = api.model_info(repo_id, revision=destination.revision)
    except RevisionNotFoundError:
        return None, ()  # a new branch; nothing that is there changes
    there = [file.rfilename for file in info.siblings or () if file.rfilename not in OF_THE_HUB]
    if there and not destination.update:
        raise UploadError(
            f"{repo_id} holds {len(there)} files already on {destination.revision!r}; pass --update for a further "
            "commit, --revision for a branch of its own, or choose another name"
        )
    return info.sha, there


@contextmanager
def _one_line(destination: Destination, token: str, endpoint: str) -> Iterator[None]:
    """Turn what the Hub and the network answer into one `UploadError` line."""
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled
    from huggingface_hub.utils import httpx

    try:
        yield
        return
    except UploadError:
        raise
    except OfflineModeIsEnabled as error:
        line, cause = "HF_HUB_OFFLINE is set; unset it to publish", error
    except HfHubHTTPError as error:
        line, cause = _answer(error, destination), error
    except httpx.TransportError as error:
        line, cause = f"cannot reach {endpoint} ({type(error).__name__}); check the network and try again", error
    except (httpx.HTTPError, OSError, RuntimeError, ValueError) as error:
        # An upload thread wraps what happened to it; the innermost error says it.
        cause = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        line = _answer(cause, destination) if isinstance(cause, HfHubHTTPError) else f"{error}: {cause}"
    line = " ".join(line.replace(token, "(token)").split())
    raise UploadError(f"{line}. Nothing was published; the same command goes on where it stopped") from cause


def _answer(error: Any, destination: Destination) -> str:
    """What an HTTP error of the Hub means for the one who publishes."""
    status, repo_id = error.response.status_code, destination.repo_id
    said = f" ({error.server_message})" if error.server_message else ""
    meanings = {
        401: "the Hub does not accept the access token: run `hf auth login` again, or set HF_TOKEN",
        403: f"the access token may not write to {repo_id}: it needs write access there",
        404: f"{repo_id} cannot be found with this access token",
        409: f"{repo_id} is being changed by somebody else; try again",
        412: f"{repo_id} got another commit in the meantime; look at it and try again",
        413: "the Hub refuses files of this size",
        429: "the Hub asks to wait: too many requests",
    }
    return meanings.get(status, f"the Hub answered with status {status}") + said
