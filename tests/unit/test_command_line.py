"""launch/lockstep/infer.py: what its options mean before anything runs."""

import argparse
from pathlib import Path

from lockstep import infer


def test_the_home_folder_is_expanded_in_input_and_output(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    parser = infer.add_to(argparse.ArgumentParser())
    args = parser.parse_args(["--input=~/in.jsonl", "--output=~/$X/out.jsonl"])
    assert args.input == [Path("/home/me/in.jsonl")]
    assert args.output == Path("/home/me/$X/out.jsonl")
