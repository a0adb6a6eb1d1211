"""Imported before streaming itself by what needs it, so that a loader process that starts anew has the help too."""

from __future__ import annotations

from bd3_ds.data.streaming_import import import_streaming

import_streaming()
