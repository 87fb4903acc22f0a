"""Settings from flags and JSON."""

import argparse
import dataclasses
import json
from dataclasses import asdict, dataclass
from typing import Literal

import pytest

from colbert_jax.config import TrainingConfig
from colbert_jax.settings import (
    add_arguments,
    explained,
    flag_names,
    given,
    make,
    merge,
    to_json,
)
from colbert_jax.training.recipes import FIRST, LAST, RECIPES, DenoisedSupervision, Distillation


@dataclass(frozen=True)
class Inner:
    size: int = 3
    name: str | None = "a"


SECOND = Inner(size=7)


@dataclass(frozen=True)
class Outer:
    path: str
    rate: float = 0.5
    words: tuple[str, ...] = ()
    on: bool = False
    training: Inner = Inner()
    second: Inner = SECOND


def parse(*flags: str, settings: dict | None = None) -> Outer:
    parser = argparse.ArgumentParser()
    parser.add_argument("--other")
    add_arguments(parser, Outer)
    return make(Outer, merge(settings or {}, given(parser.parse_args(flags))))


def test_flags():
    got = parse(
        *("--path", "x", "--rate", "1e-3", "--words", "a,b", "--on", "true", "--other", "y"),
        *("--size", "4", "--name", "none", "--second-name", "b"),
    )
    assert got == Outer("x", 1e-3, ("a", "b"), True, Inner(4, None), Inner(7, "b"))


def test_flags_win_over_the_file_and_the_file_over_defaults():
    file = {"path": "file", "rate": 2.0, "second": {"name": "f"}}
    assert parse("--rate", "3", settings=file) == Outer("file", 3.0, second=Inner(7, "f"))


@pytest.mark.parametrize(
    "settings, message",
    [
        ({}, "have no default: path"),
        ({"path": "x", "size": 3}, "unknown setting size; there are path, rate"),
        ({"path": "x", "training": {"sise": 3}}, "the settings, training: unknown setting sise"),
    ],
)
def test_wrong_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        parse(settings=settings)


@pytest.mark.parametrize("flags", [["--on", "yes"], ["--size", "a"], ["--rate", "none"]])
def test_wrong_flags(flags, capsys):
    with pytest.raises(SystemExit):
        parse("--path", "x", *flags)
    assert flags[0] in capsys.readouterr().err


def test_settings_round_trip_and_papers_values():
    files = {"queries": "q", "collection": "c", "folder": "f"}
    recipe = make(DenoisedSupervision, files | {"training": {"lr": 2e-5}})
    assert make(DenoisedSupervision, json.loads(to_json(recipe))) == recipe
    assert recipe.training == dataclasses.replace(LAST, lr=2e-5)
    assert (recipe.first.nway, recipe.first.maxsteps) == (FIRST.nway, FIRST.maxsteps)
    last = make(Distillation, files | {"examples": "e"}).training
    wanted = dict(nway=64, lr=1e-5, bsize=32, warmup=20_000, maxsteps=400_000, weight_decay=0.0)
    wanted |= dict(loss="distillation", use_ib_negatives=True)
    assert wanted.items() <= asdict(last).items() and last.max_grad_norm == 2.0
    assert (FIRST.nway, FIRST.maxsteps) == (32, 150_000)
    names = ("colbertv1", "contrastive", "distill", "denoised-supervision", "preflmr")
    assert tuple(RECIPES) == names


FILES = {"queries": "q", "collection": "c", "folder": "f", "examples": "e"}


@pytest.mark.parametrize("value", [True, None, [], "text", 3])
def test_settings_inside_settings_must_be_an_object(value):
    """A recipe would take the value for its training, and fail later."""
    with pytest.raises(ValueError, match=r"the settings: training must be an object of settings"):
        make(Distillation, {**FILES, "training": value})


@pytest.mark.parametrize(
    "change", [{"examples": 10**30}, {"folder": ["f"]}, {"checkpoint": None}, {"dim": "16"}]
)
def test_settings_of_another_type_are_named(change):
    name = next(iter(change))
    with pytest.raises(ValueError, match=rf"s\.json: {name} must be (str|int \| None), got"):
        make(Distillation, FILES | change, "s.json")


@pytest.mark.parametrize("name", RECIPES)
def test_every_flag_is_explained(name):
    """By the docstrings, with its values and its default."""
    kind, _ = RECIPES[name]
    parser = argparse.ArgumentParser()
    add_arguments(parser, kind)
    actions = [action for action in parser._actions if action.dest != "help"]
    assert {action.dest.removeprefix("set:").split(".")[-1] for action in actions} == flag_names(
        kind
    )
    for action in actions:
        text, _, known = action.help.rpartition(" (")
        assert len(text) > 8 and known.startswith(("default: ", "required")), action.option_strings
        assert not {"`", "None", "True"} & set(action.help.replace(".", " ").split()), action.help
        assert action.metavar.split("|")[0] in ("INT", "FLOAT", "TEXT", "TEXT,...", "true")


@dataclass(frozen=True)
class Explained:
    """What it is.

    Size:
      width, height: in metres,
        to the top.
      count: "auto": as many
        as fit.
    Other (more of it):
      on: whether
        it: is.
    """

    width: float = 1.0
    height: float | None = None
    count: int | Literal["auto"] = 3
    on: bool = True


def test_docstrings_as_help():
    assert explained(Explained) == {
        "width": ("in metres, to the top", "Size"),
        "height": ("in metres, to the top", "Size"),
        "count": ('"auto": as many as fit', "Size"),
        "on": ("whether it: is", "Other"),
    }
    parser = argparse.ArgumentParser()
    add_arguments(parser, Explained)
    assert "--count INT|auto" in parser.format_help() and "settings: other" in parser.format_help()
    for text, value in (("auto", "auto"), ("7", 7)):
        assert given(parser.parse_args(["--count", text])) == {"count": value}
    with pytest.raises(SystemExit):
        parser.parse_args(["--count", "many"])


def test_a_word_in_place_of_a_number():
    assert make(TrainingConfig, {"bsize": "auto", "accumsteps": 3}).bsize == "auto"
    for wrong in ("most", None, 2.5):
        with pytest.raises(ValueError, match=r"bsize must be int \| 'auto', got"):
            make(TrainingConfig, {"bsize": wrong})
    with pytest.raises(ValueError, match="bsize is 'auto': give a number"):
        _ = TrainingConfig(bsize="auto").batch_size
    with pytest.raises(ValueError, match="maxsteps is not known"):
        _ = TrainingConfig(maxsteps=None).steps
