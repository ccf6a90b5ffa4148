"""The secret of a run on several machines: a file that its user alone may read."""

from __future__ import annotations

import os
import secrets
import stat
import tempfile
from pathlib import Path

SECRET_BYTES = 32


def new_secret(path: Path) -> None:
    """Writes a fresh secret, readable by this user only, at once or not at all.

    Raises:
        FileExistsError: if there is a file; machines may have copies of its secret.
    """
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w") as file:
            file.write(secrets.token_hex(SECRET_BYTES) + "\n")
            file.flush()
            os.fsync(file.fileno())
        os.link(temporary, path)
    finally:
        Path(temporary).unlink()


def read_secret(path: Path) -> bytes:
    """The secret in the file that `new_secret` wrote, or a copy of it.

    Raises:
        ValueError: if others may read or have written the file, or if it holds no secret.
        OSError: if it cannot be read.
    """
    with path.open("rb") as file:
        status = os.fstat(file.fileno())
        content = file.read(4096)
    if status.st_uid != os.geteuid():
        raise ValueError(
            f"{path} belongs to user {status.st_uid}, not to the user of this process ({os.geteuid()}), who could have "
            "put any secret there. Make a copy of your own, with mode 0600."
        )
    if mode := stat.S_IMODE(status.st_mode) & 0o177:
        raise ValueError(
            f"{path} has mode bits {mode:04o} set beyond 0600: other users may know the secret. Make a new one, or, if "
            f"nobody has read it, `chmod 600 {path}`."
        )
    try:
        secret = bytes.fromhex(content.decode("ascii"))
    except ValueError:
        secret = b""
    if len(secret) < SECRET_BYTES:
        raise ValueError(f"{path} holds no secret: at least {2 * SECRET_BYTES} hexadecimal digits. Make a new one.")
    return secret
