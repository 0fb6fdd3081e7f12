"""stpd/keys.py, stpd/pki.py and the token of stp/enrol.py. Promises are those at the heads of those files."""

from __future__ import annotations

import json
import stat
from datetime import timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from hypothesis import given
from hypothesis import strategies as st

from stp.core.handshake import identity_of
from stp.enrol import JoinToken, Refusal, make_csr, new_key, new_token
from stp.identity import BUILD_TIME, pem_block
from stp.pinned import EX_USAGE, EnrolError, pin_of
from stpd.keys import MAX_TOKENS, RENEWAL_GRACE, JoinTokens, NodeRegistry, RefusedError, StateFileError
from stpd.pki import MAX_PEM, CertificateAuthority, PkiError, key_id, read_chain, read_request, wall_clock

CA_DER = b"the CA's certificate"
HOUR = 3600.0


class Clock:
    now = BUILD_TIME + 86400.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def tokens(tmp_path: Path, clock: Clock) -> JoinTokens:
    return JoinTokens(tmp_path / "tokens.json", CA_DER, clock)


@pytest.fixture
def registry(tmp_path: Path, clock: Clock) -> NodeRegistry:
    return NodeRegistry(tmp_path / "nodes.json", clock)


def refusal(tokens: JoinTokens, text: str) -> Refusal | None:
    try:
        tokens.check_open(tokens.check(JoinToken.decode(text)))
    except RefusedError as exc:
        return exc.refusal
    return None


# -- the token itself --------------------------------------------------------------------------------------


def test_a_token_is_short_and_says_all() -> None:
    token = new_token(CA_DER)
    text = token.encode()
    assert text.startswith("stpj1.")
    assert len(text) == 66
    assert JoinToken.decode(f"  {text}\n") == token
    assert token.pin == pin_of(CA_DER)
    assert token.secret.hex() not in repr(token)
    assert len(token.secret) * 8 >= 128


@pytest.mark.parametrize("at", range(6, 66, 7))
def test_a_mistyped_token_is_called_so(at: int) -> None:
    text = new_token(CA_DER).encode()
    wrong = text[:at] + ("A" if text[at] != "A" else "B") + text[at + 1 :]
    with pytest.raises(EnrolError, match="mistyped") as caught:
        JoinToken.decode(wrong)
    assert caught.value.exit_code == EX_USAGE


@given(st.text(max_size=100))
def test_any_text_is_a_token_or_an_error(text: str) -> None:
    for candidate in (text, "stpj1." + text):
        with pytest.raises(EnrolError):
            JoinToken.decode(candidate)


# -- tokens at the hub -------------------------------------------------------------------------------------


def test_a_token_is_good_until_it_ends(tokens: JoinTokens, clock: Clock) -> None:
    """(2)"""
    made = tokens.create("gateway", 2, HOUR, ["site-a"])
    assert refusal(tokens, made.token) is None
    clock.now += HOUR - 1
    assert refusal(tokens, made.token) is None
    clock.now += 1
    assert refusal(tokens, made.token) is Refusal.TOKEN_EXPIRED


def test_uses_are_counted(tokens: JoinTokens) -> None:
    made = tokens.create("device", 2, HOUR)
    tokens.spend(made.id)
    assert refusal(tokens, made.token) is None
    tokens.spend(made.id)
    assert refusal(tokens, made.token) is Refusal.TOKEN_USED
    free = tokens.create("device", 0, 0.0)
    for _ in range(5):
        tokens.spend(free.id)
    assert refusal(tokens, free.token) is None
    assert free.expires_ms == 0


def test_a_revoked_token_is_no_good(tokens: JoinTokens) -> None:
    made = tokens.create("device", 1, HOUR)
    assert tokens.revoke(made.id)
    assert refusal(tokens, made.token) is Refusal.TOKEN_REVOKED
    assert not tokens.revoke("none")


def test_a_guessed_secret_is_unknown_even_with_a_right_id(tokens: JoinTokens) -> None:
    """(1) and a revoked or expired token is not told apart from none by a guesser."""
    made = tokens.create("device", 1, HOUR)
    forged = JoinToken(made.id, bytes(16), pin_of(CA_DER)).encode()
    assert refusal(tokens, forged) is Refusal.TOKEN_UNKNOWN
    tokens.revoke(made.id)
    assert refusal(tokens, forged) is Refusal.TOKEN_UNKNOWN
    assert refusal(tokens, new_token(CA_DER).encode()) is Refusal.TOKEN_UNKNOWN


def test_the_secret_is_not_on_disk_and_the_file_is_private(tokens: JoinTokens, tmp_path: Path) -> None:
    """(1)"""
    made = tokens.create("gateway", 1, HOUR, ["t"])
    token = JoinToken.decode(made.token)
    path = tmp_path / "tokens.json"
    text = path.read_text()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    for secret in (made.token, made.token[6:], token.secret.hex(), made.token[13:30]):
        assert secret not in text
    assert token.id in text
    assert made.token not in repr(made)


def test_tokens_survive_a_restart(tokens: JoinTokens, tmp_path: Path, clock: Clock) -> None:
    made = tokens.create("gateway", 1, HOUR, ["site-a"])
    tokens.spend(made.id)
    again = JoinTokens(tmp_path / "tokens.json", CA_DER, clock)
    assert again.list() == tokens.list()
    assert again.list()[0].used == 1
    assert again.list()[0].tags == ["site-a"]
    assert refusal(again, made.token) is Refusal.TOKEN_USED


@pytest.mark.parametrize(
    ("role", "uses", "ttl", "tags"),
    [
        ("hub", 1, 1.0, []),
        ("device", -1, 1.0, []),
        ("device", 1, -1.0, []),
        ("device", 1, float("inf"), []),
        ("device", 1, float("nan"), []),
        ("device", 1, 1.0, [""]),
        ("device", 1, 1.0, ["\x1b[2J"]),
        ("device", 1, 1.0, ["t"] * 17),
    ],
)
def test_senseless_tokens_are_not_made(
    tokens: JoinTokens, role: str, uses: int, ttl: float, tags: list[str]
) -> None:
    with pytest.raises(ValueError):
        tokens.create(role, uses, ttl, tags)
    assert tokens.list() == []


def test_the_list_is_bounded(tokens: JoinTokens, tmp_path: Path, clock: Clock) -> None:
    made = tokens.create("device", 1, HOUR)
    content = json.loads((tmp_path / "tokens.json").read_text())
    content["tokens"] = [content["tokens"][0] | {"id": f"{n:010x}"} for n in range(MAX_TOKENS)]
    (tmp_path / "full.json").write_text(json.dumps(content))
    full = JoinTokens(tmp_path / "full.json", CA_DER, clock)
    with pytest.raises(ValueError, match="revoke some first"):
        full.create("device", 1, HOUR)
    full.revoke(f"{7:010x}")
    full.create("device", 1, HOUR)
    assert len(full.list()) == MAX_TOKENS
    assert made.id


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "null", '{"version": 1}', '{"version": 2, "tokens": []}', "\xff"]
)
def test_a_damaged_file_is_an_error(tmp_path: Path, content: str) -> None:
    """(5)"""
    path = tmp_path / "f.json"
    path.write_text(content, encoding="latin-1")
    with pytest.raises(StateFileError, match=r"f\.json"):
        JoinTokens(path, CA_DER)
    with pytest.raises(StateFileError, match=r"f\.json"):
        NodeRegistry(path)


def test_one_file_is_not_taken_for_the_other(
    tokens: JoinTokens, registry: NodeRegistry, tmp_path: Path
) -> None:
    """(5)"""
    tokens.create("device", 1, HOUR)
    registry.enrol("n", "device", key="k", serial=1, not_after=Clock.now)
    with pytest.raises(StateFileError, match="not a file"):
        NodeRegistry(tmp_path / "tokens.json")
    with pytest.raises(StateFileError, match="not a file"):
        JoinTokens(tmp_path / "nodes.json", CA_DER)


def test_what_cannot_be_written_did_not_happen(tmp_path: Path, clock: Clock) -> None:
    directory = tmp_path / "d"
    directory.mkdir()
    tokens = JoinTokens(directory / "tokens.json", CA_DER, clock)
    registry = NodeRegistry(directory / "nodes.json", clock)
    directory.rmdir()
    with pytest.raises(OSError, match="No such file"):
        tokens.create("device", 1, HOUR)
    with pytest.raises(OSError, match="No such file"):
        registry.enrol("n", "device", key="k", serial=1, not_after=clock.now)
    assert tokens.list() == []
    assert registry.role_of("n") is None


# -- nodes -------------------------------------------------------------------------------------------------


def enrol(registry: NodeRegistry, node: str, serial: int, *, key: str = "aa", life: float = 86400.0) -> None:
    registry.enrol(node, "device", key=key, serial=serial, not_after=Clock.now + life, token="t")


def test_a_name_belongs_to_its_key(registry: NodeRegistry) -> None:
    """(3)"""
    assert registry.check_name("sensor-1", "aa") is None
    enrol(registry, "sensor-1", 10)
    assert registry.role_of("sensor-1") == "device"
    entry = registry.check_name("sensor-1", "aa")
    assert entry is not None
    assert entry.token == "t"
    with pytest.raises(RefusedError) as caught:
        registry.check_name("sensor-1", "bb")
    assert caught.value.refusal is Refusal.NAME_TAKEN
    assert registry.forget("sensor-1") == [10]
    assert registry.check_name("sensor-1", "bb") is None
    assert registry.is_revoked(10)
    assert registry.forget("sensor-1") == []


def test_revoking_takes_every_certificate_of_the_node(
    registry: NodeRegistry, tmp_path: Path, clock: Clock
) -> None:
    enrol(registry, "sensor-1", 10)
    enrol(registry, "sensor-1", 11, key="bb")
    enrol(registry, "sensor-2", 12)
    assert registry.revoke("sensor-1") == [10, 11]
    assert registry.revoke("none") == []
    again = NodeRegistry(tmp_path / "nodes.json", clock)
    for found in (registry, again):
        assert [found.is_revoked(n) for n in (10, 11, 12)] == [True, True, False]
        with pytest.raises(RefusedError) as caught:
            found.check_name("sensor-1", "bb")
        assert caught.value.refusal is Refusal.NODE_REVOKED
        assert found.nodes() == registry.nodes()


def test_a_revocation_is_kept_as_long_as_the_certificate_could_renew(
    registry: NodeRegistry, clock: Clock
) -> None:
    """(4)"""
    enrol(registry, "a", 1, life=100.0)
    enrol(registry, "b", 2, life=100.0)
    registry.forget("a")
    clock.now += 100.0 + RENEWAL_GRACE - 1
    registry.forget("none")
    enrol(registry, "c", 3, life=2 * RENEWAL_GRACE)
    registry.revoke("c")
    assert registry.is_revoked(1)
    clock.now += 2
    registry.revoke("b")
    assert not registry.is_revoked(1)


def test_old_serials_of_a_node_are_let_go(registry: NodeRegistry, clock: Clock) -> None:
    enrol(registry, "a", 1, life=100.0)
    clock.now += 100.0 + RENEWAL_GRACE + 1
    enrol(registry, "a", 2, life=3 * RENEWAL_GRACE)
    entry = registry.get("a")
    assert entry is not None
    assert list(entry.serials) == ["2"]
    assert entry.renewed_at == clock.now


# -- the authority -----------------------------------------------------------------------------------------


@pytest.fixture
def authority(clock: Clock) -> CertificateAuthority:
    return CertificateAuthority.create("site", clock)


def purposes(leaf: x509.Certificate) -> set[x509.ObjectIdentifier]:
    return set(leaf.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value)


def test_what_a_leaf_says(authority: CertificateAuthority, clock: Clock) -> None:
    """pki (2), (3)"""
    clock.now += 100 * 86400
    key = new_key().public_key()
    leaf = authority.issue(key, "site", "edge-1", answers=True)
    assert identity_of(leaf.public_bytes(serialization.Encoding.DER)) == ("site", "edge-1")
    assert purposes(leaf) == {ExtendedKeyUsageOID.CLIENT_AUTH, ExtendedKeyUsageOID.SERVER_AUTH}
    assert leaf.not_valid_before_utc == authority.certificate.not_valid_before_utc
    assert (leaf.not_valid_after_utc.timestamp() - clock.now) == pytest.approx(365 * 86400, abs=1)
    leaf.verify_directly_issued_by(authority.certificate)
    device = authority.issue(key, "site", "sensor-1", answers=False)
    assert purposes(device) == {ExtendedKeyUsageOID.CLIENT_AUTH}


def test_no_leaf_outlives_its_authority(authority: CertificateAuthority, clock: Clock) -> None:
    clock.now += timedelta(days=3600).total_seconds()
    leaf = authority.issue(new_key().public_key(), "site", "edge-1", answers=True)
    assert leaf.not_valid_after_utc == authority.certificate.not_valid_after_utc


def test_an_operator_is_no_node(authority: CertificateAuthority) -> None:
    """pki (4)"""
    leaf = authority.issue_operator(new_key().public_key(), "site", "ann", "operator")
    names = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.UniformResourceIdentifier) == [
        "stp-operator://site/ann?role=operator"
    ]
    assert purposes(leaf) == {ExtendedKeyUsageOID.CLIENT_AUTH}
    with pytest.raises(Exception, match="0 nodes"):
        identity_of(leaf.public_bytes(serialization.Encoding.DER))


def test_an_authority_is_saved_private_and_found_again(
    authority: CertificateAuthority, tmp_path: Path
) -> None:
    authority.save(tmp_path)
    assert stat.S_IMODE((tmp_path / "ca.key").stat().st_mode) == 0o600
    again = CertificateAuthority.load(tmp_path)
    assert again.der == authority.der
    leaf = again.issue(new_key().public_key(), "site", "n", answers=False)
    leaf.verify_directly_issued_by(authority.certificate)


def test_an_authority_that_does_not_fit_together_is_an_error(
    authority: CertificateAuthority, tmp_path: Path
) -> None:
    with pytest.raises(PkiError, match="No such file"):
        CertificateAuthority.load(tmp_path)
    authority.save(tmp_path)
    (tmp_path / "ca.pem").write_text(CertificateAuthority.create("other").pem)
    with pytest.raises(PkiError, match="is not the key of"):
        CertificateAuthority.load(tmp_path)
    (tmp_path / "ca.key").write_text("nonsense")
    with pytest.raises(PkiError, match="damaged"):
        CertificateAuthority.load(tmp_path)


def csr_pem(key: ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey) -> str:
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "n")])
    request = x509.CertificateSigningRequestBuilder().subject_name(subject).sign(key, hashes.SHA256())
    return request.public_bytes(serialization.Encoding.PEM).decode()


def test_a_request_gives_its_key_and_nothing_else() -> None:
    """pki (1)"""
    key = new_key()
    found = read_request(make_csr(key, "whatever").public_bytes(serialization.Encoding.PEM).decode())
    assert found == key.public_key()
    assert key_id(found) == key_id(key.public_key()) != key_id(new_key().public_key())


def test_bad_requests_are_refused() -> None:
    good = make_csr(new_key(), "n").public_bytes(serialization.Encoding.DER)
    forged = bytearray(good)
    forged[-1] ^= 1
    cases = {
        "damaged": "nonsense",
        "too long": "x" * (MAX_PEM + 1),
        "P-256": csr_pem(rsa.generate_private_key(65537, 2048)),
        "P-256 or": csr_pem(ec.generate_private_key(ec.SECP521R1())),
        "not signed": pem_block("CERTIFICATE REQUEST", bytes(forged)),
    }
    for cause, text in cases.items():
        with pytest.raises(PkiError, match=cause):
            read_request(text)
    with pytest.raises(PkiError, match="damaged"):
        read_request("ä")


@given(st.text(max_size=200))
def test_any_text_is_a_request_or_an_error(text: str) -> None:
    for wrapped in (
        text,
        f"-----BEGIN CERTIFICATE REQUEST-----\n{text}\n-----END CERTIFICATE REQUEST-----\n",
    ):
        with pytest.raises(PkiError):
            read_request(wrapped)
        with pytest.raises(PkiError):
            read_chain(wrapped)


def test_the_authority_never_works_in_1970(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.time", lambda: 12.0)
    assert wall_clock() == BUILD_TIME
