"""An http(s) downloader for streaming, which has none. Importing this registers it."""

from __future__ import annotations

import shutil
import urllib.parse
import urllib.request

from streaming.base.storage.download import DOWNLOADER_MAPPINGS, CloudDownloader


class HttpDownloader(CloudDownloader):
    """Plain GET requests; raises ConnectionError where a body ends too early, which Python's client lets pass."""

    @staticmethod
    def _client_identifier() -> str:
        return "http"

    def clean_up(self) -> None:
        """Nothing is kept open."""

    def _validate_remote_path(self, remote: str) -> None:
        """Both protocols are right."""

    def _download_file_impl(self, remote: str, local: str, timeout: float) -> None:
        address = urllib.parse.quote(remote, safe=":/%?=&~@")
        with urllib.request.urlopen(address, timeout=timeout) as answer, open(local, "wb") as file:
            expected = answer.length
            shutil.copyfileobj(answer, file, 1 << 20)
            if expected is not None and file.tell() != expected:
                raise ConnectionError(f"{file.tell()} of {expected} bytes came")


DOWNLOADER_MAPPINGS.update(http=HttpDownloader, https=HttpDownloader)
