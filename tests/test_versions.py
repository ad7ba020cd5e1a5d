"""The warning about versions of libraries that are newer than the tests."""

import pytest
from packaging.version import Version
from versions import read_requirements

from internvl import versions


def test_bounds_are_those_of_the_requirements():
    bounds = {
        requirement.name: clause.version
        for requirement in read_requirements()
        for clause in requirement.specifier
        if clause.operator == "<"
    }
    assert {name: bounds[name] for name in versions.UNTESTED_VERSIONS} == versions.UNTESTED_VERSIONS


@pytest.mark.parametrize("is_newer", [False, True])
def test_one_warning_names_all_newer_versions(is_newer, monkeypatch, caplog):
    installed = {name: bound if is_newer else "0.1" for name, bound in versions.UNTESTED_VERSIONS.items()}
    monkeypatch.setattr(versions, "version", installed.__getitem__)
    versions.warn_about_untested_versions()
    assert len(caplog.records) == is_newer
    if is_newer:
        assert all(f"{name} {Version(bound)}" in caplog.text for name, bound in versions.UNTESTED_VERSIONS.items())
