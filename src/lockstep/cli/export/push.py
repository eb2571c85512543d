"""Brings an exported folder to the Hugging Face Hub."""

from __future__ import annotations

from pathlib import Path

from lockstep.errors import ConfigError

_LOGIN = "run `hf auth login`, or set HF_TOKEN to a token that may write"


def check_hub(repository: str) -> None:
    """Raises ConfigError for a name that is none, or where the hub does not know who asks: before an
    export's minutes of work.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError, LocalTokenNotFoundError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repository)
        HfApi().whoami()
    except HFValidationError as error:
        raise ConfigError(f"--push {repository}: give USER/NAME: {_first_line(error)}") from None
    except LocalTokenNotFoundError:
        raise ConfigError(f"--push {repository}: there is no token for the Hub: {_LOGIN}") from None
    except HfHubHTTPError as error:
        raise ConfigError(f"--push {repository}: the Hub refused the token ({_first_line(error)}): {_LOGIN}") from None
    except (HTTPError, OSError) as error:
        raise ConfigError(
            f"--push {repository}: the Hub can't be reached ({_first_line(error)}): export without --push, then "
            f"`hf upload {repository} FOLDER` where there is a network"
        ) from None


def push(folder: Path, repository: str) -> str:
    """Upload the folder to a repository, a new one private, and return its address.

    Raises ConfigError that names the folder, which stays, and the command to try again.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HTTPError
    from huggingface_hub.utils import disable_progress_bars

    disable_progress_bars()
    try:
        address = HfApi().create_repo(repository, private=True, exist_ok=True)
        HfApi().upload_folder(repo_id=repository, folder_path=folder, commit_message=f"Upload {folder.name}")
    except (HTTPError, OSError) as error:
        raise ConfigError(
            f"{folder} is exported; its upload failed ({_first_line(error)}): try `hf upload {repository} {folder}`"
        ) from None
    return str(address)


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).strip().split("\n")[0]
