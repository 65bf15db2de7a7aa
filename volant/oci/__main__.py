"""`python -m volant.oci`: converts and joins the layers of an image, for a job on stdin.

Its last line of output is empty JSON, or the error as JSON. It is killed when the fetch is cancelled; `mkfs.erofs` then
ends with its input.
"""

from __future__ import annotations

import sys

import msgspec

from ._errors import OciError
from ._job import Failure, ImageJob, confine, run


def main() -> int:
    """Runs the job, and returns the exit code."""
    job = msgspec.json.decode(sys.stdin.buffer.read(), type=ImageJob)
    failure: Failure | None = None
    try:
        if job.confinement is not None:
            confine(job.confinement)
        run(job)
    except OciError as error:
        failure = Failure(error.code, error.message, error.hint)
    except OSError as error:
        failure = Failure("io_error", f"the cache can't be used: {error}", "check its disk")
    sys.stdout.buffer.write(b"\n" + msgspec.json.encode(failure or {}) + b"\n")
    return 1 if failure else 0


if __name__ == "__main__":
    sys.exit(main())
