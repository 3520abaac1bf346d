"""``python -m finetune_trainer.folder_fetch URI FOLDER``: bring a folder of a bucket to this machine, whole.

Run before a server that reads local folders alone. With ``--sha256`` it must be the artifact with that manifest.
"""

import argparse
import logging
import sys
from pathlib import Path

from finetune_api.report import ExitCode
from finetune_trainer.errors import DataError, FineTuneError
from finetune_trainer.location import Mounts, bucket_and_key
from finetune_trainer.manifest import is_complete, read_manifest
from finetune_trainer.s3_client import S3Access, S3Client
from finetune_trainer.s3_store import S3Store
from finetune_trainer.trust import add_private_authorities

logger = logging.getLogger("finetune_trainer")


def fetch_folder(uri: str, folder: Path, access: S3Access, sha256: str | None) -> None:
    """Copy what lies at ``uri`` to ``folder``; nothing to do when that artifact is there already.

    Raises:
        DataError: it is another artifact than ``sha256``, or damaged.
        StorageError: the store refuses.
    """
    if sha256 is not None and is_complete(folder) and read_manifest(folder).sha256 == sha256:
        return
    bucket, key = bucket_and_key(uri, access.uri_field)
    S3Store(S3Client(bucket, access), "").get_tree(key, folder)
    if sha256 is not None and (found := read_manifest(folder).sha256) != sha256:
        raise DataError(f"the manifest at {uri} has the sha256 {found}, not {sha256}. Name the artifact that is meant.")


def main(arguments: list[str] | None = None) -> ExitCode:
    """Fetch what the command line names and return how that ended."""
    parser = argparse.ArgumentParser(prog="folder_fetch", description=__doc__)
    parser.add_argument("uri", help="s3://bucket/path")
    parser.add_argument("folder", type=Path, help="where to; absent or empty")
    parser.add_argument("--endpoint", help="address of the store")
    parser.add_argument("--secret", metavar="NAME", help="mounted Secret with the store's keys")
    parser.add_argument("--sha256", help="of the MANIFEST.json that is meant")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s %(message)s", stream=sys.stderr)
    secret = Mounts.from_environment().secret(options.secret) if options.secret else None
    try:
        add_private_authorities()
        fetch_folder(options.uri, options.folder, S3Access(options.endpoint, secret, "URI", "--secret"), options.sha256)
    except FineTuneError as error:
        logger.error("%s", error)
        return error.exit_code
    return ExitCode.OK


if __name__ == "__main__":
    sys.exit(main())
