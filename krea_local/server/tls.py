"""A certificate for this machine, made once: for clients that only speak HTTPS.

A small authority of our own signs it. Whoever trusts `bundle.pem`, which holds the public
authorities too, trusts this server. The authority's own key is not kept, so that nothing else can
ever be signed with it.
"""

from __future__ import annotations

import datetime
import ipaddress
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from krea_local.errors import OutputFailed
from krea_local.recipe import write_atomically

DAYS = 397  # what browsers still take
RENEW_DAYS = 30
LOCAL = ("localhost", "127.0.0.1", "::1")


@dataclass(frozen=True)
class Certificate:
    """Files of a certificate.

    Attributes:
        chain: the certificate and the authority that signed it.
        key: its private key, for the owner's eyes only.
        bundle: for `SSL_CERT_FILE`: the public authorities and ours.
    """

    chain: Path
    key: Path
    bundle: Path

    def environment(self, address: str, *, has_key: bool) -> list[str]:
        """The lines that point the official Python client at `https://{address}`."""
        return [
            "FAL_KEY=" + ("<the server's key>" if has_key else "local"),
            f"SSL_CERT_FILE={self.bundle}",
            f"FAL_RUN_HOST={address}",
            f"FAL_QUEUE_RUN_HOST={address}/queue",
        ]


def certificate(folder: Path, names: Sequence[str]) -> Certificate:
    """The certificate of that folder, made if there is none that is good for all of `names`.

    Args:
        folder: private; made if it is not there.
        names: host names and addresses, beside those of the machine itself.

    Raises:
        OutputFailed: the folder cannot be written.
    """
    found = Certificate(folder / "chain.pem", folder / "key.pem", folder / "bundle.pem")
    wanted = sorted({*LOCAL, *names} - {"0.0.0.0", "::"})  # noqa: S104 - left out
    if not _is_good(found, wanted):
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError as error:
            raise OutputFailed(f"cannot make the folder {str(folder)!r}: {error}") from error
        _make(found, wanted)
    return found


def _is_good(found: Certificate, names: Sequence[str]) -> bool:
    if not (found.chain.is_file() and found.key.is_file() and found.bundle.is_file()):
        return False
    now = datetime.datetime.now(datetime.timezone.utc)
    try:
        known = x509.load_pem_x509_certificate(found.chain.read_bytes())
        alternatives = known.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except (ValueError, x509.ExtensionNotFound):
        return False
    lasts = known.not_valid_after_utc - now > datetime.timedelta(days=RENEW_DAYS)
    return lasts and set(_alternatives(names)) <= set(alternatives)


def _alternatives(names: Sequence[str]) -> list[x509.GeneralName]:
    found: list[x509.GeneralName] = []
    for name in names:
        try:
            found.append(x509.IPAddress(ipaddress.ip_address(name)))
        except ValueError:
            found.append(x509.DNSName(name))
    return found


def _make(files: Certificate, names: Sequence[str]) -> None:
    import certifi

    authority_key = ec.generate_private_key(ec.SECP256R1())
    key = ec.generate_private_key(ec.SECP256R1())
    authority_name = _name("krea_local on this machine")
    authority = (
        _builder(authority_name, authority_name, authority_key)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(signs=True), critical=True)
        .sign(authority_key, hashes.SHA256())
    )
    own = (
        _builder(_name("krea_local"), authority_name, key)
        .add_extension(x509.SubjectAlternativeName(_alternatives(names)), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(signs=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(authority_key.public_key()),
            critical=False,
        )
        .sign(authority_key, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    secret = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    trusted = Path(certifi.where()).read_bytes() + b"\n" + authority.public_bytes(pem)
    before = os.umask(0o077)
    try:
        write_atomically(secret, files.key, overwrite=True)
        write_atomically(trusted, files.bundle, overwrite=True)
        chain = own.public_bytes(pem) + authority.public_bytes(pem)
        write_atomically(chain, files.chain, overwrite=True)
    finally:
        os.umask(before)


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePrivateKey
) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.timezone.utc)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=DAYS))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    )


def _usage(*, signs: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs,
        key_cert_sign=signs,
        crl_sign=signs,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )
