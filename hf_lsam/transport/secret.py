"""The secret of a run on several machines: a file that only its user may read, and the certificate derived from it.

All machines of a run derive the same key and certificate from the secret. TLS's own proof of a certificate therefore
proves to each machine that the other one knows the secret; no other certificate is trusted.
"""

from __future__ import annotations

import hmac
import os
import secrets
import stat
import tempfile
from datetime import datetime
from pathlib import Path

SECRET_BYTES = 32


def new_secret(path: Path) -> None:
    """Writes a new secret, readable by this user only, completely or not at all.

    Raises:
        FileExistsError: if the file exists already; other machines may have copies of its secret.
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
            f"{path} belongs to user {status.st_uid}, not to the user of this process ({os.geteuid()}), and that "
            "user knows the secret. Make a copy of your own, with mode 0600."
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


def derive_certificate(secret: bytes) -> tuple[bytes, bytes]:
    """The private key and the self-signed certificate (Ed25519) that belong to a secret, as PEM.

    Both follow from the secret alone, byte for byte: an Ed25519 signature contains nothing random.

    Args:
        secret: from `read_secret`.
    """
    # Imported here, because workers import this module and none of them needs this library.
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
    from cryptography.x509 import CertificateBuilder, Name, NameAttribute
    from cryptography.x509.oid import NameOID

    key = Ed25519PrivateKey.from_private_bytes(hmac.digest(secret, b"hf_lsam links", "sha256"))
    name = Name([NameAttribute(NameOID.COMMON_NAME, "hf_lsam")])
    builder = CertificateBuilder().subject_name(name).issuer_name(name).serial_number(1).public_key(key.public_key())
    # Always valid, because the clocks of machines differ.
    builder = builder.not_valid_before(datetime(1970, 1, 1)).not_valid_after(datetime(9999, 12, 31, 23, 59, 59))
    certificate = builder.sign(key, algorithm=None)
    return (
        key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()),
        certificate.public_bytes(Encoding.PEM),
    )
