"""References mean what they mean to Docker, and wrong ones get an error that says what is wrong."""

from __future__ import annotations

import pytest
from hypothesis import given, strategies as st

from volant.oci import DEFAULT_REGISTRY, OciError, Reference, parse_reference

HUB = DEFAULT_REGISTRY
DIGEST = "sha256:" + "0123456789abcdef" * 4


@pytest.mark.parametrize(
    ("text", "complete"),
    [
        ("python", f"{HUB}/library/python:latest"),
        ("python:3.13-slim", f"{HUB}/library/python:3.13-slim"),
        ("team/app", f"{HUB}/team/app:latest"),
        (f"{HUB}/python", f"{HUB}/library/python:latest"),
        (f"index.{HUB}/team/app:1", f"{HUB}/team/app:1"),
        ("localhost/app", "localhost/app:latest"),
        ("localhost:5000/app:1", "localhost:5000/app:1"),
        ("registry.example/a/b/c:v1.0_x", "registry.example/a/b/c:v1.0_x"),
        ("[::1]:5000/app", "[::1]:5000/app:latest"),
        ("Registry/app", "Registry/app:latest"),
        (f"python@{DIGEST}", f"{HUB}/library/python@{DIGEST}"),
        (f"registry.example/app:1@{DIGEST}", f"registry.example/app@{DIGEST}"),
        ("oci", f"{HUB}/library/oci:latest"),
        ("oci:1.2", f"{HUB}/library/oci:1.2"),
        ("oci:/images/app", "oci:/images/app"),
        ("oci:/images/app:v1", "oci:/images/app:v1"),
        ("oci-archive:/images/app.tar:v1", "oci-archive:/images/app.tar:v1"),
        ("docker-archive:/app.tar", "docker-archive:/app.tar"),
        ("docker-archive:/app.tar:app:v1", f"docker-archive:/app.tar:{HUB}/library/app:v1"),
        ("docker-archive:/app.tar:registry.example/app", "docker-archive:/app.tar:registry.example/app:latest"),
    ],
)
def test_a_reference_is_completed_as_docker_does(text: str, complete: str) -> None:
    assert str(parse_reference(text)) == complete


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "1 to 4096 characters"),
        ("a" * 5000, "1 to 4096 characters"),
        ("app\n", "control characters"),
        ("https://registry.example/app", "without https://"),
        ("docker://app", "without https:// or docker://"),
        ("App", "lower case"),
        ("team/App:1", "lower case"),
        ("app:", "'' is not a tag"),
        ("app:-x", "'-x' is not a tag"),
        ("app:" + "x" * 129, "is not a tag"),
        ("app@sha256:abc", "64 lower-case hexadecimal digits"),
        (f"app@{DIGEST.upper()}", "is not a digest"),
        ("app@", "'' is not a digest"),
        ("/app", "'' is not part of a name"),
        ("registry.example/", "'' is not part of a name"),
        ("a//b", "'' is not part of a name"),
        ("a/../b", "'..' is not part of a name"),
        ("-registry.example/app", "is not a registry"),
        ("registry.example:port/app", "is not a registry"),
        ("a b", "'a b' is not part of a name"),
        ("registry.example/" + "a/" * 200 + "b", "at most 255"),
        ("--help", "is not part of a name"),
        ("oci:", "write oci:/path"),
        ("oci:./here", "write oci:/path"),
        ("oci:/here:bad/tag", "'bad/tag' is not a tag"),
        ("docker-archive:/a.tar:B", "lower case"),
        (f"docker-archive:/a.tar:b@{DIGEST}", "no digests"),
    ],
)
def test_a_wrong_reference_is_refused_with_what_is_wrong(text: str, says: str) -> None:
    with pytest.raises(OciError) as caught:
        parse_reference(text)
    assert caught.value.code == "bad_reference"
    assert says in str(caught.value)
    assert len(str(caught.value)) < 600


@given(st.text(st.sampled_from("aZ09.-_:/@[]% \u00e9\x00") | st.characters(), max_size=40))
def test_any_text_is_a_reference_that_reads_the_same_again_or_is_refused(text: str) -> None:
    try:
        reference = parse_reference(text)
    except OciError:
        return
    assert parse_reference(str(reference)) == reference
    assert not str(reference).startswith("-")


def test_one_manifest_of_a_repository_is_named_by_its_digest() -> None:
    reference = parse_reference("registry.example:5000/app:1")
    assert reference.registry == "registry.example:5000"
    assert reference.with_digest(DIGEST) == Reference("docker", "registry.example:5000/app", digest=DIGEST)
