"""Secrets are known by their names, forms and places, and other texts are shown."""

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from esper_lightning.forensics.secret_texts import (
    is_secret,
    is_whole,
    shortened,
    without_secrets,
)

SECRET = "n0b0dyMayReadThis"


@pytest.mark.parametrize(
    "name",
    [
        *("HF_TOKEN", "api-key", "apiKey", "MYAPIKEY", "DB_PASSWORD", "SENTRY_DSN", "Auth", "pwd"),
        *(
            "db_pass",
            "PASS",
            "jwt",
            "slack_webhook",
            "TORCH_ACCESSKEY",
            "NCCL_AUTHKEY",
            "CUDA_PSWD",
        ),
        *("authkey", "accesskey", "sshkey", "creds", "passcode", "oauth", "OAUTH2", "hostKeys"),
    ],
)
def test_names_of_secrets_are_recognised(name):
    assert is_secret(name)


@pytest.mark.parametrize(
    "name",
    ["OMP_NUM_THREADS", "monkey", "hotkeys", "keyboard", "path", "author", "bypass", "credits"],
)
def test_other_names_are_no_secrets(name):
    assert not is_secret(name)


@pytest.mark.parametrize(
    "text",
    [
        *("ghp_" + 20 * "a", "hf_" + 20 * "b", "AKIA" + 16 * "C", "ASIA" + 16 * "C"),
        *("npm_" + 36 * "d", "pypi-" + 30 * "e", "dckr_pat_" + 20 * "f", "AIza" + 35 * "g"),
        *("sk_live_" + 20 * "h", "ya29.a0-b", "xai-" + 20 * "i", "gsk_" + 20 * "j"),
        *("whsec_" + 20 * "k", f"SG.{20 * 'l'}.{20 * 'm'}", "nvapi-" + 20 * "n", "hvs." + 20 * "o"),
    ],
)
def test_texts_that_are_secrets_by_themselves_are_hidden(text):
    assert without_secrets(f"--x={text}") == "--x=(hidden)"


@pytest.mark.parametrize(
    "text",
    [
        f"--password=a b {SECRET}",
        f"https://x/?sig={SECRET}&more={SECRET}",
        f'{{"token": {{"a": ["{SECRET}"]}}}}',
        f"Authorization: Bearer {SECRET}",
        f"--wandb_api_key+={SECRET}",
        f"https://hooks.slack.com/services/T0/B0/{SECRET}",
        f"https://me:a@{SECRET}@host",
        f"https://me:a/{SECRET}@host",
        f"--user=bob:{SECRET}",
        f'{{"user": "bob:{SECRET}"}}',
        f"--db=user:{SECRET}@host/db",
        f"user:a@{SECRET}@host/db",
        f"--authkey={SECRET}",
    ],
)
def test_a_text_with_the_name_of_a_secret_is_hidden_as_a_whole(text):
    assert SECRET not in without_secrets(text)


@pytest.mark.parametrize(
    "text", ["--trainer.devices=2", "/home/private/train.py", "a: b", "git@host:a", "--user=bob"]
)
def test_other_texts_are_shown(text):
    assert without_secrets(text) == text


@given(st.text())
def test_any_text_can_be_looked_through(text):
    without_secrets(text)


@pytest.mark.parametrize("text", ["a:b,", "u:", "user=", "a://b:c", "key"])
def test_a_long_text_takes_no_time(text):
    began = time.monotonic()
    without_secrets(100_000 * text)
    assert time.monotonic() - began < 5


def test_a_text_that_is_cut_or_hidden_is_not_whole():
    assert is_whole("short...")
    assert is_whole(shortened(300 * "x"))
    assert not is_whole(shortened(301 * "x"))
    assert not is_whole(without_secrets("--key=x"))
