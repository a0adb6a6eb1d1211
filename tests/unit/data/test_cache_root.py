"""The directory of data.cache: one for each user of a node."""

import os
import stat

import pytest

from bd3_ds.config.load import load_recipe
from bd3_ds.data import remote
from bd3_ds.data.remote import cache_root, make_cache_root, pack_directory
from bd3_ds.runtime.errors import UserError
from tests.conftest import ROOT


def test_the_default_is_the_user_s_own():
    cache = load_recipe(str(ROOT / "configs/recipes/docs_pretrain.yaml"), []).data.cache
    assert cache_root(cache).name == f"bd3-ds-{os.getuid()}"
    assert pack_directory("s3://bucket/pack", cache).parent == cache_root(cache)


def test_it_is_made_for_its_user_alone(tmp_path):
    root = make_cache_root(str(tmp_path / "a" / "cache-{uid}"))
    assert root == tmp_path / "a" / f"cache-{os.getuid()}" and stat.S_IMODE(root.stat().st_mode) == 0o700
    assert make_cache_root(str(tmp_path / "a" / "cache-{uid}")) == root


def test_a_name_that_the_user_chose_is_left_to_the_user(tmp_path):
    assert make_cache_root(str(tmp_path / "shared")) == tmp_path / "shared" and not (tmp_path / "shared").exists()


def test_another_user_s_directory_is_refused(tmp_path, monkeypatch):
    (tmp_path / "cache-4711").mkdir()
    monkeypatch.setattr(remote.os, "getuid", lambda: 4711)
    with pytest.raises(UserError, match=r"data.cache=.*cache-4711 belongs to another user; name a directory"):
        make_cache_root(str(tmp_path / "cache-{uid}"))
