"""Imported before streaming by every module that uses it, so that spawned loader processes have the workarounds too."""

from __future__ import annotations

from bd3_ds.data.streaming_import import import_streaming

import_streaming()
