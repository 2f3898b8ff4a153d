"""The table of methods that the command line and the documentation print."""

import dataclasses
import itertools
import shlex

import pytest
from typer.testing import CliRunner

from arm_hf import get_method
from arm_hf.cli import app
from arm_hf.method_table import describe_methods
from arm_hf.segmenting import parse_options

RECORDS = describe_methods()
VARIANTS = [(r["name"], name, options) for r in RECORDS for name, options in r["variants"].items()]


def test_the_systems_of_the_papers_are_there():
    names = {record["name"] for record in RECORDS} | {name for _, name, _ in VARIANTS}
    assert names >= {
        *("clip", "maskclip", "sclip", "clearclip", "naclip", "gem", "clip_surgery", "cliptrase", "cliper"),
        *("cliper+sd", "cra_dsi", "proxyclip", "corrclip", "resclip on sclip", "resclip on clearclip"),
        *("resclip on naclip", "naclip with PAMR"),
    }


@pytest.mark.parametrize(("method", "name", "options"), VARIANTS)
def test_the_options_of_a_variant_are_known(method, name, options):
    words = shlex.split(options)
    settings = [value for key, value in itertools.pairwise(words) if key == "--method-option"]
    found = get_method(method).settings(parse_options(settings))
    for key, value in parse_options(settings).items():
        assert dataclasses.asdict(found)[key] == value
    flags = {word for word in words if word.startswith("--")}
    listed = CliRunner().invoke(app, ["segment", "--help"], env={"COLUMNS": "300"}).output
    assert all(flag in listed for flag in flags)


def test_every_setting_says_what_it_does():
    for record in RECORDS:
        assert record["paper"] and record["reference"] and record["cost"], record["name"]
        assert all(setting["help"] for setting in record["settings"]), record["name"]
