"""What skopeo complains about decides the code of an error; names and digests in its words do not."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from volant.oci import parse_reference
from volant.oci._skopeo import _read_end, failure

DIGEST = "sha256:" + "429" * 21 + "a"


@pytest.mark.parametrize(
    ("reference", "complaint", "code"),
    [
        ("r:5000/app:t", f"reading blob {DIGEST}: Digest did not match, expected {DIGEST}", "image_mismatch"),
        ("r:5000/app:t", f"reading blob {DIGEST}: unexpected EOF", "fetch_interrupted"),
        ("r:5000/denied/certificate:429",
         "Error reading manifest 429 in r:5000/denied/certificate: manifest unknown", "image_not_found"),
        ("r:5000/signature:t", 'initializing source docker://r:5000/signature:t: lookup r: no such host',
         "registry_unreachable"),
        ("oci:/x509/denied:t", "reading image from /x509/denied: no such file or directory", "image_not_found"),
        ("r:5000/app:t", "reading manifest t in r:5000/app: received unexpected HTTP status: 429 Too Many Requests",
         "registry_busy"),
        ("r:5000/app:t", "reading manifest t in r:5000/app: unauthorized: authentication required",
         "image_unauthorized"),
    ],
)  # fmt: skip
def test_the_reason_is_in_the_complaint_and_not_in_names(
    reference: str, complaint: str, code: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO", "volant.oci"):
        error = failure(parse_reference(reference), f'time="…" level=fatal msg="{complaint}"')
    assert error.code == code
    # The complaint may have the answer of a service that the client can't reach.
    assert complaint[:60] not in error.message
    assert complaint[:60] in caplog.text


def test_what_skopeo_says_is_read_from_a_file_alone(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("words")
    (tmp_path / "link").symlink_to("text")
    os.mkfifo(tmp_path / "pipe")
    assert [_read_end(tmp_path / name) for name in ("text", "link", "pipe", "nothing")] == ["words", "", "", ""]
